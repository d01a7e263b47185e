"""One star's light curve in the formats that other programs read."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from astropy.io import fits
from astropy.table import Column, Table
from astropy.time import Time
from astropy.timeseries import TimeSeries
from numpy.typing import NDArray

from gpudia.errors import InputError
from gpudia.flags import SOURCE_FLAGS
from gpudia.photometry.lightcurves import LightCurves, table_hdu, write_whole
from gpudia.photometry.stamps import FloatArray
from gpudia.photometry.variability import UNUSABLE

__all__ = ["FORMATS", "QUANTITIES", "export_all", "export_star", "lightkurve_hdus", "plain_table", "read_target",
           "three_columns"]

FORMATS = ("ecsv", "csv", "parquet", "pylima", "mulensmodel", "lightkurve")
QUANTITIES = ("flux", "mag", "flux_diff")
_BINARY = ("parquet", "lightkurve")
_MJD = 2400000.5

_HOW_TO_READ = {
    "pylima": "pyLIMA: Telescope(lightcurve=np.loadtxt(FILE), lightcurve_names=['time', '{q}', 'err_{q}'], "
              "lightcurve_units=['JD', '{u}', '{u}'])",
    "mulensmodel": "MulensModel: MulensData(file_name=FILE, phot_fmt='{q}')",
}


def read_target(folder: str | os.PathLike[str]) -> TimeSeries:
    """Read the target's light curve out of the output folder of a run.

    Raises
    ------
    InputError
        There is none.
    """
    path = Path(folder) / "target.ecsv"
    if not path.is_file():
        raise InputError(f"target needs the folder of a run with --ra and --dec, got {folder}: no target.ecsv there")
    return TimeSeries.read(path, format="ascii.ecsv", time_column="time")


def export_star(series: TimeSeries, to: str | os.PathLike[str] | TextIO, form: str, quantity: str = "flux") -> None:
    """Write the light curve of one star.

    ===============  ==============================================================================================
    ``ecsv``         astropy's `TimeSeries`, all columns
    ``csv``          all columns, ``mjd`` (UTC) for the time
    ``parquet``      the same
    ``pylima``       text of three columns: time, brightness, error; see `three_columns`
    ``mulensmodel``  the same
    ``lightkurve``   FITS that ``lightkurve.read`` takes; see `lightkurve_hdus`
    ===============  ==============================================================================================

    Parameters
    ----------
    series : TimeSeries
        From `LightCurves.timeseries`, or ``target.ecsv`` of a run.
    to : path or text stream
        File to write, whole or not at all; or an open stream, for the formats that are text.
    form : str
        One of `FORMATS`.
    quantity : {"flux", "mag", "flux_diff"}
        Brightness in ``pylima`` and ``mulensmodel``.

    Raises
    ------
    InputError
        Unknown format or quantity, or a stream for a format that is not text.
    """
    if form not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}, got {form!r}")
    if isinstance(to, str | os.PathLike):
        write_whole(Path(to), lambda part: _write(series, part, form, quantity))
    elif form in _BINARY:
        raise InputError(f"to must be a file for the format {form}, got a stream")
    else:
        _write(series, to, form, quantity)


def export_all(curves: LightCurves, to: str | os.PathLike[str] | TextIO, form: str) -> None:
    """Write the light curves of all stars as the long table of `LightCurves.to_table`: ecsv, csv or parquet.

    Raises
    ------
    InputError
        Another format, or a stream for Parquet.
    """
    if form not in ("ecsv", "csv", "parquet"):
        raise InputError(f"format must be ecsv, csv or parquet for all stars, got {form!r}: choose one star")
    if isinstance(to, str | os.PathLike):
        path = Path(to)
        if form == "parquet":
            curves.to_parquet(path)
        else:
            write_whole(path, lambda part: curves.to_table().write(part, format=f"ascii.{form}", overwrite=True))
    elif form == "parquet":
        raise InputError("to must be a file for the format parquet, got a stream")
    else:
        curves.to_table().write(to, format=f"ascii.{form}")


def _write(series: TimeSeries, to: Any, form: str, quantity: str) -> None:
    if form in _HOW_TO_READ:
        with _opened(to) as stream:
            stream.write(three_columns(series, quantity, form))
    elif form == "lightkurve":
        lightkurve_hdus(series).writeto(to, overwrite=True)
    else:
        table = series if form == "ecsv" else plain_table(series)
        table.write(to, format="parquet" if form == "parquet" else f"ascii.{form}", overwrite=True)


@contextlib.contextmanager
def _opened(to: Any) -> Iterator[TextIO]:
    if isinstance(to, Path):
        with to.open("w", encoding="utf-8") as stream:
            yield stream
    else:
        yield to


def plain_table(table: Table) -> Table:
    """Return a table without times and units: a Time column ``time`` becomes ``mjd``, NaN where it is not known."""
    plain = Table()
    for name in table.colnames:
        column = table[name]
        if isinstance(column, Time):
            plain["mjd" if name == "time" else name] = Column(_filled(column.mjd))
        else:
            plain[name] = getattr(column, "value", column)
    return plain


def three_columns(series: TimeSeries, quantity: str = "flux", reader: str = "mulensmodel") -> str:
    """Return the light curve as text: comments, then time, brightness and error of each usable epoch.

    Times are BJD_TDB where that is known of every epoch with a time, else JD (UTC) for all. Epochs without a time, a
    value or an error, and those with a flag of `UNUSABLE` are left out; the comments say how many and why.

    Parameters
    ----------
    series : TimeSeries
        As for `export_star`.
    quantity : {"flux", "mag", "flux_diff"}
        ``flux`` and ``flux_diff`` in ADU of the reference, negative values and limits included.
    reader : {"pylima", "mulensmodel"}
        Whose way to read it stands in the comments.

    Raises
    ------
    InputError
        Unknown quantity.
    """
    if quantity not in QUANTITIES:
        raise InputError(f"quantity must be one of {', '.join(QUANTITIES)}, got {quantity!r}")
    time, scale = _julian(series)
    value, error = (_values(series, f"{quantity}{end}") for end in ("", "_err"))
    known = np.isfinite(value) & np.isfinite(error) & (error > 0)
    flags = np.asarray(series["flags"])
    reasons = _reasons(flags, np.isfinite(time), known, np.isfinite(_values(series, "limit")))
    keep = np.array([not reason for reason in reasons], dtype=bool)
    left_out = ", ".join(f"{count} {reason}" for reason, count in Counter(filter(None, reasons)).most_common())
    plain = "mag" if quantity == "mag" else "flux"
    unit = str(series.meta.get("magnitudes", "mag")) if quantity == "mag" else "ADU of the reference"
    lines = [f"# {quantity} and its error (1 sigma), {unit}",
             f"# time: {scale}, mid-exposure", f"# {keep.sum()} of {len(keep)} epochs; left out: {left_out or 'none'}",
             "# " + _HOW_TO_READ[reader].format(q=plain, u="mag" if plain == "mag" else "W/m^2")]
    lines += [f"{t:.8f} {v:.9g} {e:.6g}" for t, v, e in zip(time[keep], value[keep], error[keep], strict=True)]
    return "\n".join([*lines, ""])


def lightkurve_hdus(series: TimeSeries) -> fits.HDUList:
    """Return FITS HDUs that ``lightkurve.read`` makes a `LightCurve` of.

    A table with TIME (days: BJD in TDB where it is known of every epoch with a time, else JD in UTC), FLUX and FLUX_ERR
    (ADU of the reference), QUALITY (bits of `gpudia.flags.SOURCE_FLAGS`, 0 = good) and the other columns of the series.
    Epochs without a time are left out (lightkurve has no place for them); all others are there, NaN and flags included.
    """
    time, scale = _julian(series)
    keep = np.isfinite(time)
    columns: dict[str, Any] = {"TIME": time, "FLUX": _values(series, "flux"), "FLUX_ERR": _values(series, "flux_err"),
                               "QUALITY": np.asarray(series["flags"], np.int32)}
    columns |= {n.upper(): np.asarray(getattr(series[n], "value", series[n])) for n in series.colnames
                if n not in ("time", "flags") and n.upper() not in columns}
    table = Table({name: values[keep] for name, values in columns.items()})
    hdu = table_hdu(table, "LIGHTCURVE")
    for name, unit in (("TIME", "d"), ("BJD_TDB", "d"), ("MAG", "mag"), ("MAG_ERR", "mag"), ("LIMIT", "mag")):
        if name in table.colnames:
            hdu.columns[name].unit = unit
    for name in [n for n in table.colnames if n.startswith("FLUX")]:
        hdu.columns[name].unit = "adu"
    hdu.header.update({"TIMESYS": ("TDB" if "TDB" in scale else "UTC", scale), "TIMEUNIT": "d", "JDREFI": 0,
                       "JDREFF": 0.0})
    primary = fits.PrimaryHDU()
    meta = {k: series.meta.get(k) for k in ("source_id", "ra", "dec")}
    cards = {"OBJECT": (f"source {meta['source_id']}" if meta["source_id"] is not None else "target", ""),
             "RA_OBJ": (meta["ra"], "[deg]"), "DEC_OBJ": (meta["dec"], "[deg]"), "ORIGIN": ("gpudia", "")}
    primary.header.update({k: v for k, v in cards.items() if v[0] is not None and v[0] == v[0]})
    return fits.HDUList([primary, hdu])


def _julian(series: TimeSeries) -> tuple[FloatArray, str]:
    """Julian dates and what they are; one kind for all epochs, NaN where there is no time."""
    jd = _filled(series.time.utc.mjd) + _MJD
    if "bjd_tdb" in series.colnames:
        bjd = _values(series, "bjd_tdb")
        if np.isfinite(bjd[np.isfinite(jd)]).all():
            return np.where(np.isfinite(jd), bjd, np.nan), "BJD_TDB"
    return jd, "JD (UTC)"


def _reasons(flags: NDArray[np.int32], timed: NDArray[np.bool_], known: NDArray[np.bool_],
             faint: NDArray[np.bool_]) -> list[str]:
    """Why each epoch cannot be used; empty where it can."""
    flagged = [" and ".join(SOURCE_FLAGS.decode(int(flag) & UNUSABLE)) for flag in flags]
    rest = np.where(~timed, "without a time", np.where(known, "", np.where(faint, "below 3 sigma", "not measured")))
    return [bits or str(other) for bits, other in zip(flagged, rest, strict=True)]


def _values(series: Table, name: str) -> FloatArray:
    return _filled(getattr(series[name], "value", series[name]))


def _filled(values: Any) -> FloatArray:
    return np.ma.filled(np.ma.asarray(values).astype(float), np.nan)
