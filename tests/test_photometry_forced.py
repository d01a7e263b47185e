"""Forced photometry: the variance against explicit matrices, pulls over noise draws, masks and edges."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from numpy.testing import assert_allclose
from photutils.aperture import CircularAperture
from scipy.signal import convolve2d, fftconvolve

from gpudia.errors import InputError
from gpudia.flags import PIXEL_FLAGS, SOURCE_FLAGS
from gpudia.photometry import (
    EpochNoise,
    Stamps,
    aperture_correction,
    aperture_weights,
    crowded_photometry,
    epoch_psf,
    forced,
    linear_flux_variance,
    measure_apertures,
    moffat_psf,
    psf_photometry,
)

SHAPE = (34, 41)
POSITIONS = np.array([(17.0, 16.0), (20.37, 15.81), (14.5, 18.49)])


def field(seed=3, shape=SHAPE):
    """Reference, two variances and an asymmetric kernel."""
    rng = np.random.default_rng(seed)
    reference = rng.uniform(50, 400, shape)
    image_variance, reference_variance = rng.uniform(20, 60, (2, *shape))
    kernel = rng.uniform(-0.02, 0.1, (7, 7)) + np.eye(7)[::-1] * 0.1
    return reference, image_variance, reference_variance, kernel


def terms(x, y):
    x, y = np.asarray(x, float), np.asarray(y, float)
    return np.stack([np.ones_like(x), x / 20 - 1, y / 17 - 1], axis=-1)


def shifted_reference(reference, v, u):
    """R(x - u) over the frame, 0 beyond its edges, by a loop."""
    out = np.zeros_like(reference)
    height, width = reference.shape
    for y in range(height):
        for x in range(width):
            if 0 <= y - v < height and 0 <= x - u < width:
                out[y, x] = reference[y - v, x - u]
    return out


def everywhere(values, x, _):
    return np.broadcast_to(values, (*np.shape(x), len(values)))


def explicit_design(reference, support, kernel_terms, background_terms):
    """The matrix U, (pixels, coefficients), column by column from its definition."""
    half = len(support) // 2
    y, x = np.indices(reference.shape)
    polynomials, background = kernel_terms(x, y), background_terms(x, y)
    columns = [
        shifted_reference(reference, v - half, u - half) * polynomials[..., p]
        for p in range(polynomials.shape[-1])
        for v, u in np.argwhere(support)
    ]
    columns += [background[..., q] for q in range(background.shape[-1])]
    return np.stack([c.ravel() for c in columns], axis=1)


def on_frame(weights, position, shape=SHAPE):
    """Put a stamp of weights back on the frame."""
    stamps = Stamps(np.atleast_2d(position), weights.shape[-1])
    x, y = stamps.coordinates()
    frame = np.zeros(shape)
    frame[np.ix_(y[0], x[0])] = weights
    return frame


@pytest.mark.parametrize("disc", [False, True])
@pytest.mark.parametrize("polynomials", [terms, None])
def test_variance_equals_explicit_matrices(disc, polynomials):
    """The polynomials count as constant over the star's footprint."""
    reference, image_variance, reference_variance, kernel = field()
    offset = np.arange(7) - 3
    support = offset[:, None] ** 2 + offset**2 <= 12 if disc else np.ones((7, 7), bool)
    kernels = kernel if polynomials is None else np.stack([kernel, 0.3 * kernel.T, -0.2 * kernel[::-1]])
    n = (1 if polynomials is None else 3) * int(support.sum()) + 3
    root = np.random.default_rng(1).normal(size=(n, n)) * 1e-4
    covariance = root @ root.T
    noise = EpochNoise(image_variance, kernels, reference_variance, reference, covariance, support, polynomials, terms)
    weights, stamps = aperture_weights(POSITIONS, 4.3)
    found = linear_flux_variance(weights, stamps, noise)
    for i, position in enumerate(POSITIONS):
        a = CircularAperture(position, 4.3).to_mask(method="exact").to_image(SHAPE)
        here = np.ones(1) if polynomials is None else polynomials(*position)
        local = np.tensordot(here, kernels.reshape(-1, 7, 7), axes=1)
        # The transposed convolution is the correlation: a true convolution with the flipped kernel.
        response = convolve2d(a, local[::-1, ::-1], mode="same")
        design = explicit_design(reference, support, partial(everywhere, here), partial(everywhere, terms(*position)))
        g = design.T @ a.ravel()
        expected = (a**2 * image_variance).sum() + (response**2 * reference_variance).sum() + g @ covariance @ g
        assert_allclose(found[i], expected, rtol=1e-10)


