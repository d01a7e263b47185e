"""Scatter beyond the stated errors, epoch by epoch, where each epoch has a few measurements only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpudia.photometry.stamps import FloatArray

__all__ = ["excess_scatter"]

#: Degrees of freedom of Student's t with which outliers are borne, and what makes normal data come out right: the
#: factor of z at which the likeliest scale of normal data is theirs, and the power of the likelihood at which its
#: curvature is the inverse of the variance of that scale, E[-l''] / E[l'^2] (Godambe 1960).
_NU, _FACTOR, _POWER = 3.0, 1.2602, 1.4281
#: What epochs may be like: scatter about the common value (of ln s), and share of those that have nothing of it.
_SPREADS, _ODD = (0.1, 0.4, 1.0), (0.01, 0.1, 0.3)
#: Logarithm of the least likelihood, relative to the largest: products with it are numbers, too.
_LEAST = -600.0


def excess_scatter(rest: Any, sigma: Any, lever: Any, good: Any, grid: Any) -> FloatArray:
    r"""Size s of an error s u beyond the noise sigma, of each epoch: one that epochs have in common, or their own.

    The residuals of an epoch scatter by :math:`\sqrt{\sigma^2 + s_e^2 u^2}`. A few of them say little of :math:`s_e`,
    and the largest of many such estimates is mostly chance. But all epochs together say what an epoch is like: with
    probability 1 - q, :math:`\ln s_e` is normal about :math:`\ln \mu` with spread t, else s is anything from mu on. The
    likelihood of the series says how likely each (mu, t, q) is, mu = 0 among them. What is returned is the root of the
    mean of :math:`s_e^2` in its posterior, averaged over all (mu, t, q): with many residuals that of their own scatter,
    with few what is common (a Bayes estimate like that of limma [1]_, where part of each variance is known).

    Parameters
    ----------
    rest, sigma, lever : (E, N)
        Residuals, the sigma that is stated, and u. Residuals of mean 0.
    good : (E, N) bool
        Which count.
    grid : (G,)
        Values that s may have, ascending: 0, then evenly in ln s.

    Returns
    -------
    (E,) float64
        0 where nothing at all is known.

    Notes
    -----
    The likelihood is that of Student's t with 3 degrees of freedom, as some residuals may be something else, with a
    scale and power such that it is right for normal ones: estimates from N of them scatter by 0.79 / sqrt(N),
    relatively, where the best have 0.71 and medians 1.17.

    References
    ----------
    .. [1] Smyth 2004, Stat. Appl. Genet. Mol. Biol. 3, 3
    """
    rest, sigma, lever, grid = (np.asarray(a, float) for a in (rest, sigma, lever, grid))
    good = np.asarray(good, bool)
    if not good.any():
        return np.zeros(len(rest))
    likelihood = _log_likelihood(rest, sigma, lever, good, grid)
    # none is 0: an epoch that is out of question for some (mu, t, q) is no contradiction where it is so for all
    likelihood = np.exp(np.maximum(likelihood - likelihood.max(axis=1, keepdims=True), _LEAST))
    priors = _priors(grid)
    of_each = likelihood @ priors.T
    evidence = np.log(of_each).sum(axis=0)
    weight = np.exp(evidence - evidence.max())
    posterior = likelihood * ((weight / of_each) @ priors) / weight.sum()
    return np.asarray(np.sqrt(posterior @ grid**2 / posterior.sum(axis=1)))


def _log_likelihood(rest: FloatArray, sigma: FloatArray, lever: FloatArray, good: NDArray[np.bool_],
                    grid: FloatArray) -> FloatArray:
    """Of each value of the grid, (E, G)."""
    known, more, square = (a[good] ** 2 for a in (sigma, lever, rest))  # few of all, of a series' bright stars
    result, terms = np.empty((len(rest), len(grid))), np.zeros(rest.shape)
    for g, s in enumerate(grid):
        variance = known + s * s * more
        terms[good] = 0.5 * np.log(variance) + 0.5 * (_NU + 1) * np.log1p(_FACTOR**2 / _NU * square / variance)
        result[:, g] = -_POWER * terms.sum(axis=1)
    return result


def _priors(grid: FloatArray) -> FloatArray:
    """Prior probabilities of the values of a grid, a row for each (mu, t, q); 0 is one of the mu, and has no spread."""
    place, count = np.log(grid[1:]), len(grid)
    common, least = [np.eye(1, count)], [np.zeros(1, int)]
    for spread in _SPREADS:
        shape = np.exp(-0.5 * ((place - place[:, None]) / spread) ** 2)
        common.append(np.pad(shape / shape.sum(axis=1, keepdims=True), ((0, 0), (1, 0))))
        least.append(np.arange(1, count))
    rows = np.concatenate(common)
    odd = (np.arange(count) >= np.concatenate(least)[:, None]).astype(float)
    odd /= odd.sum(axis=1, keepdims=True)
    return np.concatenate([(1 - q) * rows + q * odd for q in _ODD])

