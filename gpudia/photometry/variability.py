"""How much stars vary: indices of each light curve, and a score that counts only what stars alike do not show."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import median_filter, percentile_filter

from gpudia.errors import InputError
from gpudia.flags import SOURCE_FLAGS
from gpudia.photometry.stamps import FloatArray

__all__ = ["UNUSABLE", "Variability", "usable", "variability", "variability_score"]

#: A measurement with one of these flags takes no part in statistics.
UNUSABLE = SOURCE_FLAGS.masked_pixels | SOURCE_FLAGS.saturated | SOURCE_FLAGS.outside | SOURCE_FLAGS.reference_masked
#: Stars of like brightness that a star is compared with, itself among them; fewer tell nothing about their kind.
_NEIGHBOURS, _FEWEST = 31, 8
#: Stars whose indices are made at once: the arrays between are some ten times as large as the fluxes.
_AT_ONCE = 500


class Variability(NamedTuple):
    """Indices of each source, (S,); fluxes in the unit of the light curves, NaN where there are too few epochs."""

    n_good: NDArray[np.int32]
    mean: FloatArray
    mean_err: FloatArray
    chi2: FloatArray
    von_neumann: FloatArray
    stetson_j: FloatArray
    amplitude: FloatArray
    excess: FloatArray


def usable(flux: Any, flux_err: Any, flags: Any = 0) -> NDArray[np.bool_]:
    """Say which measurements may enter statistics: finite, with a positive error and without a flag of `UNUSABLE`."""
    flux, flux_err = np.asarray(flux, float), np.asarray(flux_err, float)
    with np.errstate(invalid="ignore"):
        return np.isfinite(flux) & np.isfinite(flux_err) & (flux_err > 0) & (np.asarray(flags) & UNUSABLE == 0)


def variability(flux: Any, flux_err: Any, flags: Any = 0) -> Variability:
    r"""Measure how each source varies about its weighted mean.

    With n good epochs in order of time, weights w = 1 / sigma^2 and the weighted mean m:

    ===============  ==================================================================================================
    ``chi2``         sum w (F - m)^2 / (n - 1); 1 for a constant source
    ``von_neumann``  2 / (n - 1) sum (F_{i+1} - F_i)^2 / (sigma_{i+1}^2 + sigma_i^2) / ``chi2``; 2 for noise without
                     memory whatever its size, less for what changes slowly. Von Neumann (1941); for equal errors it is
                     the ratio eta of Sokolovsky et al. (2017, MNRAS 464, 274)
    ``stetson_j``    mean of sign(P) sqrt|P| over successive epochs, P = d_{i+1} d_i, d = sqrt(n / (n - 1)) (F - m) /
                     sigma; 0 for a constant source. Stetson (1996, PASP 108, 851), all pairs with one weight
    ``amplitude``    95th less 5th percentile of F, noise included: about 3.3 sigma for a constant source
    ``excess``       rms beyond the errors: its square is (n - 1) (chi2 - 1) / (sum w - sum w^2 / sum w), or 0 where
                     that is negative. DerSimonian & Laird (1986)
    ===============  ==================================================================================================

    Parameters
    ----------
    flux, flux_err : (n_epochs, n_sources)
        In order of time. NaN, or an error that is not positive = not measured.
    flags : (n_epochs, n_sources) int, optional
        Bits of `gpudia.flags.SOURCE_FLAGS`; measurements with one of `UNUSABLE` are left out.

    Returns
    -------
    Variability
        All but `n_good` and the mean are NaN for fewer than two epochs.

    Raises
    ------
    InputError
        The arrays are not 2-D of one shape.
    """
    flux, flux_err = np.asarray(flux), np.asarray(flux_err)
    if flux.ndim != 2 or flux.shape != flux_err.shape:
        raise InputError(f"flux and flux_err must be (n_epochs, n_sources), got {flux.shape} and {flux_err.shape}")
    flags = np.broadcast_to(flags, flux.shape)
    starts = range(0, max(flux.shape[1], 1), _AT_ONCE)
    parts = [_indices(*(a[:, i:i + _AT_ONCE] for a in (flux, flux_err, flags))) for i in starts]
    return Variability(*map(np.concatenate, zip(*parts, strict=True)))


def _indices(flux: Any, flux_err: Any, flags: Any) -> Variability:
    flux, flux_err = flux.astype(float), flux_err.astype(float)
    good = usable(flux, flux_err, flags)
    sigma = np.where(good, flux_err, 1.0)
    weight = good / sigma**2
    n, total = good.sum(axis=0), np.where(good.any(axis=0), weight.sum(axis=0), np.nan)
    free = np.where(n > 1, n - 1, np.nan)
    mean = (weight * np.where(good, flux, 0.0)).sum(axis=0) / total
    chi2 = (weight * np.where(good, flux - mean, 0.0) ** 2).sum(axis=0) / free
    excess = free * (chi2 - 1) / (total - (weight**2).sum(axis=0) / total)
    pulls = np.where(good, flux - mean, np.nan) / sigma * np.sqrt(n / free)
    steps, products = _successive(np.where(good, flux, np.nan), sigma, pulls, good)
    with np.errstate(invalid="ignore", divide="ignore"):
        return Variability(n.astype(np.int32), mean, np.sqrt(1 / total), chi2, 2 * steps / free / chi2,
                           products / free, _amplitude(flux, good), np.sqrt(np.maximum(excess, 0.0)))


def _successive(flux: FloatArray, sigma: FloatArray, pulls: FloatArray,
                good: NDArray[np.bool_]) -> tuple[FloatArray, FloatArray]:
    """Sums over pairs of successive good epochs: squared steps over their variance, and signed roots of products."""
    order = np.argsort(~good, axis=0, kind="stable")  # the good ones first, in their order
    flux, sigma, pulls = (np.take_along_axis(a, order, axis=0) for a in (flux, sigma, pulls))
    steps = np.diff(flux, axis=0) ** 2 / (sigma[1:] ** 2 + sigma[:-1] ** 2)
    product = pulls[1:] * pulls[:-1]
    return np.nansum(steps, axis=0), np.nansum(np.sign(product) * np.sqrt(np.abs(product)), axis=0)


def _amplitude(flux: FloatArray, good: NDArray[np.bool_]) -> FloatArray:
    result = np.full(flux.shape[1], np.nan)
    for star in np.flatnonzero(good.sum(axis=0) > 1):
        low, high = np.percentile(flux[good[:, star], star], (5, 95))
        result[star] = high - low
    return result


def variability_score(chi2: Any, n_good: Any, brightness: Any, fair: Any = True) -> FloatArray:
    r"""Say by how many sigma each source varies more than constant ones of its brightness.

    Errors that are stated too small, in particular those of bright stars, give every star a large chi^2. So chi^2 is
    divided by f, the running median over stars of like brightness of chi^2 over its expected median; but f is at least
    1: no star counts as variable that scatters less than its errors say. What is left becomes a normal variable by
    the cube root of Wilson & Hilferty (1931), nu = n_good - 1:

    .. math:: z = \frac{(\chi^2 / f)^{1/3} - (1 - 2 / 9\nu)}{\sqrt{2 / 9\nu}}

    and z is divided by its own width, the median less the 16th percentile over the same stars (variables are above the
    median only), at least 1.

    Parameters
    ----------
    chi2, n_good, brightness : (S,)
        Reduced chi^2, number of epochs, and flux on the reference.
    fair : (S,) bool, optional
        Sources to compare with; the others (saturated, for example) get a score, too.

    Returns
    -------
    (S,) float
        NaN for fewer than three epochs or where chi^2 is not known. With fewer than 8 fair sources f is 1.
    """
    chi2, nu, flux = np.asarray(chi2, float), np.asarray(n_good, float) - 1, np.asarray(brightness, float)
    known = np.isfinite(chi2) & (nu >= 2)
    fair = known & np.broadcast_to(fair, known.shape) & np.isfinite(flux) & (flux > 0)
    spread = 2 / (9 * np.where(known, nu, np.nan))
    factor = np.fmax(_running(flux, chi2 / (1 - spread) ** 3, fair, 50), 1.0)
    z = (np.cbrt(chi2 / factor) - (1 - spread)) / np.sqrt(spread)
    width = _running(flux, z, fair, 50) - _running(flux, z, fair, 16)
    return z / np.fmax(width, 1.0)


def _running(x: FloatArray, y: FloatArray, fair: NDArray[np.bool_], percent: int) -> FloatArray:
    """Percentile of `y` over the fair sources next in `x`, at every source; NaN where there are too few of them."""
    if fair.sum() < _FEWEST:
        return np.full(len(x), np.nan)
    order = np.flatnonzero(fair)[np.argsort(x[fair], kind="stable")]
    size = min(_NEIGHBOURS, len(order))
    smooth = (median_filter(y[order], size, mode="reflect") if percent == 50
              else percentile_filter(y[order], percent, size, mode="reflect"))
    nearest = np.searchsorted(x[order], np.where(np.isfinite(x), x, -np.inf)).clip(0, len(order) - 1)
    result: FloatArray = smooth[nearest]
    return result
