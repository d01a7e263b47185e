"""The zero point of a run: given, from the magnitudes of the reference frame's own catalog, or from a file."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
from astropy import units as u
from astropy.coordinates import Angle, SkyCoord
from astropy.table import Table
from numpy.typing import NDArray

from gpudia.config import RunConfig
from gpudia.errors import ConfigError, InputError
from gpudia.flags import SOURCE_FLAGS
from gpudia.photometry import UNUSABLE, LightCurves, ZeroPoint, describe_magnitudes, fit_zero_point, magnitudes
from gpudia.pipeline.looks import Look

__all__ = ["calibrated", "photometric_catalog", "zero_point_of"]

log = logging.getLogger("gpudia.pipeline")

_RA = ("ra", "raj2000", "ra_icrs", "alpha_j2000", "ramean")
_DEC = ("dec", "dej2000", "decj2000", "de_icrs", "delta_j2000", "decmean")
#: How a column of errors is called, after that of the magnitudes.
_ERRORS = ("{}_err", "{}err", "e_{}", "{}_error", "err_{}", "{}e")
#: A star and its entry in a catalog are at most so far apart, arcsec; and the fainter stars have so many sigma.
_APART, _SIGNIFICANT = 1.0, 10.0


def photometric_catalog(config: RunConfig) -> Table | None:
    """Read the catalog file that the settings name.

    Parameters
    ----------
    config : RunConfig
        ``photometric_catalog`` and ``magnitude_column``.

    Returns
    -------
    Table or None
        ``ra, dec`` (degrees), ``mag, mag_err`` (NaN where not known); None where no file is named.

    Raises
    ------
    ConfigError
        The file cannot be read as a table, has no such columns, or they hold no positions or no magnitudes.
    """
    if config.photometric_catalog in ("auto", "none"):
        return None
    path = Path(os.path.expanduser(config.photometric_catalog))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # units that astropy does not know
            table = Table.read(path)
    except Exception as error:  # whatever a reader of whatever format thinks of the file
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"photometric_catalog must be a table that astropy can read, got {path}: {why}") from error
    columns = {name.lower(): name for name in table.colnames}
    ra, dec, mag = (_column(columns, names, path) for names in (_RA, _DEC, (config.magnitude_column.lower(),)))
    unit = table[mag].unit
    if unit is not None and not str(unit).startswith("mag"):
        raise ConfigError(f"magnitude_column must be in mag, got {mag} in {unit}")
    result = Table({"ra": _degrees(table[ra], u.hourangle, path), "dec": _degrees(table[dec], u.deg, path),
                    "mag": _numbers(table[mag], path)})
    error_name = next((columns[e.format(mag.lower())] for e in _ERRORS if e.format(mag.lower()) in columns), None)
    result["mag_err"] = np.nan if error_name is None else _numbers(table[error_name], path)
    result = result[np.isfinite(result["ra"]) & (np.abs(result["dec"]) <= 90) & np.isfinite(result["mag"])]
    if not len(result):
        raise ConfigError(f"photometric_catalog must have positions in degrees and magnitudes, got no row in {path}")
    return result


def _column(columns: dict[str, str], names: tuple[str, ...], path: Path) -> str:
    for name in names:
        if name in columns:
            return columns[name]
    raise ConfigError(f"photometric_catalog must have a column {' or '.join(names[:2])}, got "
                      f"{', '.join(columns.values())} in {path} (magnitude_column names that of the magnitudes)")


def _numbers(column: object, path: Path) -> NDArray[np.float64]:
    try:
        return np.ma.filled(np.ma.asarray(getattr(column, "value", column)).astype(float), np.nan)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"photometric_catalog must have numbers in {getattr(column, 'name', '')}, got {path}: "
                          f"{error}") from error


def _degrees(column: object, sexagesimal: u.Unit, path: Path) -> NDArray[np.float64]:
    """Positions in degrees: numbers are degrees but for a unit that says otherwise, texts are sexagesimal."""
    values = np.ma.asarray(getattr(column, "value", column))
    if values.dtype.kind in "US":
        try:
            return np.asarray(Angle(values.filled("nan") if np.ma.is_masked(values) else values.data,
                                    unit=sexagesimal).deg)
        except ValueError as error:
            raise ConfigError(f"photometric_catalog must have positions, got {path}: {error}") from error
    unit = getattr(column, "unit", None)
    factor = 1.0
    if unit is not None:
        try:
            factor = u.Unit(unit).to(u.deg)
        except (u.UnitConversionError, ValueError) as error:
            raise ConfigError(f"photometric_catalog must have positions in angles, got {path} in {unit}") from error
    return _numbers(column, path) * factor


def zero_point_of(config: RunConfig, look: Look, sources: Table) -> tuple[ZeroPoint, str]:
    """Return the zero point of the reference's fluxes, and what is doubtful about it, in words.

    Parameters
    ----------
    config : RunConfig
    look : Look
        The reference; its own catalog is used where the settings name no other.
    sources : Table
        ``ra, dec, flux_ref, flux_ref_err, flags`` of the stars on the reference. Those that are saturated, masked,
        variable or have a neighbour in the aperture are no standards, nor are those with less than 10 sigma.
    """
    if config.zero_point is not None:
        error = np.nan if config.zero_point_err is None else config.zero_point_err
        return ZeroPoint(config.zero_point, error, source="given"), ""
    catalog, name = photometric_catalog(config), Path(config.photometric_catalog).name
    if catalog is None and config.photometric_catalog == "auto" and _has_magnitudes(look.catalog):
        catalog, name = look.catalog, f"catalog of {look.name}"
    if catalog is None:
        return ZeroPoint(), ""
    star, entry = _matched(sources, catalog)
    flux, error = (np.asarray(sources[c], float)[star] for c in ("flux_ref", "flux_ref_err"))
    flags = np.asarray(sources["flags"])[star]
    good = (flags & (UNUSABLE | SOURCE_FLAGS.variable) == 0) & (flux > _SIGNIFICANT * error)
    alone = good & (flags & SOURCE_FLAGS.neighbour == 0)
    good = alone if alone.sum() >= 10 else good
    try:
        zero = fit_zero_point(flux[good], error[good], np.asarray(catalog["mag"])[entry][good],
                              np.asarray(catalog["mag_err"])[entry][good], name)
    except InputError as problem:
        doubt = (f"magnitudes are instrumental: {len(star)} of {len(sources)} stars are within {_APART:g} arcsec of an "
                 f"entry of {name} ({len(catalog)} entries), {good.sum()} of them can be standards; {problem}")
        return ZeroPoint(), doubt
    log.info("magnitudes %s", zero)
    return zero, ""


def calibrated(curves: LightCurves, config: RunConfig, look: Look) -> tuple[LightCurves, str]:
    """Return light curves with a zero point and with ``mag, mag_err`` of the reference; and what is doubtful, in words.

    See `zero_point_of`.
    """
    zero, doubt = zero_point_of(config, look, curves.sources)
    sources = curves.sources.copy()
    found = magnitudes(sources["flux_ref"], sources["flux_ref_err"], zero.value)
    sources["mag"], sources["mag_err"] = found.mag, found.mag_err
    describe_magnitudes(sources, zero)
    return replace(curves, sources=sources, zero_point=zero), doubt


def _has_magnitudes(catalog: Table | None) -> bool:
    """Whether a frame's catalog has magnitudes that are more than its own fluxes' logarithms."""
    if catalog is None or not {"mag", "ra"} <= set(catalog.colnames):
        return False
    if "flux" not in catalog.colnames:
        return bool(np.isfinite(catalog["mag"]).any())
    flux = np.asarray(catalog["flux"], float)
    offset = np.asarray(catalog["mag"], float)[flux > 0] + 2.5 * np.log10(flux[flux > 0])
    offset = offset[np.isfinite(offset)]
    instrumental = len(offset) and min(abs(np.median(offset) - value) for value in (0.0, 25.0)) < 1e-3
    return bool(len(offset)) and not instrumental


def _matched(sources: Table, catalog: Table) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows of stars and of the catalog's entries that are each other's nearest, within an arcsec."""
    here, there = (np.flatnonzero(np.isfinite(np.asarray(t["ra"], float)) & np.isfinite(np.asarray(t["dec"], float)))
                   for t in (sources, catalog))
    if not (here.size and there.size):
        return here[:0], there[:0]
    stars, entries = (SkyCoord(np.asarray(t["ra"], float)[i], np.asarray(t["dec"], float)[i], unit="deg")
                      for t, i in ((sources, here), (catalog, there)))
    entry, distance, _ = stars.match_to_catalog_sky(entries)
    back = entries.match_to_catalog_sky(stars)[0]
    mutual = (back[entry] == np.arange(len(here))) & (distance.to_value(u.arcsec) <= _APART)
    return here[mutual], there[entry[mutual]]
