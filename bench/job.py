"""The whole job on long series: time against the bare solve, memory, kills, Dask.

    python bench/job.py                 # everything, about 25 minutes
    python bench/job.py stream          # one group: stream, kills or dask
    python bench/job.py --small         # short series of small frames, a minute

stream  2000 frames of 300 px (`write_frames`), the whole job with and without difference images, by the callback's
        clock (stages: seconds of all processes together); then `ReferencePlan.subtract` alone on the same frames,
        already cut and in memory, in the same batches. Resident memory (of this process and its readers), the most in
        the 200 frames up to frames 200, 1800 and 2000 of every step: it goes up and down with every batch; and open
        files then.
kills   200 frames; a run is killed (SIGKILL) at random moments and gone on with until 30 kills are done, watched by a
        process that opens whatever stands under its final name; its tables against those of an undisturbed run.
dask    Frames of 300 px in this process, with 1 and with 2 workers, and with 2 of which one is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import warnings
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.table import Table
from common import run_groups
from threadpoolctl import threadpool_limits

import gpudia
from gpudia.pipeline.codec import decode
from gpudia.pipeline.epochs import kept
from gpudia.pipeline.journal import STATE
from gpudia.pipeline.listing import distinct_names, expand_frames
from gpudia.pipeline.looks import Look
from gpudia.pipeline.prepare import in_batches, place_batch, prepare
from gpudia.pipeline.records import RecordFile
from gpudia.pipeline.state import RunState
from gpudia.pipeline.tasks import Setup
from gpudia.simulate import SimulationSettings, simulate_field, write_series

#: Skies that are simulated; more frames than these are the same skies with noise of their own.
SKIES = 50


# ------------------------------------------------------------------------------------------------- frames


def write_frames(folder: Path, count: int, side: int, seed: int = 3) -> Any:
    """Write a series of `count` frames, all different, of at most 50 skies; return the truth.

    Each sky (seeing, transparency, pointing, cosmic rays of its own) is exposed several times, each with its noise and
    a day of its own.
    """
    skies = simulate_field(SimulationSettings(shape=(side, side), n_epochs=min(count, SKIES), seed=seed))
    paths = write_series(skies, folder)
    rng = np.random.default_rng(seed)
    for number in range(SKIES, count):
        k = number % SKIES
        _expose_again(skies.frames[k], paths[k], paths[k].with_name(f"sim-{number:04d}.fits"), number - k, rng)
    return skies.truth


def _expose_again(sky: Any, first: Path, path: Path, later: int, rng: np.random.Generator) -> None:
    """Write a sky once more: new noise wherever no defect, cosmic ray or saturation is."""
    noisy = (rng.poisson(sky.model * sky.gain) + rng.normal(0, sky.read_noise, sky.model.shape)) / sky.gain
    with fits.open(first, memmap=False) as hdus:
        hdus["SCI"].data = np.where((sky.mask == 0) & (sky.cosmic_rays == 0), noisy, sky.data).astype(np.float32)
        variance = np.abs(hdus["SCI"].data) / sky.gain + (sky.read_noise / sky.gain) ** 2
        hdus["ERR"].data = np.sqrt(variance).astype(np.float32)
        hdus["SCI"].header["MJD-OBS"] += later
        del hdus["SCI"].header["DATE-OBS"]
        hdus.writeto(path, overwrite=True)


def _config(folder: Path, output: Path, truth: Any, side: int, **settings: Any) -> gpudia.RunConfig:
    return gpudia.RunConfig(str(folder), str(output), ra=float(truth["ra"][0]), dec=float(truth["dec"][0]), size=side,
                            **settings)


# ------------------------------------------------------------------------------------------------- stream


def stream(small: bool) -> dict[str, Any]:
    """Time of the whole job and of the solve alone; memory and open files over the run."""
    count, side = (120, 120) if small else (2000, 300)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        truth = write_frames(folder / "frames", count, side)
        figures: dict[str, Any] = {"frames": count, "side": side}
        for name, products in (("light curves alone", False), ("with difference images", True)):
            config = _config(folder / "frames", folder / name.replace(" ", "_"), truth, side, products=products)
            figures[name] = job = _whole_job(config, count)
            job["bare solve"] = _bare_solve(config)  # right after it: the machine has faster and slower minutes
            solve = job["bare solve"]["seconds"]
            job["all else over the solve"] = round((job["seconds"] - solve) / solve, 3)
    return figures


def _whole_job(config: gpudia.RunConfig, count: int) -> dict[str, Any]:
    """Time of a run, and what it held when a tenth, nine tenths and all of the frames of each step were done.

    At the last frame nothing waits to be solved any more: memory is compared at a tenth and at nine tenths.
    """
    marks: dict[str, dict[str, float]] = {}
    most = 0.0

    def note(event: Any) -> None:
        nonlocal most
        if event.done % 4 == 0:  # frames come in batches
            most = max(most, _resident())
        if event.done in (event.total // 10, event.total * 9 // 10, event.total):
            marks[f"{event.step} {event.done} of {event.total}"] = {
                "seconds": round(time.perf_counter() - start, 2), "resident_mb": round(most / 1e6, 1), **_held()}
        if event.done % max(1, event.total // 10) == 0:
            most = 0.0

    start = time.perf_counter()
    result = gpudia.run(config, callback=note)
    seconds = time.perf_counter() - start
    first, late, _ = (mark for name, mark in marks.items() if name.startswith("subtract"))
    return {"seconds": round(seconds, 2), "frames_per_s": round(count / seconds, 2), "ok": result.n_ok,
            "failed": result.n_failed, "stages": result.times, "marks": marks,
            "memory_late_over_early": round(late["resident_mb"] / first["resident_mb"], 4),
            "files_late_less_early": late["open_files"] - first["open_files"]}


def _held() -> dict[str, float]:
    """Processes, open files of this one, and seconds of all cores that they have had."""
    pids = [os.getpid(), *_children(os.getpid())]
    return {"processes": len(pids), "open_files": len(os.listdir("/proc/self/fd")),
            "cpu_s": round(sum(_cpu(pid) for pid in pids), 2)}


def _resident() -> float:
    """Resident memory of this process and those that it started, bytes; what is shared is counted once."""
    own, shared = [], []
    for pid in [os.getpid(), *_children(os.getpid())]:
        with contextlib.suppress(OSError):  # one that just ended
            _, resident, common, *_ = (int(word) for word in Path(f"/proc/{pid}/statm").read_text().split())
            own.append(resident - common)
            shared.append(common)
    return (sum(own) + max(shared)) * os.sysconf("SC_PAGE_SIZE")


def _children(pid: int) -> list[int]:
    return [int(p) for task in Path(f"/proc/{pid}/task").iterdir() for p in (task / "children").read_text().split()]


def _cpu(pid: int) -> float:
    """Seconds of all cores that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def _bare_solve(config: gpudia.RunConfig) -> dict[str, Any]:
    """Subtract the reference of a finished run from its frames, cut and in memory, in the same batches."""
    setup, looks = _setup_of(config)
    store, reference = setup.looks.store(), setup.reference
    seconds = 0.0
    with gpudia.use_backend(config.backend) as backend, threadpool_limits(1, "blas"):  # as the job does
        plan = reference.plan
        for batch in in_batches(looks, setup.batch_size):
            ready = [prepare(partial(store.part, look), look.registration, reference.region, reference.config)
                     for look in batch]
            placed = place_batch(ready, reference.region.shape, backend)
            start = time.perf_counter()
            plan.subtract(placed.data, placed.error, placed.mask, keep=kept(config))
            seconds += time.perf_counter() - start
    return {"seconds": round(seconds, 2), "frames": len(looks), "frames_per_s": round(len(looks) / seconds, 2),
            "batch_size": setup.batch_size, "kernel_size": reference.kernel_size,
            "spatial_degree": reference.config.spatial_degree, "stars": len(reference.stars)}


