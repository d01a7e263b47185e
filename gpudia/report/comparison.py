"""Two runs side by side: one page with both light curves, the scatter of the stars, and what differs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

from gpudia.errors import ConfigError, InputError
from gpudia.flags import FRAME_FLAGS
from gpudia.images.writing import write_atomically
from gpudia.messages import printable
from gpudia.photometry import read_lightcurves, tie_references
from gpudia.report.data import Curve, Epoch, FloatArray, RunData, numbers, read_run
from gpudia.report.light_curve import controls, overlaid_json
from gpudia.report.page import assemble, tile_list
from gpudia.report.plots import DARK, LIGHT, comparison_figure, render
from gpudia.report.scatter import Scatter, star_scatter
from gpudia.report.sections import backend_of, flat_settings, picture_pair, reference_of, version_of
from gpudia.report.tables import table_place, texts_column

__all__ = ["Comparison", "compare_runs"]

#: Stars of two runs are one star within so many arcsec, or pixels where positions on the sky are not known.
_NEAR = 1.0


@dataclass(frozen=True)
class Comparison:
    """What came of comparing two runs: the `page`, and `lines` of text that say it in short."""

    page: Path
    lines: tuple[str, ...]

    def summary(self) -> str:
        """Return what a person wants to know in ten seconds."""
        return "\n".join([*self.lines, f"page: {self.page}"])


@dataclass(frozen=True)
class _Pair:
    """Two runs; fluxes of the second times `ratio` are in the first one's unit."""

    runs: tuple[RunData, RunData]
    labels: tuple[str, str]
    ratio: float
    tie: str
    scatter: tuple[Scatter, Scatter]
    matched: tuple[NDArray[np.intp], NDArray[np.intp]]

    @property
    def rms_ratio(self) -> FloatArray:
        """Scatter of the matched stars in the second run over that in the first."""
        first, second = (s.measured[k] for s, k in zip(self.scatter, self.matched, strict=True))
        return second * self.ratio / first


def compare_runs(first: Path, second: Path, page: Path | None = None, overwrite: bool = False) -> Comparison:
    """Compare two runs of (some of) the same frames.

    Parameters
    ----------
    first, second : Path
        Output folders of `gpudia.run`. Fluxes of the second are brought to the first one's unit by `tie_references`.
    page : Path, optional
        File to write; default: ``comparison.html`` in `first`, which is replaced.
    overwrite : bool
        Replace a `page` that is there already.

    Returns
    -------
    Comparison

    Raises
    ------
    ConfigError
        The page is there already or cannot be written, or both folders are one.
    InputError
        A folder holds no readable ``epochs.ecsv``.
    """
    first, second = Path(first), Path(second)
    if page is not None and page.exists() and not overwrite:
        raise ConfigError(f"output must be a new file (or say --overwrite), got {page}")
    if os.path.realpath(first) == os.path.realpath(second):
        raise ConfigError(f"runs must be two, got {first} twice")
    pair = _read(first, second)
    lines = [f"{label}: {_line(run, scatter)}" for label, run, scatter in
             zip(pair.labels, pair.runs, pair.scatter, strict=True)]
    lines += [text for text in (pair.tie, _rms_text(pair)) if text]
    content = _page(pair).encode("utf-8")
    path = write_atomically(page or first / "comparison.html", lambda p: p.write_bytes(content))
    return Comparison(path, tuple(lines))


def _read(first: Path, second: Path) -> _Pair:
    runs = read_run(first), read_run(second)
    ratio, tie = _tie(first, second)
    scatter = star_scatter(runs[0]), star_scatter(runs[1])
    labels = _labels(Path(os.path.realpath(first)), Path(os.path.realpath(second)))
    return _Pair(runs, labels, ratio, tie, scatter, _match(runs, scatter))


def _labels(first: Path, second: Path) -> tuple[str, str]:
    """Names of the folders, as much of the paths as tells them apart."""
    shared = Path(os.path.commonpath([first, second]))
    a, b = (str(p.relative_to(shared)) if p != shared else p.name for p in (first, second))
    return printable(a), printable(b)


def _tie(first: Path, second: Path) -> tuple[float, str]:
    """Ratio of the flux units, and what is to be said of it."""
    try:
        tie = tie_references(read_lightcurves(second), read_lightcurves(first))
    except (InputError, OSError, KeyError, ValueError) as error:
        return 1.0, f"flux units not tied: {printable(error)}"
    return tie.ratio, f"flux unit of the second over that of the first: {tie.ratio:.5f} \N{PLUS-MINUS SIGN} " \
                      f"{tie.error:.5f}, from {tie.n} images in both"


