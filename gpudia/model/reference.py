"""The reference made fit for transforms: holes filled, noise known, a weight map that is typical of the images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpudia.backend import backend_of, namespace_of
from gpudia.model.planes import median_of, smooth

__all__ = ["PreparedReference", "prepare_reference"]


@dataclass(frozen=True)
class PreparedReference:
    """Reference planes (H, W): filled `data` and `variance` (None: noise unknown), `good`, and typical `weights`."""

    data: Any
    variance: Any
    good: Any
    weights: Any


def _gaussian_transform(shape: tuple[int, int], sigma: float, xp: Any) -> Any:
    rows = xp.exp(-2 * (np.pi * sigma * xp.fft.fftfreq(shape[0])) ** 2)
    columns = xp.exp(-2 * (np.pi * sigma * xp.fft.rfftfreq(shape[1])) ** 2)
    return rows[:, None] * columns


def fill_holes(plane: Any, good: Any) -> Any:
    """Give the pixels that are not good the weighted mean of the good ones around them.

    A masked pixel never enters a fit, but it does enter the transforms: it must be finite and smooth. The scale of the
    (Gaussian) mean grows until good pixels are found; the median of the plane stands where there are none.
    """
    xp, backend = namespace_of(plane), backend_of(plane)
    shape = tuple(plane.shape)
    middle = median_of(xp.where(good, plane, xp.nan).reshape(1, -1))[0]
    middle = xp.where(xp.isfinite(middle), middle, 0.0)
    filled = xp.where(good, plane, middle)
    known = good
    for sigma in (2.0, 8.0, 32.0):
        taper = _gaussian_transform(shape, sigma, xp)
        weight = backend.irfft2(backend.rfft2(good.astype(plane.dtype), shape) * taper, shape)
        total = backend.irfft2(backend.rfft2(xp.where(good, plane - middle, 0.0), shape) * taper, shape)
        near = ~known & (weight > 0.02)
        filled = xp.where(near, middle + total / xp.where(near, weight, 1.0), filled)
        known = known | near
    return filled


def _typical_weights(data: Any, variance: Any, good: Any) -> Any:
    xp = namespace_of(data)
    if variance is None:
        return good.astype(data.dtype)
    weights = 1.0 / smooth(variance[None], good[None])[0]
    return xp.where(good, weights, 0.0)


def prepare_reference(data: Any, error: Any, mask: Any) -> PreparedReference:
    """Check and fill the reference (H, W); see `PreparedReference`."""
    xp = namespace_of(data)
    data = data.astype(xp.float64)
    good = xp.isfinite(data)
    if mask is not None:
        good &= mask == 0
    variance = None
    if error is not None:
        usable = xp.isfinite(error) & (error > 0)
        good &= usable
        variance = fill_holes(xp.where(good, error, 0.0).astype(xp.float64) ** 2, good)
        # exact zeros in a hole of an otherwise empty plane would be no noise at all
        variance = xp.maximum(variance, 0.0)
    filled = fill_holes(xp.where(good, data, 0.0), good)
    return PreparedReference(filled, variance, good, _typical_weights(filled, variance, good))
