"""The stated noise against that of the sky, and what variances are made of."""

import warnings

import numpy as np
import pytest
from astropy.io import fits
from astropy.stats import sigma_clip
from conftest import star_field
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy import ndimage

from gpudia import RunConfig
from gpudia.errors import ConfigError, DataWarning, FrameError, InputError
from gpudia.flags import FRAME_FLAGS
from gpudia.images import FrameLayout, estimate_variance, make_frame, read_frame, sky_and_noise
from gpudia.images.smoothing import gaussian, smoothed

SHAPE = (192, 200)
SKY, GAIN, READ_NOISE = 500.0, 2.0, 8.0
SIGMA = np.sqrt(SKY / GAIN + (READ_NOISE / GAIN) ** 2)
HEADER = fits.Header({"GAIN": GAIN, "RDNOISE": READ_NOISE, "SATURATE": 60000.0})
MISMATCH = FRAME_FLAGS.noise_mismatch


def exposure(seed=0, stars=None, shape=SHAPE, sky=SKY, gain=GAIN, read_noise=READ_NOISE):
    """ADU, Poisson and read noise."""
    rng = np.random.default_rng(seed)
    light = sky + (0 if stars is None else stars)
    return rng.poisson(np.broadcast_to(light, shape) * gain) / gain + rng.normal(0, read_noise / gain, shape)


def warned(*args, **more):
    with pytest.warns(DataWarning, match="noise of the sky must be what") as caught:
        frame = make_frame(*args, **more)
    assert frame.flags & MISMATCH
    return next(str(w.message) for w in caught if "noise of the sky" in str(w.message))


class TestHeaderAgainstData:
    @given(st.floats(0.3, 20), st.floats(50, 5000), st.floats(0, 15))
    @settings(max_examples=20)
    def test_what_a_detector_gives_is_never_doubted(self, gain, sky, read_noise):
        data = exposure(1, None, (96, 96), sky, gain, read_noise)
        for image in (data, np.rint(data).astype(np.int32)):
            assert make_frame(image, layout=FrameLayout(gain=gain, read_noise=read_noise)).flags & MISMATCH == 0

    @pytest.mark.parametrize(("factor", "doubted"), [(0.3, True), (0.6, False), (1.8, False), (3.0, True)])
    def test_a_wrong_gain(self, factor, doubted):
        """Sigma goes as gain^-1/2 (with the read noise a little faster): doubted beyond 1.5^2 and a margin."""
        layout = FrameLayout(gain=GAIN * factor)
        if not doubted:
            assert make_frame(exposure(), header=HEADER, layout=layout).flags & MISMATCH == 0
            return
        message = warned(exposure(), header=HEADER, layout=layout, path="a.fits")
        assert message.startswith("a.fits: noise of the sky must be what gain and read noise say, to a factor of 1.5, ")
        assert ("a gain too large" if factor > 1 else "a gain too small") in message

    def test_an_average_with_the_gain_of_one(self):
        mean = np.mean([exposure(i) for i in range(5)], axis=0)
        assert "that of a mean of N frames is N times larger" in warned(mean, header=HEADER)
        right = FrameLayout(gain=5 * GAIN, read_noise=np.sqrt(5) * READ_NOISE)
        assert make_frame(mean, header=HEADER, layout=right).flags & MISMATCH == 0
        total = np.sum([exposure(i) for i in range(5)], axis=0)
        assert make_frame(total, header=HEADER).flags & MISMATCH == 0

    def test_a_subtracted_sky_cannot_be_compared_but_the_read_noise_is_a_floor(self):
        data = exposure() - SKY
        assert make_frame(data, header=HEADER).flags & MISMATCH == 0
        assert make_frame(data, layout=FrameLayout(gain=GAIN)).flags & MISMATCH == 0
        assert "too large a read noise" in warned(data, header=HEADER, layout=FrameLayout(read_noise=5 * SIGMA * GAIN))

    @pytest.mark.parametrize("density", [20, 80])
    @pytest.mark.parametrize("fwhm", [1.8, 3.0, 5.0])
    @pytest.mark.parametrize("depth", [1, 10])
    def test_crowding_is_no_mismatch(self, density, fwhm, depth):
        """Up to a star every 20 px, down to far below the noise: the measured noise is up to 11 times too large."""
        data = exposure(2, depth * star_field((300, 300), 1, density, fwhm), (300, 300))
        assert make_frame(data, header=HEADER).flags & MISMATCH == 0

    def test_the_usual_resampling_is_no_mismatch(self):
        data = ndimage.shift(exposure(), 0.5, order=3)[8:-8, 8:-8]
        assert make_frame(data, header=HEADER).flags & MISMATCH == 0
        assert "resampling" in warned(ndimage.gaussian_filter(exposure(), 1.0), header=HEADER)

    def test_a_guessed_gain_is_not_compared(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "frame: gain must be positive")
            assert make_frame(exposure()).flags & MISMATCH == 0


