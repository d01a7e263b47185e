"""Which star of one list is which of another: by id, by place on the sky, by a common offset, by pattern."""

from __future__ import annotations

import numpy as np
from astropy.coordinates import SkyCoord
from astropy.table import Table
from astropy.wcs import WCS
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import KDTree

from gpudia.errors import InputError, RegistrationError

__all__ = ["ORIENTATIONS", "ROUTES", "match_stars", "mutual_neighbours", "positions"]

#: The ways to match, best first.
ROUTES = ("id", "sky", "offset", "pattern")

#: The quarter turns and mirrors of the plane.
ORIENTATIONS = tuple(
    np.array(m) for m in (
        ((1, 0), (0, 1)), ((-1, 0), (0, -1)), ((0, -1), (1, 0)), ((0, 1), (-1, 0)),
        ((-1, 0), (0, 1)), ((1, 0), (0, -1)), ((0, 1), (1, 0)), ((0, -1), (-1, 0)),
    )
)  # fmt: skip

Pairs = tuple[NDArray[np.intp], NDArray[np.intp]]


def match_stars(
    reference_stars: Table,
    stars: Table,
    route: str,
    *,
    reference_wcs: WCS | None = None,
    wcs: WCS | None = None,
    max_offset: float = 90.0,
) -> Pairs:
    """Find pairs of the same star in two lists, by one route.

    Parameters
    ----------
    reference_stars, stars : Table
        With ``x, y`` (0-based pixels), brightest first or with ``flux``; ``id``, ``ra, dec`` where there are any.
    route : {"id", "sky", "offset", "pattern"}
        ``id``: same id, where both lists have ids from a catalog (``meta["ids"]``). ``sky``: same place on the sky,
        after the one offset that makes most stars agree (a WCS can be off by tens of arcsec). ``offset``: the same
        with pixels: any shift, after any quarter turn or mirror (a flipped pier). ``pattern``: similar triangles
        [astroalign], any rotation and scale, mirrored too.
    reference_wcs, wcs : WCS, optional
        For ``sky``, where a list has no ``ra, dec``.
    max_offset : float
        For ``sky``: largest offset to look for, arcsec.

    Returns
    -------
    i, j : ndarray of int
        Row i[k] of `reference_stars` and row j[k] of `stars` may be the same star. A starting point that can hold wrong
        pairs: `gpudia.images.register` refines and verifies it.

    Raises
    ------
    RegistrationError
        The lists lack what the route needs, or no solution was found.
    InputError
        No such route.
    """
    if route == "id":
        return _by_id(reference_stars, stars)
    if route == "sky":
        return _by_sky(reference_stars, stars, reference_wcs, wcs, max_offset)
    a, b = positions(reference_stars), positions(stars)
    if route == "offset":
        return _by_turns(a, b, _by_flux(reference_stars), _by_flux(stars))
    if route == "pattern":
        return _by_pattern(a, b, _by_flux(reference_stars), _by_flux(stars))
    raise InputError(f"route must be one of {ROUTES}, got {route!r}")


def positions(stars: Table) -> NDArray[np.float64]:
    """(x, y) of a list of stars, shape (N, 2)."""
    return np.column_stack([np.asarray(stars["x"], float), np.asarray(stars["y"], float)])


def mutual_neighbours(a: NDArray, b: NDArray, radius: float) -> Pairs:
    """Pairs that are each other's nearest neighbour and not further apart than `radius`; shapes (N, 2), (M, 2)."""
    if not len(a) or not len(b):
        return np.zeros(0, np.intp), np.zeros(0, np.intp)
    distance, j = KDTree(b).query(a)
    _, back = KDTree(a).query(b)
    i = np.flatnonzero((distance <= radius) & (back[j] == np.arange(len(a))))
    return i, j[i]


def _by_flux(stars: Table, count: int = 300) -> NDArray[np.intp]:
    """Rows of the brightest stars, brightest first."""
    if "flux" not in stars.colnames:
        return np.arange(len(stars))[:count]
    return np.argsort(-np.nan_to_num(np.asarray(stars["flux"], float), nan=-np.inf), kind="stable")[:count]


def _by_id(reference_stars: Table, stars: Table) -> Pairs:
    if any(s.meta.get("ids") != "catalog" for s in (reference_stars, stars)):
        raise RegistrationError("no ids from a catalog in both lists")
    first, second = (np.asarray(s["id"]).astype(str) for s in (reference_stars, stars))
    shared, i, j = np.intersect1d(first, second, return_indices=True)
    if len(shared) < 3:
        raise RegistrationError(f"ids in common must be at least 3, got {len(shared)}")
    return i, j


