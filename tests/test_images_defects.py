"""Pixels that no mask flags: found where they are known to be wrong, never on stars."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from scipy import ndimage

from gpudia.errors import ConfigError
from gpudia.flags import PIXEL_FLAGS
from gpudia.images import FrameLayout, flag_defects, flag_lacosmic, make_frame, sharp_pixels, sharp_residuals
from gpudia.simulate import SimulationSettings, simulate_field

GAIN, READ_NOISE, SKY, SATURATION = 1.5, 8.0, 1000.0, 60000.0
SHAPE = (120, 130)
FWHM = 4.0
STAR = (64.3, 57.8)


def layout(saturation=SATURATION):
    return FrameLayout(gain=GAIN, read_noise=READ_NOISE, saturation=saturation)


def exposure(peak=30000.0, fwhm=FWHM, positions=STAR, beta=None, axis_ratio=1.0, angle=0.0, seed=0):
    """Stars, Gaussian or Moffat, averaged over the pixels, on a sky with photon and read noise, ADU."""
    model = SKY + peak * sum(profile(p, fwhm, beta, axis_ratio, angle) for p in np.atleast_2d(positions))
    rng = np.random.default_rng(seed)
    return rng.poisson(model * GAIN) / GAIN + rng.normal(0, READ_NOISE / GAIN, SHAPE)


def profile(position, fwhm, beta, axis_ratio, angle):
    fine = (np.arange(5) - 2) / 5
    x, y = (np.add.outer(np.arange(n), fine).ravel() - p for n, p in zip(SHAPE[::-1], position, strict=True))
    c, s = np.cos(angle), np.sin(angle)
    u, v = x * c + y[:, None] * s, y[:, None] * c - x * s
    q = 4 * (u**2 * axis_ratio + v**2 / axis_ratio) / fwhm**2  # 1 at half of the maximum
    values = 2.0**-q if beta is None else (1 + (2 ** (1 / beta) - 1) * q) ** -beta
    return values.reshape(SHAPE[0], 5, SHAPE[1], 5).mean(axis=(1, 3))


def found_in(data, fwhm=FWHM, bits=None):
    return sharp_pixels(make_frame(data, bits=bits, layout=layout()), fwhm)


@pytest.mark.parametrize("seed", [1, 4, 7])
def test_most_wrong_pixels_of_a_crowded_field_and_hardly_any_good_one(seed):
    """Wrong and good by the truth: a column of half response, hot and dead pixels, tracks of cosmic rays."""
    series = simulate_field(SimulationSettings(shape=(200, 220), n_epochs=3, seed=seed))
    for true in series.frames:
        saturation = series.settings.saturation
        frame = make_frame(true.data, layout=layout(saturation))
        found = sharp_pixels(frame, true.fwhm)
        off = np.abs(true.data - np.minimum(true.model, saturation)) / np.sqrt(true.variance)
        wrong, good = (off > 10) & (frame.mask == 0), off < 5
        assert wrong.sum() > 200  # the column alone
        assert found[wrong].mean() > 0.9
        # single pixels and tracks: where the line of a track makes a step, pixels have a third wrong neighbour
        outside_columns = wrong & (wrong.mean(axis=0) < 0.5)
        assert found[outside_columns].mean() > 0.7
        assert found[good].mean() < 1e-4


LINES = {
    "hot pixel": [(30, 40)],
    "hot pixel on the star": [(60, 64)],
    "track along a row": [(30, 40 + i) for i in range(5)],
    "track along a column": [(30 + i, 40) for i in range(5)],
    "diagonal track": [(30 + i, 40 + i) for i in range(5)],
}


@pytest.mark.parametrize("pixels", LINES.values(), ids=LINES)
def test_hot_pixels_and_tracks_are_found_alone(pixels):
    data = exposure()
    expected = np.zeros(SHAPE, bool)
    expected[tuple(np.transpose(pixels))] = True
    data[expected] += 20000.0
    assert_array_equal(found_in(data), expected)


@pytest.mark.parametrize("response", [0.0, 0.5])
def test_dead_column_is_found_from_edge_to_edge(response):
    data = exposure()
    data[:, 40] *= response
    expected = np.zeros(SHAPE, bool)
    expected[:, 40] = True
    assert_array_equal(found_in(data), expected)


@pytest.mark.parametrize("pixel", [(58, 64), (58, 66), (56, 64)])
def test_dead_pixel_on_a_star_is_found(pixel):
    data = exposure()
    data[pixel] = 0.0
    expected = np.zeros(SHAPE, bool)
    expected[pixel] = True
    assert_array_equal(found_in(data), expected)


@pytest.mark.parametrize("fwhm", [1.8, 2.2, 3.0, 6.0])
@pytest.mark.parametrize("beta", [None, 2.5])
@pytest.mark.parametrize(("axis_ratio", "angle"), [(1.0, 0.0), (0.8, 0.0), (0.8, np.pi / 4)])
def test_stars_are_never_found(fwhm, beta, axis_ratio, angle):
    """Core and flank, bright and faint, round and elliptical, in the middle and at the edge of a pixel."""
    for seed, position in enumerate([(64.0, 57.0), (64.5, 57.0), (64.5, 57.5), STAR]):
        for peak in (50000.0, 3000.0):
            data = exposure(peak, fwhm, position, beta, axis_ratio, angle, seed)
            assert data.max() < SATURATION
            assert not found_in(data, fwhm).any()


@pytest.mark.parametrize("fwhm", [2.2, 3.0, 4.0])
@pytest.mark.parametrize("apart", [1.0, 1.5, 2.0, 2.5, 3.0])
def test_gap_between_two_bright_stars_is_not_found(fwhm, apart):
    """Moffat stars, as in the sky: without their wings (Gaussian) the gap is as dark as a dead pixel."""
    half = apart * fwhm / 2
    data = exposure(30000.0, fwhm, [(64 - half, 57), (64 + half, 57)], beta=3.5)
    assert not found_in(data, fwhm).any()


@pytest.mark.parametrize("fwhm", [np.nan, np.inf, 0.0, -3.0, 1.79])
def test_nothing_is_found_without_a_known_fwhm_that_pixels_sample(fwhm):
    data = exposure()
    data[30, 40] += 20000.0
    assert not found_in(data, fwhm).any()
    assert found_in(data, 1.8).any()


def test_pixels_that_are_masked_already_are_not_returned():
    data, bits = exposure(), np.zeros(SHAPE, np.uint8)
    data[[30, 80], 40] += 20000.0
    data[90, 40] = np.nan
    data[100, 40] = 2 * SATURATION
    bits[30, 40] = PIXEL_FLAGS.bad
    assert np.argwhere(found_in(data, bits=bits)).tolist() == [[80, 40]]


def test_flagging_sets_one_bit_and_leaves_the_frame_as_it_was():
    data, bits = exposure(), np.zeros(SHAPE, np.uint8)
    data[30, 40] += 20000.0
    bits[50, 50] = PIXEL_FLAGS.low_qe
    frame = make_frame(data, bits=bits, layout=layout())
    before = [plane.copy() for plane in (frame.data, frame.variance, frame.mask)]
    flagged = flag_defects(frame, FWHM)
    expected = bits.copy()
    expected[30, 40] = PIXEL_FLAGS.cosmic_ray
    assert_array_equal(flagged.mask, expected)
    assert flagged.mask.dtype == np.uint8
    for plane, old in zip((frame.data, frame.variance, frame.mask), before, strict=True):
        assert_array_equal(plane, old)
    assert_array_equal(flagged.data, frame.data)
    assert not sharp_pixels(flagged, FWHM).any()
    assert flag_defects(flagged, FWHM) is flagged


@pytest.mark.parametrize("fwhm", [2.2, 3.0, 4.5, 7.0])
@pytest.mark.parametrize("beta", [None, 2.5])
def test_residuals_of_stars_are_no_cosmic_rays(fwhm, beta):
    """Lone variable stars up and down, anywhere within the pixel, 10 to 10,000 sigma; sharp pixels are all found."""
    rng, sigma = np.random.default_rng(3), 12.0
    grid = np.stack(np.meshgrid([22, 50, 78], [22, 50, 78, 100]), axis=-1).reshape(-1, 2)
    places = grid + rng.uniform(-1, 1, (12, 2))
    peaks = sigma * 10 ** rng.uniform(1, 4, 12) * rng.choice([-1, 1], 12)
    residual = sum(peak * profile(place, fwhm, beta, 1.0, 0.0) for place, peak in zip(places, peaks, strict=True))
    residual = residual + rng.normal(0, sigma, SHAPE)
    error, ignore = np.full(SHAPE, sigma), np.zeros(SHAPE, bool)
    assert not sharp_residuals(residual, error, ignore, fwhm).any()
    hits = np.zeros(SHAPE, bool)
    hits[5:115:10, 124] = hits[3, 5:100:12] = True
    ignore[5, 124] = True
    found = sharp_residuals(residual + 15 * sigma * hits, error, ignore, fwhm)
    assert_array_equal(found, hits & ~ignore)
    assert not sharp_residuals(residual + 15 * sigma * hits, error, ignore, np.nan).any()


def test_residuals_without_an_error_are_passed_over():
    residual = np.zeros(SHAPE)
    residual[50, 60], residual[20, 20] = np.nan, 1000.0
    error = np.ones(SHAPE)
    error[20, 20] = np.nan
    assert not sharp_residuals(residual, error, np.zeros(SHAPE, bool), FWHM).any()


def test_lacosmic_flags_hits_and_leaves_what_was_masked():
    pytest.importorskip("astroscrappy")
    data, bits = exposure(peak=8000.0), np.zeros(SHAPE, np.uint8)
    hits = [(20, 30), (90, 100), (100, 40)]
    for row, column in hits:
        data[row, column] += 4000.0
    bits[100, 40] = PIXEL_FLAGS.bad
    frame = make_frame(data, bits=bits, layout=layout())
    found = flag_lacosmic(frame).mask
    assert found[20, 30] == found[90, 100] == PIXEL_FLAGS.cosmic_ray
    assert found[100, 40] == PIXEL_FLAGS.bad
    assert ((found != 0) & (frame.mask == 0)).sum() <= 8  # the hits, and hardly more: the star is none
    assert_array_equal(frame.mask != 0, bits != 0)


def test_lacosmic_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "astroscrappy", None)
    with pytest.raises(ConfigError, match=r"pip install 'gpudia\[lacosmic\]'"):
        flag_lacosmic(make_frame(exposure(), layout=layout()))


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (40, 30), (900, 80)])
@pytest.mark.parametrize("least", [-3, 0, 2])
def test_third_neighbours_are_those_of_a_rank_filter(shape, least):
    """Of all pixels that exceed theirs by more than what is asked for; the largest image is taken in two parts."""
    from gpudia.images.defects import _AT_A_TIME, _RING, _third_neighbours

    assert np.prod(shape) < _AT_A_TIME or shape == (900, 80)
    image = np.random.default_rng(0).integers(0, 9, shape).astype(np.float32)  # with ties
    high = ndimage.rank_filter(image, -3, footprint=_RING, mode="nearest")
    at, third = _third_neighbours(image, np.full(shape, least, np.float32))
    assert_array_equal(third, high[at])
    found = np.zeros(shape, bool)
    found[at] = True
    assert not (found & ~(image - image.min() > least)).any()  # far too many would be no help
    assert found[image - high > least].all()
