"""Doubts about frames: warnings of the library go to the log, what is said of many frames once."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from gpudia.errors import DataWarning

__all__ = ["Repeats", "repeats_folded", "warnings_logged"]

log = logging.getLogger("gpudia.pipeline")

_NUMBER = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?")
_NAMED = 10  # frames in a message


@contextlib.contextmanager
def warnings_logged(path: Path) -> Iterator[None]:
    """Doubts about a frame go to the log with its name, once, and not to the caller's terminal as warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DataWarning)
        try:
            yield
        finally:
            for text in dict.fromkeys(str(w.message) for w in caught):
                doubt = text.replace(str(path), "").replace(path.name, "").strip(": ")
                log.info("%s", text if path.name in text else f"{path.name}: {text}",
                         extra={"doubt": doubt, "frame": path.name})


class Repeats(logging.Filter):
    """Makes a doubt about a frame a detail (DEBUG) where another frame had the same, but for its numbers."""

    def __init__(self) -> None:
        super().__init__()
        self._frames: dict[str, dict[str, None]] = {}
        self._first: dict[str, str] = {}
        self._said: dict[str, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Look at a record, of this process or of one that works for it."""
        doubt = getattr(record, "doubt", None)
        if doubt is not None:
            kind = _NUMBER.sub("#", doubt)
            frames = self._frames.setdefault(kind, {})
            if frames:
                record.levelno, record.levelname = logging.DEBUG, logging.getLevelName(logging.DEBUG)
            self._first.setdefault(kind, doubt)
            frames[record.frame] = None  # type: ignore[attr-defined]
        return True

    def say(self) -> None:
        """Log how many frames each doubt is about, where these are several and more than when it was said last."""
        for kind, frames in self._frames.items():
            if len(frames) > max(1, self._said.get(kind, 0)):
                self._said[kind] = len(frames)
                names = ", ".join([*frames][:_NAMED]) + (", ..." if len(frames) > _NAMED else "")
                numbers = " (numbers of the first)" if "#" in kind else ""
                log.info("%d frames (%s): %s%s", len(frames), names, self._first[kind], numbers)


@contextlib.contextmanager
def repeats_folded() -> Iterator[Repeats]:
    """Say a doubt about many frames with the first of them and, by `Repeats.say` and at the end, their number.

    What a process that works for this one has to say is folded, too; a log file has the details.
    """
    repeats = Repeats()
    log.addFilter(repeats)
    try:
        yield repeats
    finally:
        log.removeFilter(repeats)
        repeats.say()
