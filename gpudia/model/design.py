"""The design matrix U of the model as an operator: applied, never stored.

    (U a)(x) = sum_p p_p(x) (R (x) k_p)(x) + sum_q b_q p_q(x)

Coefficients a are ordered: for each kernel polynomial p the pixels of the support, row-major; then the background.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from gpudia.backend import backend_of, to_device
from gpudia.model.convolver import TileConvolver
from gpudia.model.polynomials import count_terms, exponents, scaled
from gpudia.model.tiles import Tiling

__all__ = ["Design"]

#: Polynomial planes below this size are kept, larger ones evaluated tile by tile each time.
_KEEP_TERMS_BYTES = 64 << 20


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
    """

    def __init__(self, reference: Any, tiling: Tiling, support: np.ndarray, spatial_degree: int,
                 background_degree: int) -> None:
        self.backend = backend_of(reference)
        self.xp = self.backend.xp
        self.tiling = tiling
        self.support = support
        self.reference = reference
        self.convolver = TileConvolver(reference, tiling)
        self.n_kernel = int(support.sum())
        self.n_spatial = count_terms(spatial_degree)
        self.n_background = count_terms(background_degree)
        self.n_parameters = self.n_spatial * self.n_kernel + self.n_background
        self._index = None
        if not support.all():
            self._index = to_device(np.flatnonzero(support), self.backend)
        self._make_terms(max(spatial_degree, background_degree))

    def _make_terms(self, degree: int) -> None:
        (rows, columns), (h, w), m = self.tiling.grid, self.tiling.tile, self.tiling.margin
        height, width = self.tiling.shape
        y = scaled(np.arange(rows * h) + m, height).reshape(rows, 1, h, 1).repeat(columns, axis=1)
        x = scaled(np.arange(columns * w) + m, width).reshape(1, columns, 1, w).repeat(rows, axis=0)
        powers = exponents(degree)
        self._y = to_device(np.stack([y**j for _, j in powers]).reshape(len(powers), -1, h, 1), self.backend)
        self._x = to_device(np.stack([x**i for i, _ in powers]).reshape(len(powers), -1, 1, w), self.backend)
        size = len(powers) * self.tiling.count * h * w * 8
        self._terms = self._y * self._x if size <= _KEEP_TERMS_BYTES else None

    def terms(self, tiles: slice) -> Any:
        """Values of all polynomial terms on some tiles, (max(P_k, P_b), t, h, w)."""
        return self._terms[:, tiles] if self._terms is not None else self._y[:, tiles] * self._x[:, tiles]

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

    def _synthesise(self, spectra: Any, background: Any, terms: Any, tiles: slice) -> Any:
        model = self.convolver.convolve(spectra[:, 0], tiles)
        for p in range(1, self.n_spatial):
            model = model + terms[p] * self.convolver.convolve(spectra[:, p], tiles)
        flat = terms[:self.n_background].reshape(self.n_background, -1)
        return model + (background @ flat).reshape(model.shape)

    def _analyse(self, planes: Any, terms: Any, tiles: slice) -> tuple[Any, Any]:
        spectra = [self.convolver.correlate(planes if p == 0 else terms[p] * planes, tiles)
                   for p in range(self.n_spatial)]
        flat = terms[:self.n_background].reshape(self.n_background, -1)
        return self.xp.stack(spectra, axis=1), planes.reshape(len(planes), -1) @ flat.T

    def model(self, a: Any) -> Any:
        """U a: coefficients (B, n) to model tiles (B, T, h, w)."""
        kernels, background = self.unpack(a)
        spectra = self.convolver.transform(kernels)
        parts = [self._synthesise(spectra, background, self.terms(t), t) for t in self.chunks(len(a))]
        return parts[0] if len(parts) == 1 else self.xp.concatenate(parts, axis=1)

    def _sum_over_tiles(self, planes_of: Any, batch: int) -> Any:
        spectra = background = None
        for tiles in self.chunks(batch):
            terms = self.terms(tiles)
            s, b = self._analyse(planes_of(terms, tiles), terms, tiles)
            spectra, background = (s, b) if spectra is None else (spectra + s, background + b)
        return self.pack(self.convolver.lags(spectra), background)

    def adjoint(self, planes: Any) -> Any:
        """U^T v: tiles (B, T, h, w) to coefficients (B, n)."""
        return self._sum_over_tiles(lambda _, tiles: planes[:, tiles], len(planes))

    def normal(self, a: Any, weights: Any) -> Any:
        """U^T W U a for coefficients (B, n) and weights (B, T, h, w), one tile after another within the cache."""
        kernels, background = self.unpack(a)
        spectra = self.convolver.transform(kernels)

        def weighted(terms: Any, tiles: slice) -> Any:
            return weights[:, tiles] * self._synthesise(spectra, background, terms, tiles)

        return self._sum_over_tiles(weighted, len(a))
