"""Checks of what callers hand to the photometry."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpudia.errors import InputError
from gpudia.flags import PIXEL_FLAGS

__all__ = ["as_positions", "check_fraction", "check_plane", "check_radius", "pixel_bits"]


def as_positions(positions: Any) -> NDArray[np.float64]:
    """Return positions as (N, 2) float64, one (x, y) a row.

    Parameters
    ----------
    positions : array-like
        (N, 2); or (2,) for one star; or a pair ``[xs, ys]`` of shape (2, N). Two pairs of numbers, shape (2, 2), are
        two stars (x, y).

    Raises
    ------
    InputError
        Another shape, or not numbers.
    """
    try:
        array = np.asarray(positions, dtype=float)
    except (TypeError, ValueError) as error:
        raise InputError(f"positions must be numbers of shape (N, 2), got {positions!r}") from error
    if array.shape == (2,):
        return array[None]
    if array.ndim == 2 and array.shape[1] == 2:
        return array
    if array.ndim == 2 and array.shape[0] == 2:
        return np.ascontiguousarray(array.T)
    if array.size == 0:
        return np.empty((0, 2))
    raise InputError(f"positions must have shape (N, 2), (2,) or (2, N), got {array.shape}")


def check_radius(radius: Any, shape: tuple[int, ...]) -> float:
    """Return `radius` as float, or raise `InputError`: finite, positive, smaller than the image."""
    if isinstance(radius, bool) or not isinstance(radius, numbers.Real) or not np.isfinite(radius):
        raise InputError(f"radius must be a finite number of pixels, got {radius!r}")
    if not 0 < radius < min(shape):
        raise InputError(f"radius must be positive and smaller than the image ({min(shape)} px), got {radius}")
    return float(radius)


def check_fraction(max_masked_fraction: Any) -> None:
    """Raise `InputError` unless the share that may be masked is at least 0 and below 1."""
    if not isinstance(max_masked_fraction, int | float) or not 0 <= max_masked_fraction < 1:
        raise InputError(f"max_masked_fraction must be at least 0 and below 1, got {max_masked_fraction}")


def check_plane(name: str, plane: Any, shape: tuple[int, ...] | None = None) -> NDArray[Any]:
    """Return a 2-D host array in native byte order, of `shape` where that is given."""
    array = np.asarray(plane)
    if array.ndim != 2 or array.dtype.kind not in "biuf":
        raise InputError(f"{name} must be a 2-D array of numbers, got {array.ndim}-D of {array.dtype}")
    if shape is not None and array.shape != shape:
        raise InputError(f"{name} must have shape {shape}, got {array.shape}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def pixel_bits(mask: NDArray[Any]) -> NDArray[np.uint8]:
    """Return a mask as bits of `PIXEL_FLAGS`: True as "bad"; raise `InputError` for values that are no such bits."""
    if mask.dtype.kind == "b":
        return np.where(mask, PIXEL_FLAGS.bad, 0).astype(np.uint8)
    bits = mask.astype(np.uint8)
    if (bits != mask).any():
        raise InputError(f"mask must be bool or bits of PIXEL_FLAGS, 0 to 255, got {mask[bits != mask].ravel()[0]}")
    return bits
