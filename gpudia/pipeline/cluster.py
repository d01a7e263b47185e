"""Tasks on a Dask cluster: processes on this machine, or the workers of a scheduler that exists."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from gpudia import __version__
from gpudia.backend import backend_info, cores
from gpudia.errors import BackendError, ConfigError
from gpudia.images import write_atomically
from gpudia.pipeline.executors import Executor, Task, WorkerDied, start_worker
from gpudia.pipeline.storage import writing
from gpudia.pipeline.told import tell, told

try:
    import dask
    import distributed
    from distributed.comm.registry import get_backend
    from tornado.ioloop import PeriodicCallback
except ImportError as error:
    raise ConfigError("workers and dask must be left out where Dask is missing; install it with pip install "
                      "'gpudia[dask]'") from error

__all__ = ["Cluster"]

log = logging.getLogger("gpudia.pipeline")

#: Seconds to wait for a scheduler to answer, and for it to have a worker.
_ANSWER, _WORKER = 10, 60
#: Seconds after which it is looked again whether there are workers.
_PATIENCE = 20
#: Tasks begun for each worker: one in work, one that waits for it.
_AHEAD = 2


class Cluster(Executor):
    """Workers of Dask that do all tasks, whole batches too.

    What the items of a step share lies in a file in the output folder, which they all see: no worker that is lost takes
    it along.

    Parameters
    ----------
    address : str or None
        Of a scheduler; None: start workers on this machine.
    workers : int
        How many.
    output : Path
        Folder of the run.

    Raises
    ------
    ConfigError
        If no scheduler listens, it has no workers, or these have another version of gpudia or do not see `output`.
    """

    def __init__(self, address: str | None, workers: int, output: Path) -> None:
        self._output = output.resolve()
        self._cluster, self._again = None if address else _local(workers), None
        self._address = address or self._cluster.scheduler_address
        try:
            if address:
                _knock(address)
            self._client = distributed.Client(self._address, timeout=_ANSWER, set_as_default=False)
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            raise ConfigError(f"dask must be the address of a scheduler that listens, such as tcp://host:8786, got "
                              f"{address} ({str(error).splitlines()[0] or type(error).__name__})") from error
        try:
            self._check_workers()
        except BaseException:
            self.close()
            raise
        if self._cluster is not None:
            self._again = PeriodicCallback(self._start_again, 1000 * _PATIENCE)
            self._cluster.loop.add_callback(self._again.start)

    def _check_workers(self) -> None:
        try:
            self._client.wait_for_workers(1, timeout=_WORKER)
        except TimeoutError as error:
            raise ConfigError(f"dask must have at least one worker, got none at {self._address} in {_WORKER} s"
                              ) from error
        found = self._client.run(_version_and_sight, str(self._output / "state"))
        for worker, (version, sees) in found.items():
            if version != __version__:
                raise ConfigError(f"dask must have workers with gpudia {__version__}, got {version} on {worker}")
            if not sees:
                raise ConfigError(f"output must be on storage that all workers see, got {self._output}, which "
                                  f"{worker} does not")
        log.info("%d workers at %s", len(found), self._address)

    def _start_again(self) -> None:
        """Start workers of this machine that ended for good; whatever is waited for, a result on one of them, too."""
        self._cluster.scale(len(self._cluster.worker_spec))

    def does_batches(self, _: int) -> bool:
        """Yes: each worker is there for as much as it can."""
        return True

    def map(self, task: Task, items: Sequence[Any], shared: bytes) -> Iterator[tuple[int, bytes | WorkerDied]]:
        """See `Executor.map`."""
        place = self._output / "state" / f"shared.{os.urandom(8).hex()}"
        with writing(place):
            write_atomically(place, lambda path: path.write_bytes(shared))
        todo = iter(range(len(items)))
        running: dict[Any, int] = {}
        finished: SimpleQueue[Any] = SimpleQueue()
        died: list[int] = []

        def begin(number: int) -> None:
            future = self._client.submit(_remote, task, items[number], str(place), pure=False)
            running[future] = number
            future.add_done_callback(finished.put)

        def finish() -> tuple[int, bytes | WorkerDied]:
            future = self._next(finished)
            return running.pop(future), self._result(future)

        try:
            for number in islice(todo, _AHEAD * max(1, len(self._client.nthreads()))):
                begin(number)
            while running:
                number, result = finish()
                for following in islice(todo, 1):
                    begin(following)
                if isinstance(result, WorkerDied):
                    died.append(number)
                else:
                    yield number, result
            # Dask counts a death against all that the worker was given: whose it is, shows when each is done alone.
            for number in died:
                begin(number)
                yield finish()
        finally:
            self._client.cancel(list(running))
            place.unlink(missing_ok=True)

    def _next(self, finished: SimpleQueue[Any]) -> Any:
        """Wait for a future that is done."""
        while True:
            try:
                return finished.get(timeout=_PATIENCE)
            except Empty:
                if not self._client.nthreads():
                    log.warning("no workers at %s: waiting for one", self._address)

    def _result(self, future: Any) -> bytes | WorkerDied:
        try:
            result, records = future.result()
        except distributed.KilledWorker as error:
            return WorkerDied(f"the worker died while it was worked on, {error.allowed_failures + 1} times")
        except (distributed.CancelledError, distributed.comm.CommClosedError) as error:
            raise BackendError(f"dask scheduler must stay where it was, got no more answer from {self._address}; go on "
                               "with resume (--resume)") from error
        tell(records)
        done: bytes = result
        return done

    def close(self) -> None:
        """Leave the scheduler; end the workers that were started for this."""
        if self._again is not None:
            self._cluster.loop.add_callback(self._again.stop)
        self._client.close()
        if self._cluster is not None:
            self._cluster.close()


def _knock(address: str) -> None:
    """Raise OSError or ValueError at once where nobody can listen: Dask would knock until its time is over."""
    kind, _, place = address.rpartition("://")
    get_backend(kind or "tcp")
    if kind in ("", "tcp", "tls"):
        socket.create_connection(distributed.comm.parse_host_port(place, 8786), timeout=_ANSWER).close()


def _local(workers: int) -> Any:
    """Processes on this machine that share its cores, and its GPUs where it has some, one after the other."""
    devices = int(backend_info().get("devices", 0))
    threads = str(max(1, cores() // workers))
    specs = {}
    for number in range(workers):
        env = {"OMP_NUM_THREADS": threads, "GPUDIA_CORES": threads}
        if devices:
            env["CUDA_VISIBLE_DEVICES"] = str(number % devices)
        options = {"nthreads": 1, "memory_limit": 0, "env": env, "silence_logs": logging.ERROR, "dashboard": False,
                   "dashboard_address": "127.0.0.1:0", "preload": ["gpudia.pipeline.cluster"], "host": "127.0.0.1"}
        specs[number] = {"cls": distributed.Nanny, "options": options}
    scheduler = {"cls": distributed.Scheduler, "options": {"dashboard": False, "dashboard_address": "127.0.0.1:0",
                                                                "host": "127.0.0.1", "port": 0}}
    with dask.config.set({"distributed.worker.profile.enabled": False}):
        return distributed.SpecCluster(workers=specs, scheduler=scheduler, silence_logs=logging.ERROR, name="gpudia")


def dask_setup(_: Any) -> None:
    """Called by Dask in every worker that is started here."""
    start_worker()


def _version_and_sight(path: str) -> tuple[str, bool]:
    return __version__, Path(path).is_dir()


@lru_cache(maxsize=2)
def _shared(path: str) -> bytes:
    return Path(path).read_bytes()


def _remote(task: Task, item: Any, path: str) -> tuple[bytes, list[logging.LogRecord]]:
    """Do a task on a worker."""
    return told(task, item, _shared(path))
