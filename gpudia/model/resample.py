"""Resampling of images onto the reference's grid, where a whole-pixel shift and the kernel cannot absorb the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gpudia.backend import backend_of
from gpudia.errors import InputError
from gpudia.flags import PIXEL_FLAGS
from gpudia.model.planes import smooth
from gpudia.model.polynomials import exponents

__all__ = ["Resampled", "resample"]

_LOBES = 3
#: A masked pixel spoils an output pixel when its coefficient is above this.
_NEGLIGIBLE = 0.02
#: Coefficients of a map by its degree.
_COUNTS = {3: 1, 6: 2, 10: 3}
#: A map whose shifts differ by no more than this over the image, pixels, takes whole planes; others pixel by pixel.
_MOST_SPREAD = 8.0


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


def resample(images: Any, variances: Any, masks: Any, matrices: Any, shape: tuple[int, int]) -> Resampled:
    """Resample images by affine or polynomial maps with a Lanczos-3 kernel.

    Parameters
    ----------
    images, variances : arrays (B, h, w)
        ADU and ADU^2.
    masks : bool or uint8 array (B, h, w)
        True, or any bit, = ignore. An output pixel gets the bits of all pixels with a coefficient above 2 %; one that
        is missing counts as True, or as ``no_data``.
    matrices : host array (B, 2, 3), (B, 2, 6) or (B, 2, 10), float64
        Output pixel (x, y) to input pixel: ``x_in = m[0, 0] x + m[0, 1] y + m[0, 2]``, and so for y with ``m[1]``;
        for polynomials followed by the coefficients of x^2, x y, y^2 and x^3, x^2 y, x y^2, y^3.
    shape : (H, W)
        Of the output.

    Returns
    -------
    Resampled
        Fluxes are conserved: values are multiplied by the area of an output pixel on the input, the determinant of the
        map's derivative. Maps onto pixel centres (whole shifts, quarter turns, mirrors) are exact. Images of float32
        are resampled with its precision.
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
    kind = xp.float32 if image.dtype == xp.float32 else xp.float64
    missing = True if mask.dtype.kind == "b" else int(PIXEL_FLAGS.no_data)
    bits = xp.where(xp.isfinite(image) & xp.isfinite(variance), mask, mask | missing)
    good = bits == 0
    image = xp.where(good, image, 0).astype(kind)
    # A hole must not ring: it takes the mean of its neighbours, and stays masked.
    image = _framed(xp.where(good, image, smooth(image[None], good[None])[0]), xp)
    variance = _framed(xp.where(good, variance, 0).astype(kind), xp)
    bits = _framed(bits, xp)
    bits[:1], bits[-1:], bits[:, :1], bits[:, -1:] = missing, missing, missing, missing
    taps = _taps(matrix, shape, bits.shape, kind, xp)
    squares = taps.squared()
    data, noise = taps.sum(image), squares.sum(variance)
    area = _area(matrix, shape, xp)
    return data * area, noise * area**2, taps.spoiled(bits, xp), noise / (sum(squares.wy) * sum(squares.wx)) * area**2


def _framed(plane: Any, xp: Any) -> Any:
    """A plane with its outermost pixels repeated once, for taps that fall outside."""
    plane = xp.concatenate([plane[:1], plane, plane[-1:]])
    return xp.concatenate([plane[:, :1], plane, plane[:, -1:]], axis=1)


@dataclass(frozen=True)
class _Taps:
    """Pixels that go into every output pixel: for tap (j, i) those that `take` gives, with weights wy[j] wx[i].

    `largest_y` and `largest_x` are bounds of the weights' absolute values.
    """

    wy: list[Any]
    wx: list[Any]
    largest_y: np.ndarray
    largest_x: np.ndarray
    take: Callable[[Any], Callable[[int, int], Any]]

    def squared(self) -> _Taps:
        """Return taps of the squares of these weights."""
        return replace(self, wy=[w * w for w in self.wy], wx=[w * w for w in self.wx],
                       largest_y=self.largest_y**2, largest_x=self.largest_x**2)

    def sum(self, plane: Any) -> Any:
        """Weighted sum over the taps."""
        at, total = self.take(plane), 0
        for j, along_y in enumerate(self.wy):
            row = self.wx[0] * at(j, 0)
            for i in range(1, len(self.wx)):
                row += self.wx[i] * at(j, i)
            row *= along_y
            total = row + total
        return total

    def spoiled(self, bits: Any, xp: Any) -> Any:
        """Bits of the pixels whose coefficient is not negligible."""
        at, found = self.take(bits), xp.zeros(self.wx[0].shape, dtype=bits.dtype)
        wy, wx = ([xp.abs(w) for w in weights] for weights in (self.wy, self.wx))
        for j, i in np.argwhere(np.outer(self.largest_y, self.largest_x) > _NEGLIGIBLE).tolist():
            found |= at(j, i) * (wy[j] * wx[i] > _NEGLIGIBLE)
        return found