class TestErrorPlaneAgainstData:
    @pytest.mark.parametrize("sky", [SKY, 0.0])
    @pytest.mark.parametrize(("factor", "doubted"), [(0.5, True), (0.75, False), (1.3, False), (2.0, True)])
    def test_scaled_errors(self, sky, factor, doubted):
        stars = star_field(SHAPE, 3, density=300)
        data = exposure(3, stars) - SKY + sky
        error = factor * np.sqrt((SKY + stars) / GAIN + (READ_NOISE / GAIN) ** 2)
        if doubted:
            assert "the error plane says" in warned(data, error=error, header=HEADER)
        else:
            assert make_frame(data, error=error, header=HEADER).flags & MISMATCH == 0

    def test_the_header_does_not_matter_then(self):
        error = np.full(SHAPE, SIGMA)
        frame = make_frame(exposure(), error=error, layout=FrameLayout(gain=50.0, read_noise=0.0, noise="header"))
        assert frame.flags & MISMATCH == 0
        np.testing.assert_array_equal(frame.variance, SIGMA**2)


class TestSources:
    def test_each_gives_the_noise_of_an_exposure(self):
        stars = star_field(SHAPE, 5, density=400, fwhm=6.0)
        data = exposure(5, stars)
        truth = (SKY + stars) / GAIN + (READ_NOISE / GAIN) ** 2
        for source in ("auto", "header", "data"):
            frame = make_frame(data, header=HEADER, layout=FrameLayout(noise=source))
            # The gain of "data" is that of the sky's noise, known to a few percent beside the stars.
            assert np.median(frame.variance / truth) == pytest.approx(1, abs=0.06), source
            bright = stars > 300
            assert np.median(frame.variance[bright] / truth[bright]) == pytest.approx(1, abs=0.1), source
            assert bool(frame.flags & FRAME_FLAGS.gain_guessed) == (source == "data")

    def test_header_is_the_formula(self):
        data = exposure(6)
        smooth = ndimage.uniform_filter(data, 3)
        found = estimate_variance(data, gain=GAIN, read_noise=READ_NOISE, source="header")
        inner = np.s_[1:-1, 1:-1]
        # smoothed above the sky's map, whose slope changes from mesh to mesh by a few percent of SIGMA
        np.testing.assert_allclose(found[inner], (smooth / GAIN + (READ_NOISE / GAIN) ** 2)[inner], rtol=1e-4)
        dark = estimate_variance(np.random.default_rng(0).normal(-50, 1, SHAPE), gain=GAIN, read_noise=0.0,
                                 source="header")
        np.testing.assert_allclose(dark, 1 / GAIN**2)  # one electron at least: no pixel has an infinite weight

    def test_data_knows_nothing_of_the_header(self):
        data = exposure(7)
        wrong = [FrameLayout(gain=g, read_noise=0.0, noise="data") for g in (0.1, 30.0)]
        first, second = (make_frame(data, layout=layout) for layout in wrong)
        np.testing.assert_array_equal(first.variance, second.variance)
        assert first.gain == second.gain
        assert first.gain == pytest.approx(SKY / SIGMA**2, rel=5 * np.sqrt(2 / data.size / 0.37))
        # With the right read noise it is the detector's.
        right = make_frame(data, layout=FrameLayout(gain=9.0, read_noise=READ_NOISE, noise="data"))
        assert right.gain == pytest.approx(GAIN, rel=5 * np.sqrt(2 / data.size / 0.37) * SIGMA**2 / (SKY / GAIN))

    def test_data_keeps_the_header_s_gain_where_the_sky_tells_none(self):
        frame = make_frame(exposure() - SKY, header=HEADER, layout=FrameLayout(noise="data"))
        assert (frame.gain, frame.flags) == (GAIN, 0)

    def test_the_read_noise_is_no_floor_for_data(self):
        data = np.random.default_rng(8).normal(0, 1, SHAPE)
        assert np.median(estimate_variance(data, None, 1.0, 5.0)) == 25.0
        assert np.median(estimate_variance(data, None, 1.0, 5.0, source="data")) == pytest.approx(1, rel=0.1)

    @pytest.mark.parametrize("missing", ["GAIN", "RDNOISE"])
    def test_header_needs_both(self, tmp_path, missing):
        header = HEADER.copy()
        del header[missing]
        fits.PrimaryHDU(exposure(), header).writeto(tmp_path / "a.fits")
        rule = r"a\.fits: gain and read noise must be known where noise is 'header', got (nan and 8|2 and nan)"
        with pytest.raises(FrameError, match=rule):
            read_frame(tmp_path / "a.fits", FrameLayout(noise="header"))
        with pytest.raises(InputError, match=r"gain and read_noise must be known for source='header', got 2.0 and nan"):
            estimate_variance(exposure(), gain=2.0, source="header")

    def test_an_unknown_source(self):
        with pytest.raises(ConfigError, match=r"^noise must be one of auto, header, data, got 'both'"):
            FrameLayout(noise="both")
        with pytest.raises(InputError, match=r"^source must be one of auto, header, data, got 'both'"):
            estimate_variance(exposure(), source="both")
        assert FrameLayout(**RunConfig("a", "b", noise="data").layout()).noise == "data"


