"""Choice of the kernel's size, support and degree from the data."""

import math

import numpy as np
import pytest
from scipy.signal import fftconvolve

from gpudia import ReferencePlan
from gpudia.errors import InputError
from gpudia.model import (
    automatic_kernel_size,
    choose_degree,
    choose_support,
    evaluate_terms,
    kernel_support,
    missing_wings,
)

SIDE, SIGMA = 120, 3.0


def gaussian(size, sigma, x=0.0):
    v = np.arange(size) - size // 2
    kernel = np.exp(-((v[:, None]) ** 2 + (v - x) ** 2) / (2 * sigma**2))
    return kernel / kernel.sum()


def starfield(rng):
    points = np.zeros((SIDE, SIDE))
    np.add.at(points, tuple(rng.integers(0, SIDE, (2, 150))), rng.uniform(300, 10000, 150))
    return fftconvolve(points, gaussian(21, 1.4), mode="same") + 200.0


def series(backend, variation, seed=5):
    """Reference and two images whose kernel moves by `variation` pixels from the left to the right side."""
    rng = np.random.default_rng(seed)
    reference, images = starfield(rng), []
    x = evaluate_terms(1, *np.meshgrid(np.arange(SIDE), np.arange(SIDE)), (SIDE, SIDE))[..., 1]
    for sigma in (0.9, 1.2):
        middle = fftconvolve(reference, gaussian(9, sigma), mode="same")
        slope = fftconvolve(reference, gaussian(9, sigma, variation) - gaussian(9, sigma), mode="same")
        images.append(middle + x * slope + rng.normal(0, SIGMA, middle.shape))
    images = np.stack(images)
    return tuple(backend.upload(a) for a in (reference, images, np.full_like(images, SIGMA)))


@pytest.mark.parametrize(("variation", "expected"), [(0.0, 0), (0.1, 1)])
def test_the_degree_is_that_of_the_kernel(backend, variation, expected):
    reference, images, errors = series(backend, variation)
    choice = choose_degree(lambda degree: ReferencePlan(reference, 9, spatial_degree=degree, passes=2), images, errors)
    assert choice.degree == expected == choice.plan.design.spatial_degree
    assert list(choice.gains) == list(range(1, expected + 2)), "stops at the first degree that does not pay"
    assert choice.gains[expected + 1] < 0


def test_unused_unknowns_cost_what_the_criterion_says(backend):
    # n more unknowns that describe nothing take chi^2_n off the deviance and cost 2 n: AIC rises by n +- sqrt(2 n).
    reference, images, errors = series(backend, 0.0)
    choice = choose_degree(lambda degree: ReferencePlan(reference, 9, spatial_degree=degree, background_degree=1,
                                                        passes=2, clip=math.inf), images, errors)
    n = 2 * 2 * 81
    # the reference is known without noise here, the errors are true: only chi^2's own scatter is left
    assert choice.gains[1] == pytest.approx(-n, abs=5 * math.sqrt(2 * n))


def test_stars_left_out_do_not_decide(backend):
    reference, images, errors = series(backend, 0.0)
    leave_out = np.zeros((SIDE, SIDE), bool)
    leave_out[40:60, 40:60] = True
    spoilt = backend.xp.where(backend.upload(leave_out), images + 50.0, images)
    make = lambda degree: ReferencePlan(reference, 9, spatial_degree=degree, passes=2,  # noqa: E731
                                        fit_mask=backend.upload(leave_out))
    assert choose_degree(make, spoilt, errors, leave_out=backend.upload(leave_out)).degree == 0


def test_a_degree_with_more_unknowns_than_pixels_is_not_tried(backend):
    reference, images, errors = (a[..., :40, :40] for a in series(backend, 0.0))
    choice = choose_degree(lambda degree: ReferencePlan(reference, 19, spatial_degree=degree, passes=1), images, errors,
                           degrees=(0, 2))
    assert choice.degree == 0
    assert choice.gains == {}


@pytest.mark.parametrize("degrees", [(), (1, 0), (0, 0)])
def test_degrees_must_ascend(degrees):
    with pytest.raises(InputError, match="degrees must ascend"):
        choose_degree(lambda _: None, None, degrees=degrees)


