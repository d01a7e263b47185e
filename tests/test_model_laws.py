"""Laws that the model and the solve must keep, on every backend."""

import dataclasses

import numpy as np
import pytest
from conftest import star_field
from scipy.signal import convolve2d

from gpudia.backend import register_backend, to_device, to_host
from gpudia.model import ReferencePlan, exponents, subtract
from gpudia.model.convolver import TileConvolver
from gpudia.model.design import Design
from gpudia.model.support import kernel_support
from gpudia.model.tiles import Tiling, choose_tiling

EPS = np.finfo(float).eps


def on(backend, value):
    return None if value is None else to_device(value, backend)


def run(backend, field, which=slice(None), **settings):
    """Subtract the crowded field on a backend; the result on the host."""
    stack = subtract(on(backend, field["reference"]), on(backend, field["images"][which]),
                     on(backend, field["errors"][which]), on(backend, field["masks"][which]),
                     kernel_size=field["kernel_size"], **settings)
    return stack.to_host()


def tilings(shape, K):
    """One tile; several with ragged ends."""
    return [choose_tiling(shape, K, 256), Tiling(shape, K, (20, 27), (-(-(shape[0] - K + 1) // 20),
                                                                   -(-(shape[1] - K + 1) // 27)))]


@pytest.mark.parametrize("several", [0, 1])
def test_convolution_is_scipys_true_convolution(backend, several):
    rng = np.random.default_rng(3)
    image, kernel = rng.normal(size=(61, 74)), rng.normal(size=(7, 7))
    tiling = tilings(image.shape, 7)[several]
    convolver = TileConvolver(on(backend, image), tiling)
    planes = convolver.convolve(convolver.transform(on(backend, kernel[None, None])))
    ours = to_host(tiling.join(planes[..., :tiling.tile[0], :tiling.tile[1]], np.nan))[0]
    np.testing.assert_allclose(ours[3:-3, 3:-3], convolve2d(image, kernel, mode="valid"), atol=100 * EPS * 49)
    assert np.isnan(ours[:3]).all()
    assert np.isnan(ours[:, -3:]).all()


@pytest.mark.parametrize("several", [0, 1])
@pytest.mark.parametrize("degree", [0, 1, 2])
def test_adjoint(backend, degree, several):
    """<U a, v> = <a, U^T v>."""
    rng = np.random.default_rng(4)
    image = rng.normal(size=(61, 74))
    tiling = tilings(image.shape, 7)[several]
    design = Design(on(backend, image), tiling, kernel_support(7, "circle"), degree, 3)
    a = rng.normal(size=(2, design.n_parameters))
    v = to_host(tiling.split(on(backend, rng.normal(size=(2, *image.shape)))))
    left = (to_host(design.model(on(backend, a))) * v).sum(axis=(1, 2, 3))
    right = (a * to_host(design.adjoint(on(backend, v)))).sum(axis=1)
    np.testing.assert_allclose(left, right, rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("several", [0, 1])
@pytest.mark.parametrize("degree", [0, 1, 2])
def test_spread_is_the_adjoint_in_the_image(backend, degree, several):
    """<R (x) k, v> = <R, spread(v)>, tiles overlap."""
    rng = np.random.default_rng(6)
    image = rng.normal(size=(61, 74))
    tiling = tilings(image.shape, 7)[several]
    design = Design(on(backend, image), tiling, kernel_support(7), degree, 0)
    a = rng.normal(size=(2, design.n_parameters))
    a[:, -1] = 0.0  # no background
    a = on(backend, a)
    v = tiling.split(on(backend, rng.normal(size=(2, *image.shape))))
    frames = design.xp.zeros((2, *image.shape))
    design.convolver.spread(design.convolver.transform(design.unpack(a)[0]), design.padded(v), slice(None), frames)
    left = to_host((design.model(a) * v).sum(axis=(1, 2, 3)))
    np.testing.assert_allclose(left, (image * to_host(frames)).sum(axis=(1, 2)), rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("degree", [0, 1])
def test_normal_is_adjoint_of_weighted_model(backend, degree):
    rng = np.random.default_rng(5)
    image = rng.normal(size=(61, 74))
    tiling = tilings(image.shape, 5)[1]
    design = Design(on(backend, image), tiling, kernel_support(5), degree, 1)
    a = on(backend, rng.normal(size=(2, design.n_parameters)))
    w = tiling.split(on(backend, rng.random((2, *image.shape))))
    one = to_host(design.normal(a, design.padded(w)))
    np.testing.assert_allclose(one, to_host(design.adjoint(w * design.model(a))), rtol=1e-11, atol=1e-9)


def explicit_design(reference, K, degree, background_degree):
    """Slow oracle: every element of U by the formula."""
    h = K // 2
    height, width = reference.shape
    rows = []
    for y in range(h, height - h):
        for x in range(h, width - h):
            u, v = x / ((width - 1) / 2) - 1, y / ((height - 1) / 2) - 1
            patch = reference[y - h:y + h + 1, x - h:x + h + 1][::-1, ::-1].ravel()
            kernel_part = [u**i * v**j * patch for i, j in exponents(degree)]
            rows.append(np.concatenate([*kernel_part, [u**i * v**j for i, j in exponents(background_degree)]]))
    return np.array(rows)


@pytest.mark.parametrize(("degree", "background_degree"), [(0, 0), (0, 2), (1, 1), (1, 0), (2, 1), (2, 3)])
@pytest.mark.parametrize("solver", ["direct", "iterative"])
def test_solution_is_that_of_the_explicit_least_squares(backend, solver, degree, background_degree):
    """One weighted pass against numpy.linalg.lstsq on the explicit U, rows of masked pixels deleted."""
    rng = np.random.default_rng(6)
    K, shape = 3, (40, 46)
    reference = star_field(shape, seed=2, density=30) + 20
    image = star_field(shape, seed=2, density=30, fwhm=3.3, shift=(0.2, -0.1)) + rng.normal(size=shape)
    error = rng.uniform(0.5, 2, shape)
    mask = rng.random(shape) < 0.02
    image[mask] = 1e9
    U = explicit_design(reference, K, degree, background_degree)
    keep = ~mask[1:-1, 1:-1].ravel()
    weighted = U / error[1:-1, 1:-1].reshape(-1, 1)
    data = (image / error)[1:-1, 1:-1].ravel()
    oracle, *_ = np.linalg.lstsq(weighted[keep], data[keep], rcond=None)
    stack = subtract(on(backend, reference), on(backend, image), on(backend, error), on(backend, mask), kernel_size=K,
                     spatial_degree=degree, background_degree=background_degree, solver=solver, passes=1,
                     covariance="exact", keep=("covariance",)).to_host()
    ours = np.concatenate([stack.coefficients[0].ravel(), stack.background[0]])
    condition = np.linalg.cond(weighted[keep])
    tolerance = max(1e-9, 1e3 * EPS * condition**2) if solver == "direct" else 1e-6
    np.testing.assert_allclose(ours, oracle, atol=tolerance * np.abs(oracle).max())
    covariance = np.linalg.inv(weighted[keep].T @ weighted[keep])
    np.testing.assert_allclose(stack.covariance[0], covariance, atol=1e-5 * np.abs(covariance).max())
    residual = (data - weighted @ oracle)[keep]
    assert stack.chi2[0] == pytest.approx((residual**2).sum() / (keep.sum() - len(oracle)), rel=1e-6)
    assert stack.n_pixels[0] == keep.sum()


@pytest.mark.parametrize("degree", [0, 1, 2])
@pytest.mark.parametrize("solver", ["direct", "iterative"])
def test_the_stand_in_equals_numpy_to_the_last_bit(crowded, strict, degree, solver):
    """All of the numeric path, device rules enforced: nothing is copied in silence, and nothing else is computed."""
    from gpudia.backend.numpy_backend import make_numpy_backend

    settings = {"spatial_degree": degree, "background_degree": max(1, degree), "solver": solver,
                "covariance": "shared", "keep": ("covariance", "image_variance"), "error": None}
    one, other = run(make_numpy_backend(), crowded, **settings), run(strict, crowded, **settings)
    for name in vars(one):
        if name != "covariance_kind":
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


@pytest.mark.parametrize("degree", [0, 1])
def test_a_batch_equals_single_runs(backend, crowded, degree):
    batch = run(backend, crowded, spatial_degree=degree)
    for i in range(3):
        single = run(backend, crowded, slice(i, i + 1), spatial_degree=degree)
        np.testing.assert_allclose(batch.kernel[i], single.kernel[0], atol=1e-9)
        np.testing.assert_allclose(batch.difference[i], single.difference[0], atol=1e-5)
        assert batch.n_pixels[i] == single.n_pixels[0]


def test_permuting_a_batch_permutes_the_results(backend, crowded):
    order = [2, 0, 1]
    batch, permuted = run(backend, crowded), run(backend, crowded, order)
    np.testing.assert_allclose(permuted.kernel, batch.kernel[order], atol=1e-9)
    np.testing.assert_allclose(permuted.chi2, batch.chi2[order], rtol=1e-9)


def test_a_nan_image_leaves_the_others_bit_for_bit(strict, crowded):
    field = dict(crowded)
    field["images"] = crowded["images"].copy()
    field["images"][1] = np.nan
    with_bad, without = run(strict, field), run(strict, crowded, [0, 2])
    for name in ("kernel", "difference", "variance", "scale", "scale_error", "chi2"):
        np.testing.assert_array_equal(getattr(with_bad, name)[[0, 2]], getattr(without, name), err_msg=name)
    assert with_bad.failed.tolist() == [False, True, False]
    assert np.isnan(with_bad.difference[1]).all()
    assert np.isnan(with_bad.scale[1])


def hard_series(crowded):
    """Images of every kind side by side: plain, noisy, struck by cosmic rays, wholly masked, NaN, without a star."""
    rng = np.random.default_rng(5)
    field = {name: np.concatenate([crowded[name]] * 4) for name in ("images", "errors", "masks")}
    images, errors, masks = field["images"], field["errors"], field["masks"]
    images[3:6] += 4 * errors[3:6] * rng.normal(size=images[3:6].shape)
    images[6][rng.random(images[6].shape) < 0.02] += 5000.0
    masks[7] = True
    images[8] = np.nan
    images[9] = 100.0
    return dict(crowded, **field)


@pytest.mark.parametrize("settings", [{"passes": 5}, {"passes": 5, "spatial_degree": 1, "precision": "mixed"}])
def test_an_image_does_not_depend_on_its_neighbours(crowded, settings):
    """Bit for bit: neither on how many others share a step, nor on what becomes of them."""
    from gpudia.backend.numpy_backend import make_numpy_backend

    backend, field = make_numpy_backend(), hard_series(crowded)
    together = run(backend, field, **settings)
    assert len(set(together.iterations.tolist())) > 3
    for i in range(len(together)):
        alone = run(backend, field, slice(i, i + 1), **settings)
        for name in vars(alone):
            if name not in ("covariance_kind", "support") and getattr(alone, name) is not None:
                np.testing.assert_array_equal(getattr(together, name)[i], getattr(alone, name)[0], f"{name} {i}")


def test_too_little_memory_halves_the_batch(crowded, monkeypatch, caplog):
    """... once, with a line in the log and the same results; and one image that does not fit raises."""
    from gpudia.backend.numpy_backend import make_numpy_backend

    field, backend = hard_series(crowded), dataclasses.replace(make_numpy_backend(), workers=1)
    plain, subtract_group, sizes = run(backend, field), ReferencePlan._subtract_group, []

    def small(plan, group, *args):
        sizes.append(group.stop - group.start)
        if sizes[-1] > limit:
            raise MemoryError
        subtract_group(plan, group, *args)

    monkeypatch.setattr(ReferencePlan, "_subtract_group", small)
    limit = 6
    register_backend(backend)
    try:
        halved = run(backend, field)
        assert sizes == [12, 6, 6]
        assert "out of memory with 12 images at once on cpu" in caplog.text
        np.testing.assert_array_equal(halved.kernel, plain.kernel)
        np.testing.assert_array_equal(halved.difference, plain.difference)
        limit = 5
        with pytest.raises(MemoryError):
            run(backend, field)
    finally:
        register_backend(make_numpy_backend())


def test_solver_error_is_what_the_iteration_left(backend, crowded):
    """chi of the difference between the iterative and the direct model, where rtol is coarse; none where direct."""
    direct = run(backend, crowded, passes=1, solver="direct", clip=np.inf)
    rough = run(backend, crowded, passes=1, solver="iterative", clip=np.inf, rtol=1e-4)
    assert (direct.solver_error == 0).all()
    change = (rough.model - direct.model) / np.sqrt(crowded["errors"]**2)
    left = np.sqrt(np.nansum(np.where(crowded["masks"], 0, change)**2, axis=(1, 2)))
    assert (rough.solver_error > left / 5).all()
    assert (rough.solver_error < 1e-3 * np.sqrt(np.nansum((direct.model / crowded["errors"])**2, axis=(1, 2)))).all()


def test_masked_values_do_not_matter(backend, crowded):
    """1 % of the pixels at NaN or 1e9 and masked give what deleting those rows gives."""
    plain = run(backend, crowded)
    field = dict(crowded)
    field["images"] = np.where(crowded["masks"], [[[np.nan]], [[1e9]], [[-1e9]]], crowded["images"])
    spoilt = run(backend, field)
    np.testing.assert_allclose(spoilt.kernel, plain.kernel, atol=1e-9)
    np.testing.assert_array_equal(spoilt.n_pixels, plain.n_pixels)


def test_scaling_the_image_scales_the_kernel(backend, crowded):
    field = dict(crowded, images=2.5 * crowded["images"], errors=2.5 * crowded["errors"])
    one, scaled = run(backend, crowded), run(backend, field)
    np.testing.assert_allclose(scaled.kernel, 2.5 * one.kernel, atol=1e-7)
    np.testing.assert_allclose(scaled.background, 2.5 * one.background, rtol=1e-5)
    np.testing.assert_allclose(scaled.scale_error, 2.5 * one.scale_error, rtol=1e-6)


def test_adding_a_plane_moves_only_the_background(backend, crowded):
    shape = crowded["reference"].shape
    y, x = np.meshgrid(np.linspace(-1, 1, shape[0]), np.linspace(-1, 1, shape[1]), indexing="ij")
    one = run(backend, crowded, passes=1, solver="direct")
    moved = run(backend, dict(crowded, images=crowded["images"] + 50 + 7 * x - 3 * y), passes=1,
                solver="direct")
    np.testing.assert_allclose(moved.kernel, one.kernel, atol=1e-8)
    np.testing.assert_allclose(moved.background - one.background, np.tile([50, 7, -3], (3, 1)), atol=1e-5)


def test_a_level_of_the_reference_moves_only_the_background(backend, crowded):
    """The reference's sky is taken out inside; the results are those of the reference as it came."""
    one = run(backend, crowded, keep=("covariance",))
    other = run(backend, dict(crowded, reference=crowded["reference"] - 400.0), keep=("covariance",))
    np.testing.assert_allclose(one.kernel, other.kernel, atol=1e-8)
    np.testing.assert_allclose(one.background[:, 0] + 400 * one.scale, other.background[:, 0], rtol=1e-6)
    level = np.zeros(one.covariance.shape[-1])
    level[:49], level[49] = 400.0, 1.0
    variance = np.einsum("i,bij,j->b", level, one.covariance, level)
    np.testing.assert_allclose(np.sqrt(variance), other.background_error[:, 0], rtol=1e-5)


def test_tiles_do_not_change_the_result(backend, crowded, monkeypatch):
    import gpudia.model.plan as plan

    one = run(backend, crowded, spatial_degree=1, rtol=1e-9)
    monkeypatch.setattr(plan, "choose_tiling", lambda shape, K, _: tilings(shape, K)[1])
    several = run(backend, crowded, spatial_degree=1, rtol=1e-9)
    np.testing.assert_allclose(several.kernel, one.kernel, atol=1e-7)
    np.testing.assert_allclose(several.difference, one.difference, atol=1e-4)
    np.testing.assert_allclose(several.chi2, one.chi2, rtol=1e-7)


def test_a_shift_of_a_third_of_a_pixel_is_absorbed(backend):
    shape = (70, 90)
    reference, image = (star_field(shape, seed=8, shift=s) + 100 for s in ((0, 0), (0.3, 0.3)))
    stack = subtract(on(backend, reference), on(backend, image), on(backend, np.ones(shape)), kernel_size=9,
                     background_degree=0).to_host()
    k = stack.kernel[0]
    offset = np.arange(9) - 4
    assert k.sum() == pytest.approx(1, abs=2e-3)
    assert (k.sum(axis=0) * offset).sum() == pytest.approx(0.3, abs=0.02)
    assert (k.sum(axis=1) * offset).sum() == pytest.approx(0.3, abs=0.02)


def test_transfers_one_way_only(strict, crowded):
    """The solve moves no array between host and device but the small constants of a plan."""
    from gpudia.backend import transfers

    plan = ReferencePlan(on(strict, crowded["reference"]), 7)
    images, errors = on(strict, crowded["images"]), on(strict, crowded["errors"])
    transfers.reset()
    plan.subtract(images, errors)
    assert (transfers.up, transfers.down) == (0, 0)


@pytest.mark.parametrize("degree", [0, 1])
def test_mixed_precision_gives_the_kernel_of_double(backend, crowded, degree):
    """To 1e-6 of its peak; where one pass builds on the last, to a hundredth of its error."""
    for correct in (False, True):
        mixed, double = (run(backend, crowded, spatial_degree=degree, precision=name, correct_bias=correct)
                         for name in ("mixed", "double"))
        limit = 0.01 * double.kernel_error if correct else 1e-6 * np.abs(double.kernel).max()
        np.testing.assert_array_less(np.abs(mixed.kernel - double.kernel), limit)
        np.testing.assert_allclose(mixed.scale, double.scale, rtol=1e-6)
