"""Everything the report needs, read from the output folder of a run."""

from __future__ import annotations

import logging
import tomllib
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.table import Table
from astropy.time import Time
from astropy.wcs import WCS, FITSFixedWarning
from numpy.typing import NDArray

from gpudia.errors import InputError
from gpudia.flags import SOURCE_FLAGS
from gpudia.messages import printable

__all__ = ["Curve", "Epoch", "RunData", "numbers", "read_run", "words"]

log = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]
#: What can go wrong in a file of the folder that is absent, cut short or made by another version.
UNREADABLE = (OSError, KeyError, ValueError, TypeError, IndexError)
#: Texts of epochs.ecsv that an `Epoch` has as attributes.
_OWN_TEXTS = ("name", "file", "status", "reason")
#: Of the meta data of epochs.ecsv: what the page shows elsewhere.
_NO_FACTS = ("stages", "wall", "doubts")
#: Of the meta data of target.ecsv: where the target is.
_PLACE = ("ra", "dec", "x", "y", "x_err", "y_err", "position_err_arcsec", "variation_sigma")
_FITS_SUFFIXES = (".fz", ".gz", ".fits", ".fit", ".fts")
_STRUCTURE = {"SIMPLE", "BITPIX", "NAXIS", "EXTEND", "COMMENT", "HISTORY", "", "CHECKSUM", "DATASUM", "EXTNAME"}


@dataclass(frozen=True)
class Epoch:
    """One row of ``epochs.ecsv``: an input image and its verdict; `values` and `texts` are its other columns."""

    index: int
    name: str
    file: str
    mjd: float
    status: str
    reason: str
    flags: int
    values: dict[str, float]
    difference: Path | None
    texts: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, column: str) -> float:
        """Return the number in `column`, NaN where there is none."""
        return self.values.get(column, np.nan)


@dataclass(frozen=True)
class Curve:
    """The light curve of one star; all arrays have shape (n_epochs,), fluxes are ADU of the reference."""

    label: str
    names: list[str]
    mjd: FloatArray
    flux: FloatArray
    flux_err: FloatArray
    flux_diff: FloatArray
    flux_diff_err: FloatArray
    mag: FloatArray
    mag_err: FloatArray
    is_limit: NDArray[np.bool_]
    flags: NDArray[np.int64]


@dataclass(frozen=True)
class RunData:
    """The output folder of a run in memory (images stay on disk but for the reference).

    `planes` are (n_ok, n_sources) arrays of ``lightcurves.fits`` by name; `reference` is (H, W) in ADU with NaN
    where masked; `position` is the target as (x, y), 0-based pixel centres of the reference image. `stages` are the
    seconds of work by stage and `wall` those that went by, where the run says so. `variables` and `candidates` are the
    tables of these names, without columns where a run made none. `doubts` are what the run says against its numbers,
    `place` what ``target.ecsv`` says of where the target is: numbers (degrees, pixels, arcsec) and texts.
    """

    output: Path
    epochs: list[Epoch]
    target: Curve | None
    sources: Table
    curve_epochs: Table
    planes: dict[str, NDArray[Any]]
    reference: FloatArray | None
    position: tuple[float, float] | None
    settings: dict[str, Any]
    facts: dict[str, str]
    stages: dict[str, float] = field(default_factory=dict)
    wall: float = np.nan
    variables: Table = field(default_factory=Table)
    candidates: Table = field(default_factory=Table)
    doubts: list[str] = field(default_factory=list)
    place: dict[str, float | str] = field(default_factory=dict)

    def count(self, status: str) -> int:
        """Return the number of epochs with this status."""
        return sum(e.status == status for e in self.epochs)


