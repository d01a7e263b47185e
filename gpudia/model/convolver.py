"""Convolution of one fixed image with many small kernels, and its adjoint, tile by tile.

The image's transform is taken once. A K x K kernel's transform, and the K x K lags of a correlation, are taken with
dense K-column Fourier matrices (two small matrix products) instead of padded FFTs: for K about 20 and tiles about
250 px that is some ten times cheaper, and leaves one FFT for each product with a plane.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from gpudia.backend import backend_of, to_device
from gpudia.model.tiles import Tiling

__all__ = ["TileConvolver"]


class TileConvolver:
    """Products of one image with stacks of kernels.

    Parameters
    ----------
    image : array (H, W), float
        The image; must be finite.
    tiling : Tiling
        Its tiles.
    adjoint : bool
        Whether `correlate` will be wanted.

    Notes
    -----
    With h = K//2 and u = (uy, ux) running over -h .. h, `convolve` gives sum_u k[u + h] image(x - u), a true
    convolution: ``kernel[h, h]`` multiplies the pixel itself.

    Planes here have the shape (hf, wf) of the transforms: the tile's (h, w) valid pixels come first, what lies beyond
    is not defined after `convolve` and must be zero before `correlate`. So no product copies a plane to pad or cut it.
    """

    def __init__(self, image: Any, tiling: Tiling, adjoint: bool = False) -> None:
        self.backend = backend_of(image)
        self.tiling = tiling
        self.spectrum = self.backend.rfft2(tiling.split_with_margin(image), tiling.fft_shape)
        self._conjugate = self.backend.xp.conj(self.spectrum) if adjoint else None
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
        self._rows = to_device(rows, self.backend)
        self._columns = to_device(columns, self.backend)
        self._rows_back = to_device(np.conj(rows).T, self.backend)
        # Re(a b) as two real products
        self._back_real = to_device(back.real, self.backend)
        self._back_imag = to_device(back.imag, self.backend)

    def single(self) -> TileConvolver:
        """Return the same in single precision (complex64 spectra, float32 planes)."""
        xp = self.backend.xp
        other = copy.copy(self)
        for name in ("spectrum", "_conjugate", "_rows", "_columns", "_rows_back"):
            value = getattr(self, name)
            setattr(other, name, None if value is None else value.astype(xp.complex64))
        for name in ("_back_real", "_back_imag"):
            setattr(other, name, getattr(self, name).astype(xp.float32))
        return other

    def transform(self, kernels: Any) -> Any:
        """Transform kernels (..., K, K) to half spectra (..., hf, wf // 2 + 1)."""
        return self._rows @ (kernels @ self._columns)

    def convolve(self, kernel_spectra: Any, tiles: slice = slice(None)) -> Any:
        """Convolve the image with kernels given by `transform` (B, hf, wh): planes (B, t, hf, wf)."""
        return self.backend.irfft2(self.spectrum[None, tiles] * kernel_spectra[:, None], self.tiling.fft_shape)

    def correlate(self, planes: Any, tiles: slice = slice(None)) -> Any:
        """First half of the adjoint: planes (B, t, hf, wf) to spectra (B, hf, wh), summed over the tiles."""
        spectra = self.backend.rfft2(planes, self.tiling.fft_shape)
        spectra *= self._conjugate[None, tiles]
        return spectra[:, 0] if spectra.shape[1] == 1 else spectra.sum(axis=1)

    def lags(self, spectra: Any) -> Any:
        """Second half of the adjoint: spectra (..., hf, wh) to lags (..., K, K), sum_x v(x) image(x - u)."""
        inner = self._rows_back @ spectra
        return inner.real @ self._back_real - inner.imag @ self._back_imag
