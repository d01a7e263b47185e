"""The interactive light curve of the page: its data as JSON and its controls as HTML."""

from __future__ import annotations

import json
from html import escape
from typing import Any

import numpy as np

from gpudia.flags import SOURCE_FLAGS
from gpudia.report.data import Curve, Epoch, FloatArray
from gpudia.report.plots import time_axis

__all__ = ["controls", "curves_json"]

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
    """Return the curves as JSON that is safe inside a ``<script>`` element.

    All curves share one time axis: `x` is the time from a round start, in the unit that `time` names.
    """
    index = {e.name: e.index for e in epochs if e.status == "ok"}
    times = np.concatenate([c.mjd for c in curves]) if curves else np.array([])
    offsets, label = time_axis(times)
    starts = np.cumsum([0, *(len(c.mjd) for c in curves)])
    data = {
        "time": label,
        "curves": [
            {"label": c.label, "points": _points(c, offsets[starts[i] : starts[i + 1]], index)}
            for i, c in enumerate(curves)
        ],
    }
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _points(curve: Curve, x: FloatArray, index: dict[str, int]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "epoch": index.get(name),
            "mjd": f"{curve.mjd[i]:.6f}",
            "x": _number(x[i], 9),
            "flux": _number(curve.flux[i]),
            "flux_err": _number(curve.flux_err[i]),
            "diff": _number(curve.flux_diff[i]),
            "diff_err": _number(curve.flux_diff_err[i]),
            "mag": _number(curve.mag[i]),
            "mag_err": _number(curve.mag_err[i]),
            "limit": bool(curve.is_limit[i]),
            "flags": list(SOURCE_FLAGS.decode(curve.flags[i])),
        }
        for i, name in enumerate(curve.names)
    ]


def _number(value: float, digits: int = 7) -> float | None:
    return float(f"{value:.{digits}g}") if np.isfinite(value) else None


def controls(curves: list[Curve]) -> str:
    """Return the toolbar and the empty chart; a selector when there is more than one star."""
    star = ""
    if len(curves) > 1:
        options = "".join(f'<option value="{i}">{escape(c.label)}</option>' for i, c in enumerate(curves))
        star = f'<label for="star">Star</label><select id="star">{options}</select>'
    return _TOOLBAR.format(star=star)
