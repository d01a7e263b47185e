"""Where tasks are done: in this process, in processes beside it, on a Dask cluster; the results are the same."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

from gpudia.backend import active_backend, cores
from gpudia.config import RunConfig
from gpudia.pipeline.told import tell, told

__all__ = ["Executor", "Here", "Readers", "Task", "WorkerDied", "executor_for", "start_worker"]

log = logging.getLogger("gpudia.pipeline")

#: A task: an item and what all items share in, a result out.
Task = Callable[[Any, bytes], bytes]


class WorkerDied(Exception):  # noqa: N818 - it is a result, too
    """The process that worked on an item died, more than once."""


class Executor:
    """Does tasks."""

    def does_batches(self, memory: int, /) -> bool:
        """Whether `map` is to do whole batches, of so many bytes each; if not, this process solves."""
        raise NotImplementedError

    def frames_of_batch(self, most: int, n_frames: int) -> int:  # noqa: ARG002 - for those that share them out
        """How many of `n_frames` frames a batch is to have where `most` can be held."""
        return most

    def map(self, task: Task, items: Sequence[Any], shared: bytes) -> Iterator[tuple[int, bytes | WorkerDied]]:
        """Do a task for all items; yield numbers of items with results as they come, in any order.

        Not many more are begun than are being waited for. An exception that a task raises passes.
        """
        raise NotImplementedError

    def begin(self, task: Task, item: Any, shared: bytes, /) -> Callable[[], bytes]:
        """Begin a task beside what this process does, where another idles; return what waits for the result."""
        return lambda: task(item, shared)

    def prepare(self, task: Task, /) -> None:
        """Let processes that idle do a task once each, if there are such; nobody waits for it."""

    def close(self) -> None:
        """End what was begun for this."""


class Here(Executor):
    """Tasks one after the other in this process."""

    def does_batches(self, _: int) -> bool:
        """No: this process reads a batch while it solves another."""
        return False

    def map(self, task: Task, items: Sequence[Any], shared: bytes) -> Iterator[tuple[int, bytes | WorkerDied]]:
        """See `Executor.map`."""
        for number, item in enumerate(items):
            yield number, task(item, shared)


#: Batches that a process is to have at least, if that leaves so many frames for each; and the most that these have.
_ROUNDS, _FEWEST, _MOST = 16, 4, 16


class Readers(Executor):
    """Processes on this machine, one for each core that is to be used.

    They read and register frames, and do whole batches where the arrays are NumPy's, the memory holds as many, and they
    are half of the cores or more: each works on one, while this process would work on all.
    Processes, since threads take turns: with two of them two cores read 300 px frames hardly faster than with one, and
    take a tenth longer to solve and measure them than two processes.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool: ProcessPoolExecutor | None = None

    def does_batches(self, memory: int) -> bool:
        """On the CPU, where half of the free memory is enough: a GPU is best kept busy by one process."""
        return self._share_out() and self._count * memory <= active_backend().free_bytes() // 2

    def frames_of_batch(self, most: int, n_frames: int) -> int:
        """Few enough on the CPU that no process has long to wait for the last: 8 frames take as long as 32, each.

        And a process holds a third more memory with 32 of 300 px than with 16.
        """
        share = min(max(_FEWEST, n_frames // (_ROUNDS * self._count)), _MOST)
        return min(most, share) if self._share_out() else most

    def _share_out(self) -> bool:
        """Whether these rather than one process that solves should use the cores: they are half of them or more."""
        return active_backend().name == "numpy" and 2 * self._count >= cores()

    def map(self, task: Task, items: Sequence[Any], shared: bytes) -> Iterator[tuple[int, bytes | WorkerDied]]:
        """See `Executor.map`."""
        todo, alone = deque(range(len(items))), deque[int]()
        running: dict[Future[Any], int] = {}
        try:
            while todo or running or alone:
                while todo and len(running) < 2 * self._count:
                    number = todo.popleft()
                    running[self._submit(task, items[number], shared)] = number
                if not running:  # one of these killed its process: which, shows when nothing else is done meanwhile
                    number = alone.popleft()
                    yield number, self._done_alone(task, items[number], shared)
                    continue
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    number = running.pop(future)
                    try:
                        result, records = future.result()
                    except BrokenExecutor:
                        alone.append(number)
                        continue
                    _tell(records)
                    yield number, result
        except KeyboardInterrupt:  # while these are waited for: a second one, as the first waits for a result
            self._kill()
            raise
        finally:
            for future in running:
                future.cancel()

    def begin(self, task: Task, item: Any, shared: bytes) -> Callable[[], bytes]:
        """See `Executor.begin`: no process starts for this."""
        if self._pool is None:
            return super().begin(task, item, shared)
        future = self._submit(task, item, shared)

        def result() -> bytes:
            try:
                found, records = future.result()
            except BrokenExecutor:
                return task(item, shared)
            _tell(records)
            done: bytes = found
            return done

        return result

    def prepare(self, task: Task) -> None:
        """See `Executor.prepare`."""
        for _ in range(self._count):
            self._submit(task, None, b"")

    def _done_alone(self, task: Task, item: Any, shared: bytes) -> bytes | WorkerDied:
        try:
            result, records = self._submit(task, item, shared).result()
        except BrokenExecutor:
            return WorkerDied("the process that worked on it died, twice")
        _tell(records)
        return result

    def _submit(self, task: Task, item: Any, shared: bytes) -> Future[Any]:
        if self._pool is None:
            self._pool = _pool(self._count)
        try:
            return self._pool.submit(told, task, item, shared)
        except BrokenExecutor:  # it stays so
            self._pool = _pool(self._count)
            return self._pool.submit(told, task, item, shared)

    def close(self) -> None:
        """End the processes when what they are at is done; at once where that is interrupted."""
        if self._pool is not None:
            try:
                self._pool.shutdown(wait=True, cancel_futures=True)
            except KeyboardInterrupt:
                self._kill()
                raise

    def _kill(self) -> None:
        """End the processes at once. Otherwise this one would wait for them at its own end, whoever interrupts it.

        The pool is left to itself: closed once more after an interrupt, it takes its thread for ended, which is not.
        """
        pool, self._pool = self._pool, None
        if pool is not None and pool._processes:
            for process in list(pool._processes.values()):
                process.kill()


def _tell(records: Sequence[logging.LogRecord]) -> None:
    """Log what a process here has to say, but for its choice of a backend: that is this one's."""
    tell([record for record in records if record.name != "gpudia.backend"])


#: For glibc: planes come from memory that the process keeps. Fetching it anew for each takes a tenth of the time. And
#: all of it is in one piece: with one for each thread, those that read and write, a process holds a sixth more.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 28), "MALLOC_TRIM_THRESHOLD_": str(1 << 28), "MALLOC_ARENA_MAX": "1"}


def _pool(count: int) -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=start_worker)
    with _no_main(), _environment(OMP_NUM_THREADS="1", GPUDIA_CORES="1", **_KEEP_MEMORY):
        for _ in range(count):
            pool.submit(int)  # the processes start now
    return pool


def start_worker() -> None:
    """Prepare a process that works for another: an interrupt at the terminal is for the one that leads.

    It ends with that one, however that one ends: of a parent that is killed it would hear nothing, and wait for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(parent: int) -> None:
    wait_for([parent])
    os._exit(1)


@contextlib.contextmanager
def _no_main() -> Iterator[None]:
    """Hide the caller's script from processes that start: they would run it again where it has no guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set variables for processes that start."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


#: Frames from which on reading processes are worth their start (1 to 2 s).
_ENOUGH = 50


def executor_for(config: RunConfig, n_frames: int, output: Path) -> Executor:
    """Return who does the tasks of a run of so many frames.

    Raises
    ------
    ConfigError
        If Dask is asked for and is not installed, or no scheduler listens.
    """
    if config.dask is not None or config.workers:
        from gpudia.pipeline.cluster import Cluster

        return Cluster(config.dask, config.workers, output)
    readers = (cores() if n_frames >= _ENOUGH else 0) if config.readers == "auto" else int(config.readers)
    return Readers(readers) if readers else Here()
