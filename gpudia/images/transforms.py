"""The transformation from the reference's pixels to those of an image, and how well it is known."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpudia.errors import InputError
from gpudia.images.cutouts import Region

__all__ = ["ORIENTATIONS", "Registration", "identity_registration", "monomials"]

#: The quarter turns and mirrors of the plane.
ORIENTATIONS = tuple(
    np.array(m) for m in (
        ((1, 0), (0, 1)), ((-1, 0), (0, -1)), ((0, -1), (1, 0)), ((0, 1), (-1, 0)),
        ((-1, 0), (0, 1)), ((1, 0), (0, -1)), ((0, 1), (1, 0)), ((0, -1), (-1, 0)),
    )
)  # fmt: skip

#: Number of terms by degree, and the degree by their number.
_COUNTS = {1: 3, 2: 6, 3: 10}
_DEGREES = {count: degree for degree, count in _COUNTS.items()}
#: Powers of x and y in the terms of degree 2 and 3.
_POWERS = ((2, 0), (1, 1), (0, 2), (3, 0), (2, 1), (1, 2), (0, 3))


def monomials(xy: ArrayLike, degree: int) -> NDArray[np.float64]:
    """Values of x, y, 1; x^2, x y, y^2; x^3, ... at positions of shape (..., 2): shape (..., 3, 6 or 10)."""
    xy = np.asarray(xy, float)
    x, y = xy[..., 0], xy[..., 1]
    terms = np.empty((*x.shape, _COUNTS[degree]))
    terms[..., 0], terms[..., 1], terms[..., 2] = x, y, 1.0
    for k, (i, j) in enumerate(_POWERS[:_COUNTS[degree] - 3], 3):
        terms[..., k] = x**i * y**j
    return terms


@dataclass(frozen=True)
class Registration:
    """A transformation between full-frame coordinates, and how well it is known.

    The image's position of a reference position p is ``matrix[:, :2] @ p + matrix[:, 2] + terms @ m(p - origin)`` with
    m the monomials x^2, x y, y^2, x^3, ...; 0-based pixels. Without terms that is an affine map.

    Attributes
    ----------
    matrix : ndarray, shape (2, 3)
        Linear part: the tangent of the map at `origin`.
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
    kind : str
        ``shift`` (images that are registered already), ``similarity``, ``affine`` or ``polynomial``.
    terms : ndarray, shape (2, 0), (2, 3) or (2, 7)
        Coefficients of the terms of degree 2 and 3.
    origin : ndarray, shape (2,)
        Reference position that terms and covariance are counted from.
    covariance : ndarray, shape (k, k)
        Of the coefficients of either axis, in the order of `monomials` of p - origin, pixels^2.
    """

    matrix: NDArray[np.float64]
    n_matched: int = 0
    rms: float = 0.0
    max_residual: float = 0.0
    route: str = "none"
    n_expected: int = 0
    kind: str = "shift"
    terms: NDArray[np.float64] = field(default_factory=lambda: np.zeros((2, 0)))
    origin: NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))
    covariance: NDArray[np.float64] = field(default_factory=lambda: np.zeros((3, 3)))

    def __post_init__(self) -> None:
        if np.shape(self.matrix) != (2, 3) or 3 + np.shape(self.terms)[-1] not in _DEGREES:
            raise InputError("matrix must have the shape (2, 3) and terms (2, 0), (2, 3) or (2, 7), got "
                             f"{np.shape(self.matrix)} and {np.shape(self.terms)}")  # fmt: skip

    @property
    def degree(self) -> int:
        """Of the polynomial: 1 for an affine map."""
        return _DEGREES[3 + self.terms.shape[1]]

    def apply(self, xy: ArrayLike) -> NDArray[np.float64]:
        """Reference positions (x, y), shape (..., 2), to image positions."""
        xy = np.asarray(xy, float)
        return xy @ self.matrix[:, :2].T + self.matrix[:, 2] + self._bend(xy)

    def _bend(self, xy: NDArray) -> NDArray[np.float64]:
        """Part of the map beyond the linear one."""
        if not self.terms.shape[1]:
            return np.zeros_like(xy)
        return monomials(xy - self.origin, self.degree)[..., 3:] @ self.terms.T

    def to_reference(self, xy: ArrayLike) -> NDArray[np.float64]:
        """Image positions (x, y), shape (..., 2), to reference positions: the inverse of `apply`.

        The bend is small against the linear part, so p <- A^-1 (p' - t - bend(p)) converges quickly.
        """
        xy = np.asarray(xy, float)
        back = np.linalg.inv(self.matrix[:, :2]).T
        found = (xy - self.matrix[:, 2]) @ back
        for _ in range(50 if self.terms.shape[1] else 0):
            before, found = found, (xy - self.matrix[:, 2] - self._bend(found)) @ back
            if np.abs(found - before).max(initial=0) < 1e-10:
                break
        return found

    def local(self, region: Region) -> tuple[NDArray[np.float64], float]:
        """Affine map (2, 3) that is nearest to this one over a region, and its largest distance from it there, pixels.

        Least squares over a lattice of points, in full-frame coordinates. The map itself and 0 without terms.
        """
        if not self.terms.shape[1]:
            return self.matrix, 0.0
        points = _lattice(region)
        design = monomials(points - region.centre, 1)
        there = self.apply(points)
        fit = np.linalg.lstsq(design, there, rcond=None)[0].T
        deviation = float(np.hypot(*(there - design @ fit.T).T).max())
        return np.column_stack([fit[:, :2], fit[:, 2] - fit[:, :2] @ region.centre]), deviation

    def coefficients(self, region: Region) -> NDArray[np.float64]:
        """Coefficients of the map as a polynomial in a region's own pixels, shape (2, 3), (2, 6) or (2, 10).

        They multiply the `monomials` x, y, 1, x^2, x y, y^2, ... and give full-frame positions on the image.
        """
        if not self.terms.shape[1]:
            return np.column_stack([self.matrix[:, :2], self.matrix[:, :2] @ region.origin + self.matrix[:, 2]])
        points, side = _lattice(region), float(max(region.shape))
        design = monomials((points - region.origin) / side, self.degree)  # a polynomial: the fit is exact
        return np.linalg.lstsq(design, self.apply(points), rcond=None)[0].T / monomials((side, side), self.degree)

    def shift_at(self, x: float, y: float) -> tuple[int, int]:
        """Whole-pixel shift (dx, dy) that takes the reference position (x, y) nearest to its place on the image."""
        dx, dy = np.floor(self.apply((x, y)) - (x, y) + 0.5).astype(int)
        return int(dx), int(dy)

    def displacement(self, region: Region, turn: ArrayLike | None = None) -> float:
        """Largest displacement over a region that a shift cannot take away, pixels.

        That is ``max |(A - turn)(x - centre) + bend(x) - bend(centre)|`` over a lattice with the region's corners:
        rotation, scale, shear and bend, but not the fraction of a pixel that is left of the shift at the centre, which
        the kernel absorbs without loss.

        Parameters
        ----------
        region : Region
            In the reference's full-frame coordinates.
        turn : array_like, shape (2, 2), optional
            Quarter turn or mirror that is taken away too; default: none.
        """
        points, centre = _lattice(region), np.array(region.centre)
        linear = self.matrix[:, :2] - (np.eye(2) if turn is None else np.asarray(turn))
        return float(np.hypot(*((points - centre) @ linear.T + self._bend(points) - self._bend(centre)).T).max())

    def uncertainty(self, region: Region) -> float:
        """Predicted error of mapped positions over a region, pixels: sqrt(sigma_x^2 + sigma_y^2) at its worst point.

        From the covariance of the fit, scaled up where the residuals exceed the centroid errors, and to the residuals
        where the lists state no errors: grows outside the area of the matched stars. 0 where nothing was fitted.
        """
        terms = monomials(_lattice(region) - self.origin, _DEGREES[len(self.covariance)])
        variance = np.einsum("nk,kl,nl->n", terms, self.covariance, terms)
        return float(np.sqrt(2 * variance.max(initial=0.0)))

    def orientation(self) -> NDArray[np.int_]:
        """Return the quarter turn or mirror (2 x 2, entries 0 and +-1) nearest to the transformation."""
        return min(ORIENTATIONS, key=lambda turn: float(np.sum((self.matrix[:, :2] - turn) ** 2)))


@lru_cache(maxsize=16)
def _lattice(region: Region, points: int = 9) -> NDArray[np.float64]:
    """Full-frame (x, y) of points x points positions over a region, its corners and its centre among them."""
    first, last = region.corners[0], region.corners[2]
    x, y = (np.linspace(first[k], last[k], points) for k in (0, 1))
    positions = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    positions.flags.writeable = False  # shared by all frames of a run
    return positions


def identity_registration() -> Registration:
    """Return the transformation for images that are registered already: nothing moves, nothing was matched."""
    return Registration(np.eye(2, 3))