def read_run(output: Path) -> RunData:
    """Read the output folder of a run.

    Parameters
    ----------
    output : Path
        Folder with at least ``epochs.ecsv``; what else is absent or unreadable is logged and left out, so that a
        run in which every image failed has its report too.

    Raises
    ------
    InputError
        The folder has no readable ``epochs.ecsv``.
    """
    output = Path(output)
    rows = _read_epochs(output / "epochs.ecsv")
    settings = _read_settings(output / "run.toml")
    sources, curve_epochs, planes = _read_lightcurves(output / "lightcurves.fits")
    reference, header, facts = _read_reference(output / "reference.fits")
    target, place = _read_target(output / "target.ecsv")
    return RunData(
        output=output,
        epochs=_epoch_list(rows, output / "difference"),
        target=target,
        sources=sources,
        curve_epochs=curve_epochs,
        planes=planes,
        reference=reference,
        position=_target_position(settings, header),
        settings=settings,
        facts={**_texts_of(rows.meta), **facts},
        stages=_stages(rows.meta.get("stages")),
        wall=_stages({"wall": rows.meta.get("wall")}).get("wall", np.nan),
        variables=_read_optional(output / "variables.ecsv"),
        candidates=_read_optional(output / "candidates.ecsv"),
        doubts=_doubts(rows.meta.get("doubts")),
        place=place,
    )


def _texts_of(meta: dict[str, Any]) -> dict[str, str]:
    return {str(k): printable(v) for k, v in meta.items() if not (str(k).startswith("__") or k in _NO_FACTS)}


def _doubts(given: Any) -> list[str]:
    return [printable(text) for text in given] if isinstance(given, list) else []


def _stages(given: Any) -> dict[str, float]:
    """Seconds by stage, as far as they are numbers."""
    if not isinstance(given, dict):
        return {}
    return {printable(k): float(v) for k, v in given.items() if isinstance(v, int | float) and np.isfinite(v)}


def _read_optional(path: Path) -> Table:
    """A table that not every run makes."""
    if not path.is_file():
        return Table()
    try:
        return Table.read(path, format="ascii.ecsv")
    except UNREADABLE as error:
        log.warning("report: %s left out: %s", path.name, error)
        return Table()


def numbers(table: Table, column: str, default: float = np.nan) -> FloatArray:
    """Return a column as float64, `default` where masked and everywhere if there is no such column."""
    if column not in table.colnames:
        return np.full(len(table), default)
    values = np.ma.asarray(getattr(table[column], "value", table[column]))
    return np.ma.filled(values.astype(float), default)


def words(table: Table, column: str) -> list[str]:
    """Return a column as strings, empty where masked or absent."""
    if column not in table.colnames:
        return [""] * len(table)
    values = table[column].filled("") if hasattr(table[column], "filled") else table[column]
    return [printable(v).strip() for v in values]


def frame_name(file: str) -> str:
    """Return the name of a frame: its file name without folder and without the suffixes of FITS files."""
    name = Path(file).name
    while Path(name).suffix.lower() in _FITS_SUFFIXES:
        name = name[: -len(Path(name).suffix)]
    return name


def _read_epochs(path: Path) -> Table:
    try:
        return Table.read(path, format="ascii.ecsv")
    except UNREADABLE as error:
        rule = "output must be the folder of a run with a readable epochs.ecsv"
        raise InputError(f"{rule}, got {path}: {error}") from error


def _epoch_list(rows: Table, folder: Path) -> list[Epoch]:
    files = words(rows, "file")
    names = [given or frame_name(file) for given, file in zip(words(rows, "name"), files, strict=True)]
    stored = {frame_name(p.name): p for p in sorted(folder.glob("*.fits*"))} if folder.is_dir() else {}
    statuses, reasons = words(rows, "status"), words(rows, "reason")
    flags = numbers(rows, "flags", 0).astype(np.int64)
    numeric = {c: numbers(rows, c) for c in rows.colnames if rows[c].dtype.kind in "iuf"}
    texts = {c: words(rows, c) for c in rows.colnames if rows[c].dtype.kind in "UO" and c not in _OWN_TEXTS}
    return [
        Epoch(
            index=i,
            name=names[i],
            file=files[i],
            mjd=float(numeric["mjd"][i]) if "mjd" in numeric else np.nan,
            status=statuses[i],
            reason=reasons[i],
            flags=int(flags[i]),
            values={c: float(v[i]) for c, v in numeric.items()},
            difference=stored.get(names[i]) if statuses[i] == "ok" else None,
            texts={c: w[i] for c, w in texts.items()},
        )
        for i in range(len(rows))
    ]


