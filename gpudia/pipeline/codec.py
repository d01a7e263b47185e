"""What a run keeps on disk and sends between processes, as bytes: nested dataclasses, tables and arrays, exactly.

JSON with the arrays' raw bytes after it. Nothing in such a record is ever executed, and what comes back is what went
in bit by bit; a run that goes on with records of an earlier one gives the same numbers.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS, Wcsprm

__all__ = ["decode", "encode"]

_LENGTH = 8


def encode(value: Any) -> bytes:
    """Return a record as bytes.

    Parameters
    ----------
    value
        Numbers, texts, bytes, None, paths, lists, tuples, dictionaries with any such keys, NumPy arrays, tables, FITS
        headers, WCS, and this library's dataclasses and named tuples.

    Raises
    ------
    TypeError
        If something else is in it.
    """
    arrays: list[np.ndarray] = []
    text = json.dumps(_plain(value, arrays)).encode()
    return b"".join([len(text).to_bytes(_LENGTH, "little"), text, *map(np.ascontiguousarray, arrays)])


def decode(record: bytes) -> Any:
    """Return what `encode` made these bytes of; arrays are writable copies.

    Raises
    ------
    ValueError
        If the bytes are no record, or one of another version of this library, whose classes have other fields.
    """
    end = _LENGTH + int.from_bytes(record[:_LENGTH], "little")
    return _back(json.loads(record[_LENGTH:end]), _Arrays(record, end))


class _Arrays:
    """Arrays in the order in which they were written."""

    def __init__(self, record: bytes, start: int) -> None:
        self._record, self._at = record, start

    def next(self, dtype: Any, shape: list[int]) -> np.ndarray:
        kind = np.dtype(dtype)
        if kind.hasobject:
            raise ValueError("a record holds no objects")
        count = math.prod(shape)
        array = np.frombuffer(self._record, kind, count, self._at) if count else np.zeros(0, kind)
        self._at += count * kind.itemsize
        return array.reshape(shape).copy()


def _plain(value: Any, arrays: list[np.ndarray]) -> Any:
    """JSON of a value; its arrays are put aside. What JSON lacks is a list that starts with the name of its kind."""
    if value is None or isinstance(value, bool | int | str) or type(value) is float:
        return value
    if isinstance(value, list):
        return ["list", *(_plain(v, arrays) for v in value)]
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise TypeError("an array of objects cannot be part of a record")
        arrays.append(value)
        return ["array", value.dtype.str, list(value.shape)]
    if isinstance(value, np.generic):
        return ["scalar", _plain(np.asarray(value), arrays)]
    if isinstance(value, dict):
        return ["dict", *([_plain(k, arrays), _plain(v, arrays)] for k, v in value.items())]
    if _is_ours(type(value)):
        values = {name: _plain(getattr(value, name), arrays) for name in _fields(type(value))}
        return ["ours", type(value).__module__, type(value).__name__, values]
    for kind, take, _ in _OTHERS.values():
        if isinstance(value, kind):
            tag = next(t for t, entry in _OTHERS.items() if entry[0] is kind)
            return [tag, _plain(take(value), arrays)]
    raise TypeError(f"{type(value).__name__} cannot be part of a record")


def _is_ours(kind: type) -> bool:
    """Whether this is a dataclass or named tuple of this library."""
    return kind.__module__.startswith("gpudia.") and (dataclasses.is_dataclass(kind) or hasattr(kind, "_fields"))


def _fields(kind: type) -> list[str]:
    return list(getattr(kind, "_fields", ())) or [f.name for f in dataclasses.fields(kind)]


def _back(value: Any, arrays: _Arrays) -> Any:
    if not isinstance(value, list):
        return value
    tag, *rest = value
    if tag == "list":
        return [_back(v, arrays) for v in rest]
    if tag == "array":
        return arrays.next(*rest)
    if tag == "scalar":
        return _back(rest[0], arrays)[()]
    if tag == "dict":
        return {_back(k, arrays): _back(v, arrays) for k, v in rest}
    if tag == "ours":
        return _made(*rest[:2], {k: _back(v, arrays) for k, v in rest[2].items()})
    return _OTHERS[tag][2](_back(rest[0], arrays))


def _made(module: str, name: str, values: dict[str, Any]) -> Any:
    kind = getattr(import_module(module), name) if module.startswith("gpudia.") else None
    if not (isinstance(kind, type) and _is_ours(kind)):
        raise ValueError(f"a record holds no {module}.{name}")
    if set(values) != set(_fields(kind)):
        raise ValueError(f"{module}.{name} must have the fields {_fields(kind)}, got {list(values)}: another version's")
    if hasattr(kind, "_fields"):
        return kind(**values)
    made = object.__new__(kind)  # as it was: not checked and completed once more
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


def _table_parts(table: Table) -> list[Any]:
    columns = [[c.name, np.asarray(c), None if c.unit is None else str(c.unit), c.description or ""]
               for c in table.itercols()]
    return [columns, {k: v for k, v in table.meta.items() if isinstance(v, str | int | float | bool | None)}]


def _table_of(parts: list[Any]) -> Table:
    columns, meta = parts
    table = Table({name: values for name, values, _, _ in columns}, meta=meta, copy=False)
    for name, _, unit, text in columns:
        if unit is not None:
            table[name].unit = unit
        if text:
            table[name].description = text
    return table


def _wcs_parts(wcs: WCS) -> list[Any]:
    """Shape, and a header as text, which is quick; a whole file where there are distortions."""
    if not any((wcs.sip, wcs.cpdis1, wcs.cpdis2, wcs.det2im1, wcs.det2im2)):
        return [wcs.pixel_shape, wcs.wcs.to_header(relax=True)]
    buffer = io.BytesIO()
    wcs.to_fits(relax=True).writeto(buffer)
    return [wcs.pixel_shape, np.frombuffer(buffer.getvalue(), np.uint8)]


def _wcs_of(parts: list[Any]) -> WCS:
    shape, header = parts
    if isinstance(header, str):
        wcs = WCS(naxis=2)
        wcs.wcs = Wcsprm(header=header.encode(), relax=True)
    else:
        with fits.open(io.BytesIO(header.tobytes())) as hdus:
            cards = hdus[0].header
            del cards["NAXIS"]  # of an empty image
            wcs = WCS(cards, hdus, fix=False)
    if shape is not None:
        wcs.pixel_shape = shape
    return wcs


_OTHERS: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "tuple": (tuple, list, tuple),
    "bytes": (bytes, lambda b: np.frombuffer(b, np.uint8), lambda array: array.tobytes()),
    "path": (Path, str, Path),
    "table": (Table, _table_parts, _table_of),
    "header": (fits.Header, lambda h: h.tostring(sep="\n"), lambda text: fits.Header.fromstring(text, sep="\n")),
    "wcs": (WCS, _wcs_parts, _wcs_of),
}
