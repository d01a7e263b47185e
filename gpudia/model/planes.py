"""Small operations on stacks of planes (..., H, W), written with slices so that they run on any backend."""

from __future__ import annotations

import math
from typing import Any

from gpudia.backend import namespace_of

__all__ = ["SAMPLE", "grow", "median_of", "middle_deviation", "robust_sigma", "smooth"]


def grow(mask: Any) -> Any:
    """Set the eight neighbours of every set pixel too."""
    out = mask.copy()
    out[..., 1:, :] |= mask[..., :-1, :]
    out[..., :-1, :] |= mask[..., 1:, :]
    rows = out.copy()
    out[..., :, 1:] |= rows[..., :, :-1]
    out[..., :, :-1] |= rows[..., :, 1:]
    return out


def _binomial(planes: Any) -> Any:
    """Sums over 5 x 5 pixels with the weights 1 4 6 4 1 in both directions; what lies outside counts as zero.

    Four times the sum of each pixel and the next, along one row of all pixels, with room between those of an image.
    """
    xp, (count, height, width) = namespace_of(planes), planes.shape
    around = xp.zeros((count, height + 5, width + 4), dtype=planes.dtype)
    around[:, 2:-3, 2:-2] = planes
    sums = around.reshape(count, -1)
    for step in 4 * (width + 4,) + 4 * (1,):
        sums = sums[:, :-step] + sums[:, step:]
    return sums[:, :height * (width + 4)].reshape(count, height, -1)[..., :width]


def smooth(planes: Any, good: Any) -> Any:
    """Mean over 5 x 5 good pixels (binomial weights) of planes (B, H, W); the plane itself where none is good."""
    xp = namespace_of(planes)
    weight = _binomial(good.astype(xp.int32))
    total = _binomial(xp.where(good, planes, 0.0))
    return xp.where(weight > 0, total / xp.maximum(weight, 1).astype(planes.dtype), planes)


#: Standard deviation of a normal distribution over its median absolute deviation.
_SIGMA_OF_MAD = 1.482602218505602
#: Pixels of a sample whose median, or scatter, is known to 1.4 per cent of a sigma.
SAMPLE = 1 << 13


def robust_sigma(values: Any, good: Any, at_most: int | None = None) -> Any:
    """Standard deviation of each image from the median absolute deviation of its good pixels, (B,); NaN without any."""
    xp = namespace_of(values)
    values, good = _sample(values, at_most), _sample(good, at_most)
    centre = median_of(values, good).astype(values.dtype)
    return middle_deviation(xp.abs(values - centre[:, None]), good)


def middle_deviation(deviations: Any, good: Any, at_most: int | None = None) -> Any:
    """Standard deviation of each image from absolute deviations about a centre that is known, (B,)."""
    deviations, good = _sample(deviations, at_most), _sample(good, at_most)
    return _SIGMA_OF_MAD * median_of(deviations.astype(namespace_of(deviations).float32), good)  # sorts twice as fast


def median_of(values: Any, good: Any, at_most: int | None = None) -> Any:
    """Median of the good, finite values of each image (B, ...) by one sort, (B,), float64; NaN where there is none.

    Of `at_most` so many pixels where that is given (evenly spread, the same ones each time): sorting whole images took
    a sixth of the time of a subtraction.
    """
    xp = namespace_of(values)
    rows = xp.where(_sample(good, at_most), _sample(values, at_most), xp.nan)
    if not rows.shape[1]:
        return xp.full(len(rows), xp.nan)
    ordered = xp.sort(rows, axis=1)  # NaN last
    count = xp.isfinite(rows).sum(axis=1)
    lower = xp.maximum(count - 1, 0) // 2
    upper = xp.minimum(count // 2, rows.shape[1] - 1)
    picked = xp.take_along_axis(ordered, xp.stack([lower, upper], axis=1), axis=1).astype(xp.float64)
    return xp.where(count > 0, picked.mean(axis=1), xp.nan)


def _sample(planes: Any, at_most: int | None) -> Any:
    """Rows (B, n) of all pixels, or of every so many: a step without a divisor of the width, so not of few columns."""
    rows, width = planes.reshape(len(planes), math.prod(planes.shape[1:])), planes.shape[-1]
    step = 1 if at_most is None else max(1, rows.shape[1] // at_most)
    while math.gcd(step, width) > 1:
        step += 1
    return rows[:, ::step]