def test_correlated_noise_is_seen_in_frames_of_every_size():
    """The narrow meshes at the edges of most sizes have too few pixels to tell; they once voted against it."""
    rng = np.random.default_rng(9)
    white = rng.normal(0, 10, (400, 400))
    smooth = ndimage.gaussian_filter(white, 0.8)
    for side in (384, 385, 390, 398):
        noise = np.median(sky_and_noise(smooth[:side, :side])[1])
        assert noise == pytest.approx(smooth[:side, :side].std(), rel=0.15)


@given(st.integers(0, 1000), st.floats(0, 0.7), st.booleans())
@settings(max_examples=30)
def test_clipping_is_that_of_astropy(seed, masked, rounded):
    """Rows with outliers of either sign, gaps and ties."""
    from gpudia.images.noise import _clipped

    rng = np.random.default_rng(seed)
    rows = rng.normal(10, 2, (5, 64)) + np.where(rng.random((5, 64)) < 0.1, rng.normal(0, 1e3, (5, 64)), 0)
    rows = (np.rint(rows) if rounded else rows).astype(np.float32)
    rows[rng.random(rows.shape) < masked] = np.nan
    rows[:, 0] = 10  # none is empty
    kept = sigma_clip(np.ma.masked_invalid(rows.astype(float)), sigma=3, maxiters=5, axis=-1, masked=False)
    expected = np.nanmedian(kept, axis=-1), np.nanmean(kept, axis=-1), np.nanstd(kept, axis=-1)
    np.testing.assert_allclose(_clipped(rows), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gain", [1e-42, 1e-200, 1e300])
def test_the_variance_of_an_absurd_gain_is_a_number(gain):
    data = star_field((40, 50), seed=2).astype(np.float32) + 100
    found = estimate_variance(data, gain=gain, read_noise=5.0)
    assert np.isfinite(found).all()
    assert (found > 0).all()


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (31, 33), (70, 64), (100, 200)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_smoothing_is_that_of_scipy(shape, dtype):
    """But for rounding, which is at most so many times that of the largest value as there are terms (39 an axis)."""
    image = np.random.default_rng(1).normal(100, 30, shape).astype(dtype)
    image[shape[0] // 2, shape[1] // 3] = 60000
    rounding = 2 * 39 * np.finfo(dtype).eps * 60000
    for sigma in (0.8, 2.0, 6.3):
        kernel = gaussian(sigma, int(3 * sigma + 0.5))
        assert_allclose(kernel.sum(), 1, rtol=1e-14)
        expected = ndimage.gaussian_filter(image.astype(float), sigma, truncate=3.0)
        assert_allclose(smoothed(image, kernel), expected, rtol=0, atol=rounding)
    expected = 25 * ndimage.uniform_filter(image.astype(float), size=5)
    assert_allclose(smoothed(image, np.ones(5)), expected, rtol=0, atol=25 * rounding)
    assert_array_equal(smoothed(np.ones(shape, dtype), np.ones(3)), np.full(shape, 9))
    assert smoothed(image, np.ones(3)).dtype == dtype
