"""The output folder: refused when it cannot be used, a journal line for every step, a log file."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpudia.config import RunConfig
from gpudia.errors import ConfigError

__all__ = ["Journal", "log_to", "prepare_output"]

#: What a run writes: with `overwrite` these are removed first, and nothing else is.
_OURS = ("epochs.ecsv", "target.ecsv", "lightcurves.fits", "reference.fits", "report.html", "run.toml",
         "journal.jsonl", "gpudia.log")
_FOLDERS = ("difference", "plots")


def prepare_output(config: RunConfig) -> Path:
    """Make the output folder of a run.

    Raises
    ------
    ConfigError
        If it cannot be made or written to, or holds results and `overwrite` is not set.
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
    found = [name for name in _OURS if (output / name).exists()]
    found += [f"{folder}/" for folder in _FOLDERS if any((output / folder).iterdir())]
    if found and not config.overwrite:
        raise ConfigError(f"output must be a new folder, got {output} with {', '.join(found[:4])} in it; "
                          "say overwrite (--overwrite) to replace the results")
    for name in found:
        if name.endswith("/"):
            for path in (output / name).glob("*.*"):
                path.unlink()
        else:
            (output / name).unlink()
    return output


class Journal:
    """One JSON line for every step of a run, on the disk at once."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

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
