"""Reading frames: every layout gives the same numbers; every unusable file is named with the reason."""

import warnings

import numpy as np
import pytest
from astropy.io import fits
from astropy.nddata import CCDData, InverseVariance, NDData
from astropy.table import Table
from astropy.wcs import WCS

from gpudia.errors import ConfigError, DataWarning, FrameError
from gpudia.flags import FRAME_FLAGS, PIXEL_FLAGS
from gpudia.images import (
    FrameLayout,
    Region,
    cut,
    estimate_variance,
    frame_from_nddata,
    make_frame,
    read_frame,
    sky_and_noise,
)
from gpudia.images.headers import exposure_facts, sane_wcs

SHAPE = (60, 80)
GAIN, READ_NOISE, SKY = 2.0, 6.0, 400.0


def tan_wcs(scale=0.5, crval=(150.0, 2.0)):
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval, wcs.wcs.crpix = crval, (40.5, 30.5)
    wcs.wcs.cd = np.array([[-scale, 0], [0, scale]]) / 3600
    return wcs


def facts(**more):
    header = tan_wcs().to_header()
    header.update(GAIN=GAIN, RDNOISE=READ_NOISE, SATURATE=50000.0, EXPTIME=120.0, FILTER="rp", INSTRUME="fa03",
                  L1FWHM=1.5)
    header["MJD-OBS"] = 60000.0
    header.update(more)
    return header