def _by_sky(
    reference_stars: Table, stars: Table, reference_wcs: WCS | None, wcs: WCS | None, max_offset: float
) -> Pairs:
    """Project both lists on the plane that touches the sky at the reference's middle, in reference pixels."""
    first, second = _sky(reference_stars, reference_wcs), _sky(stars, wcs)
    middle = SkyCoord(*np.median(first.cartesian.xyz, axis=1), representation_type="cartesian").spherical
    origin = SkyCoord(middle.lon, middle.lat, frame="icrs").skyoffset_frame()
    planes = []
    for sky in (first, second):
        local = sky.transform_to(origin)
        planes.append(np.column_stack([local.lon.wrap_at("180d").arcsec, local.lat.arcsec]))
    xy = positions(reference_stars)
    scale = float(np.sqrt(np.var(planes[0], axis=0).sum() / np.var(xy, axis=0).sum()))  # arcsec per pixel
    if not (np.isfinite(scale) and scale > 0):
        raise RegistrationError("sky positions of the reference stars must differ, got one place")
    a, b = planes[0] / scale, planes[1] / scale
    reach = min(max_offset / scale, float(np.ptp(xy, axis=0).max()))
    return _by_offset(a, b, _by_flux(reference_stars), _by_flux(stars), max_offset=reach)


def _sky(stars: Table, wcs: WCS | None) -> SkyCoord:
    if {"ra", "dec"} <= set(stars.colnames):
        return SkyCoord(np.asarray(stars["ra"], float), np.asarray(stars["dec"], float), unit="deg")
    if wcs is None:
        raise RegistrationError("no sky positions and no WCS in both lists")
    return SkyCoord(*wcs.pixel_to_world_values(*positions(stars).T), unit="deg")


def _by_offset(a: NDArray, b: NDArray, bright_a: NDArray, bright_b: NDArray, max_offset: float) -> Pairs:
    """Pairs after the shift on which most differences between bright stars agree."""
    cell = 2.0  # pixels
    difference = (b[bright_b][None] - a[bright_a][:, None]).reshape(-1, 2)
    difference = difference[(np.abs(difference) <= max_offset).all(axis=1)]
    if not len(difference):
        raise RegistrationError(f"no star within {max_offset:.0f} px of another of the reference")
    edges = np.arange(-max_offset - cell, max_offset + 2 * cell, cell)
    counts, _, _ = np.histogram2d(difference[:, 0], difference[:, 1], bins=[edges, edges])
    smooth = ndimage.gaussian_filter(counts, 1.0, mode="constant")  # the true offset can lie on the edge of cells
    at = np.unravel_index(np.argmax(smooth), smooth.shape)
    offset = np.array([edges[k] + cell / 2 for k in at])
    for radius in (2.0 * cell, 1.5 * cell, cell):
        near = difference[np.hypot(*(difference - offset).T) <= radius]
        offset = np.median(near, axis=0) if len(near) else offset
    return mutual_neighbours(a + offset, b, radius=3.0)


def _by_turns(a: NDArray, b: NDArray, bright_a: NDArray, bright_b: NDArray) -> Pairs:
    """Common offset after the quarter turn or mirror that gives most pairs; unturned if that pairs half the stars."""
    a, b = a - (a.min(axis=0) + a.max(axis=0)) / 2, b - (b.min(axis=0) + b.max(axis=0)) / 2
    reach = float(max(np.ptp(a, axis=0).max(), np.ptp(b, axis=0).max())) / 2
    best: Pairs = (np.zeros(0, np.intp), np.zeros(0, np.intp))
    for turn in ORIENTATIONS:
        try:
            pairs = _by_offset(a @ turn.T, b, bright_a, bright_b, max_offset=max(reach, 10.0))
        except RegistrationError:
            continue
        if len(pairs[0]) > len(best[0]):
            best = pairs
        if len(pairs[0]) > 0.5 * min(len(a), len(b)):
            break
    return best


def _by_pattern(a: NDArray, b: NDArray, bright_a: NDArray, bright_b: NDArray) -> Pairs:
    """Similar triangles among the brightest stars, as they are or mirrored.

    astroalign draws from an unseeded generator, so its transformation can differ in the last digits from call to call;
    the pairs near it do not, and only they are handed on.
    """
    import astroalign  # late: it takes a while to import and most frames have a WCS

    best: Pairs = (np.zeros(0, np.intp), np.zeros(0, np.intp))
    for count, sign in ((20, 1.0), (20, -1.0), (40, 1.0), (40, -1.0)):
        source, target = a[bright_a[:count]] * (sign, 1.0), b[bright_b[:count]]
        try:
            found, _ = astroalign.find_transform(source, target, max_control_points=count)
        except (astroalign.MaxIterError, ValueError, TypeError, IndexError, np.linalg.LinAlgError):
            continue  # too few stars, or no similar triangles among so many
        pairs = mutual_neighbours(found(a * (sign, 1.0)), b, radius=3.0)
        if len(pairs[0]) > len(best[0]):
            best = pairs
        if len(pairs[0]) > 0.4 * min(len(a), len(b)):
            break
    if len(best[0]) < 3:
        raise RegistrationError("no common pattern of stars found")
    return best
