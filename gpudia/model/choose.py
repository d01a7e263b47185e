"""Settings chosen from the data: the kernel's size, its support, and the degree by which it varies over the frame."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from gpudia.backend import backend_of, scalar, to_host
from gpudia.errors import InputError
from gpudia.model.normal import normal_equations
from gpudia.model.plan import ReferencePlan
from gpudia.model.stack import DifferenceStack

__all__ = ["DegreeChoice", "automatic_kernel_size", "choose_degree", "choose_support", "missing_wings"]

#: Exponent of a Moffat profile as seeing makes it, half of its FWHM over its scale length, share of the light outside
#: of the kernel that is missing in the scale.
_BETA = 3.5
_TO_LENGTH = math.sqrt(2 ** (1 / _BETA) - 1)
_MISSING = 0.25


def automatic_kernel_size(fwhm: Sequence[float], reference_fwhm: float, side: int) -> int:
    """Odd kernel size for all epochs, from the seeing widths.

    Radius ceil(1.6 sqrt(|FWHM_I^2 - FWHM_R^2|)) + 5 px, between 4 and 15, for the epoch that needs the largest. What of
    the wings lies outside is missing in the photometric scale: on simulated fields (Moffat profiles of beta 3.5, seeing
    3 to 6 px) 0.3 % with a radius of 12 px, less than 0.1 % with 14. At most a quarter of the frame's side.

    Parameters
    ----------
    fwhm : sequence of float
        Seeing of the images, pixels; NaN where it is not known.
    reference_fwhm : float
        That of the reference.
    side : int
        Shorter side of the frames, pixels.

    Returns
    -------
    int
    """
    widths = np.asarray([f for f in fwhm if math.isfinite(f)])
    if not len(widths) or not math.isfinite(reference_fwhm):
        radius = 8
    else:
        largest = float(np.sqrt(np.abs(widths**2 - reference_fwhm**2)).max())
        radius = min(max(math.ceil(1.6 * largest) + 5, 4), 15)
    radius = min(radius, (side // 4 - 1) // 2)
    return 2 * max(radius, 1) + 1


def missing_wings(fwhm: float, reference_fwhm: float, kernel_size: int) -> float:
    r"""Relative error of a photometric scale from the wings that the kernel cannot reach.

    The light of a star outside the radius r = K / 2, in the image less in the reference, for Moffat profiles of beta =
    3.5 (:math:`(1 + (r / a)^2)^{1 - \beta}`, a the scale length). The fit makes up for most of it at the kernel's rim:
    a quarter was missing in three simulated series of 40 epochs, seeing 3 to 6 px (slopes of the scale's error against
    this light: -0.29, -0.18, -0.32). Fluxes do not have this error: they are of the same part of the profile.

    Parameters
    ----------
    fwhm, reference_fwhm : float
        Of image and reference, pixels of the reference.
    kernel_size : int

    Returns
    -------
    float
        0 where a width is not known.
    """
    outside = [(1 + (kernel_size * _TO_LENGTH / width) ** 2) ** (1 - _BETA) for width in (fwhm, reference_fwhm)
               if math.isfinite(width) and width > 0]
    return _MISSING * abs(outside[0] - outside[1]) if len(outside) == 2 else 0.0


@dataclass(frozen=True)
class DegreeChoice:
    """Result of `choose_degree`.

    Attributes
    ----------
    degree : int
        The spatial degree chosen.
    gains : dict of int to float
        Fall of AIC from the degree before to each degree tried; the last one is negative, or the highest allowed.
    plan : ReferencePlan
        The plan of that degree, ready for use.
    """

    degree: int
    gains: dict[int, float]
    plan: ReferencePlan


def choose_degree(make_plan: Callable[[int], ReferencePlan], images: Any, errors: Any = None, masks: Any = None, *,
                  degrees: Iterable[int] = (0, 1, 2), leave_out: Any = None) -> DegreeChoice:
    """Choose the kernel's spatial degree by Akaike's information criterion, from low to high.

    Two degrees are compared on the same pixels, those that the higher one does not clip (the lower one would clip just
    the stars that it cannot describe): AIC = sum over pixels and images of (r^2 / v / s + ln v) + 2 n, with residual r
    and model variance v of each degree, n unknowns, and s = chi^2 per pixel of the higher degree where that is above 1,
    for errors that are too small [1]_. The next degree is tried as long as that lowers it.

    Parameters
    ----------
    make_plan : callable
        Makes the plan of a degree: ``lambda degree: ReferencePlan(..., spatial_degree=degree)``.
    images, errors, masks
        A few images of the series, as `ReferencePlan.subtract` takes them; those of narrow and wide seeing say most.
    degrees : iterable of int
        Degrees to be tried, ascending; the first is taken without a trial.
    leave_out : bool array (H, W), optional
        True = does not count: known variable stars.

    Returns
    -------
    DegreeChoice

    Raises
    ------
    InputError
        If `degrees` is empty or does not ascend.

    References
    ----------
    .. [1] Akaike 1974, IEEE Trans. Autom. Control 19, 716; for kernels Bramich et al. 2016, MNRAS 457, 542
    """
    degrees = list(degrees)
    if not degrees or sorted(set(degrees)) != degrees:
        raise InputError(f"degrees must ascend and hold one at least, got {degrees}")
    best = make_plan(degrees[0])
    choice = DegreeChoice(degrees[0], {}, best)
    if len(degrees) == 1:
        return choice
    lower = best.subtract(images, errors, masks)
    for degree in degrees[1:]:
        try:
            plan = make_plan(degree)
        except InputError:  # more unknowns than pixels
            break
        higher = plan.subtract(images, errors, masks)
        gain = _gain(lower, higher, 2 * (plan.design.n_parameters - best.design.n_parameters), leave_out)
        choice = DegreeChoice(choice.degree, {**choice.gains, degree: gain}, best)
        if not gain > 0:
            break
        best, lower = plan, higher
        choice = DegreeChoice(degree, choice.gains, best)
    return choice


def _gain(lower: DifferenceStack, higher: DifferenceStack, penalty: int, leave_out: Any) -> float:
    """Fall of AIC, summed over the images that both degrees solve; NaN where there are none."""
    xp = backend_of(lower.difference).xp
    pixels = ~(lower.mask | higher.mask) & ~higher.clipped
    if leave_out is not None:
        pixels = pixels & ~leave_out
    # an image that the higher degree alone cannot solve speaks against it
    solved = ~lower.failed
    if scalar((solved & higher.failed).any()) or not scalar(solved.any()):
        return math.nan

    def deviance(stack: DifferenceStack, unit: Any) -> Any:
        variance = xp.where(pixels, stack.variance, 1.0).astype(xp.float64)
        residual = xp.where(pixels, stack.difference, 0.0).astype(xp.float64)
        return (residual**2 / variance / unit[:, None, None] + xp.log(variance)).sum(axis=(1, 2))

    unit = xp.where(higher.chi2 > 1.0, higher.chi2, 1.0)
    gains = deviance(lower, unit) - deviance(higher, unit) - penalty
    return float(scalar(xp.where(solved, gains, 0.0).sum()))


def choose_support(plan: ReferencePlan, images: Any, errors: Any = None, masks: Any = None) -> np.ndarray:
    """Choose the circle of kernel pixels with the least AIC, from sub-matrices of one normal matrix.

    For each radius the kernel pixels within it and the background make a sub-matrix A_r and a vector b_r of the full
    square's equations; AIC_r = -b_r^T A_r^-1 b_r + 2 n_r up to a constant, summed over the images [1]_.

    Parameters
    ----------
    plan : ReferencePlan
        Of a constant kernel (spatial_degree 0) with square support.
    images, errors, masks
        A few images of the series, as `ReferencePlan.subtract` takes them.

    Returns
    -------
    ndarray (K, K), bool
        For `ReferencePlan`'s argument `support`. All True where no image can be solved.

    Raises
    ------
    InputError
        If the plan's kernel varies or its support is not the whole square.

    References
    ----------
    .. [1] Bramich et al. 2016, MNRAS 457, 542
    """
    if plan.design.spatial_degree or not plan.support.all():
        raise InputError("plan must have spatial_degree 0 and support 'square', got spatial_degree "
                         f"{plan.design.spatial_degree} and {int(plan.support.sum())} kernel pixels")
    K = plan.kernel_size
    stack = plan.subtract(images, errors, masks)
    offset = np.arange(K) - K // 2
    squared = (offset[:, None] ** 2 + offset**2).astype(float)
    radii = np.arange(1, math.isqrt(int(squared.max())) + 2) + 0.5
    total = np.zeros(len(radii))
    for i in range(len(stack)):
        if not bool(to_host(stack.failed)[i]):
            total += _criteria(plan, stack, i, [squared <= r * r for r in radii])
    best: np.ndarray = squared <= radii[int(np.argmin(total))] ** 2 if total.any() else np.ones((K, K), bool)
    return best


def _criteria(plan: ReferencePlan, stack: DifferenceStack, image: int, supports: list[np.ndarray]) -> np.ndarray:
    """AIC of each support for one image, up to a constant; infinite where the equations are singular."""
    matrix, vector = (to_host(v)[0] for v in normal_equations(plan.design, *_equations_of(plan, stack, image)))
    criteria = np.full(len(supports), np.inf)
    for k, support in enumerate(supports):
        rows = np.flatnonzero(np.append(support.ravel(), np.ones(plan.design.n_background, bool)))
        try:
            factor = cho_factor(matrix[np.ix_(rows, rows)])
        except LinAlgError:
            continue
        b = vector[rows]
        criteria[k] = -b @ cho_solve(factor, b) + 2 * len(rows)
    return criteria


def _equations_of(plan: ReferencePlan, stack: DifferenceStack, image: int) -> tuple[Any, Any]:
    """Weights and data (1, T, h, w), in the units of the fit, with which an image entered the last pass."""
    xp, tiling = plan.backend.xp, plan.design.tiling
    data = (stack.difference[image] + stack.model[image]).astype(xp.float64) * plan.given.unit
    weights = plan.weights_of(stack, image)
    used = (weights > 0) & xp.isfinite(data)
    return tuple(tiling.split(xp.where(used, plane, 0.0)[None]) for plane in (weights, data))