def test_no_stars_have_no_variances():
    plane = np.ones((40, 40))
    noise = EpochNoise(plane, np.eye(5) / 5, plane, plane, np.eye(26))
    for size in (7, 47):  # stamps larger than the frame, too
        assert linear_flux_variance(np.ones((0, size, size)), Stamps(np.empty((0, 2)), size), noise).shape == (0,)


def test_the_noise_that_an_image_shares_with_a_stack_is_counted_once():
    """Errors over 4000 draws of images of which a quarter of the reference is one's own; 1.1 % of statistics each."""
    rng = np.random.default_rng(9)
    kernel = field()[3]
    kernel, q, sigma = 0.8 * kernel / kernel.sum(), 0.25 / 0.8, 3.0
    image = rng.normal(0, sigma, (4000, 21, 21))
    reference = q * image + rng.normal(0, 1.0, image.shape)
    model = fftconvolve(reference, kernel[None], mode="same", axes=(1, 2))
    variance = np.full((21, 21), sigma**2)
    noise = EpochNoise(variance, kernel, np.full((21, 21), (q * sigma) ** 2 + 1.0), shared=q)
    stated = measure_apertures(variance, variance, None, [(10.2, 9.7)], 4.0, noise).error[0]
    sums = [measure_apertures(d, variance, None, [(10.2, 9.7)], 4.0).flux[0] for d in image - model]
    assert np.std(sums) == pytest.approx(stated, rel=0.045)
    alone = measure_apertures(variance, variance, None, [(10.2, 9.7)], 4.0,
                              EpochNoise(variance, kernel, noise.reference_variance)).error[0]
    assert alone > 1.15 * stated


def test_a_kernel_that_varies_is_the_one_at_each_star():
    _, image_variance, reference_variance, kernel = field()
    kernels = np.stack([kernel, 0.3 * kernel.T, -0.2 * kernel[::-1]])
    frame = np.ones(SHAPE)
    together = measure_apertures(frame, frame, None, POSITIONS, 3.0,
                                 EpochNoise(image_variance, kernels, reference_variance, kernel_terms=terms))
    single = [measure_apertures(frame, frame, None, p, 3.0,
                                EpochNoise(image_variance, np.tensordot(terms(*p), kernels, axes=1),
                                           reference_variance)).error[0] for p in POSITIONS]
    assert_allclose(together.error, single, rtol=1e-12)


def one_star_a_block(monkeypatch):
    """Make every star a block of its own."""
    backend = forced.backend_of(np.empty(0))
    monkeypatch.setattr(forced, "_host", lambda: replace(backend, least_pixels=0))


def test_blocks_join_to_the_same_numbers(monkeypatch):
    _, image_variance, reference_variance, kernel = field()
    frame = np.random.default_rng(0).normal(size=SHAPE)
    noise = EpochNoise(image_variance, kernel, reference_variance)
    whole = measure_apertures(frame, image_variance, None, POSITIONS, 3.0, noise)
    one_star_a_block(monkeypatch)
    for a, b in zip(whole, measure_apertures(frame, image_variance, None, POSITIONS, 3.0, noise), strict=True):
        assert_allclose(a, b, rtol=1e-13)