def image(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    data = rng.poisson(SKY * GAIN, SHAPE) / GAIN + rng.normal(0, READ_NOISE / GAIN, SHAPE)
    return np.rint(data).astype(dtype)


def write(path, *hdus):
    fits.HDUList(list(hdus)).writeto(path)
    return path


def layers(data):
    mask, error = np.zeros(SHAPE, np.uint8), np.full(SHAPE, 15.0, np.float32)
    mask[3, 4], mask[5, 6] = PIXEL_FLAGS.bad, PIXEL_FLAGS.cosmic_ray
    catalog = Table({"x": [11.0, 21.0], "y": [6.0, 7.0], "flux": [5.0, 4.0]})
    return data, mask, error, catalog


def lco(path, data, compressed=False):
    data, mask, error, catalog = layers(data)
    image_hdu = fits.CompImageHDU if compressed else fits.ImageHDU
    kind = {"quantize_level": 0, "compression_type": "GZIP_2"} if compressed else {}
    return write(path, fits.PrimaryHDU(header=fits.Header({"SITEID": "lsc"})),
                 image_hdu(data, facts(), name="SCI", **kind), fits.BinTableHDU(catalog, name="CAT"),
                 image_hdu(mask, name="BPM", **({"compression_type": "RICE_1"} if compressed else {})),
                 image_hdu(error, name="ERR", **kind))  # fmt: skip


class TestLayouts:
    @pytest.mark.parametrize("name", ["a.fits", "b.fits.gz", "c.fit"])
    def test_plain(self, tmp_path, name):
        data = image()
        path = write(tmp_path / name, fits.PrimaryHDU(data, facts()))
        frame = read_frame(path)
        np.testing.assert_array_equal(frame.data, data)
        assert frame.name == name[0]
        assert (frame.gain, frame.read_noise, frame.saturation, frame.exptime) == (GAIN, READ_NOISE, 50000.0, 120.0)
        assert (frame.filter, frame.instrument, frame.flags) == ("rp", "fa03", 0)
        assert frame.mjd == pytest.approx(60000 + 60 / 86400, abs=1e-9)  # the middle of the exposure
        assert frame.fwhm == pytest.approx(3.0)  # 1.5 arcsec at 0.5 arcsec per pixel
        assert frame.wcs is not None

    @pytest.mark.parametrize(("name", "compressed"), [("s.fits", False), ("s.fits.fz", True)])
    def test_lco_plain_and_fpacked(self, tmp_path, name, compressed):
        data = image()
        frame = read_frame(lco(tmp_path / name, data, compressed))
        np.testing.assert_array_equal(frame.data, data)
        np.testing.assert_array_equal(frame.variance, np.full(SHAPE, 225.0, np.float32))
        assert frame.mask[3, 4] == PIXEL_FLAGS.bad
        assert frame.mask[5, 6] == PIXEL_FLAGS.cosmic_ray
        assert np.count_nonzero(frame.mask) == 2
        assert frame.header["SITEID"] == "lsc"
        assert frame.header["FILTER"] == "rp"
        assert frame.name == "s"
        assert len(frame.catalog) == 2

    def test_layered_file_of_the_seed(self, tmp_path):
        data, mask, error, catalog = layers(image())
        newer = tan_wcs(crval=(151.0, 3.0))
        apertures = Table({"id": [1], "xcenter": [2.0], "ycenter": [3.0], "aperture_sum": [1.0]})
        path = write(tmp_path / "l.fits", fits.PrimaryHDU(data, facts()), fits.BinTableHDU(catalog, name="CAT"),
                     fits.ImageHDU(mask, name="BPM"), fits.ImageHDU(error, name="ERR"),
                     fits.ImageHDU(header=newer.to_header()), fits.BinTableHDU(apertures, name="APER"))  # fmt: skip
        frame = read_frame(path)
        np.testing.assert_allclose(frame.wcs.wcs.crval, (151.0, 3.0))
        np.testing.assert_array_equal(frame.data, data)
        assert frame.catalog.colnames == ["x", "y", "flux"]

    def test_a_catalog_is_read_where_it_has_what_is_wanted(self, tmp_path):
        catalog = Table({"x": [1.0, 2.0], "Source_ID": [7, 8]})
        path = write(tmp_path / "c.fits", fits.PrimaryHDU(image(), facts()), fits.BinTableHDU(catalog, name="CAT"))
        assert read_frame(path, catalog_with=("mag", "source_id")).catalog["Source_ID"].tolist() == [7, 8]
        assert read_frame(path, catalog_with=("mag",)).catalog is None

    @pytest.mark.parametrize("dtype", [np.uint16, ">i2", ">f4", ">f8", np.int32, np.uint8])
    def test_every_dtype_gives_the_same_numbers(self, tmp_path, dtype):
        data = image() - (300 if dtype is np.uint8 else 0)
        path = write(tmp_path / "d.fits", fits.PrimaryHDU(data.astype(dtype), facts()))
        frame = read_frame(path)
        np.testing.assert_array_equal(frame.data, data)
        assert frame.data.dtype.isnative
        assert frame.data.flags.c_contiguous
        assert frame.data.dtype == (np.float64 if dtype in (">f8", np.int32) else np.float32)
        assert frame.variance.dtype == frame.data.dtype

    def test_axes_of_length_one_do_not_count(self, tmp_path):
        data = image()
        path = write(tmp_path / "cube.fits", fits.PrimaryHDU(data[None], fits.Header({"GAIN": 1.0})))
        np.testing.assert_array_equal(read_frame(path).data, data)

    def test_file_is_closed_and_unchanged(self, tmp_path):
        path = lco(tmp_path / "s.fits", image())
        before = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("error", ResourceWarning)
            frame = read_frame(path)
            path.unlink()
        frame.data[0, 0] += 1  # an array of its own
        path.write_bytes(before)
        assert read_frame(path).data[0, 0] == frame.data[0, 0] - 1

    def test_names_and_values_can_be_set(self, tmp_path):
        data = image()
        path = write(tmp_path / "o.fits", fits.PrimaryHDU(), fits.ImageHDU(data * 0 + np.eye(*SHAPE), name="FIRST"),
                     fits.ImageHDU(data, fits.Header({"MYGAIN": 1.9}), name="SECOND"))  # fmt: skip
        frame = read_frame(path, FrameLayout(image_hdu="SECOND", gain_keys=("MYGAIN",), saturation=500.0))
        np.testing.assert_array_equal(frame.data, data)
        assert (frame.gain, frame.saturation) == (1.9, 500.0)
        assert read_frame(path, FrameLayout(image_hdu="SECOND", gain=2.5)).gain == 2.5
        with pytest.raises(FrameError, match="image named OTHER, got"):
            read_frame(path, FrameLayout(image_hdu="OTHER"))

    def test_nddata(self):
        data, mask = image(), np.zeros(SHAPE, bool)
        mask[2, 2] = True
        meta = dict(facts())
        weight = np.full(SHAPE, 1 / 225)
        given = {"mask": mask, "uncertainty": InverseVariance(weight), "meta": meta, "wcs": tan_wcs()}
        for made in (NDData(data, **given), CCDData(data, unit="adu", **given)):
            frame = frame_from_nddata(made)
            np.testing.assert_allclose(frame.variance, 225.0, rtol=1e-6)
            assert np.argwhere(frame.bad).tolist() == [[2, 2]]
            assert frame.gain == GAIN
            assert not np.shares_memory(frame.data, data)


    @pytest.mark.parametrize("with_error", [True, False])
    def test_there_and_back_as_ccddata(self, tmp_path, with_error):
        bits, header = np.zeros(SHAPE, np.uint8), facts()
        bits[3, 4], bits[5, 6], bits[7, 8] = 1, 8, 1 | 4
        error = np.random.default_rng(4).uniform(13, 16, SHAPE) if with_error else None
        whole = make_frame(image(), bits=bits, error=error, header=header, wcs=tan_wcs())
        frame = cut(whole, Region(2, 3, (40, 50)))
        made = frame.to_ccddata()
        assert made.unit == "adu"
        assert made.mask.dtype == bool
        assert not np.shares_memory(made.data, frame.data)
        assert not np.shares_memory(made.flags, frame.mask)
        np.testing.assert_array_equal(made.mask, frame.bad)
        np.testing.assert_allclose(made.uncertainty.array, np.sqrt(frame.variance), rtol=1e-6)
        back = frame_from_nddata(made, name=frame.name)
        np.testing.assert_array_equal(back.data, frame.data)
        np.testing.assert_array_equal(back.mask, frame.mask)
        np.testing.assert_allclose(back.variance, frame.variance, rtol=4e-7)  # a root and a square in single precision
        for name in ("gain", "read_noise", "saturation", "exptime", "mjd", "filter", "instrument", "name"):
            assert getattr(back, name) == getattr(frame, name)
        assert back.header == frame.header
        for other in (back.wcs, made.wcs, CCDData.read(_written(made, tmp_path)).wcs):
            np.testing.assert_allclose(other.all_pix2world([[5.0, 6.0]], 0), whole.wcs.all_pix2world([[7.0, 9.0]], 0))

    def test_other_units_are_refused(self):
        with pytest.raises(FrameError, match="image must be in adu, got electron; divide by the gain first"):
            frame_from_nddata(CCDData(image(), unit="electron"))

    def test_as_ccddata_without_world_coordinates(self):
        frame = make_frame(image(), header=fits.Header({"GAIN": GAIN}))
        assert frame.to_ccddata().wcs is None
        # arithmetic of astropy: the noise of a difference
        twice = frame.to_ccddata().subtract(frame.to_ccddata())
        np.testing.assert_allclose(twice.uncertainty.array**2, 2 * frame.variance, rtol=1e-6)

    def test_flags_that_say_something_else_are_left_alone(self):
        mask = np.zeros(SHAPE, bool)
        mask[2, 2] = True
        frame = frame_from_nddata(CCDData(image(), unit="adu", mask=mask, flags=np.full(SHAPE, 8), meta=dict(facts())))
        assert np.argwhere(frame.mask).tolist() == [[2, 2]]
        assert frame.mask[2, 2] == PIXEL_FLAGS.bad


def _written(made, folder):
    made.write(folder / "ccd.fits")
    return folder / "ccd.fits"


class TestTime:
    @pytest.mark.parametrize(("cards", "mjd"), [
        ({"MJD": 59000.0, "EXPTIME": 60.0}, 59000 + 30 / 86400),
        ({"DATE-OBS": "2020-05-31T00:00:00", "EXPTIME": 60.0}, 59000 + 30 / 86400),
        ({"DATE-OBS": "2020-05-31", "UTSTART": "12:00:00"}, 59000.5),
        ({"MJD-OBS": 59000.0, "MJD-MID": 59000.7, "EXPTIME": 60.0}, 59000.7),
        ({"MJD-OBS": "UNKNOWN", "DATE-OBS": "soon"}, np.nan),
        ({"DATE-OBS": "2020-05-31", "TIME-OBS": "18:00:00"}, 59000.75),
        ({"DATE-OBS": "2020-05-31", "UT": "06:00:00.0"}, 59000.25),
        ({"MJD": 59000, "DATE-OBS": "2020-05-31T12:00:00"}, 59000.5),  # a whole day says less
        ({"MJD-OBS": 2459000.75}, 59000.25),  # a Julian date
        ({"MJD-OBS": 59000.25, "TIMESYS": "TAI"}, 59000.25 - 37 / 86400),
        ({"DATE-OBS": "2020-05-31T06:00:00", "TIMESYS": "TT"}, 59000.25 - 69.184 / 86400),
    ])  # fmt: skip
    def test_middle_of_the_exposure(self, cards, mjd):
        frame = make_frame(image(), header=fits.Header({"GAIN": 1.0, **cards}))
        assert frame.mjd == pytest.approx(mjd, abs=1e-8, nan_ok=True)

    @pytest.mark.parametrize(("date", "known"), [("3023-02-25T06:30:16", False), ("2039-02-25T06:30:16", True)])
    def test_dates_beyond_the_known_leap_seconds_are_taken_quietly(self, date, known):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert np.isfinite(exposure_facts(fits.Header({"DATE-OBS": date}), FrameLayout())["mjd"]) == known

    @pytest.mark.parametrize(("cards", "airmass"), [
        ({"AIRMASS": 1.3}, 1.3), ({"AIRMASS": "1.3"}, 1.3), ({"AIRMASS": 0.0}, np.nan), ({"AIRMASS": -999}, np.nan),
        ({"SECZ": 1.2}, 1.2), ({}, np.nan)])
    def test_airmass(self, cards, airmass):
        frame = make_frame(image(), header=fits.Header({"GAIN": 1.0, **cards}))
        assert frame.airmass == pytest.approx(airmass, nan_ok=True)


class TestUnusable:
    def test_missing_folder_and_text(self, tmp_path):
        with pytest.raises(FrameError, match=r"none\.fits: file must exist"):
            read_frame(tmp_path / "none.fits")
        with pytest.raises(FrameError, match="must be a file, got a folder"):
            read_frame(tmp_path)
        text = tmp_path / "t.fits"
        for content in ("", "not a FITS file\n" * 500):
            text.write_text(content)
            with pytest.raises(FrameError, match="file must be readable as FITS, got OSError"):
                read_frame(text)

    @pytest.mark.parametrize("name", ["p.fits", "p.fits.gz", "p.fits.fz"])
    @pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
    def test_truncated(self, tmp_path, name, share):
        path = tmp_path / name
        if name.endswith("fz"):
            lco(path, image(), compressed=True)
        else:
            write(path, fits.PrimaryHDU(image(), facts()))
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole)) + 7])  # a cut at an HDU's very end cannot be seen
        with pytest.raises(FrameError, match=rf"{name}: file must"):
            read_frame(path)

    def test_no_image(self, tmp_path):
        path = write(tmp_path / "t.fits", fits.PrimaryHDU(), fits.BinTableHDU(Table({"x": [1.0]}), name="CAT"))
        with pytest.raises(FrameError, match=r"must hold a two-dimensional image, got PRIMARY \(\), CAT table"):
            read_frame(path)

    @pytest.mark.parametrize("plane", ["BPM", "ERR"])
    def test_plane_of_another_shape(self, tmp_path, plane):
        path = write(tmp_path / "p.fits", fits.PrimaryHDU(image(), facts()),
                     fits.ImageHDU(np.ones((5, 7), np.uint8), name=plane))  # fmt: skip
        with pytest.raises(FrameError, match=r"must have the image's shape \(60, 80\), got \(5, 7\)"):
            read_frame(path)

    def test_nothing_to_measure(self):
        with pytest.raises(FrameError, match="at least one good pixel, got 4800 masked"):
            make_frame(np.full(SHAPE, np.nan))
        with pytest.raises(FrameError, match="at least one good pixel"):
            make_frame(image(), bits=np.ones(SHAPE, bool))
        with pytest.raises(FrameError, match="must not be constant, got 7 in all 4800"):
            make_frame(np.full(SHAPE, 7.0))
        with pytest.raises(FrameError, match="must hold real numbers, got dtype complex64"):
            make_frame(image() * 1j)
        with pytest.raises(FrameError, match=r"must be two-dimensional and not empty, got shape \(0, 3\)"):
            make_frame(np.zeros((0, 3)))

    def test_override_must_be_positive(self):
        with pytest.raises(ConfigError, match="gain must be a positive number, got 0"):
            FrameLayout(gain=0)


