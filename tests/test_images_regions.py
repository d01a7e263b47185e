"""Regions of files: the same numbers as reading the whole and cutting, from no more of the file than they need."""

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from hypothesis import given
from hypothesis import strategies as st

from gpudia.errors import FrameError
from gpudia.flags import FRAME_FLAGS, PIXEL_FLAGS
from gpudia.images import FrameLayout, Region, cut, read_frame, whole_frame

SHAPE = (150, 130)
REGION = Region(37, 64, (40, 50))
SKY, SIGMA = 1000.0, 20.0


def header():
    cards = {"GAIN": 2.5, "RDNOISE": 0.0, "SATURATE": 50000.0, "CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN",
             "CRVAL1": 150.0, "CRVAL2": 2.0, "CRPIX1": 65.0, "CRPIX2": 75.0, "CDELT1": -1e-4, "CDELT2": 1e-4,
             "L1FWHM": 1.4}
    return fits.Header(cards)


def planes(dtype=np.float32):
    """Image, mask with every kind of bit, error that differs from pixel to pixel, catalog."""
    rng = np.random.default_rng(11)
    data = np.rint(rng.normal(SKY, SIGMA, SHAPE))
    data[70:75, 50:55] = 60000
    bits = np.where(rng.random(SHAPE) < 0.05, 2 ** rng.integers(0, 4, SHAPE), 0).astype(np.uint8)
    error = rng.uniform(0.9, 1.1, SHAPE).astype(np.float32) * SIGMA
    error[80, 60] = np.nan
    return data.astype(dtype), bits, error, Table({"x": [40.0, 120.0], "y": [70.0, 5.0], "flux": [5.0, 4.0]})


def write(path, dtype=np.float32, how=None, cube=False):
    """An LCO-like file; `how`: the keywords of `CompImageHDU`, None for plain images."""
    data, bits, error, catalog = planes(dtype)

    def hdu(values, name, cards=None):
        values = values[None] if cube and how is None else values
        if how is None:
            return fits.ImageHDU(values, cards, name=name)
        kind = dict(how)
        if values.dtype.kind == "f" and "quantize_level" not in kind:
            kind |= {"quantize_level": 16, "dither_seed": 7, "quantize_method": 1}
        return fits.CompImageHDU(values, cards, name=name, **kind)

    fits.HDUList([fits.PrimaryHDU(), hdu(data, "SCI", header()), fits.BinTableHDU(catalog, name="CAT"),
                  hdu(bits, "BPM"), hdu(error, "ERR")]).writeto(path)  # fmt: skip
    return path


def assert_same(part, whole):
    """The region's frame against the one cut from the whole; what is measured in the data may differ."""
    for name in ("data", "variance", "mask"):
        ours, theirs = getattr(part, name), getattr(whole, name)
        on = whole.mask & PIXEL_FLAGS.no_data == 0  # elsewhere data and variance are made up
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours[on], theirs[on])
    np.testing.assert_array_equal(part.mask, whole.mask)
    at = np.array([[3.0, 4.0], [20.0, 30.0]])
    np.testing.assert_allclose(part.wcs.all_pix2world(at, 0), whole.wcs.all_pix2world(at, 0), rtol=0, atol=1e-12)
    assert part.wcs.pixel_shape == whole.wcs.pixel_shape
    for name in ("name", "path", "origin", "gain", "read_noise", "saturation", "filter", "mjd", "flags", "shape"):
        assert getattr(part, name) == getattr(whole, name) or np.isnan(getattr(part, name)), name
    assert part.fwhm == pytest.approx(whole.fwhm)
    assert part.header == whole.header
    assert (part.catalog == whole.catalog).all()


ROWS = {"compression_type": "RICE_1"}  # as fpack does it: one row, one tile
SQUARES = {"compression_type": "RICE_1", "tile_shape": (32, 32)}
GZIP = {"compression_type": "GZIP_2", "quantize_level": 0}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("f") / "f.fits.fz", np.float32, SQUARES)


@pytest.fixture(scope="module")
def whole(file):
    return read_frame(file)


