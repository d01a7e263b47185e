"""Tables of the page: columns as JSON, rows made by the page's script, a hundred at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from gpudia.flags import FlagTable
from gpudia.messages import printable

__all__ = ["as_json", "flags_column", "number", "numbers_column", "table_place", "texts_column"]

#: A column: head, meaning, kind, and its values; see ``table.js``.
Column = dict[str, Any]


def number(value: float, digits: int = 7) -> float | None:
    """Return a number with so many digits, None where it is not finite."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def numbers_column(head: str, meaning: str, values: ArrayLike, *, digits: int = 4, decimals: int | None = None,
                   errors: ArrayLike | None = None) -> Column:
    """Numbers, shown with `digits` significant digits, or so many `decimals`, or by the size of their `errors`."""
    stored = 12 if decimals is not None else digits + 2
    column: Column = {"head": head, "title": meaning, "kind": "number", "digits": digits,
                      "values": [number(v, stored) for v in np.asarray(values, float).tolist()]}
    if decimals is not None:
        column["decimals"] = decimals
    if errors is not None:
        column["errors"] = [number(v, 3) for v in np.asarray(errors, float).tolist()]
    return column


def texts_column(head: str, meaning: str, values: Iterable[str], kind: str = "text", **more: Any) -> Column:
    """Texts; each different one is stored once. `kind` may be ``name`` or ``status``."""
    texts = [printable(v) for v in values]
    different = list(dict.fromkeys(texts))
    place = {text: k for k, text in enumerate(different)}
    return {"head": head, "title": meaning, "kind": kind, "texts": different, "values": [place[t] for t in texts],
            **more}


def flags_column(head: str, meaning: str, values: Sequence[int], table: FlagTable, reasons: Iterable[str] = (),
                 anchors: bool = False) -> Column:
    """Bits by name, with their meaning at hand, after the `reasons`; `anchors`: the names link to the legend."""
    column = texts_column(head, meaning, reasons or [""] * len(values), "flags")
    column["texts_of"] = column.pop("values")
    bits = [[f.value, f.name, f"{f.meaning}. What to do: {f.remedy}"] for f in table]
    return column | {"values": [int(v) for v in values], "bits": bits, "anchors": anchors}


def as_json(data: Any) -> str:
    """Return JSON that is safe inside a ``<script>`` element."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def table_place(name: str, columns: Sequence[Column], label: str, file: str, row_id: str = "") -> str:
    """Return the place of a table on the page, and its data; rows get the ids ``row_id-0``, ``row_id-1``, ..."""
    data = as_json({"rows": len(columns[0]["values"]), "id": row_id, "columns": list(columns)})
    return (
        f'<div class="data-table" data-table="{escape(name)}" data-label="{escape(label)}">'
        f"<noscript><p>The table needs JavaScript; it is the file {escape(file)}.</p></noscript></div>"
        f'<script id="table-{escape(name)}" type="application/json">{data}</script>'
    )
