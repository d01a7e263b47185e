"""The design matrix U of the model as an operator: applied, never stored.

    (U a)(x) = sum_p p_p(x) (R (x) k_p)(x) + sum_q b_q p_q(x)

Coefficients a are ordered: for each kernel polynomial p the pixels of the support, row-major; then the background.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np

from gpudia.backend import backend_of, to_device
from gpudia.model.convolver import TileConvolver
from gpudia.model.polynomials import count_terms, exponents, scaled
from gpudia.model.rules import KernelRules
from gpudia.model.tiles import Tiling

__all__ = ["Design"]


def _runs(support: np.ndarray) -> Iterator[tuple[int, slice, slice]]:
    """Runs of True in the rows of a mask: row, columns, and numbers among all that are True."""
    first = 0
    for row, free in enumerate(support):
        edges = np.flatnonzero(np.diff(free.astype(int), prepend=0, append=0))
        for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            yield row, slice(start, stop), slice(first, first + stop - start)
            first += stop - start


class Design:
    """U and its adjoint for one reference.

    Parameters
    ----------
    reference : array (H, W), float64
        Finite everywhere (masked pixels filled).
    tiling : Tiling
        Its tiles; holds the kernel size.
    support : bool array (K, K), host
        Pixels of the kernel that are free.
    spatial_degree, background_degree : int
        Total degrees of the kernel's and the background's polynomials.
    scale_degree : int, optional
        That of the photometric scale, the kernel's or less. Default: the kernel's.
    smoothness : float
        Strength of the regularisation; see `KernelRules`.
    """

    def __init__(self, reference: Any, tiling: Tiling, support: np.ndarray, spatial_degree: int,
                 background_degree: int, scale_degree: int | None = None, smoothness: float = 0.0) -> None:
        self.backend = backend_of(reference)
        self.xp = self.backend.xp
        self.tiling = tiling
        self.support = support
        self.reference = reference
        self.dtype = self.xp.float64
        self.convolver = TileConvolver(reference, tiling, spatial_degree)
        self.spatial_degree = spatial_degree
        self.n_kernel = int(support.sum())
        self.n_spatial = count_terms(spatial_degree)
        self.n_background = count_terms(background_degree)
        self.n_parameters = self.n_spatial * self.n_kernel + self.n_background
        scale = spatial_degree if scale_degree is None else min(scale_degree, spatial_degree)
        self.rules = KernelRules(self, smoothness, count_terms(scale))
        #: Free kernel pixels of one row that stand side by side: row, columns, and where they are among all of them.
        self.runs = list(_runs(support))
        self._index = None
        if not support.all():
            self._index = to_device(np.flatnonzero(support), self.backend)
        self._make_terms(spatial_degree, background_degree)

    def _make_terms(self, spatial_degree: int, background_degree: int) -> None:
        """Powers of the scaled coordinates on every tile, (T, hf, degree + 1) and (T, wf, degree + 1)."""
        (height, width), (hf, wf), m = self.tiling.shape, self.tiling.fft_shape, self.tiling.margin
        degree = max(spatial_degree, background_degree)
        origins = np.array(list(self.tiling.origins()))
        y = scaled(np.add.outer(origins[:, 0], np.arange(hf)) + m, height)
        x = scaled(np.add.outer(origins[:, 1], np.arange(wf)) + m, width)
        self._y = to_device(y[..., None] ** np.arange(degree + 1), self.backend)
        self._x = to_device(x[..., None] ** np.arange(degree + 1), self.backend)
        self._background_powers = exponents(background_degree)
        self.background_degree = background_degree
        self._powers = exponents(degree)

    def terms_at(self, place: tuple[Any, slice, slice], count: int) -> Any:
        """Values of the first terms on rows and columns of some tiles (or one), (count, ..., rows, columns)."""
        tiles, rows, columns = place
        y, x = self._y[tiles][..., rows, :], self._x[tiles][..., columns, :]
        return self.xp.stack([y[..., :, None, j] * x[..., None, :, i] for i, j in self._powers[:count]])

    def single(self) -> Design:
        """Return the same operator in single precision."""
        other = copy.copy(self)
        other.convolver = self.convolver.single()
        other.dtype = self.xp.float32
        for name in ("_y", "_x"):
            setattr(other, name, getattr(self, name).astype(self.xp.float32))
        return other

    def chunks(self, batch: int) -> Iterator[slice]:
        """Slices of tiles that are worked on together: one on a CPU, as many as memory allows on a GPU."""
        height, width = self.tiling.fft_shape
        step = self.backend.at_once(64 * height * width * batch)
        for start in range(0, self.tiling.count, step):
            yield slice(start, min(start + step, self.tiling.count))

    def unpack(self, a: Any) -> tuple[Any, Any]:
        """Coefficients (B, n) to kernels (B, P_k, K, K) and background (B, P_b)."""
        K, n = self.tiling.kernel_size, self.n_spatial * self.n_kernel
        kernels = a[:, :n].reshape(-1, self.n_spatial, self.n_kernel)
        if self._index is not None:
            full = self.xp.zeros((len(a), self.n_spatial, K * K), dtype=a.dtype)
            full[:, :, self._index] = kernels
            kernels = full
        return kernels.reshape(-1, self.n_spatial, K, K), a[:, n:]

    def pack(self, kernels: Any, background: Any) -> Any:
        """Inverse of `unpack`: kernels (B, P_k, K, K) and background (B, P_b) to coefficients (B, n)."""
        flat = kernels.reshape(len(kernels), self.n_spatial, -1)
        if self._index is not None:
            flat = flat[:, :, self._index]
        return self.xp.concatenate([flat.reshape(len(kernels), -1), background], axis=1)

    def padded(self, tiles: Any) -> Any:
        """Tiles (B, T, h, w) with zeros up to the shape of the transforms, (B, T, hf, wf), in the design's dtype."""
        planes = self.xp.zeros((*tiles.shape[:2], *self.tiling.fft_shape), dtype=self.dtype)
        h, w = self.tiling.tile
        planes[..., :h, :w] = tiles
        return planes

    def _synthesise(self, spectra: Any, background: Any, tiles: slice) -> Any:
        model = self.convolver.convolve(spectra, tiles)
        model += self._background_planes(background, tiles)
        return model

    def _background_planes(self, background: Any, tiles: slice) -> Any:
        """Background (B, P_b) on some tiles, (B, t, hf, wf), by rows and columns: sum_j y^j sum_i b_ij x^i."""
        size = self.background_degree + 1
        table = self.xp.zeros((len(background), 1, size, size), dtype=self.dtype)
        for k, (i, j) in enumerate(self._background_powers):
            table[:, 0, j, i] = background[:, k]
        return (self._y[tiles, :, :size] @ table) @ self.xp.swapaxes(self._x[tiles, :, :size], -1, -2)

    def _analyse(self, planes: Any, tiles: slice, spectra: Any, background: Any) -> None:
        """Add the tiles' part of the adjoint to `spectra` (B, P_k, hf, wh) and `background` (B, P_b)."""
        self.convolver.correlate(planes, tiles, spectra)
        size = self.background_degree + 1
        table = self.xp.swapaxes(self._y[tiles, :, :size], -1, -2) @ (planes @ self._x[tiles, :, :size])
        for k, (i, j) in enumerate(self._background_powers):
            background[:, k] += table[:, :, j, i].sum(axis=1)

    def model(self, a: Any) -> Any:
        """U a: coefficients (B, n) to model tiles (B, T, h, w)."""
        kernels, background = self.unpack(a.astype(self.dtype))
        spectra = self.convolver.transform(kernels)
        h, w = self.tiling.tile
        out = self.xp.empty((len(a), self.tiling.count, h, w), dtype=self.dtype)
        for t in self.chunks(len(a)):
            out[:, t] = self._synthesise(spectra, background, t)[..., :h, :w]
        return out

    def background(self, a: Any) -> Any:
        """The background's part of the model: coefficients (B, n) to tiles (B, T, h, w)."""
        h, w = self.tiling.tile
        coefficients = a[:, self.n_spatial * self.n_kernel:].astype(self.dtype)
        out = self.xp.empty((len(a), self.tiling.count, h, w), dtype=self.dtype)
        for t in self.chunks(len(a)):
            out[:, t] = self._background_planes(coefficients, t)[..., :h, :w]
        return out

    def _sum_over_tiles(self, planes_of: Any, batch: int) -> Any:
        spectra = self.convolver.no_spectra(batch)
        background = self.xp.zeros((batch, self.n_background), dtype=self.dtype)
        for tiles in self.chunks(batch):
            self._analyse(planes_of(tiles), tiles, spectra, background)
        return self.pack(self.convolver.lags(spectra), background)

    def adjoint(self, planes: Any) -> Any:
        """U^T v: tiles (B, T, h, w) to coefficients (B, n)."""
        return self._sum_over_tiles(lambda tiles: self.padded(planes[:, tiles]), len(planes))

    def normal(self, a: Any, weights: Any) -> Any:
        """U^T W U a for coefficients (B, n) and `padded` weights (B, T, hf, wf), tile by tile within the cache."""
        kernels, background = self.unpack(a.astype(self.dtype))
        spectra = self.convolver.transform(kernels)

        def weighted(tiles: slice) -> Any:
            model = self._synthesise(spectra, background, tiles)
            model *= weights[:, tiles]
            return model

        return self._sum_over_tiles(weighted, len(a))
