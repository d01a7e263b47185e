"""Resampling of images onto the reference's grid, where a whole-pixel shift and the kernel cannot absorb the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpudia.backend import backend_of
from gpudia.errors import InputError
from gpudia.model.planes import smooth
from gpudia.model.polynomials import exponents

__all__ = ["Resampled", "resample"]

_LOBES = 3
#: A masked pixel spoils an output pixel when its coefficient is above this.
_NEGLIGIBLE = 0.02
#: Coefficients of a map by its degree.
_COUNTS = {3: 1, 6: 2, 10: 3}


@dataclass(frozen=True)
class Resampled:
    """Resampled planes (B, H, W).

    `variance` is that of each output pixel, sum c^2 variance; neighbours are correlated, so a sum over many pixels is
    noisier than `variance` says. `source_variance` is the mean variance of the pixels that went in: what the variance
    of sums over regions larger than the interpolation kernel should be made of.
    """

    data: Any
    variance: Any
    mask: Any
    source_variance: Any


def _lanczos(fraction: Any, xp: Any) -> list[Any]:
    """Six weights for a position between two pixels, summing to one; exactly 0 and 1 on a pixel."""
    weights = []
    for i in range(1 - _LOBES, _LOBES + 1):
        t = np.pi * (fraction - i)
        safe = xp.where(t == 0, 1.0, t)
        value = _LOBES * xp.sin(safe) * xp.sin(safe / _LOBES) / safe**2
        # sin(pi) is 1e-16 in floating point: on a pixel the other weights must vanish
        on_pixel = fraction == 0
        weights.append(xp.where(on_pixel, 1.0 if i == 0 else 0.0, xp.where(t == 0, 1.0, value)))
    total = sum(weights)
    return [w / total for w in weights]


def resample(images: Any, variances: Any, masks: Any, matrices: Any, shape: tuple[int, int]) -> Resampled:
    """Resample images by affine or polynomial maps with a Lanczos-3 kernel.

    Parameters
    ----------
    images, variances : arrays (B, h, w)
        ADU and ADU^2.
    masks : bool array (B, h, w)
        True = ignore. An output pixel is masked when a masked or missing pixel has a coefficient above 2 %.
    matrices : host array (B, 2, 3), (B, 2, 6) or (B, 2, 10), float64
        Output pixel (x, y) to input pixel: ``x_in = m[0, 0] x + m[0, 1] y + m[0, 2]``, and so for y with ``m[1]``;
        for polynomials followed by the coefficients of x^2, x y, y^2 and x^3, x^2 y, x y^2, y^3.
    shape : (H, W)
        Of the output.

    Returns
    -------
    Resampled
        Fluxes are conserved: values are multiplied by the area of an output pixel on the input, the determinant of the
        map's derivative. Maps onto pixel centres (whole shifts, quarter turns, mirrors) are exact.
    """
    matrices = np.asarray(matrices, float)
    if (matrices.ndim != 3 or matrices.shape[:2] != (len(images), 2) or matrices.shape[2] not in _COUNTS
            or not np.isfinite(matrices).all()):
        raise InputError(f"matrices must be finite and of shape ({len(images)}, 2, 3, 6 or 10), got {matrices.shape}")
    backend = backend_of(images, variances, masks)
    xp = backend.xp
    planes = backend.run_all(lambda i: _one(images[i], variances[i], masks[i], matrices[i], shape), range(len(images)))
    return Resampled(*(xp.stack([p[k] for p in planes]) for k in range(4)))


def _one(image: Any, variance: Any, mask: Any, matrix: np.ndarray, shape: tuple[int, int]) -> tuple[Any, ...]:
    xp = backend_of(image).xp
    height, width = image.shape
    good = ~mask & xp.isfinite(image) & xp.isfinite(variance)
    image = xp.where(good, image.astype(xp.float64), 0.0)
    # A hole must not ring: it takes the mean of its neighbours, and stays masked.
    image = xp.where(good, image, smooth(image[None], good[None])[0]).reshape(-1)
    variance = xp.where(good, variance.astype(xp.float64), 0.0).reshape(-1)
    bad = (~good).reshape(-1)
    x0, fx, y0, fy = _positions(matrix, shape, xp)
    wx, wy = _lanczos(fx, xp), _lanczos(fy, xp)
    data, noise, norm = xp.zeros(shape), xp.zeros(shape), xp.zeros(shape)
    masked = xp.zeros(shape, dtype=bool)
    for j, wj in enumerate(wy):
        y = y0 + (j + 1 - _LOBES)
        row_ok = (y >= 0) & (y < height)
        row = xp.minimum(xp.maximum(y, 0), height - 1) * width
        for i, wi in enumerate(wx):
            x = x0 + (i + 1 - _LOBES)
            index = row + xp.minimum(xp.maximum(x, 0), width - 1)
            c = wj * wi
            data = data + c * image[index]
            noise = noise + c * c * variance[index]
            norm = norm + c * c
            masked |= (xp.abs(c) > _NEGLIGIBLE) & (bad[index] | ~(row_ok & (x >= 0) & (x < width)))
    area = _area(matrix, shape, xp)
    return data * area, noise * area**2, masked, noise / norm * area**2


def _positions(matrix: np.ndarray, shape: tuple[int, int], xp: Any) -> tuple[Any, Any, Any, Any]:
    """Input pixel below each output pixel, and the fraction beyond it, for x and y."""
    y, x = xp.arange(shape[0], dtype=xp.float64)[:, None], xp.arange(shape[1], dtype=xp.float64)[None]
    out = []
    for a, b, c, *higher in matrix.tolist():
        position = a * x + b * y + c
        for k, (i, j) in zip(higher, _powers(len(higher)), strict=True):
            position = position + k * x**i * y**j
        whole = xp.floor(position + 1e-9)
        fraction = position - whole
        out += [whole.astype(xp.int64), xp.where(xp.abs(fraction) < 1e-9, 0.0, fraction)]
    return out[0], out[1], out[2], out[3]


def _powers(count: int) -> list[tuple[int, int]]:
    """Powers (i, j) of x^i y^j of so many terms beyond the linear ones."""
    return exponents(_COUNTS[3 + count])[3:]


def _area(matrix: np.ndarray, shape: tuple[int, int], xp: Any) -> Any:
    """Area of output pixels on the input: one number, or a plane where the map is no affine one."""
    if matrix.shape[1] == 3:
        return float(abs(np.linalg.det(matrix[:, :2])))
    y, x = xp.arange(shape[0], dtype=xp.float64)[:, None], xp.arange(shape[1], dtype=xp.float64)[None]
    slopes = []
    for a, b, _, *higher in matrix.tolist():
        along_x, along_y = a, b
        for k, (i, j) in zip(higher, _powers(len(higher)), strict=True):
            along_x = along_x + k * i * x ** max(i - 1, 0) * y**j
            along_y = along_y + k * j * x**i * y ** max(j - 1, 0)
        slopes.append((along_x, along_y))
    return xp.abs(slopes[0][0] * slopes[1][1] - slopes[0][1] * slopes[1][0])