def _match(runs: Sequence[RunData], scatter: Sequence[Scatter]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows of both scatters that are one star: each the other's nearest."""
    places = [_places(run, s) for run, s in zip(runs, scatter, strict=True)]
    if not all(map(len, places)):
        return np.empty(0, np.intp), np.empty(0, np.intp)
    distance, there = KDTree(places[1]).query(places[0], distance_upper_bound=_NEAR)
    found = np.flatnonzero(np.isfinite(distance))
    back = KDTree(places[0]).query(places[1][there[found]])[1]
    found = found[back == found]
    return found, there[found]


def _places(run: RunData, scatter: Scatter) -> FloatArray:
    """Positions on the sky in arcsec, else pixels."""
    sky = np.column_stack([numbers(run.sources, c)[scatter.stars] for c in ("ra", "dec")])
    if np.isfinite(sky).all():
        return sky * 3600 * np.column_stack([np.cos(np.radians(sky[:, 1])), np.ones(len(sky))])
    return np.column_stack([numbers(run.sources, c)[scatter.stars] for c in ("x", "y")])


# ---------- what is said ----------


def _line(run: RunData, scatter: Scatter) -> str:
    chi2 = [e["chi2"] for e in run.epochs if e.status == "ok"]
    parts = [f"{run.count('ok')} of {len(run.epochs)} images ok"]
    if np.isfinite(chi2).any():
        parts.append(f"median chi^2 {np.nanmedian(chi2):.3f}")
    if len(scatter):
        parts.append(f"scatter over stated error {np.median(scatter.ratio):.3f} (ideal {scatter.ideal:.3f})")
    return ", ".join(parts)


def _rms_text(pair: _Pair) -> str:
    ratio = pair.rms_ratio
    if not len(ratio):
        return ""
    error = 1.2533 * 1.4826 * np.median(np.abs(ratio - np.median(ratio))) / np.sqrt(len(ratio))
    return (f"scatter of the same stars in the second over the first: median {np.median(ratio):.3f} "
            f"\N{PLUS-MINUS SIGN} {error:.3f}, {len(ratio)} stars")


def _page(pair: _Pair) -> str:
    a, b = map(escape, pair.labels)
    summary = (
        f'<span class="legend"><i class="s0"></i> <b>{a}</b></span> and <span class="legend"><i class="s1"></i> '
        f"<b>{b}</b></span>. {escape(pair.tie[:1].upper() + pair.tie[1:])}."
    )
    different = _verdicts(pair)
    tiles = [("", f"{pair.ratio:.4f}", "ratio of the flux units"), ("", str(different[1]), "verdicts that differ")]
    if len(pair.rms_ratio):
        tiles.insert(0, ("", f"{np.median(pair.rms_ratio):.3f}", "scatter, second over first"))
    sections = [
        ("lightcurve", "Light curves", "Light curves", _light_curves(pair)),
        ("numbers", "In numbers", "Numbers", _numbers(pair)),
        ("scatter", "Scatter of the stars", "Scatter", _scatter(pair)),
        ("epochs", "Verdicts that differ", "Verdicts", different[0]),
        ("settings", "Settings that differ", "Settings", _settings(pair)),
    ]
    return assemble(f"{pair.labels[0]} and {pair.labels[1]} compared", summary, tile_list(tiles), sections)


def _light_curves(pair: _Pair) -> str:
    first, second = (run.target for run in pair.runs)
    if first is None or second is None:
        return "<p>There is no light curve of a target in both runs.</p>"
    scaled = _scaled(second, pair.ratio)
    data = overlaid_json(list(pair.labels), [(_no_magnitudes(first), scaled)], "target")
    return (
        '<p class="note">Fluxes of the second run in the unit of the first.</p>'
        f'{controls(["target"])}<script id="lightcurve-data" type="application/json">{data}</script>'
    )


def _no_magnitudes(curve: Curve) -> Curve:
    return replace(curve, mag=np.full(len(curve.mjd), np.nan), is_limit=np.zeros(len(curve.mjd), bool))


def _scaled(curve: Curve, ratio: float) -> Curve:
    names = ("flux", "flux_err", "flux_diff", "flux_diff_err")
    return replace(_no_magnitudes(curve), **{n: getattr(curve, n) * ratio for n in names})


def _numbers(pair: _Pair) -> str:
    rows: dict[str, list[str]] = {}
    for run, scatter in zip(pair.runs, pair.scatter, strict=True):
        for name, text in _facts(run, scatter).items():
            rows.setdefault(name, []).append(text)
    return _static_table(["", *pair.labels], [[name, *texts] for name, texts in rows.items()], "Numbers of both runs")


def _facts(run: RunData, scatter: Scatter) -> dict[str, str]:
    def middle(column: str, form: str) -> str:
        values = [e[column] for e in run.epochs if e.status == "ok"]
        return form.format(np.nanmedian(values)) if np.isfinite(values).any() else "\N{EN DASH}"

    low, mid, high = np.percentile(scatter.ratio, [16, 50, 84]) if len(scatter) else (np.nan,) * 3
    return {
        "images ok, failed, skipped": ", ".join(str(run.count(s)) for s in ("ok", "failed", "skipped")),
        "stars": str(len(run.sources)),
        "median chi² per pixel": middle("chi2", "{:.4f}"),
        "median error of the scale": middle("scale_err", "{:.2g}"),
        "median noise gain": middle("noise_gain", "{:.3f}"),
        "scatter over stated error, median (16 % to 84 %)": f"{mid:.3f} ({low:.3f} to {high:.3f})",
        "... of perfect errors": f"{scatter.ideal:.3f}",
        "work on the images (s)": f"{np.nansum([e['seconds'] for e in run.epochs]):.4g}",
        "reference": reference_of(run), "backend": backend_of(run), "gpudia": version_of(run),
    }  # fmt: skip


def _scatter(pair: _Pair) -> str:
    if not all(map(len, pair.scatter)):
        return "<p>The scatter of the stars is not known in both runs.</p>"
    pngs = [render(comparison_figure(pair.scatter, pair.matched, pair.ratio, pair.labels, t)) for t in (LIGHT, DARK)]
    picture = picture_pair((pngs[0], pngs[1]), "Scatter of the stars in both runs against their flux")
    text = _rms_text(pair)
    return (
        f'<div class="plot">{picture}<div><p>{escape(text[:1].upper() + text[1:])}.</p><p class="note">Standard '
        "deviation of the flux over the epochs, in the unit of the first run. Below: of stars that both runs measure, "
        "the second over the first; below 1 the second run is quieter. A run that takes in more images, or worse ones, "
        "has more scatter for that alone.</p></div></div>"
    )


def _verdicts(pair: _Pair) -> tuple[str, int]:
    """The table of images whose status or flags differ, or that only one run has, and how many there are."""
    known: list[dict[str, Epoch]] = [{e.name: e for e in run.epochs} for run in pair.runs]
    names = list(dict.fromkeys([*known[0], *known[1]]))
    rows = [(name, [_said(one.get(name)) for one in known]) for name in names]
    rows = [(name, said) for name, said in rows if said[0] != said[1]]
    if not rows:
        return "<p>Status and flags of all images are the same.</p>", 0
    columns: list[dict[str, Any]] = [texts_column("image", "name", [name for name, _ in rows], "name")]
    for k, label in enumerate(pair.labels):
        columns.append(texts_column(label, "status, flags and reason", [said[k] for _, said in rows]))
    return table_place("verdicts", columns, "Table of verdicts that differ", "epochs.ecsv of both"), len(rows)


def _said(epoch: Epoch | None) -> str:
    if epoch is None:
        return "not in this run"
    ignored = FRAME_FLAGS.is_reference | FRAME_FLAGS.in_reference  # which is the reference is said above
    flags = ", ".join(FRAME_FLAGS.decode(epoch.flags & ~ignored))
    return ": ".join(part for part in (epoch.status, flags, epoch.reason) if part)


def _settings(pair: _Pair) -> str:
    flat = [flat_settings(run.settings) for run in pair.runs]
    keys = [k for k in dict.fromkeys([*flat[0], *flat[1]]) if k not in ("output", "overwrite", "resume")]
    rows = [[key, *(one.get(key, "not set") for one in flat)] for key in keys if flat[0].get(key) != flat[1].get(key)]
    if not rows:
        return "<p>The settings are the same.</p>"
    return _static_table(["setting", *pair.labels], rows, "Settings that differ")


def _static_table(head: Sequence[str], rows: Sequence[Sequence[str]], label: str) -> str:
    heads = "".join(f'<th scope="col">{escape(h)}</th>' for h in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(printable(c))}</td>" for c in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroller" tabindex="0" role="region" aria-label="{escape(label)}"><table class="plain">'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )
