"""Small operations on stacks of planes (..., H, W), written with slices so that they run on any backend."""

from __future__ import annotations

from typing import Any

from gpudia.backend import namespace_of

__all__ = ["grow", "median_of", "middle_deviation", "robust_sigma", "smooth"]


def grow(mask: Any) -> Any:
    """Set the eight neighbours of every set pixel too."""
    out = mask.copy()
    out[..., 1:, :] |= mask[..., :-1, :]
    out[..., :-1, :] |= mask[..., 1:, :]
    rows = out.copy()
    out[..., :, 1:] |= rows[..., :, :-1]
    out[..., :, :-1] |= rows[..., :, 1:]
    return out


def _binomial(plane: Any) -> Any:
    """Filter with (1 2 1)/4 in both directions; what lies outside counts as zero."""
    out = 0.5 * plane
    out[..., 1:, :] += 0.25 * plane[..., :-1, :]
    out[..., :-1, :] += 0.25 * plane[..., 1:, :]
    rows = 0.5 * out
    rows[..., :, 1:] += 0.25 * out[..., :, :-1]
    rows[..., :, :-1] += 0.25 * out[..., :, 1:]
    return rows


def smooth(planes: Any, good: Any) -> Any:
    """Mean over about 5 x 5 good pixels (binomial weights, twice 1 2 1); the plane itself where none is good."""
    xp = namespace_of(planes)
    weight = _binomial(_binomial(good.astype(planes.dtype)))
    total = _binomial(_binomial(xp.where(good, planes, 0.0)))
    return xp.where(weight > 0, total / xp.where(weight > 0, weight, 1.0), planes)


#: Standard deviation of a normal distribution over its median absolute deviation.
_SIGMA_OF_MAD = 1.482602218505602


def robust_sigma(values: Any, good: Any) -> Any:
    """Standard deviation of each image from the median absolute deviation of its good pixels, (B,); NaN without any."""
    xp = namespace_of(values)
    centre = median_of(values, good).astype(values.dtype)
    return middle_deviation(xp.abs(values - centre.reshape(-1, *(1,) * (values.ndim - 1))), good)


def middle_deviation(deviations: Any, good: Any) -> Any:
    """Standard deviation of each image from absolute deviations about a centre that is known, (B,)."""
    return _SIGMA_OF_MAD * median_of(deviations.astype(namespace_of(deviations).float32), good)  # sorts twice as fast


def median_of(values: Any, good: Any) -> Any:
    """Median of the good, finite values of each image (B, ...) by one sort, (B,), float64; NaN where there is none."""
    xp = namespace_of(values)
    rows = xp.where(good, values, xp.nan).reshape(len(values), -1)
    ordered = xp.sort(rows, axis=1)  # NaN last
    count = xp.isfinite(rows).sum(axis=1)
    lower = xp.maximum(count - 1, 0) // 2
    upper = xp.minimum(count // 2, rows.shape[1] - 1)
    picked = xp.take_along_axis(ordered, xp.stack([lower, upper], axis=1), axis=1).astype(xp.float64)
    return xp.where(count > 0, picked.mean(axis=1), xp.nan)
