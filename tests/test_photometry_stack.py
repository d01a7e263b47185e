"""Forced photometry of stacks: the star's leverage on its own model, backends, precision, edges."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.signal import fftconvolve
from strict_namespace import make_strict_backend

from gpudia import ReferencePlan
from gpudia.backend import register_backend, to_device, to_host
from gpudia.errors import InputError
from gpudia.flags import PIXEL_FLAGS, SOURCE_FLAGS
from gpudia.model import evaluate_terms
from gpudia.photometry import EpochNoise, epoch_psf, forced, forced_photometry, moffat_psf, psf_photometry
from gpudia.photometry.psf import shifted_psf

SHAPE, K, FWHM = (110, 120), 7, 3.0
PSF = moffat_psf(FWHM, 19)
SKY, READ = 100.0, 25.0


def sky_of(positions, fluxes, psf=PSF, shape=SHAPE):
    frame = np.zeros(shape)
    half = psf.shape[-1] // 2
    centres = np.rint(positions).astype(int)
    for (x, y), stamp, flux in zip(centres, shifted_psf(psf, positions - centres), fluxes, strict=True):
        frame[y - half:y + half + 1, x - half:x + half + 1] += flux * stamp
    return frame


def matching_kernel():
    grid = np.arange(K) - K // 2
    kernel = np.exp(-0.5 * ((grid[:, None] - 0.3) ** 2 + (grid + 0.2) ** 2) / 1.3)
    return 0.9 * kernel / kernel.sum()


def stars(rng, n=40, brightest=2e5):
    grid = np.stack(np.meshgrid(np.linspace(18, SHAPE[1] - 19, 8), np.linspace(18, SHAPE[0] - 19, 5)), axis=-1)
    positions = grid.reshape(-1, 2)[:n] + rng.uniform(-1.5, 1.5, (n, 2))
    return positions, np.geomspace(brightest, 1000, n)[rng.permutation(n)]


class Series:
    """Images of constant stars, with one bright star that changes by `change` in all of them, and their noise."""

    def __init__(self, n, change=0.0, seed=5, degree=0, covariance="exact", dtype=float):
        rng = np.random.default_rng(seed)
        self.positions, self.flux = stars(rng)
        self.brightest = int(self.flux.argmax())
        kernel = matching_kernel()
        truth = SKY + sky_of(self.positions, self.flux)
        self.reference_variance = np.full(SHAPE, 1e-4)  # as good as free of noise: nothing but the image's is tested
        self.reference = truth
        delta = np.zeros(len(self.flux))
        delta[self.brightest] = change
        self.delta = delta
        clean = fftconvolve(truth, kernel, mode="same") + kernel.sum() * sky_of(self.positions, delta,
                                                                              epoch_psf(PSF, kernel))
        self.error = np.sqrt(READ + np.maximum(clean, 1.0))
        self.images = (clean + self.error * rng.normal(size=(n, *SHAPE))).astype(dtype)
        self.plan = ReferencePlan(self.reference, K, error=np.sqrt(self.reference_variance), spatial_degree=degree,
                                  covariance=covariance, clip=np.inf, passes=2, correct_bias=False)
        self.stack = self.plan.subtract(self.images, np.broadcast_to(self.error, self.images.shape).astype(dtype),
                                        keep=("covariance", "image_variance"))

    def noises(self, **changes):
        stack, plan = self.stack, self.plan
        constant = stack.coefficients.shape[1] == 1
        correction = partial(plan.correction, stack)
        return [replace(EpochNoise(
            stack.image_variance[i], stack.coefficients[i, 0] if constant else stack.coefficients[i],
            self.reference_variance, self.reference, stack.covariance[i], stack.support,
            None if constant else stack.terms_at, partial(evaluate_terms, 1, shape=SHAPE), 0.0, plan.fit_pixels,
            partial(correction, i) if stack.covariance_kind == "shared" else None), **changes)
            for i in range(len(stack))]

    def measured(self, noises=None, **more):
        more = {"radius": 4.0, "stamp_size": 15} | more
        return forced_photometry(self.stack.difference, self.stack.variance, self.stack.flags, self.positions, PSF,
                                 self.noises() if noises is None else noises, **more)

    @property
    def truth(self):
        return self.delta * to_host(self.stack.scale)[:, None]


@pytest.fixture(scope="module")
def constant():
    return Series(150)


def test_pulls_of_constant_stars_are_standard_normal_bright_ones_too(constant):
    """Every star decides on its own kernel: without leverage the stated error of the brightest is 1.3 times too large.

    Bounds: 4 sigma of a standard deviation, and of a mean, of 150 numbers for each star; of all of them together 4.
    """
    n = len(constant.stack)
    without = constant.measured(constant.noises(fitted=None))
    for name, found in constant.measured().items():
        pulls = found.flux / found.error
        assert np.abs(pulls.std(axis=0) - 1).max() < 4 / np.sqrt(2 * n), name
        assert np.abs(pulls.mean(axis=0)).max() < 4 / np.sqrt(n), name
        assert abs((pulls**2).mean() - 1) < 4 * np.sqrt(2 / pulls.size), name
        naive = (without[name].flux / without[name].error)[:, constant.brightest].std()
        assert naive < 0.8, name


def test_the_noise_of_the_kernel_is_not_taken_for_light():
    """What a kernel's noise is in the PSF of its epoch it is in the difference, too.

    Fluxes of bright stars that take no part in the fit, against those with the true PSF of the epoch as weights, in
    units of the stars' fluxes. With the noisy PSF as weights they are 0.4 % less, known to 0.02 %.
    """
    rng, psf, grid = np.random.default_rng(8), moffat_psf(FWHM, 31), np.arange(15) - 7
    kernel = np.exp(-0.5 * ((grid[:, None] - 0.3) ** 2 + (grid + 0.2) ** 2) / 4.0)
    kernel *= 0.9 / kernel.sum()
    positions, flux = stars(rng, brightest=2e4)
    bright = np.argsort(-flux)[1:12:2]
    y, x = np.mgrid[:SHAPE[0], :SHAPE[1]]
    out = np.any([np.hypot(x - place[0], y - place[1]) < 10 for place in positions[bright]], axis=0)
    reference = SKY + sky_of(positions, flux, psf)
    clean = fftconvolve(reference, kernel, mode="same")
    plan = ReferencePlan(reference, 15, error=np.full(SHAPE, 0.01), fit_mask=out, clip=np.inf, passes=3,
                         covariance="exact")
    sigma = np.sqrt(READ + np.maximum(clean, 1.0))
    images = clean + sigma * rng.normal(size=(16, *SHAPE))
    stack = plan.subtract(images, np.broadcast_to(sigma, images.shape), keep=("covariance", "image_variance"))
    noises = [EpochNoise(stack.image_variance[i], stack.coefficients[i, 0], np.full(SHAPE, 1e-4), reference,
                         stack.covariance[i], stack.support, None, partial(evaluate_terms, 1, shape=SHAPE), 0.0,
                         plan.fit_pixels) for i in range(len(images))]
    made = forced_photometry(stack.difference, stack.variance, stack.flags, positions, psf, noises, radius=None)["psf"]
    off = []
    for i, noise in enumerate(noises):
        known = psf_photometry(stack.difference[i], stack.variance[i], stack.flags[i], positions,
                               epoch_psf(psf, kernel), noise)
        off.append(np.average(((made.flux[i] - known.flux) / flux)[bright], weights=(flux / known.error)[bright] ** 2))
        # and hardly any information is lost
        assert_allclose(made.error[i, bright], known.error[bright], rtol=0.02)
    assert abs(np.mean(off)) < 4 * np.std(off) / np.sqrt(len(off)) < 1e-3


@pytest.mark.parametrize("covariance", ["exact", "shared"])
def test_what_the_fit_takes_of_a_change_is_given_back(covariance):
    """A bright star that changes by a tenth pulls the kernel with it: 15 % of the change go into the model."""
    series = Series(40, change=2e4, covariance=covariance)
    star = series.brightest
    for name, found in series.measured().items():
        pulls = (found.flux - series.truth)[:, star] / found.error[:, star]
        # a mean of 40, and 1 % of the change: the first-order leverage does not know that the weights changed, too
        assert abs(pulls.mean()) < 4 / np.sqrt(len(pulls)) + 0.01 * 2e4 / found.error[:, star].mean(), name
    raw = series.measured(series.noises(fitted=None))["psf"].flux[:, star].mean()
    assert raw < 0.9 * series.truth[:, star].mean()


def test_leverage_of_an_estimated_covariance_is_that_of_the_exact_one():
    exact, shared = Series(6, covariance="exact"), Series(6, covariance="shared")
    assert shared.stack.covariance_kind == "shared"
    bright = np.argsort(-exact.flux)[:3]
    rough = shared.measured(shared.noises(correction=None))
    for name, found in shared.measured().items():
        one = exact.measured()[name].error[:, bright]
        assert_allclose(found.error[:, bright], one, rtol=4e-3)
        assert np.abs(rough[name].error[:, bright] / one - 1).max() > 0.012


def test_a_star_that_alone_decides_on_the_kernel_has_no_flux():
    """Whatever the only star of a region does, the kernel does, too."""
    rng, kernel, positions = np.random.default_rng(3), matching_kernel(), np.array([[60.2, 54.8]])
    reference = SKY + sky_of(positions, [2e5])
    clean = fftconvolve(reference, kernel, mode="same")
    error = np.sqrt(READ + np.maximum(clean, 1.0))
    plan = ReferencePlan(reference, K, error=np.full(SHAPE, 0.01), covariance="exact", correct_bias=False)
    stack = plan.subtract((clean + error * rng.normal(size=SHAPE))[None], error[None],
                          keep=("covariance", "image_variance"))
    noise = EpochNoise(stack.image_variance[0], stack.coefficients[0, 0], np.full(SHAPE, 1e-4), reference,
                       stack.covariance[0], stack.support, None, partial(evaluate_terms, 1, shape=SHAPE), 0.0,
                       plan.fit_pixels)
    found = forced_photometry(stack.difference, stack.variance, stack.flags, positions, PSF, [noise], radius=4.0)
    for one in found.values():
        assert np.isnan([one.flux[0, 0], one.error[0, 0]]).all()
        assert one.flags[0, 0] == SOURCE_FLAGS.sets_kernel


def test_a_stack_gives_what_its_images_give(constant):
    some = [0, 7, 31]
    noises = constant.noises()
    stack = constant.stack
    together = constant.measured()
    for i in some:
        alone = forced_photometry(stack.difference[i:i + 1], stack.variance[i:i + 1], stack.flags[i:i + 1],
                                  constant.positions, PSF, noises[i:i + 1], radius=4.0, stamp_size=15)
        for name, found in alone.items():
            for a, b in zip(found, together[name], strict=True):
                assert_array_equal(a[0], b[i])


def test_stamps_of_several_sizes_give_what_each_size_gives_alone(constant):
    stack, noises, sizes = constant.stack, constant.noises()[:3], [11, 15, 11]
    planes = stack.difference[:3], stack.variance[:3], stack.flags[:3], constant.positions, PSF
    together = forced_photometry(*planes, noises, radius=4.0, stamp_size=sizes)
    for i, size in enumerate(sizes):
        alone = forced_photometry(*planes, noises, radius=4.0, stamp_size=size)
        for name, found in together.items():
            for a, b in zip(found, alone[name], strict=True):
                assert_array_equal(a[i], b[i])


def test_a_varying_kernel_is_the_one_at_each_star():
    series = Series(40, degree=1)
    for name, found in series.measured().items():
        pulls = found.flux / found.error
        assert abs((pulls**2).mean() - 1) < 4 * np.sqrt(2 / pulls.size), name


def test_all_of_it_runs_on_another_backend_without_hidden_copies(constant):
    strict = make_strict_backend()
    register_backend(strict)
    place = partial(to_device, backend=strict)
    some = slice(0, 3)
    planes = ("image_variance", "kernel", "reference_variance", "reference", "covariance", "fitted")
    for changes in ({"correction": None}, {"correction": None, "shared": 0.2}, {"fitted": None, "correction": None}):
        noises = [replace(noise, **changes) for noise in constant.noises()[some]]
        placed = [replace(noise, **{name: None if getattr(noise, name) is None else place(getattr(noise, name))
                                    for name in planes}) for noise in noises]
        stack = constant.stack
        there = forced_photometry(place(stack.difference[some]), place(stack.variance[some]), place(stack.flags[some]),
                                  constant.positions, PSF, placed, radius=4.0, stamp_size=15)
        here = forced_photometry(stack.difference[some], stack.variance[some], stack.flags[some], constant.positions,
                                 PSF, noises, radius=4.0, stamp_size=15)
        for name, found in here.items():
            for a, b in zip(found, there[name], strict=True):
                assert_allclose(a, b, rtol=1e-12)


def test_single_precision_is_good_to_a_hundredth_of_an_error(constant):
    stack = constant.stack
    single = forced_photometry(stack.difference.astype(np.float32), stack.variance.astype(np.float32), stack.flags,
                               constant.positions, PSF, constant.noises(), radius=4.0, stamp_size=15)
    for name, found in constant.measured().items():
        assert single[name].flux.dtype == np.float64
        assert np.abs((single[name].flux - found.flux) / found.error).max() < 0.01
        # the covariance's condition is 9e6, single precision 6e-8: no more than this of the fit's part
        assert_allclose(single[name].error, found.error, rtol=5e-3)


def test_smaller_stamps_lose_hardly_any_information(constant):
    whole = constant.measured(constant.noises(fitted=None), stamp_size=None)["psf"]
    small = constant.measured(constant.noises(fitted=None), stamp_size=15)["psf"]
    faint = constant.flux < 5000  # the sky's noise: weights phi; where the star's own decides, 2 % lie further out
    assert_allclose(small.error[:, faint], whole.error[:, faint], rtol=3e-3)
    assert_allclose(small.error, whole.error, rtol=0.05)


def test_masked_clipped_and_cut_stars_say_so(constant):
    stack = constant.stack
    flags = stack.flags[:2].copy()
    x, y = np.rint(constant.positions[3]).astype(int)
    flags[0, y, x] = PIXEL_FLAGS.cosmic_ray
    flags[0, y + 1, x] = PIXEL_FLAGS.clipped
    flags[1, y - 8:y + 9, x - 8:x + 9] = PIXEL_FLAGS.saturated
    positions = np.vstack([constant.positions, [[2.0, 50.0], [np.nan, 3.0], [1e7, -4.0]]])
    found = forced_photometry(stack.difference[:2], stack.variance[:2], flags, positions, PSF, constant.noises()[:2],
                              radius=4.0, stamp_size=15, max_masked_fraction=0.3)
    for one in found.values():
        assert one.flags[0, 3] == SOURCE_FLAGS.masked_pixels | SOURCE_FLAGS.clipped_pixels
        assert np.isfinite(one.flux[0, 3])
        assert one.flags[1, 3] == SOURCE_FLAGS.masked_pixels | SOURCE_FLAGS.saturated
        assert np.isnan(one.flux[1, 3])
        assert np.isnan(one.error[1, 3])
        assert (one.flags[:, -3:] & SOURCE_FLAGS.outside).all()
        assert np.isnan(one.flux[:, -3:]).all()
        others = np.delete(np.arange(len(constant.positions)), 3)
        assert np.isfinite(one.flux[:, others]).all()


def test_a_star_beyond_the_edge_of_an_image_is_that_whatever_the_others_show(constant):
    """Its central pixel has no difference: nothing but ``outside`` is said of it, alone or in a stack."""
    stack, noises = constant.stack, constant.noises()[:2]
    flags = stack.flags[:2].copy()
    x = int(np.rint(constant.positions[3, 0]))
    flags[0, :, :x + 1] |= PIXEL_FLAGS.border
    planes = stack.difference[:2], stack.variance[:2], flags
    both = forced_photometry(*planes, constant.positions, PSF, noises, radius=4.0, stamp_size=15)
    for i in (0, 1):
        alone = forced_photometry(*(plane[i:i + 1] for plane in planes), constant.positions, PSF, noises[i:i + 1],
                                  radius=4.0, stamp_size=15)
        for name, found in alone.items():
            for a, b in zip(found, both[name], strict=True):
                assert_array_equal(a[0], b[i])
    for one in both.values():
        assert (one.flags[0, 3], one.n_masked[0, 3]) == (SOURCE_FLAGS.outside, 15 * 15)
        assert np.isnan([one.flux[0, 3], one.error[0, 3]]).all()
        assert np.isfinite(one.flux[1, 3])
        beside = constant.positions[:, 0] > x + 8
        assert np.isfinite(one.flux[0, beside]).all()


def test_without_light_at_the_star_there_is_no_flux(constant):
    noises = constant.noises()[:2]
    noises[1] = replace(noises[1], kernel=-noises[1].kernel)
    found = forced_photometry(constant.stack.difference[:2], constant.stack.variance[:2], constant.stack.flags[:2],
                              constant.positions, PSF, noises, radius=4.0, stamp_size=15)
    for one in found.values():
        assert np.isfinite(one.flux[0]).all()
        assert np.isnan(one.flux[1]).all()


def test_in_an_image_without_a_solution_no_star_is_said_to_set_the_kernel(constant):
    noises, planes = constant.noises()[:2], [constant.stack.difference[:2].copy(), constant.stack.variance[:2].copy()]
    noises[1] = replace(noises[1], kernel=np.full((K, K), np.nan),
                        covariance=np.full_like(noises[1].covariance, np.nan))
    for plane in planes:
        plane[1] = np.nan
    found = forced_photometry(*planes, constant.stack.flags[:2], constant.positions, PSF, noises, radius=4.0,
                              stamp_size=15)
    for one in found.values():
        assert np.isfinite(one.flux[0]).all()
        assert np.isnan(one.flux[1]).all()
        assert (one.flags[1] & SOURCE_FLAGS.sets_kernel == 0).all()


def same(found, expected, rtol):
    for name, one in found.items():
        assert_allclose(one.flux, expected[name].flux, rtol=rtol)
        assert_allclose(one.error, expected[name].error, rtol=rtol)
        assert_array_equal(one.flags, expected[name].flags)


def test_stars_in_parts_give_what_they_give_together(constant, monkeypatch):
    """With as few at a time as images have sizes of stamps, and fewer."""
    stack, noises = constant.stack, constant.noises()[:3]
    planes = stack.difference[:3], stack.variance[:3], stack.flags[:3], constant.positions, PSF
    settings = {"radius": 4.0, "stamp_size": [11, 15, 13]}
    together = forced_photometry(*planes, noises, **settings)
    for at_once in (2, 21):
        monkeypatch.setattr(forced, "_STARS_AT_ONCE", at_once)
        same(forced_photometry(*planes, noises, **settings), together, 1e-9)


@pytest.mark.parametrize("degree", [0, 1])
def test_an_estimated_covariance_is_measured_with_as_with_its_matrix(degree):
    """Apertures of masked stars among them: half of the stars lose a pixel, some the central one."""
    series = Series(3, seed=8, degree=degree, covariance="shared")
    flags = series.stack.flags
    for k, (x, y) in enumerate(series.positions.round().astype(int)):
        flags[:, y + k % 3, x - k % 2] |= PIXEL_FLAGS.bad if k % 2 else 0
    plain, given = series.noises(), series.plan.given
    factors = [replace(noise, covariance=given.estimate(series.stack.covariance_terms[i]))
               for i, noise in enumerate(plain)]
    same(series.measured(factors), series.measured(plain), 1e-6)


def test_what_is_ready_serves_the_next_stack_and_other_stars_of_it(constant):
    """Sizes and bright stars that come later, too; nothing is made twice."""
    ready, noises = {}, constant.noises()[:4]
    stack = constant.stack

    def measure(some, ready=None, **more):
        planes = (plane[some] for plane in (stack.difference, stack.variance, stack.flags))
        return forced_photometry(*planes, constant.positions, PSF, noises[some], radius=4.0, ready=ready, **more)

    same(measure(slice(2), ready, stamp_size=15), measure(slice(2), stamp_size=15), 1e-12)
    blocks = dict(ready)
    assert blocks
    same(measure(slice(2, 4), ready, stamp_size=[15, 13]), measure(slice(2, 4), stamp_size=[15, 13]), 1e-12)
    assert all(ready[key] is block for key, block in blocks.items())
    assert len(ready) > len(blocks)


def test_what_is_ready_is_not_taken_for_other_stars(constant):
    """As many, in the same places of their lists."""
    stack, noises, ready = constant.stack, constant.noises()[:2], {}

    def measure(stars, ready=None):
        return forced_photometry(stack.difference[:2], stack.variance[:2], stack.flags[:2], constant.positions[stars],
                                 PSF, noises, radius=4.0, stamp_size=15, ready=ready)

    n = len(constant.positions) // 2
    measure(slice(n), ready)
    same(measure(slice(n, 2 * n), ready), measure(slice(n, 2 * n)), 1e-12)


def test_flags_of_a_star_without_a_flux_do_not_depend_on_others(constant):
    """Half of the core of star 0 is masked, beside it lies what no PSF describes; it is measured first, last, alone."""
    stack, (x, y) = constant.stack, np.rint(constant.positions[0]).astype(int)
    difference, flags = stack.difference[:1].copy(), stack.flags[:1].copy()
    difference[0, y - 4:y + 5, x + 1:x + 4] += 1e5
    flags[0, y - 4:y + 5, x - 6:x + 1] |= PIXEL_FLAGS.bad

    def measured(order):
        found = forced_photometry(difference, stack.variance[:1], flags, constant.positions[order], PSF,
                                  constant.noises()[:1], radius=4.0, stamp_size=15)
        return {name: (one.flux[0, order.index(0)], one.flags[0, order.index(0)]) for name, one in found.items()}

    alone = measured([0])
    assert all(np.isnan(flux) and flag & SOURCE_FLAGS.masked_pixels for flux, flag in alone.values())
    for order in ([0, 5, 6], [5, 6, 0]):
        assert {name: flag for name, (_, flag) in measured(order).items()} == {
            name: flag for name, (_, flag) in alone.items()}


@pytest.mark.parametrize("spoilt", [0.0, -1.0, np.nan, np.inf])
def test_variance_that_says_nothing_gives_no_flux(constant, spoilt):
    stack = constant.stack
    variance = stack.variance[:1].copy()
    x, y = np.rint(constant.positions[3]).astype(int)
    variance[0, y - 8:y + 9, x - 8:x + 9] = spoilt
    found = forced_photometry(stack.difference[:1], variance, stack.flags[:1], constant.positions, PSF,
                              constant.noises()[:1], radius=4.0, stamp_size=15)
    for one in found.values():
        assert np.isnan(one.flux[0, 3])
        assert one.flags[0, 3] & SOURCE_FLAGS.masked_pixels


def test_two_stars_at_one_position_get_the_same_flux(constant):
    twice = np.vstack([constant.positions[:2], constant.positions[:2]])
    stack = constant.stack
    found = forced_photometry(stack.difference[:3], stack.variance[:3], stack.flags[:3], twice, PSF,
                              constant.noises()[:3], radius=4.0, stamp_size=15)
    for one in found.values():
        assert_allclose(one.flux[:, :2], one.flux[:, 2:], rtol=1e-12)


def test_no_images_and_no_stars_give_empty_arrays(constant):
    stack = constant.stack
    none = forced_photometry(stack.difference[:0], stack.variance[:0], stack.flags[:0], constant.positions, PSF, [],
                             radius=4.0)
    assert {name: one.flux.shape for name, one in none.items()} == {"psf": (0, 40), "ap": (0, 40)}
    none = forced_photometry(stack.difference[:2], stack.variance[:2], stack.flags[:2], np.empty((0, 2)), PSF,
                             constant.noises()[:2], radius=4.0)
    assert {name: one.flux.shape for name, one in none.items()} == {"psf": (2, 0), "ap": (2, 0)}


@pytest.mark.parametrize(("change", "message"), [
    ({"radius": 0}, "radius must be positive"),
    ({"radius": -2.0}, "radius must be positive"),
    ({"radius": 500.0}, "smaller than the image"),
    ({"stamp_size": 8}, "stamp_size must be odd and at least 9"),
    ({"stamp_size": 7}, "stamp_size must be odd and at least 9"),
    ({"stamp_size": [15, 15, 15]}, "stamp_size must be one number or one for each of 2 images, got 3"),
    ({"max_masked_fraction": 1.0}, "max_masked_fraction must be at least 0 and below 1"),
    ({"noises": []}, "noises must be one for each of 2 images"),
    ({"variance": np.ones((2, 5, 5))}, "must have one shape"),
    ({"psf": np.full((3, 9, 9), 1 / 81)}, "psf must be one for all stars or one for each of 40, got 3"),
])
def test_wrong_arguments_are_named(constant, change, message):
    stack = constant.stack
    given = {"difference": stack.difference[:2], "variance": stack.variance[:2], "flags": stack.flags[:2],
             "positions": constant.positions, "psf": PSF, "noises": constant.noises()[:2], "radius": 4.0} | change
    with pytest.raises(InputError, match=message):
        forced_photometry(**given)
