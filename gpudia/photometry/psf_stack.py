"""Correction of a PSF from what it leaves of its stars: averages over stars, or functions of their places."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpudia.photometry.psf_model import radius2
from gpudia.photometry.stamps import FloatArray

__all__ = ["alike", "stack_terms", "varies"]

#: Pixels of a star that are so many sigma off the others' are left out.
_CLIP = 3.0
#: Errors of a star's residual beside noise, in terms of the PSF at the pixel and of its peak: no single star has all
#: the say, and stars that something else disturbs are clipped.
_OF_PIXEL, _OF_PEAK = 0.01, 0.0005
#: Fewer stars than this show no variation; random permutations that it has to beat.
_LEAST_STARS, _PERMUTATIONS = 12, 199

#: A star whose residual is so many times that of the median star, and this in terms of its noise, is none.
_ODD, _LEAST_ODD = 4.0, 3.0
#: Median of the square of a normal deviate.
_NORMAL = 0.455


def stack_terms(centred: FloatArray, weights: FloatArray, basis: FloatArray,
                psf: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Fit residuals of stars by functions of their places, pixel by pixel, without outliers.

    Parameters
    ----------
    centred : (n, m, m)
        Residuals over fluxes, on the PSF's centre.
    weights : (n, m, m)
        1 / variance of these by their noise; 0 where there is nothing.
    basis : (n, T)
        Functions of the places: 1; 1, u, v.
    psf : (m, m)
        The PSF to correct.

    Returns
    -------
    terms, noise : (T, m, m), (m, m) float64
        Corrections of the terms, and 1 sigma of the first.
    """
    sigma = _sigma(weights, psf)
    seen, found = weights > 0, np.zeros((basis.shape[1], *psf.shape))
    keep = seen
    for _ in range(4):
        found = _regress(centred, np.where(keep, sigma**-2, 0.0), basis)
        deviation = (centred - np.tensordot(basis, found, axes=1)) / sigma
        # Neighbours too faint to be known add light, never take it: the level is that of the middle.
        spread = 1.4826 * np.median(np.where(seen, np.abs(deviation), 0.0), axis=0)
        keep = seen & (np.abs(deviation) < _CLIP * np.clip(spread, 0.5, 1.5))
    total = np.where(keep, sigma**-2, 0.0).sum(axis=0)
    return found, np.where(total > 0, 1 / np.sqrt(np.where(total > 0, total, 1.0)), np.abs(psf).max())


def _sigma(weights: FloatArray, psf: FloatArray) -> FloatArray:
    own = _OF_PIXEL * np.abs(psf) + _OF_PEAK * psf.max()
    return np.sqrt(1 / np.where(weights > 0, weights, 1.0) + own**2)


def _regress(values: FloatArray, weights: FloatArray, basis: FloatArray) -> FloatArray:
    """Weighted least squares for every pixel, (T, m, m); 0 where the stars there are too few."""
    weighted = weights[:, None] * basis[:, :, None, None]
    normal = np.einsum("sayx,sb->yxab", weighted, basis)
    right = np.einsum("sayx,syx->yxa", weighted, values)
    size = np.trace(normal, axis1=-2, axis2=-1)[..., None, None]
    n = basis.shape[1]
    enough = (weights > 0).sum(axis=0) >= n
    safe = np.where(size > 0, normal / np.where(size > 0, size, 1.0), 0.0) + 1e-6 * np.eye(n)
    found = np.linalg.solve(safe, (right / np.where(size[..., 0] > 0, size[..., 0], 1.0))[..., None])[..., 0]
    return np.moveaxis(np.where(enough[..., None], found, 0.0), -1, 0)


def alike(centred: FloatArray, weights: FloatArray, psf: FloatArray, fwhm: float, least: int) -> NDArray[np.bool_]:
    """Which stars look like the others (n,): not galaxies, blends, artefacts; the `least` best ones in any case."""
    core = radius2(psf.shape[0]) <= (1.5 * fwhm) ** 2
    off = np.where(weights > 0, centred / _sigma(weights, psf), 0.0)[:, core]
    misfit = (off**2).mean(axis=1)
    return (misfit <= np.sort(misfit)[min(least, len(misfit)) - 1]) | (
        misfit < max(_ODD * np.median(misfit), _LEAST_ODD))


def varies(centred: FloatArray, weights: FloatArray, basis: FloatArray, psf: FloatArray, fwhm: float) -> bool:
    """Whether stars show that the PSF depends on the place: more than by chance, in 199 permutations of the places.

    Parameters as of `stack_terms`, `basis` with three terms. What counts are width and ellipticity, within
    1.5 FWHM, of all stars or of the brighter half. Never with fewer than 12 stars. Every call takes the same
    permutations.
    """
    n = len(centred)
    grid = np.arange(psf.shape[0]) - psf.shape[0] // 2
    x, y, r2 = grid / fwhm, grid[:, None] / fwhm, radius2(psf.shape[0]) / fwhm**2
    core = np.where(r2 <= 1.5**2, psf, 0.0)
    width = (core * r2).sum() / core.sum()
    modes = np.stack([(r2 - width) * core, (x**2 - y**2) * core, x * y * core])
    weight = _sigma(weights, psf) ** -2 * (weights > 0)
    information = np.maximum(np.einsum("syx,ayx->sa", weight, modes**2), 1e-300)
    shape = np.einsum("syx,ayx->sa", weight * centred, modes) / information
    bright = np.argsort(-information[:, 0])[: n // 2]
    return any(_depends(shape[some], 1 / information[some], basis[some]) for some in (np.arange(n), bright))


def _depends(shape: FloatArray, noise2: FloatArray, basis: FloatArray) -> bool:
    """Whether shapes (n, modes) with variances follow the places more than in every permutation of these."""
    if len(shape) < _LEAST_STARS:
        return False
    deviation = shape - np.median(shape, axis=0)
    size = 1 / np.sqrt(noise2 + _scatter2(deviation, noise2))
    off = np.clip(deviation * size, -_CLIP, _CLIP)
    rng = np.random.default_rng(0)
    gain = _gain(off, size, basis)
    return all(gain > _gain(off, size, basis[rng.permutation(len(off))]) for _ in range(_PERMUTATIONS))


def _scatter2(deviation: FloatArray, noise2: FloatArray) -> FloatArray:
    """Variance of (n, modes) beside the noise (unknown neighbours, and what is looked for): no star has all the say.

    The least with which the median of squares is that of a normal distribution.
    """
    scatter = np.concatenate([[0.0], np.geomspace(1e-4, 1e2, 61)])[:, None] * np.median(noise2, axis=0)
    middle = np.median(deviation**2 / (noise2 + scatter[:, None]), axis=1)
    return scatter[np.argmax(middle <= _NORMAL, axis=0), np.arange(deviation.shape[1])]


def _gain(off: FloatArray, size: FloatArray, basis: FloatArray) -> float:
    """Sum of squares of deviations (n, modes) over their scatter 1 / size that the places explain beyond the mean."""
    gain = 0.0
    for values, root in zip(off.T, size.T, strict=True):
        q: NDArray[np.float64] = np.linalg.qr((root / root.max())[:, None] * basis)[0]
        gain += float(((q[:, 1:].T @ values) ** 2).sum())
    return gain
