"""The task of a run that takes longest: one batch. The same in this process and in others, see `look_tasks`."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any

from gpudia.backend import active_backend, to_host, use_backend
from gpudia.errors import FrameError
from gpudia.model import DifferenceStack
from gpudia.pipeline.codec import decode, encode
from gpudia.pipeline.epochs import EpochOutcome, Product, finish, flagged, kept
from gpudia.pipeline.look_tasks import LookJob, one_thread, shared_of
from gpudia.pipeline.looks import Look, frame_errors
from gpudia.pipeline.measure import EpochFluxes, Measures, measure_batch
from gpudia.pipeline.outputs import write_difference
from gpudia.pipeline.prepare import Prepared, PreparedBatch, place_batch, prepare, subtracted
from gpudia.pipeline.reference import RunReference
from gpudia.pipeline.stages import stage, take_times
from gpudia.pipeline.storage import writing
from gpudia.pipeline.warned import warnings_logged

__all__ = ["BatchDone", "Setup", "do_batch", "do_batches", "load_batches", "load_report"]

log = logging.getLogger("gpudia.pipeline")


@dataclass(frozen=True)
class Setup:
    """All that an epoch of a run depends on beside its frame: enough for any process to work on a batch.

    `batch_bytes` is the memory that such a process needs.
    """

    looks: LookJob
    reference: RunReference
    measures: Measures
    batch_size: int
    batch_bytes: int
    output: Path

    @cached_property
    def digest(self) -> str:
        """Short name of all that the numbers depend on."""
        return hashlib.sha256(encode([self.reference, self.measures, self.batch_size])).hexdigest()[:16]


@dataclass(frozen=True)
class BatchDone:
    """What came of a batch, and the seconds by stage."""

    outcomes: list[EpochOutcome]
    backend: str
    times: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of_dead(cls, look: Look, error: Exception) -> BatchDone:
        """Outcome of a frame that the process died of, whoever did it."""
        return cls([EpochOutcome.of(look.failed(FrameError(str(error), look.path)))], active_backend().name)

    def in_order_of(self, looks: Sequence[Look]) -> list[EpochOutcome]:
        """Return the outcomes in the order of the frames."""
        by_name = {outcome.name: outcome for outcome in self.outcomes}
        return [by_name[look.name] for look in looks]


def do_batch(item: Sequence[bytes], shared: bytes) -> bytes:
    """Work on one batch: records of looks in, a `BatchDone` out; difference images are on the disk then."""
    setup: Setup = shared_of(shared)
    _choose_backend(setup.looks.config.backend)
    return next(do_batches([[decode(look) for look in item]], setup))


def load_batches(_: Any, __: bytes) -> bytes:
    """Load this module: a third of a second that a process has while the reference is chosen."""
    return b""


def load_report(_: Any, __: bytes) -> bytes:
    """Load what draws the figures of a report: half a second that a process has while the reference is made."""
    for name in ("gpudia.report", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        import_module(name)
    return b""


_backend_asked = ""


def _choose_backend(name: str) -> None:
    """Choose the backend of a process that works for a run, once."""
    global _backend_asked
    if _backend_asked != name:
        use_backend(name)
        _backend_asked = name


_Ready = list[tuple[Look, Prepared]]


@dataclass(frozen=True)
class _ReadBatch:
    """A batch that was read, cut and placed on the device; frames that could not be are outcomes already.

    `placed` is None where the device did not take the batch.
    """

    ready: _Ready
    placed: PreparedBatch | None
    failed: list[EpochOutcome]
    times: dict[str, float]


_Pending = tuple[list[EpochOutcome], dict[str, float], Future[dict[str, float]]]


def do_batches(batches: Iterable[Sequence[Look]], setup: Setup) -> Iterator[bytes]:
    """Work on batches one after the other; the next is read and placed and the last is written meanwhile.

    At most three batches are held at a time.

    Yields
    ------
    bytes
        A `BatchDone`, when all its files are on the disk.
    """
    todo = iter(batches)
    _ = setup.reference.plan  # built here, not by two threads at once
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer, one_thread():
        coming = _next(todo, setup, reader)
        behind: _Pending | None = None
        while coming is not None:
            read: _ReadBatch = coming.result()
            coming = _next(todo, setup, reader)
            outcomes, products = _solved(read.ready, read.placed, setup)
            solve_times = take_times()
            if behind is not None:
                yield _written(*behind)
            for name, seconds in read.times.items():
                solve_times[name] = solve_times.get(name, 0.0) + seconds
            behind = read.failed + outcomes, solve_times, writer.submit(_write, products, setup)
        if behind is not None:
            yield _written(*behind)


def _next(todo: Iterator[Sequence[Look]], setup: Setup, reader: ThreadPoolExecutor) -> Future[Any] | None:
    batch = next(todo, None)
    return None if batch is None else reader.submit(_read, batch, setup)


def _written(outcomes: list[EpochOutcome], times: dict[str, float], writing_them: Future[dict[str, float]]) -> bytes:
    for name, seconds in writing_them.result().items():
        times[name] = times.get(name, 0.0) + seconds
    return encode(BatchDone(outcomes, active_backend().name, times))


def _read(batch: Sequence[Look], setup: Setup) -> _ReadBatch:
    """Cut the frames of a batch and place them on the device."""
    ready: _Ready = []
    failed = []
    store = setup.looks.store()
    for look in batch:
        start = time.perf_counter()
        try:
            with frame_errors(look.path), warnings_logged(look.path), stage("prepare"):
                ready.append((look, prepare(partial(store.part, look), look.registration, setup.reference.region,
                                            setup.reference.config)))
            look.seconds += time.perf_counter() - start
        except FrameError as error:
            failed.append(EpochOutcome.of(look.failed(error)))
    placed = None
    if ready:
        with contextlib.suppress(FrameError), frame_errors(ready[0][0].path):  # tried once more, then in halves
            placed = _placed(ready, setup)
    return _ReadBatch(ready, placed, failed, take_times())


def _placed(ready: _Ready, setup: Setup) -> PreparedBatch:
    reference = setup.reference
    with stage("transfer"):
        return place_batch([prepared for _, prepared in ready], reference.region.shape, reference.plan.backend)


@dataclass(frozen=True)
class _Batch:
    """A solved batch, host side: differences, flags and fluxes by number, those that failed as outcomes."""

    stack: DifferenceStack
    noise_ratio: Any
    bits: dict[int, Any]
    fluxes: dict[int, EpochFluxes]
    failed: dict[int, EpochOutcome]


def _solved(ready: _Ready, placed: PreparedBatch | None, setup: Setup) -> tuple[list[EpochOutcome], list[Product]]:
    """Upload, solve, measure and download; a batch that does not get through is tried in halves."""
    if not ready:
        return [], []
    start = time.perf_counter()
    try:
        with frame_errors(ready[0][0].path):
            batch = _solve(ready, placed or _placed(ready, setup), setup)
    except FrameError as error:
        if len(ready) == 1:
            return [EpochOutcome.of(ready[0][0].failed(error))], []
        log.warning("a batch of %d frames failed (%s); going on with its halves", len(ready), error.reason)
        half = len(ready) // 2
        first, second = _solved(ready[:half], None, setup), _solved(ready[half:], None, setup)
        return first[0] + second[0], first[1] + second[1]
    shared = (time.perf_counter() - start) / len(ready)
    outcomes, products = [], []
    for i, (look, _) in enumerate(ready):
        start = time.perf_counter()
        outcome, product = batch.failed.get(i), None
        if outcome is None:
            ratio = None if batch.noise_ratio is None else batch.noise_ratio[i]
            outcome, product = finish(look, batch.stack, i, batch.bits[i], batch.fluxes.get(i), ratio, setup.reference,
                                      setup.measures)
        outcomes.append(replace(outcome, seconds=look.seconds + shared + time.perf_counter() - start))
        products += [] if product is None else [product]
    return outcomes, products


def _solve(ready: _Ready, placed: PreparedBatch, setup: Setup) -> _Batch:
    """Solve and measure on the device; what is left to do is done on the host."""
    reference = setup.reference
    plan = reference.plan
    with stage("solve"):
        stack = subtracted(plan, placed, kept(reference.config))
    with stage("transfer"):
        own = stack.image_variance if reference.config.detect is not None else None
        host = replace(stack, covariance=None, image_variance=own).to_host()
        ratio = None if placed.noise_ratio is None or own is None else to_host(placed.noise_ratio)
    with stage("photometry"):
        found = plan.backend.run_all(lambda i: _flagged(ready, host, i, placed, reference), range(len(ready)))
        failed = {i: one for i, one in enumerate(found) if isinstance(one, EpochOutcome)}
        bits = {i: one for i, one in enumerate(found) if i not in failed}
        shares = {i: reference.weights.get(ready[i][0].name, 0.0) / float(host.scale[i]) for i in bits}
        fluxes = measure_batch(setup.measures, plan, stack, bits, placed.noise_ratio, shares,
                               {i: ready[i][0].fwhm for i in bits})
    return _Batch(host, ratio, bits, fluxes, failed)


def _flagged(ready: _Ready, host: DifferenceStack, i: int, placed: PreparedBatch, reference: RunReference) -> Any:
    """Pixel flags of an image of a solved batch, or the outcome where it failed."""
    look, prepared = ready[i]
    look.flags |= prepared.flags
    try:
        return flagged(look, host, i, placed.bits[i], reference)
    except FrameError as error:
        return EpochOutcome.of(look.failed(error))


def _write(products: Sequence[Product], setup: Setup) -> dict[str, float]:
    """Write the difference images of a batch."""
    if setup.reference.config.products:
        for product in products:
            path = setup.output / "difference" / f"{product.look.name}.fits"
            with stage("write"), writing(path):
                write_difference(path, product.look, product.stack, product.index, product.bits, setup.reference,
                                 product.more)
    return take_times()
