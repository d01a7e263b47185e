"""The output folder: refused when it cannot be used, a journal line for every step, a log file."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpudia.config import RunConfig
from gpudia.errors import ConfigError

__all__ = ["Journal", "log_to", "prepare_output"]

#: What a run writes: with `overwrite` these are removed first, and nothing else is.
_RESULTS = ("epochs.ecsv", "target.ecsv", "lightcurves.fits", "reference.fits", "report.html",
            "candidates.ecsv", "detections.ecsv")
#: Records of a run that came to nothing: not in the way of the next one.
_RECORDS = ("run.toml", "journal.jsonl", "gpudia.log")
_FOLDERS = {"difference": "*.fits", "plots": "*.png", "candidates": "*.png"}


def prepare_output(config: RunConfig, frames: Sequence[Path]) -> Path:
    """Make the output folder of a run on `frames`.

    Raises
    ------
    ConfigError
        If it cannot be made or written to, holds results and `overwrite` is not set, or holds an input that would have
        to go.
    """
    if config.resume:
        raise ConfigError("resume must be false: going on with an earlier run is not available in this version; "
                          "say overwrite to start anew")
    output = Path(config.output).expanduser()
    try:
        output.mkdir(parents=True, exist_ok=True)
        for folder in _FOLDERS:
            (output / folder).mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output must be a folder that can be written to, got {output}: {error.strerror}") from error
    if not os.access(output, os.W_OK):
        raise ConfigError(f"output must be a folder that can be written to, got {output}: permission denied")
    found = [output / name for name in _RESULTS if (output / name).exists()]
    for folder, pattern in _FOLDERS.items():
        found += sorted((output / folder).glob(pattern))
    if found and not config.overwrite:
        names = ", ".join(str(path.relative_to(output)) for path in found[:4])
        raise ConfigError(f"output must be a new folder, got {output} with {names} in it; "
                          "say overwrite (--overwrite) to replace the results")
    inputs = {path.resolve() for path in frames}
    if config.reference != "auto":
        inputs.add(Path(config.reference).expanduser().resolve())
    clash = [path for path in found if path.resolve() in inputs]
    if clash:
        raise ConfigError(f"frames must not be results that overwrite would remove, got {clash[0]}")
    for path in [*found, *(output / name for name in _RECORDS)]:
        path.unlink(missing_ok=True)
    return output


class Journal:
    """One JSON line for every step of a run, on the disk at once."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def write(self, event: str, **facts: Any) -> None:
        """Add a line; values that JSON does not know become text."""
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event, **facts}
        self._file.write(json.dumps(line, default=_plain) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Write the library's log records to a file for the time of a run."""
    logger = logging.getLogger("gpudia")
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    before = logger.level
    logger.addHandler(handler)
    if logger.getEffectiveLevel() > logging.INFO:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
        logger.setLevel(before)
