"""Laws of the decorrelated difference and of the score image: noise of known variance in, white and N(0, 1) out."""

import numpy as np
import pytest
from scipy.signal import fftconvolve

import gpudia
from gpudia.backend import to_device, to_host
from gpudia.errors import InputError
from gpudia.photometry import epoch_psf, moffat_psf
from gpudia.photometry.psf import shifted_psf

SHAPE, K, DRAWS = (150, 160), 11, 12
PSF = moffat_psf(3.4, 21)


def gaussian_kernel(scale=0.8, shift=0.4, sigma=1.2):
    offset = np.arange(K) - K // 2
    kernel = np.exp(-(offset[:, None] ** 2 + (offset - shift) ** 2) / 2 / sigma**2)
    return scale * kernel / kernel.sum()


KERNEL = gaussian_kernel()


@pytest.fixture(scope="module")
def variances():
    """Of image and reference: sky, and the photon noise of stars up to thirty times as much."""
    rng = np.random.default_rng(3)
    stars = fftconvolve(rng.exponential(1, SHAPE) ** 3 * 30, PSF, mode="same")
    return 400.0 + 0.8 * stars, 300.0 + stars


def noise(rng, own, other, kernel=KERNEL):
    """A difference in which nothing varies."""
    difference = rng.normal(size=SHAPE) * np.sqrt(own)
    difference -= fftconvolve(rng.normal(size=SHAPE) * np.sqrt(other), kernel, mode="same")
    edge = K // 2
    difference[:edge] = difference[-edge:] = difference[:, :edge] = difference[:, -edge:] = np.nan
    return difference


def on(backend, *arrays):
    return [to_device(np.asarray(a), backend) for a in arrays]


def spread(values, area):
    """Mean square and its error; `area` is the number of pixels over which values are correlated."""
    good = values[np.isfinite(values)]
    return np.mean(good**2), np.sqrt(2 * area / good.size)


# Pixels of one score hang together over the PSF's autocorrelation: 4 pi s^2 with s = 0.42 FWHM, squared: half of that.
AREA = 2 * np.pi * (1.2 * 0.42 * 3.4) ** 2


def test_the_score_of_noise_has_unit_variance(backend, variances):
    own, other = variances
    rng, mask = np.random.default_rng(7), np.random.default_rng(8).random(SHAPE) < 0.01
    mask[70:73, 40:52] = mask[100:105, 100:105] = True
    scores, shares = [], None
    for _ in range(DRAWS):
        planes = on(backend, noise(rng, own, other), own, PSF, KERNEL, other)
        found = gpudia.score_image(*planes, mask=to_device(mask, backend))
        scores.append(to_host(found.score))
        shares = to_host(found.masked)
    scores = np.array(scores)
    bright = own > 3 * np.median(own)
    for where in (np.ones(SHAPE, bool), bright, shares > 0.01, shares > 0.1):
        mean_square, error = spread(scores[:, where], AREA)
        assert mean_square == pytest.approx(1.0, abs=4 * error + 0.01)
    mean_square, _ = spread(scores, AREA)
    assert abs(np.nanmean(scores)) < 4 * np.sqrt(AREA / np.isfinite(scores).sum())
    assert np.isfinite(scores[0, 20:60, 60:100]).mean() > 0.99
    assert not np.isfinite(scores[0][100:105, 100:105]).any()  # more than a fifth of a star there is masked
    assert mean_square == pytest.approx(1.0, abs=0.02)


def test_the_decorrelated_difference_is_white(backend, variances):
    own, other = (np.full(SHAPE, factor * np.median(v)) for v, factor in zip(variances, (1, 10), strict=True))
    rng = np.random.default_rng(9)
    raw, white, variance = [], [], []
    for _ in range(DRAWS):
        difference = noise(rng, own, other)
        found = gpudia.decorrelate(*on(backend, difference, own, KERNEL, other, PSF))
        raw.append(difference)
        white.append(to_host(found.difference))
        variance.append(to_host(found.variance))
    raw, white, variance = map(np.array, (raw, white, variance))
    n = np.isfinite(white).sum()
    for dy, dx in ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0)):
        product = [np.nanmean(p[:, dy:, dx:] * p[:, :SHAPE[0] - dy, :SHAPE[1] - dx]) / np.nanvar(p)
                   for p in (raw, white)]
        assert abs(product[1]) < 4 / np.sqrt(n)
        assert product[0] > 20 / np.sqrt(n)  # it was not white before
    assert np.nanmean(white**2 / variance) == pytest.approx(1.0, abs=4 * np.sqrt(2 / n))
    assert to_host(found.mask).sum() == np.isnan(white[-1]).sum()
    assert to_host(found.psf).sum() == pytest.approx(1.0)


