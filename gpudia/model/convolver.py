"""Convolution of one fixed image with many small kernels that vary over it, and its adjoint, tile by tile.

The image's transforms are taken once. A K x K kernel's transform, and the K x K lags of a correlation, are taken with
dense K-column Fourier matrices (two small matrix products) instead of padded FFTs: for K about 20 and tiles about
250 px that is some ten times cheaper, and leaves one FFT for each product with a plane.

A kernel that varies as a polynomial costs no more FFTs than a constant one: with x^i = sum_m C(i, m) u^(i-m) (x-u)^m

    x^i (R (x) k)(x) = sum_m (x^m R (x) C(i, m) u^(i-m) k)(x)

so the terms can be added as spectra, of the references x^m R with kernels multiplied by polynomials of u, before the
one transform back; the adjoint multiplies one spectrum with those of all x^m R. (Measured at 512 px, K = 21: degree 1
in a third, degree 2 in a fifth of the FFTs that multiplying planes needs.)
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np

from gpudia.backend import backend_of, to_device
from gpudia.model.polynomials import exponents, scaled
from gpudia.model.tiles import Tiling

__all__ = ["TileConvolver"]


def _shifts(degree: int, kernel_size: int, shape: tuple[int, int]) -> np.ndarray:
    """Polynomials of the shift that turn x^i y^j into those of the shifted place, (m, p, K, K); see the module."""
    h = kernel_size // 2
    # a shift in scaled coordinates: they are linear
    uy, ux = (np.arange(-h, h + 1) * (scaled(1.0, length) - scaled(0.0, length)) for length in shape)
    powers = exponents(degree)
    out = np.zeros((len(powers), len(powers), kernel_size, kernel_size))
    for m, (im, jm) in enumerate(powers):
        for p, (ip, jp) in enumerate(powers):
            if im <= ip and jm <= jp:
                out[m, p] = math.comb(ip, im) * math.comb(jp, jm) * np.outer(uy**(jp - jm), ux**(ip - im))
    return out


class TileConvolver:
    """Products of one image with stacks of kernels.

    Parameters
    ----------
    image : array (H, W), float32 or float64
        The image; must be finite. All is done in its precision.
    tiling : Tiling
        Its tiles.
    degree : int
        Total degree of the polynomial of place as which kernels vary; they have P = count_terms(degree) terms.

    Notes
    -----
    With h = K//2 and u = (uy, ux) running over -h .. h, `convolve` gives sum_p p_p(x) sum_u k_p[u + h] image(x - u), a
    true convolution: ``kernel[h, h]`` multiplies the pixel itself.

    Planes here have the shape (hf, wf) of the transforms: the tile's (h, w) valid pixels come first, what lies beyond
    is not defined after `convolve` and must be zero before `correlate`. So no product copies a plane to pad or cut it.
    """

    def __init__(self, image: Any, tiling: Tiling, degree: int = 0) -> None:
        self.backend = backend_of(image)
        xp = self.backend.xp
        self.tiling = tiling
        self._powers = exponents(degree)
        self._y, self._x = y, x = tuple(to_device(scaled(np.arange(n), n), self.backend, image.dtype)
                                        for n in image.shape)
        self.spectra = xp.stack([self.backend.rfft2(tiling.split_with_margin(image * y[:, None]**j * x**i),
                                                    tiling.fft_shape) for i, j in self._powers])
        self._mixing = to_device(_shifts(degree, tiling.kernel_size, tiling.shape), self.backend, image.dtype)
        (height, width), K = tiling.fft_shape, tiling.kernel_size
        half = width // 2 + 1
        # Kernel pixel i sits at shift i - (K - 1): the valid pixels of the cyclic convolution then start at index 0.
        shift = np.arange(K) - (K - 1)
        rows = np.exp(-2j * np.pi * np.outer(np.arange(height), shift) / height)
        columns = np.exp(-2j * np.pi * np.outer(shift, np.arange(half)) / width)
        weight = np.full(half, 2.0)  # the half spectrum stands for its conjugate half too, but for the ends
        weight[0] = 1.0
        if width % 2 == 0:
            weight[-1] = 1.0
        back = (np.conj(columns) * weight / (height * width)).T
        kind = self.spectra.dtype
        self._rows = to_device(rows, self.backend, kind)
        self._columns = to_device(columns, self.backend, kind)
        self._rows_back = to_device(rows.T, self.backend, kind)
        # Re(a b) as two real products
        self._back_real = to_device(back.real, self.backend, image.dtype)
        self._back_imag = to_device(back.imag, self.backend, image.dtype)

    def single(self) -> TileConvolver:
        """Return the same in single precision (complex64 spectra, float32 planes)."""
        xp = self.backend.xp
        other = copy.copy(self)
        for name in ("spectra", "_rows", "_columns", "_rows_back"):
            setattr(other, name, getattr(self, name).astype(xp.complex64))
        for name in ("_mixing", "_back_real", "_back_imag", "_y", "_x"):
            setattr(other, name, getattr(self, name).astype(xp.float32))
        return other

    @property
    def n_terms(self) -> int:
        """Return the number P of polynomial terms."""
        return len(self._powers)

    def no_spectra(self, batch: int) -> Any:
        """Zeros (B, P, hf, wf // 2 + 1) for `correlate` to add to."""
        height, width = self.tiling.fft_shape
        return self.backend.xp.zeros((batch, self.n_terms, height, width // 2 + 1), dtype=self.spectra.dtype)

    def transform(self, kernels: Any) -> Any:
        """Transform kernels (B, P, K, K) to half spectra (B, P, hf, wf // 2 + 1) for `convolve`."""
        kernels = kernels.astype(self._mixing.dtype)
        if len(self._mixing) > 1:
            kernels = (self._mixing * kernels[:, None]).sum(axis=2)
        return self._rows @ (kernels @ self._columns)

    def convolve(self, kernel_spectra: Any, tiles: slice = slice(None)) -> Any:
        """Convolve the image with kernels given by `transform`: planes (B, t, hf, wf)."""
        total = self.spectra[0, tiles] * kernel_spectra[:, 0, None]
        for p in range(1, len(self.spectra)):
            total += self.spectra[p, tiles] * kernel_spectra[:, p, None]
        return self.backend.irfft2(total, self.tiling.fft_shape)

    def correlate(self, planes: Any, tiles: slice, total: Any) -> None:
        """First half of the adjoint: add the products with planes (B, t, hf, wf) to spectra `total` (B, P, hf, wh)."""
        spectra = self.backend.rfft2(planes, self.tiling.fft_shape)
        self.backend.xp.conj(spectra, out=spectra)
        for p in range(len(self.spectra)):
            part = spectra * self.spectra[p, tiles]
            total[:, p] += part[:, 0] if part.shape[1] == 1 else part.sum(axis=1)

    def lags(self, spectra: Any) -> Any:
        """Second half of the adjoint: `total` of `correlate` to lags (B, P, K, K), sum_x p_p(x) v(x) image(x - u)."""
        inner = self._rows_back @ spectra
        lags = inner.real @ self._back_real + inner.imag @ self._back_imag
        return lags if len(self._mixing) == 1 else (self._mixing * lags[:, :, None]).sum(axis=1)

    def spread(self, kernel_spectra: Any, planes: Any, tiles: slice, frames: Any) -> None:
        """Adjoint of `convolve` as a function of the image: add what planes (B, t, hf, wf) give to frames (B, H, W).

        That is sum_p sum_x v(x) p_p(x) k_p[x - y + h] at the image's pixel y.
        """
        height, width = (n + self.tiling.kernel_size - 1 for n in self.tiling.tile)
        origins = list(self.tiling.origins())[tiles]
        spectra = self.backend.rfft2(planes, self.tiling.fft_shape)
        for p, (i, j) in enumerate(self._powers):
            parts = self.backend.irfft2(self.backend.xp.conj(kernel_spectra[:, p, None]) * spectra,
                                        self.tiling.fft_shape)
            for t, (y, x) in enumerate(origins):
                rows, columns = slice(y, y + height), slice(x, x + width)
                place = frames[:, rows, columns]
                part = parts[:, t, :place.shape[1], :place.shape[2]]
                place += part * (self._y[rows, None] ** j * self._x[columns] ** i)