class TestSameAsWhole:
    @pytest.mark.parametrize("how", [None, ROWS, SQUARES, GZIP, GZIP | {"tile_shape": (64, 16)}])
    @pytest.mark.parametrize("dtype", [np.float32, np.uint16, np.int32, np.float64])
    def test_every_tiling_and_dtype(self, tmp_path, how, dtype):
        path = write(tmp_path / ("f.fits" if how is None else "f.fits.fz"), dtype, how)
        part, whole = read_frame(path, region=REGION), read_frame(path)
        assert_same(part, cut(whole, REGION))
        if how is None or np.dtype(dtype).kind != "f" or "quantize_level" in how:  # otherwise packed with a loss
            np.testing.assert_array_equal(whole.data, planes(dtype)[0])
        assert np.count_nonzero(part.mask & PIXEL_FLAGS.saturated) >= 25

    @pytest.mark.parametrize(("name", "cube"), [("f.fits.gz", False), ("f.fits", True), ("f.fits.gz", True)])
    def test_gzip_and_axes_of_length_one(self, tmp_path, name, cube):
        path = write(tmp_path / name, np.uint16, cube=cube)
        assert_same(read_frame(path, region=REGION), cut(read_frame(path), REGION))

    @given(st.integers(-60, 125), st.integers(-60, 145), st.integers(20, 90), st.integers(20, 90))
    def test_anywhere_and_beyond_the_edges(self, file, whole, x0, y0, height, width):
        region = Region(x0, y0, (height, width))
        on = (min(x0 + width, SHAPE[1]) - max(x0, 0), min(y0 + height, SHAPE[0]) - max(y0, 0))
        if min(on) <= 0:
            for reader in (lambda: read_frame(file, region=region), lambda: cut(whole, region)):
                with pytest.raises(FrameError, match=r"f\.fits\.fz: region must overlap the frame of shape \(150, "):
                    reader()
        elif min(on) > 3:  # of fewer pixels all may be masked
            assert_same(read_frame(file, region=region), cut(whole, region))

    @pytest.mark.parametrize("how", [None, ROWS, SQUARES])
    def test_saturation_from_the_type_in_the_file(self, tmp_path, how):
        data, cards = planes(np.uint16)[0], header()
        data[data == 60000] = 65535
        del cards["SATURATE"]
        made = fits.PrimaryHDU(data, cards) if how is None else fits.CompImageHDU(data, cards, **how)
        path = tmp_path / "u.fits"
        fits.HDUList([made] if how is None else [fits.PrimaryHDU(), made]).writeto(path)
        assert made.header["BZERO"] == 32768
        for region, n in ((None, 25), (REGION, 25), (Region(0, 0, (60, 60)), 0)):
            frame = read_frame(path, region=region)
            assert (frame.saturation, frame.flags) == (65535, FRAME_FLAGS.saturation_guessed)
            assert np.count_nonzero(frame.mask & PIXEL_FLAGS.saturated) == n

    def test_blank_pixels(self, tmp_path):
        data = planes()[0]
        data[66, 40:45] = np.nan
        path = tmp_path / "n.fits.fz"
        packed = fits.CompImageHDU(data, header(), name="SCI", **SQUARES, quantize_level=16, dither_seed=7)
        fits.HDUList([fits.PrimaryHDU(), packed]).writeto(path)
        part = read_frame(path, region=REGION)
        assert np.argwhere(part.mask & PIXEL_FLAGS.no_data).tolist() == [[2, x - 37] for x in range(40, 45)]
        np.testing.assert_array_equal(part.mask, cut(read_frame(path), REGION).mask)

    def test_the_whole_frame_as_a_region(self, file, whole):
        assert_same(read_frame(file, region=whole_frame(SHAPE)), whole)
        assert read_frame(file, region=whole_frame(SHAPE)).flags == 0
        assert read_frame(file, region=Region(-3, 0, (50, 50))).flags == FRAME_FLAGS.partly_outside


def spans_of_tiles(path):
    """(index of the HDU, row of tiles, column of tiles, first byte, bytes) of every tile in the file."""
    found, content = [], path.read_bytes()
    across = -(-SHAPE[1] // 32)
    with fits.open(path, disable_image_compression=True) as hdus:
        for number in (1, 3, 4):
            cards, start = hdus[number].header, hdus[number].fileinfo()["datLoc"]
            table = np.frombuffer(content, hdus[number].columns.dtype.newbyteorder(">"), cards["NAXIS2"], start)
            heap = start + cards.get("THEAP", cards["NAXIS1"] * cards["NAXIS2"])
            found += [(number, *divmod(tile, across), heap + int(at), int(size))
                      for tile, (size, at) in enumerate(table["COMPRESSED_DATA"])]
    return found


def test_only_the_tiles_of_the_region_are_unpacked(tmp_path):
    """Damage of any other tile does not matter; that of a tile of the region does."""
    path = write(tmp_path / "f.fits.fz", np.uint16, GZIP | {"tile_shape": (32, 32)})
    whole = cut(read_frame(path), REGION)
    content, needed = bytearray(path.read_bytes()), []
    for _, row, column, start, size in spans_of_tiles(path):
        if row in (2, 3) and column in (1, 2):  # rows 64 to 103, columns 37 to 86
            needed.append(start)
        else:
            content[start:start + size] = b"\xff" * size
    assert len(needed) == 3 * 4
    path.write_bytes(content)
    assert_same(read_frame(path, region=REGION), whole)
    content[needed[0]] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(FrameError, match=r"f\.fits\.fz: file must be readable as FITS"):
        read_frame(path, region=REGION)


@pytest.mark.parametrize("plane", ["BPM", "ERR"])
def test_a_plane_of_another_shape_is_refused(tmp_path, plane):
    path = tmp_path / "p.fits"
    fits.HDUList([fits.PrimaryHDU(planes()[0], header()),
                  fits.ImageHDU(np.ones((160, 140), np.uint8), name=plane)]).writeto(path)  # fmt: skip
    with pytest.raises(FrameError, match=r"must have the image's shape \(150, 130\), got \(160, 140\)"):
        read_frame(path, region=REGION)


def test_a_region_without_a_good_pixel_is_refused(tmp_path):
    data = planes()[0]
    data[:80, :80] = np.nan
    path = tmp_path / "n.fits"
    fits.PrimaryHDU(data, header()).writeto(path)
    with pytest.raises(FrameError, match=r"n\.fits: image must have at least one good pixel"):
        read_frame(path, FrameLayout(), Region(10, 10, (20, 20)))
