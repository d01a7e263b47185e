"""What is known of every frame after the first look, as one table; and which frames take part."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from astropy.table import Column, Table
from numpy.typing import NDArray

from gpudia.config import RunConfig
from gpudia.errors import ConfigError
from gpudia.flags import FRAME_FLAGS
from gpudia.images import barycentric_times, check_mixture
from gpudia.messages import printable
from gpudia.pipeline.codec import decode, encode
from gpudia.pipeline.executors import Executor
from gpudia.pipeline.looks import Look
from gpudia.selection import SERIES_COLUMNS, parse_condition

__all__ = ["drop_odd", "known_barycentric", "note_barycentric", "note_untimed", "select_frames", "series_table"]

log = logging.getLogger("gpudia.pipeline")

_OF_THE_LOOK = ("name", "mjd", "exptime", "filter", "instrument", "airmass")


def _series_row(look: Look) -> dict[str, Any]:
    """What the series table says of a frame; NaN, or an empty text, where it is not known."""
    row: dict[str, Any] = {"file": printable(look.path)} | {name: getattr(look, name) for name in _OF_THE_LOOK}
    for column in SERIES_COLUMNS:
        if column.name not in row:
            row[column.name] = getattr(look.quality, column.name, math.nan)
    return row


def series_table(looks: Sequence[Look]) -> Table:
    """Return what is known of every frame after one pass over headers and images.

    Parameters
    ----------
    looks : sequence of Look
        N frames, those that failed or were skipped too.

    Returns
    -------
    `~astropy.table.Table`
        N rows in their order, with the columns of `gpudia.selection.SERIES_COLUMNS`, their units and descriptions;
        ``bjd_tdb`` after ``mjd``, and ``longitude, latitude, height`` of the observatory at the end, where they are
        known of any frame. Unknown: NaN, an empty text, -1 stars.
    """
    rows = [_series_row(look) for look in looks]
    table = Table()
    for column in SERIES_COLUMNS:
        values: Any = [row[column.name] for row in rows]
        if column.name == "n_stars":
            values = np.array([-1 if math.isnan(n) else n for n in values], dtype=np.int64)
        kind = str if column.is_text else None if column.name == "n_stars" else float
        table[column.name] = Column(values, dtype=kind, unit=column.unit or None, description=column.about)
    times = known_barycentric(looks)
    if times is not None:
        table.add_column(Column(times, unit="d", description="mid-exposure, BJD_TDB, of the target", name="bjd_tdb"),
                         index=table.index_column("mjd") + 1)
    if any(look.site is not None for look in looks):
        sites = np.array([(math.nan,) * 3 if look.site is None else look.site for look in looks], dtype=float)
        for values, (name, unit) in zip(sites.T, (("longitude", "deg"), ("latitude", "deg"), ("height", "m")),
                                        strict=True):
            table[name] = Column(values, unit=unit, description="of the observatory")
    return table


def select_frames(looks: Sequence[Look], conditions: Sequence[str]) -> None:
    """Skip the frames that do not satisfy every condition.

    Parameters
    ----------
    looks : sequence of Look
        Changed in place. A frame that failed stays failed, unless what is known of it says that it is not wanted.
    conditions : sequence of str
        See `gpudia.selection`.

    Raises
    ------
    ConfigError
        If a condition is none, or no usable frame satisfies them all.
    """
    parsed = [parse_condition(text) for text in conditions]
    usable = [look for look in looks if not look.reason]
    for look in looks:
        row = _series_row(look)
        for condition in parsed:
            truth = condition.holds(row)
            if truth is False or (truth is None and not look.reason):
                look.skip(f"not selected: {condition.text}, got {condition.found(row)}")
                break
    left = sum(not look.reason for look in usable)
    if parsed:
        log.info("%d of %d frames selected", left, len(looks))
    if usable and not left:
        raise ConfigError(f"select must leave at least one frame, got none of {len(usable)}: {_by_condition(usable)}")


def _by_condition(looks: Sequence[Look]) -> str:
    """How many frames each condition left out, and some of the values found."""
    found: dict[str, list[str]] = {}
    for look in looks:
        condition, _, value = look.reason.partition(", got ")
        found.setdefault(condition, []).append(value)
    parts = []
    for condition, values in found.items():
        some = list(dict.fromkeys(values))
        parts.append(f"{len(values)} {condition}, got {'; '.join(some[:3])}{'; ...' if len(some) > 3 else ''}")
    return " | ".join(parts)


def drop_odd(looks: Sequence[Look], config: RunConfig, reference: Look | None = None) -> None:
    """Fail the few frames of another filter or instrument than the others, unless the settings let them differ.

    Parameters
    ----------
    looks : sequence of Look
        Changed in place.
    config : RunConfig
        `mixed` says what may differ.
    reference : Look, optional
        What the others must agree with; default: the commonest filter and instrument.

    Raises
    ------
    ConfigError
        If the series is a real mixture; see `gpudia.images.check_mixture`.
    """
    for name in ("filter", "instrument"):
        if name in config.mixed:
            continue
        usable = [look for look in looks if not look.reason]
        wanted = "" if reference is None else getattr(reference, name)
        for index, error in check_mixture(usable, name, wanted).items():
            usable[index].fail(error)


def note_untimed(looks: Sequence[Look]) -> None:
    """Flag the usable frames whose time is not known, and say how many they are."""
    untimed = [look for look in looks if not look.reason and not math.isfinite(look.mjd)]
    for look in untimed:
        look.flags |= FRAME_FLAGS.no_time
    if untimed:
        names = ", ".join(look.name for look in untimed[:5]) + (", ..." if len(untimed) > 5 else "")
        log.warning("%d of %d frames have no time in their headers: %s; name its keyword with mjd_keys or mid_keys in "
                    "[layout]", len(untimed), len(looks), names)


def note_barycentric(looks: Sequence[Look], config: RunConfig, executor: Executor) -> Callable[[], None]:
    """Note every frame's site, from the settings or its header; begin with the barycentric times of the target, if any.

    Returns
    -------
    callable
        Waits for the times and notes them.
    """
    for look in looks:
        look.site = config.site or look.site
    if config.ra is None or config.dec is None:
        return lambda: None
    where = [look.mjd for look in looks], [look.site for look in looks], config.ra, config.dec
    made = executor.begin(do_barycentric, where, b"")

    def note() -> None:
        times = decode(made())
        for look, time in zip(looks, times, strict=True):
            look.bjd_tdb = float(time)
        if not np.isfinite(times).any():
            log.info("no barycentric times: no frame with a time says where it was taken (give --site LON LAT HEIGHT)")

    return note


def do_barycentric(item: tuple[Any, ...], _: bytes) -> bytes:
    """Make barycentric times: a task."""
    return encode(barycentric_times(*item))


def known_barycentric(looks: Sequence[Look]) -> NDArray[np.float64] | None:
    """BJD_TDB of every frame, days, NaN where unknown; None where it is known of none."""
    times = np.array([look.bjd_tdb for look in looks], dtype=float)
    return times if np.isfinite(times).any() else None