def _read_target(path: Path) -> tuple[Curve | None, dict[str, float | str]]:
    """The target's light curve and where the target is."""
    if not path.is_file():
        return None, {}
    try:
        rows = Table.read(path, format="ascii.ecsv")
        mjd = _to_mjd(rows["time"])
    except UNREADABLE as error:
        log.warning("report: %s left out: %s", path.name, error)
        return None, {}
    flags = numbers(rows, "flags", 0).astype(np.int64)
    mag, is_limit = _magnitudes(rows, flags)
    curve = Curve(
        label="target",
        names=[frame_name(w) for w in words(rows, "image")],
        mjd=mjd,
        mag=mag,
        is_limit=is_limit,
        flags=flags,
        **{c: numbers(rows, c) for c in ("flux", "flux_err", "flux_diff", "flux_diff_err", "mag_err")},
    )
    place: dict[str, float | str] = {
        k: float(v) for k in _PLACE if isinstance(v := rows.meta.get(k), int | float) and np.isfinite(v)}
    if rows.meta.get("position"):
        place["position"] = printable(rows.meta["position"])
    return curve, place


def _to_mjd(column: Any) -> FloatArray:
    if isinstance(column, Time) or column.dtype.kind in "US":
        column = Time(column).mjd  # masked where an epoch has no time
    return np.ma.filled(np.ma.asarray(column, dtype=float), np.nan)


def _magnitudes(rows: Table, flags: NDArray[np.int64]) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Magnitudes, with the limit in the place of those that are limits."""
    mag, limit = numbers(rows, "mag"), numbers(rows, "limit")
    if "limit" in rows.colnames and rows["limit"].dtype.kind == "b":
        return mag, limit > 0
    is_limit = (flags & SOURCE_FLAGS.limit > 0) | ~np.isfinite(mag)
    is_limit &= np.isfinite(limit)
    return np.where(is_limit, limit, mag), is_limit


def _read_lightcurves(path: Path) -> tuple[Table, Table, dict[str, NDArray[Any]]]:
    try:
        with fits.open(path, memmap=False) as hdus:
            sources, epochs = Table(hdus["SOURCES"].data), Table(hdus["EPOCHS"].data)
            shape = (len(epochs), len(sources))
            planes = {h.name: np.asarray(h.data) for h in hdus if np.shape(h.data) == shape and h.name}
    except UNREADABLE as error:
        log.warning("report: light curves of the stars left out: %s: %s", path.name, error)
        return Table(), Table(), {}
    return sources, epochs, planes


def _read_reference(path: Path) -> tuple[FloatArray | None, fits.Header, dict[str, str]]:
    try:
        with fits.open(path, memmap=False) as hdus:
            image = np.array(hdus["IMAGE"].data, dtype=float)
            if "MASK" in hdus:
                image[np.asarray(hdus["MASK"].data) != 0] = np.nan
            headers = [hdus[0].header, hdus["IMAGE"].header]
            header = hdus["IMAGE"].header.copy()
    except UNREADABLE as error:
        log.warning("report: the reference is left out: %s: %s", path.name, error)
        return None, fits.Header(), {}
    return image, header, _cards(headers)


def _cards(headers: Iterable[fits.Header]) -> dict[str, str]:
    return {
        card.keyword: printable(card.value)
        for header in headers
        for card in header.cards
        if card.keyword.rstrip("0123456789") not in _STRUCTURE and not isinstance(card.value, fits.card.Undefined)
    }


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except UNREADABLE as error:
        log.warning("report: settings left out: %s: %s", path.name, error)
        return {}


def _target_position(settings: dict[str, Any], header: fits.Header) -> tuple[float, float] | None:
    """Pixel of the run's ``ra`` and ``dec`` in the reference image; None without them or without a WCS."""
    ra, dec = settings.get("ra"), settings.get("dec")
    if ra is None or dec is None or "CTYPE1" not in header:
        return None
    try:
        hours = isinstance(ra, str) and not ra.strip().lstrip("+-").replace(".", "", 1).isdigit()
        sky = SkyCoord(ra, dec, unit=(u.hourangle if hours else u.deg, u.deg))
        x, y = _quiet_wcs(header).world_to_pixel(sky)
    except UNREADABLE as error:
        log.warning("report: position of the target left out: %s", error)
        return None
    return (float(x), float(y)) if np.isfinite(x) and np.isfinite(y) else None


def _quiet_wcs(header: fits.Header) -> WCS:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FITSFixedWarning)  # harmless repairs of date cards
        return WCS(header)
