"""Errors that mean what they say: pulls over noise draws, the scale, the passes, what clipping and masks do."""

import numpy as np
import pytest
from conftest import star_field
from scipy.signal import convolve2d

import gpudia.model.plan as plan_module
from gpudia.backend import to_device, to_host
from gpudia.model import ReferencePlan, evaluate_terms, subtract

SHAPE, K, GAIN, READ_NOISE = (100, 110), 7, 1.5, 8.0


def kernel_of(dx=0.3, dy=-0.2, s=1.1, scale=0.8):
    offset = np.arange(K) - K // 2
    kernel = np.exp(-((offset[None] - dx) ** 2 + (offset[:, None] - dy) ** 2) / 2 / s**2)
    return scale * kernel / kernel.sum()


@pytest.fixture(scope="module")
def scene():
    """Noise-free reference, model and its variance."""
    # one sharp reference (FWHM 2.2 px) so that single kernel pixels are determined, on a sky of 300
    reference = star_field(SHAPE, seed=11, fwhm=2.2, density=60) + 300.0
    model = convolve2d(reference, kernel_of(), mode="same") + 40.0
    return reference, model, model / GAIN + (READ_NOISE / GAIN) ** 2


def draws(scene, n, seed=5):
    _, model, variance = scene
    return model + np.random.default_rng(seed).normal(size=(n, *SHAPE)) * np.sqrt(variance)


@pytest.mark.parametrize("solver", ["direct", "iterative"])
def test_the_kernel_is_recovered_within_its_covariance(scene, solver):
    """200 noise draws: (a - truth)^T C^-1 (a - truth) follows chi^2, pulls of every coefficient are N(0, 1)."""
    reference, _, variance = scene
    images = draws(scene, 200)
    stack = subtract(reference, images, np.broadcast_to(np.sqrt(variance), images.shape), kernel_size=K,
                     solver=solver, clip=np.inf, covariance="exact", keep=("covariance",))
    truth = np.concatenate([kernel_of().ravel(), [40.0, 0.0, 0.0]])
    found = np.concatenate([stack.kernel.reshape(200, -1), stack.background], axis=1)
    delta = found - truth
    distance = np.einsum("bi,bij,bj->b", delta, np.linalg.inv(stack.covariance), delta)
    n = len(truth)
    assert distance.mean() == pytest.approx(n, abs=4 * np.sqrt(2 * n / 200))
    pulls = delta / np.sqrt(np.diagonal(stack.covariance, axis1=1, axis2=2))
    assert np.abs(pulls.mean(axis=0)).max() < 4.5 / np.sqrt(200)
    assert np.abs(pulls.std(axis=0) - 1).max() < 4.5 / np.sqrt(2 * 200)
    scale_pull = (stack.scale - 0.8) / stack.scale_error
    assert abs(scale_pull.mean()) < 4 / np.sqrt(200)
    assert scale_pull.std() == pytest.approx(1, abs=4 / np.sqrt(400))
    assert stack.chi2.mean() == pytest.approx(1, abs=4 * np.sqrt(2 / stack.n_pixels[0] / 200))


def test_shared_covariance_has_the_exact_scale_error_and_nearly_the_others(scene):
    reference, _, variance = scene
    settings = {"kernel_size": K, "error": np.sqrt(variance) / 5, "keep": ("covariance",)}
    images = draws(scene, 2)
    errors = np.broadcast_to(np.sqrt(variance), images.shape)
    exact = subtract(reference, images, errors, covariance="exact", **settings)
    shared = subtract(reference, images, errors, **settings)
    assert (exact.covariance_kind, shared.covariance_kind) == ("exact", "shared")
    np.testing.assert_allclose(shared.scale_error, exact.scale_error, rtol=2e-3)
    sums = [stack.covariance[:, :K * K, :K * K].sum(axis=(1, 2)) for stack in (shared, exact)]
    np.testing.assert_allclose(sums[0], sums[1], rtol=4e-3)
    np.testing.assert_allclose(shared.kernel_error, exact.kernel_error, rtol=0.2)