def test_aperture_flux_is_photutils_sum():
    frame = np.random.default_rng(5).normal(size=SHAPE)
    result = measure_apertures(frame, np.ones(SHAPE), None, POSITIONS, 4.7)
    expected, error = CircularAperture(POSITIONS, 4.7).do_photometry(frame, error=np.ones(SHAPE), method="exact")
    assert_allclose(result.flux, expected, rtol=1e-11, atol=1e-11)
    # photutils sums a * variance, as if parts of a pixel were independent: an upper bound of sum a^2 * variance.
    assert (result.error < error).all()


@pytest.mark.parametrize("method", ["aperture", "psf"])
def test_pulls_are_standard_normal_with_reference_noise_and_kernel_error(method):
    """D = I - k_hat * R_hat with noise in I, in R and in the kernel; variable stars of known flux on top."""
    rng = np.random.default_rng(11)
    shape, k, draws = (150, 150), 9, 150
    grid = np.arange(k) - k // 2
    kernel = np.exp(-0.5 * ((grid[:, None] - 0.6) ** 2 / 1.5 + (grid + 0.4) ** 2 / 2.5))
    kernel *= 0.8 / kernel.sum()
    y, x = np.mgrid[25:126:25, 25:126:25]
    positions = np.stack([x.ravel(), y.ravel()], axis=1) + rng.uniform(-0.5, 0.5, (25, 2))
    psf_r = moffat_psf(3.2, 15)
    psf = epoch_psf(psf_r, kernel)
    reference = np.full(shape, 30.0) + stars(shape, positions, psf_r, rng.uniform(1e3, 2e4, 25))
    sigma_i, sigma_r = np.sqrt(20 + reference), np.sqrt(10 + 0.5 * reference)
    root = rng.normal(size=(k * k + 1, k * k + 1)) * 2e-5
    covariance = root @ root.T
    truth = rng.normal(0, 500, 25)
    noise = EpochNoise(sigma_i**2, kernel, sigma_r**2, reference, covariance)
    total = sigma_i**2 + fftconvolve(sigma_r**2, kernel**2, mode="same")
    signal = stars(shape, positions, psf, truth)
    pulls = []
    for _ in range(draws):
        wrong = root @ rng.normal(size=k * k + 1)
        fitted = kernel + wrong[:-1].reshape(k, k)
        noisy = reference + sigma_r * rng.normal(size=shape)
        image = fftconvolve(reference, kernel, mode="same") + signal + sigma_i * rng.normal(size=shape)
        difference = image - fftconvolve(noisy, fitted, mode="same") - wrong[-1]
        if method == "psf":
            result = psf_photometry(difference, total, None, positions, psf, noise)
            pulls.append((result.flux - truth) / result.error)
        else:
            result = measure_apertures(difference, total, None, positions, 5.0, noise)
            fraction = measure_apertures(signal, total, None, positions, 5.0).flux
            pulls.append((result.flux - fraction) / result.error)
    pulls = np.array(pulls)
    # The stars share the kernel error, the draws share nothing: judge every star over the draws. Bounds: 4 sigma of
    # a standard deviation and of a mean of `draws` numbers.
    assert np.abs(pulls.mean(axis=0)).max() < 4 / np.sqrt(draws)
    assert np.abs(pulls.std(axis=0) - 1).max() < 4 / np.sqrt(2 * draws)
    assert abs((pulls**2).mean() - 1) < 4 * np.sqrt(2 / pulls.size)


def stars(shape, positions, psf, fluxes):
    """A frame of stars, the PSF moved by an interpolation other than the library's own."""
    from scipy.ndimage import shift

    frame = np.zeros(shape)
    half = len(psf) // 2
    for (x, y), flux in zip(positions, fluxes, strict=True):
        ix, iy = round(x), round(y)
        stamp = shift(np.pad(psf, 3), (y - iy, x - ix), order=5)[3:-3, 3:-3]
        frame[iy - half : iy + half + 1, ix - half : ix + half + 1] += flux * stamp
    return frame


