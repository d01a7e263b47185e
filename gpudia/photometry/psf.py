"""The PSF that belongs to an epoch, moved to the places of stars."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from gpudia.backend import backend_of
from gpudia.errors import InputError
from gpudia.photometry.stamps import FloatArray, inner

__all__ = ["check_psf", "epoch_psf", "shift_spectra", "shifted_psf", "smooth_profile", "to_size"]

#: A stamp may lack wings; one whose sum is farther from 1 than this is in other units, as fluxes then were.
_OFF = 0.5


def epoch_psf(reference_psf: Any, kernel: Any) -> FloatArray:
    """PSF of the stars on an epoch, (PSF_R convolved with k) / sum(k).

    Parameters
    ----------
    reference_psf : (m, m) or (S, m, m)
        PSF of the reference, of sum 1, for all stars or at each of them.
    kernel : (K, K) or (S, K, K)
        Matching kernel, for all stars or at each of them.

    Returns
    -------
    (m', m') or (S, m', m') float64
        The stamp grows by the kernel's half width on each side, so that no light is cut off: m' = m + K - 1.

    Raises
    ------
    InputError
        A shape is wrong, or the sum of a kernel is not positive.
    """
    psf, k = check_psf(reference_psf), np.asarray(kernel, float)
    if k.ndim not in (2, 3) or k.shape[-1] != k.shape[-2] or k.shape[-1] % 2 == 0:
        raise InputError(f"kernel must be (K, K) or (S, K, K) with K odd, got shape {k.shape}")
    if psf.ndim == 3 and k.ndim == 3 and len(psf) != len(k):
        raise InputError(f"reference_psf and kernel must be for the same stars, got {len(psf)} and {len(k)}")
    scale = k.sum(axis=(-2, -1), keepdims=True)
    if not (scale > 0).all():
        raise InputError(f"kernel must have a positive sum, got {float(scale.min())}")
    size = psf.shape[-1] + k.shape[-1] - 1
    side = fft.next_fast_len(size, real=True)
    product = fft.rfft2(psf, (side, side)) * fft.rfft2(k / scale, (side, side))
    return fft.irfft2(product, (side, side))[..., :size, :size]


def shifted_psf(psf: FloatArray, offsets: FloatArray) -> FloatArray:
    """PSF stamps with the star moved from the centre by each offset (x, y), by Fourier shift: (S, m, m).

    Exact for a PSF that the pixels sample well (FWHM above 2 px). `psf` is (m, m) or (S, m, m), `offsets` (S, 2).
    """
    size = psf.shape[-1]
    side = fft.next_fast_len(size + 4, real=True)  # room, so that little of a wing comes back at the other edge
    return fft.irfft2(fft.rfft2(psf, (side, side)) * _phases(offsets, side), (side, side))[:, :size, :size]


def _phases(offsets: FloatArray, side: int) -> NDArray[np.complex128]:
    """Transforms (S, side, side // 2 + 1) of shifts by offsets (x, y)."""
    dx, dy = offsets.T[:, :, None, None]
    return np.exp(-2j * np.pi * dy * np.fft.fftfreq(side)[:, None]) * np.exp(-2j * np.pi * dx * np.fft.rfftfreq(side))


def shift_spectra(psf: FloatArray, offsets: FloatArray, size: int, side: int, dtype: Any) -> NDArray[Any]:
    """Transforms (S, side, side // 2 + 1) of PSF stamps moved to `offsets` (x, y) from the centre of stamps of `size`.

    Times the transform of a centred kernel, the first `size` rows and columns of the transform back are the convolved
    PSF on the stamp.
    """
    shift = size // 2 - psf.shape[-1] // 2
    kind = np.complex64 if dtype == np.float32 else complex
    return (fft.rfft2(psf, (side, side)) * _phases(offsets + shift, side)).astype(kind)


def smooth_profile(stamps: Any) -> Any:
    r"""Profiles of seven numbers each that come near to some PSFs, (S, m, m), on their backend.

    The sum of two elliptical Moffat profiles, of exponents 3 and 12, that fits a PSF best. The squares of both have the
    means and covariances S of the PSF's squares, in which the noise of its wings does not count:

    .. math:: (1 + d^T S^{-1} d / 4 (\beta - 1))^{-\beta}

    As weights they keep 99.9 % of the information in Gaussian PSFs and Moffat profiles of exponents 2 to 4.5 under even
    noise, and more than 99 % where the star itself makes the noise. 0 where a PSF has no width.
    """
    xp, dtype = backend_of(stamps).xp, stamps.dtype
    squares = stamps * stamps
    grid = xp.arange(int(stamps.shape[-1])).astype(dtype) - int(stamps.shape[-1]) // 2
    total = squares.sum(axis=(1, 2))
    total = xp.where(total > 0, total, 1.0).astype(dtype)
    along_x, along_y = squares.sum(axis=1), squares.sum(axis=2)
    # sums, not products of matrices: no star's digits depend on how many others there are
    x, y = (along_x * grid).sum(axis=1) / total, (along_y * grid).sum(axis=1) / total
    xx, yy = (along_x * grid**2).sum(axis=1) / total - x * x, (along_y * grid**2).sum(axis=1) / total - y * y
    xy = ((squares * grid).sum(axis=2) * grid).sum(axis=1) / total - x * y
    area = xx * yy - xy * xy
    wide = (area > 0) & (xx > 0)
    inverse = (1.0 / xp.where(wide, area, 1.0)).astype(dtype)
    dx, dy = grid - x[:, None], grid - y[:, None]
    q = (((inverse * yy)[:, None] * dx * dx)[:, None, :] + ((inverse * xx)[:, None] * dy * dy)[:, :, None]
         - (2 * (inverse * xy)[:, None] * dy)[:, :, None] * dx[:, None, :])
    q = xp.where(wide[:, None, None], q, xp.inf).astype(dtype)
    broad, steep = 1 / (1 + q / 8), 1 / (1 + q / 44)
    broad, steep = broad * broad * broad, steep * steep * steep
    steep = steep * steep
    steep = steep * steep
    aa, ab, bb, ap, bp = (inner(one, other) for one, other in (
        (broad, broad), (broad, steep), (steep, steep), (broad, stamps), (steep, stamps)))
    det = aa * bb - ab * ab
    size = xp.where(det > 0, 1 / xp.where(det > 0, det, 1.0), 0.0)
    share, rest = (((bb * ap - ab * bp) * size).astype(dtype), ((aa * bp - ab * ap) * size).astype(dtype))
    return share[:, None, None] * broad + rest[:, None, None] * steep


def to_size(stamps: FloatArray, size: int) -> FloatArray:
    """Stamps (..., m, m) cut, or padded with zeros, to the odd side `size` about their central pixel."""
    pad = (size - stamps.shape[-1]) // 2
    if pad >= 0:
        return np.pad(stamps, [*[(0, 0)] * (stamps.ndim - 2), (pad, pad), (pad, pad)])
    return stamps[..., -pad:pad, -pad:pad]


def check_psf(psf: Any) -> FloatArray:
    """Return PSF stamps (m, m) or (S, m, m) as float64, or raise `InputError`: odd, square, finite, of sum 1."""
    array = np.asarray(psf, dtype=float)
    if array.ndim not in (2, 3) or array.shape[-1] != array.shape[-2] or array.shape[-1] % 2 == 0:
        raise InputError(f"psf must be (m, m) or (S, m, m) with m odd, got shape {array.shape}")
    if not np.isfinite(array).all() or not (array.sum(axis=(-2, -1)) > 0).all():
        raise InputError(f"psf must be finite with a positive sum, got sum {array.sum():.3g}")
    total = array.sum(axis=(-2, -1)).ravel()
    if len(total) and not (np.abs(total - 1) <= _OFF).all():
        worst = total[np.argmax(np.abs(total - 1))]
        raise InputError(f"psf must have a sum of 1, not a peak of 1, to within {_OFF:g}, got {worst:.3g}")
    return array
