"""Which pixels of the K x K square a kernel has, and how many."""

from __future__ import annotations

import numbers

import numpy as np

from gpudia.errors import InputError

__all__ = ["check_kernel_size", "kernel_support"]


def check_kernel_size(kernel_size: int, shape: tuple[int, int]) -> int:
    """Return `kernel_size` as int, or raise `InputError`: odd, 3 or more, at most half the frame's shorter side."""
    if isinstance(kernel_size, bool) or not isinstance(kernel_size, numbers.Integral):
        raise InputError(f"kernel_size must be an integer number of pixels, got {kernel_size!r}")
    if kernel_size < 3 or kernel_size % 2 == 0:
        raise InputError(f"kernel_size must be odd and at least 3, got {kernel_size}")
    if 2 * kernel_size > min(shape):
        raise InputError(f"kernel_size must be at most half the frame's shorter side ({min(shape)} px), "
                         f"got {kernel_size}")
    return int(kernel_size)


def kernel_support(kernel_size: int, support: str | np.ndarray = "square") -> np.ndarray:
    """Return a boolean (K, K) host array: True where the kernel may be non-zero.

    "square" has all K^2 pixels; "circle" those within K/2 of the centre (about pi/4 of them: the corners of a
    square carry noise and no light). An array (K, K) is taken as it is: True = free.
    """
    if not isinstance(support, str):
        free = np.asarray(support) != 0
        if free.shape != (kernel_size, kernel_size) or not free[kernel_size // 2, kernel_size // 2]:
            raise InputError(f"support must be of shape {(kernel_size, kernel_size)} and True at its centre, got shape "
                             f"{free.shape}")
        return free
    if support not in ("square", "circle"):
        raise InputError(f"support must be 'square', 'circle' or an array, got {support!r}")
    if support == "square":
        return np.ones((kernel_size, kernel_size), bool)
    offset = np.arange(kernel_size) - kernel_size // 2
    return offset[:, None] ** 2 + offset**2 <= (kernel_size / 2) ** 2
