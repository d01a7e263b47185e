"""Which bright stars plainly vary: what few epochs tell, before the model of a series is made."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpudia.photometry.model_error import model_error
from gpudia.photometry.variability import variability

__all__ = ["plainly_varying"]

#: Sigma by which chi^2 is beyond that of a constant star.
_SIGMAS = 5.0
#: Least rms of the variation, as a share of the flux: less pulls a kernel by less than its own error.
_LEAST = 0.01
#: Most of the light, weighted as in a fit, by (flux / error)^2, that may be called variable.
_MOST = 0.5


def plainly_varying(flux_diff: Any, flux_diff_err: Any, flux: Any, good: Any) -> NDArray[np.bool_]:
    r"""Say which stars vary beyond their noise and beyond what the model leaves at the others.

    The errors are widened by a share of the flux, common to all stars of an epoch, as `model_error` finds it. Then a
    star varies where chi^2 per degree of freedom about its mean exceeds :math:`1 + 5 \sqrt{2 / (n - 1)}` and the rms
    beyond the errors is 1 % of its flux at least. Where these stars hold more than half of sum (F / sigma)^2, what is
    seen is not variation of single stars, and none is returned.

    Parameters
    ----------
    flux_diff, flux_diff_err, flux : (E, S)
        Difference fluxes, one sigma and total fluxes, ADU of the reference.
    good : (E, S) bool
        Measurements to use.

    Returns
    -------
    (S,) bool
    """
    delta, sigma, total = (np.asarray(a, float) for a in (flux_diff, flux_diff_err, flux))
    good = np.asarray(good, bool) & np.isfinite(delta) & np.isfinite(total) & (sigma > 0)
    share = model_error(delta, sigma, total, good)
    error = np.where(good, np.hypot(sigma, share[:, None] * np.where(good, total, 0.0)), np.nan)
    found = variability(np.where(good, delta, np.nan), error)
    weight = np.where(good, total / np.where(good, sigma, 1.0), 0.0) ** 2
    mean = np.where(good, total, 0.0).sum(axis=0) / np.maximum(good.sum(axis=0), 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        varies = (found.chi2 > 1 + _SIGMAS * np.sqrt(2 / (found.n_good - 1))) & (found.excess > _LEAST * np.abs(mean))
    if weight[:, varies].sum() > _MOST * weight.sum():
        return np.zeros(len(varies), bool)
    return np.asarray(varies)
