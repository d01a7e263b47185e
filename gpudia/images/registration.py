"""The transformation from the reference's pixels to those of an image, fitted to matched stars and verified."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from astropy.table import Table
from astropy.wcs import WCS
from numpy.typing import NDArray
from scipy.spatial import KDTree
from scipy.special import bdtrc

from gpudia.errors import RegistrationError
from gpudia.flags import SOURCE_FLAGS
from gpudia.images.mapfits import HYPOTHESES, MapFit, consensus, fit_map, fit_similarity
from gpudia.images.matching import ROUTES, match_stars, median, neighbours_with_distance, positions
from gpudia.images.patterns import MOST_STARS
from gpudia.images.transforms import Registration

__all__ = ["register"]

#: Largest distance of a matched pair in the last round, pixels.
TOLERANCE = 1.5
#: Added to every centroid's error, pixels: undersampling and distortion limit the brightest stars.
FLOOR = 0.02
#: The same in the first round.
_WIDEST = 4.0
#: Rounds of matching and fitting with one tolerance, at most; they end when the pairs stay the same.
_ROUNDS = 10


@dataclass(frozen=True)
class _Stars:
    """A list's positions (N, 2), their errors (N,), rows that can be trusted, and whether the errors came with it."""

    xy: NDArray[np.float64]
    sigma: NDArray[np.float64]
    good: NDArray[np.intp]
    measured: bool

    @classmethod
    def of(cls, stars: Table) -> _Stars:
        return cls(positions(stars), _centroid_errors(stars), np.flatnonzero(_good(stars)), "x_err" in stars.colnames)

    @cached_property
    def trusted(self) -> NDArray[np.float64]:
        """Positions that can be trusted."""
        return self.xy[self.good]

    @cached_property
    def tree(self) -> KDTree:
        """Tree of these."""
        return KDTree(self.trusted)

    @cached_property
    def bounds(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Lowest and highest x, y of these; a few wild positions of many do not count."""
        xy = self.trusted
        low, high = xy.min(axis=0), xy.max(axis=0)
        if len(xy) >= 20:
            first, last = np.percentile(xy, (5, 95), axis=0)
            low, high = np.maximum(low, first - 0.25 * (last - first)), np.minimum(high, last + 0.25 * (last - first))
        return low - TOLERANCE, high + TOLERANCE

    @property
    def density(self) -> float:
        """How many of these there are per square pixel."""
        low, high = self.bounds
        return len(self.good) / float(np.prod(high - low))


@dataclass
class _Fit:
    """A map and the pairs it was fitted to; `offered` are the pairs, and the degree, among which it had the choice.

    `near` are the stars that the map makes each other's nearest, once they were asked for.
    """

    map: MapFit
    i: NDArray[np.intp]
    j: NDArray[np.intp]
    rms: float
    max_residual: float
    excess: float
    offered: tuple[NDArray[np.intp], NDArray[np.intp], int] | None = None
    near: tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]] | None = None

    def pairs(self, a: _Stars, b: _Stars, tolerance: float) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Rows of either list that the map makes each other's nearest, within a tolerance of at most 4 px."""
        if self.near is None:
            self.near = neighbours_with_distance(self.map.apply(a.trusted), b.tree, _WIDEST)
        i, j, distance = self.near
        close = distance <= tolerance
        return a.good[i[close]], b.good[j[close]]


def register(
    reference_stars: Table,
    stars: Table,
    reference_wcs: WCS | None = None,
    wcs: WCS | None = None,
    *,
    max_rms: float = 0.5,
    min_matches: int = 3,
    routes: tuple[str, ...] = ROUTES,
) -> Registration:
    """Register an image with the reference by their stars.

    Every route of `match_stars` is tried in turn, until one passes: from the majority of its pairs a first similarity,
    then rounds of matching the nearest stars, fitting with weights from the centroid errors, and clipping, until the
    pairs stay the same. A solution is believed when it has enough stars, its rms is small, and chance would hardly give
    so many pairs: the expected number of chance solutions must be below 0.001. The same lists give the same bits.

    Parameters
    ----------
    reference_stars, stars : Table
        As `detect_stars` or `catalog_of` give them: ``x, y``, and where known ``id``, ``ra, dec``, ``flux``,
        ``x_err, y_err``, ``flags`` (saturated stars and those at the edge stay out of the fit).
    reference_wcs, wcs : WCS, optional
        Used for lists without ``ra, dec``.
    max_rms : float
        Pixels.
    min_matches : int
        At least 3.
    routes : tuple of str
        Which to try, in this order.

    Returns
    -------
    Registration
        A similarity (also mirrored); an affine transformation where at least 10 stars ask for it (BIC); a polynomial
        of degree 2 or 3 where at least 30 or 60 do, and the affine residuals are more than the centroid errors.

    Raises
    ------
    RegistrationError
        No route gave a solution to be believed; says what each one found.
    """
    reference_stars, stars = _with_position(reference_stars), _with_position(stars)
    for name, table in (("reference", reference_stars), ("image", stars)):
        if len(table) < min_matches:
            raise RegistrationError(f"stars of the {name} must be at least {min_matches}, got {len(table)}")
    reasons = []
    for route in routes:
        try:
            pairs = match_stars(reference_stars, stars, route, reference_wcs=reference_wcs, wcs=wcs)
            return _solve(reference_stars, stars, pairs, route, max_rms, max(3, min_matches))
        except RegistrationError as exc:
            reasons.append(f"{route}: {exc.reason}")
    raise RegistrationError("no trustworthy match with the reference (" + "; ".join(reasons) + ")")


def _with_position(stars: Table) -> Table:
    known = np.isfinite(positions(stars)).all(axis=1)
    return stars if known.all() else stars[known]


def _solve(
    reference_stars: Table, stars: Table, pairs: tuple[NDArray, NDArray], route: str, max_rms: float, min_matches: int
) -> Registration:
    a, b = _Stars.of(reference_stars), _Stars.of(stars)
    most = _clear_radius(b)
    fit = _first_fit(a.xy, b.xy, *pairs, min(3.0, 2 * most))
    for tolerance, degree in ((_WIDEST, 1), (2.0, 1), (TOLERANCE, 1), (2.0, 3), (TOLERANCE, 3)):
        # a polynomial of part of the stars goes astray where the others are
        if degree == 1 or _covers(fit, a, b):
            fit = _settled(fit, a, b, min(tolerance, most), degree, min_matches)
    if not fit.rms <= max_rms:
        raise RegistrationError(f"rms must be at most {max_rms} px, got {fit.rms:.3f} from {len(fit.i)} stars")
    expected = _verify(fit.map.apply(a.trusted), b, route)
    kind, matrix, terms, origin = fit.map[:4]
    return Registration(matrix, len(fit.i), fit.rms, fit.max_residual, route, expected, kind, terms, origin,
                        fit.map.covariance * fit.excess)  # fmt: skip


def _covers(fit: _Fit, a: _Stars, b: _Stars, share: float = 0.7) -> bool:
    """Say whether the matched stars are spread as widely as all that fall on the image."""
    (low, high), there = b.bounds, fit.map.apply(a.trusted)
    inside = np.all((there >= low) & (there <= high), axis=1)
    spread = [float(np.sqrt(np.var(xy, axis=0).sum())) for xy in (a.xy[fit.i], a.trusted[inside])]
    return spread[0] >= share * spread[1]


def _settled(fit: _Fit, a: _Stars, b: _Stars, tolerance: float, degree: int, min_matches: int) -> _Fit:
    """Match the nearest stars and fit them, until the pairs stay the same: where it began does not matter then."""
    for _ in range(_ROUNDS):
        (i, j), before = fit.pairs(a, b, tolerance), fit
        if fit.offered is not None and all(map(np.array_equal, fit.offered, (i, j, degree))):
            break
        scale = np.sqrt(abs(np.linalg.det(fit.map.matrix[:, :2])))
        fit = _clipped_fit(a, b, i, j, scale, degree, min_matches)
        if np.array_equal(fit.i, before.i) and np.array_equal(fit.j, before.j):
            break
    return fit


def _good(stars: Table) -> NDArray[np.bool_]:
    """Stars whose centroid can be trusted."""
    if "flags" not in stars.colnames:
        return np.ones(len(stars), bool)
    doubtful = SOURCE_FLAGS.saturated | SOURCE_FLAGS.masked_pixels | SOURCE_FLAGS.outside
    good = (np.asarray(stars["flags"]) & doubtful) == 0
    return good if good.sum() >= 3 else np.ones(len(stars), bool)


def _centroid_errors(stars: Table) -> NDArray[np.float64]:
    """One error per star, pixels; 0.1 where the list has none."""
    if "x_err" not in stars.colnames:
        return np.full(len(stars), 0.1)
    sigma = np.hypot(np.asarray(stars["x_err"], float), np.asarray(stars["y_err"], float)) / np.sqrt(2)
    return np.where(np.isfinite(sigma), sigma, 1.0)


def _clear_radius(stars: _Stars) -> float:
    """Distance within which one star of ten has another by chance, pixels: wider matching is noise in crowded lists."""
    return max(0.5, float(np.sqrt(0.1 / (np.pi * stars.density))))


def _first_fit(a: NDArray, b: NDArray, i: NDArray, j: NDArray, tolerance: float) -> _Fit:
    """Similarity through the pairs that agree; wrong pairs (a wrong id, a chance neighbour) stay out."""
    agree = consensus(a[i], b[j], tolerance)
    i, j = i[agree], j[agree]
    return _Fit(fit_similarity(a[i], b[j], np.ones(len(i))), i, j, np.inf, np.inf, 1.0)


def _clipped_fit(
    a: _Stars, b: _Stars, i: NDArray, j: NDArray, scale: float, degree: int, min_matches: int
) -> _Fit:
    """Weighted fit of the pairs; those further off than 4 times what is typical for their errors are dropped.

    `scale`, pixels of the image for one of the reference, turns the errors of the reference's positions into those of
    the image; `degree` is the highest that the map may have.
    """
    offered = i, j, degree
    for _ in range(_ROUNDS):
        if len(i) < min_matches:
            raise RegistrationError(f"matched stars must be at least {min_matches}, got {len(i)}")
        sigma = np.sqrt((scale * a.sigma[i]) ** 2 + b.sigma[j] ** 2 + FLOOR**2)
        fit = fit_map(a.xy[i], b.xy[j], sigma, degree)
        distance = np.hypot(*(fit.apply(a.xy[i]) - b.xy[j]).T)
        relative = distance / sigma
        keep = relative <= 4 * max(float(median(relative)), 1.0)
        if keep.all():
            break
        i, j = i[keep], j[keep]
    rms = math.sqrt((relative**2).sum() / (sigma**-2).sum())
    free = 2 * len(relative) - fit.parameters
    excess = float((relative**2).sum()) / max(free, 1)
    if a.measured or b.measured or free < 10:  # errors that were guessed can also be too large
        excess = max(excess, 1.0)
    return _Fit(fit, i, j, rms, float(distance.max()), excess, offered)


def _verify(predicted: NDArray, measured: _Stars, route: str) -> int:
    """Refuse what chance could give; return how many reference stars were expected among the image's.

    A start is what the route guesses: for a shift one pair of stars, for a similarity two, whose agreement comes free.
    Of the others n fall on the image, and each meets a star by chance with p = 1 - exp(-density pi r^2). The expected
    number of chance solutions is (starts) P(binomial(n, p) >= found), for the most telling of some radii r.
    """
    low, high = measured.bounds
    inside = predicted[np.all((predicted >= low) & (predicted <= high), axis=1)]
    density = max(measured.density, _crowding(inside, measured.tree))
    n, m = len(predicted), len(measured.good)
    k, h = min(n, MOST_STARS), min(m, MOST_STARS)
    # a fitted rotation and scale can turn misses of 3 px (how far the routes look) into hits, but only for shifts
    starts, free, radii = {
        "id": (2 * HYPOTHESES, 2, (0.2, 0.5, TOLERANCE)), "sky": (n * m, 1, (3.0,)), "offset": (8 * n * m, 1, (3.0,)),
    }.get(route, (k * (k - 1) * h * (h - 1), 2, (0.2, 0.5, TOLERANCE)))  # fmt: skip
    distance = neighbours_with_distance(inside, measured.tree, radii[-1])[2]
    found = np.array([np.count_nonzero(distance <= radius) for radius in radii])
    by_chance = 1 - np.exp(-density * np.pi * np.square(radii))
    more = np.where(found > free, bdtrc(found - free - 1, max(len(inside) - free, 1), by_chance), 1.0)
    chance = len(radii) * starts * float(more.min())
    if not chance < 1e-3:
        raise RegistrationError(
            f"matched pairs must be more than chance gives, got {found[-1]} of {len(inside)} expected "
            f"({chance:.2g} chance solutions)"
        )
    return len(inside)


def _crowding(predicted: NDArray, measured: KDTree, near: float = 3.0, far: float = 20.0) -> float:
    """Stars per square pixel around the predicted ones, themselves left out: in a cluster chance neighbours abound."""
    if not len(predicted):
        return 0.0
    within = [measured.query_ball_point(predicted, r, return_length=True) for r in (near, far)]
    return float(np.mean(within[1] - within[0])) / (np.pi * (far**2 - near**2))