def test_fluxes_are_unbiased_and_as_good_as_the_best_linear_estimate(backend, variances):
    """On white noise the score's error is the Cramer-Rao bound, 1 / sqrt(sum phi^2 / variance)."""
    star = epoch_psf(PSF, KERNEL)
    half = star.shape[0] // 2
    own = np.full(SHAPE, 400.0)
    difference = np.zeros(SHAPE)
    difference[75 - half:75 + half + 1, 80 - half:80 + half + 1] = 1000.0 * star
    mask = np.zeros(SHAPE, bool)
    mask[75, 82] = mask[73, 79] = True
    for hidden in (np.zeros(SHAPE, bool), mask):
        found = gpudia.score_image(*on(backend, difference, own, PSF, KERNEL), mask=to_device(hidden, backend))
        flux, error, share = (float(to_host(plane)[75, 80]) for plane in (found.flux, found.error, found.masked))
        good = ~hidden[75 - half:75 + half + 1, 80 - half:80 + half + 1]
        assert flux == pytest.approx(1000.0, rel=1e-9)
        assert error == pytest.approx(20.0 / np.sqrt((star**2 * good).sum()), rel=1e-9)
        assert share == pytest.approx(1 - (star**2 * good).sum() / (star**2).sum(), abs=1e-9)
    other = np.full(SHAPE, 300.0)
    correlated = gpudia.score_image(*on(backend, difference, own, PSF, KERNEL, other))
    # the optimum for this noise: 1 / sqrt(integral of |phi|^2 / power)
    side = 256
    phi, k = (np.fft.fft2(a, (side, side)) for a in (star, KERNEL))
    best = 1 / np.sqrt((np.abs(phi) ** 2 / (400.0 + 300.0 * np.abs(k) ** 2)).mean())
    assert float(to_host(correlated.error)[75, 80]) == pytest.approx(best, rel=1e-6)
    assert float(to_host(correlated.flux)[75, 80]) == pytest.approx(1000.0, rel=1e-6)


def test_a_kernel_that_varies_is_taken_at_each_place(backend, variances):
    """Terms of degree 1 that make the kernel broader from left to right: unit variance on both sides."""
    own, other = (np.full(SHAPE, np.median(v)) for v in variances)
    middle, change = gaussian_kernel(), (gaussian_kernel(sigma=1.6) - gaussian_kernel(sigma=0.9)) / 2
    terms = np.stack([middle, change, np.zeros_like(change)])
    x = np.linspace(-1, 1, SHAPE[1])
    rng, scores = np.random.default_rng(11), []
    for _ in range(DRAWS):
        deviate = rng.normal(size=SHAPE) * np.sqrt(other)
        model = fftconvolve(deviate, middle, mode="same") + x * fftconvolve(deviate, change, mode="same")
        difference = rng.normal(size=SHAPE) * np.sqrt(own) - model
        scores.append(to_host(gpudia.score_image(*on(backend, difference, own, PSF, terms, other)).score))
    for part in (slice(15, 60), slice(100, 145)):
        mean_square, error = spread(np.array(scores)[:, 15:-15, part], AREA)
        assert mean_square == pytest.approx(1.0, abs=4 * error + 0.02)


def test_a_frame_of_the_stack_shares_its_noise(variances):
    own, other = (np.full(SHAPE, np.median(v)) for v in variances)
    rng, share, scores = np.random.default_rng(12), 0.4, []
    for _ in range(DRAWS):
        image = rng.normal(size=SHAPE) * np.sqrt(own)
        rest = other - share**2 * own
        reference = share * image + rng.normal(size=SHAPE) * np.sqrt(rest)
        difference = image - fftconvolve(reference, KERNEL, mode="same")
        scores.append(gpudia.score_image(difference, own, PSF, KERNEL, other, shared=share).score)
    mean_square, error = spread(np.array(scores)[:, 15:-15, 15:-15], AREA)
    assert mean_square == pytest.approx(1.0, abs=4 * error + 0.01)


def test_a_star_between_pixels_loses_little():
    """What the parabola of the detection has to make up for."""
    star = shifted_psf(PSF[None], np.array([[0.5, 0.5]]))[0]
    difference, own = np.zeros(SHAPE), np.full(SHAPE, 100.0)
    difference[60:81, 60:81] = 500.0 * star
    found = gpudia.score_image(difference, own, PSF)
    assert 0.85 * 500 < np.nanmax(found.flux) < 500


@pytest.mark.parametrize(("change", "message"), [
    ({"psf": np.ones((4, 4))}, r"psf must be \(m, m\) with m odd, got shape \(4, 4\)"),
    ({"kernel": np.ones((3, 4))}, r"kernel must be \(K, K\) or \(P, K, K\) with K odd"),
    ({"kernel": np.ones((2, 3, 3))}, r"kernel must have the terms of a whole degree \(1, 3, 6, \.\.\.\), got 2"),
    ({"image_variance": np.ones((5, 5))}, r"image_variance must have the shape of difference"),
    ({"difference": np.ones(5)}, r"difference must have shape \(H, W\), got \(5,\)"),
])
def test_wrong_input_is_named(change, message):
    given = {"difference": np.zeros((40, 40)), "image_variance": np.ones((40, 40)), "psf": PSF, "kernel": KERNEL,
             "reference_variance": np.ones((40, 40))} | change
    with pytest.raises(InputError, match=message):
        gpudia.score_image(**given)


def test_nothing_good_gives_nothing():
    found = gpudia.score_image(np.full((40, 40), np.nan), np.ones((40, 40)), PSF)
    assert np.isnan(found.score).all()
    assert (found.masked == 1).all()