def _taps(matrix: np.ndarray, shape: tuple[int, int], size: tuple[int, int], kind: Any, xp: Any) -> _Taps:
    """Taps of a map, on planes of shape `size` that `_framed` made: one pixel further on."""
    y, x = xp.arange(shape[0], dtype=xp.float64)[:, None], xp.arange(shape[1], dtype=xp.float64)[None]
    places = [_mapped(row, x, y) + 1 for row in matrix.tolist()][::-1]  # y, x
    bounds = _bounds(matrix, shape)
    if max(high - low for low, high in bounds) > _MOST_SPREAD:
        return _scattered(places, size, kind, xp)
    shifts = [range(math.floor(low) + 1 - _LOBES, math.floor(high) + _LOBES + 1) for low, high in bounds]
    wy, wx = (_lanczos(place - index, low, high, taps, kind, xp)
              for place, index, (low, high), taps in zip(places, (y, x), bounds, shifts, strict=True))
    top_y, top_x = (_largest(low, high, taps) for (low, high), taps in zip(bounds, shifts, strict=True))
    window = [_indices(taps[0], taps[-1] + n, limit, xp) for taps, n, limit in zip(shifts, shape, size, strict=True)]

    def take(plane: Any) -> Callable[[int, int], Any]:
        around = plane[window[0]][:, window[1]]
        return lambda j, i: around[j:j + shape[0], i:i + shape[1]]

    return _Taps(wy, wx, top_y, top_x, take)


def _scattered(places: list[Any], size: tuple[int, int], kind: Any, xp: Any) -> _Taps:
    """Taps of any map: every pixel is looked up by itself."""
    taps = range(1 - _LOBES, _LOBES + 1)
    whole = [xp.floor(place + 1e-9) for place in places]
    wy, wx = (_lanczos(place - below, 0.0, 1.0, taps, kind, xp) for place, below in zip(places, whole, strict=True))
    rows, columns = ([_clipped(below.astype(xp.int64) + t, n, xp) for t in taps]
                     for below, n in zip(whole, size, strict=True))
    largest = _largest(0.0, 1.0, taps)

    def take(plane: Any) -> Callable[[int, int], Any]:
        flat = plane.reshape(-1)
        return lambda j, i: flat[rows[j] * size[1] + columns[i]]

    return _Taps(wy, wx, largest, largest, take)


def _indices(first: int, stop: int, limit: int, xp: Any) -> Any:
    """Rows from `first` to before `stop`, those outside of a plane replaced by its outermost."""
    return slice(first, stop) if first >= 0 and stop <= limit else _clipped(xp.arange(first, stop), limit, xp)


def _clipped(index: Any, limit: int, xp: Any) -> Any:
    return xp.minimum(xp.maximum(index, 0), limit - 1)


def _lanczos(displacement: Any, low: float, high: float, taps: range, kind: Any, xp: Any) -> list[Any]:
    """Weights of whole-pixel taps for displacements between `low` and `high`, of sum one; 0 and 1 on a pixel.

    Lanczos' sinc(u) sinc(u/3), u = displacement - tap, of which sin(pi u) is common to all taps but for its sign, and
    sin(pi u/3) to those three pixels apart.
    """
    nearest = xp.floor(displacement + 0.5)
    on_pixel = xp.abs(displacement - nearest) < (1e-6 if kind == xp.float32 else 1e-9)
    d = xp.where(on_pixel, nearest, displacement).astype(kind)
    sine, cosine = (f(d * (math.pi / _LOBES)) * ~on_pixel for f in (xp.sin, xp.cos))
    waves = [sine * math.cos(math.pi * t / _LOBES) - cosine * math.sin(math.pi * t / _LOBES) for t in range(_LOBES)]
    weights = []
    for t in taps:
        u = d - t
        weight = waves[t % _LOBES] / (u * u + 1e-30)  # signs: (-1)^t of sin(pi u), and of sin(pi u/3) every three
        if t % 2 != t // _LOBES % 2:
            weight = -weight
        if math.floor(low) <= t <= math.ceil(high):
            weight = weight + (on_pixel & (u == 0))
        if not (t - _LOBES < low and high < t + _LOBES):
            weight = weight * (xp.abs(u) < _LOBES)
        weights.append(weight)
    total = sum(weights)
    return [w / total for w in weights]


def _largest(low: float, high: float, taps: range) -> np.ndarray:
    """Largest absolute weight of every tap for displacements in a range; a margin for what lies between samples."""
    samples = np.linspace(low, high, 65)
    return np.array([np.abs(w).max() for w in _lanczos(samples, low, high, taps, np.float64, np)]) + 0.01


def _bounds(matrix: np.ndarray, shape: tuple[int, int]) -> list[tuple[float, float]]:
    """Least and largest shift in y and in x, on the planes that `_framed` made: from a grid, on the host."""
    y, x = np.linspace(0, shape[0] - 1, 33)[:, None], np.linspace(0, shape[1] - 1, 33)[None]
    shifts = [_mapped(row, x, y) + 1 - index for row, index in zip(matrix.tolist(), (x, y), strict=True)][::-1]
    bend = 0.0 if matrix.shape[1] == 3 else 0.05  # between the grid's points
    return [(float(s.min()) - bend, float(s.max()) + bend) for s in shifts]


def _mapped(row: list[float], x: Any, y: Any) -> Any:
    """One coordinate of the mapped pixels."""
    a, b, c, *higher = row
    position = a * x + (b * y + c)
    for k, (i, j) in zip(higher, _powers(len(higher)), strict=True):
        position = position + k * x**i * y**j
    return position


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