def test_corrected_covariance_is_the_exact_one_where_all_pixels_are_looked_at():
    """A frame of 44 px: all its pixels are among the bright ones, and the rows of the unit matrix span everything.

    Left is what is added to the diagonal, 1e-5 of the directions' mean, and what single precision loses, times their
    condition (1e4, but for the least of them it matters little).
    """
    rng, shape, size = np.random.default_rng(2), (44, 45), 3
    reference = star_field(shape, seed=4, fwhm=2.0, density=200) + 10.0
    sky = 5000.0  # a bright night: stars are less of the noise than in the reference
    error = np.sqrt((reference + sky) / GAIN)
    image = reference + sky + error * rng.normal(size=shape)
    settings = {"error": np.sqrt(reference / GAIN) / 3, "correct_bias": False}
    plans = {kind: ReferencePlan(reference, size, covariance=kind, **settings) for kind in ("exact", "shared")}
    stacks = {kind: plan.subtract(image, error, keep=("covariance",)) for kind, plan in plans.items()}
    exact, shared = (stacks[kind].covariance[0] for kind in ("exact", "shared"))
    found, more = plans["shared"].correction(stacks["shared"], 0, np.eye(len(exact)), np.eye(len(exact))[3:5])
    size = np.sqrt(np.diagonal(exact))
    np.testing.assert_allclose(found / np.outer(size, size), exact / np.outer(size, size), atol=1e-3)
    np.testing.assert_allclose(more / size[3:5] ** 2, 1, atol=1e-3)
    assert np.abs(np.diagonal(shared) / np.diagonal(exact) - 1).max() > 0.1


def rows_of_bright_stars(reference, degree):
    """Rows of aperture sums of 5 x 5 px over the 20 brightest places, and these (y, x), the brightest first."""
    light, rows, places = reference.copy(), [], []
    for _ in range(20):
        y, x = np.unravel_index(light[10:-10, 10:-10].argmax(), (SHAPE[0] - 20, SHAPE[1] - 20)) + np.array(10)
        light[y - 3:y + 4, x - 3:x + 4] = 0
        seen = [reference[y - i - 2:y - i + 3, x - j - 2:x - j + 3].sum() for i in range(-3, 4) for j in range(-3, 4)]
        terms = evaluate_terms(1, float(x), float(y), SHAPE)
        rows.append([*np.outer(terms[:1 + 2 * degree], seen).ravel(), *(25 * terms)])
        places.append((y, x))
    return np.array(rows), places


def bright_night(scene):
    """An image with ten times the sky of the reference, and its errors, (1, H, W)."""
    _, model, variance = scene
    errors = np.sqrt(variance + 3000.0)
    return (model + 3000.0 + errors * np.random.default_rng(3).normal(size=SHAPE))[None], errors[None]


def test_corrected_covariance_is_rather_too_small_where_bright_stars_are_masked(scene):
    """Without the three brightest, which made most of the shared matrix: what lies outside of the span is missing."""
    reference, _, variance = scene
    (images, errors), (rows, places) = bright_night(scene), rows_of_bright_stars(reference, 0)
    masks = np.zeros((1, *SHAPE), bool)
    for y, x in places[:3]:
        masks[0, y - 4:y + 5, x - 4:x + 5] = True
    exact, plan = (ReferencePlan(reference, K, covariance=kind, error=np.sqrt(variance) / 5)
                   for kind in ("exact", "shared"))
    stacks = [one.subtract(images, errors, masks, keep=("covariance",)) for one in (exact, plan)]
    true, rough = (np.einsum("ij,jk,ik->i", rows[3:], stack.covariance[0], rows[3:]) for stack in stacks)
    ratio = (rows[3:] * plan.correction(stacks[1], 0, rows[3:], rows[:0])[0]).sum(axis=1) / true
    bright = true > 0.1 * 25 * np.median(errors) ** 2
    assert bright.sum() >= 2
    assert ((ratio[bright] > 0.9) & (ratio[bright] < 1.01)).all()
    assert np.abs(rough / true - 1)[bright].max() > 0.15


def test_corrections_are_the_same_on_every_backend(scene, backend):
    reference, _, variance = scene
    (images, errors), rows = bright_night(scene), rows_of_bright_stars(reference, 1)[0]
    found = []
    for put in (np.asarray, lambda a: to_device(a, backend)):
        plan = ReferencePlan(put(reference), K, error=put(np.sqrt(variance) / 5), spatial_degree=1)
        stack = plan.subtract(put(images), put(errors), keep=("covariance",))
        found.append([to_host(a) for a in plan.correction(stack, 0, put(rows[:8]), put(rows[8:10]))])
    (here, sizes), (there, others) = found
    scale = np.abs(here).max(axis=1, keepdims=True)
    np.testing.assert_allclose(there / scale, here / scale, atol=1e-4)
    np.testing.assert_allclose(others, sizes, rtol=1e-4)


