"""What the model of a series leaves at its bright stars beyond the noise: a share of a star's flux."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpudia.photometry.stamps import FloatArray

__all__ = ["model_error"]

#: Bright stars of an epoch that are looked at, and their least signal to noise; fewer than four tell nothing.
_MOST, _FEWEST, _SNR = 20, 4, 50.0
#: Median of |x| for a standard normal x, and the relative scatter of such a median of one value.
_MEDIAN, _SCATTER = 0.6745, 1.17
#: An excess of less than so many sigma is chance.
_SIGMAS = 2.0
#: Means are made anew with the errors found: one bad epoch would spoil those of all.
_ROUNDS = 4
#: Most of what is looked for, as a share of the flux.
_LARGEST = 0.3


def model_error(flux_diff: Any, flux_diff_err: Any, flux: Any, good: Any) -> FloatArray:
    r"""Relative error of the fluxes of each epoch that the noise does not explain, from stars that do not vary.

    The share s with which the median of :math:`|\Delta - m| / \sqrt{\sigma^2 + s^2 F^2}` over the 20 brightest stars is
    what it is for a standard normal, with the mean m of each star over the epochs, weighted by these errors: of all
    epochs together first, then of each where it is larger. 0 where the excess is within 2 sigma of chance. Medians bear
    that a third of the stars vary. An error of an epoch's scale is in its s. The reference's noise, the same in all
    epochs, is in sigma but not in the scatter: s is rather too small.

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
    chosen = [_brightest(*row) for row in zip(sigma, total, good, strict=True)]
    chosen = [stars if len(stars) >= _FEWEST else stars[:0] for stars in chosen]
    found = np.zeros(len(delta))
    for _ in range(_ROUNDS):
        apart = _from_mean(delta, np.hypot(sigma, found[:, None] * np.where(good, total, 0.0)), good)
        rows = [(d[c], e[c], np.abs(f[c])) for d, e, f, c in zip(apart, sigma, total, chosen, strict=True)]
        common = _share(*(np.concatenate([row[k] for row in rows]) if rows else np.empty(0) for k in range(3)))
        found = np.array([max(common, _share(d, np.hypot(e, common * f), f, common)) for d, e, f in rows])
    return found


def _from_mean(delta: FloatArray, sigma: FloatArray, good: NDArray[np.bool_]) -> FloatArray:
    """Distance of each measurement from its star's weighted mean, made as large as from the truth."""
    weight = np.where(good, 1 / np.where(good, sigma, 1.0) ** 2, 0.0)
    share = weight / np.where(weight.any(axis=0), weight.sum(axis=0), 1.0)
    mean = (share * np.where(good, delta, 0.0)).sum(axis=0)
    return np.asarray(np.abs(delta - mean) / np.sqrt(np.maximum(1 - share, 1e-6)))


def _brightest(sigma: FloatArray, total: FloatArray, good: NDArray[np.bool_]) -> NDArray[np.intp]:
    snr = np.where(good, total, 0.0) / np.where(good, sigma, 1.0)
    return np.argsort(-snr, kind="stable")[:min(_MOST, int((snr >= _SNR).sum()))]


def _share(delta: FloatArray, sigma: FloatArray, total: FloatArray, known: float = 0.0) -> float:
    """The share, beyond what is in `sigma` already; with `known` of that, together."""
    n = len(delta)
    if not n or np.median(delta / sigma) <= _MEDIAN * (1 + _SIGMAS * _SCATTER / np.sqrt(n)):
        return known
    low, high = 0.0, _LARGEST
    for _ in range(40):
        middle = 0.5 * (low + high)
        if np.median(delta / np.hypot(sigma, middle * total)) > _MEDIAN:
            low = middle
        else:
            high = middle
    return float(np.hypot(high, known))
