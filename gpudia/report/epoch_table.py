"""The table of epochs with the verdict on each, and what is said about flags and failures."""

from __future__ import annotations

import math
from collections import Counter
from html import escape
from pathlib import Path

import numpy as np

from gpudia.flags import FRAME_FLAGS, PIXEL_FLAGS, SOURCE_FLAGS, FlagTable
from gpudia.report.data import Curve, Epoch, RunData

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
_FORMS = {"bjd_tdb": "{:.6f}", "saturated_fraction": "{:.1g}"}
#: Whole numbers, for which -1 stands for: not counted.
_COUNTS = {"n_stars", "n_matched", "n_masked", "n_clipped", "n_pixels", "iterations"}
#: Texts that are a column where the images differ in them: (column, head, what it means).
_TEXTS = (("filter", "filter", "from the header"), ("instrument", "instrument", "from the header"))


def epoch_table(run: RunData, with_stamp: set[int]) -> str:
    """Return the sortable table; names link to the stamps of the epochs in `with_stamp`."""
    columns, texts = _columns(run.epochs), _texts(run.epochs)
    flux = _target_fluxes(run.target)
    heads = [("image", "file"), ("status", "verdict"), ("why", "reason and flags"), ("MJD", "mid-exposure, UTC, days")]
    heads += [("target flux (ADU)", "flux in ADU of the reference")] if flux else []
    heads += [(head, meaning) for _, head, meaning in texts + columns]
    head = "".join(
        f'<th scope="col"><button type="button" title="{escape(m)}">{escape(h)}</button></th>' for h, m in heads
    )
    rows = "".join(_row(e, columns, texts, flux, e.index in with_stamp) for e in run.epochs)
    return (
        '<div class="scroller" tabindex="0" role="region" aria-label="Table of epochs">'
        f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


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
    return [t for t in _TEXTS if len(_known(epochs, t[0])) > 1]


def _columns(epochs: list[Epoch]) -> list[tuple[str, str, str]]:
    """The known columns that are there and say something, then every other number that the run wrote."""
    present = [c for c in (epochs[0].values if epochs else ()) if any(np.isfinite(e[c]) for e in epochs)]
    if len(_exposures(epochs)) == 1:
        present.remove("exptime")
    known = {c for c, _, _ in _COLUMNS}
    others = [(c, c.replace("_", " "), c) for c in present if c not in known | _NOT_NUMBERS]
    return [c for c in _COLUMNS if c[0] in present] + others


def _target_fluxes(target: Curve | None) -> dict[str, tuple[float, float]]:
    if target is None:
        return {}
    return {n: (float(f), float(e)) for n, f, e in zip(target.names, target.flux, target.flux_err, strict=True)}


def _row(
    epoch: Epoch, columns: list[tuple[str, str, str]], texts: list[tuple[str, str, str]],
    flux: dict[str, tuple[float, float]], linked: bool,
) -> str:  # fmt: skip
    name = escape(epoch.name)
    link = f'<a href="#stamp-{epoch.index}">{name}</a>' if linked else name
    cells = [
        f'<td class="name" title="{escape(epoch.file)}" data-sort="{name}">{link}</td>',
        f'<td data-sort="{escape(epoch.status)}">{status_badge(epoch.status)}</td>',
        f'<td class="verdict">{escape(epoch.reason)} {flag_badges(epoch.flags)}</td>',
        _number_cell(epoch.mjd, "{:.5f}"),
    ]
    if flux:
        cells.append(_flux_cell(flux.get(epoch.name) if epoch.status == "ok" else None))
    cells += [f"<td>{escape(epoch.texts.get(column, ''))}</td>" for column, _, _ in texts]
    cells += [_number_cell(_counted(epoch, column), _FORMS.get(column, "{:.4g}")) for column, _, _ in columns]
    left_out = ' class="left-out"' if epoch.status == "skipped" else ""
    return f'<tr id="epoch-{epoch.index}"{left_out}>{"".join(cells)}</tr>'


def _counted(epoch: Epoch, column: str) -> float:
    value = epoch[column]
    return math.nan if column in _COUNTS and value < 0 else value


def _number_cell(value: float, form: str = "{:.4g}") -> str:
    if not np.isfinite(value):
        return '<td class="number" data-sort="">\N{EN DASH}</td>'
    return f'<td class="number" data-sort="{value:.12g}">{_minus(form, value)}</td>'


def _minus(form: str, value: float) -> str:
    whole = value == round(value) and abs(value) < 1e7
    return (f"{value:.0f}" if whole else form.format(value)).replace("-", "\N{MINUS SIGN}")


def _flux_cell(pair: tuple[float, float] | None) -> str:
    if pair is None or not np.isfinite(pair[0]):
        return _number_cell(np.nan)
    text = _with_error(*pair).replace("-", "\N{MINUS SIGN}")
    return f'<td class="number" data-sort="{pair[0]:.12g}">{text}</td>'


def _with_error(value: float, error: float) -> str:
    """The value to the second significant digit of its error."""
    if not (np.isfinite(error) and error > 0):
        return f"{value:.6g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


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
    groups: dict[tuple[str, str, int], list[str]] = {}
    for e in epochs:
        if e.status != "ok":
            key = (e.status, e.reason, e.flags)
            if e.status == "skipped":  # those that one condition leaves out belong together, whatever was found in each
                key = (e.status, e.reason.split(", got ")[0], 0)
            groups.setdefault(key, []).append(Path(e.file).name or e.name)
    if not groups:
        return "<p>Nothing failed: every image was subtracted.</p>"
    items = "".join(
        f"<li>{status_badge(status)} <b>{escape(reason or 'no reason given')}</b> {flag_badges(flags)}<br>"
        f"{escape(_shortened(files))}</li>"
        for (status, reason, flags), files in sorted(groups.items(), key=lambda g: -len(g[1]))
    )
    return f'<ul class="reasons">{items}</ul>'


def _shortened(files: list[str], limit: int = 12) -> str:
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
