"""Bad input, strange input and hopeless fields: a named error, or a status; never a wrong number."""

import numpy as np
import pytest
from astropy.nddata import CCDData, NDData, StdDevUncertainty, VarianceUncertainty
from conftest import star_field

from gpudia.backend import to_device
from gpudia.errors import InputError
from gpudia.flags import FRAME_FLAGS
from gpudia.model import ReferencePlan, subtract

SHAPE = (50, 60)


@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(1)
    reference = star_field(SHAPE, seed=3, density=40) + 100
    return reference, 0.9 * reference + 5 + rng.normal(size=SHAPE)


@pytest.mark.parametrize(("size", "text"), [
    (4, "kernel_size must be odd and at least 3, got 4"), (1, "odd and at least 3, got 1"),
    (31, r"at most half the frame's shorter side \(50 px\), got 31"), (5.0, "must be an integer .*, got 5.0"),
    (True, "must be an integer .*, got True"), (-7, "odd and at least 3, got -7")])
def test_kernel_size(pair, size, text):
    with pytest.raises(InputError, match=text):
        ReferencePlan(pair[0], size)


@pytest.mark.parametrize(("setting", "value", "text"), [
    ("spatial_degree", -1, "spatial_degree must be an integer of 0 or more, got -1"),
    ("background_degree", 1.5, "background_degree must be an integer of 0 or more, got 1.5"),
    ("support", "disc", "support must be 'square', 'circle' or an array, got 'disc'"),
    ("solver", "lu", "solver must be 'auto', 'direct' or 'iterative', got 'lu'"),
    ("covariance", "no", "covariance must be 'exact' or 'shared', got 'no'"),
    ("gain", 0, r"gain must be positive \(e-/ADU\) or None, got 0"), ("gain", np.nan, "gain must be positive"),
    ("passes", 0, "passes must be an integer of 1 or more, got 0"), ("clip", 0, "clip must be positive, got 0"),
    ("rtol", 0, "rtol must be at least 1e-14, got 0"), ("read_noise", -1, "read_noise must be 0 or more"),
    ("error", np.ones((3, 3)), r"error of reference must have the shape of reference \(50, 60\), got \(3, 3\)"),
    ("mask", np.ones((60, 50)), r"mask of reference must have the shape .* got \(60, 50\)")])
def test_settings_of_the_plan(pair, setting, value, text):
    with pytest.raises(InputError, match=text):
        ReferencePlan(pair[0], 5, **{setting: value})


def test_shapes_of_the_images(pair):
    plan = ReferencePlan(pair[0], 5)
    with pytest.raises(InputError, match=r"images must have shape \(50, 60\) or \(B, 50, 60\) .*, got \(60, 50\)"):
        plan.subtract(pair[1].T)
    with pytest.raises(InputError, match=r"error of images must have the shape of images .*, got \(1, 50, 60\)"):
        plan.subtract(pair[1], np.ones((1, *SHAPE)))
    with pytest.raises(InputError, match=r"images must be of one shape, got \[\(50, 60\), \(60, 50\)\]"):
        plan.subtract([pair[1], pair[1].T])
    with pytest.raises(InputError, match=r"keep must hold .* only, got \['everything'\]"):
        plan.subtract(pair[1], keep=("everything",))
    with pytest.raises(InputError, match=r"reference must have two axes \(y, x\), got shape \(1, 50, 60\)"):
        ReferencePlan(pair[0][None], 5)
    with pytest.raises(InputError, match="arrays must be real numbers, got dtype complex128"):
        plan.subtract(pair[1] + 1j)
    with pytest.raises(InputError, match="reference must be an array, got NoneType"):
        ReferencePlan(None, 5)


def test_mixed_backends(pair, strict):
    plan = ReferencePlan(pair[0], 5)
    with pytest.raises(InputError, match="images must be on the plan's backend numpy, got strict"):
        plan.subtract(to_device(pair[1], strict))
    with pytest.raises(InputError, match=r"arrays must be all of one backend, got \['numpy', 'strict'\]"):
        plan.subtract(pair[1], to_device(pair[1], strict))


