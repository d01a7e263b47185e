"""What a process that works for another has to say: its log records travel with the result."""

from __future__ import annotations

import logging
import logging.handlers
import queue
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["tell", "told"]


def told(task: Callable[[Any, bytes], bytes], item: Any, shared: bytes) -> tuple[bytes, list[logging.LogRecord]]:
    """Do a task and return its result with the log records of the library."""
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    handler = logging.handlers.QueueHandler(records)  # makes records fit to be sent
    logger = logging.getLogger("gpudia")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        result = task(item, shared)
    finally:
        logger.removeHandler(handler)
    return result, [records.get() for _ in range(records.qsize())]


def tell(records: Sequence[logging.LogRecord]) -> None:
    """Log the records of another process here."""
    for record in records:
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)
