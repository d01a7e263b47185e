"""What the model of a series leaves at its bright stars beyond the noise: a share of a star's flux."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpudia.photometry.excess import excess_scatter
from gpudia.photometry.stamps import FloatArray

__all__ = ["model_error"]

#: Bright stars of an epoch that are looked at, and their least signal to noise; fewer than four tell nothing.
_MOST, _FEWEST, _SNR = 20, 4, 50.0
#: Median of |x| for a standard normal x, the scatter of such a median of one value, and the sigma beyond which a star
#: is not like the others.
_MEDIAN, _SCATTER, _SIGMAS = 0.6745, 1.17, 4.0
#: What is looked for, as a share of the flux.
_GRID = np.append(0.0, np.geomspace(1e-4, 0.3, 81))
#: Means are made anew with the errors found: one bad epoch would spoil those of all.
_ROUNDS = 4


def model_error(flux_diff: Any, flux_diff_err: Any, flux: Any, good: Any) -> FloatArray:
    r"""Relative error of the fluxes of each epoch that the noise does not explain, from stars that do not vary.

    The share s by which the 20 brightest stars scatter about their means over the other epochs beyond their errors,
    :math:`\sqrt{\sigma^2 + s^2 F^2 + Var(mean)}`: what epochs have in common where there are few stars, their own where
    there are many (`excess_scatter`). A third of the stars may vary. An error of an epoch's scale is in its s. The
    reference's noise, the same in all epochs, is in sigma but not in the scatter: s is rather too small.

    Parameters
    ----------
    flux_diff, flux_diff_err : (E, S)
        Difference fluxes and one sigma, ADU of the reference. Epochs of nothing but zeros (the reference) do not count.
    flux : (E, S)
        Total fluxes.
    good : (E, S) bool
        Measurements to use; of these, those of flux / error above 50.

    Returns
    -------
    (E,) float64
        s of each epoch.
    """
    delta, sigma, total = (np.asarray(a, float) for a in (flux_diff, flux_diff_err, flux))
    good = np.asarray(good, bool) & np.isfinite(delta) & np.isfinite(total) & (sigma > 0)
    good &= (delta != 0).any(axis=1, where=good)[:, None]
    good &= _bright(sigma, total, good)
    bright = good.any(axis=0)  # few of all stars
    delta, sigma, total, good = (plane[:, bright] for plane in (delta, sigma, total, good))
    light, found, used = np.where(good, total, 0.0), np.zeros(len(delta)), good
    for _ in range(_ROUNDS):
        used = used & (used.sum(axis=1, keepdims=True) >= _FEWEST)
        rest, error = _from_the_others(delta, sigma, np.hypot(sigma, found[:, None] * light), used)
        found = excess_scatter(rest, error, total, used & np.isfinite(error), _GRID)
        rest, error = _from_the_others(delta, sigma, np.hypot(sigma, found[:, None] * light), good)
        used = good & ~_unlike(rest / np.hypot(error, found[:, None] * light), good & np.isfinite(error))
    return found


def _unlike(pulls: FloatArray, good: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Stars that scatter by more than the others, in most epochs."""
    count = good.sum(axis=0)
    some = count > 0
    width = np.zeros(len(some))
    width[some] = np.nanmedian(np.where(good, np.abs(pulls), np.nan)[:, some], axis=0) / _MEDIAN
    typical = max(1.0, float(np.median(width[some]))) if some.any() else 1.0
    return np.asarray(width > typical * (1 + _SIGMAS * _SCATTER / np.sqrt(np.maximum(count, 1))))


def _from_the_others(delta: FloatArray, sigma: FloatArray, error: FloatArray,
                     good: NDArray[np.bool_]) -> tuple[FloatArray, FloatArray]:
    """Distance of each measurement from its star's weighted mean in the other epochs, and its sigma with the mean's.

    Weights are of `error`. The sigma is infinite where there is no other epoch.
    """
    weight = np.where(good, 1 / np.where(good, error, 1.0) ** 2, 0.0)
    others = weight.sum(axis=0) - weight
    some = others > 1e-9 * weight
    rest = np.where(good, delta, 0.0)
    mean = ((weight * rest).sum(axis=0) - weight * rest) / np.where(some, others, 1.0)
    of_mean = np.where(some, 1 / np.where(some, others, 1.0), np.inf)
    return rest - mean, np.sqrt(np.where(good, sigma, 1.0) ** 2 + of_mean)


def _bright(sigma: FloatArray, total: FloatArray, good: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The brightest stars of each epoch."""
    snr = np.where(good, total, 0.0) / np.where(good, sigma, 1.0)
    rank = np.argsort(np.argsort(-snr, axis=1, kind="stable"), axis=1)
    return np.asarray((rank < _MOST) & (snr >= _SNR))