@pytest.mark.parametrize("degree", [0, 1])
def test_corrected_covariance_is_near_the_exact_one_for_bright_stars(scene, degree):
    """On a part of the pixels, for the rows of aperture sums over the brightest: within 2 %, 5 % with a varying kernel.

    That is for the stars whose own share in the kernel is worth a correction, here a tenth of the sum's noise and more.
    """
    reference, _, variance = scene
    images, errors = bright_night(scene)
    settings = {"error": np.sqrt(variance) / 5, "spatial_degree": degree}
    exact = ReferencePlan(reference, K, covariance="exact", **settings).subtract(images, errors, keep=("covariance",))
    plan = ReferencePlan(reference, K, **settings)
    shared = plan.subtract(images, errors, keep=("covariance",))
    rows = rows_of_bright_stars(reference, degree)[0]
    true, rough = (np.einsum("ij,jk,ik->i", rows, stack.covariance[0], rows) for stack in (exact, shared))
    alike = rows + 0.1 * rows[::-1]
    directions, more = plan.correction(shared, 0, rows, alike)
    found = (rows * directions).sum(axis=1)
    bright = true > 0.1 * 25 * np.median(errors) ** 2
    assert bright.sum() >= 2
    np.testing.assert_allclose(found[bright], true[bright], rtol=0.05 if degree else 0.02)
    assert np.abs(rough / true - 1)[bright].max() > 0.05
    true = np.einsum("ij,jk,ik->i", alike, exact.covariance[0], alike)[bright]
    np.testing.assert_allclose(more[bright], true, rtol=0.05 if degree else 0.02)


@pytest.mark.parametrize("noise", ["data error plane", "model error plane", "gain", "none"])
def test_the_scale_is_unbiased_whatever_the_noise_comes_from(scene, noise):
    """Weights from noisy data would bias it low by 1 to 2 %."""
    reference, _, variance = scene
    images = draws(scene, 40, seed=9)
    errors = {"data error plane": np.sqrt(np.maximum(images, 0) / GAIN + (READ_NOISE / GAIN) ** 2),
              "model error plane": np.broadcast_to(np.sqrt(variance), images.shape)}.get(noise)
    settings = {"gain": GAIN, "read_noise": READ_NOISE} if noise == "gain" else {}
    stack = subtract(reference, images, errors, kernel_size=K, **settings)
    pulls = (stack.scale - 0.8) / stack.scale_error
    assert abs(stack.scale.mean() / 0.8 - 1) < 0.002
    assert abs(pulls.mean()) < 4 / np.sqrt(40)
    # with one variance for all pixels chi^2 = 1 holds by construction, not pixel by pixel
    assert stack.chi2.mean() == pytest.approx(1, abs=0.05 if noise == "none" else 0.01)


def test_noise_of_the_reference_is_in_the_variance(scene):
    reference, _, variance = scene
    rng = np.random.default_rng(21)
    error = np.sqrt(variance)
    chi2 = [subtract(reference + rng.normal(size=SHAPE) * error, image, error, error=error, kernel_size=K).chi2[0]
            for image in draws(scene, 8)]
    assert np.mean(chi2) == pytest.approx(1, abs=0.03)


@pytest.fixture(scope="module", params=[0, 1])
def noisy_references(request, scene):
    """Scale, its error and the reference's part of it: draws of an image and of a reference three times noisier."""
    reference, _, variance = scene
    rng, error = np.random.default_rng(22), np.sqrt(variance)
    stacks = [subtract(reference + 3 * rng.normal(size=SHAPE) * error, image, error, error=3 * error, kernel_size=K,
                       spatial_degree=request.param, clip=np.inf) for image in draws(scene, 100, seed=23)]
    return tuple(np.array([getattr(stack, name)[0] for stack in stacks])
                 for name in ("scale", "scale_error", "scale_error_reference"))