def _setup_of(config: gpudia.RunConfig) -> tuple[Setup, list[Look]]:
    """What a finished run knows of its reference, and the looks at the frames, registered."""
    with closing(RecordFile(Path(config.output) / STATE)) as records:
        setup: Setup = decode(records[next(records.keys("setup/"))])
    with closing(RunState(Path(config.output) / STATE)) as state:
        paths = expand_frames(config.frames)
        looks = [state.look(name, path) for name, path in zip(distinct_names(paths), paths, strict=True)]
        return setup, [look for look in looks if state.registered(look, setup.reference.look) and not look.reason]


# ------------------------------------------------------------------------------------------------- kills


def kills(small: bool) -> dict[str, Any]:
    """Kill a run at random moments and go on with it, until so many kills are done; hold it against an undisturbed one.

    A run that comes to its end before its last kill begins anew.
    """
    count, number = (24, 1) if small else (200, 30)
    rng = np.random.default_rng(7)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        truth = write_frames(folder / "frames", count, 120)
        settings = {"kernel_size": 9, "batch_size": 8, "readers": 2}
        config = _config(folder / "frames", folder / "undisturbed", truth, 90, **settings)
        start = time.perf_counter()
        usual = _command(config).wait()
        seconds = time.perf_counter() - start
        done, ends, looked_at, faults, moments = 0, 0, 0, [], {}
        begun = time.perf_counter()
        while True:
            again = _config(folder / "frames", folder / f"killed{ends}", truth, 90, **settings)
            resume = (folder / f"killed{ends}").exists()
            process = _command(again.replace(resume=resume))
            watch = Watcher(Path(again.output), folder / "undisturbed")
            watch.start()
            limit = float(rng.uniform(0.05, 0.95)) * seconds if done < number else None
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                done, code = done + 1, None
                step = _last_step(Path(again.output))
                moments[step] = moments.get(step, 0) + 1
            watch.end()
            looked_at, faults = looked_at + watch.looked_at, faults + watch.faults
            if code is not None:
                faults += [] if code == usual else [f"exit code {code}"]
                faults += _differences(folder / "undisturbed", Path(again.output))
                ends += 1
                if done >= number:
                    break
    return {"frames": count, "kills": done, "runs_that_came_to_their_end": ends, "kills_by_last_step": moments,
            "undisturbed_s": round(seconds, 1), "with_kills_s": round(time.perf_counter() - begun, 1),
            "files_opened_meanwhile": looked_at, "faults": faults}


