"""The frames that files, folders and patterns stand for."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from gpudia.errors import ConfigError
from gpudia.images.headers import name_of

__all__ = ["FRAME_SUFFIXES", "distinct_names", "expand_frames"]

log = logging.getLogger("gpudia.pipeline")

#: What counts as a frame in a folder (in any case).
FRAME_SUFFIXES = (".fits", ".fit", ".fts", ".fits.fz", ".fits.gz")


def expand_frames(patterns: str | os.PathLike[str] | Collection[str | os.PathLike[str]]) -> list[Path]:
    """List the frames that files, folders and glob patterns stand for.

    Parameters
    ----------
    patterns : str, path or sequence of them
        A folder stands for its files that end in one of `FRAME_SUFFIXES` (hidden ones excepted); a pattern with
        ``*``, ``?`` or ``[]`` for the files it matches, ``**`` at any depth; anything else is a file, which need
        not exist: a frame that is missing is for the run to report.

    Returns
    -------
    list of Path
        Sorted, each file once.

    Raises
    ------
    ConfigError
        If nothing at all is found. A folder or pattern that yields nothing beside others that do is logged.
    """
    found: dict[str, Path] = {}
    empty = []
    for pattern in [os.fspath(p) for p in ([patterns] if isinstance(patterns, str | os.PathLike) else patterns)]:
        paths = _expand(os.path.expanduser(pattern))
        if not paths:
            empty.append(pattern)
        for path in paths:
            found.setdefault(os.path.abspath(path), path)
    if not found:
        raise ConfigError(f"frames must match at least one file, got {', '.join(map(repr, empty)) or 'none'}")
    for pattern in empty:
        log.warning("frames: nothing matches %r", pattern)
    return sorted(found.values())


def _expand(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        seen = [p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")]
        return [p for p in seen if p.name.lower().endswith(FRAME_SUFFIXES)]
    if glob.has_magic(pattern) and not path.exists():
        return [p for p in map(Path, glob.glob(pattern, recursive=True)) if p.is_file()]
    return [path]


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Names for products: file stems, numbered where two files of different folders share one."""
    stems = [name_of(path) for path in paths]
    taken, used = set(stems), set()  # a file may really be called a-2
    names = []
    for stem in stems:
        name, count = stem, 1
        while name in used or (count > 1 and name in taken):
            count += 1
            name = f"{stem}-{count}"
        used.add(name)
        names.append(name)
    return names