class TestDoubtful:
    @pytest.mark.parametrize("gain", [None, 0.0, -1.0, "n/a"])
    def test_gain_from_the_data(self, gain):
        header = facts()
        header.remove("GAIN")
        if gain is not None:
            header["GAIN"] = gain
        data = np.concatenate([np.concatenate([image(s) for s in (i, i + 9)], 1) for i in range(4)], 0)
        with pytest.warns(DataWarning, match="gain must be positive"):
            frame = make_frame(data, header=header)
        assert frame.flags & FRAME_FLAGS.gain_guessed
        # Noise variance from n pixels is known to sqrt(2/n); the robust measure is 37 % as efficient.
        assert frame.gain == pytest.approx(GAIN, rel=5 * np.sqrt(2 / data.size / 0.37))

    def test_no_gain_in_a_sky_subtracted_frame(self):
        with pytest.warns(DataWarning, match="gain must be positive"):
            frame = make_frame(image() - SKY)
        assert np.isnan(frame.gain)
        assert (frame.variance > 0).all()

    def test_saturation(self):
        data = image(dtype=np.uint16)
        data[10:13, 10:13] = 4095
        piled = make_frame(data, header=fits.Header({"GAIN": 1.0}))
        assert piled.saturation == 4095
        assert piled.flags == FRAME_FLAGS.saturation_guessed
        assert np.count_nonzero(piled.mask & PIXEL_FLAGS.saturated) == 9
        assert make_frame(image(dtype=np.uint16), header=fits.Header({"GAIN": 1.0})).saturation == 65535
        assert np.isnan(make_frame(image(), header=fits.Header({"GAIN": 1.0})).saturation)
        stated = make_frame(data, header=fits.Header({"GAIN": 1.0, "SATURATE": 4000.0}))
        assert stated.flags == 0
        np.testing.assert_array_equal(stated.mask == PIXEL_FLAGS.saturated, data >= 4000)

    def test_not_finite_is_masked_and_filled(self):
        data = image()
        data[4, 5], data[6, 7] = np.nan, np.inf
        frame = make_frame(data, header=facts())
        assert np.argwhere(frame.mask == PIXEL_FLAGS.no_data).tolist() == [[4, 5], [6, 7]]
        assert np.isfinite(frame.data).all()
        assert abs(frame.data[4, 5] - SKY) < 3 * frame.sky_noise

    def test_error_without_meaning_is_masked(self):
        error = np.full(SHAPE, 15.0)
        error[0, :3] = np.nan, 0, -1
        frame = make_frame(image(), error=error, header=facts())
        assert frame.mask[0, :4].tolist() == [PIXEL_FLAGS.no_data] * 3 + [0]
        assert (frame.variance > 0).all()

    def test_unexposed_corners(self):
        rng = np.random.default_rng(3)
        y, x = np.mgrid[:200, :200]
        lit = np.hypot(x - 100, y - 100) < 115
        zeros = make_frame(np.where(lit, SKY + rng.normal(0, 15, lit.shape), 0), header=facts())
        dark = make_frame(np.where(lit, SKY, 10) + rng.normal(0, 15, lit.shape), header=facts())
        for frame in (zeros, dark):
            missing = frame.mask == PIXEL_FLAGS.no_data
            assert missing[~lit].all()
            assert not missing[np.hypot(x - 100, y - 100) < 115 - 8].any()  # grown by 4 px, found on 5 x 5 means
        subtracted = make_frame(rng.normal(0, 15, lit.shape), header=facts())
        assert not subtracted.bad.any()

    def test_wcs_that_cannot_be(self):
        wcs = tan_wcs(scale=5000.0)
        with pytest.warns(DataWarning, match="WCS not usable"):
            assert make_frame(image(), header=facts(), wcs=wcs).wcs is None
        linear = WCS(naxis=2)
        assert make_frame(image(), header=facts(), wcs=linear).wcs is None