def _command(config: gpudia.RunConfig) -> subprocess.Popen[bytes]:
    """Begin a run as a process of its own."""
    path = Path(config.output).with_suffix(".toml")
    path.write_text(config.to_toml())
    return subprocess.Popen([sys.executable, "-m", "gpudia", "run", "--config", str(path), "--quiet"],
                            stdout=subprocess.DEVNULL)


def _last_step(output: Path) -> str:
    """What a run did last, by its journal."""
    journal = output / "journal.jsonl"
    lines = journal.read_text().splitlines() if journal.exists() else []
    return json.loads(lines[-1])["event"] if lines else "nothing"


class Watcher(threading.Thread):
    """Opens and verifies whatever stands under its final name, over and over, while a run writes."""

    def __init__(self, output: Path, complete: Path) -> None:
        super().__init__()
        self._output, self._over = output, threading.Event()
        self._names = [str(p.relative_to(complete)) for p in complete.rglob("*.*")
                       if p.suffix in (".fits", ".ecsv", ".html", ".png", ".toml") and not p.name.startswith(".")]
        self._seen: dict[str, tuple[int, int]] = {}
        self.looked_at, self.faults = 0, list[str]()

    def run(self) -> None:
        while not self._over.wait(0.05):
            self._look()
        self._look()

    def end(self) -> None:
        self._over.set()
        self.join()

    def _look(self) -> None:
        for name in self._names:
            path = self._output / name
            with contextlib.suppress(FileNotFoundError):
                stamp = path.stat().st_ino, path.stat().st_mtime_ns
                if self._seen.get(name) != stamp:
                    self.looked_at += 1
                    self.faults += [f"{name}: {fault}" for fault in _verified(path)]
                    self._seen[name] = stamp


