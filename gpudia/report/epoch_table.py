"""The table of epochs with the verdict on each, and what is said about flags and failures."""

from __future__ import annotations

import math
from collections import Counter
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from gpudia.flags import FRAME_FLAGS, PIXEL_FLAGS, SOURCE_FLAGS, FlagTable
from gpudia.report.data import Curve, Epoch, RunData
from gpudia.report.tables import flags_column, numbers_column, table_place, texts_column

__all__ = ["common_facts", "epoch_table", "failures", "flag_badges", "flag_legend", "status_badge"]

_SYMBOL = {"ok": "\N{CHECK MARK}", "failed": "\N{MULTIPLICATION X}", "skipped": "\N{EN DASH}"}
#: Known columns of epochs.ecsv in the order of the page: (column, head, what it means).
_COLUMNS = (
    ("fwhm", "FWHM (px)", "seeing, pixels"),
    ("sky", "sky (ADU)", "sky level"),
    ("scale", "scale", "photometric scale: flux in this image over flux in the reference"),
    ("scale_err", "± scale", "1 sigma of the scale"),
    ("chi2", "chi²", "chi² per pixel of the fit; 1 is perfect"),
    ("noise_gain", "noise gain", "above 1: the kernel deconvolves and amplifies noise"),
    ("correlation", "correlation", "of neighbouring pixels of the difference over its error; 0 is white noise"),
    ("n_masked", "masked (px)", "pixels left out"),
    ("epsilon", "epsilon", "scale error that the constant stars show"),
    ("bjd_tdb", "BJD (TDB)", "mid-exposure at the barycentre of the solar system, days"),
    ("exptime", "exposure (s)", "exposure time"),
    ("airmass", "airmass", "from the header"),
    ("sky_noise", "sky noise (ADU)", "noise of a sky pixel, 1 sigma"),
    ("n_stars", "stars", "stars detected"),
    ("ellipticity", "ellipticity", "1 - b/a of bright stars"),
    ("saturated_fraction", "saturated", "share of the pixels that are saturated"),
)
_NOT_NUMBERS = {"mjd", "flags"}
_DECIMALS = {"bjd_tdb": 6}
#: Whole numbers, for which -1 stands for: not counted.
_COUNTS = {"n_stars", "n_matched", "n_masked", "n_clipped", "n_pixels", "iterations"}
_MOST_REASONS = 30
#: Texts that are a column where the images differ in them: (column, head, what it means).
_TEXTS = (("filter", "filter", "from the header"), ("instrument", "instrument", "from the header"))


def epoch_table(run: RunData) -> str:
    """Return the place of the sortable table; names link to the stamps of their epochs."""
    epochs = run.epochs
    folder = _folder([e.file for e in epochs])
    columns = [
        texts_column("image", "file", [e.name for e in epochs], "name", link="stamp", folder=folder,
                     files=[e.file[len(folder):] for e in epochs]),
        texts_column("status", "verdict", [e.status for e in epochs], "status"),
        flags_column("why", "reason and flags", [e.flags for e in epochs], FRAME_FLAGS, [e.reason for e in epochs],
                     anchors=True),
        numbers_column("MJD", "mid-exposure, UTC, days", [e.mjd for e in epochs], decimals=5),
    ]
    if run.target is not None:
        columns.append(_target_column(run.target, epochs))
    texts = [(c, texts_column(head, meaning, [e.texts[c] for e in epochs])) for c, head, meaning in _texts(epochs)]
    first = {c for c, _, _ in _TEXTS}
    columns += [column for c, column in texts if c in first]
    columns += [
        numbers_column(head, meaning, [_counted(e, column) for e in epochs], decimals=_DECIMALS.get(column))
        for column, head, meaning in _columns(epochs)
    ]
    columns += [column for c, column in texts if c not in first]
    return table_place("epochs", columns, "Table of epochs", "epochs.ecsv", "epoch")


def _folder(files: list[str]) -> str:
    """Folder that all files share, with its slash, to be stored once; empty where there is none."""
    folders = {file[: file.rfind("/") + 1] for file in files}
    return folders.pop() if len(folders) == 1 else ""


def _target_column(target: Curve, epochs: list[Epoch]) -> dict[str, Any]:
    flux = {n: (f, e) for n, f, e in zip(target.names, target.flux, target.flux_err, strict=True)}
    pairs = [flux.get(e.name, (np.nan, np.nan)) if e.status == "ok" else (np.nan, np.nan) for e in epochs]
    return numbers_column("target flux (ADU)", "flux in ADU of the reference", [p[0] for p in pairs], digits=7,
                          errors=[p[1] for p in pairs])


def common_facts(epochs: list[Epoch]) -> str:
    """Say what all images have in common (``filter rp, exposure 60 s``); the table leaves it out. Empty: nothing."""
    facts = [(column, _known(epochs, column)) for column, _, _ in _TEXTS]
    facts.append(("exposure", {f"{seconds:g} s" for seconds in _exposures(epochs)}))
    return ", ".join(f"{name} {values.pop()}" for name, values in facts if len(values) == 1)


def _known(epochs: list[Epoch], column: str) -> set[str]:
    return {e.texts[column] for e in epochs if e.texts.get(column)}


def _exposures(epochs: list[Epoch]) -> set[float]:
    return {e["exptime"] for e in epochs if np.isfinite(e["exptime"])}


