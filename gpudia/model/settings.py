"""Settings of the passes of a fit, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpudia.errors import InputError

__all__ = ["FitSettings", "check_settings", "number"]


@dataclass(frozen=True)
class FitSettings:
    """Settings of the passes; see `ReferencePlan`."""

    passes: int
    clip: float
    solver: str
    covariance: str
    mixed: bool
    rtol: float
    max_iterations: int
    gain: float | None
    read_noise: float
    correct_bias: bool

    @property
    def exact_covariance(self) -> bool:
        """Whether every image's own matrix is inverted."""
        return self.covariance == "exact" or self.solver == "direct"


def number(name: str, value: Any, low: float, rule: str, integer: bool = False) -> Any:
    """Return a finite number of `low` or more, or raise `InputError` with the rule."""
    kinds = (int, np.integer) if integer else (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value) or value < low:
        raise InputError(f"{name} must be {rule}, got {value!r}")
    return int(value) if integer else float(value)


def check_settings(passes: Any, clip: Any, solver: Any, covariance: Any, correct_bias: Any, rtol: Any,
                   max_iterations: Any, gain: Any, read_noise: Any) -> FitSettings:
    """Check the arguments of `ReferencePlan` that the passes use."""
    if solver not in ("auto", "direct", "iterative"):
        raise InputError(f"solver must be 'auto', 'direct' or 'iterative', got {solver!r}")
    if covariance not in ("exact", "shared"):
        raise InputError(f"covariance must be 'exact' or 'shared', got {covariance!r}")
    numbers = (int, float, np.integer, np.floating)
    if not isinstance(clip, numbers) or not clip > 0:
        raise InputError(f"clip must be positive, got {clip!r}")
    if gain is not None and not (isinstance(gain, numbers) and math.isfinite(gain) and gain > 0):
        raise InputError(f"gain must be positive (e-/ADU) or None, got {gain!r}")
    if not isinstance(correct_bias, bool | np.bool_):
        raise InputError(f"correct_bias must be True or False, got {correct_bias!r}")
    return FitSettings(
        passes=number("passes", passes, 1, "an integer of 1 or more", integer=True), clip=float(clip),
        solver=solver if solver != "auto" else "direct" if covariance == "exact" else "iterative",
        covariance=covariance, correct_bias=bool(correct_bias), mixed=False,
        rtol=number("rtol", rtol, 1e-14, "at least 1e-14"),
        max_iterations=number("max_iterations", max_iterations, 1, "an integer of 1 or more", integer=True),
        gain=None if gain is None else float(gain), read_noise=number("read_noise", read_noise, 0, "0 or more (e-)"),
    )
