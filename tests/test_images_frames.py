"""Regions and cutouts, series, and files that appear whole or not at all."""

import os
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS, DistortionLookupTable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gpudia.errors import ConfigError, FrameError, InputError
from gpudia.flags import FRAME_FLAGS, PIXEL_FLAGS
from gpudia.images import (
    FrameLayout,
    FrameQuality,
    Region,
    catalog_of,
    check_mixture,
    check_series,
    cut,
    flux_noise,
    make_frame,
    rank_references,
    region_around,
    whole_frame,
    write_atomically,
    write_hdus,
    write_images,
    write_table,
)

SHAPE = (70, 90)


@pytest.fixture(scope="module")
def frame():
    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.crval, wcs.wcs.crpix = ["RA---TAN-SIP", "DEC--TAN-SIP"], (10.0, -20.0), (40.0, 30.0)
    wcs.wcs.cd = np.diag([-1e-4, 1e-4])
    from astropy.wcs import Sip

    a, b = np.zeros((3, 3)), np.zeros((3, 3))
    a[2, 0], b[0, 2] = 1e-5, -2e-5
    wcs.sip = Sip(a, b, None, None, wcs.wcs.crpix)
    data = np.random.default_rng(0).normal(100, 5, SHAPE)
    data[20, 30] = np.nan
    return make_frame(data, wcs=wcs, layout=FrameLayout(gain=4.0, read_noise=0.0, saturation=1e5), path="f.fits")


