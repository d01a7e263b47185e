"""The frames that files, folders and patterns stand for."""

from __future__ import annotations

import glob
import logging
import os
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from gpudia.errors import ConfigError
from gpudia.images.headers import name_of

__all__ = ["FRAME_SUFFIXES", "distinct_names", "expand_frames"]

log = logging.getLogger("gpudia.pipeline")

#: What counts as a frame in a folder (in any case).
FRAME_SUFFIXES = (".fits", ".fit", ".fts", ".fits.fz", ".fits.gz")
#: What no product is named with: some file systems, shells and browsers take it for something else.
_UNFIT = set("/\\<>\"'&?*:|")
_NAMED = 5  # files in a message
_LONGEST = 180  # bytes; file systems allow 255, of which a file that is being written needs 40 more


def expand_frames(patterns: str | os.PathLike[str] | Collection[str | os.PathLike[str]]) -> list[Path]:
    """List the frames that files, folders and glob patterns stand for.

    Parameters
    ----------
    patterns : str, path or sequence of them
        A folder stands for its files that end in one of `FRAME_SUFFIXES` (hidden ones excepted, which is logged); a
        pattern with ``*``, ``?`` or ``[]`` for the files it matches, ``**`` at any depth; anything else is a file. A
        frame that is none (missing, a link that leads nowhere, an empty folder of such a name) is for the run to
        report.

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
    if os.path.isdir(path):  # unlike Path's own methods, os.path never raises: not for a name too long either
        files = [p for p in path.iterdir() if _named_like_one(p) and not p.is_dir()]
        seen = [p for p in files if not p.name.startswith(".")]
        if len(seen) < len(files):
            hidden = sorted(p.name for p in files if p.name.startswith("."))
            log.warning("frames: %d hidden in %r passed over: %s; name them to use them", len(hidden), pattern,
                        ", ".join(hidden[:_NAMED]) + (", ..." if len(hidden) > _NAMED else ""))
        return seen or ([path] if _named_like_one(path) else [])
    if glob.has_magic(pattern) and not os.path.lexists(path):
        return [p for p in map(Path, glob.glob(pattern, recursive=True)) if not p.is_dir()]
    return [path]


def _named_like_one(path: Path) -> bool:
    return path.name.lower().endswith(FRAME_SUFFIXES)


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return names for the products of frames.

    Parameters
    ----------
    paths : sequence of Path
        The frames.

    Returns
    -------
    list of str
        File stems with ``_`` for what does not print or is unfit for a name, numbered (``a-2``) where two frames share
        one; upper and lower case count as the same, as some file systems have it.
    """
    stems = [_fit_name(name_of(path)) for path in paths]
    used: set[str] = set()
    taken, counts = {stem.lower() for stem in stems}, Counter[str]()  # a file may really be called a-2
    names = []
    for stem in stems:
        name = stem
        while name.lower() in used or (name is not stem and name.lower() in taken):
            counts[stem] += 1
            name = f"{stem}-{counts[stem] + 1}"
        used.add(name.lower())
        names.append(name)
    return names


def _fit_name(stem: str) -> str:
    fit = "".join("_" if c in _UNFIT or not c.isprintable() else c for c in stem).strip().lstrip(".")
    return fit.encode()[:_LONGEST].decode(errors="ignore") or "frame"
