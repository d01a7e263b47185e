"""Resampling of images onto the reference's grid, where a whole-pixel shift and the kernel cannot absorb the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from gpudia.backend import backend_of, scalar
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
    image, variance = image.astype(kind), variance.astype(kind)
    image[~good], variance[~good] = 0, 0
    # A hole must not ring: it takes the mean of its neighbours, and stays masked.
    image += smooth(image[None], good[None])[0] * ~good
    image, variance, bits = (_framed(plane, xp) for plane in (image, variance, bits))
    bits[:1], bits[-1:], bits[:, :1], bits[:, -1:] = missing, missing, missing, missing
    taps = _taps(matrix, shape, bits.shape, kind, xp)
    squares = taps.squared()
    area = _area(matrix, shape, xp)
    unit, noise = area / taps.plane(taps.total), taps.plane(squares.sum(variance))
    source = noise / taps.plane(sum(squares.wy) * sum(squares.wx)) * area**2
    return taps.plane(taps.sum(image)) * unit, noise * unit**2, taps.plane(squares.spoiled(bits, xp)), source


def _framed(plane: Any, xp: Any) -> Any:
    """A plane with its outermost pixels repeated once, for taps that fall outside."""
    plane = xp.concatenate([plane[:1], plane, plane[-1:]])
    return xp.concatenate([plane[:, :1], plane, plane[:, -1:]], axis=1)


@dataclass(frozen=True)
class _Taps:
    """Pixels that go into every output pixel: for tap (j, i) those that `take` gives, with weights wy[j] wx[i] / total.

    All are rows of the pixels of a `grid`, the first columns of which are the output: one row after the other takes two
    thirds of the time of planes in planes. `largest_y` and `largest_x` are bounds of the weights' absolute values, of
    those with the sum one.
    """

    wy: list[Any]
    wx: list[Any]
    total: Any
    largest_y: np.ndarray
    largest_x: np.ndarray
    take: Callable[[Any], Callable[[int, int], Any]]
    grid: tuple[int, int]
    width: int

    def squared(self) -> _Taps:
        """Return taps of the squares of these weights."""
        return replace(self, wy=[w * w for w in self.wy], wx=[w * w for w in self.wx], total=self.total**2,
                       largest_y=self.largest_y**2, largest_x=self.largest_x**2)

    def plane(self, row: Any) -> Any:
        """Pixels of the grid as the plane of the output."""
        return row.reshape(self.grid)[:, :self.width]

    def sum(self, plane: Any) -> Any:
        """Sum over the taps, with weights that are not divided by their total."""
        at = self.take(plane)
        return _total(_total(w * at(j, i) for i, w in enumerate(self.wx)) * along_y
                      for j, along_y in enumerate(self.wy))

    def spoiled(self, bits: Any, xp: Any) -> Any:
        """Bits of the pixels whose coefficient is not negligible: for taps of squares."""
        at, found, limit = self.take(bits), xp.zeros(self.total.shape, dtype=bits.dtype), _NEGLIGIBLE**2 * self.total
        for j, i in np.argwhere(np.outer(self.largest_y, self.largest_x) > _NEGLIGIBLE**2).tolist():
            found |= at(j, i) * (self.wy[j] * self.wx[i] > limit)
        return found


def _total(planes: Iterator[Any]) -> Any:
    """Sum of planes that are made for it, in the first of them."""
    total = next(planes)
    for plane in planes:
        total += plane
    return total


def _taps(matrix: np.ndarray, shape: tuple[int, int], size: tuple[int, int], kind: Any, xp: Any) -> _Taps:
    """Taps of a map, on planes of shape `size` that `_framed` made: one pixel further on."""
    shifts = matrix - np.eye(2, matrix.shape[1])
    shifts[:, 2] += 1
    bounds = _bounds(shifts, shape)
    if max(high - low for low, high in bounds) > _MOST_SPREAD:
        return _scattered(matrix, shape, size, kind, xp)
    whole = [math.floor(low) for low, _ in bounds]
    shifts[:, 2] -= whole[::-1]  # few pixels are left, which float32 holds best
    bounds = [(low - n, high - n) for (low, high), n in zip(bounds, whole, strict=True)]
    taps = [range(1 - _LOBES, math.floor(high) + _LOBES + 1) for _, high in bounds]
    grid = shape[0], shape[1] + len(taps[1]) - 1  # as wide as the pixels that are taken
    y, x = xp.arange(grid[0], dtype=xp.float64)[:, None], xp.arange(grid[1], dtype=xp.float64)[None]
    places = [_mapped(row, x, y) for row in shifts.tolist()][::-1]  # y, x
    (wy, sum_y), (wx, sum_x) = (_lanczos(place.astype(kind).reshape(-1), low, high, some, xp)
                                for place, (low, high), some in zip(places, bounds, taps, strict=True))
    rows, columns = (_indices(n + some[0], n + some[-1] + length, limit, xp) for n, some, length, limit
                     in zip(whole, taps, (grid[0] + 1, shape[1]), size, strict=True))  # the last row's last taps go on

    def take(plane: Any) -> Callable[[int, int], Any]:
        around = plane[rows][:, columns].reshape(-1)
        return lambda j, i: around[j * grid[1] + i:(j + grid[0]) * grid[1] + i]

    top_y, top_x = (_largest(math.floor(16 * low) / 16, math.ceil(16 * high) / 16, some)  # few, each made once
                    for (low, high), some in zip(bounds, taps, strict=True))
    return _Taps(wy, wx, sum_y * sum_x, top_y, top_x, take, grid, shape[1])


def _scattered(matrix: np.ndarray, shape: tuple[int, int], size: tuple[int, int], kind: Any, xp: Any) -> _Taps:
    """Taps of any map: every pixel is looked up by itself."""
    y, x = xp.arange(shape[0], dtype=xp.float64)[:, None], xp.arange(shape[1], dtype=xp.float64)[None]
    places = [(_mapped(row, x, y) + 1).reshape(-1) for row in matrix.tolist()][::-1]  # y, x
    taps = range(1 - _LOBES, _LOBES + 1)
    whole = [xp.floor(place + 1e-9) for place in places]
    (wy, sum_y), (wx, sum_x) = (_lanczos((place - below).astype(kind), 0.0, 1.0, taps, xp)
                                for place, below in zip(places, whole, strict=True))
    rows, columns = ([_clipped(below.astype(xp.int64) + t, n, xp) for t in taps]
                     for below, n in zip(whole, size, strict=True))
    largest = _largest(0.0, 1.0, taps)

    def take(plane: Any) -> Callable[[int, int], Any]:
        flat = plane.reshape(-1)
        return lambda j, i: flat[rows[j] * size[1] + columns[i]]

    return _Taps(wy, wx, sum_y * sum_x, largest, largest, take, shape, shape[1])


def _indices(first: int, stop: int, limit: int, xp: Any) -> Any:
    """Rows from `first` to before `stop`, those outside of a plane replaced by its outermost."""
    return slice(first, stop) if first >= 0 and stop <= limit else _clipped(xp.arange(first, stop), limit, xp)


def _clipped(index: Any, limit: int, xp: Any) -> Any:
    return xp.minimum(xp.maximum(index, 0), limit - 1)


def _lanczos(displacement: Any, low: float, high: float, taps: range, xp: Any) -> tuple[list[Any], Any]:
    """Weights of whole-pixel taps for displacements between `low` and `high`, and their sum; 0 and 1 on a pixel.

    Lanczos' sinc(u) sinc(u/3), u = displacement - tap, of which sin(pi u) is common to all taps but for its sign and
    left out, and sin(pi u/3) is common to those three pixels apart.
    """
    nearest = xp.floor(displacement + 0.5)
    on_pixel = xp.abs(displacement - nearest) < (1e-6 if displacement.dtype == xp.float32 else 1e-9)
    exact = bool(scalar(on_pixel.any()))
    d = xp.where(on_pixel, nearest + 0.5, displacement) if exact else displacement  # no u is zero
    sine, cosine = (f(d * (math.pi / _LOBES)) for f in (xp.sin, xp.cos))
    waves = [sine] + [sine * math.cos(math.pi * t / _LOBES) - cosine * math.sin(math.pi * t / _LOBES)
                      for t in range(1, _LOBES)]
    weights = []
    for t in taps:
        u = d - t
        weight = waves[t % _LOBES] / (u * u)  # signs: (-1)^t of sin(pi u), and of sin(pi u/3) every three
        if t % 2 != t // _LOBES % 2:
            weight = -weight
        if not (t - _LOBES < low and high < t + _LOBES):
            weight = weight * (xp.abs(u) < _LOBES)
        if exact:
            weight = xp.where(on_pixel, nearest == t, weight)
        weights.append(weight)
    return weights, sum(weights)


@lru_cache(maxsize=1000)
def _largest(low: float, high: float, taps: range) -> np.ndarray:
    """Largest absolute weight of every tap for displacements in a range; a margin for what lies between samples."""
    weights, total = _lanczos(np.linspace(low, high, 65), low, high, taps, np)
    return np.abs(weights / total).max(axis=1) + 0.01


def _bounds(shifts: np.ndarray, shape: tuple[int, int]) -> list[tuple[float, float]]:
    """Least and largest shift in y and in x: from a grid, on the host."""
    y, x = np.linspace(0, shape[0] - 1, 33)[:, None], np.linspace(0, shape[1] - 1, 33)[None]
    found = [_mapped(row, x, y) for row in shifts.tolist()][::-1]
    bend = 0.0 if shifts.shape[1] == 3 else 0.05  # between the grid's points
    return [(float(s.min()) - bend, float(s.max()) + bend) for s in found]


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
