"""Light curves of all stars of a run, in memory and in ``lightcurves.fits``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.table import Table
from astropy.timeseries import TimeSeries
from numpy.typing import NDArray

from gpudia.errors import FrameError, InputError
from gpudia.photometry.calibration import INSTRUMENTAL, ZeroPoint
from gpudia.photometry.series import describe_magnitudes, magnitudes, utc_times
from gpudia.photometry.stamps import FloatArray
from gpudia.times import barycentric_times

__all__ = ["LightCurves", "read_lightcurves", "table_hdu", "write_whole"]

_FILE = "lightcurves.fits"
_PLANES = ("FLUX_DIFF", "FLUX_DIFF_ERR", "FLUX", "FLUX_ERR", "FLAGS")
_SOURCE_COLUMNS = ("source_id", "ra", "dec", "x", "y", "flux_ref", "flux_ref_err", "n_good", "chi2", "flags")
_EPOCH_COLUMNS = ("file", "mjd")
#: Rows of the long table that are made at once for Parquet.
_ROWS_AT_ONCE = 200_000


@dataclass(frozen=True)
class LightCurves:
    """Light curves of S stars in E epochs.

    Attributes
    ----------
    sources : Table
        S rows: ``source_id, ra, dec, x, y, flux_ref, flux_ref_err, n_good, chi2, flags``.
    epochs : Table
        E rows, in the order of the planes: at least ``file`` and ``mjd`` (mid-exposure, UTC); barycentric times need
        ``longitude, latitude`` (degrees) and ``height`` (m) of the observatory.
    planes : dict of str to (E, S) array
        FLUX_DIFF, FLUX_DIFF_ERR, FLUX, FLUX_ERR (float32, ADU of the reference; NaN = not measured), FLAGS (int32,
        `gpudia.flags.SOURCE_FLAGS`), and the same with _AP, _PSF for every measure made.
    zero_point : ZeroPoint
        Magnitude of one ADU; without a source magnitudes are instrumental.

    Raises
    ------
    InputError
        A column or plane is missing, a plane has another shape than (E, S), or a source_id stands twice.
    """

    sources: Table
    epochs: Table
    planes: dict[str, NDArray[Any]]
    zero_point: ZeroPoint = INSTRUMENTAL

    def __post_init__(self) -> None:
        _check_names("sources", self.sources.colnames, _SOURCE_COLUMNS)
        _check_names("epochs", self.epochs.colnames, _EPOCH_COLUMNS)
        _check_names("planes", list(self.planes), _PLANES)
        shape = (len(self.epochs), len(self.sources))
        for name, plane in self.planes.items():
            if np.shape(plane) != shape:
                raise InputError(f"{name} must have shape (epochs, sources) = {shape}, got {np.shape(plane)}")
        ids, counts = np.unique(self._ids, return_counts=True)
        if (counts > 1).any():
            raise InputError(f"source_id must be unique, got {ids[counts > 1][0]} more than once")

    @property
    def _ids(self) -> NDArray[np.str_]:
        # As text, so that 17 and "17" find the same star.
        return np.asarray(self.sources["source_id"]).astype(str)

    def __repr__(self) -> str:
        mjd = np.asarray(self.epochs["mjd"], float)
        known = mjd[np.isfinite(mjd)]
        span = f", MJD {known.min():.2f} to {known.max():.2f}" if known.size else ""
        return (f"<LightCurves of {len(self.sources)} stars in {len(self.epochs)} epochs{span}; planes "
                f"{', '.join(self.planes)}; magnitudes {self.zero_point}>")

    def barycentric_times(self, stars: Any = slice(None)) -> FloatArray | None:
        """BJD_TDB of every epoch (E, n) at the positions of some stars (rows of `sources`), days.

        NaN where time, site or position are not known; None where the epochs have no site.
        """
        if not {"longitude", "latitude", "height"} <= set(self.epochs.colnames):
            return None
        places = np.column_stack([np.asarray(self.epochs[c], float) for c in ("longitude", "latitude", "height")])
        sites = [tuple(map(float, place)) if np.isfinite(place).all() else None for place in places]
        return barycentric_times(np.asarray(self.epochs["mjd"], float), sites,
                                 *(np.asarray(self.sources[c], float)[stars] for c in ("ra", "dec")))

    def timeseries(self, source_id: Any) -> TimeSeries:
        """Light curve of one star, ordered by time.

        Columns: ``time`` (UTC), ``image``, one for each plane, in lower case, ``mag, mag_err, limit`` of ``flux``, and
        ``bjd_tdb`` where the site is known.

        Raises
        ------
        InputError
            No star has this source_id.
        """
        found = np.flatnonzero(self._ids == str(source_id))
        if not found.size:
            raise InputError(f"source_id must be one of the {len(self.sources)} sources, got {source_id!r}")
        mjd = np.asarray(self.epochs["mjd"], float)
        order = np.argsort(mjd, kind="stable")
        rows = self._rows(found)
        series = TimeSeries(time=utc_times(mjd[order]), data={
            name: values[order] for name, values in rows.items() if name not in ("source_id", "ra", "dec", "mjd")})
        series.meta |= {c: _plain(self.sources[c][found[0]]) for c in _SOURCE_COLUMNS if c != "flags"}
        _describe(series, self.zero_point)
        return series

    def to_table(self) -> Table:
        """All light curves as a long table: one row for each star and epoch, star by star in the order of epochs.

        Columns as in `timeseries`, with ``source_id, ra, dec`` and ``mjd``. `to_parquet` needs less memory.
        """
        table = Table(self._rows(np.arange(len(self.sources))))
        _describe(table, self.zero_point)
        return table

    def _rows(self, stars: NDArray[np.intp]) -> dict[str, NDArray[Any]]:
        """Columns of the long table for some stars."""
        n_epochs = len(self.epochs)
        rows = {c: np.repeat(_native(np.asarray(self.sources[c])[stars]), n_epochs) for c in ("source_id", "ra", "dec")}
        rows["image"] = np.tile(np.asarray(self.epochs["file"]).astype(str), len(stars))
        rows["mjd"] = np.tile(np.asarray(self.epochs["mjd"], float), len(stars))
        for name, plane in self.planes.items():
            rows[name.lower()] = _native(plane[:, stars]).T.ravel()
        with np.errstate(invalid="ignore"):
            rows |= {name: values.astype(np.float32) for name, values in magnitudes(
                rows["flux"], rows["flux_err"], self.zero_point.value)._asdict().items()}
        bjd = self.barycentric_times(stars)
        if bjd is not None:
            rows["bjd_tdb"] = bjd.T.ravel()
        return rows

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write the long table of `to_table` as Parquet, some stars at a time: it is never in memory as a whole.

        Raises
        ------
        InputError
            pyarrow is not installed.
        """
        try:
            arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
        except ImportError as error:
            raise InputError("Parquet needs pyarrow: pip install 'gpudia[parquet]'") from error

        def write(part: Path) -> None:
            at_once = max(1, _ROWS_AT_ONCE // max(len(self.epochs), 1))
            stars = np.arange(len(self.sources))
            with contextlib.ExitStack() as stack:
                writer = None
                for start in range(0, max(len(stars), 1), at_once):
                    rows = self._rows(stars[start:start + at_once])
                    table = arrow.table({name: arrow.array(v.tolist() if v.dtype.kind == "U" else v)
                                         for name, v in rows.items()})
                    writer = writer or stack.enter_context(parquet.ParquetWriter(part, table.schema))
                    writer.write_table(table)

        write_whole(Path(path), write)

    def write(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write ``lightcurves.fits``: tables SOURCES and EPOCHS, one image (E, S) for each plane.

        Floating-point planes are written as float32, FLAGS as int32. The file appears whole or not at all.

        Raises
        ------
        InputError
            The file exists and `overwrite` is False.
        """
        path = Path(path)
        if path.exists() and not overwrite:
            raise InputError(f"path must not exist (or say overwrite=True), got {path}")
        primary = fits.PrimaryHDU()
        primary.header.update(self.zero_point.cards())
        hdus = fits.HDUList([primary, table_hdu(self.sources, "SOURCES"), table_hdu(self.epochs, "EPOCHS")])
        for name, plane in self.planes.items():
            kind = np.float32 if np.asarray(plane).dtype.kind == "f" else np.int32
            hdus.append(fits.ImageHDU(np.ascontiguousarray(plane, dtype=kind), name=name))
        write_whole(path, lambda part: hdus.writeto(part, overwrite=True))


def read_lightcurves(path: str | os.PathLike[str]) -> LightCurves:
    """Read the light curves of a run.

    Parameters
    ----------
    path : str or path-like
        ``lightcurves.fits``, or the output folder that holds it. The planes are mapped from disk, not loaded.

    Raises
    ------
    InputError
        There is no such file.
    FrameError
        The file is not what `LightCurves.write` makes; names the file and what is wrong.
    """
    path = Path(path)
    file = path / _FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"path must be a file of light curves or the output folder of a run, got {path}: "
                         f"no {file.name} there")
    try:
        with fits.open(file, memmap=True) as hdus:
            zero_point = ZeroPoint.from_cards(hdus[0].header)
            tables = [_read_table(hdus[name]) for name in ("SOURCES", "EPOCHS")]
            planes = {hdu.name: hdu.data for hdu in hdus[1:] if isinstance(hdu, fits.ImageHDU)}
        return LightCurves(*tables, planes, zero_point)
    except (OSError, KeyError, ValueError, TypeError) as error:  # InputError of a wrong shape is a ValueError
        raise FrameError(f"not a file of light curves: {error}", file) from error


def _check_names(name: str, have: list[str], needed: tuple[str, ...]) -> None:
    missing = [n for n in needed if n not in have]
    if missing:
        raise InputError(f"{name} must have {', '.join(needed)}, got none named {', '.join(missing)}")


def _read_table(hdu: fits.BinTableHDU) -> Table:
    table = Table.read(hdu)
    table.convert_bytestring_to_unicode()
    for name in table.colnames:
        if table[name].dtype.kind in "iuf" and not table[name].dtype.isnative:
            table[name] = table[name].astype(table[name].dtype.newbyteorder("="))
    return table


def table_hdu(table: Table, name: str) -> fits.BinTableHDU:
    """Make a table HDU. FITS knows ASCII only: what else a text holds (a file name) becomes a Python escape."""
    plain = Table(table, meta={})
    for column in plain.colnames:
        if plain[column].dtype.kind == "U":
            plain[column] = [str(v).encode("ascii", "backslashreplace").decode() for v in plain[column]]
    hdu = fits.table_to_hdu(plain)
    hdu.name = name
    return hdu


def _native(values: Any) -> NDArray[Any]:
    array = np.asarray(values)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _plain(value: Any) -> Any:
    """A table cell as a plain Python number or string, so that it goes into ECSV."""
    return value.item() if isinstance(value, np.generic) else value


def _describe(table: Table, zero_point: ZeroPoint) -> None:
    describe_magnitudes(table, zero_point)
    if "bjd_tdb" in table.colnames:
        table["bjd_tdb"].info.unit, table["bjd_tdb"].info.description = "d", "mid-exposure, BJD_TDB, of the star"


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside the place and rename: the file appears whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
