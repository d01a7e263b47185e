"""The state of a run on disk: looks, registrations, the setup and the batches that are done.

Records are found by what they depend on: a look by its file (size and time of change), a registration by the two files,
the setup by all frames, a batch by the setup and its frames. What has not changed is taken up again, whatever happened
in between.
"""

from __future__ import annotations

import contextlib
import hashlib
import tomllib
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from gpudia import __version__
from gpudia.config import RunConfig
from gpudia.errors import ConfigError
from gpudia.pipeline.codec import decode, encode
from gpudia.pipeline.looks import Look, Seen, stamp_of
from gpudia.pipeline.records import RecordFile
from gpudia.pipeline.tasks import BatchDone, Setup

__all__ = ["RunState", "batch_key", "digest", "has_batches", "inputs_of"]

#: Settings that a run may be gone on with under other values: they do not change what was done.
_FREE = ("frames", "output", "products", "resume", "overwrite", "workers", "readers", "dask", "batch_size",
         "photometric_catalog", "magnitude_column", "zero_point", "zero_point_err")


def digest(*values: Any) -> str:
    """Short name of what values are: equal for equal values."""
    return hashlib.sha256(encode(list(values))).hexdigest()[:16]


class RunState:
    """Records of a run in its folder.

    Parameters
    ----------
    path : Path
        The file of records.

    Raises
    ------
    ConfigError, OutputError
        See `RecordFile`.
    """

    def __init__(self, path: Path) -> None:
        self._records = RecordFile(path)
        self._seen = lru_cache(maxsize=8)(self._read_seen)

    def close(self) -> None:
        """Close the file."""
        self._records.close()

    def take_settings(self, config: RunConfig, backend: str) -> None:
        """Note the settings, or hold them against those of the earlier run.

        Raises
        ------
        ConfigError
            If they are others: names each, with its value then and now.
        """
        now = tomllib.loads(config.to_toml()) | {"version of gpudia": __version__, "backend": backend}
        now = {key: value for key, value in now.items() if key not in _FREE}
        if "settings" not in self._records:
            self._records.add({"settings": encode(now)})
            return
        then = decode(self._records["settings"])
        changed = [f"{key} was {then.get(key, 'not given')}, is {now.get(key, 'not given')}"
                   for key in {**then, **now} if then.get(key) != now.get(key)]
        if changed:
            raise ConfigError(f"settings must be those of the run to go on with, got others: {'; '.join(changed)}; "
                              "say overwrite (--overwrite) instead of resume to start anew")

    def look(self, name: str, path: Path) -> Look | None:
        """Return the look at a file, if there is one and the file is as it was then; what is large of it stays here."""
        look: Look | None = self._known(f"look/{name}")
        if look is None or look.reason or look.path != path or look.stamp != stamp_of(path):
            return None
        look.seen = partial(self._seen, name, look.stamp)
        return look

    def _known(self, key: str) -> Any:
        """What a record holds; None where there is none, or one of a version of this library with other classes."""
        try:
            return decode(self._records[key]) if key in self._records else None
        except ValueError:
            return None

    def is_known(self, name: str) -> bool:
        """Whether there was a look at a frame of this name."""
        return f"look/{name}" in self._records

    def _read_seen(self, name: str, _: tuple[int, int]) -> Seen:
        found: Seen = decode(self._records[f"seen/{name}"])
        return found

    def add_look(self, look: bytes, seen: bytes) -> Look:
        """Keep the records of a look; return it with what is large of it left on the disk."""
        found: Look = decode(look)
        self._records.add({f"look/{found.name}": look, f"seen/{found.name}": seen}, soon=True)
        found.seen = partial(self._seen, found.name, found.stamp)
        return found

    def large(self, name: str) -> bytes:
        """Record of what is large of a look."""
        return self._records[f"seen/{name}"]

    def choice(self, inputs: str) -> str | None:
        """Name of the frame that was chosen as reference of these inputs."""
        found: str | None = self._known(f"choice/{inputs}")
        return found

    def add_choice(self, inputs: str, name: str) -> None:
        """Keep the name of the reference."""
        self._records.add({f"choice/{inputs}": encode(name)})

    def registered(self, look: Look, reference: Look) -> bool:
        """Give a look its registration with a reference, if it is known."""
        found = self._known(_pair(look, reference))
        if found is None:
            return False
        look.registration, look.reason = found
        return True

    def add_registrations(self, looks: Sequence[Look], reference: Look) -> None:
        """Keep the registrations of some looks."""
        self._records.add({_pair(look, reference): encode((look.registration, look.reason)) for look in looks},
                          soon=True)

    def setup(self, inputs: str) -> bytes | None:
        """Record of the setup of these inputs."""
        key = f"setup/{inputs}"
        return None if self._known(key) is None else self._records[key]

    def add_setup(self, inputs: str, setup: bytes) -> None:
        """Keep the setup."""
        self._records.add({f"setup/{inputs}": setup})

    def batch(self, key: str) -> BatchDone | None:
        """Return what came of a batch, if it is done."""
        found: BatchDone | None = self._known(f"batch/{key}")
        return found

    def add_batch(self, key: str, done: bytes) -> None:
        """Keep what came of a batch."""
        self._records.add({f"batch/{key}": done})

    def batches(self) -> Iterator[str]:
        """Keys of the batches that are done."""
        return (key.removeprefix("batch/") for key in self._records.keys("batch/"))


def has_batches(path: Path) -> bool:
    """Whether a file has records of batches, or is of another kind."""
    try:
        with contextlib.closing(RunState(path)) as state:
            return any(True for _ in state.batches())
    except ConfigError:
        return True


def _pair(look: Look, reference: Look) -> str:
    return f"registered/{digest(str(look.path), look.stamp, str(reference.path), reference.stamp)}"


def batch_key(setup: Setup, looks: Sequence[Look]) -> str:
    """Key of a batch: what its epochs depend on."""
    return f"{setup.digest}-{digest([(look.name, look.stamp) for look in looks])}"


def inputs_of(looks: Sequence[Look], config: RunConfig) -> str:
    """Key of all frames as they are, and what has to do with how they are split."""
    positions = None if config.positions is None else stamp_of(Path(config.positions))
    frames = [(str(x.path), x.name, x.stamp, x.reason) for x in looks]
    return digest(config.batch_size, config.reference, positions, frames)
