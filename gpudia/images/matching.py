"""Which star of one list is which of another: by id, by place on the sky, by a common offset, by pattern."""

from __future__ import annotations

import math

import numpy as np
from astropy.table import Table
from astropy.wcs import WCS
from numpy.typing import NDArray
from scipy.spatial import KDTree

from gpudia.errors import InputError, RegistrationError
from gpudia.images.patterns import MOST_STARS, similar_triangles
from gpudia.images.smoothing import gaussian, smoothed
from gpudia.images.transforms import ORIENTATIONS

__all__ = ["ROUTES", "match_stars", "median", "mutual_neighbours", "neighbours_with_distance", "positions"]

#: The ways to match, best first.
ROUTES = ("id", "sky", "offset", "pattern")

#: So many pairs are no chance, where they are also a good share of the stars: the search can end.
_CLEAR = 10

#: Largest offset to look for, pixels: the search takes memory by its square.
_FARTHEST = 6000.0

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
        with pixels: any shift, after any quarter turn or mirror (a flipped pier). ``pattern``: similar triangles,
        any rotation and scale, mirrored too. Every route gives the same pairs from call to call.
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


def median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Median along the first axis of one value or more; as `numpy.median` for finite ones, for few in less time."""
    ordered, last = np.sort(values, axis=0), len(values) - 1
    return (ordered[last // 2] + ordered[(last + 1) // 2]) / 2


def mutual_neighbours(a: NDArray, b: NDArray | KDTree, radius: float) -> Pairs:
    """Pairs that are each other's nearest neighbour and not further apart than `radius`; shapes (N, 2), (M, 2).

    `b` may also be the tree of its positions, for those who ask often.
    """
    return neighbours_with_distance(a, b if isinstance(b, KDTree) else KDTree(b), radius)[:2]


def neighbours_with_distance(
    a: NDArray, tree: KDTree, radius: float
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
    """`mutual_neighbours`, and how far apart they are: of a smaller radius they are those that are no further apart."""
    if not len(a) or not tree.n:
        return np.zeros(0, np.intp), np.zeros(0, np.intp), np.zeros(0)
    beyond = np.nextafter(radius, np.inf)  # nothing is looked for from there on
    distance, j = tree.query(a, distance_upper_bound=beyond)
    i = np.flatnonzero(distance <= radius)
    j = j[i]
    _, back = KDTree(a).query(tree.data[j], distance_upper_bound=beyond)
    mutual = back == i
    return i[mutual], j[mutual], distance[i[mutual]]


def _by_flux(stars: Table, rows: NDArray[np.intp] | slice = slice(None), count: int = 300) -> NDArray[np.intp]:
    """Of some rows the places of the brightest stars, brightest first."""
    if "flux" not in stars.colnames:
        return np.arange(len(np.arange(len(stars))[rows]))[:count]
    flux = np.asarray(stars["flux"], float)[rows]
    return np.argsort(-np.nan_to_num(flux, nan=-np.inf), kind="stable")[:count]


def _by_id(reference_stars: Table, stars: Table) -> Pairs:
    if any(s.meta.get("ids") != "catalog" for s in (reference_stars, stars)):
        raise RegistrationError("no ids from a catalog in both lists")
    first, second = (_single(np.asarray(s["id"]).astype(str)) for s in (reference_stars, stars))
    shared, i, j = np.intersect1d(first[0], second[0], assume_unique=True, return_indices=True)
    if len(shared) < 3:
        raise RegistrationError(f"ids in common must be at least 3, got {len(shared)}")
    return first[1][i], second[1][j]


def _single(ids: NDArray) -> tuple[NDArray, NDArray[np.intp]]:
    """Ids that occur once, and their rows: which of two stars with one id is meant, nobody knows."""
    values, rows, counts = np.unique(ids, return_index=True, return_counts=True)
    return values[counts == 1], rows[counts == 1]


def _by_sky(
    reference_stars: Table, stars: Table, reference_wcs: WCS | None, wcs: WCS | None, max_offset: float
) -> Pairs:
    """Project both lists on the plane that touches the sky at the reference's middle, in reference pixels."""
    (first, rows_a), (second, rows_b) = _sky(reference_stars, reference_wcs), _sky(stars, wcs)
    middle = median(first)
    planes = [_offsets(middle, sky) for sky in (first, second)]
    xy = positions(reference_stars)[rows_a]
    scale = _reach(planes[0]) / max(_reach(xy), 1e-9)  # arcsec per pixel
    if not (np.isfinite(scale) and scale > 0):
        raise RegistrationError("sky positions of the reference stars must differ, got one place")
    a, b = planes[0] / scale, planes[1] / scale
    bright_a, bright_b = (_by_flux(s, rows) for s, rows in ((reference_stars, rows_a), (stars, rows_b)))
    reach = min(max_offset / scale, 4 * _reach(xy))
    i, j = _by_offset(a, b, bright_a, bright_b, max_offset=max(reach, 10.0))
    return rows_a[i], rows_b[j]


def _reach(xy: NDArray) -> float:
    """Median distance from the median position: a few wild positions do not change it."""
    return float(median(np.hypot(*(xy - median(xy)).T)))