def test_scale_error_holds_with_a_noisy_reference(noisy_references):
    """The kernel makes the reference's noise correlated; were it not, the scatter would be half of what it is."""
    scale, error, reference_part = noisy_references
    assert scale.std() == pytest.approx(np.sqrt((error**2).mean()), rel=4 / np.sqrt(2 * len(scale)))
    assert 0.7 < (reference_part**2 / error**2).mean() < 0.9


def test_a_noisy_reference_does_not_bias_the_scale(noisy_references):
    """By 1 to 1.5 % it would, twenty times the error of the mean."""
    scale, error, _ = noisy_references
    assert abs(scale.mean() / 0.8 - 1) < 0.002 + 2 * error.mean() / np.sqrt(len(scale))


@pytest.mark.parametrize("overstated", [1, 5, 20])
@pytest.mark.parametrize("degree", [0, 1])
def test_errors_that_the_reference_cannot_have_do_no_harm(scene, degree, overstated):
    """A reference without noise whose errors say otherwise: the correction must not run away from pass to pass."""
    reference, _, variance = scene
    error = np.sqrt(variance)
    settings = {"kernel_size": K, "error": overstated * error, "spatial_degree": degree, "passes": 8}
    images, errors = draws(scene, 3), np.broadcast_to(error, (3, *SHAPE))
    plain = subtract(reference, images, errors, correct_bias=False, **settings)
    corrected = subtract(reference, images, errors, **settings)
    np.testing.assert_array_less(corrected.noise_gain, 1.5 * plain.noise_gain)
    np.testing.assert_array_less(np.abs(corrected.scale - plain.scale), 0.2 * plain.scale_error)


@pytest.mark.parametrize("frames", [2, 5])
def test_an_image_that_went_into_the_reference_is_left_alone(scene, frames):
    """It shares noise with the mean: the correction, which knows nothing of that, would triple its kernel's peak."""
    reference, _, variance = scene
    error = np.sqrt(variance)
    images = reference + np.random.default_rng(25).normal(size=(frames, *SHAPE)) * error
    settings = {"kernel_size": K, "error": error / np.sqrt(frames)}
    plain, corrected = (subtract(images.mean(axis=0), images[0], error, correct_bias=value, **settings)
                        for value in (False, True))
    np.testing.assert_allclose(corrected.kernel, plain.kernel, atol=1e-6)
    assert corrected.scale[0] == pytest.approx(1, abs=4 * corrected.scale_error[0])


def test_a_useless_column_of_the_reference_drowns_nothing(scene):
    reference, _, variance = scene
    error = np.sqrt(variance)
    bad = error.copy()
    bad[:, 60] = 1e6
    stack = subtract(reference, draws(scene, 2), np.broadcast_to(error, (2, *SHAPE)), error=bad / 5, kernel_size=K)
    np.testing.assert_array_less(np.abs(stack.scale - 0.8), 4 * stack.scale_error)
    assert stack.chi2 == pytest.approx(1, abs=0.06)
    assert (stack.flags[:, 50, 60] & 32 > 0).all()


