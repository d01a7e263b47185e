"""The job: from frames to light curves. Reads like the method."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gpudia.backend import Backend, to_host, use_backend
from gpudia.config import RunConfig
from gpudia.errors import DataWarning, FrameError
from gpudia.flags import FRAME_FLAGS, PIXEL_FLAGS
from gpudia.images import FrameLayout, sharp_residuals
from gpudia.images.headers import name_of
from gpudia.model import DifferenceStack
from gpudia.model.planes import grow
from gpudia.pipeline.calibrate import photometric_catalog
from gpudia.pipeline.candidates import Detections, detect_epoch, write_candidates
from gpudia.pipeline.journal import Journal, log_to, prepare_output
from gpudia.pipeline.listing import expand_frames
from gpudia.pipeline.looks import FrameStore, Look, choose_reference, frame_errors, register_all, take_look
from gpudia.pipeline.measure import EpochFluxes, Measures, measure_epoch, prepare_measures
from gpudia.pipeline.outputs import RunResult, write_difference, write_results
from gpudia.pipeline.prepare import Prepared, PreparedBatch, in_batches, place_batch, prepare
from gpudia.pipeline.reference import RunReference, make_reference, provisional, settle_model, trial_looks
from gpudia.pipeline.sifting import drop_odd, note_barycentric, select_frames
from gpudia.pipeline.stacking import stack_reference

__all__ = ["run"]

log = logging.getLogger("gpudia.pipeline")

#: What the job keeps of every image until it is downloaded.
_KEEP = ("covariance", "image_variance")
#: Predicted error of a registration over the region from which on it is called poor, pixels.
_POOR = 0.1


@dataclass
class _Job:
    """What the steps of one run share."""

    config: RunConfig
    output: Path
    backend: Backend
    store: FrameStore
    journal: Journal
    progress: bool
    results: dict[str, EpochFluxes] = field(default_factory=dict)
    detections: dict[str, Detections] = field(default_factory=dict)

    def bar(self, items: Sequence[Any], what: str) -> tqdm:
        """Progress on stderr; quiet when that is no terminal."""
        return tqdm(total=len(items), desc=what, unit="frame", disable=None if self.progress else True, leave=False)


def run(config: RunConfig, progress: bool = False) -> RunResult:
    """Make difference images and light curves from a series of frames.

    Parameters
    ----------
    config : RunConfig
        All settings.
    progress : bool
        Show progress bars on stderr where that is a terminal.

    Returns
    -------
    RunResult
        Numbers of frames by status, tables and light curves, and where the report is.

    Raises
    ------
    ConfigError
        If the output folder cannot be used, no frame is found or selected, filters or instruments are mixed, or
        settings do not fit the frames.
    FrameError
        If nothing can be done: no frame is usable, or the reference is not.

    Notes
    -----
    A frame that cannot be used is a row with a reason in ``epochs.ecsv``; the others go on.
    """
    paths = expand_frames(config.frames)
    output = prepare_output(config, paths)
    with log_to(output / "gpudia.log"), use_backend(config.backend) as backend:
        journal = Journal(output / "journal.jsonl")
        try:
            (output / "run.toml").write_text(config.to_toml(), encoding="utf-8")
            store = FrameStore(FrameLayout(**config.layout()), config.lacosmic)
            return _steps(_Job(config, output, backend, store, journal, progress), paths)
        finally:
            journal.close()


def _steps(job: _Job, paths: Sequence[Path]) -> RunResult:
    config, journal = job.config, job.journal
    photometric_catalog(config)  # a file that cannot serve is said before hours of work
    journal.write("start", frames=len(paths), backend=job.backend.name, device=job.backend.device)
    looks = _look_at(job, paths)
    note_barycentric(looks, config)
    select_frames(looks, config.select)
    best = _reference_of_a_kind(job, looks)
    log.info("reference %s", best.path)
    job.config = provisional(config)
    with job.bar(looks, "register") as bar:
        register_all(looks, best, job.config, bar.update)
    reference = make_reference(best, job.store.read(best.path), looks, job.config, job.backend)
    if config.reference == "stack":
        reference = stack_reference(reference, looks, config, job.store, job.backend)
    trial = _trial(job, trial_looks(looks, reference, config), reference)
    job.config, reference = settle_model(reference, config, trial)
    usable = [look for look in looks if not look.reason]
    widths = [look.fwhm for look in usable]
    measures = prepare_measures(reference, widths, config.aperture_radius, job.config.background_degree)
    journal.write("reference", file=str(best.path), kernel_size=reference.kernel_size, stars=len(reference.stars),
                  spatial_degree=job.config.spatial_degree, background_degree=job.config.background_degree)
    with job.bar(usable, "subtract") as bar:
        for batch in in_batches(usable, reference.plan, job.config, job.backend, _KEEP):
            _do_batch(job, batch, reference, measures)
            bar.update(len(batch))
    candidates = None if config.detect is None else write_candidates(job.output, looks, reference, job.detections)
    result = replace(write_results(job.output, job.config, job.backend, looks, reference, measures,
                                   job.results), candidates=candidates)
    journal.write("end", ok=result.n_ok, failed=result.n_failed, skipped=result.n_skipped)
    return result


def _trial(job: _Job, looks: Sequence[Look], reference: RunReference) -> PreparedBatch | None:
    """Place some frames for the choice of the model; those that cannot be prepared are reported later."""
    ready: list[Prepared] = []
    for look in looks:
        try:
            with frame_errors(look.path):
                ready.append(_prepare(job, look, reference, keep=True))
        except FrameError:
            continue
    for some in (ready, ready[:1]):
        try:
            with frame_errors(reference.look.path):
                return place_batch(some, reference.region.shape, job.backend) if some else None
        except FrameError as error:
            log.warning("%d frames for the choice of the model: %s", len(some), error.reason)
    return None


def _look_at(job: _Job, paths: Sequence[Path]) -> list[Look]:
    looks = []
    with job.bar(paths, "read") as bar:
        for path, name in zip(paths, _distinct_names(paths), strict=True):
            with _warnings_logged(path):
                looks.append(take_look(path, name, job.store, job.config))
            job.journal.write("read", file=str(path), reason=looks[-1].reason)
            bar.update()
    return looks


def _reference_of_a_kind(job: _Job, looks: Sequence[Look]) -> Look:
    """Choose the reference; frames of another filter or instrument fall out, and never become it by themselves."""
    named = job.config.reference not in ("auto", "stack")
    if not named:
        drop_odd(looks, job.config)
    best = choose_reference(looks, job.config, job.store)
    if named:
        drop_odd(looks, job.config, best)
    if best.skipped:
        best.flags |= FRAME_FLAGS.is_reference
    for look in looks:
        if look.reason and look is not best:
            job.store.drop(look.path)
            job.journal.write("left out", file=str(look.path), status=look.status, reason=look.reason)
    return best


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """Names for products: file stems, numbered where two files of different folders share one."""
    names: list[str] = []
    used = {name_of(path) for path in paths}  # a file may really be called a-2
    for path in paths:
        name, count = name_of(path), 1
        while name in names or (count > 1 and name in used):
            count += 1
            name = f"{name_of(path)}-{count}"
        names.append(name)
    return names


class _warnings_logged:  # noqa: N801 - a small context manager
    """Doubts about a frame go to the log with its name, once, and not to the caller's terminal as warnings."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._catch = warnings.catch_warnings(record=True)

    def __enter__(self) -> None:
        self._caught = self._catch.__enter__()
        warnings.simplefilter("always", DataWarning)

    def __exit__(self, *exception: Any) -> None:
        self._catch.__exit__(*exception)
        for text in dict.fromkeys(str(w.message) for w in self._caught or []):
            log.info("%s", text if self._path.name in text else f"{self._path.name}: {text}")


