"""Least squares for maps of the plane: similarity, affine, polynomial, and which of them the pairs ask for."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpudia.errors import RegistrationError
from gpudia.images.transforms import monomials

__all__ = ["HYPOTHESES", "MapFit", "consensus", "fit_map", "fit_similarity"]

#: Stars from which on a map of so many parameters may be fitted: affine, degree 2, degree 3.
_ENOUGH = {1: 10, 2: 30, 3: 60}
#: Pairs of pairs that `consensus` tries, mirrored and not.
HYPOTHESES = 1000
_AT_A_TIME = 100


class MapFit(NamedTuple):
    """A fitted map; see `gpudia.images.Registration` for the fields. `normal` is its normal matrix, in `units`."""

    kind: str
    matrix: NDArray[np.float64]
    terms: NDArray[np.float64]
    origin: NDArray[np.float64]
    normal: NDArray[np.float64]
    units: NDArray[np.float64]
    parameters: int

    @property
    def covariance(self) -> NDArray[np.float64]:
        """Covariance of the coefficients, for the weights as given."""
        return np.linalg.pinv(self.normal) / np.outer(self.units, self.units)

    def apply(self, xy: NDArray) -> NDArray[np.float64]:
        """Positions, shape (..., 2), to mapped ones."""
        moved = xy @ self.matrix[:, :2].T + self.matrix[:, 2]
        if self.terms.shape[1]:
            moved = moved + monomials(xy - self.origin, 2 if self.terms.shape[1] == 3 else 3)[..., 3:] @ self.terms.T
        return moved


def fit_map(a: NDArray, b: NDArray, sigma: NDArray, most: int = 3) -> MapFit:
    """Fit the map from positions `a` to `b`, shape (N, 2), with errors `sigma` (N,), that Schwarz' criterion prefers.

    Minimal ``n ln(chi^2) + k ln n`` with n = 2 N equations and k parameters (BIC with unknown variance) decides between
    similarity, affine (from 10 stars on) and polynomials of degree 2 and 3 (from 30 and 60 on). A needless term costs
    accuracy at the corners: a polynomial is only looked at where the affine map leaves residuals that the errors cannot
    explain, chi^2 per degree of freedom above 1 + 5 sqrt(2 / dof), and up to the degree `most`.

    Raises
    ------
    RegistrationError
        All positions are one.
    """
    weight = 1 / sigma
    n = 2 * len(a)
    fits = [fit_similarity(a, b, weight)]
    misfits = [_chi2(fits[0], a, b, weight)]
    for degree, enough in _ENOUGH.items():
        if degree > most or len(a) < enough or (degree == 2 and _fits(misfits[-1], n - fits[-1].parameters)):
            break
        fits.append(_fit_polynomial(a, b, weight, degree))
        misfits.append(_chi2(fits[-1], a, b, weight))
    tiny = 1e-12 * n  # of chi^2: rounding is no reason for a term
    costs = [n * math.log(chi2 + tiny) + fit.parameters * math.log(n) for fit, chi2 in zip(fits, misfits, strict=True)]
    return fits[int(np.argmin(costs))]


def _chi2(fit: MapFit, a: NDArray, b: NDArray, weight: NDArray) -> float:
    return float((((fit.apply(a) - b) * weight[:, None]) ** 2).sum())


def _fits(chi2: float, free: int) -> bool:
    """Whether the errors explain what is left, with so many degrees of freedom."""
    return not chi2 / free > 1 + 5 * np.sqrt(2 / free)


def _fit_polynomial(a: NDArray, b: NDArray, weight: NDArray, degree: int) -> MapFit:
    """Weighted least squares; `weight` multiplies the equations. Coordinates from their mean, in units of reach."""
    origin, middle = a.sum(axis=0) / len(a), b.sum(axis=0) / len(b)
    away = a - origin
    reach = float(np.abs(away).max()) or 1.0
    design = monomials(away / reach, degree) * weight[:, None]
    solution = np.linalg.lstsq(design, (b - middle) * weight[:, None], rcond=None)[0].T
    units = monomials((reach, reach), degree)
    solution = solution / units
    solution[:, 2] += middle
    matrix = solution[:, :3].copy()
    matrix[:, 2] -= matrix[:, :2] @ origin
    kind = "affine" if degree == 1 else "polynomial"
    return MapFit(kind, matrix, solution[:, 3:], origin, design.T @ design, units, 2 * len(units))


def fit_similarity(a: NDArray, b: NDArray, weight: NDArray) -> MapFit:
    """Weighted rotation, scale and shift, mirrored or not, whichever fits better [Umeyama 1991 solves the same].

    With z = x + iy the transformation is z' = p z + q, mirrored z' = p conj(z) + q: linear in p and q, which are
    independent when z is counted from its mean, with variances 1 / sum w^2 |z|^2 and 1 / sum w^2.

    Raises
    ------
    RegistrationError
        All positions are one.
    """
    mass = weight**2
    total = mass.sum()
    mass /= total
    mean_a, mean_b = mass @ a, mass @ b
    z, w = _complex(a - mean_a), _complex(b - mean_b)
    spread = float((mass * np.abs(z) ** 2).sum())
    if not spread > 0:
        raise RegistrationError("matched stars must differ in position, got one place")
    p, mirrored = ((mass * u * w).sum() / spread for u in (z.conj(), z))
    sign = 1  # what is left is sum mass |w|^2 - |p|^2 spread
    if abs(mirrored) > abs(p):
        p, sign = mirrored, -1
    matrix = np.empty((2, 3))
    matrix[:, :2] = turn = np.array([[p.real, -sign * p.imag], [p.imag, sign * p.real]])
    matrix[:, 2] = mean_b - turn @ mean_a
    normal = np.diag((spread * total, spread * total, total))
    return MapFit("similarity", matrix, np.zeros((2, 0)), mean_a, normal, np.ones(3), 4)


def _complex(xy: NDArray) -> NDArray[np.complex128]:
    """Positions (N, 2) as x + iy, shape (N,)."""
    return np.ascontiguousarray(xy, float).view(complex)[:, 0]


def consensus(a: NDArray, b: NDArray, tolerance: float = 3.0) -> NDArray[np.bool_]:
    """Say which pairs of positions, shape (N, 2) each, agree on the one similarity that most of them agree on.

    Two pairs give a similarity, mirrored or not; all pairs of pairs are tried, or 1000 drawn with a seed of their own
    where there are more (RANSAC), a tenth at a time until four of five agree on one. With a fifth of the pairs right
    that leaves 40 right ones; the result is the same from call to call.

    Parameters
    ----------
    a, b : ndarray
        Row k of both may be the same star.
    tolerance : float
        Pixels of `b`.

    Raises
    ------
    RegistrationError
        Fewer than three pairs agree.
    """
    first, second = _couples(len(a))
    z, w = _complex(a), _complex(b)
    sample = slice(None, None, max(1, len(a) // 500))  # enough to count agreement
    best, agree = 0, np.zeros(len(a), bool)
    for u, start in product((z, z.conj()), range(0, len(first), _AT_A_TIME)):
        if best >= 0.8 * len(z[sample]):
            break
        p, q = _maps(u, w, first[start:start + _AT_A_TIME], second[start:start + _AT_A_TIME])
        counts = np.count_nonzero(_squared_misses(p, q, u[sample], w[sample]) <= tolerance**2, axis=1)
        k = int(np.argmax(counts)) if len(p) else -1
        if k >= 0 and counts[k] > best:
            best, agree = int(counts[k]), np.abs(p[k] * u + q[k] - w) <= tolerance
    for _ in range(10):
        if agree.sum() < 3:
            raise RegistrationError(f"matched stars must be at least 3, got {int(agree.sum())} that agree")
        fit = fit_similarity(a[agree], b[agree], np.ones(agree.sum()))
        again = np.hypot(*(fit.apply(a) - b).T) <= tolerance
        if np.array_equal(again, agree) or again.sum() < agree.sum():
            break
        agree = again
    return agree


def _maps(u: NDArray, w: NDArray, first: NDArray, second: NDArray) -> tuple[NDArray, NDArray]:
    """Similarities p u + q through pairs of positions u that go to w; without those that are nearly one place."""
    base = u[second] - u[first]
    # neighbours say little about rotation and scale
    far = np.abs(base) > min(20.0, 0.5 * float(np.abs(base).max(initial=0)))
    one, base = first[far], base[far]
    p = (w[second[far]] - w[one]) / base
    sane = (np.abs(p) > 0.2) & (np.abs(p) < 5)
    p, one = p[sane], one[sane]
    return p, w[one] - p * u[one]


def _squared_misses(p: NDArray, q: NDArray, u: NDArray, w: NDArray) -> NDArray[np.float64]:
    """How far K maps p u + q miss N positions w, squared: shape (K, N). In real numbers, which takes half the time."""
    terms = np.stack([u.real, u.imag, np.ones(len(u))])
    x = np.column_stack([p.real, -p.imag, q.real]) @ terms - w.real
    y = np.column_stack([p.imag, p.real, q.imag]) @ terms - w.imag
    return x**2 + y**2


@lru_cache(maxsize=64)  # frames of a run have about as many pairs
def _couples(n: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    if n * (n - 1) // 2 <= HYPOTHESES:
        return np.triu_indices(n, 1)
    rng = np.random.default_rng(n)
    first = rng.integers(0, n, HYPOTHESES)
    return first, (first + rng.integers(1, n, HYPOTHESES)) % n
