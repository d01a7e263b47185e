"""The transformation from the reference's pixels to those of an image, fitted to matched stars and verified."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from astropy.table import Table
from astropy.wcs import WCS
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom

from gpudia.errors import RegistrationError
from gpudia.flags import SOURCE_FLAGS
from gpudia.images.cutouts import Region
from gpudia.images.matching import ORIENTATIONS, ROUTES, match_stars, mutual_neighbours, positions

__all__ = ["Registration", "identity_registration", "register"]

#: Largest distance of a matched pair in the last round, pixels.
TOLERANCE = 1.5
#: Added to every centroid's error, pixels: undersampling and distortion limit the brightest stars.
FLOOR = 0.02
#: Stars from which on an affine transformation may be fitted, and not a similarity.
AFFINE_STARS = 10


@dataclass(frozen=True)
class Registration:
    """A linear transformation between full-frame coordinates, and how well it is known.

    Attributes
    ----------
    matrix : ndarray, shape (2, 3)
        ``image_xy = matrix[:, :2] @ reference_xy + matrix[:, 2]``, 0-based pixels.
    n_matched : int
        Stars in the fit.
    rms : float
        Root of the mean squared distance between predicted and measured positions, weighted as in the fit, pixels.
    max_residual : float
        Largest such distance, pixels.
    route : str
        ``id``, ``sky``, ``offset``, ``pattern`` (`gpudia.images.match_stars`) or ``none``.
    n_expected : int
        Reference stars that fall within the area of the image's stars.
    """

    matrix: NDArray[np.float64]
    n_matched: int = 0
    rms: float = 0.0
    max_residual: float = 0.0
    route: str = "none"
    n_expected: int = 0

    def apply(self, xy: ArrayLike) -> NDArray[np.float64]:
        """Reference positions (x, y), shape (..., 2), to image positions."""
        return _moved(self.matrix, np.asarray(xy, float))

    def inverse(self) -> Registration:
        """Return the transformation from the image to the reference."""
        turn = np.linalg.inv(self.matrix[:, :2])
        matrix = np.column_stack([turn, -turn @ self.matrix[:, 2]])
        return Registration(matrix, self.n_matched, self.rms, self.max_residual, self.route, self.n_expected)

    def shift_at(self, x: float, y: float) -> tuple[int, int]:
        """Whole-pixel shift (dx, dy) that takes the reference position (x, y) nearest to its place on the image."""
        dx, dy = np.floor(self.apply((x, y)) - (x, y) + 0.5).astype(int)
        return int(dx), int(dy)

    def displacement(self, region: Region) -> float:
        """Largest displacement over a region that a shift cannot take away, pixels.

        That is ``max |(A - 1)(x - centre)|`` over the region's corners: rotation, scale and shear, but not the fraction
        of a pixel that is left of the shift at the centre, which the kernel absorbs without loss.
        """
        return float(np.hypot(*((region.corners - region.centre) @ (self.matrix[:, :2] - np.eye(2)).T).T).max())

    def orientation(self) -> NDArray[np.int_]:
        """Return the quarter turn or mirror (2 x 2, entries 0 and +-1) nearest to the transformation."""
        return min(ORIENTATIONS, key=lambda turn: float(np.sum((self.matrix[:, :2] - turn) ** 2)))


def identity_registration() -> Registration:
    """Return the transformation for images that are registered already: nothing moves, nothing was matched."""
    return Registration(np.eye(2, 3))


class _Fit(NamedTuple):
    matrix: NDArray[np.float64]
    i: NDArray[np.intp]
    j: NDArray[np.intp]
    rms: float
    max_residual: float


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

    Every route of `match_stars` is tried in turn, until one passes: from its pairs a first transformation, then rounds
    of matching the nearest stars, fitting with weights from the centroid errors, and clipping. A solution is believed
    when it has enough stars, its rms is small, and chance would hardly give so many pairs within 1.5 px: the expected
    number of chance solutions, (pairs of stars to start from) times P(binomial >= n - 2), must be below 0.001.

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
        A similarity (also mirrored), or an affine transformation where at least 10 stars ask for it (BIC).

    Raises
    ------
    RegistrationError
        No route gave a solution to be believed; says what each one found.
    """
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


def _solve(
    reference_stars: Table, stars: Table, pairs: tuple[NDArray, NDArray], route: str, max_rms: float, min_matches: int
) -> Registration:
    a, b = positions(reference_stars), positions(stars)
    sigma_a, sigma_b = _centroid_errors(reference_stars), _centroid_errors(stars)
    good_a, good_b = _good(reference_stars), _good(stars)
    fit = _first_fit(a, b, *pairs)
    for tolerance in (4.0, 2.0, TOLERANCE, TOLERANCE, TOLERANCE):
        before = fit
        i, j = mutual_neighbours(_moved(fit.matrix, a[good_a]), b[good_b], tolerance)
        i, j = np.flatnonzero(good_a)[i], np.flatnonzero(good_b)[j]
        fit = _clipped_fit(a, b, i, j, sigma_a, sigma_b, min_matches)
        if np.array_equal(fit.i, before.i) and np.array_equal(fit.j, before.j):
            break
    if not fit.rms <= max_rms:
        raise RegistrationError(f"rms must be at most {max_rms} px, got {fit.rms:.3f} from {len(fit.i)} stars")
    expected = _verify(_moved(fit.matrix, a[good_a]), b[good_b], route)
    return Registration(fit.matrix, len(fit.i), fit.rms, fit.max_residual, route, expected)