class TestNoise:
    def test_noise_of_pure_sky(self):
        rng = np.random.default_rng(5)
        data = rng.normal(100, 7, (256, 300))
        sky, noise = sky_and_noise(data)
        assert sky.shape == noise.shape == data.shape
        # Median of about 70 meshes of 1024 pixels; the robust measure is 37 % as efficient as a standard deviation.
        assert np.median(noise) == pytest.approx(7, rel=5 / np.sqrt(2 * 0.37 * data.size))
        assert np.median(sky) == pytest.approx(100, abs=5 * 7 * 1.25 * 2.5 / np.sqrt(data.size))

    def test_noise_scales_with_the_data(self):
        data = np.random.default_rng(6).normal(50, 4, (128, 128))
        for factor in (0.01, 1000.0):
            np.testing.assert_allclose(estimate_variance(data * factor), factor**2 * estimate_variance(data), rtol=1e-4)

    def test_correlated_noise_is_not_missed(self):
        from scipy.ndimage import gaussian_filter

        data = gaussian_filter(np.random.default_rng(7).normal(0, 10, (256, 256)), 0.8)
        assert np.median(sky_and_noise(data)[1]) == pytest.approx(data.std(), rel=0.15)

    def test_photon_noise_of_a_star(self):
        y, x = np.mgrid[:96, :96]
        star = 20000 * np.exp(-((x - 48) ** 2 + (y - 48) ** 2) / 2 / 4.0**2)
        rng = np.random.default_rng(8)
        data = rng.poisson((SKY + star) * GAIN) / GAIN + rng.normal(0, READ_NOISE / GAIN, star.shape)
        variance = estimate_variance(data, gain=GAIN, read_noise=READ_NOISE)
        expected = (SKY + star) / GAIN + (READ_NOISE / GAIN) ** 2
        bright = star > 5000
        # Smoothing 3 x 3 lowers the peak by the curvature: 1/3 (1/4^2) of it on each axis.
        assert np.median(variance[bright] / expected[bright]) == pytest.approx(1, abs=2 / 3 / 16)

    def test_masked_pixels_do_not_enter(self):
        rng = np.random.default_rng(9)
        data = rng.normal(100, 5, (128, 128))
        mask = rng.random(data.shape) < 0.02
        wrong = np.where(mask, 1e6, data)
        a, b = estimate_variance(wrong, mask, 2.0, 3.0), estimate_variance(np.where(mask, np.nan, data), mask, 2.0, 3.0)
        np.testing.assert_array_equal(a, b)


