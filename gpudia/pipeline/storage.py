"""What can go wrong with the output: said as what it is, so that no frame is blamed for a full disk."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from gpudia.errors import OutputError

__all__ = ["check_space", "writing"]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's errors while something is written into an `OutputError` that names the file."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}; when that is mended go on with resume "
                          "(--resume)") from error


def check_space(folder: Path, needed: int) -> None:
    """Raise an `OutputError` if a folder's disk has not so many bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(f"output must have room for {needed / 1e9:.3g} GB, got {free / 1e9:.3g} GB free in {folder}; "
                          "without difference images (--no-products) it takes little")
