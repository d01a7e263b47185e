"""Stars whose images overlap, and that both vary: their fluxes from one fit, made of the fluxes of each alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from gpudia.photometry.psf import shifted_psf
from gpudia.photometry.stamps import FloatArray, Stamps

__all__ = ["close_pairs", "overlaps", "separate"]

Pairs = NDArray[np.int64]


def close_pairs(positions: FloatArray, least: float, most: float) -> Pairs:
    """Pairs (P, 2) of stars at a distance of `least` to `most` pixels; nearer ones are not to be told apart."""
    known = np.flatnonzero(np.isfinite(positions).all(axis=1))
    pairs = cKDTree(positions[known]).query_pairs(most, output_type="ndarray") if len(known) else np.empty((0, 2), int)
    pairs = known[pairs].reshape(-1, 2)
    distance = np.hypot(*(positions[pairs[:, 0]] - positions[pairs[:, 1]]).T)
    return np.asarray(np.unique(pairs[distance >= least], axis=0), np.int64).reshape(-1, 2)


def overlaps(psf: FloatArray, positions: FloatArray, pairs: Pairs, variance: Any, size: int) -> FloatArray:
    r"""How much of a unit flux of each star of a pair the PSF flux of the other one sees.

    .. math:: A_{ij} = \phi_i^T W \phi_j / \phi_i^T W \phi_i

    Parameters
    ----------
    psf : (P, m, m)
        PSF of the epoch at each pair, centred.
    positions : (S, 2)
    pairs : (P, 2)
    variance : (P, 2, size, size)
        Of the difference, on the stamps of both stars; not finite or not positive = ignore.
    size : int
        Side of the stamps, odd.

    Returns
    -------
    (P, 2) float64
        A_ij and A_ji; 0 where nothing is seen.
    """
    good = np.isfinite(variance) & (variance > 0)
    weights = np.where(good, 1 / np.where(good, variance, 1.0), 0.0)
    grown = np.pad(psf, [(0, 0), *[(max(0, size - psf.shape[-1]) // 2 + size // 2,) * 2] * 2])
    found = np.zeros((len(pairs), 2))
    for side in (0, 1):
        own, other = positions[pairs[:, side]], positions[pairs[:, 1 - side]]
        centres = Stamps(own, size).centres
        mine, theirs = (_cut(shifted_psf(grown, where - centres), size) for where in (own, other))
        norm = (weights[:, side] * mine * mine).sum(axis=(1, 2))
        found[:, side] = (weights[:, side] * mine * theirs).sum(axis=(1, 2)) / np.where(norm > 0, norm, np.inf)
    return found


def _cut(stamps: FloatArray, size: int) -> FloatArray:
    edge = (stamps.shape[-1] - size) // 2
    return stamps[:, edge:edge + size, edge:edge + size]


def separate(flux: FloatArray, error: FloatArray, pairs: Pairs, seen: FloatArray) -> tuple[FloatArray, FloatArray]:
    r"""Fluxes of overlapping stars from one fit to all of them.

    The PSF flux of each alone is :math:`\hat f = A f`; so :math:`f = A^{-1} \hat f`, which is what a simultaneous fit
    gives. Its covariance is :math:`A^{-1} C A^{-T}` with :math:`C_{ij} = \sqrt{A_{ij} A_{ji}} \sigma_i \sigma_j`: that
    of the single fluxes, as they share pixels.

    Parameters
    ----------
    flux, error : (E, S)
        PSF fluxes of each star alone, one sigma.
    pairs : (P, 2)
    seen : (E, P, 2)
        A_ij and A_ji in each epoch, from `overlaps`.

    Returns
    -------
    flux, error : (E, S)
        Stars that are in no pair as they were; NaN where one of a group of stars was not measured.
    """
    flux, error = np.array(flux, float), np.array(error, float)
    if not len(pairs):
        return flux, error
    n = flux.shape[1]
    links = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    groups = connected_components(links, directed=False)[1]
    for group in np.unique(groups[pairs[:, 0]]):
        stars = np.flatnonzero(groups == group)
        row = {int(star): k for k, star in enumerate(stars)}
        matrix = np.tile(np.eye(len(stars)), (len(flux), 1, 1))
        common = matrix.copy()
        for p in np.flatnonzero(groups[pairs[:, 0]] == group):
            i, j = (row[int(star)] for star in pairs[p])
            matrix[:, i, j], matrix[:, j, i] = seen[:, p, 0], seen[:, p, 1]
            common[:, i, j] = common[:, j, i] = np.sqrt(np.maximum(seen[:, p, 0] * seen[:, p, 1], 0.0))
        inverse = np.linalg.inv(matrix)
        sigma = error[:, stars]
        covariance = common * sigma[:, :, None] * sigma[:, None, :]
        flux[:, stars] = np.einsum("eij,ej->ei", inverse, flux[:, stars])
        error[:, stars] = np.sqrt(np.einsum("eij,ejk,eik->ei", inverse, covariance, inverse))
    return flux, error