def test_the_support_is_the_circle_that_holds_the_kernel(backend):
    rng = np.random.default_rng(8)
    reference = starfield(rng)
    truth = np.where(kernel_support(7, "circle"), gaussian(7, 2.5), 0.0)  # ends at a radius of 3.5 px
    image = fftconvolve(reference, truth, mode="same") + rng.normal(0, SIGMA, reference.shape)
    reference, image, error = (backend.upload(a) for a in (reference, image, np.full_like(image, SIGMA)))
    support = choose_support(ReferencePlan(reference, 15, passes=2), image, error)
    assert support[4:11, 4:11][kernel_support(7, "circle")].all()
    assert support.sum() <= math.pi * 5.5**2, "two rings more than the kernel has are noise"
    plan = ReferencePlan(reference, 15, support=support, passes=2)
    stack = plan.subtract(image, error).to_host()
    assert (stack.kernel[0][~support] == 0).all()
    assert abs(stack.scale[0] - truth.sum()) < 5 * stack.scale_error[0]


def test_the_support_is_chosen_from_a_constant_square_kernel(backend):
    reference, images, errors = series(backend, 0.0)
    for settings in ({"support": "circle"}, {"spatial_degree": 1}):
        with pytest.raises(InputError, match="spatial_degree 0 and support 'square'"):
            choose_support(ReferencePlan(reference, 9, **settings), images, errors)


def test_a_support_may_have_gaps(backend):
    reference, images, errors = series(backend, 0.0)
    support = np.ones((9, 9), bool)
    support[0], support[4, 2], support[7, 3:6] = False, False, False
    direct, iterative = (ReferencePlan(reference, 9, support=support, passes=2, solver=solver).subtract(images, errors)
                         for solver in ("direct", "iterative"))
    kernel = direct.to_host().kernel
    assert (kernel[:, ~support] == 0).all()
    np.testing.assert_allclose(iterative.to_host().kernel, kernel, rtol=0, atol=1e-6 * kernel.max())


def test_a_support_of_the_wrong_shape_is_refused():
    with pytest.raises(InputError, match=r"support must be of shape \(5, 5\)"):
        kernel_support(5, np.ones((3, 3)))
    with pytest.raises(InputError, match="True at its centre"):
        kernel_support(3, np.zeros((3, 3)))


def test_automatic_kernel_size_follows_the_seeing():
    assert automatic_kernel_size([3.0, 3.0], 3.0, 250) == 11
    assert automatic_kernel_size([3.0, 6.0], 3.0, 250) == 2 * (math.ceil(1.6 * math.sqrt(27)) + 5) + 1
    assert automatic_kernel_size([30.0], 3.0, 500) == 31
    assert automatic_kernel_size([math.nan], 3.0, 250) == 17
    assert automatic_kernel_size([30.0], 3.0, 60) == 15


def test_missing_wings_are_a_quarter_of_the_light_outside():
    """Against the profile summed in rings: Moffats of beta 3.5, outside of 10.5 px."""
    r = np.linspace(10.5, 3000, 300000)

    def outside(fwhm):
        a = fwhm / (2 * math.sqrt(2 ** (1 / 3.5) - 1))
        return 2.5 / (math.pi * a**2) * np.trapezoid(2 * math.pi * r * (1 + (r / a) ** 2) ** -3.5, r)

    assert missing_wings(6.0, 4.0, 21) == pytest.approx(0.25 * (outside(6.0) - outside(4.0)), rel=1e-3)
    assert missing_wings(4.0, 6.0, 21) == missing_wings(6.0, 4.0, 21)


def test_missing_wings_are_none_where_seeing_is_the_same_or_unknown_and_fewer_in_larger_kernels():
    assert missing_wings(4.0, 4.0, 11) == 0.0
    assert missing_wings(math.nan, 4.0, 11) == missing_wings(4.0, math.nan, 11) == 0.0
    assert missing_wings(6.0, 3.0, 31) < missing_wings(6.0, 3.0, 21) < missing_wings(6.0, 3.0, 11)
