"""Decorrelated difference and score image: what a blind search for variables looks at.

The noise of a difference D = I - R (x) k is not white: the reference's part went through the kernel. Both images here
are one filter a over D, so that their variance is known pixel by pixel:

    Var(sum_y a(y) D(x + y)) = sum_y a(y)^2 var_I(x + y) + sum_z g(z)^2 var_R(x + z),   g = a correlated with k

Sums over the frame are correlations, taken with FFTs. A kernel that varies over it is taken as it is at the centres of
tiles of 128 px.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

from scipy.fft import next_fast_len

from gpudia.backend import backend_of
from gpudia.errors import InputError
from gpudia.model.planes import SAMPLE, median_of
from gpudia.model.polynomials import count_terms, evaluate_terms

__all__ = ["Decorrelated", "Score", "decorrelate", "score_image"]

#: Side of the tiles over which a kernel that varies is taken constant, pixels.
_TILE = 128
#: Share of a filter that masked pixels may carry.
_MASKED = 0.2
#: Share of the reference's part of a variance that masked pixels leave, at least.
_LEAST = 0.1


class Decorrelated(NamedTuple):
    """A difference whose noise is independent from pixel to pixel, (H, W) each, and its PSF (m', m') of sum 1."""

    difference: Any
    variance: Any
    mask: Any
    psf: Any


class Score(NamedTuple):
    """Matched filter at every pixel, (H, W) each.

    `score` = flux / error is N(0, 1) where nothing varies; `flux` of a star at the pixel and its 1 sigma `error`, ADU
    of the image; `masked` is the share of the star that masked pixels hide. The others are NaN where it is above 0.2,
    so also on the border where the difference is not defined.
    """

    score: Any
    flux: Any
    error: Any
    masked: Any


def decorrelate(difference: Any, image_variance: Any, kernel: Any, reference_variance: Any, psf: Any = None, *,
                mask: Any = None) -> Decorrelated:
    r"""Filter a difference so that its noise is white again [1]_.

    .. math:: D' = D \otimes \psi, \qquad
              \hat\psi = \sqrt{(s_I^2 + P^2 s_R^2) / (s_I^2 + |\hat k|^2 s_R^2)}

    with the median variances s^2 of image and reference and the scale P, the sum of k. White is the noise of the sky;
    near bright stars, where the two variances have another ratio, it is nearly so. `variance` is exact everywhere.

    Parameters
    ----------
    difference, image_variance, reference_variance : (H, W) arrays of one backend
        I - M, ADU, the variance of the image's own noise and that of the reference, ADU^2. A difference that is not
        finite is masked.
    kernel : (K, K) or (P, K, K)
        Matching kernel, or its polynomial terms as in `DifferenceStack.coefficients`.
    psf : (m, m), optional
        PSF of the reference, of sum 1, m odd; by default a single pixel.
    mask : (H, W) bool, optional
        True = ignore. Ignored pixels count as zero; where they carry more than a fifth of psi^2 the result is masked.

    Returns
    -------
    Decorrelated
        float64, NaN where masked. Fluxes are kept. The PSF is that at the frame's centre.

    Raises
    ------
    InputError
        Shapes or sizes do not agree.

    References
    ----------
    .. [1] Reiss & Lupton, DMTN-021
    """
    epoch = _epoch(difference, image_variance, kernel, reference_variance, psf, mask, 0.0)
    xp, values, variance = epoch.backend.xp, epoch.empty(), epoch.empty()
    for tile in epoch.tiles():
        psi = xp.sqrt(tile.noise(tile.scale**2) / tile.noise(tile.power))
        share = _share(tile, tile.plane(psi) ** 2)
        usable = (share > 1 - _MASKED) & (tile.good > 0)
        tile.put(values, xp.where(usable, tile.correlate(tile.difference, psi), xp.nan))
        tile.put(variance, xp.where(usable, tile.variance(psi), xp.nan))
    tile = epoch.tile_at(slice(0, epoch.shape[0]), slice(0, epoch.shape[1]))
    stamp = epoch.stamp(tile.plane(tile.psf * xp.sqrt(tile.noise(tile.scale**2) / tile.noise(tile.power))))
    return Decorrelated(values, variance, ~xp.isfinite(values), stamp / stamp.sum())


def score_image(difference: Any, image_variance: Any, psf: Any, kernel: Any = None, reference_variance: Any = None, *,
                mask: Any = None, shared: float = 0.0) -> Score:
    r"""Return the significance of a star of any flux, positive or negative, at every pixel of a difference.

    .. math:: S = \frac{\sum_y h(y) D(x + y)}{\sqrt{Var}}, \qquad
              \hat h = \hat\phi / (s_I^2 + |\hat k|^2 s_R^2), \qquad \phi = (PSF_R \otimes k) / P

    The filter h is the best one for noise of the power spectrum that the sky has on the difference, with the median
    variances s^2 of image and reference: the PSF on the decorrelated difference. Its variance is that of the linear
    estimate, with both variances at each pixel and the correlation that the kernel brings, so that S has unit variance
    near bright stars, too (there, weights of each pixel's own would make the error up to 15 % smaller). What the fit of
    the kernel adds at bright stars is not in it.

    Parameters
    ----------
    difference, image_variance : (H, W) arrays of one backend
        I - M, ADU, and the variance of the image's own noise, ADU^2. A difference that is not finite is masked.
    psf : (m, m)
        PSF of the reference, of sum 1, m odd. Without a kernel that of the image.
    kernel : (K, K) or (P, K, K), optional
        Matching kernel, or its polynomial terms as in `DifferenceStack.coefficients`.
    reference_variance : (H, W), optional
        Of the reference, ADU^2; with `kernel`. By default the reference has no noise.
    mask : (H, W) bool, optional
        True = ignore. What ignored pixels take from a star is made up for, up to a fifth of it.
    shared : float
        What the image adds to the reference, as a factor of its pixels: its weight in a stack over its scale.

    Returns
    -------
    Score
        float64.

    Raises
    ------
    InputError
        Shapes or sizes do not agree.

    References
    ----------
    Zackay, Ofek & Gal-Yam 2016, ApJ 830, 27
    """
    epoch = _epoch(difference, image_variance, kernel, reference_variance, psf, mask, shared)
    xp, planes = epoch.backend.xp, [epoch.empty() for _ in range(4)]
    for tile in epoch.tiles():
        filtered = tile.psf / tile.noise(tile.power)
        overlap = tile.plane(filtered) * tile.plane(tile.psf)
        share, norm = _share(tile, overlap), overlap.sum()
        usable = share > 1 - _MASKED
        sigma = xp.sqrt(xp.where(usable, tile.variance(filtered), xp.nan))
        light = tile.correlate(tile.difference, filtered)
        norm = norm * xp.where(usable, share, 1.0)
        found = (light / sigma, xp.where(usable, light / norm, xp.nan), sigma / norm, 1 - share)
        for plane, part in zip(planes, found, strict=True):
            tile.put(plane, part)
    return Score(planes[0], planes[1], planes[2], xp.minimum(xp.maximum(planes[3], 0.0), 1.0))


@dataclass(frozen=True)
class _Tile:
    """A part of the frame with a margin on the grid of its transforms; zeros where nothing is good.

    Filters are given by their half spectra. `kernel` and `psf` are those of k and of PSF_R (x) k / P.
    """

    backend: Any
    difference: Any
    good: Any
    own: Any
    other: Any
    kernel: Any
    psf: Any
    scale: Any
    shared: float
    inner: tuple[slice, slice]
    outer: tuple[slice, slice]

    @property
    def size(self) -> tuple[int, int]:
        return self.good.shape[0], self.good.shape[1]

    @cached_property
    def power(self) -> Any:
        return self.backend.xp.abs(self.kernel) ** 2

    @cached_property
    def _levels(self) -> tuple[Any, Any]:
        """Median variances of image and reference, (1, 1); of the image 1 where nothing is good."""
        xp, good = self.backend.xp, (self.good > 0)[None]
        own = median_of(self.own[None], good, SAMPLE)
        other = median_of(self.other[None], (self.other > 0)[None] & good, SAMPLE)
        return (xp.where(own > 0, own, 1.0)[:, None], xp.where(other > 0, other, 0.0)[:, None])

    def noise(self, power: Any) -> Any:
        """Power spectrum of the sky's noise, s_I^2 + power s_R^2."""
        own, other = self._levels
        return own + power * other

    def plane(self, spectrum: Any) -> Any:
        return self.backend.irfft2(spectrum, self.size)

    def spectrum(self, plane: Any) -> Any:
        return self.backend.rfft2(plane, self.size)

    def correlate(self, plane: Any, spectrum: Any) -> Any:
        """Sum over y of a(y) plane(x + y) for the filter a of this spectrum."""
        return self.plane(self.spectrum(plane) * self.backend.xp.conj(spectrum))

    def variance(self, spectrum: Any) -> Any:
        """Variance of the difference filtered with a, at every pixel.

        Ignored pixels are taken out of the image's part exactly, out of the reference's to first order and with the
        second order of each of them alone: exact for isolated ones where var_R is smooth.
        """
        xp, a = self.backend.xp, self.plane(spectrum)
        through = spectrum * xp.conj(self.kernel)
        g, own = self.plane(through), self.own * self.good
        squared = self.spectrum(a**2)
        variance = self.correlate(own, squared)
        if self.shared:
            variance = variance - 2 * self.shared * self.correlate(own, self.spectrum(a * g))
        whole = self.correlate(self.other, self.spectrum(g**2))
        lost = self.other * (1 - self.good)
        energy = (self.plane(self.kernel) ** 2).sum()
        taken = self.correlate(lost, self.spectrum(2 * a * self.plane(through * self.kernel)) - energy * squared)
        return variance + xp.maximum(whole - taken, _LEAST * whole)

    def put(self, frame: Any, values: Any) -> None:
        """Write the tile's own pixels into a frame."""
        frame[self.outer] = values[self.inner]


def _share(tile: _Tile, weights: Any) -> Any:
    """Share of a filter's weights (a plane) that lies on good pixels, at every pixel."""
    return tile.correlate(tile.good, tile.spectrum(weights)) / weights.sum()


@dataclass(frozen=True)
class _Epoch:
    """Planes of a frame with a margin of zeros of the width `reach`, and the kernel's terms."""

    backend: Any
    planes: tuple[Any, ...]
    kernel: Any
    psf: Any
    shared: float
    shape: tuple[int, int]

    @property
    def reach(self) -> int:
        """Half width of the filters, pixels."""
        return self.psf.shape[0] // 2 + 2 * (self.kernel.shape[-1] // 2) + 2

    def empty(self) -> Any:
        return self.backend.xp.full(self.shape, self.backend.xp.nan)

    def tiles(self) -> Iterator[_Tile]:
        """Tiles of about equal size that cover the frame: one where the kernel is constant."""
        rows, columns = (self._cuts(n) for n in self.shape)
        return (self.tile_at(row, column) for row in rows for column in columns)

    def _cuts(self, length: int) -> list[slice]:
        count = 1 if len(self.kernel) == 1 else max(1, round(length / _TILE))
        edges = [round(i * length / count) for i in range(count + 1)]
        return [slice(a, b) for a, b in pairwise(edges)]

    def tile_at(self, rows: slice, columns: slice) -> _Tile:
        """One tile, with the kernel at its centre."""
        xp, margin = self.backend.xp, self.reach
        sides = [part.stop - part.start + 2 * margin for part in (rows, columns)]
        size = tuple(next_fast_len(side, real=True) for side in sides)
        cut = slice(rows.start, rows.start + sides[0]), slice(columns.start, columns.start + sides[1])
        parts = [xp.zeros(size) for _ in self.planes]
        for part, plane in zip(parts, self.planes, strict=True):
            part[:sides[0], :sides[1]] = plane[cut]
        difference, good, own, other = parts
        kernel = self._kernel_at((columns.start + columns.stop - 1) / 2, (rows.start + rows.stop - 1) / 2)
        k, star = (self.backend.rfft2(_cyclic(stamp, size, xp), size) for stamp in (kernel, self.psf))
        scale = kernel.sum()
        inner = slice(margin, sides[0] - margin), slice(margin, sides[1] - margin)
        return _Tile(self.backend, difference, good, own, other, k, star * k / scale, scale, self.shared, inner,
                     (rows, columns))

    def _kernel_at(self, x: float, y: float) -> Any:
        degree = next(d for d in range(len(self.kernel)) if count_terms(d) == len(self.kernel))
        terms = evaluate_terms(degree, x, y, self.shape)
        return sum(float(term) * self.kernel[p] for p, term in enumerate(terms))

    def stamp(self, plane: Any) -> Any:
        """Cut a filter's plane, whose origin is its first pixel, to a stamp of half width `reach`."""
        xp, n = self.backend.xp, self.reach
        rows = xp.concatenate([plane[-n:], plane[:n + 1]], axis=0)
        return xp.concatenate([rows[:, -n:], rows[:, :n + 1]], axis=1)


def _cyclic(stamp: Any, size: tuple[int, ...], xp: Any) -> Any:
    """Put a stamp on a larger plane with its centre at the first pixel, cyclically."""
    plane, h = xp.zeros(size), stamp.shape[0] // 2
    for to_rows, from_rows in ((slice(0, h + 1), slice(h, None)), (slice(size[0] - h, None), slice(0, h))):
        for to_columns, from_columns in ((slice(0, h + 1), slice(h, None)), (slice(size[1] - h, None), slice(0, h))):
            plane[to_rows, to_columns] = stamp[from_rows, from_columns]
    return plane


def _epoch(difference: Any, image_variance: Any, kernel: Any, reference_variance: Any, psf: Any, mask: Any,
           shared: float) -> _Epoch:
    """Check what was given and put it on planes with a margin."""
    backend = backend_of(*(a for a in (difference, image_variance, kernel, reference_variance, psf, mask)
                           if a is not None))
    xp = backend.xp
    kernel = xp.ones((1, 1, 1)) if kernel is None else kernel.astype(xp.float64)
    kernel = kernel[None] if kernel.ndim == 2 else kernel
    psf = xp.ones((1, 1)) if psf is None else psf.astype(xp.float64)
    shape = tuple(difference.shape)
    _check(shape, {"image_variance": image_variance, "reference_variance": reference_variance, "mask": mask}, kernel,
           psf)
    good = xp.isfinite(difference) & xp.isfinite(image_variance) & (image_variance > 0)
    if mask is not None:
        good = good & (mask == 0)
    other = xp.zeros(shape) if reference_variance is None else reference_variance.astype(xp.float64)
    planes = (xp.where(good, difference, 0.0), good, xp.where(good, image_variance, 0.0),
              xp.where(xp.isfinite(other) & (other > 0), other, 0.0))
    epoch = _Epoch(backend, planes, kernel, psf, float(shared), shape)
    return _Epoch(backend, tuple(_padded(p, epoch.reach, xp) for p in planes), kernel, psf, float(shared), shape)


def _padded(plane: Any, margin: int, xp: Any) -> Any:
    padded = xp.zeros((plane.shape[0] + 2 * margin, plane.shape[1] + 2 * margin))
    padded[margin:margin + plane.shape[0], margin:margin + plane.shape[1]] = plane
    return padded


def _check(shape: tuple[int, ...], planes: dict[str, Any], kernel: Any, psf: Any) -> None:
    if len(shape) != 2:
        raise InputError(f"difference must have shape (H, W), got {shape}")
    for name, plane in planes.items():
        if plane is not None and tuple(plane.shape) != shape:
            raise InputError(f"{name} must have the shape of difference {shape}, got {tuple(plane.shape)}")
    if kernel.ndim != 3 or kernel.shape[-1] != kernel.shape[-2] or kernel.shape[-1] % 2 == 0:
        raise InputError(f"kernel must be (K, K) or (P, K, K) with K odd, got shape {tuple(kernel.shape)}")
    if all(count_terms(degree) != len(kernel) for degree in range(len(kernel))):
        raise InputError(f"kernel must have the terms of a whole degree (1, 3, 6, ...), got {len(kernel)}")
    if psf.ndim != 2 or psf.shape[0] != psf.shape[1] or psf.shape[0] % 2 == 0:
        raise InputError(f"psf must be (m, m) with m odd, got shape {tuple(psf.shape)}")
