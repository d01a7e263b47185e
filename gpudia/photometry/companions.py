"""Stars that a list lacks, from what a model of the others leaves around them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.spatial import cKDTree

from gpudia.photometry.stamps import FloatArray, Stamps

__all__ = ["find_companions"]

#: What is left is a star from so many sigma, and from this share of the star's light beside it, on.
_COMPANION, _LEAST = 5.0, 0.003
#: Share of a star's light that its model may have wrong, and the least distance from a known star, in FWHM.
_WRONG, _APART = 0.02, 0.6
#: Stars of one block.
_BLOCK = 500


def find_companions(residual: FloatArray, weights: FloatArray, psf: FloatArray, stars: FloatArray, fluxes: FloatArray,
                    known: FloatArray, fwhm: float,
                    background: FloatArray | float = 0.0) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Find stars on the stamps around some stars: peaks of the residual after a matched filter, above 5 sigma.

    Parameters
    ----------
    residual, weights : (H, W)
        Frame without the model, ADU; 1 / variance, 0 on pixels to ignore.
    psf : (m, m)
        Of sum 1.
    stars, fluxes : (n, 2), (n,)
        Around which is searched, up to m // 2 pixels off along each axis.
    known : (k, 2)
        Within 0.6 FWHM of these nothing is found: there the PSF may be wrong.
    fwhm : float
        Pixels.
    background : (n,) or float
        To be taken off the residual around each star.

    Returns
    -------
    places, fluxes, snr : (f, 2), (f,), (f,)
        The most significant first.
    """
    level = np.broadcast_to(np.asarray(background, float), len(stars))
    blocks = [slice(i, i + _BLOCK) for i in range(0, len(stars), _BLOCK)]
    parts = [_peaks(residual, weights, psf, stars[b], fluxes[b], level[b]) for b in blocks]
    if not parts:
        return np.empty((0, 2)), np.empty(0), np.empty(0)
    places, flux, height = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(-height, kind="stable")
    places, flux, height = places[order], flux[order], height[order]
    keep = np.ones(len(places), bool)
    if len(places):
        keep = cKDTree(known).query(places)[0] > _APART * fwhm
        for i, j in sorted(cKDTree(places).query_pairs(_APART * fwhm)):
            keep[j] &= not keep[i]
    return places[keep], flux[keep], height[keep]


def _peaks(residual: FloatArray, weights: FloatArray, psf: FloatArray, stars: FloatArray, fluxes: FloatArray,
           level: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    own, reach = Stamps(stars, psf.shape[0]), psf.shape[0] // 2
    w = own.gather(weights, reach)
    left = np.where(w > 0, own.gather(residual, reach) - level[:, None, None], 0.0)
    flux, information = _matched(left * w, psf), _matched(w, psf**2)
    information = np.maximum(information, 1e-300)
    flux = flux / information
    # Where the star itself is bright its model may be wrong by a share of it.
    light = np.maximum(fluxes, 0.0)[:, None, None]
    sigma = np.hypot(information**-0.5, _WRONG * light * psf * psf.max() / (psf**2).sum())
    seen = information > 0.5 * np.median(information, axis=(1, 2), keepdims=True)
    height = np.where(seen & (flux > _LEAST * light), flux / sigma, 0.0)
    star, y, x = np.nonzero(_is_peak(height) & (height > _COMPANION))
    top = flux[star, y, x]
    # The middle of the parabola through three pixels, along each axis.
    off = [0.5 * (low - high) / np.minimum(low + high - 2 * top, -1e-9 * top) for low, high in (
        (flux[star, y, x - 1], flux[star, y, x + 1]), (flux[star, y - 1, x], flux[star, y + 1, x]))]
    places = own.centres[star] + np.column_stack([x, y]) - reach + np.clip(np.column_stack(off), -0.5, 0.5)
    return places, top, height[star, y, x]


def _is_peak(height: FloatArray) -> NDArray[np.bool_]:
    """Pixels of (S, m, m) above their eight neighbours; none at an edge."""
    n, m = height.shape[1:]
    shifts = [(j, i) for j in (-1, 0, 1) for i in (-1, 0, 1) if (j, i) != (0, 0)]
    around: Any = np.stack([height[:, 1 + j:n - 1 + j, 1 + i:m - 1 + i] for j, i in shifts]).max(axis=0)
    peaks = np.zeros(height.shape, bool)
    peaks[:, 1:-1, 1:-1] = height[:, 1:-1, 1:-1] > around
    return peaks


def _matched(stamps: FloatArray, psf: FloatArray) -> FloatArray:
    """Correlation of stamps (S, M, M) with a PSF (m, m) at the M - m + 1 places where it lies on them."""
    size, small = stamps.shape[-1], psf.shape[0]
    side = fft.next_fast_len(size, real=True)
    product = fft.rfft2(stamps, (side, side)) * np.conj(fft.rfft2(psf, (side, side)))
    return fft.irfft2(product, (side, side))[:, : size - small + 1, : size - small + 1]