def _moved(matrix: NDArray, xy: NDArray) -> NDArray[np.float64]:
    return xy @ matrix[:, :2].T + matrix[:, 2]


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


def _first_fit(a: NDArray, b: NDArray, i: NDArray, j: NDArray) -> _Fit:
    """Similarity through the majority of the pairs; wrong pairs (a wrong id, a chance neighbour) drop out."""
    if len(i) < 3:
        raise RegistrationError(f"matched stars must be at least 3, got {len(i)}")
    keep = np.ones(len(i), bool)
    for _ in range(10):
        matrix = _similarity(a[i[keep]], b[j[keep]], np.ones(keep.sum()))
        distance = np.hypot(*(_moved(matrix, a[i]) - b[j]).T)
        inside = distance <= max(2.5 * float(np.median(distance)), 1.0)
        if np.array_equal(inside, keep) or inside.sum() < 3:
            break
        keep = inside
    return _Fit(matrix, i[keep], j[keep], float("inf"), float("inf"))


def _clipped_fit(
    a: NDArray, b: NDArray, i: NDArray, j: NDArray, sigma_a: NDArray, sigma_b: NDArray, min_matches: int
) -> _Fit:
    """Weighted fit of the pairs; those further off than 4 times what is typical for their errors are dropped."""
    for _ in range(5):
        if len(i) < min_matches:
            raise RegistrationError(f"matched stars must be at least {min_matches}, got {len(i)}")
        sigma = np.sqrt(sigma_a[i] ** 2 + sigma_b[j] ** 2 + FLOOR**2)
        matrix = _linear(a[i], b[j], 1 / sigma)
        distance = np.hypot(*(_moved(matrix, a[i]) - b[j]).T)
        relative = distance / sigma
        keep = relative <= 4 * max(float(np.median(relative)), 1.0)
        if keep.all():
            break
        i, j = i[keep], j[keep]
    rms = float(np.sqrt(np.average(distance**2, weights=sigma**-2)))
    return _Fit(matrix, i, j, rms, float(distance.max()))


def _linear(a: NDArray, b: NDArray, weight: NDArray) -> NDArray[np.float64]:
    """Similarity, or affine where the two parameters more are worth it by Schwarz' criterion (BIC).

    In crowded fields, where blends move the centroids, a needless affine term costs half the accuracy at the corners.
    """
    simple = _similarity(a, b, weight)
    if len(a) < AFFINE_STARS:
        return simple
    full = _affine(a, b, weight)
    rest = [float(np.sum(((_moved(m, a) - b) * weight[:, None]) ** 2)) for m in (simple, full)]
    n = 2 * len(a)
    return full if rest[0] > rest[1] * n ** (2 / n) else simple


def _affine(a: NDArray, b: NDArray, weight: NDArray) -> NDArray[np.float64]:
    """Weighted least squares; `weight` multiplies the equations. Coordinates are taken from their means."""
    origin = a.mean(axis=0)
    design = np.column_stack([a - origin, np.ones(len(a))]) * weight[:, None]
    solution = np.linalg.lstsq(design, b * weight[:, None], rcond=None)[0].T
    return np.column_stack([solution[:, :2], solution[:, 2] - solution[:, :2] @ origin])


def _similarity(a: NDArray, b: NDArray, weight: NDArray) -> NDArray[np.float64]:
    """Weighted rotation, scale and shift, mirrored or not, whichever fits better [Umeyama 1991 solves the same].

    With z = x + iy the transformation is z' = p z + q, mirrored z' = p conj(z) + q: linear in p and q.
    """
    mass = weight**2 / np.sum(weight**2)
    mean_a, mean_b = mass @ a, mass @ b
    z, w = ((v - m) @ (1, 1j) for v, m in ((a, mean_a), (b, mean_b)))
    if not np.sum(mass * np.abs(z) ** 2) > 0:
        raise RegistrationError("matched stars must differ in position, got one place")
    best = None
    for mirrored in (False, True):
        u = z.conj() if mirrored else z
        p = np.sum(mass * u.conj() * w) / np.sum(mass * np.abs(u) ** 2)
        misfit = float(np.sum(mass * np.abs(w - p * u) ** 2))
        if best is None or misfit < best[0]:
            sign = -1 if mirrored else 1
            best = misfit, np.array([[p.real, -sign * p.imag], [p.imag, sign * p.real]])
    turn = best[1]  # type: ignore[index]
    return np.column_stack([turn, mean_b - turn @ mean_a])


def _verify(predicted: NDArray, measured: NDArray, route: str) -> int:
    """Refuse what chance could give; return how many reference stars were expected among the image's."""
    low, high = measured.min(axis=0) - TOLERANCE, measured.max(axis=0) + TOLERANCE
    inside = predicted[np.all((predicted >= low) & (predicted <= high), axis=1)]
    found = len(mutual_neighbours(inside, measured, TOLERANCE)[0])
    by_chance = 1 - np.exp(-len(measured) * np.pi * TOLERANCE**2 / float(np.prod(high - low)))
    # Two pairs fix a similarity, so two agreements come free; ids are no guess, every other route tries many starts.
    starts = 1 if route == "id" else len(predicted) * len(measured)
    chance = starts * float(binom.sf(found - 3, max(len(inside) - 2, 1), by_chance))
    if not chance < 1e-3:
        raise RegistrationError(
            f"matched pairs must be more than chance gives, got {found} of {len(inside)} expected "
            f"({chance:.2g} chance solutions)"
        )
    return len(inside)
