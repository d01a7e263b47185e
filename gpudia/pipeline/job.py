"""The job: from frames to light curves. Reads like the method."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from gpudia.backend import Backend, to_host, use_backend
from gpudia.config import RunConfig
from gpudia.errors import ConfigError, FrameError
from gpudia.flags import FRAME_FLAGS
from gpudia.images import remove_unfinished, write_atomically
from gpudia.pipeline.calibrate import photometric_catalog
from gpudia.pipeline.candidates import write_candidates
from gpudia.pipeline.codec import decode, encode
from gpudia.pipeline.epochs import kept
from gpudia.pipeline.executors import Executor, WorkerDied, executor_for
from gpudia.pipeline.journal import PIECES, STATE, Journal, locked, log_to, prepare_output
from gpudia.pipeline.listing import distinct_names, expand_frames
from gpudia.pipeline.look_tasks import LookJob, RegistrationJob, do_look, do_registrations
from gpudia.pipeline.looks import Look, Seen, frame_errors
from gpudia.pipeline.measure import prepare_measures
from gpudia.pipeline.outputs import RunResult, write_results
from gpudia.pipeline.positions import check_positions
from gpudia.pipeline.prepare import PreparedBatch, bytes_of_batch, images_at_once, in_batches, place_batch, prepare
from gpudia.pipeline.progress import Progress, Watch
from gpudia.pipeline.reference import (
    RunReference,
    also_varying,
    make_reference,
    provisional,
    settle_model,
    trial_looks,
)
from gpudia.pipeline.registering import check_all, choose_reference
from gpudia.pipeline.sifting import drop_odd, note_barycentric, note_untimed, select_frames
from gpudia.pipeline.stacking import stack_reference
from gpudia.pipeline.stages import add_times, stage, take_times
from gpudia.pipeline.state import RunState, batch_key, inputs_of
from gpudia.pipeline.stopping import Stop, listening
from gpudia.pipeline.storage import check_space
from gpudia.pipeline.tasks import BatchDone, Setup, do_batch, do_batches, load_batches, load_report
from gpudia.pipeline.varying import find_varying
from gpudia.pipeline.warned import Repeats, repeats_folded, warnings_logged

__all__ = ["run"]

log = logging.getLogger("gpudia.pipeline")

#: Registrations of one task.
_TOGETHER = 16
#: Bytes of a difference file for every pixel: DIFF, MODEL, ERR, MASK.
_BYTES_OF_PRODUCT = 13


@dataclass
class _Job:
    """What the steps of one run share."""

    config: RunConfig
    output: Path
    backend: Backend
    looks: LookJob
    state: RunState
    journal: Journal
    executor: Executor
    stop: Stop
    watch: Watch
    repeats: Repeats
    times: dict[str, float] = field(default_factory=dict)


def run(config: RunConfig, progress: bool = False, callback: Callable[[Progress], object] | None = None) -> RunResult:
    """Make difference images and light curves from a series of frames.

    Parameters
    ----------
    config : RunConfig
        All settings.
    progress : bool
        Show progress bars: on stderr where that is a terminal, in a notebook below the cell.
    callback : callable, optional
        Called with a `Progress` after every frame and step; an exception that it raises ends the run.

    Returns
    -------
    RunResult
        Numbers of frames by status, tables and light curves, and where the report is.

    Raises
    ------
    ConfigError
        If the output folder cannot be used or is in use, no frame is found or selected, filters or instruments are
        mixed, settings do not fit the frames or those of the run to go on with, or no Dask scheduler listens.
    FrameError
        If nothing can be done: no frame is usable, or the reference is not.
    OutputError
        If the output cannot be written (disk full, permission lost).
    KeyboardInterrupt
        After SIGINT or SIGTERM, once what was in hand is done; a second one ends the run at once. After this, after an
        OutputError and after any other end, ``resume=True`` goes on with what is finished.

    Notes
    -----
    A frame that cannot be used is a row with a reason in ``epochs.ecsv``; the others go on.
    """
    paths = expand_frames(config.frames)
    output = Path(os.path.expanduser(config.output))
    with locked(output), use_backend(config.backend) as backend, threadpool_limits(1, "blas"):
        prepare_output(config, paths)
        with (log_to(output / "gpudia.log"), listening() as stop, closing(RunState(output / STATE)) as state,
              closing(Journal(output / "journal.jsonl")) as journal, repeats_folded() as repeats):
            state.take_settings(config, backend.name)
            write_atomically(output / "run.toml", lambda path: path.write_text(config.to_toml(), encoding="utf-8"))
            shared = LookJob(_bare(config), output / PIECES, len(paths))
            with closing(executor_for(config, len(paths), output)) as executor:
                return _steps(_Job(config, output, backend, shared, state, journal, executor, stop,
                                   Watch(progress, callback), repeats), paths)


def _bare(config: RunConfig) -> RunConfig:
    """Settings without what does not change the work on a frame."""
    return config.replace(frames=("-",), resume=False, overwrite=False)


def _check_files(config: RunConfig) -> None:
    """Refuse files of the settings that cannot serve before hours of work on the frames."""
    photometric_catalog(config)
    check_positions(config.positions)
    if config.reference not in ("auto", "stack") and not os.path.exists(os.path.expanduser(config.reference)):
        raise ConfigError(f"reference must be a usable frame, got {config.reference}: there is no such file")


def _steps(job: _Job, paths: Sequence[Path]) -> RunResult:
    start = time.perf_counter()
    _check_files(job.config)
    take_times()
    job.journal.write("start", frames=len(paths), backend=job.backend.name, device=job.backend.device,
                      resume=job.config.resume)
    looks = _look_at(job, paths)
    inputs = inputs_of(looks, job.config)
    note_times = note_barycentric(looks, job.config, job.executor)
    select_frames(looks, job.config.select)
    note_untimed(looks)
    job.executor.prepare(load_batches)
    best = _reference_of_a_kind(job, looks, inputs)
    _register(job, looks, best)
    note_times()
    job.executor.prepare(load_report)
    setup = _setup(job, looks, best, inputs)
    keys = _subtract(job, [look for look in looks if not look.reason], setup)
    with stage("report"):
        results, detections, backend = _collect(job, looks, keys)
        add_times(job.times, take_times())
        times = {name: round(seconds, 3) for name, seconds in job.times.items()}
        candidates = None
        if job.config.detect is not None:
            candidates = write_candidates(job.output, looks, setup.reference, detections, results)
        meta = {"stages": times, "wall": round(time.perf_counter() - start, 3)}
        result = write_results(job.output, job.config, backend or job.backend.name, looks, setup.reference,
                               setup.measures, results, meta, job.executor)
    add_times(job.times, take_times())
    times = {name: round(seconds, 3) for name, seconds in job.times.items()}
    job.journal.write("end", ok=result.n_ok, failed=result.n_failed, skipped=result.n_skipped, stages=times)
    result = replace(result, candidates=candidates, times=times, wall=round(time.perf_counter() - start, 3))
    log.info("%s", result.summary().splitlines()[0])
    log.info("seconds by stage: %s", ", ".join(f"{name} {seconds:.3g}" for name, seconds in times.items()))
    return result


def _look_at(job: _Job, paths: Sequence[Path]) -> list[Look]:
    """Take the first look at every frame that was not looked at before."""
    names = distinct_names(paths)
    looks = {name: job.state.look(name, path) for path, name in zip(paths, names, strict=True)}
    changed = [name for name, look in looks.items() if look is None and job.state.is_known(name)]
    if changed:
        log.warning("%d frames were changed, or failed, in the earlier run and are read again: %s", len(changed),
                    ", ".join(changed[:10]) + (", ..." if len(changed) > 10 else ""))
    new = [(str(path), name) for path, name in zip(paths, names, strict=True) if looks[name] is None]
    with job.watch.step("read", len(paths), len(paths) - len(new)) as tick:
        for number, result in job.executor.map(do_look, new, encode(job.looks)):
            path, name = new[number]
            if isinstance(result, WorkerDied):
                looks[name] = Look(Path(path), name).failed(FrameError(str(result), path))
            else:
                found = decode(result)
                looks[name] = job.state.add_look(found["look"], found["seen"])
                add_times(job.times, found["times"])
            job.journal.write("read", file=path, reason=looks[name].reason)
            tick(looks[name])
            job.stop.check()
    job.repeats.say()
    return [looks[name] for name in names]


def _reference_of_a_kind(job: _Job, looks: Sequence[Look], inputs: str) -> Look:
    """Choose the reference; frames of another filter or instrument fall out, and never become it by themselves."""
    named = job.config.reference not in ("auto", "stack")
    if not named:
        drop_odd(looks, job.config)
    known = None if named else job.state.choice(inputs)
    with stage("reference"):
        best = next((look for look in looks if look.name == known), None) or choose_reference(
            looks, job.config, job.looks.store())
    if named:
        drop_odd(looks, job.config, best)
    elif known is None:
        job.state.add_choice(inputs, best.name)
    if best.skipped:
        best.flags |= FRAME_FLAGS.is_reference
    best.seen = best.large()
    for look in looks:
        if look.reason and look is not best:
            job.looks.store().drop(look)
            job.journal.write("left out", file=str(look.path), status=look.status, reason=look.reason)
    log.info("reference %s", best.path)
    return best


def _register(job: _Job, looks: Sequence[Look], best: Look) -> None:
    """Register every usable frame with the reference."""
    check_all(looks, best, job.config)
    usable = [look for look in looks if not look.reason]
    todo = [look for look in usable if not job.state.registered(look, best)]
    groups = list(in_batches(todo, _TOGETHER))
    items = [[(encode(replace(x, seen=Seen())), job.state.large(x.name)) for x in group] for group in groups]
    shared = encode(RegistrationJob(_bare(job.config), best))
    with job.watch.step("register", len(usable), len(usable) - len(todo)) as tick:
        for number, result in job.executor.map(do_registrations, items, shared):
            done = {} if isinstance(result, WorkerDied) else decode(result)
            add_times(job.times, done.get("times", {}))
            for look, found in zip(groups[number], done.get("looks", groups[number]), strict=True):
                look.registration, look.reason, look.seconds = found.registration, found.reason, found.seconds
                if isinstance(result, WorkerDied):
                    look.fail(FrameError(str(result), look.path))
                tick(look)
            job.state.add_registrations(groups[number], best)
            job.stop.check()


def _setup(job: _Job, looks: Sequence[Look], best: Look, inputs: str) -> Setup:
    """Make the reference, choose what is "auto" in the model and measure the stars, or take up what was made."""
    record = job.state.setup(inputs)
    if record is None:
        with stage("reference"):
            record = encode(_make_setup(job, looks, best))
        job.state.add_setup(inputs, record)
    setup: Setup = replace(decode(record), looks=job.looks, output=job.output)
    reference = setup.reference
    reference.look.seen = best.large()
    job.journal.write("reference", file=str(best.path), kernel_size=reference.kernel_size, stars=len(reference.stars),
                      spatial_degree=reference.config.spatial_degree,
                      background_degree=reference.config.background_degree, batch_size=setup.batch_size)
    return setup


def _make_setup(job: _Job, looks: Sequence[Look], best: Look) -> Setup:
    config, store = _bare(job.config), job.looks.store()
    with warnings_logged(best.path):
        reference = make_reference(best, store.whole(best), looks, provisional(config))
    varying, seen = find_varying(reference, looks, config, store, job.backend)
    reference = also_varying(reference, varying)
    if config.reference == "stack":
        reference = stack_reference(reference, looks, config, store, job.backend)
    reference = settle_model(reference, config, _trial(job, trial_looks(looks, reference, config), reference))
    widths = [look.fwhm for look in looks if not look.reason]
    keep = kept(config)
    with ThreadPoolExecutor(1) as beside:  # a core for each
        measures = beside.submit(prepare_measures, reference, widths, config.aperture_radius,
                                 reference.config.background_degree, seen)
        at_once = images_at_once(reference.plan, config, job.backend, keep)
    if config.batch_size == "auto":
        at_once = job.executor.frames_of_batch(at_once, len(widths))
    lean = replace(reference, look=replace(reference.look, seen=Seen(), seconds=0.0, registration=None),
                   cutout=replace(reference.cutout, catalog=None), scale_bias=float(to_host(reference.plan.scale_bias)))
    return Setup(job.looks, lean, measures.result(), at_once, bytes_of_batch(reference.plan, at_once, keep), job.output)


def _trial(job: _Job, looks: Sequence[Look], reference: RunReference) -> PreparedBatch | None:
    """Place some frames for the choice of the model; those that cannot be prepared are reported later."""
    ready, store = [], job.looks.store()
    for look in looks:
        try:
            with frame_errors(look.path), warnings_logged(look.path):
                ready.append(prepare(partial(store.part, look), look.registration, reference.region, reference.config))
        except FrameError:
            continue
    for some in (ready, ready[:1]):
        try:
            with frame_errors(reference.look.path):
                return place_batch(some, reference.region.shape, job.backend) if some else None
        except FrameError as error:
            log.warning("%d frames for the choice of the model: %s", len(some), error.reason)
    return None


def _subtract(job: _Job, usable: Sequence[Look], setup: Setup) -> list[str]:
    """Work on all batches that are not done yet; return the keys of all."""
    batches = list(in_batches(usable, setup.batch_size))
    keys = [batch_key(setup, batch) for batch in batches]
    todo = [k for k, key in enumerate(keys) if not _is_done(job, key, batches[k])]
    n_todo = sum(len(batches[k]) for k in todo)
    if job.config.products:
        check_space(job.output, n_todo * _BYTES_OF_PRODUCT * math.prod(setup.reference.region.shape))
    with job.watch.step("subtract", len(usable), len(usable) - n_todo) as tick:
        for number, record in _done_batches(job, [batches[k] for k in todo], setup):
            batch = batches[todo[number]]
            job.state.add_batch(keys[todo[number]], record)
            done: BatchDone = decode(record)
            add_times(job.times, done.times)
            for look, outcome in zip(batch, done.in_order_of(batch), strict=True):
                job.looks.store().drop(look)
                outcome.give(look)
                job.journal.write("epoch", file=str(look.path), status=look.status, reason=look.reason,
                                  seconds=round(look.seconds, 3))
                tick(look)
            job.stop.check()
    remove_unfinished(job.output / "difference")  # of processes that died
    return keys


def _is_done(job: _Job, key: str, batch: Sequence[Look]) -> bool:
    """Whether a batch is done, its difference images included where they are wanted."""
    done = job.state.batch(key)
    if done is None:
        return False
    failed = {outcome.name for outcome in done.outcomes if outcome.reason}
    return not job.config.products or all((job.output / "difference" / f"{look.name}.fits").exists()
                                          for look in batch if look.name not in failed)


def _done_batches(job: _Job, batches: Sequence[Sequence[Look]], setup: Setup) -> Iterator[tuple[int, bytes]]:
    """Batches as they are done: here, one after the other, or by the executor."""
    if not job.executor.does_batches(setup.batch_bytes):
        yield from enumerate(do_batches(batches, setup))
        return
    items = [[encode(replace(look, seen=Seen())) for look in batch] for batch in batches]
    for number, result in job.executor.map(do_batch, items, encode(setup)):
        yield number, _done_singly(job, batches[number], setup) if isinstance(result, WorkerDied) else result


def _done_singly(job: _Job, batch: Sequence[Look], setup: Setup) -> bytes:
    """Work on the frames of a batch one by one: the one that its workers died of fails alone."""
    log.warning("workers died of a batch of %d frames: going on one by one", len(batch))
    items = [[encode(replace(look, seen=Seen()))] for look in batch]
    parts = [BatchDone.of_dead(batch[number], result) if isinstance(result, WorkerDied) else decode(result)
             for number, result in job.executor.map(do_batch, items, encode(setup))]
    times: dict[str, float] = {}
    for part in parts:
        add_times(times, part.times)
    return encode(BatchDone([outcome for part in parts for outcome in part.outcomes], parts[0].backend, times))


def _collect(job: _Job, looks: Sequence[Look], keys: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Fluxes and detections of all epochs and the backend that made them, from the records.

    What they say of a look is put into it.
    """
    by_name = {look.name: look for look in looks}
    results, detections, backend = {}, {}, ""
    for key in keys:
        done = job.state.batch(key)
        backend = done.backend
        for outcome in done.outcomes:
            outcome.give(by_name[outcome.name])
            if outcome.fluxes is not None:
                results[outcome.name] = outcome.fluxes
            if outcome.detections is not None:
                detections[outcome.name] = outcome.detections
    return results, detections, backend
