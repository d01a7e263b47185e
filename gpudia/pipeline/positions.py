"""Further positions to be measured, beside the stars of the reference: from a table of the user's."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from astropy.coordinates import SkyCoord
from astropy.table import Table
from numpy.typing import NDArray

from gpudia.errors import ConfigError
from gpudia.images import Region

__all__ = ["check_positions", "read_positions", "with_positions"]

log = logging.getLogger("gpudia.pipeline")


def with_positions(stars: Table, path: str | None, wcs: Any, region: Region) -> Table:
    """Return the table of the reference's stars with the given positions that lie in the region as further rows.

    Parameters
    ----------
    stars : Table
        ``source_id, ra, dec, x, y, x_cutout, y_cutout, flags``.
    path : str or None
        The table of positions; see `read_positions`.
    wcs : WCS or None
        Of the reference frame.
    region : Region

    Raises
    ------
    ConfigError
        As `read_positions`; or an id is one of the stars'.
    """
    if path is None:
        return stars
    ids, xy, sky = read_positions(path, wcs)
    if ids is None:
        ids = np.arange(len(xy)) + 1 + int(np.max(stars["source_id"], initial=0))
    if np.isin(ids, np.asarray(stars["source_id"])).any() or len(set(ids.tolist())) < len(ids):
        raise ConfigError(f"positions must have ids of their own, got one of a star of the reference or twice the same "
                          f"in {path}")
    inside = region.contains(xy)
    if not inside.all():
        log.warning("positions: %d of %d lie outside of the region", (~inside).sum(), len(inside))
    columns = {"source_id": ids, "ra": sky[0], "dec": sky[1], "x": xy[:, 0], "y": xy[:, 1]}
    columns["x_cutout"], columns["y_cutout"] = region.to_cutout(xy).T
    joined = Table(meta=stars.meta)
    for name in stars.colnames:
        own = np.asarray(stars[name])
        blank = np.full(len(xy), np.nan if own.dtype.kind == "f" else 0).astype(own.dtype)
        joined[name] = np.concatenate([own, np.asarray(columns.get(name, blank))[inside].astype(own.dtype)])
        joined[name].info.unit, joined[name].info.description = stars[name].unit, stars[name].description
    return joined


def check_positions(path: str | None) -> None:
    """Check a table of positions as far as that goes without a reference, before any frame is read.

    Parameters
    ----------
    path : str or None
        The table; None: nothing is to be checked.

    Raises
    ------
    ConfigError
        As `read_positions`, but for sky positions where the reference has no WCS; or an id is there twice.
    """
    if path is None:
        return
    ids = _read(path)[0]
    if ids is not None and len(set(ids.tolist())) < len(ids):
        raise ConfigError(f"positions must have ids of their own, got twice the same in {path}")


def read_positions(path: str | Path, wcs: Any) -> tuple[NDArray | None, NDArray, NDArray]:
    """Read positions from a table: ECSV, CSV, FITS or whatever astropy recognises.

    Parameters
    ----------
    path : str or path
        With columns ``x, y`` (0-based pixels of the reference frame) or ``ra, dec`` (degrees), and perhaps ``id``.
    wcs : WCS or None
        Of the reference frame.

    Returns
    -------
    ids : (N,) int or None
    xy : (N, 2)
        Pixels of the reference frame; the table's own where it has both.
    sky : (2, N)
        Degrees, NaN where they are not known.

    Raises
    ------
    ConfigError
        The file is not to be read as a table, lacks columns, holds what is no number, or has sky positions where the
        reference has no WCS.
    """
    ids, xy, sky = _read(path)
    if xy is None:
        if wcs is None:
            raise ConfigError(f"positions must have columns x, y where the reference has no WCS, got ra, dec in {path}")
        xy = np.column_stack(wcs.world_to_pixel(SkyCoord(*sky, unit="deg")))
    elif sky is None and wcs is not None and len(xy):
        place = wcs.pixel_to_world(*xy.T).icrs
        sky = np.array([place.ra.deg, place.dec.deg])
    return ids, xy.reshape(-1, 2), np.full((2, len(xy)), np.nan) if sky is None else sky


def _read(path: str | Path) -> tuple[NDArray | None, NDArray | None, NDArray | None]:
    """The ids (N,), pixels (N, 2) and sky positions (2, N) that a table has; of the latter two at least one."""
    try:
        table = Table.read(os.path.expanduser(path))
    except Exception as error:  # astropy's readers raise whatever they come across
        raise ConfigError(f"positions must be a table that astropy can read, got {path}: {error}") from error
    for name in table.colnames:
        if name.lower() != name and name.lower() not in table.colnames:
            table.rename_column(name, name.lower())
    pixels, sky = ({*names} <= {*table.colnames} for names in (("x", "y"), ("ra", "dec")))
    if not pixels and not sky:
        raise ConfigError(f"positions must have columns x, y or ra, dec, got {', '.join(table.colnames)} in {path}")
    try:
        ids = np.asarray(table["id"]).astype(np.int64, casting="same_kind") if "id" in table.colnames else None
        radec = _numbers(table, "ra", "dec") if sky else None
        if radec is not None:
            SkyCoord(*radec, unit="deg")  # refuses declinations beyond the poles
        return ids, _numbers(table, "x", "y").T if pixels else None, radec
    except (TypeError, ValueError) as error:
        raise ConfigError(f"positions must be finite numbers with whole numbers as id, got {path}: {error}") from error


def _numbers(table: Table, *names: str) -> NDArray[np.float64]:
    values = np.array([np.ma.filled(np.ma.asarray(table[name], float), np.nan) for name in names], float)
    if not np.isfinite(values).all():
        raise ValueError(f"{', '.join(names)} has values that are not finite")
    return values
