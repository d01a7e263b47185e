"""One star on all differences together: where the light that varies is, and its fluxes there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpudia.flags import PIXEL_FLAGS
from gpudia.photometry.apertures import aperture_weights
from gpudia.photometry.psf import shifted_psf
from gpudia.photometry.stamps import FloatArray

__all__ = ["JointPosition", "StarStamp", "fit_position", "fluxes_at"]

#: Significance of the variation, all epochs together (sigma), from which on its place is fitted.
_SIGNIFICANT = 10.0
_ITERATIONS, _STEP = 12, 0.5
#: Half the interval of the numerical derivative, pixels.
_H = 0.05
_AT_ONCE = 500


class StarStamp(NamedTuple):
    """One star on one difference image, on the (m, m) pixels around the one nearest to it.

    Attributes
    ----------
    difference, variance : (m, m) float32
        ADU, ADU^2.
    flags : (m, m) uint8
        Bits of `gpudia.flags.PIXEL_FLAGS`.
    psf : (m, m) float32
        PSF of the epoch at the star, centred on the central pixel.
    """

    difference: NDArray[np.float32]
    variance: NDArray[np.float32]
    flags: NDArray[np.uint8]
    psf: NDArray[np.float32]


class JointPosition(NamedTuple):
    """Place of the light that varies, from the central pixel of the stamps, pixels.

    Attributes
    ----------
    offset, error : (2,) float64
        (x, y) and one sigma of each.
    significance : float
        Of the variation, sigma: root of the sum of (f / sigma_f)^2 - 1 over the epochs.
    """

    offset: FloatArray
    error: FloatArray
    significance: float


class _Planes(NamedTuple):
    values: FloatArray
    weights: FloatArray
    psf: FloatArray


def _planes(stamps: Sequence[StarStamp]) -> Iterator[_Planes]:
    """Values (0 where ignored), inverse variances and PSFs (E, m, m) of some epochs at a time."""
    for start in range(0, len(stamps), _AT_ONCE):
        some = stamps[start:start + _AT_ONCE]
        values, variance = (np.array([getattr(one, n) for one in some], float) for n in ("difference", "variance"))
        flags = np.array([one.flags for one in some])
        good = (flags & (255 - PIXEL_FLAGS.clipped) == 0) & np.isfinite(values) & np.isfinite(variance) & (variance > 0)
        yield _Planes(np.where(good, values, 0.0), np.where(good, 1 / np.where(good, variance, 1.0), 0.0),
                      np.array([one.psf for one in some], float))


def _moved(psf: FloatArray, x: float, y: float) -> FloatArray:
    return shifted_psf(psf, np.tile([x, y], (len(psf), 1)))


def fit_position(stamps: Sequence[StarStamp], offset: Any) -> JointPosition | None:
    r"""Fit one place to the varying light of a star on all its differences, with a flux of its own in each.

    Gauss-Newton steps of :math:`D_e = f_e \, \phi_e(x - \delta)`, the fluxes eliminated:

    .. math:: \delta = A^{-1} b, \quad A = \sum_e (f_e^2 - \sigma_e^2) \, G_e^T W_e G_e, \quad
              b = \sum_e f_e \, G_e^T W_e D_e

    with the derivatives G of the PSF after their projection on it. The noise of f is uncorrelated with G^T W D, and its
    square is taken off f^2: so epochs without signal add nothing.

    Parameters
    ----------
    stamps : sequence of StarStamp
    offset : (2,)
        Where to begin, (x, y) from the central pixel.

    Returns
    -------
    JointPosition or None
        None where the star does not vary by 10 sigma, all epochs together, or that is less than 10 times what noise
        alone scatters by (sum of (f / sigma_f)^2 - 1: sqrt(2 E)), or no place within a quarter of the stamp is found.
        Errors are those of A^-1 b with :math:`Var(b) = \sum f_e^2 \, G_e^T W_e G_e`, for pixels that are
        uncorrelated, with the chi^2 of the fit where that is above 1.
    """
    start = np.asarray(offset, float)
    place = start.copy()
    if not len(stamps):
        return None
    least = _SIGNIFICANT * max(_SIGNIFICANT, float(np.sqrt(2 * len(stamps))))
    reach = stamps[0].psf.shape[-1] / 4
    for _ in range(_ITERATIONS):
        matrix, spread, vector, power, chi2, n = _normal(stamps, place)
        if power < least or np.linalg.eigvalsh(matrix)[0] <= 0:
            return None
        step = np.linalg.solve(matrix, vector)
        step *= min(1.0, _STEP / max(float(np.hypot(*step)), 1e-12))
        place = place + step
        if np.hypot(*(place - start)) > reach:
            return None
        if np.hypot(*step) < 1e-4:
            break
    inverse = np.linalg.inv(matrix)
    error = np.sqrt(np.diag(inverse @ spread @ inverse) * max(chi2 / max(n, 1), 1.0))
    return JointPosition(place, error, float(np.sqrt(power)))


def _normal(stamps: Sequence[StarStamp],
            place: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray, float, float, int]:
    """Normal equations A, Var(b), b of a step, squared significance of the fluxes, chi^2, its degrees of freedom."""
    matrix, spread, vector, power, chi2, n = np.zeros((2, 2)), np.zeros((2, 2)), np.zeros(2), 0.0, 0.0, 0
    for values, weights, psf in _planes(stamps):
        light = _moved(psf, *place)
        slopes = [(_moved(psf, place[0] + dx, place[1] + dy) - _moved(psf, place[0] - dx, place[1] - dy)) / (2 * _H)
                  for dx, dy in ((_H, 0.0), (0.0, _H))]
        norm = (weights * light**2).sum(axis=(1, 2))
        seen = norm > 0
        safe = np.where(seen, norm, 1.0)
        flux = (weights * light * values).sum(axis=(1, 2)) / safe
        slopes = [g - light * ((weights * light * g).sum(axis=(1, 2)) / safe)[:, None, None] for g in slopes]
        strength = np.where(seen, flux**2 - 1 / safe, 0.0)
        for i, g in enumerate(slopes):
            vector[i] += (flux * (weights * g * values).sum(axis=(1, 2)))[seen].sum()
            for j, other in enumerate(slopes):
                both = (weights * g * other).sum(axis=(1, 2))
                matrix[i, j] += (strength * both).sum()
                spread[i, j] += (flux**2 * both)[seen].sum()
        power += float((strength * norm)[seen].sum())
        rest = values - flux[:, None, None] * light
        chi2 += float((weights * rest**2)[seen].sum())
        n += int((weights[seen] > 0).sum()) - int(seen.sum())
    return matrix, spread, vector, power, chi2, n - 2


def fluxes_at(stamps: Sequence[StarStamp], offset: Any, radius: float) -> dict[str, tuple[FloatArray, FloatArray]]:
    """PSF fluxes and aperture sums (total fluxes) of a star at a place, with errors of uncorrelated pixels.

    Parameters
    ----------
    stamps : sequence of E StarStamp
    offset : (2,)
        (x, y) from the central pixel.
    radius : float
        Of the aperture, pixels; it must fit on the stamps.

    Returns
    -------
    dict
        ``{"psf": (flux, error), "ap": (flux, error)}``, each (E,), ADU of the difference image; NaN where nothing is
        seen of the star.
    """
    place = np.asarray(offset, float)
    found: dict[str, list[tuple[FloatArray, FloatArray]]] = {"psf": [], "ap": []}
    for values, weights, psf in _planes(stamps):
        light = _moved(psf, *place)
        circle = aperture_weights(place[None], radius, psf.shape[-1] + 2 * int(np.abs(np.rint(place)).max()))[0][0]
        cut = [(circle.shape[0] - psf.shape[-1]) // 2 - int(c) for c in np.rint(place)]
        circle = circle[cut[1]:cut[1] + psf.shape[-1], cut[0]:cut[0] + psf.shape[-1]]
        variance = np.where(weights > 0, 1 / np.where(weights > 0, weights, 1.0), 0.0)
        for name, shape in (("psf", weights * light), ("ap", circle * (weights > 0))):
            total = (shape * light).sum(axis=(1, 2))
            total = np.where(total > 0, total, np.nan)
            found[name].append(((shape * values).sum(axis=(1, 2)) / total,
                                np.sqrt((shape**2 * variance).sum(axis=(1, 2))) / total))
    return {name: (np.concatenate([f for f, _ in parts]), np.concatenate([e for _, e in parts]))
            for name, parts in found.items()}
