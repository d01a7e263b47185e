"""The output folder: refused when it cannot be used, a journal line for every step, a log file."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpudia.config import RunConfig
from gpudia.errors import ConfigError
from gpudia.images import remove_unfinished
from gpudia.messages import OneLine
from gpudia.pipeline.state import has_batches
from gpudia.pipeline.storage import writing

__all__ = ["PIECES", "STATE", "Journal", "locked", "log_to", "prepare_output"]

#: Within the output folder: what a run knows of itself, pieces of frames that wait for the solve, the lock.
STATE, PIECES, _LOCK = "state/records", "state/pieces", "state/lock"

#: What a run writes: with `overwrite` these are removed first, and nothing else is.
_RESULTS = ("epochs.ecsv", "target.ecsv", "lightcurves.fits", "reference.fits", "report.html", "comparison.html",
            "candidates.ecsv", "detections.ecsv", "variables.ecsv")
#: Records of a run: not in the way of the next one where it came to nothing.
_RECORDS = ("run.toml", "journal.jsonl", "gpudia.log")
_FOLDERS = {"difference": "*.fits", "plots": "*.png", "candidates": "*.png"}


def prepare_output(config: RunConfig, frames: Sequence[Path]) -> Path:
    """Make the output folder of a run on `frames`, or take up the one of an earlier run.

    Raises
    ------
    ConfigError
        If it cannot be made or written to, holds results or an unfinished run and neither `overwrite` nor `resume` is
        set, or holds an input that would have to go.
    """
    output = Path(os.path.expanduser(config.output))
    make_folder(output)
    found = _found(output)
    if config.resume:
        if found and not (output / STATE).exists():
            raise ConfigError(f"resume must find the state of an earlier run in {output}, got {_names(found, output)} "
                              "without it; say overwrite (--overwrite) to start anew")
    elif found and not config.overwrite:
        unfinished = not any((output / name).exists() for name in _RESULTS)
        what, way = ("an unfinished run", "; say resume (--resume) to go on with it") if unfinished else (
            _names(found, output), "")
        raise ConfigError(f"output must be a new folder, got {output} with {what} in it{way}; "
                          "say overwrite (--overwrite) to replace the results")
    inputs = {os.path.realpath(path) for path in frames}  # unlike Path.resolve it bears links in a loop
    if config.reference != "auto":
        inputs.add(os.path.realpath(os.path.expanduser(config.reference)))
    clash = [path for path in found if os.path.realpath(path) in inputs]
    if clash:
        raise ConfigError(f"frames must not be results that overwrite would remove, got {clash[0]}")
    if not config.resume:
        _remove([*found, *(output / name for name in _RECORDS), output / STATE, *(output / PIECES).glob("*.piece")])
    for folder in (output, *(output / name for name in _FOLDERS)):
        remove_unfinished(folder)
    for folder in (*_FOLDERS, PIECES):
        if folder != "candidates" or config.detect is not None:
            make_folder(output / folder)
        else:
            _remove_empty(output / folder)
    return output


def make_folder(path: Path) -> None:
    """Make a folder that can be written to.

    Raises
    ------
    ConfigError
        If that cannot be done.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output must be a folder that can be written to, got {path}: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise ConfigError(f"output must be a folder that can be written to, got {path}: permission denied")


def _names(found: Sequence[Path], output: Path) -> str:
    return ", ".join(str(path.relative_to(output)) for path in found[:4])


def _found(output: Path) -> list[Path]:
    """Results in a folder; of a run that came to no difference image there are none."""
    found = [output / name for name in _RESULTS if (output / name).exists()]
    for folder, pattern in _FOLDERS.items():
        found += sorted((output / folder).glob(pattern))
    if (output / STATE).exists() and has_batches(output / STATE):
        found.append(output / STATE)
    return found


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _remove_empty(folder: Path) -> None:
    """Remove a folder of an earlier run that holds nothing; one with something in it stays."""
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keep other runs out of a folder; the lock goes with the process, however that ends.

    Raises
    ------
    ConfigError
        If another run is in it, or no file can be made there.
    """
    make_folder(output / "state")
    with writing(output / _LOCK), (output / _LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ConfigError(f"output must not be in use by another run, got {output} with {file.read().strip()}"
                              ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()} in it")
        file.flush()
        yield


class Journal:
    """One JSON line for every step of a run, to be followed while it goes on; a resumed run adds to it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with writing(path):
            self._file = path.open("a", encoding="utf-8")

    def write(self, event: str, **facts: Any) -> None:
        """Add a line; values that JSON does not know become text."""
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event, **facts}
        with writing(self._path):
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
    with writing(path):
        handler = logging.FileHandler(path, encoding="utf-8")
    handler.handleError = lambda _: None  # type: ignore[method-assign]  # a full disk is said elsewhere
    handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
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
