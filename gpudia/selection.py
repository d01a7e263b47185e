"""Conditions on the frames of a series (``--select "fwhm < 6"``): a small grammar, nothing of which is executed.

    condition   = comparison | "(" condition ")" | "not" condition
                | condition "and" condition | condition "or" condition
    comparison  = value (operator value)+          chained ones as in Python: 2 < fwhm < 6
    operator    = "<" | "<=" | ">" | ">=" | "==" | "!=" | "in" | "not in"
    value       = column | number | 'text'         after "in": a list of them, (1, 2) or ['rp', 'ip']

It is Python's own syntax, so Python's own parser reads it; what comes out is walked here and never run.
"""

from __future__ import annotations

import ast
import difflib
import io
import math
import operator
import tokenize
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gpudia.errors import ConfigError

__all__ = ["SERIES_COLUMNS", "Condition", "SeriesColumn", "parse_condition"]


@dataclass(frozen=True)
class SeriesColumn:
    """A column of the series table: its name, whether it holds text, its unit and what it says."""

    name: str
    is_text: bool
    unit: str
    about: str


#: What is known of every frame after the first look at it.
SERIES_COLUMNS = (
    SeriesColumn("file", True, "", "input file"),
    SeriesColumn("name", True, "", "file name without folder and ending"),
    SeriesColumn("mjd", False, "d", "mid-exposure, UTC, days"),
    SeriesColumn("exptime", False, "s", "exposure time"),
    SeriesColumn("filter", True, "", "filter, from the header"),
    SeriesColumn("instrument", True, "", "instrument (camera), from the header"),
    SeriesColumn("airmass", False, "", "from the header"),
    SeriesColumn("fwhm", False, "pix", "median of bright stars"),
    SeriesColumn("ellipticity", False, "", "1 - b/a, median of the same stars"),
    SeriesColumn("n_stars", False, "", "stars detected; -1: not looked for"),
    SeriesColumn("sky", False, "adu", "level of a typical sky pixel"),
    SeriesColumn("sky_noise", False, "adu", "noise of a typical sky pixel, 1 sigma"),
    SeriesColumn("saturated_fraction", False, "", "share of the pixels that are saturated"),
)

#: Longer conditions, and more deeply nested ones, are not what a person types.
_LONGEST = 1000

_OPERATORS: dict[type[ast.cmpop], tuple[str, Callable[[Any, Any], bool]]] = {
    ast.Lt: ("<", operator.lt), ast.LtE: ("<=", operator.le), ast.Gt: (">", operator.gt), ast.GtE: (">=", operator.ge),
    ast.Eq: ("==", operator.eq), ast.NotEq: ("!=", operator.ne),
    ast.In: ("in", lambda value, several: value in several),
    ast.NotIn: ("not in", lambda value, several: value not in several),
}


@dataclass(frozen=True)
class Condition:
    """A condition that has been read and found right.

    Attributes
    ----------
    text : str
        As it was written.
    columns : tuple of str
        The columns it looks at, in their order.
    """

    text: str
    columns: tuple[str, ...]
    _node: ast.expr

    def holds(self, row: Mapping[str, Any]) -> bool | None:
        """Say whether a frame satisfies the condition.

        Parameters
        ----------
        row : mapping
            Column name to number or text. NaN, and an empty text, mean unknown.

        Returns
        -------
        bool or None
            None where unknown values decide. A frame is selected only where this is True: an unknown value satisfies
            no comparison, and no negated one.
        """
        return _truth(self._node, row)

    def found(self, row: Mapping[str, Any]) -> str:
        """Return what the row has in the columns of the condition, for a message: ``7.21``, or with names."""
        shown = [_shown(row[name]) for name in self.columns]
        if len(shown) == 1:
            return shown[0]
        return ", ".join(f"{name} = {value}" for name, value in zip(self.columns, shown, strict=True))


def parse_condition(text: str, key: str = "select") -> Condition:
    """Read a condition on the columns of the series table.

    Parameters
    ----------
    text : str
        For example ``"fwhm < 6 and filter in ('rp', 'ip')"``.
    key : str
        What to call it in messages.

    Returns
    -------
    Condition

    Raises
    ------
    ConfigError
        The text does not follow the grammar of this module, names an unknown column (the message has the known ones),
        or compares a number with a text.
    """
    if len(text) > _LONGEST:
        raise ConfigError(f"{key} must have at most {_LONGEST} characters, got {len(text)}")
    try:
        node = ast.parse(text.strip(), mode="eval").body
        condition = Condition(text.strip(), tuple(dict.fromkeys(_columns_in(node))), node)
        _check_condition(node)
        if any(token.type == tokenize.COMMENT for token in tokenize.generate_tokens(io.StringIO(text).readline)):
            raise _RefusedError("a condition without a comment")
    except _RefusedError as error:
        raise ConfigError(f"{key} must be {error}, got {text!r}") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # what ast.parse raises
        raise ConfigError(f"{key} must be a condition like \"fwhm < 6\" or \"filter == 'rp'\", got {text!r}: "
                          f"{_why(error)}") from None
    return condition


