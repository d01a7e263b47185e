"""The photometric scale of an epoch, checked against the stars that do not vary."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpudia.errors import InputError
from gpudia.model.planes import median_of
from gpudia.photometry.stamps import FloatArray

__all__ = ["ConstantStarScale", "constant_star_epsilon"]

_CLIP = 3.0
_ITERATIONS = 10


class ConstantStarScale(NamedTuple):
    """Relative error of the photometric scale, by epoch: scalars for one epoch, (E,) for several.

    Attributes
    ----------
    epsilon, error : float64
        (P_kernel - P_stars) / P_stars and one sigma; NaN with fewer than three stars.
    n_stars : int32
        Stars that were left after clipping.
    chi2 : float64
        Reduced chi^2 of those stars about the line. `error` is already enlarged by its root where above 1.
    """

    epsilon: FloatArray
    error: FloatArray
    n_stars: NDArray[np.int32]
    chi2: FloatArray


def constant_star_epsilon(flux_diff: Any, flux_diff_err: Any, flux_ref: Any, good: Any = None) -> ConstantStarScale:
    r"""Scale error from the slope of the difference fluxes against the reference fluxes.

    A kernel whose sum is (1 + epsilon) P leaves f / P = -epsilon F_ref at every constant star, so that

    .. math:: \epsilon = -\sum w F_{ref} \Delta / \sum w F_{ref}^2, \qquad w = 1 / \sigma_\Delta^2

    started from a weighted median of Delta / F_ref, with stars beyond 3 robust sigma of the line left out until
    nothing changes. The errors of the stars are taken as independent: where g^T C g is a large part of them, the
    error of epsilon is an underestimate by that part.

    Parameters
    ----------
    flux_diff, flux_diff_err : (E, S) or (S,)
        Difference fluxes in ADU of the reference (divided by the scale), and one sigma.
    flux_ref : (S,)
        Fluxes on the reference, ADU.
    good : bool array that broadcasts to (E, S), optional
        Stars to use. Fluxes that are not finite, and stars without positive reference flux, are left out anyway.

    Returns
    -------
    ConstantStarScale

    Raises
    ------
    InputError
        Shapes do not agree.
    """
    delta, sigma = np.asarray(flux_diff, float), np.asarray(flux_diff_err, float)
    reference = np.asarray(flux_ref, float)
    if delta.ndim not in (1, 2) or delta.shape != sigma.shape or reference.shape != delta.shape[-1:]:
        raise InputError(f"flux_diff, flux_diff_err and flux_ref must be (E, S), (E, S) and (S,), "
                         f"got {delta.shape}, {sigma.shape} and {reference.shape}")
    usable = np.isfinite(delta) & np.isfinite(sigma) & (sigma > 0) & np.isfinite(reference) & (reference > 0)
    usable &= True if good is None else np.broadcast_to(good, delta.shape)
    result = _fit(*(np.atleast_2d(a) for a in (delta, sigma)), reference, np.atleast_2d(usable))
    return result if delta.ndim == 2 else ConstantStarScale(*(column[0] for column in result))


def _fit(delta: FloatArray, sigma: FloatArray, reference: FloatArray,
         usable: NDArray[np.bool_]) -> ConstantStarScale:
    weight = np.where(usable, (reference / np.where(usable, sigma, 1.0)) ** 2, 0.0)
    ratio = np.where(usable, delta / np.where(usable, reference, 1.0), 0.0)
    slope = _weighted_median(ratio, _capped(np.sqrt(weight)))
    keep, same = usable, np.zeros(len(delta), bool)
    for _ in range(_ITERATIONS):
        pull = np.abs(ratio - slope[:, None]) * np.sqrt(weight)
        # One robust sigma; not below 1, lest stars with honest errors be clipped.
        spread = np.maximum(1.0, 1.4826 * _weighted_median(np.where(usable, pull, 0.0), usable.astype(float)))
        kept = np.where(same[:, None], keep, usable & (pull <= _CLIP * spread[:, None]))
        slope = _mean(ratio, np.where(kept, weight, 0.0))
        same, keep = (kept == keep).all(axis=1), kept  # an epoch is done when it is, whatever the others are
        if same.all():
            break
    return _summary(ratio, np.where(keep, weight, 0.0), slope, keep.sum(axis=1))


def _capped(snr: FloatArray) -> FloatArray:
    """Signal to noise up to three times its median: no weight with which one bright variable outvotes the rest."""
    return np.minimum(snr, 3 * np.nan_to_num(median_of(snr, snr > 0))[:, None])


def _summary(ratio: FloatArray, weight: FloatArray, slope: FloatArray, n: NDArray[Any]) -> ConstantStarScale:
    enough = n >= 3
    chi2 = (weight * (ratio - slope[:, None]) ** 2).sum(axis=1) / np.where(enough, n - 1, np.nan)
    total = np.where(enough, weight.sum(axis=1), np.nan)
    error = np.sqrt(np.maximum(chi2, 1.0) / total)
    return ConstantStarScale(np.where(enough, -slope, np.nan), error, n.astype(np.int32), chi2)


def _mean(values: FloatArray, weight: FloatArray) -> FloatArray:
    total = weight.sum(axis=1)
    return (weight * values).sum(axis=1) / np.where(total > 0, total, 1.0)


def _weighted_median(values: FloatArray, weight: FloatArray) -> FloatArray:
    """Weighted median along the last axis; values of weight 0 do not count."""
    if not values.shape[1]:
        return np.zeros(len(values))
    order = np.argsort(values, axis=1)
    summed = np.cumsum(np.take_along_axis(weight, order, axis=1), axis=1)
    middle = np.argmax(summed >= 0.5 * summed[:, -1:], axis=1)
    return np.take_along_axis(values, np.take_along_axis(order, middle[:, None], axis=1), axis=1)[:, 0]
