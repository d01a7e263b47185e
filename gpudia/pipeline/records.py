"""A file of records that outlives a pulled plug: written at the end only, checked when it is read."""

from __future__ import annotations

import os
import struct
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from gpudia.errors import ConfigError
from gpudia.pipeline.storage import writing

__all__ = ["RecordFile"]

_MAGIC = b"gpudia records 1\n"
#: Length of the key, length of the content, checksum of both.
_HEAD = struct.Struct("<IQI")
#: Seconds.
_SOON = 1.0


class RecordFile:
    """Records by key, the last one of a key counts. One process writes.

    What a power cut left half written at the end is cut off when the file is opened again.

    Parameters
    ----------
    path : Path
        The file; made when it is not there.

    Raises
    ------
    ConfigError
        If the file is none of this kind.
    OutputError
        If it cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, tuple[int, int]] = {}
        self._synced = 0.0
        with writing(path):
            self._file = path.open("a+b", buffering=0)
        try:
            with writing(path):
                end = self._scan()
                self._file.truncate(end)
                if not end:
                    self._file.write(_MAGIC)
        except BaseException:
            self._file.close()
            raise

    def _scan(self) -> int:
        """Find the records; return where the last whole one ends."""
        size = os.fstat(self._file.fileno()).st_size
        self._file.seek(0)
        if size < len(_MAGIC):
            return 0
        if self._file.read(len(_MAGIC)) != _MAGIC:
            raise ConfigError(f"state must be a file of records, got {self.path}; say overwrite to start anew")
        end = len(_MAGIC)
        while end + _HEAD.size <= size:
            key_size, content_size, check = _HEAD.unpack(self._file.read(_HEAD.size))
            if end + _HEAD.size + key_size + content_size > size:
                break
            key, content = self._file.read(key_size), self._file.read(content_size)
            if zlib.crc32(content, zlib.crc32(key)) != check:
                break
            start = end + _HEAD.size + key_size
            self._places[key.decode()] = start, content_size
            end = start + content_size
        return end

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def keys(self, prefix: str = "") -> Iterator[str]:
        """Keys that begin with `prefix`, in the order in which they were written first."""
        return (key for key in self._places if key.startswith(prefix))

    def __getitem__(self, key: str) -> bytes:
        start, size = self._places[key]
        return os.pread(self._file.fileno(), size, start)

    def add(self, records: Mapping[str, bytes], soon: bool = False) -> None:
        """Add records, all or none; on return they are on the disk.

        With `soon` they need not be: a disk takes 5 ms to say so, as long as a small frame takes to be looked at. They
        are there with the next ones after a second, or that must be. A power cut may lose them, a kill does not.

        Raises
        ------
        OutputError
            If they cannot be written; the file is then as before.
        """
        end = self._file.seek(0, os.SEEK_END)
        places, parts, at = {}, [], end
        for key, content in records.items():
            name = key.encode()
            parts += [_HEAD.pack(len(name), len(content), zlib.crc32(content, zlib.crc32(name))), name, content]
            places[key] = at + _HEAD.size + len(name), len(content)
            at += _HEAD.size + len(name) + len(content)
        try:
            with writing(self.path):
                left = memoryview(b"".join(parts))
                while left:
                    left = left[self._file.write(left):]
                if not soon or time.monotonic() - self._synced > _SOON:
                    os.fsync(self._file.fileno())
                    self._synced = time.monotonic()
        except BaseException:
            os.ftruncate(self._file.fileno(), end)
            raise
        self._places |= places

    def close(self) -> None:
        """Close the file."""
        self._file.close()
