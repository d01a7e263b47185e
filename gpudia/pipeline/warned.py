"""Doubts about frames: warnings of the library go to the log."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

from gpudia.errors import DataWarning

__all__ = ["warnings_logged"]

log = logging.getLogger("gpudia.pipeline")


@contextlib.contextmanager
def warnings_logged(path: Path) -> Iterator[None]:
    """Doubts about a frame go to the log with its name, once, and not to the caller's terminal as warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DataWarning)
        try:
            yield
        finally:
            for text in dict.fromkeys(str(w.message) for w in caught):
                log.info("%s", text if path.name in text else f"{path.name}: {text}")