def _texts(epochs: list[Epoch]) -> list[tuple[str, str, str]]:
    """Texts in which the images differ: those from the header first, then every other that the run wrote."""
    known = [c for c, _, _ in _TEXTS]
    others = [(c, c.replace("_", " "), c) for c in (epochs[0].texts if epochs else ()) if c not in known]
    return [t for t in (*_TEXTS, *others) if len(_known(epochs, t[0])) > 1]


def _columns(epochs: list[Epoch]) -> list[tuple[str, str, str]]:
    """The known columns that are there and say something, then every other number that the run wrote."""
    present = [c for c in (epochs[0].values if epochs else ()) if any(np.isfinite(e[c]) for e in epochs)]
    if len(_exposures(epochs)) == 1:
        present.remove("exptime")
    known = {c for c, _, _ in _COLUMNS}
    others = [(c, c.replace("_", " "), c) for c in present if c not in known | _NOT_NUMBERS]
    return [c for c in _COLUMNS if c[0] in present] + others


def _counted(epoch: Epoch, column: str) -> float:
    value = epoch[column]
    return math.nan if column in _COUNTS and value < 0 else value


def status_badge(status: str) -> str:
    """Return a status with its symbol, so that colour is not the only sign."""
    known = status if status in _SYMBOL else "failed"
    return f'<span class="status {known}">{_SYMBOL[known]} {escape(status or "no status")}</span>'


def flag_badges(value: int) -> str:
    """Return the names of the bits of a frame, with meaning and remedy as tooltip and a link to the legend."""
    explained = {f.name: f"{f.meaning}. What to do: {f.remedy}" for f in FRAME_FLAGS}
    return "".join(
        f'<a class="flag" href="#flag-{escape(n)}" title="{escape(explained.get(n, "unknown bit"))}">{escape(n)}</a>'
        for n in FRAME_FLAGS.decode(value)
    )


def failures(epochs: list[Epoch]) -> str:
    """Return what failed or was skipped, grouped by reason, and the flags of the images that went through."""
    return _reasons(epochs) + _flag_counts([e for e in epochs if e.status == "ok"])


def _reasons(epochs: list[Epoch]) -> str:
    groups: dict[tuple[str, str], list[Epoch]] = {}
    for e in epochs:
        if e.status != "ok":  # those that break one rule belong together, whatever was found in each
            groups.setdefault((e.status, e.reason.split(", got ")[0]), []).append(e)
    if not groups:
        return "<p>Nothing failed: every image was subtracted.</p>"
    largest = sorted(groups.items(), key=lambda g: -len(g[1]))
    items = "".join(_reason_item(status, reason, some) for (status, reason), some in largest[:_MOST_REASONS])
    rest = len(largest) - _MOST_REASONS
    more = f"<p>And {rest} other reasons: see the table.</p>" if rest > 0 else ""
    return f'<ul class="reasons">{items}</ul>{more}'


def _reason_item(status: str, reason: str, some: list[Epoch]) -> str:
    whole = some[0].reason if len({e.reason for e in some}) == 1 else reason
    flags = some[0].flags if len({e.flags for e in some}) == 1 else 0
    count = f"{len(some)} images: " if len(some) > 1 else ""
    return (
        f"<li>{status_badge(status)} <b>{escape(whole or 'no reason given')}</b> {flag_badges(flags)}<br>"
        f"{count}{escape(_shortened([Path(e.file).name or e.name for e in some]))}</li>"
    )


def _shortened(files: list[str], limit: int = 5) -> str:
    more = f" and {len(files) - limit} more" if len(files) > limit else ""
    return ", ".join(files[:limit]) + more


def _flag_counts(epochs: list[Epoch]) -> str:
    count = Counter(name for e in epochs for name in FRAME_FLAGS.decode(e.flags))
    if not count:
        return ""
    known = {f.name: f for f in FRAME_FLAGS}
    items = "".join(
        f"<li>{flag_badges(known[n].value)} {k} of {len(epochs)}: {escape(known[n].meaning)}. "
        f"What to do: {escape(known[n].remedy)}.</li>"
        for n, k in count.most_common()
        if n in known
    )
    return f'<h3>Subtracted, with a remark</h3><ul class="reasons">{items}</ul>'


def flag_legend() -> str:
    """Return the tables of all flags."""
    return (
        "<h3>Images (epochs)</h3>"
        + _legend_table(FRAME_FLAGS, anchors=True)
        + "<details><summary>Stars, per epoch</summary>"
        + _legend_table(SOURCE_FLAGS)
        + "</details><details><summary>Pixels of a mask</summary>"
        + _legend_table(PIXEL_FLAGS)
        + "</details>"
    )


def _legend_table(table: FlagTable, anchors: bool = False) -> str:
    anchor = ' id="flag-{}"' if anchors else ""
    rows = "".join(
        f'<tr{anchor.format(f.name)}><td class="number">{f.value}</td><td>{escape(f.name)}</td>'
        f"<td>{escape(f.meaning)}</td><td>{escape(f.remedy)}</td></tr>"
        for f in table
    )
    return (
        '<div class="scroller" tabindex="0" role="region" aria-label="Legend of flags"><table><thead><tr>'
        '<th scope="col">bit</th><th scope="col">name</th><th scope="col">meaning</th>'
        f'<th scope="col">what to do</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )
