"""The interactive light curve of the page: its data as JSON and its controls as HTML."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np

from gpudia.flags import SOURCE_FLAGS
from gpudia.messages import printable
from gpudia.report.data import Curve, Epoch
from gpudia.report.plots import time_axis
from gpudia.report.tables import as_json, number

__all__ = ["controls", "curves_json", "overlaid_json"]

_TOOLBAR = """<div class="toolbar">{star}
<div class="group" role="group" aria-label="Quantity">
<button type="button" data-quantity="flux" aria-pressed="true">Flux</button>
<button type="button" data-quantity="diff" aria-pressed="false">Difference</button>
<button type="button" data-quantity="mag" aria-pressed="false">Magnitude</button></div>
<div class="group" role="group" aria-label="Zoom">
<button type="button" data-action="in" aria-label="Zoom in">+</button>
<button type="button" data-action="out" aria-label="Zoom out">&minus;</button>
<button type="button" data-action="reset">Reset</button></div></div>
<div class="chart"><svg role="img" tabindex="0" aria-label="Light curve: flux against time; arrow keys go from point to
point, plus and minus zoom, Escape resets"></svg><div class="tip" hidden></div></div>
<p class="readout" aria-live="polite">Point at an epoch, or tap it, to read it. Drag to move; pinch, the buttons, or the
wheel after a click zoom; a double click resets. Hollow circles carry a flag, triangles are upper limits.</p>"""


def curves_json(curves: list[Curve], epochs: list[Epoch]) -> str:
    """Return the curves of one run as JSON that is safe inside a ``<script>`` element.

    All curves share the names and times of the frames: `x` is the time from a round start, in the unit that `time`
    names; a series has its values by column, `at` says for which frames.
    """
    return _json(["this run"], [[[c] for c in curves]], [epochs])


def overlaid_json(labels: list[str], pairs: list[tuple[Curve, Curve]], label: str) -> str:
    """Return curves of two runs, in one unit, as JSON for one chart."""
    return _json(labels, [[[first] for first, _ in pairs], [[second] for _, second in pairs]], [[], []], label)


def _json(labels: list[str], curves: list[list[list[Curve]]], epochs: list[list[Epoch]], label: str = "") -> str:
    every = [[c for some in run for c in some] for run in curves]
    times = [_times(some) for some in every]
    offsets, time = time_axis(np.array([t for run in times for t in run.values()], dtype=float))
    runs, places, start = [], [], 0
    for name, run, known in zip(labels, times, epochs, strict=True):
        index = {e.name: e.index for e in known if e.status == "ok"}
        runs.append({"label": printable(name), "names": [printable(n) for n in run],
                     "epochs": [index.get(n) for n in run], "mjd": [f"{t:.6f}" for t in run.values()],
                     "x": [number(v, 9) for v in offsets[start : start + len(run)].tolist()]})
        places.append({n: k for k, n in enumerate(run)})
        start += len(run)
    together = [
        {"label": printable(label or some[0][0].label),
         "series": [_series(c, k, places[k]) for k, of_run in enumerate(some) for c in of_run]}
        for some in zip(*curves, strict=True)
    ]  # fmt: skip
    return as_json({"time": time, "runs": runs, "curves": together, "bits": [[f.value, f.name] for f in SOURCE_FLAGS]})


def _times(curves: list[Curve]) -> dict[str, float]:
    return {name: float(t) for c in curves for name, t in zip(c.names, c.mjd, strict=True)}


def _series(curve: Curve, run: int, places: dict[str, int]) -> dict[str, Any]:
    columns = {"flux": curve.flux, "flux_err": curve.flux_err, "diff": curve.flux_diff, "diff_err": curve.flux_diff_err,
               "mag": curve.mag, "mag_err": curve.mag_err}
    series: dict[str, Any] = {"run": run, "at": [places[n] for n in curve.names], "flags": curve.flags.tolist(),
                              "limit": curve.is_limit.astype(int).tolist()}
    for name, values in columns.items():
        if np.isfinite(values).any():
            series[name] = [number(v, 4 if name.endswith("_err") else 7) for v in values.tolist()]
    return series


def controls(labels: list[str]) -> str:
    """Return the toolbar and the empty chart; a selector when there is more than one curve."""
    star = ""
    if len(labels) > 1:
        options = "".join(f'<option value="{i}">{escape(printable(label))}</option>' for i, label in enumerate(labels))
        star = f'<label for="star">Star</label><select id="star">{options}</select>'
    return _TOOLBAR.format(star=star)