@pytest.mark.parametrize("dtype", ["u2", ">u2", "i4", ">i4", ">f4", ">f8", "f4"])
def test_every_dtype_gives_the_same_numbers(pair, dtype):
    image = np.round(np.abs(pair[1])).astype(dtype)
    one = subtract(pair[0], image, kernel_size=5)
    other = subtract(pair[0], image.astype("f8"), kernel_size=5)
    np.testing.assert_allclose(one.kernel, other.kernel, atol=1e-12)
    assert one.difference.dtype.isnative


@pytest.mark.parametrize("kind", ["masked array", "NDData", "CCDData", "list", "list of NDData"])
def test_masks_and_uncertainties_travel_with_the_image(pair, kind):
    reference, image = pair
    mask = np.random.default_rng(2).random(SHAPE) < 0.02
    error = np.full(SHAPE, 2.0)
    oracle = subtract(reference, image, error, mask, kernel_size=5)
    nddata = NDData(image, mask=mask, uncertainty=VarianceUncertainty(error**2))
    given = {"masked array": (np.ma.array(image, mask=mask), error), "NDData": (nddata, None),
             "CCDData": (CCDData(image, mask=mask, unit="adu", uncertainty=StdDevUncertainty(error)), None),
             "list": ([image.tolist()], None), "list of NDData": ([nddata, nddata], None)}[kind]
    if kind == "list":
        stack = subtract(reference, *given, kernel_size=5)
        oracle = subtract(reference, image, kernel_size=5)
    else:
        stack = subtract(reference, *given, kernel_size=5)
    np.testing.assert_array_equal(stack.kernel[0], oracle.kernel[0])
    np.testing.assert_array_equal(stack.chi2[0], oracle.chi2[0])


HOPELESS = {
    "empty reference": (lambda _, i: (np.zeros(SHAPE), i, None), "singular"),
    "constant reference": (lambda _, i: (np.full(SHAPE, 7.0), i, None), "singular"),
    "all masked": (lambda r, i: (r, i, np.ones(SHAPE, bool)), "no_pixels"),
    "all nan": (lambda r, _: (r, np.full(SHAPE, np.nan), None), "not_finite"),
    "fewer pixels than unknowns": (lambda r, i: (r, i, np.arange(3000).reshape(SHAPE) > 140), "no_pixels"),
}


@pytest.mark.parametrize("solver", ["direct", "iterative"])
@pytest.mark.parametrize("case", HOPELESS)
def test_hopeless_fits_have_a_status_and_harm_nobody(pair, strict, case, solver):
    reference, image, mask = HOPELESS[case][0](*pair)
    images = np.stack([image, pair[1]])
    masks = np.stack([np.zeros(SHAPE, bool) if mask is None else mask, np.zeros(SHAPE, bool)])
    stack = subtract(*(to_device(a, strict) for a in (reference, images)), to_device(np.ones(images.shape), strict),
                     to_device(masks, strict), kernel_size=5, solver=solver).to_host()
    flag = HOPELESS[case][1]
    assert stack.status[0] & getattr(FRAME_FLAGS, flag)
    if flag == "singular":
        # the well-determined part only: a background, and no light from the reference
        assert stack.status[0] & FRAME_FLAGS.bad_scale
        assert stack.scale[0] == 0
        np.testing.assert_allclose(stack.model[0][2:-2, 2:-2].mean(), np.median(image), rtol=0.1)
    else:
        assert np.isnan(stack.scale[0])
        assert np.isnan(stack.difference[0]).all()
        assert (stack.status[1], stack.failed.tolist()) == (0, [True, False])
        assert stack.scale[1] == pytest.approx(0.9, abs=0.01)


def test_huge_dynamic_range(pair):
    reference = pair[0].copy()
    reference[25, 30] = 1e9
    image = 0.9 * reference
    stack = subtract(reference, image, np.sqrt(np.abs(image) + 1), kernel_size=5)
    assert stack.scale[0] == pytest.approx(0.9, abs=0.01 * stack.scale_error[0])


def test_negative_backgrounds_and_half_a_frame_masked(pair):
    mask = np.zeros(SHAPE, bool)
    mask[:, :30] = True
    stack = subtract(pair[0] - 500, pair[1] - 900, np.ones(SHAPE), mask, kernel_size=5)
    assert stack.scale[0] == pytest.approx(0.9, abs=5 * stack.scale_error[0])
    assert stack.background[0, 0] == pytest.approx(5 + 0.9 * 500 - 900, abs=5 * stack.background_error[0, 0])


def test_errors_that_are_zero_or_nan_mask_their_pixels(pair):
    error = np.ones(SHAPE)
    error[10, 10], error[11, 11], error[12, 12] = 0, np.nan, -1
    stack = subtract(pair[0], pair[1], error, kernel_size=5)
    assert stack.mask[0, 10, 10]
    assert stack.mask[0, 11, 11]
    assert stack.mask[0, 12, 12]
    assert stack.n_pixels[0] == 46 * 56 - 3 - stack.n_clipped[0]


def test_errors_beyond_all_numbers_mask_their_pixels(pair):
    reference, image = pair
    error, mask = np.full(SHAPE, 1.0), np.zeros(SHAPE, bool)
    for k, value in enumerate((np.inf, 1e25, 1e-30, -1.0)):
        error[20 + k, 30] = value
        mask[20 + k, 30] = True
    plan = ReferencePlan(reference, 5)
    found, wanted = plan.subtract(image, error), plan.subtract(image, np.ones(SHAPE), mask)
    np.testing.assert_array_equal(found.kernel, wanted.kernel)
    np.testing.assert_array_equal(found.flags, wanted.flags)


@pytest.mark.parametrize("unit", [1e-21, 1e20])
def test_single_precision_images_in_any_unit(pair, unit):
    reference, image = (plane.astype(np.float32) for plane in pair)
    unit = 2.0 ** round(np.log2(unit))  # changes no digit
    plain, error = ReferencePlan(reference, 5).subtract(image, np.ones(SHAPE)), np.full(SHAPE, np.float32(unit))
    found = ReferencePlan(reference * np.float32(unit), 5).subtract(image * np.float32(unit), error)
    inside = np.isfinite(plain.difference)
    np.testing.assert_allclose((found.variance / unit**2)[inside], plain.variance[inside], rtol=1e-6)
    np.testing.assert_allclose((found.difference / unit)[inside], plain.difference[inside], atol=2e-4)


def test_an_iterative_solve_that_does_not_converge_is_flagged_and_done_directly(pair):
    error = np.random.default_rng(3).uniform(0.5, 2, SHAPE)
    direct = subtract(*pair, error, kernel_size=5, solver="direct", passes=1)
    stopped = subtract(*pair, error, kernel_size=5, solver="iterative", passes=1, max_iterations=1)
    assert stopped.status[0] & FRAME_FLAGS.no_convergence
    np.testing.assert_allclose(stopped.kernel, direct.kernel, atol=1e-9)


def test_a_known_variable_can_be_kept_out_of_the_fit(pair):
    reference, image = pair
    image = image.copy()
    y, x = np.unravel_index(np.argmax(reference), SHAPE)
    image[y - 2:y + 3, x - 2:x + 3] += 0.3 * reference[y - 2:y + 3, x - 2:x + 3]
    out = np.zeros(SHAPE, bool)
    out[y - 4:y + 5, x - 4:x + 5] = True
    stack = subtract(reference, image, np.ones(SHAPE), kernel_size=5, fit_mask=out)
    assert stack.scale[0] == pytest.approx(0.9, abs=5 * stack.scale_error[0])
    assert stack.difference[0, y, x] == pytest.approx(0.3 * reference[y, x], rel=0.1)
    assert not stack.mask[0, y, x]
    with pytest.raises(InputError, match=r"fit_mask must have the shape of reference \(50, 60\), got \(49, 60\)"):
        subtract(reference, image, kernel_size=5, fit_mask=out[1:])


def test_circular_support_leaves_the_corners_out(pair):
    stack = subtract(*pair, np.ones(SHAPE), kernel_size=7, support="circle")
    assert stack.support.sum() == 37
    assert (stack.kernel[0][~stack.support] == 0).all()
    assert stack.scale[0] == pytest.approx(0.9, abs=0.01)
