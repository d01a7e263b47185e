"""The first tasks of a run: one frame's first look, some registrations. The same in this process and in others.

A task takes an item and what all items share, and returns bytes (`gpudia.pipeline.codec`): results do not depend on
where it was done. Apart from the batches, as a process that begins with these has not to load photometry first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from threadpoolctl import ThreadpoolController

from gpudia.config import RunConfig
from gpudia.pipeline.codec import decode, encode
from gpudia.pipeline.looks import FrameStore, Look, Seen, take_look
from gpudia.pipeline.registering import register_looks
from gpudia.pipeline.stages import stage, take_times
from gpudia.pipeline.warned import warnings_logged

__all__ = ["LookJob", "RegistrationJob", "do_look", "do_registrations", "one_thread", "shared_of"]

_libraries = ThreadpoolController()


@dataclass(frozen=True)
class LookJob:
    """What the first looks of a run share."""

    config: RunConfig
    pieces: Path
    n_frames: int

    def store(self) -> FrameStore:
        """Where frames are read and pieces of them kept."""
        return FrameStore(self.config, self.pieces, self.n_frames)


@dataclass(frozen=True)
class RegistrationJob:
    """What the registrations of a run share."""

    config: RunConfig
    reference: Look


@lru_cache(maxsize=2)
def shared_of(record: bytes) -> Any:
    """Return what a record holds, the same object for the same record: a process builds its plan once."""
    return decode(record)


def one_thread() -> Any:
    """BLAS on one thread: sums come out the same whatever frames stand beside one another, and cores are not shared."""
    return _libraries.limit(limits=1, user_api="blas")


def do_look(item: tuple[str, str], shared: bytes) -> bytes:
    """Take the first look at a frame: path and name in, a record of the look, its large part and the times out."""
    job: LookJob = shared_of(shared)
    path = Path(item[0])
    with one_thread(), warnings_logged(path):
        look = take_look(path, item[1], job.store(), job.config)
    return encode({"look": encode(replace(look, seen=Seen())), "seen": encode(look.large()), "times": take_times()})


def do_registrations(items: Sequence[tuple[bytes, bytes]], shared: bytes) -> bytes:
    """Register some frames: records of looks and of their large parts in, the looks (without these) out."""
    job: RegistrationJob = shared_of(shared)
    looks = [replace(decode(look), seen=decode(seen)) for look, seen in items]
    with one_thread(), stage("register"):
        register_looks(looks, job.reference, job.config)
    return encode({"looks": [replace(look, seen=Seen()) for look in looks], "times": take_times()})
