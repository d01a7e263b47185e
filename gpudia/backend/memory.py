"""What to do when a device's memory does not hold what was planned for it."""

from __future__ import annotations

import logging
from collections.abc import Callable

from gpudia.backend.base import Backend

__all__ = ["or_in_halves"]

log = logging.getLogger(__name__)


def or_in_halves(function: Callable[[slice], None], group: slice, backend: Backend) -> None:
    """Call a function with a group of images; where they do not fit into memory together, once more with each half.

    Raises
    ------
    MemoryError
        If one image, or half of the group, does not fit either.
    """
    size = group.stop - group.start
    try:
        function(group)
        return
    except MemoryError:  # CuPy's out-of-memory error is one
        if size < 2:
            raise
    # Outside of the handler: its traceback would keep the planes of the first attempt alive.
    log.warning("out of memory with %d images at once on %s: going on with %d", size, backend.device, size - size // 2)
    backend.release()
    middle = group.start + size - size // 2
    function(slice(group.start, middle))
    function(slice(middle, group.stop))
