"""How far a run is: bars for people, events for programs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tqdm.auto import tqdm

from gpudia.pipeline.looks import Look

__all__ = ["Progress", "Watch"]


@dataclass(frozen=True)
class Progress:
    """One thing that was done.

    Attributes
    ----------
    step : {"read", "register", "subtract"}
    done, total : int
        Frames of this step so far (those of an earlier run that is gone on with count), and in all.
    file : str
        The frame.
    status : {"ok", "failed", "skipped"}
    reason : str
        Why, where it is not ok.
    """

    step: str
    done: int
    total: int
    file: str
    status: str
    reason: str


class Watch:
    """Tells a bar and a caller how far a run is."""

    def __init__(self, bar: bool, callback: Callable[[Progress], object] | None) -> None:
        self._bar, self._callback = bar, callback

    @contextlib.contextmanager
    def step(self, name: str, total: int, done: int) -> Iterator[Callable[[Look], None]]:
        """Give a function to call with every frame that a step is done with; `done` are from an earlier run."""
        with tqdm(total=total, initial=done, desc=name, unit="frame", disable=None if self._bar else True,
                  leave=False) as bar:
            count = done

            def tick(look: Look) -> None:
                nonlocal count
                count += 1
                bar.update()
                if self._callback is not None:
                    self._callback(Progress(name, count, total, str(look.path), look.status, look.reason))

            yield tick