@pytest.mark.realdata
class TestRealFrames:
    def test_rise(self, real_data):
        for path in sorted((real_data / "rise").glob("*.fits")):
            frame = read_frame(path)
            assert frame.shape == (1026, 1030)
            assert (frame.gain, frame.read_noise, frame.instrument) == (2.4, 12.0, "RISE")
            assert frame.wcs is not None
            assert frame.bad[:60, :60].all()  # the vignetted corner
            assert not frame.bad[300:800, 300:800].any()
            # The header's own gain, read noise and sky explain the noise to 3 %.
            assert frame.flags & FRAME_FLAGS.noise_mismatch == 0
            photon = np.sqrt(frame.sky / frame.gain + (frame.read_noise / frame.gain) ** 2)
            assert frame.sky_noise == pytest.approx(photon, rel=0.03)
            fast = FrameLayout(gain_keys=("NOSUCHKEY",))
            with pytest.warns(DataWarning, match="gain must be positive"):
                assert read_frame(path, fast).gain == pytest.approx(2.4, rel=0.06)

    def test_eso085(self, real_data):
        for path in sorted((real_data / "eso085").glob("*.fit")):
            with pytest.warns(DataWarning, match="gain must be positive, got nan"):
                frame = read_frame(path)
            assert frame.data.dtype == np.float32
            assert frame.saturation == 65535
            assert frame.flags == FRAME_FLAGS.gain_guessed | FRAME_FLAGS.saturation_guessed
            assert frame.wcs is None
            np.testing.assert_array_equal(frame.mask == PIXEL_FLAGS.saturated, fits.getdata(path) == 65535)

    def test_decam(self, real_data):
        for path in sorted((real_data / "decam").glob("*.fits")):
            frame = read_frame(path)
            assert frame.data.dtype == np.float64
            assert frame.data.dtype.isnative
            assert abs(frame.sky) < 0.1 * frame.sky_noise
            # The noise is 12 to 19 times that of gain and read noise, rightly: the sky has been subtracted.
            assert frame.flags & FRAME_FLAGS.noise_mismatch == 0
            assert not frame.bad.any()