class TestRegion:
    @given(st.floats(-0.5, 89.49), st.floats(-0.5, 69.49), st.integers(1, 120))
    def test_target_is_central_and_positions_are_exact(self, x, y, size):
        region = region_around(x, y, size, SHAPE)
        inside = region.to_cutout((x, y))
        assert isinstance(region.x0, int)
        assert isinstance(region.y0, int)
        assert tuple(inside) == (x - region.x0, y - region.y0)
        assert np.all(np.abs(inside - size // 2) <= 0.5)
        np.testing.assert_allclose(region.to_frame(inside), (x, y), atol=1e-12)
        assert region.contains((x, y))

    def test_rectangles(self):
        region = region_around(10.2, 20.7, (31, 11), SHAPE)
        assert (region.origin, region.shape, region.centre) == ((5, 6), (31, 11), (10.0, 21.0))
        np.testing.assert_array_equal(region.corners, [[5, 6], [15, 6], [15, 36], [5, 36]])
        assert region.shifted(3, -2).origin == (8, 4)

    @pytest.mark.parametrize(("x", "y"), [(-0.6, 5), (89.5, 5), (5, 69.6), (np.nan, 5), (5, np.inf)])
    def test_target_outside(self, x, y):
        with pytest.raises(FrameError, match=r"target must lie on the frame of shape \(70, 90\), got \(x, y\) = \("):
            region_around(x, y, 11, SHAPE)

    def test_empty(self):
        with pytest.raises(InputError, match="shape must be two positive integers, got"):
            region_around(5, 5, 0, SHAPE)


class TestCut:
    def test_inside(self, frame):
        part = cut(frame, Region(5, 7, (40, 50)))
        for name in ("data", "variance", "mask"):
            np.testing.assert_array_equal(getattr(part, name), getattr(frame, name)[7:47, 5:55])
            assert not np.shares_memory(getattr(part, name), getattr(frame, name))
        assert part.flags == frame.flags
        assert cut(frame, whole_frame(frame.shape)).data.shape == SHAPE

    @given(st.integers(-60, 80), st.integers(-60, 60), st.integers(5, 100), st.integers(5, 100))
    def test_beyond_the_edge_is_masked_not_shifted(self, frame, x0, y0, height, width):
        region = Region(x0, y0, (height, width))
        y, x = np.mgrid[y0 : y0 + height, x0 : x0 + width]
        on = (y >= 0) & (y < SHAPE[0]) & (x >= 0) & (x < SHAPE[1])
        if not on.any():
            with pytest.raises(FrameError, match=r"f\.fits: region must overlap the frame of shape"):
                cut(frame, region)
            return
        part = cut(frame, region)
        np.testing.assert_array_equal(part.data[on], frame.data[y[on], x[on]])
        np.testing.assert_array_equal(part.mask[on], frame.mask[y[on], x[on]])
        assert (part.mask[~on] == PIXEL_FLAGS.no_data).all()
        assert np.isfinite(part.data).all()
        assert (part.variance > 0).all()
        assert np.abs(part.data[~on] - 100).max(initial=0) < 25  # a sky value, not zero
        assert bool(part.flags & FRAME_FLAGS.partly_outside) == (not on.all())
        assert part.data.dtype == frame.data.dtype

    def test_origin_and_catalog_stay_in_the_full_frame(self, frame):
        stars = replace(frame, catalog=Table({"xcenter": [10.0, 50.0], "ycenter": [30.0, 40.0]}))
        part = cut(cut(stars, Region(5, 7, (40, 50))), Region(-2, 3, (20, 20)))
        assert (frame.origin, part.origin) == ((0, 0), (3, 10))
        np.testing.assert_array_equal(part.data[:, 2:], frame.data[10:30, 5:23])
        for column in ("x", "y", "ra", "dec"):
            np.testing.assert_allclose(catalog_of(part)[column], catalog_of(stars)[column], rtol=1e-12)
        bare = replace(part, catalog=Table({"ra": catalog_of(stars)["ra"], "dec": catalog_of(stars)["dec"]}))
        # SIP's inverse is found by iterations, to 1e-4 px
        np.testing.assert_allclose(catalog_of(bare)["x"], [10.0, 50.0], atol=1e-3)

    def test_distortion_tables_follow(self, frame):
        rng = np.random.default_rng(1)
        wcs = frame.wcs.deepcopy()
        for name in ("cpdis1", "det2im2"):
            table = rng.normal(size=(8, 9)).astype(np.float32)
            setattr(wcs, name, DistortionLookupTable(table, (1, 1), (1, 1), (10, 10)))
        region, at = Region(5, 7, (40, 50)), np.array([[8.3, 15.0], [20.0, 33.0]])
        here = cut(replace(frame, wcs=wcs), region).wcs.all_pix2world(region.to_cutout(at), 0)
        np.testing.assert_allclose(here, wcs.all_pix2world(at, 0), atol=1e-9)

    def test_world_coordinates_follow(self, frame):
        region = Region(-10, 12, (30, 40))
        at = np.array([[3.3, 15.0], [20.0, 33.0]])
        here = cut(frame, region).wcs.all_pix2world(region.to_cutout(at), 0)
        np.testing.assert_allclose(here, frame.wcs.all_pix2world(at, 0), atol=1e-9)
        np.testing.assert_array_equal(frame.wcs.wcs.crpix, (40.0, 30.0))


class TestSeries:
    def test_best_reference(self):
        def quality(fwhm, noise):
            return FrameQuality(fwhm, 0.1, 50, 100.0, noise, 0.0)

        qualities = [quality(4, 10), quality(2, 10), quality(4, 4), quality(np.nan, 1)]
        assert rank_references(qualities).tolist() == [2, 1, 0, 3]
        assert rank_references(qualities, [1, 1, 0.5, 1]).tolist() == [1, 2, 0, 3]
        assert rank_references(qualities, [np.nan, 0.1, 1, 1]).tolist() == [2, 0, 1, 3]
        assert flux_noise(qualities[0], 0.5) == 80.0
        assert flux_noise(qualities[0], 0.0) == np.inf
        with pytest.raises(InputError, match=r"transparencies must have shape \(4,\), got \(1,\)"):
            rank_references(qualities, [1.0])

    @pytest.mark.parametrize("name", ["filter", "instrument"])
    def test_a_few_odd_frames_fail_and_a_mixture_is_refused(self, name):
        def some(**counts):
            return [SimpleNamespace(path=f"{value}{i}.fits", **{name: value if value != "unknown" else ""})
                    for value, count in counts.items() for i in range(count)]

        assert check_mixture([], name) == check_mixture(some(unknown=3), name) == check_mixture(some(a=9), name) == {}
        odd = check_mixture(some(a=9, unknown=30, b=1), name)
        assert {i: str(e) for i, e in odd.items()} == {39: f"b0.fits: {name} must be that of the series, a, got b"}
        assert sorted(check_mixture(some(a=1, b=18, c=1), name)) == [0, 19]
        with pytest.raises(ConfigError) as refused:
            check_mixture(some(b=40, a=60, unknown=500), name)
        assert str(refused.value) == (f"{name} must be the same in all frames, got a (60), b (40): keep one with "
                                      f"--select \"{name} == 'a'\", or let them differ with --mixed {name}")
        for counts in ({"a": 8, "b": 1}, {"a": 1, "b": 1}, {"a": 45, "b": 3, "c": 3}):
            with pytest.raises(ConfigError, match=f"{name} must be the same"):
                check_mixture(some(**counts), name)

    def test_a_reference_says_what_the_others_must_be(self):
        frames = [SimpleNamespace(path=f"{i}.fits", filter="rp" if i < 19 else "gp") for i in range(20)]
        assert sorted(check_mixture(frames, "filter", "rp")) == [19]
        with pytest.raises(ConfigError, match=r"\(that of the reference, gp\), got rp \(19\), gp \(1\): keep one with "
                                              r"--select \"filter == 'gp'\""):
            check_mixture(frames, "filter", "gp")
        with pytest.raises(ConfigError, match=r"\(that of the reference, ip\).*: name a reference among them, or"):
            check_mixture(frames, "filter", "ip")

    def test_mixed(self):
        def made(shape, band):
            data = np.random.default_rng(1).normal(0, 1, shape)
            return make_frame(data, header=fits.Header({"FILTER": band, "GAIN": 1.0}), path=f"{band}.fits")

        kinds = [((20, 30), "rp"), ((20, 30), "rp"), ((30, 20), "rp"), ((20, 30), "gp"), ((20, 30), "")]
        frames = [made(*kind) for kind in kinds]
        errors = check_series(frames)
        assert sorted(errors) == [2, 3]
        assert str(errors[2]) == "rp.fits: shape must be that of the series, (20, 30), got (30, 20)"
        assert str(errors[3]) == "gp.fits: filter must be that of the series, rp, got gp"
        assert sorted(check_series(frames, reference=frames[3])) == [0, 1, 2]
        assert sorted(check_series(frames, same=())) == [2]
        with pytest.raises(ConfigError, match="frames must name at least one image, got none"):
            check_series([])


class TestWriting:
    def test_table_and_hdus_come_back(self, tmp_path):
        table = Table({"a": [1, 2], "b": [np.nan, 0.5]})
        assert write_table(table, tmp_path / "t.ecsv") == tmp_path / "t.ecsv"
        np.testing.assert_array_equal(Table.read(tmp_path / "t.ecsv")["b"], table["b"])
        data = np.arange(12.0).reshape(3, 4)
        for name in ("d.fits", "d.fits.gz"):
            for _ in range(2):  # what is there is replaced
                write_hdus(fits.HDUList([fits.PrimaryHDU(data)]), tmp_path / name)
            np.testing.assert_array_equal(fits.getdata(tmp_path / name), data)
        assert (tmp_path / "d.fits.gz").read_bytes()[:2] == b"\x1f\x8b"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["d.fits", "d.fits.gz", "t.ecsv"]
        plain = tmp_path / "plain"
        plain.touch()
        assert (tmp_path / "t.ecsv").stat().st_mode == plain.stat().st_mode

    def test_failure_leaves_the_old_file_and_nothing_else(self, tmp_path):
        path = tmp_path / "x.txt"
        path.write_text("old")

        def broken(temporary):
            temporary.write_text("half")
            raise RuntimeError("disk on fire")

        with pytest.raises(RuntimeError, match="disk on fire"):
            write_atomically(path, broken)
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_folder_that_cannot_be_written(self, tmp_path):
        with pytest.raises(ConfigError, match=r"output folder must be writable, got .*none: No such file"):
            write_table(Table({"a": [1]}), tmp_path / "none" / "t.ecsv")
        with pytest.raises(ConfigError, match="output must be a file, got the folder"):
            write_table(Table({"a": [1]}), tmp_path)
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        if os.access(closed, os.W_OK):
            pytest.skip("this user may write everywhere")
        with pytest.raises(ConfigError, match=r"output folder must be writable, got .*closed: Permission denied"):
            write_table(Table({"a": [1]}), closed / "t.ecsv")


@given(hnp.arrays(st.sampled_from([np.uint8, np.float32, np.float64]),
                  hnp.array_shapes(min_dims=1, max_dims=2, max_side=40),
                  elements={"allow_nan": False, "min_value": 0, "max_value": 200}))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_images_are_written_as_astropy_reads_them(tmp_path, image):
    """Pixels, cards and checksums; astropy warns where a sum is wrong."""
    path, cards = tmp_path / "a.fits", fits.Header({"GPUDIA": "0.1.0"})
    more = fits.Header({"CRPIX1": 3.5})
    more["COMMENT"] = "something " * 9
    write_images(path, cards, {"ONE": image, "TWO": image[::2]}, {"TWO": more})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fits.open(path, checksum=True) as hdus:
            hdus.verify("exception")
            assert [h.name for h in hdus] == ["PRIMARY", "ONE", "TWO"]
            np.testing.assert_array_equal(hdus["ONE"].data, image)
            np.testing.assert_array_equal(hdus["TWO"].data, image[::2])
            assert (hdus[0].header["GPUDIA"], hdus["TWO"].header["CRPIX1"]) == ("0.1.0", 3.5)
            assert all("CHECKSUM" in h.header and "DATASUM" in h.header for h in hdus)
    assert [p.name for p in tmp_path.iterdir()] == ["a.fits"]
