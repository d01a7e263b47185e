"""The seed's aperture photometry: one image, one table."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from astropy.nddata import NDData, StdDevUncertainty
from astropy.table import Table
from astropy.units import Quantity
from numpy.typing import NDArray
from photutils.aperture import CircularAperture

from gpudia.errors import InputError
from gpudia.flags import SOURCE_FLAGS
from gpudia.photometry.inputs import as_positions, check_plane, check_radius

__all__ = ["aperture_photometry_table"]


def aperture_photometry_table(image: Any, error: Any, positions: Any, radius: float, mask: Any = None) -> Table:
    """Sum an image in circular apertures, with the errors of uncorrelated pixels.

    Parameters
    ----------
    image : (H, W) array, masked array, Quantity, NDData or CCDData
        Background-subtracted image. Pixels that are not finite count as masked.
    error : (H, W) array, Quantity, number or None
        One sigma for each pixel, or for all. None takes the uncertainty of an NDData, if it has one.
    positions : (N, 2), (2,) or (2, N)
        Stars (x, y), 0-based pixel centres; (2, 2) is read as two rows (x, y).
    radius : float
        Pixels; positive, smaller than the image.
    mask : (H, W), optional
        True or non-zero = ignore; joined to the mask of the image.

    Returns
    -------
    `~astropy.table.Table`
        Columns ``id`` (from 1), ``xcenter``, ``ycenter``, ``aperture_sum``, ``aperture_sum_err`` and ``flags``
        (`gpudia.flags.SOURCE_FLAGS`). A sum leaves masked pixels out and is NaN where no pixel is good; an aperture
        that is cut by an edge holds the part inside and has the flag ``outside``.

    Raises
    ------
    InputError
        A shape, the radius or the unit does not fit.
    """
    plain = _plain(image, error, mask)
    radius = check_radius(radius, plain.data.shape)
    where = as_positions(positions)
    known = np.isfinite(where).all(axis=1)
    apertures = CircularAperture(np.where(known[:, None], where, -10.0 * radius - 10.0), radius) if len(where) else None
    sums, errors = _sums(apertures, plain)
    table = Table({"id": np.arange(1, len(where) + 1), "xcenter": where[:, 0], "ycenter": where[:, 1]})
    table["aperture_sum"], table["aperture_sum_err"] = sums, errors
    table["flags"] = _flags(apertures, where, radius, plain.ignore)
    if plain.unit is not None:
        table["aperture_sum"].unit = table["aperture_sum_err"].unit = plain.unit
    table.meta["aperture_radius"] = radius
    return table


class _Plain(NamedTuple):
    data: NDArray[Any]
    error: NDArray[Any] | None
    ignore: NDArray[np.bool_]
    unit: Any


def _plain(image: Any, error: Any, mask: Any) -> _Plain:
    """Image, error, mask and unit out of whatever the caller's arrays are wrapped in."""
    unit = getattr(image, "unit", None)
    masks = [mask, image.mask if isinstance(image, NDData | np.ma.MaskedArray) else None]
    if isinstance(image, NDData):
        if error is None and image.uncertainty is not None:
            error = image.uncertainty.represent_as(StdDevUncertainty).array
        image = image.data
    data = check_plane("image", np.ma.getdata(image.value if isinstance(image, Quantity) else image))
    if isinstance(error, Quantity):
        if unit is None or not error.unit.is_equivalent(unit):
            raise InputError(f"error must have the unit of image ({unit}), got {error.unit}")
        error = error.to_value(unit)
    ignore = ~np.isfinite(data)
    for one in masks:
        if one is not None and one is not np.ma.nomask:
            ignore = ignore | (np.broadcast_to(one, data.shape) != 0 if np.ndim(one) == 0
                               else check_plane("mask", one, data.shape) != 0)
    if error is not None:
        error = np.ma.getdata(error)
        error = check_plane("error", np.full(data.shape, error) if np.ndim(error) == 0 else error, data.shape)
        ignore = ignore | ~np.isfinite(error)
    return _Plain(data, error, ignore, unit)


def _sums(apertures: CircularAperture | None, plain: _Plain) -> tuple[NDArray[Any], NDArray[Any]]:
    """Sums and errors; NaN where no pixel of the aperture is good."""
    if apertures is None:
        return np.empty(0), np.empty(0)
    data = np.where(plain.ignore, 0.0, plain.data)
    error = None if plain.error is None else np.where(plain.ignore, 0.0, plain.error)
    sums, errors = apertures.do_photometry(data, error=error, mask=plain.ignore, method="exact")
    area = apertures.do_photometry((~plain.ignore).astype(float), method="exact")[0]
    empty = ~(area > 0)
    return np.where(empty, np.nan, sums), np.where(empty, np.nan, errors if len(errors) else np.nan)


def _flags(apertures: CircularAperture | None, where: NDArray[Any], radius: float,
           ignore: NDArray[np.bool_]) -> NDArray[np.int32]:
    if apertures is None:
        return np.empty(0, np.int32)
    edge = np.array(ignore.shape[::-1]) - 0.5
    inside = ((where - radius >= -0.5) & (where + radius <= edge)).all(axis=1)
    masked = apertures.do_photometry(ignore.astype(float), method="exact")[0] > 0
    flags = np.where(inside, 0, SOURCE_FLAGS.outside) | np.where(masked, SOURCE_FLAGS.masked_pixels, 0)
    return flags.astype(np.int32)
