"""PSF photometry of a difference image at given positions, and the PSF that belongs to an epoch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from gpudia.errors import InputError
from gpudia.photometry.inputs import as_positions, check_fraction, check_plane
from gpudia.photometry.linear import EpochNoise, measure_in_blocks, measure_linear
from gpudia.photometry.stamps import FloatArray, ForcedFluxes, Stamps, footprint

__all__ = ["check_psf", "epoch_psf", "psf_photometry", "shifted_psf"]

#: A masked pixel raises a flag where the PSF has this share of its peak or more (squared, as it counts in the flux).
_FAINT = 0.01**2


def psf_photometry(difference: NDArray[Any], variance: NDArray[Any], mask: NDArray[Any] | None, positions: Any,
                   psf: Any, noise: EpochNoise | None = None, *, max_masked_fraction: float = 0.2) -> ForcedFluxes:
    r"""Measure PSF fluxes on a difference image at fixed positions (forced photometry).

    .. math:: f = \sum w \phi D / \sum w \phi^2, \qquad w = 1 / variance

    with phi the PSF at the star's place within the pixel. Masked pixels have w = 0, which leaves the flux unbiased.
    The error is that of `linear_flux_variance` with a = w phi / sum(w phi^2).

    Parameters
    ----------
    difference, variance : (H, W)
        Difference image, ADU, and its variance, ADU^2 (image and reference together): the weights. Take the variance
        of a model: one made from the noisy pixels themselves biases the flux.
    mask : (H, W) bool or bits of `gpudia.flags.PIXEL_FLAGS`, optional
        True or any bit but "clipped" = ignore. Pixels without a finite difference and a positive variance are
        ignored as well.
    positions : (S, 2)
        Stars (x, y), 0-based pixel centres.
    psf : (m, m) or (S, m, m)
        PSF of the epoch, for all stars or at each of them: odd-sized, centred, of sum 1 (see `epoch_psf`).
    noise : EpochNoise, optional
        What the error is made of. Without it the pixels count as uncorrelated, with `variance`.
    max_masked_fraction : float
        Share of the star's weight, sum of phi^2, that may be masked; above it the flux is NaN.

    Returns
    -------
    ForcedFluxes
        ``masked_pixels`` and the like are raised by pixels where the PSF has 1 % of its peak or more.

    Raises
    ------
    InputError
        Shapes do not agree, or `max_masked_fraction` is not in 0 to 1 (1 excluded).
    """
    difference = check_plane("difference", difference)
    variance = check_plane("variance", variance, difference.shape)
    mask = None if mask is None else check_plane("mask", mask, difference.shape)
    check_fraction(max_masked_fraction)
    if noise is not None:
        check_plane("noise.image_variance", noise.image_variance, difference.shape)
    where, psf = as_positions(positions), check_psf(psf)
    if psf.ndim == 3 and len(psf) != len(where):
        raise InputError(f"psf must be one for all stars or one for each of {len(where)}, got {len(psf)}")

    def measure(stars: slice, noise: EpochNoise) -> ForcedFluxes:
        stamps = Stamps(where[stars], psf.shape[-1])
        phi = shifted_psf(psf if psf.ndim == 2 else psf[stars], stamps.offsets)
        under = footprint(difference, variance, mask, stamps, phi**2, _FAINT)
        weights = _psf_weights(phi, stamps.gather(variance), under.ignore)
        return measure_linear(difference, weights, stamps, noise, under, max_masked_fraction)

    return measure_in_blocks(len(where), psf.shape[-1], EpochNoise(variance) if noise is None else noise, measure)


def _psf_weights(phi: FloatArray, variance: NDArray[Any], ignore: NDArray[np.bool_]) -> FloatArray:
    """Weights a = w phi / sum(w phi^2), (S, m, m); 0 for a star that is masked altogether."""
    unused = ignore | (phi == 0)
    weighted = np.where(unused, 0.0, phi) / np.where(unused, 1.0, variance)
    norm = np.einsum("sij,sij->s", weighted, phi)
    return weighted / np.where(norm > 0, norm, 1.0)[:, None, None]


def epoch_psf(reference_psf: Any, kernel: Any) -> FloatArray:
    """PSF of the stars on an epoch, (PSF_R convolved with k) / sum(k).

    Parameters
    ----------
    reference_psf : (m, m)
        PSF of the reference, of sum 1.
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
    if psf.ndim != 2 or k.ndim not in (2, 3) or k.shape[-1] != k.shape[-2] or k.shape[-1] % 2 == 0:
        raise InputError(f"reference_psf and kernel must be (m, m) and (K, K) or (S, K, K) with K odd, "
                         f"got {psf.shape} and {k.shape}")
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
    dx, dy = offsets[:, 0, None, None], offsets[:, 1, None, None]
    phase = dy * np.fft.fftfreq(side)[:, None] + dx * np.fft.rfftfreq(side)
    moved = fft.irfft2(fft.rfft2(psf, (side, side)) * np.exp(-2j * np.pi * phase), (side, side))
    return moved[:, :size, :size]


def check_psf(psf: Any) -> FloatArray:
    """Return PSF stamps (m, m) or (S, m, m) as float64, or raise `InputError`: odd, square, finite, positive sum."""
    array = np.asarray(psf, dtype=float)
    if array.ndim not in (2, 3) or array.shape[-1] != array.shape[-2] or array.shape[-1] % 2 == 0:
        raise InputError(f"psf must be (m, m) or (S, m, m) with m odd, got shape {array.shape}")
    if not np.isfinite(array).all() or not (array.sum(axis=(-2, -1)) > 0).all():
        raise InputError(f"psf must be finite with a positive sum, got sum {array.sum():.3g}")
    return array