def test_psf_flux_is_exact_without_noise_and_with_masked_pixels():
    psf = moffat_psf(3.5, 25)
    shape, positions, fluxes = (60, 90), np.array([(22.3, 30.4), (62.0, 27.75)]), np.array([1000.0, -400.0])
    frame = stars(shape, positions, psf, fluxes)
    mask = np.zeros(shape, bool)
    mask[31, 23] = mask[28, 60] = True
    frame[mask] = 1e9
    result = psf_photometry(frame, np.full(shape, 4.0), mask, positions, psf, max_masked_fraction=0.3)
    # The two interpolations of a PSF of 3.5 px FWHM differ by some 1e-4 of its flux.
    assert_allclose(result.flux, fluxes, rtol=5e-4)
    assert (result.flags == SOURCE_FLAGS.masked_pixels).all()
    assert result.n_masked.tolist() == [1, 1]


def test_psf_error_is_the_cramer_rao_bound_for_white_noise():
    psf = moffat_psf(3.5, 25)
    frame = np.zeros((60, 60))
    result = psf_photometry(frame, np.full((60, 60), 9.0), None, (30.0, 30.0), psf)
    assert_allclose(result.error, 3 / np.sqrt((psf**2).sum()), rtol=1e-10)


def test_one_psf_for_each_star_equals_single_stars():
    psfs = np.stack([moffat_psf(w, 21) for w in (3.0, 4.0, 5.0)])
    frame = np.random.default_rng(2).normal(size=SHAPE)
    together = psf_photometry(frame, np.ones(SHAPE), None, POSITIONS, psfs)
    single = [psf_photometry(frame, np.ones(SHAPE), None, p, s).flux[0] for p, s in zip(POSITIONS, psfs, strict=True)]
    assert_allclose(together.flux, single, rtol=1e-10)