def _do_batch(job: _Job, batch: Sequence[Look], reference: RunReference, measures: Measures) -> None:
    """Prepare some frames and work on them."""
    start = time.perf_counter()
    ready: list[tuple[Look, Prepared]] = []
    for look in batch:
        try:
            with frame_errors(look.path):
                ready.append((look, _prepare(job, look, reference)))
        except FrameError as error:
            _failed(job, look, error)
    if ready:
        _solve_and_finish(job, ready, reference, measures, (time.perf_counter() - start) / len(ready))


def _solve_and_finish(job: _Job, ready: Sequence[tuple[Look, Prepared]], reference: RunReference, measures: Measures,
                      spent: float) -> None:
    """Upload, solve, download, measure and write; a batch that does not get through is tried in halves."""
    start = time.perf_counter()
    try:
        with frame_errors(ready[0][0].path):
            placed, stack, ratio = _solve(job, ready, reference)
    except FrameError as error:
        if len(ready) == 1:
            _failed(job, ready[0][0], error)
            return
        log.warning("a batch of %d frames failed (%s); going on with its halves", len(ready), error.reason)
        half = len(ready) // 2
        for part in (ready[:half], ready[half:]):
            _solve_and_finish(job, part, reference, measures, spent)
        return
    shared = spent + (time.perf_counter() - start) / len(ready)
    for i, (look, prepared) in enumerate(ready):
        start = time.perf_counter()
        try:
            with frame_errors(look.path):
                _finish(job, look, prepared, stack, i, placed, None if ratio is None else ratio[i], reference, measures)
        except FrameError as error:
            look.fail(error)
        look.seconds += shared + time.perf_counter() - start
        job.journal.write("epoch", file=str(look.path), status="failed" if look.reason else "ok", reason=look.reason,
                          seconds=round(look.seconds, 3))