def _verified(path: Path) -> list[str]:
    """What is wrong with a file; a FITS file has its checksums."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if path.suffix == ".fits":
                with fits.open(path, checksum=True, memmap=False) as hdus:
                    for hdu in hdus:
                        _ = hdu.data
            elif path.suffix == ".ecsv":
                Table.read(path)
            elif path.suffix == ".toml":
                tomllib.loads(path.read_text())
            elif not path.read_bytes().rstrip().endswith((b"IEND\xaeB`\x82", b"</html>")):
                return ["cut off"]
    except FileNotFoundError:
        raise
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    return []


def _differences(one: Path, other: Path) -> list[str]:
    """Names of the results in which two runs differ, but for how long something took."""
    found = []
    for path in sorted(p for p in one.rglob("*") if p.suffix in (".fits", ".ecsv")):
        name = path.relative_to(one)
        if not (other / name).exists():
            found.append(f"{name} is missing")
        elif path.suffix == ".fits":
            same = fits.FITSDiff(path, other / name, ignore_keywords=["CHECKSUM", "DATASUM"], ignore_fields=["seconds"])
            found += [] if same.identical else [f"{name} differs"]
        else:
            found += [] if _rows(path) == _rows(other / name) else [f"{name} differs"]
    return found


def _rows(path: Path) -> list[list[str]]:
    """Rows of a table, without how long they took."""
    table = Table.read(path)
    return [[str(row[name]) for name in table.colnames if name != "seconds"] for row in table]


# ------------------------------------------------------------------------------------------------- dask


def dask(small: bool) -> dict[str, Any]:
    """The same run here, by one and by two workers, and by two of which one is killed: times, and equal tables."""
    count, side = (24, 120) if small else (200, 300)
    figures: dict[str, Any] = {"frames": count, "side": side}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        truth = write_frames(folder / "frames", count, side)
        base = _config(folder / "frames", folder / "-", truth, side, batch_size=8)
        cases: dict[str, dict[str, Any]] = {"in this process": {"readers": 0}, "with readers": {"readers": 2},
                                            "1 worker": {"workers": 1}, "2 workers": {"workers": 2},
                                            "2 workers, one killed": {"workers": 2}}
        for name, settings in cases.items():
            config = base.replace(output=str(folder / name.replace(" ", "_")), **settings)
            figures[name] = _by_workers(config, count // 3 if "killed" in name else None)
            differs = _differences(folder / "in_this_process", Path(config.output))
            figures[name]["differs"] = differs
    for name in cases:
        figures[name]["speed_up"] = round(figures["1 worker"]["seconds"] / figures[name]["seconds"], 2)
    return figures


def _by_workers(config: gpudia.RunConfig, kill_at: int | None) -> dict[str, Any]:
    killed = []

    def kill(event: Any) -> None:
        if event.step == "subtract" and kill_at is not None and event.done >= kill_at and not killed:
            killed.append(next(pid for pid in _workers()))
            os.kill(killed[0], signal.SIGKILL)

    start = time.perf_counter()
    result = gpudia.run(config, callback=kill)
    return {"seconds": round(time.perf_counter() - start, 2), "ok": result.n_ok, "failed": result.n_failed,
            "killed": len(killed), "stages": result.epochs.meta["stages"]}


def _workers() -> list[int]:
    """Processes that this one started and that have gpudia loaded: the workers, not Dask's helpers."""
    return [pid for pid in _descendants(os.getpid()) if "gpudia" in Path(f"/proc/{pid}/maps").read_text()
            or "scipy" in Path(f"/proc/{pid}/maps").read_text()]


def _descendants(pid: int) -> list[int]:
    children = _children(pid)
    return [*children, *(p for child in children for p in _descendants(child))]


def main() -> int:
    return run_groups(__doc__, "job", {"stream": stream, "kills": kills, "dask": dask}, {})


if __name__ == "__main__":
    sys.exit(main())
