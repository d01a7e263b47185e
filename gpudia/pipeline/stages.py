"""Where the time of a run goes: seconds by stage."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping

__all__ = ["STAGES", "add_times", "stage", "take_times"]

#: The stages, in the order of the work.
STAGES = ("read", "look", "register", "reference", "prepare", "transfer", "solve", "photometry", "write", "report")

_local = threading.local()


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Count the time of a block for a stage; a block inside it counts for its own stage only."""
    spent = _spent()
    start, before = time.perf_counter(), sum(spent.values())
    try:
        yield
    finally:
        inner = sum(spent.values()) - before
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - start - inner


def _spent() -> dict[str, float]:
    if not hasattr(_local, "spent"):
        _local.spent = {}
    return _local.spent


def take_times() -> dict[str, float]:
    """Return the seconds that this thread spent since the last call, by stage."""
    taken = dict(_spent())
    _spent().clear()
    return taken


def add_times(total: dict[str, float], times: Mapping[str, float]) -> None:
    """Add seconds to those of the same stages, in place."""
    for name, seconds in times.items():
        total[name] = total.get(name, 0.0) + seconds