def test_an_image_that_is_the_reference_gives_the_kernel_of_one_pixel(scene):
    """Its noise is the reference's own: nothing is to be put right."""
    reference, _, variance = scene
    error = np.sqrt(variance)
    noisy = reference + np.random.default_rng(24).normal(size=SHAPE) * error
    stack = subtract(noisy, noisy, error, error=error, kernel_size=K)
    delta = np.zeros((K, K))
    delta[K // 2, K // 2] = 1.0
    np.testing.assert_allclose(stack.kernel[0], delta, atol=1e-6)


@pytest.mark.parametrize("covariance", ["shared", "exact"])
def test_informative_tiles_give_the_result_of_all_pixels(monkeypatch, covariance):
    """Tiles of 60 px, some of which make the weights; one of the images has no good pixel in a quarter of them."""
    monkeypatch.setattr(plan_module, "_INFORMATIVE_SIDE", 60)
    shape, rng = (330, 345), np.random.default_rng(31)
    reference = star_field(shape, seed=12, fwhm=2.5, density=150) + 300.0
    model = convolve2d(reference, kernel_of(), mode="same") + 40.0
    error = np.sqrt(model / GAIN + (READ_NOISE / GAIN) ** 2)
    images = model + rng.normal(size=(2, *shape)) * error
    masks = np.zeros(images.shape, bool)
    masks[1, :170, :180] = True
    settings = {"kernel_size": K, "spatial_degree": 1, "covariance": covariance}
    noisy, errors = reference + rng.normal(size=shape) * error / 5, np.broadcast_to(error, images.shape)
    every, some = (subtract(noisy, images, errors, masks, error=error / 5, pixels=pixels, **settings)
                   for pixels in ("all", "informative"))
    assert ReferencePlan(noisy, K, error=error / 5, pixels="informative").information < 0.9
    np.testing.assert_array_less(np.abs(some.scale - every.scale), 0.2 * every.scale_error)
    np.testing.assert_allclose(some.scale_error, every.scale_error, rtol=0.02)
    np.testing.assert_allclose(some.n_pixels, every.n_pixels, rtol=1e-3)
    apart = ((some.difference - every.difference) / np.sqrt(every.variance))[~every.mask]
    assert np.sqrt(np.mean(apart**2)) < 0.02
    one = subtract(noisy, images, errors, masks, error=error / 5, pixels="informative", passes=1, **settings)
    np.testing.assert_array_less(np.abs(one.scale - every.scale), 3 * every.scale_error)


def test_clipping_rejects_what_does_not_belong_and_grows(scene):
    reference, _, variance = scene
    image = draws(scene, 1)[0]
    image[40, 50] += 3000.0
    image[70, 80] -= 3000.0
    clean = subtract(reference, draws(scene, 1)[0], np.sqrt(variance), kernel_size=K)
    stack = subtract(reference, image, np.sqrt(variance), kernel_size=K)
    clipped = stack.flags[0] & 128 > 0
    assert clipped[39:42, 49:52].all()
    assert clipped[69:72, 79:82].all()
    assert stack.n_clipped[0] == clipped.sum() == 18 + clean.n_clipped[0]
    assert not stack.mask[0][clipped].any()
    assert stack.difference[0, 40, 50] == pytest.approx(3000, abs=5 * np.sqrt(variance[40, 50]))
    assert stack.scale[0] == pytest.approx(clean.scale[0], abs=clean.scale_error[0])
    kept = subtract(reference, image, np.sqrt(variance), kernel_size=K, clip=np.inf)
    assert kept.n_clipped[0] == 0


def test_a_masked_reference_pixel_removes_its_footprint_from_the_fit(scene):
    """Rows are removed; the difference is flagged only where the hole carries more than 5 % of the kernel."""
    reference, _, variance = scene
    spoilt, mask = reference.copy(), np.zeros(SHAPE, bool)
    spoilt[30, 40], mask[30, 40] = 1e9, True
    spoilt[60, 61] = np.nan
    settings = {"mask": mask, "kernel_size": K, "error": np.sqrt(variance) / 100}
    stack = subtract(spoilt, draws(scene, 1), np.sqrt(variance)[None], pixels="all", **settings)
    assert stack.n_pixels[0] + stack.n_clipped[0] == (SHAPE[0] - K + 1) * (SHAPE[1] - K + 1) - 2 * K * K
    kernel = np.abs(stack.kernel[0]) > 0.05 * stack.scale[0]
    for y, x in ((30, 40), (60, 61)):
        flagged = stack.flags[0, y - 3:y + 4, x - 3:x + 4] & 32 > 0
        np.testing.assert_array_equal(flagged, kernel)
    assert (stack.flags[0] & 32 > 0).sum() == 2 * kernel.sum()
    beside = stack.difference[0] / np.sqrt(stack.variance[0])
    assert np.abs(beside[27:34, 37:44][~kernel]).max() < 5
    assert stack.scale[0] == pytest.approx(0.8, abs=4 * stack.scale_error[0])


def test_planes_are_defined_where_they_say(scene):
    reference, _, variance = scene
    stack = subtract(reference.astype("f4"), draws(scene, 1).astype("f4"), np.sqrt(variance)[None], kernel_size=K)
    assert stack.difference.dtype == stack.variance.dtype == np.float32
    inside = np.zeros(SHAPE, bool)
    inside[3:-3, 3:-3] = True
    np.testing.assert_array_equal(np.isfinite(stack.difference[0]), inside)
    np.testing.assert_array_equal(stack.mask[0], ~inside)
    np.testing.assert_allclose((stack.difference + stack.model)[0][inside], draws(scene, 1)[0][inside], rtol=1e-5)


def test_degree_one_kernel_varies_as_it_should(scene):
    """A kernel that varies linearly over the frame is found at its corners."""
    reference, _, _ = scene
    x = np.linspace(-1, 1, SHAPE[1])[None]
    constant, slope = kernel_of(), 0.1 * kernel_of(dx=-0.4)
    model = (convolve2d(reference, constant, mode="same") + x * convolve2d(reference, slope, mode="same"))
    stack = subtract(reference, model, np.ones(SHAPE), kernel_size=K, spatial_degree=1, solver="direct")
    np.testing.assert_allclose(stack.kernel_at(0, 0, 20), constant - slope, atol=1e-5)
    np.testing.assert_allclose(stack.kernel_at(0, [SHAPE[1] - 1], [3])[0], constant + slope, atol=1e-5)
    assert stack.scale_at(0, SHAPE[1] - 1, 50) == pytest.approx(0.88, abs=1e-5)


@pytest.mark.parametrize("solver", ["direct", "iterative"])
def test_photometric_scale_of_a_lower_degree(scene, solver):
    """The PSF varies, the scale does not: found with fewer unknowns, zero slope exactly, smaller error."""
    reference, _, variance = scene
    x = np.linspace(0, 1, SHAPE[1])[None]
    model = ((1 - x) * convolve2d(reference, kernel_of(), mode="same")
             + x * convolve2d(reference, kernel_of(dx=-0.3), mode="same"))
    error = np.sqrt(variance)
    image = model + np.random.default_rng(41).normal(size=SHAPE) * error
    settings = {"kernel_size": K, "spatial_degree": 1, "solver": solver, "clip": np.inf}
    free, fixed = (subtract(reference, image, error, scale_degree=degree, **settings) for degree in (None, 0))
    np.testing.assert_allclose(fixed.coefficients[0, 1:].sum(axis=(1, 2)), 0, atol=1e-12)
    assert np.abs(free.coefficients[0, 1:].sum(axis=(1, 2))).max() > 1e-4
    assert fixed.scale[0] == pytest.approx(0.8, abs=4 * fixed.scale_error[0])
    assert fixed.scale_error[0] < free.scale_error[0]
    assert fixed.chi2[0] == pytest.approx(1, abs=4 * np.sqrt(2 / fixed.n_pixels[0]))
    exact = subtract(reference, model, error, scale_degree=0, **settings)
    np.testing.assert_allclose(exact.kernel_at(0, SHAPE[1] - 1, 50), kernel_of(dx=-0.3), atol=2e-5)


@pytest.mark.parametrize("degree", [0, 1])
def test_smoothness_calms_the_kernel_and_leaves_the_scale(scene, degree):
    reference, _, variance = scene
    images, error = draws(scene, 40, seed=42), np.sqrt(variance)
    errors = np.broadcast_to(error, images.shape)
    settings = {"kernel_size": K, "spatial_degree": degree, "clip": np.inf}
    free, smooth = (subtract(reference, images, errors, smoothness=value, **settings) for value in (0.0, 1e-3))
    direct = subtract(reference, images[:2], errors[:2], smoothness=1e-3, solver="direct", **settings)
    np.testing.assert_allclose(smooth.kernel[:2], direct.kernel, atol=1e-6 * direct.kernel.max())
    # the iteration knows its variance to 3 per cent
    np.testing.assert_allclose(smooth.scale_error[:2], direct.scale_error, rtol=0.015)
    roughness = [np.abs(np.diff(stack.kernel, 2, axis=1)).sum() for stack in (free, smooth)]
    assert roughness[1] < 0.7 * roughness[0]
    scatter = [((stack.kernel - kernel_of()) ** 2).sum() for stack in (free, smooth)]
    assert scatter[1] < 0.7 * scatter[0]
    pulls = (smooth.scale - 0.8) / smooth.scale_error
    assert abs(pulls.mean()) < 4 / np.sqrt(40)


def test_plan_is_reused_without_memory_of_earlier_batches(scene):
    reference, _, variance = scene
    plan, images = ReferencePlan(reference, K), draws(scene, 2)
    errors = np.broadcast_to(np.sqrt(variance), images.shape)
    first = plan.subtract(images, errors)
    plan.subtract(images[::-1] * 3, errors)
    np.testing.assert_array_equal(plan.subtract(images, errors).kernel, first.kernel)
