"""A stack of images as reference: one PSF, the noise that it states, no trace of what one of them has wrong."""

import numpy as np
import pytest
from conftest import star_field

from gpudia.backend import to_device, to_host
from gpudia.errors import InputError
from gpudia.model import Coadd, ReferencePlan

SHAPE, K = (90, 100), 9
FWHM, SCALE, SKY = (3.0, 3.2, 3.4, 3.6, 3.3), (1.0, 0.8, 1.1, 0.9, 1.0), (300.0, 280.0, 350.0, 300.0, 320.0)
WEIGHTS = np.array([5.0, 2.0, 4.0, 2.5, 3.0])


@pytest.fixture(scope="module")
def series():
    """Five images of a field under PSFs, scales and skies of their own: without noise, as measured, variances."""
    rng = np.random.default_rng(8)
    clean = np.array([s * star_field(SHAPE, seed=5, density=60, fwhm=w, shift=(0.2 * i - 0.3, 0.3 - 0.15 * i)) + b
                      for i, (w, s, b) in enumerate(zip(FWHM, SCALE, SKY, strict=True))])
    variance = clean / 2.0 + 20.0
    return clean, clean + rng.normal(size=clean.shape) * np.sqrt(variance), variance


def expected(clean):
    """What the mean is of images brought to the scale and sky of the first."""
    same = [(plane - b) / s + SKY[0] for plane, s, b in zip(clean, SCALE, SKY, strict=True)]
    return np.average(same, axis=0, weights=WEIGHTS)


def stacked(images, variances, masks, backend, split=1, rounds=2):
    """Rounds, each but the first against the stack of the one before; planes (data, variance, mask), host."""
    images, variances, masks = (to_device(a, backend) for a in (images, variances, masks))
    weights = to_device(WEIGHTS, backend)
    reference, error, mask = images[0], variances[0] ** 0.5, masks[0]
    for number in range(rounds):
        plan = ReferencePlan(reference, K, error=error, mask=mask)
        sums = Coadd(reference)
        for part in np.array_split(np.arange(len(WEIGHTS)), split):
            rows = slice(part[0], part[-1] + 1)
            stack = plan.subtract(images[rows], variances[rows] ** 0.5, masks[rows])
            own = to_device(np.arange(len(WEIGHTS))[rows] == (-1 if number else 0), backend)
            sums.add(stack, images[rows], variances[rows], masks[rows], weights[rows], own)
        mean = sums.result(complete=False)
        reference, error, mask = mean.data, mean.variance ** 0.5, mean.mask
    mean = sums.result(complete=True)
    return tuple(to_host(plane) for plane in (mean.data, mean.variance, mean.mask))


def test_the_mean_has_one_psf_and_the_noise_that_it_states(series, backend):
    clean, images, variances = series
    data, variance, mask = stacked(images, variances, np.zeros(images.shape, bool), backend)
    assert not mask[K:-K, K:-K].any()
    # values over a scale with an error of 1 %, at most, and pixels filled in: a few per cent of the noise
    scaled = np.array([v / s**2 for v, s in zip(variances, SCALE, strict=True)])
    np.testing.assert_allclose(np.median(variance / np.average(scaled, axis=0, weights=WEIGHTS**2)
                                         / (WEIGHTS**2).sum() * WEIGHTS.sum() ** 2), 1.0, rtol=0.02)
    pull = ((data - expected(clean)) / np.sqrt(variance))[~mask]
    # 9000 pixels: 0.7 % of statistics; the errors of five scales and skies are common to all pixels
    assert pull.std() == pytest.approx(1.0, abs=0.05)
    assert abs(pull.mean()) < 0.3


def test_batches_do_not_change_the_mean(series, backend):
    _, images, variances = series
    masks = np.zeros(images.shape, bool)
    whole, parts = (stacked(images, variances, masks, backend, split) for split in (1, 3))
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_what_one_image_has_wrong_leaves_no_trace(series, backend):
    """A hit on an image, one on the first reference, a core that is saturated in the sharpest, a dead column there."""
    clean, images, variances = series
    images, masks = images.copy(), np.zeros(images.shape, bool)
    images[2, 40, 50:53] += 5000.0
    images[0, 60, 30:32] += 4000.0  # no image is to be blamed for what only the reference has
    y, x = np.unravel_index(np.argmax(clean[0][20:-20, 20:-20]), (SHAPE[0] - 40, SHAPE[1] - 40))
    core = (slice(y + 18, y + 23), slice(x + 18, x + 23))
    masks[(0, *core)] = masks[0, :, 70] = True
    data, variance, mask = stacked(images, variances, masks, backend, rounds=5)
    pull = (data - expected(clean)) / np.sqrt(variance)
    assert not mask[K:-K, K:-K].any()
    for place in ((40, slice(48, 55)), (60, slice(28, 34)), (slice(K, -K), 70)):
        assert np.abs(pull[place]).max() < 5
    # Where the others alone make the core it is off by their PSFs, 29 sigma; every round that fills it halves that,
    # down to what the kernel of the one that is filled is uncertain by.
    assert np.abs(stacked(images, variances, masks, backend, rounds=1)[0] - expected(clean))[core].max() > 4 * np.abs(
        data - expected(clean))[core].max()
    assert np.abs(pull[core]).max() < 7


def test_pixels_that_hardly_any_image_has_are_masked(series, backend):
    _, images, variances = series
    masks = np.zeros(images.shape, bool)
    masks[:4, 30, 40] = masks[:, 50, 60] = True
    mask = stacked(images, variances, masks, backend)[2]
    assert mask[30, 40]
    assert mask[50, 60]
    assert mask[K:-K, K:-K].sum() < 10


def test_a_reference_is_one_image():
    with pytest.raises(InputError, match=r"reference must be an array \(H, W\), got shape \(2, 3, 4\)"):
        Coadd(np.zeros((2, 3, 4)))
