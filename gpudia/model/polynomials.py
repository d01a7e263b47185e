"""Polynomials over a frame: the one place that fixes their order and scaling."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpudia.errors import InputError

__all__ = ["count_terms", "evaluate_terms", "exponents", "scaled"]


def exponents(degree: int) -> list[tuple[int, int]]:
    """Powers (i, j) of x^i y^j up to `degree`, by total degree: 1; x, y; x^2, xy, y^2; ...

    The terms of a lower degree are the first ones of a higher degree.
    """
    if degree < 0:
        raise InputError(f"polynomial degree must be 0 or more, got {degree}")
    return [(total - j, j) for total in range(degree + 1) for j in range(total + 1)]


def count_terms(degree: int) -> int:
    """Return the number of terms of a polynomial in x and y of this total degree."""
    return (degree + 1) * (degree + 2) // 2


def scaled(pixel: Any, length: int) -> Any:
    """Map a pixel coordinate 0 .. length-1 to -1 .. 1 (0 for a single pixel)."""
    half = (length - 1) / 2
    return (pixel - half) / max(half, 1.0)


def evaluate_terms(degree: int, x: Any, y: Any, shape: tuple[int, int]) -> np.ndarray:
    """Values of all terms at pixel positions of a frame of `shape` (H, W), host side.

    Parameters
    ----------
    degree : int
        Total degree.
    x, y : float or array of shape (S,)
        Pixel coordinates in the frame.
    shape : (H, W)
        The frame whose edges are at -1 and 1.

    Returns
    -------
    array of shape (S, P) or (P,), float64
    """
    u, v = scaled(np.asarray(x, float), shape[1]), scaled(np.asarray(y, float), shape[0])
    return np.stack([u**i * v**j for i, j in exponents(degree)], axis=-1)