@pytest.mark.parametrize(("bit", "flag"), [
    (PIXEL_FLAGS.bad, SOURCE_FLAGS.masked_pixels),
    (PIXEL_FLAGS.cosmic_ray, SOURCE_FLAGS.masked_pixels),
    (PIXEL_FLAGS.saturated, SOURCE_FLAGS.masked_pixels | SOURCE_FLAGS.saturated),
    (PIXEL_FLAGS.reference, SOURCE_FLAGS.masked_pixels | SOURCE_FLAGS.reference_masked),
    (PIXEL_FLAGS.border, SOURCE_FLAGS.outside),
    (PIXEL_FLAGS.clipped, SOURCE_FLAGS.clipped_pixels),
])
def test_mask_bits_become_source_flags(bit, flag):
    mask = np.zeros(SHAPE, np.uint8)
    mask[16, 19] = bit
    frame = np.ones(SHAPE)
    result = measure_apertures(frame, frame, mask, [(17.0, 16.0), (17.0, 8.0)], 3.0)
    assert result.flags.tolist() == [flag, 0]
    assert np.isnan(result.flux[0]) == (bit != PIXEL_FLAGS.clipped)
    assert np.isnan(result.error[0]) == np.isnan(result.flux[0])
    assert_allclose(result.flux[1], np.pi * 9, rtol=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_pixels_that_are_not_finite_are_masked(bad):
    for spoil in ("difference", "variance"):
        planes = {"difference": np.ones(SHAPE), "variance": np.ones(SHAPE)}
        planes[spoil][16, 17] = bad
        result = measure_apertures(planes["difference"], planes["variance"], None, (17.0, 16.0), 3.0)
        assert np.isnan(result.flux[0])
        assert result.flags[0] == SOURCE_FLAGS.masked_pixels
        assert result.n_masked[0] == 1


def test_masked_pixels_within_the_limit_are_left_out():
    frame, mask = np.ones(SHAPE), np.zeros(SHAPE, bool)
    mask[16, 17] = True
    frame[16, 17] = np.nan
    noise = EpochNoise(frame, np.ones((3, 3)) / 9, np.ones(SHAPE))
    result = measure_apertures(frame, np.ones(SHAPE), mask, (17.0, 16.0), 3.0, noise, max_masked_fraction=0.05)
    assert_allclose(result.flux, np.pi * 9 - 1, rtol=1e-12)
    assert np.isfinite(result.error).all()
    assert result.flags[0] == SOURCE_FLAGS.masked_pixels


@pytest.mark.parametrize("position", [(1.0, 16.0), (17.0, 32.0), (-50.0, 3.0), (np.nan, 4.0), (4.0, np.inf), (1e12, 0)])
def test_stars_at_the_edge_or_beyond_are_not_measured(position):
    frame = np.ones(SHAPE)
    for result in (measure_apertures(frame, frame, None, position, 3.0),
                   psf_photometry(frame, frame, None, position, moffat_psf(4.0, 9))):
        assert np.isnan(result.flux[0])
        assert np.isnan(result.error[0])
        assert result.flags[0] == SOURCE_FLAGS.outside


def test_no_stars_give_empty_arrays():
    frame = np.ones(SHAPE)
    result = measure_apertures(frame, frame, None, np.empty((0, 2)), 3.0)
    assert [len(a) for a in result] == [0, 0, 0, 0]


def test_big_endian_and_integer_frames_give_the_same():
    frame = np.random.default_rng(4).integers(0, 1000, SHAPE)
    expected = measure_apertures(frame.astype(float), np.ones(SHAPE), None, POSITIONS, 3.0)
    for kind in (">f4", ">f8", "uint16", ">i4"):
        result = measure_apertures(frame.astype(kind), np.ones(SHAPE, ">f4"), None, POSITIONS, 3.0)
        assert_allclose(result.flux, expected.flux, rtol=1e-12)


@pytest.mark.parametrize(("change", "message"), [
    ({"mask": np.zeros((3, 3), bool)}, r"mask must have shape \(34, 41\), got \(3, 3\)"),
    ({"variance": np.ones((3, 3))}, r"variance must have shape \(34, 41\)"),
    ({"difference": np.ones(5)}, "difference must be a 2-D array"),
    ({"radius": 0}, "radius must be positive"),
    ({"radius": np.nan}, "radius must be a finite number"),
    ({"radius": 34.0}, "smaller than the image"),
    ({"positions": np.zeros((3, 3))}, r"positions must have shape"),
    ({"positions": [("a", "b")]}, r"positions must be numbers"),
    ({"noise": EpochNoise(np.ones((4, 4)))}, "noise.image_variance must have shape"),
])
def test_wrong_arguments_are_named(change, message):
    given = {"difference": np.ones(SHAPE), "variance": np.ones(SHAPE), "mask": None, "positions": POSITIONS,
             "radius": 3.0, "noise": None} | change
    with pytest.raises(InputError, match=message):
        measure_apertures(**given)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"kernel": np.ones((4, 4))}, "with K odd"),
    ({"kernel": np.ones((2, 3, 3))}, "kernel_terms must be given with a kernel of several terms"),
    ({"reference_variance": np.ones(SHAPE)}, "kernel must be given with reference_variance"),
    ({"covariance": np.ones((9, 9))}, "must be given with covariance"),
    ({"reference": np.ones((2, 2))}, "reference must have the shape of image_variance"),
    ({"kernel": np.ones((3, 3)), "reference": np.ones(SHAPE), "covariance": np.ones((9, 8))}, "must be square"),
    ({"kernel": np.ones((3, 3)), "reference": np.ones(SHAPE), "covariance": np.eye(9),
      "support": np.ones((5, 5), bool)}, "support must have the kernel's shape"),
])
def test_incomplete_noise_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        EpochNoise(np.ones(SHAPE), **arguments)


def test_covariance_of_another_size_is_refused():
    noise = EpochNoise(np.ones(SHAPE), np.ones((3, 3)), None, np.ones(SHAPE), np.eye(8))
    with pytest.raises(InputError, match="covariance must have 9 coefficients"):
        measure_apertures(np.ones(SHAPE), np.ones(SHAPE), None, POSITIONS, 3.0, noise)