def _solve(job: _Job, ready: Sequence[tuple[Look, Prepared]],
           reference: RunReference) -> tuple[PreparedBatch, DifferenceStack, Any]:
    placed = place_batch([p for _, p in ready], reference.region.shape, job.backend)
    stack = reference.plan.subtract(placed.data, placed.error, placed.mask, keep=_KEEP).to_host()
    ratio = None if placed.noise_ratio is None else to_host(placed.noise_ratio)
    return placed, stack, ratio


def _prepare(job: _Job, look: Look, reference: RunReference, keep: bool = False) -> Prepared:
    with _warnings_logged(look.path):
        frame = job.store.read(look.path)
        if look is not reference.look and not keep:
            job.store.drop(look.path)
        return prepare(frame, look.registration, reference.region, job.config)


def _failed(job: _Job, look: Look, error: FrameError) -> None:
    look.fail(error)
    job.journal.write("epoch", file=str(look.path), status="failed", reason=look.reason)


def _finish(job: _Job, look: Look, prepared: Prepared, stack: DifferenceStack, i: int, placed: PreparedBatch,
            ratio: Any, reference: RunReference, measures: Measures) -> None:
    """Measure one epoch of a solved batch and write its files.

    Raises
    ------
    FrameError
        If the solve gave no result, or one without light of the reference.
    """
    status = int(stack.status[i])
    stack.require_solution(i)
    look.flags |= status | prepared.flags
    if look.name in reference.weights:
        look.flags |= FRAME_FLAGS.in_reference
    if look is reference.look:  # its kernel is a single pixel: nothing is deconvolved
        look.flags = (look.flags | FRAME_FLAGS.is_reference) & ~FRAME_FLAGS.deconvolving
    bits = placed.bits[i] | stack.flags[i]
    if job.config.find_defects and look is not reference.look:
        bits = bits | _cosmic_rays(stack, i, bits, look.fwhm)
    share = reference.weights.get(look.name, 0.0) / float(stack.scale[i])
    job.results[look.name] = measure_epoch(measures, stack, i, bits, ratio, share)
    _note_numbers(look, stack, i, bits, reference)
    more = {}
    if job.config.detect is not None:
        job.detections[look.name], more = detect_epoch(
            look, stack, i, bits, measures, ratio, reference, job.config.detect)
    if job.config.products:
        write_difference(job.output, look, stack, i, bits, reference, job.backend, job.config, more)


def _cosmic_rays(stack: DifferenceStack, i: int, bits: Any, fwhm: float) -> Any:
    """Bits of cosmic rays that only the difference shows; the fit has clipped them, the photometry is not to sum them.

    What the fit clipped right beside one is the fainter part of its track.
    """
    ignore = (bits & (255 - PIXEL_FLAGS.clipped)) != 0
    with np.errstate(invalid="ignore"):
        found = sharp_residuals(stack.difference[i], np.sqrt(stack.variance[i]), ignore, fwhm)
    found |= grow(found) & ((bits & PIXEL_FLAGS.clipped) != 0)
    return np.where(found, PIXEL_FLAGS.cosmic_ray, 0).astype(np.uint8)


def _note_numbers(look: Look, stack: DifferenceStack, i: int, bits: Any, reference: RunReference) -> None:
    chi2 = float(stack.chi2[i])
    # far from 1 the noise is not what the header says, or the model not what the sky does
    least = 0.0 if look.name in reference.weights else 0.5  # a frame of a stack shares its noise with it
    if look is not reference.look and not least < chi2 < 2.0:
        look.flags |= FRAME_FLAGS.bad_chi2
    registration = look.registration
    if registration.uncertainty(reference.region) > _POOR:
        look.flags |= FRAME_FLAGS.poor_registration
    dx, dy = registration.apply(reference.region.centre) - np.array(reference.region.centre)
    look.numbers = {
        "shift_x": float(dx), "shift_y": float(dy), "registration_rms": registration.rms,
        "registration_max": registration.max_residual, "registration_kind": registration.kind,
        "registration_error": registration.uncertainty(reference.region),
        "n_matched": registration.n_matched, "route": registration.route, "scale": float(stack.scale[i]),
        "scale_err": float(stack.scale_error[i]), "chi2": chi2, "noise_gain": float(stack.noise_gain[i]),
        "n_masked": int(((bits & (255 - PIXEL_FLAGS.clipped)) != 0).sum()), "n_clipped": int(stack.n_clipped[i]),
        "n_pixels": int(stack.n_pixels[i]), "iterations": int(stack.iterations[i]),
        "epsilon": math.nan, "epsilon_err": math.nan,
    }