class _RefusedError(Exception):
    """What the rule is that was broken; the text is added where it is caught."""


def _why(error: Exception) -> str:
    return error.msg if isinstance(error, SyntaxError) else "it cannot be read"


def _columns_in(node: ast.AST) -> Iterator[str]:
    """Names in the order in which they stand (`ast.walk` goes level by level)."""
    if isinstance(node, ast.Name):
        yield node.id
    for child in ast.iter_child_nodes(node):
        yield from _columns_in(child)


# ---------------------------------------------------------------------------------------------------- checking


def _check_condition(node: ast.expr) -> None:
    if isinstance(node, ast.BoolOp):
        for part in node.values:
            _check_condition(part)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        _check_condition(node.operand)
    elif isinstance(node, ast.Compare):
        _check_comparison(node)
    else:
        raise _RefusedError("comparisons joined by and, or, not")


def _check_comparison(node: ast.Compare) -> None:
    sides = [node.left, *node.comparators]
    for sign, left, right in zip(node.ops, sides, sides[1:], strict=False):
        if type(sign) not in _OPERATORS:
            raise _RefusedError("made with the operators " + ", ".join(name for name, _ in _OPERATORS.values()))
        several = isinstance(sign, ast.In | ast.NotIn)
        if several and not (isinstance(right, ast.Tuple | ast.List) and right.elts):
            raise _RefusedError("a comparison with a list after 'in', such as in ('rp', 'ip')")
        for other in (right.elts if several else [right]):  # type: ignore[attr-defined]
            if _is_text(left) != _is_text(other):
                raise _RefusedError(f"a comparison of like with like ({_kind(left)}, {_kind(other)})")
    if not any(True for _ in _columns_in(node)):
        raise _RefusedError("a comparison with a column; known are " + ", ".join(c.name for c in SERIES_COLUMNS))


def _is_text(node: ast.expr) -> bool:
    """Whether a value is text; refuses what is neither column, number nor text."""
    if isinstance(node, ast.Name):
        return _column(node.id).is_text
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return True
    if _number(node) is None:
        raise _RefusedError("made of columns, numbers and 'texts' (for 'and', 'or' and 'not' use the words)")
    return False


def _number(node: ast.expr) -> float | None:
    """A number, signed or not; None where it is none. True and False are none."""
    sign = 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        sign, node = (-1 if isinstance(node.op, ast.USub) else 1), node.operand
    value = node.value if isinstance(node, ast.Constant) else None
    return sign * value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _column(name: str) -> SeriesColumn:
    known = {column.name: column for column in SERIES_COLUMNS}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}? " if near else ""
        raise _RefusedError(f"made of known columns, and {name} is none ({hint}known are {', '.join(known)}; "
                       "a text stands in quotes)")
    return known[name]


def _kind(node: ast.expr) -> str:
    return f"{ast.unparse(node)} is a {'text' if _is_text(node) else 'number'}"


# --------------------------------------------------------------------------------------------------- evaluating


def _truth(node: ast.expr, row: Mapping[str, Any]) -> bool | None:
    """True, False or None (unknown), by the rules of SQL: unknown or True is True, unknown and False is False."""
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        return _all(_compare(sign, _value(left, row), _value(right, row))
                    for sign, left, right in zip(node.ops, sides, sides[1:], strict=False))
    if isinstance(node, ast.UnaryOp):
        return _not(_truth(node.operand, row))
    parts = (_truth(part, row) for part in node.values)  # type: ignore[attr-defined]
    if isinstance(node.op, ast.And):  # type: ignore[attr-defined]
        return _all(parts)
    return _not(_all(_not(part) for part in parts))


def _all(parts: Iterator[bool | None]) -> bool | None:
    found = list(parts)
    return False if False in found else None if None in found else True


def _not(truth: bool | None) -> bool | None:
    return None if truth is None else not truth


def _compare(sign: ast.cmpop, left: Any, right: Any) -> bool | None:
    """Compare two values; None where one of them is unknown."""
    unknown = left is None or (None in right if isinstance(right, list) else right is None)
    return None if unknown else bool(_OPERATORS[type(sign)][1](left, right))


def _value(node: ast.expr, row: Mapping[str, Any]) -> Any:
    """Number or text, None where it is unknown; a list of them after ``in``."""
    if isinstance(node, ast.Tuple | ast.List):
        return [_value(element, row) for element in node.elts]
    if isinstance(node, ast.Name):
        value = row[node.id]
        if isinstance(value, str):
            return value or None
        return None if math.isnan(value) else value
    return node.value if isinstance(node, ast.Constant) else _number(node)


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return repr(str(value)) if value else "an unknown one"
    return "an unknown one" if math.isnan(value) else f"{value:.6g}"