def _sky(stars: Table, wcs: WCS | None) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Directions on the sky, unit vectors (N, 3), and the rows that have one."""
    if {"ra", "dec"} <= set(stars.colnames):
        ra, dec = (np.asarray(stars[c], float) for c in ("ra", "dec"))
    elif wcs is not None:
        ra, dec = wcs.pixel_to_world_values(*positions(stars).T)
    else:
        raise RegistrationError("no sky positions and no WCS in both lists")
    rows = np.flatnonzero(np.isfinite(ra) & (np.abs(dec) <= 90))
    if len(rows) < 3:
        raise RegistrationError(f"stars with a sky position must be at least 3, got {len(rows)}")
    lon, lat = np.radians(ra[rows]), np.radians(dec[rows])
    return np.column_stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)]), rows


def _offsets(middle: NDArray, directions: NDArray) -> NDArray[np.float64]:
    """Longitude and latitude, arcsec, where the middle is at 0, 0 and north is up, as astropy's sky offset frames."""
    lon, lat = np.arctan2(middle[1], middle[0]), np.arctan2(middle[2], np.hypot(*middle[:2]))
    east = np.array([-np.sin(lon), np.cos(lon), 0])
    away = np.array([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)])
    x, y, z = np.stack([away, east, np.cross(away, east)]) @ directions.T
    return np.degrees(np.column_stack([np.arctan2(y, x), np.arctan2(z, np.hypot(x, y))])) * 3600


def _by_offset(a: NDArray, b: NDArray, bright_a: NDArray, bright_b: NDArray, max_offset: float) -> Pairs:
    """Pairs after the shift on which most differences between bright stars agree."""
    cell, max_offset = 2.0, min(max_offset, _FARTHEST)  # pixels
    dx, dy = (b[bright_b, k] - a[bright_a, k][:, None] for k in (0, 1))
    near = np.flatnonzero((np.abs(dx) <= max_offset) & (np.abs(dy) <= max_offset))
    dx, dy = dx.take(near), dy.take(near)
    if not len(dx):
        raise RegistrationError(f"no star within {max_offset:.0f} px of another of the reference")
    first = -max_offset - 5 * cell  # the outermost four stay empty: so they do when they are mirrored
    size = math.ceil(2 * max_offset / cell) + 10
    columns, rows = (((d - first) / cell).astype(np.intp) for d in (dx, dy))
    counts = np.bincount(columns * size + rows, minlength=size**2).reshape(size, size).astype(np.float32)
    smooth = smoothed(counts, gaussian(1.0, 4))  # the true offset can lie on the edge of cells
    offset = first + cell * (np.array(np.unravel_index(np.argmax(smooth), smooth.shape)) + 0.5)
    near = np.flatnonzero((np.abs(dx - offset[0]) < 5 * cell) & (np.abs(dy - offset[1]) < 5 * cell))
    difference = np.column_stack([dx[near], dy[near]])
    for radius in (2.0 * cell, 1.5 * cell, cell):  # which stays within those
        near = difference[np.hypot(*(difference - offset).T) <= radius]
        offset = median(near) if len(near) else offset
    return mutual_neighbours(a + offset, b, radius=3.0)


def _by_turns(a: NDArray, b: NDArray, bright_a: NDArray, bright_b: NDArray) -> Pairs:
    """Common offset after the quarter turn or mirror that gives most pairs; unturned if that pairs half the stars."""
    if not len(a) or not len(b):
        raise RegistrationError(f"stars must be at least 1 in both lists, got {len(a)} and {len(b)}")
    a, b = a - median(a), b - median(b)
    reach = 2 * max(_reach(a), _reach(b))  # 0.75 of the side of an evenly filled square
    best: Pairs = (np.zeros(0, np.intp), np.zeros(0, np.intp))
    for turn in ORIENTATIONS:
        try:
            pairs = _by_offset(a @ turn.T, b, bright_a, bright_b, max_offset=max(reach, 10.0))
        except RegistrationError:
            continue
        if len(pairs[0]) > len(best[0]):
            best = pairs
        if len(pairs[0]) >= max(0.5 * min(len(a), len(b)), _CLEAR):
            break
    return best


def _by_pattern(a: NDArray, b: NDArray, bright_a: NDArray, bright_b: NDArray) -> Pairs:
    """Similar triangles among the brightest stars; of the best of them the one that pairs most stars of all."""
    best: Pairs = (np.zeros(0, np.intp), np.zeros(0, np.intp))
    for count in (MOST_STARS // 2, MOST_STARS):
        for matrix in similar_triangles(a[bright_a[:count]], b[bright_b[:count]]):
            pairs = mutual_neighbours(a @ matrix[:, :2].T + matrix[:, 2], b, radius=3.0)
            if len(pairs[0]) > len(best[0]):
                best = pairs
        if len(best[0]) >= max(0.4 * min(len(a), len(b)), _CLEAR):
            break
    if len(best[0]) < 3:
        raise RegistrationError("no common pattern of stars found")
    return best
