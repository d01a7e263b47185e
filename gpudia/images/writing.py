"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path

from astropy.io import fits
from astropy.table import Table

from gpudia.errors import ConfigError

__all__ = ["remove_unfinished", "write_atomically", "write_hdus", "write_table"]


def write_atomically(path: str | Path, writer: Callable[[Path], object]) -> Path:
    """Have a file written beside its place and renamed when it is complete and on the disk.

    Parameters
    ----------
    path : str or path-like
        The file to write; one that is there already is replaced.
    writer : callable
        Gets the path of an empty file in the same folder, whose name ends like `path`, and fills it.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ConfigError
        The folder is missing or cannot be written to. What `writer` raises passes through; no part of a file is left.
    """
    path = Path(path)
    temporary = _new_file(path)
    try:
        writer(temporary)
        _to_disk(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # the rename itself; not every file system lets a folder be synchronised
        _to_disk(path.parent)
    return path


def _new_file(path: Path) -> Path:
    if path.is_dir():
        raise ConfigError(f"output must be a file, got the folder {path}")
    # The name keeps its ending: astropy chooses the format and the compression by it.
    temporary = path.parent / f".{uuid.uuid4().hex}.{path.name}"
    try:
        temporary.open("xb").close()
    except OSError as exc:
        raise ConfigError(f"output folder must be writable, got {path.parent}: {exc.strerror}") from exc
    return temporary


def remove_unfinished(folder: Path) -> None:
    """Remove what `write_atomically` left in a folder where it was killed; nothing may be written there meanwhile."""
    for path in folder.glob("." + "[0-9a-f]" * 32 + ".*"):
        path.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_table(table: Table, path: str | Path) -> Path:
    """Write a table as ECSV, whole or not at all; errors as in `write_atomically`."""
    return write_atomically(path, lambda p: table.write(p, format="ascii.ecsv", overwrite=True))


def write_hdus(hdus: fits.HDUList, path: str | Path) -> Path:
    """Write a FITS file with checksums, whole or not at all; errors as in `write_atomically`."""
    return write_atomically(path, lambda p: hdus.writeto(p, overwrite=True, checksum=True))
