"""Rules for settings: what a value must be, in words; the test of it; and how an accepted value is kept."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from gpudia.errors import ConfigError

__all__ = [
    "MAYBE_TEXTS", "SITE", "TEXT", "TEXTS", "YES_NO", "Rule", "any_number", "auto_or", "choice", "integer", "number",
    "optional", "several", "sky_angle",
]  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """What a value must be, in words; the test of it; and how an accepted value is kept."""

    text: str
    accepts: Callable[[Any], bool]
    keep: Callable[[Any], Any] = lambda value: value

    def apply(self, key: str, value: Any) -> Any:
        try:
            accepted = self.accepts(value)
        except (TypeError, ValueError, OverflowError):  # a value that is not of the right kind at all
            accepted = False
        if accepted:
            return self.keep(value)
        raise ConfigError(f"{key} must be {self.text}, got {value!r}")


def integer(low: int, high: float = math.inf, odd: bool = False) -> Rule:
    kind = "an odd integer" if odd else "an integer"
    text = f"{kind} of at least {low}" if high == math.inf else f"{kind} from {low} to {high}"
    return Rule(text, lambda v: not isinstance(v, bool) and low <= operator.index(v) <= high
                and (v % 2 == 1 or not odd), operator.index)


def number(unit: str, zero: bool = False) -> Rule:
    return Rule(f"a number of {unit}, {'not negative' if zero else 'above 0'}",
                lambda v: not isinstance(v, bool | str) and 0 <= float(v) < math.inf and (v > 0 or zero), float)


def any_number(unit: str) -> Rule:
    return Rule(f"a number of {unit}", lambda v: not isinstance(v, bool | str) and math.isfinite(float(v)), float)


def choice(*names: str) -> Rule:
    return Rule("one of " + ", ".join(names), lambda v: isinstance(v, str) and v in names)


def auto_or(rule: Rule) -> Rule:
    return Rule(f"'auto' or {rule.text}", lambda v: (isinstance(v, str) and v == "auto") or rule.accepts(v),
                lambda v: v if isinstance(v, str) else rule.keep(v))


def several(*names: str) -> Rule:
    return Rule("some of " + ", ".join(names), lambda v: set(_as_list(v)) <= set(names),
                lambda v: tuple(n for n in names if n in _as_list(v)))


def optional(rule: Rule) -> Rule:
    return Rule(rule.text, lambda v: v is None or rule.accepts(v), lambda v: None if v is None else rule.keep(v))


def _is_text(value: Any) -> bool:
    return isinstance(os.fspath(value), str) and bool(os.fspath(value).strip())


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, str | os.PathLike):
        return [value]
    if not isinstance(value, Collection):  # an iterator would be used up by the first look at it
        raise TypeError
    return list(value)


YES_NO = Rule("true or false", lambda v: isinstance(v, bool))
TEXT = Rule("a text that is not empty", _is_text, os.fspath)
TEXTS = Rule("one or several texts that are not empty",
             lambda v: bool(_as_list(v)) and all(map(_is_text, _as_list(v))),
             lambda v: tuple(map(os.fspath, _as_list(v))))
MAYBE_TEXTS = Rule("texts that are not empty, or none", lambda v: all(map(_is_text, _as_list(v))), TEXTS.keep)


def sky_angle(hours: bool, low: int, high: int) -> Rule:
    kind = "hours:minutes:seconds" if hours else "degrees:minutes:seconds"
    return Rule(f"{low} to {high} degrees, as a number or as {kind}",
                lambda v: not isinstance(v, bool) and low <= _degrees(v, hours) <= high, lambda v: _degrees(v, hours))


def _degrees(value: Any, hours: bool) -> float:
    if hasattr(value, "to_value"):  # an astropy Quantity or Angle
        return float(value.to_value("deg"))
    try:
        return float(value)
    except ValueError:
        # Imported late: astropy.coordinates takes half a second, and `gpudia --help` imports this module.
        from astropy.coordinates import Angle

        return float(Angle(value.strip(), unit="hourangle" if hours else "deg").to_value("deg"))


def _is_site(value: Any) -> bool:
    longitude, latitude, height = map(float, _as_list(value))
    return -180 <= longitude <= 360 and -90 <= latitude <= 90 and math.isfinite(height)


SITE = Rule("longitude (degrees east), latitude (degrees) and height (m)", _is_site,
            lambda v: tuple(map(float, _as_list(v))))
