"""Interrupts: the first ends a run when the work in hand is safe, the second at once."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

__all__ = ["Stop", "listening"]

log = logging.getLogger("gpudia.pipeline")


class Stop:
    """Whether a run was asked to end."""

    def __init__(self) -> None:
        self.asked = False

    def check(self) -> None:
        """Raise KeyboardInterrupt if so: called where everything that is finished is on the disk."""
        if self.asked:
            raise KeyboardInterrupt

    def ask(self, number: int, _: FrameType | None) -> None:
        """Signal handler."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        log.warning("%s: the run ends when what is in hand is done; once more to end it at once",
                    signal.Signals(number).name)


@contextlib.contextmanager
def listening() -> Iterator[Stop]:
    """Listen to SIGINT and SIGTERM for the time of a run; only the main thread of a program can."""
    stop = Stop()
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, stop.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