# Total fluxes: measure_apertures(psf=...).

WIDE = (60, 90)
RADIUS = 5.3
TWO = np.array([(22.3, 30.4), (62.0, 27.75)])


def gaussian(shape, position, sigma=2.5):
    """A sampled Gaussian of sum 1: so well sampled that the library's Fourier shift is exact to 1e-13."""
    y, x = np.indices(shape)
    r2 = (x - position[0]) ** 2 + (y - position[1]) ** 2
    return np.exp(-r2 / (2 * sigma**2)) / (2 * np.pi * sigma**2)


GAUSSIAN = gaussian((41, 41), (20, 20))


def total_weights(position, mask, sigma=2.5, radius=RADIUS):
    """Weights on the frame by definition: a / sum(a psf), both over the pixels that are not masked."""
    a = CircularAperture(position, radius).to_mask(method="exact").to_image(mask.shape) * ~mask
    return a / (a * gaussian(mask.shape, position, sigma)).sum()


def masked_stars():
    """Two stars without noise, on each the core and a pixel that the circle cuts masked and spoilt."""
    fluxes = np.array([1000.0, -400.0])
    frame = sum(f * gaussian(WIDE, p) for f, p in zip(fluxes, TWO, strict=True))
    mask = np.zeros(WIDE, bool)
    mask[[30, 28], [22, 62]] = mask[[33, 30], [26, 58]] = True
    return np.where(mask, 1e9, frame), mask, fluxes


def test_with_a_psf_sums_become_total_fluxes():
    psf, frame = moffat_psf(3.5, 25), np.random.default_rng(5).normal(size=SHAPE)
    noise = EpochNoise(np.ones(SHAPE), np.ones((3, 3)) / 9, np.ones(SHAPE))
    plain = measure_apertures(frame, np.ones(SHAPE), None, POSITIONS, 4.7, noise)
    total = measure_apertures(frame, np.ones(SHAPE), None, POSITIONS, 4.7, noise, psf=psf)
    fraction = aperture_correction(psf, 4.7, POSITIONS)
    assert_allclose(total.flux, plain.flux / fraction, rtol=1e-12)
    assert_allclose(total.error, plain.error / fraction, rtol=1e-12)


def test_masked_pixels_are_made_up_for_by_the_psf():
    frame, mask, fluxes = masked_stars()
    result = measure_apertures(frame, np.ones(WIDE), mask, TWO, RADIUS, psf=GAUSSIAN, max_masked_fraction=0.2)
    assert_allclose(result.flux, fluxes, rtol=1e-10)
    assert result.n_masked.tolist() == [2, 2]
    assert (result.flags == SOURCE_FLAGS.masked_pixels).all()


def test_error_grows_with_the_light_that_is_masked():
    frame, mask, _ = masked_stars()
    image_variance, reference_variance = np.random.default_rng(8).uniform(20, 60, (2, *WIDE))
    kernel = field()[3]
    noise = EpochNoise(image_variance, kernel, reference_variance)
    whole, cut = (measure_apertures(frame, image_variance, m, TWO, RADIUS, noise, psf=GAUSSIAN,
                                    max_masked_fraction=0.2).error for m in (None, mask))
    for i, position in enumerate(TWO):
        w = total_weights(position, mask)
        response = convolve2d(w, kernel[::-1, ::-1], mode="same")
        variance = (w**2 * image_variance).sum() + (response**2 * reference_variance).sum()
        assert_allclose(cut[i], np.sqrt(variance), rtol=1e-10)
    assert (cut > whole).all()