def test_a_header_with_rubbish_behind_its_end_hides_no_absurd_size(tmp_path):
    """Astropy takes the end for one, and would loop for ever over what comes after it."""
    path = tmp_path / "damaged.fits"
    data = np.random.default_rng(1).normal(100, 5, (20, 30)).astype(np.float32)
    header = fits.Header({"GAIN": 2.0, "RDNOISE": 5.0, "SATURATE": 6e4})
    error = np.full_like(data, 5)
    fits.HDUList([fits.PrimaryHDU(data, header), fits.ImageHDU(error, name="ERR")]).writeto(path)
    content = bytearray(path.read_bytes())
    end = content.index(b"END" + b" " * 77)
    content[end + 70:end + 71] = b"!"
    path.write_bytes(content)
    read_frame(path)
    at = content.rindex(b"NAXIS1  =")
    content[at:at + 80] = b"NAXIS1  =                  -32".ljust(80)
    path.write_bytes(content)
    with pytest.raises(FrameError, match="NAXIS1 must be from 0, got -32"):
        read_frame(path)


@pytest.mark.parametrize("cards", [
    {}, {"CTYPE1": "RA---SIN", "CTYPE2": "DEC--SIN"}, {"CTYPE1": "GLON-TAN", "CTYPE2": "GLAT-TAN"}, {"RADESYS": "FK4"},
    {"CTYPE1": "DEC--TAN", "CTYPE2": "RA---TAN"}, {"EQUINOX": 1950.0}, {"CUNIT1": "arcsec"}, {"CUNIT1": "DEG"},
    {"MJD-OBS": 57000.5, "DATE-OBS": "2020-01-01"}, {"OBJECT": "it's " * 30}, {"HIERARCH some key": 1}, {"PV2_1": 0.5},
    {"A_ORDER": 2, "B_ORDER": 2, "A_2_0": 1e-5}, {"PV1_5": 1e-4}, {"NAXIS3": 7}, {"CDELT1": "text"}, {"CTYPE1": 5},
    {"LONPOLE": 90}, {"CRVAL1": 10**6}, {"CPDIS1": "polynomial"}, {"WCSAXES": 3},
])
@pytest.mark.filterwarnings("ignore")
def test_world_coordinates_are_those_of_astropy(cards, tmp_path):
    header = tan_wcs().to_header()
    header.update(cards)
    path = tmp_path / "frame.fits"
    data = np.random.default_rng(1).normal(100, 10, (50, 40))
    fits.PrimaryHDU(data, header).writeto(path, output_verify="ignore")
    found = read_frame(path).wcs
    try:
        right = sane_wcs(WCS(fits.getheader(path), naxis=2), data.shape)
    except (AttributeError, ValueError):  # no text where one should be, distortions that are not known
        right = None
    assert (found is None) == (right is None)
    if right is not None:
        assert found.wcs == right.wcs
        assert found.to_header(relax=True) == right.to_header(relax=True)
        assert found.pixel_shape == right.pixel_shape
        xy = np.random.default_rng(2).uniform(0, 40, (2, 9))
        np.testing.assert_array_equal(found.pixel_to_world_values(*xy), right.pixel_to_world_values(*xy))