@pytest.mark.parametrize("pixel", [(27, 62), (23, 60)])
def test_limit_counts_the_light_that_is_masked_not_the_area(pixel):
    """A pixel of the core holds more of the light than of the area, one at the rim less."""
    mask = np.zeros(WIDE, bool)
    mask[pixel] = True
    a = CircularAperture(TWO[1], RADIUS).to_mask(method="exact").to_image(WIDE)
    area, light = ((plane * mask).sum() / plane.sum() for plane in (a, a * gaussian(WIDE, TWO[1])))
    assert (light > area) == (pixel == (27, 62))

    def measured(limit, psf):
        result = measure_apertures(np.ones(WIDE), np.ones(WIDE), mask, TWO[1], RADIUS, psf=psf,
                                   max_masked_fraction=limit)
        return bool(np.isfinite(result.flux[0]))

    for share, psf in ((light, GAUSSIAN), (area, None)):
        assert [measured(share * (1 + d), psf) for d in (-1e-9, 1e-9)] == [False, True]


def test_one_psf_for_each_star_gives_total_fluxes(monkeypatch):
    sigmas = (2.3, 2.5, 2.7)
    psfs = np.stack([gaussian((41, 41), (20, 20), s) for s in sigmas])
    mask = np.zeros(SHAPE, bool)
    mask[16, 17] = True
    frame = np.random.default_rng(2).normal(size=SHAPE)
    one_star_a_block(monkeypatch)
    result = measure_apertures(frame, np.ones(SHAPE), mask, POSITIONS, RADIUS, psf=psfs, max_masked_fraction=0.2)
    expected = [(total_weights(p, mask, s) * frame).sum() for p, s in zip(POSITIONS, sigmas, strict=True)]
    assert_allclose(result.flux, expected, rtol=1e-10)
    monkeypatch.undo()
    together = measure_apertures(frame, np.ones(SHAPE), mask, POSITIONS, RADIUS, psf=psfs, max_masked_fraction=0.2)
    assert_allclose(together.flux, expected, rtol=1e-10)


def test_psf_stamp_smaller_than_the_aperture_has_no_light_beyond():
    psf, centre = moffat_psf(3.0, 7), (20, 16)
    a = CircularAperture(centre, 6.2).to_mask(method="exact").to_image(SHAPE)
    light, mask = np.zeros(SHAPE), np.zeros(SHAPE, bool)
    light[13:20, 17:24] = psf
    mask[16, 21] = True
    frame = np.random.default_rng(6).normal(size=SHAPE)
    result = measure_apertures(frame, np.ones(SHAPE), mask, centre, 6.2, psf=psf, max_masked_fraction=0.2)
    w = a * ~mask / (a * light * ~mask).sum()
    assert_allclose(result.flux[0], (w * frame).sum(), rtol=1e-12)
    assert_allclose(result.error[0], np.sqrt((w**2).sum()), rtol=1e-12)


def test_a_wrong_number_of_psfs_or_fraction_is_refused():
    frame, psf = np.ones((40, 50)), np.zeros((2, 9, 9))
    psf[:, 4, 4] = 1.0
    positions = [(20.0, 15.0), (25.0, 20.0), (30.0, 20.0)]
    with pytest.raises(InputError, match="psf must be one for all stars or one for each of 3, got 2"):
        measure_apertures(frame, frame, None, positions, 3.0, psf=psf)
    with pytest.raises(InputError, match="psf must be one for all stars or one for each of 3, got 2"):
        aperture_correction(psf, 3.0, positions)
    for wrong in (1.0, -0.1, np.nan, "a"):
        with pytest.raises(InputError, match="max_masked_fraction must be at least 0 and below 1, got"):
            measure_apertures(frame, frame, None, positions, 3.0, max_masked_fraction=wrong)


@pytest.mark.parametrize("value", [256, -1, 0.5])
def test_mask_values_that_are_no_bits_are_refused(value):
    """Cut to 8 bits, 256 would say that the pixel is good."""
    frame, mask = np.ones(SHAPE), np.zeros(SHAPE)
    mask[16, 17] = value
    for measure in (lambda: measure_apertures(frame, frame, mask, (17.0, 16.0), 3.0),
                    lambda: crowded_photometry(frame, frame, mask, (17.0, 16.0), moffat_psf(3.0, 9), 3.0)):
        with pytest.raises(InputError, match="mask must be bool or bits"):
            measure()
