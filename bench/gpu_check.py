"""One command for a machine with a GPU, at most eight minutes: is it right there, and how fast?

    python bench/gpu_check.py                        # on CuPy; writes bench/results/gpu_check_DEVICE.json
    python bench/gpu_check.py --backend numpy --small    # the same steps on a CPU, to see that they work; keeps nothing

Steps: the test suite with GPUDIA_BACKEND set; the same subtraction on NumPy and on the device; times of the cases with
the first call (kernels compiled, FFT plans made), transfers and the warm call apart; bytes and operations of the
iterations against the measured bandwidth of a copy; `sfft` on the same data where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peers
from common import RESULTS, environment
from fields import Field, crowded_field

from gpudia import ReferencePlan
from gpudia.backend import scalar, to_device, to_host, use_backend
from gpudia.backend.numpy_backend import make_numpy_backend

#: Seconds for everything, and of these for the test suite.
LIMIT, TESTS_LIMIT = 480.0, 270.0
#: name, side, kernel, degree, images
CASES = [("cutouts", 250, 17, 0, 2000), ("small_cutouts", 100, 17, 0, 2000), ("degree_1", 512, 21, 1, 64),
         ("degree_2", 512, 21, 2, 64), ("whole", 2048, 21, 1, 2), ("whole_degree_2", 4096, 21, 2, 1)]
SMALL_CASES = [("cutouts", 64, 7, 0, 8), ("degree_1", 96, 9, 1, 2)]
#: Planes of the transform's size that one iteration must move: product of spectra (1 written), inverse transform (1
#: read, 1 written), weights (2 read, 1 written), transform (1 read, 1 written), correlation (2 read).
PLANES_PER_ITERATION = 10


def run_tests(backend: str) -> dict[str, Any]:
    """Run the suite on the backend; its counts, and the names of what failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "4"]
    root = Path(__file__).resolve().parents[1]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=root, env={**os.environ, "GPUDIA_BACKEND": backend}, text=True,
                              capture_output=True, timeout=TESTS_LIMIT, check=False)
        code, text = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, text = None, (error.stdout or b"").decode()
    return {"exit": code, "seconds": round(time.perf_counter() - start, 1), **counts_of(text)}


def counts_of(text: str) -> dict[str, Any]:
    """Numbers and failures from pytest's report."""
    last = text.strip().splitlines()[-1] if text.strip() else ""
    found = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)}
    return {**found, "failures": re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)}


def field_of(side: int, images: int) -> Field:
    """A field of at most 8 different images, repeated."""
    return crowded_field(side, min(images, 8)).take(images)


def placed(field: Field, backend: Any) -> tuple[Any, ...]:
    """Images, errors and masks on the device."""
    return tuple(to_device(a, backend) for a in (field.images, field.errors, field.masks))


def plan_of(field: Field, kernel: int, degree: int, backend: Any, **settings: Any) -> ReferencePlan:
    """Three passes on the device."""
    return ReferencePlan(to_device(field.reference, backend), kernel, error=to_device(field.reference_error, backend),
                         mask=to_device(field.reference_mask, backend), spatial_degree=degree, passes=3, **settings)


def compare(backend: Any, small: bool) -> dict[str, Any]:
    """Largest differences between NumPy and the device: kernels in units of their peak, pixels in sigma."""
    figures = {}
    for side, kernel, degree in ((64, 7, 0), (96, 7, 1)) if small else ((250, 17, 0), (512, 21, 1)):
        field, results = field_of(side, 2), []
        for home in (make_numpy_backend(), backend):
            stack = plan_of(field, kernel, degree, home).subtract(*placed(field, home)).to_host()
            results.append(stack)
        ours, theirs = results
        both = ~(ours.mask | theirs.mask)
        apart = np.abs(ours.difference - theirs.difference)[both] / np.sqrt(ours.variance[both])
        figures[f"{side} px, degree {degree}"] = {
            "kernel": float(np.abs(ours.kernel - theirs.kernel).max() / np.abs(ours.kernel).max()),
            "sigma": float(apart.max()), "scale": float(np.abs(theirs.scale / ours.scale - 1).max()),
            "flags_differ": int((ours.flags != theirs.flags).sum()),
            "status_differ": int((ours.status != theirs.status).sum())}
    return figures


def clock(function: Callable[[], Any], wait: Callable[[Any], Any]) -> tuple[float, Any]:
    """Wall time of a call including the end of all work on the device."""
    start = time.perf_counter()
    result = function()
    wait(result)
    return time.perf_counter() - start, result


def copy_bandwidth(backend: Any, megabytes: int) -> float:
    """Bytes read and written per second by a copy of a large array, the best of five."""
    xp = backend.xp
    source = xp.ones(megabytes << 17)
    target = xp.empty_like(source)
    best = math.inf
    for _ in range(6):  # the first one warms up

        def copy() -> Any:
            target[...] = source
            return target[:1]

        best = min(best, clock(copy, lambda a: scalar(a[0]))[0])
    return 2 * source.nbytes / best


def work_of(plan: ReferencePlan, iterations: float) -> dict[str, float]:
    """Bytes that the iterations of one image must move, and operations of their transforms."""
    tiling = plan.design.tiling
    pixels = tiling.count * math.prod(tiling.fft_shape)
    size = 4 if plan.precision == "mixed" else 8
    operations = 2 * 2.5 * pixels * math.log2(math.prod(tiling.fft_shape)) + 20 * pixels
    return {"bytes": iterations * PLANES_PER_ITERATION * size * pixels, "operations": iterations * operations}


def case(backend: Any, bandwidth: float, side: int, kernel: int, degree: int, images: int) -> dict[str, Any]:
    """One case: first and warm times of plan and subtraction, transfers, and the share of the copy's bandwidth."""
    field = field_of(side, images)
    wait = lambda thing: scalar(thing.scale_bias if isinstance(thing, ReferencePlan) else thing.scale[0])  # noqa: E731
    first_plan, plan = clock(lambda: plan_of(field, kernel, degree, backend), wait)
    warm_plan, plan = clock(lambda: plan_of(field, kernel, degree, backend), wait)
    up, arrays = clock(lambda: placed(field, backend), lambda a: scalar(a[0][0, 0, 0]))
    some = tuple(a[:max(1, images // 8)] for a in arrays)
    first, _ = clock(lambda: plan.subtract(*some), wait)
    warm = math.inf
    for _ in range(3 if images * side**2 < 1 << 24 else 2):
        seconds, stack = clock(lambda: plan.subtract(*arrays), wait)
        warm = min(warm, seconds)
    down, _ = clock(lambda: to_host(stack.difference), lambda _: None)
    work = work_of(plan, float(to_host(stack.iterations).mean()))
    return {"side": side, "kernel": kernel, "degree": degree, "images": images, "precision": plan.precision,
            "plan_first_s": first_plan, "plan_warm_s": warm_plan, "subtract_first_s": first, "subtract_warm_s": warm,
            "images_per_s": images / warm, "upload_s": up, "download_s": down,
            "iterations": float(to_host(stack.iterations).mean()), "chi2": float(np.median(to_host(stack.chi2))),
            "failed": int(scalar(stack.failed.sum())), "predicted_bytes_per_image": plan.bytes_per_image(),
            **{f"{name}_per_image": value for name, value in work.items()},
            "share_of_copy_bandwidth": work["bytes"] * images / warm / bandwidth}


def check(name: str, small: bool, tests: bool) -> dict[str, Any]:
    """All steps; a step that fails, or for which no time is left, says so and the others go on."""
    start = time.perf_counter()
    with use_backend(name) as backend:
        figures: dict[str, Any] = {"environment": environment(), "backend": backend.name}

        def step(title: str, function: Callable[[], Any]) -> None:
            spent = time.perf_counter() - start
            try:
                figures[title] = function() if spent < LIMIT - 60 else f"not run: {spent:.0f} s were over"
            except Exception as error:
                figures[title] = f"failed: {type(error).__name__}: {error}"
            print(title, json.dumps(figures[title]), flush=True)

        step("numpy_against_device", lambda: compare(backend, small))
        step("copy_bandwidth", lambda: copy_bandwidth(backend, 64 if small else 1024))
        bandwidth = figures["copy_bandwidth"] if isinstance(figures["copy_bandwidth"], float) else math.nan
        for title, *sizes in SMALL_CASES if small else CASES:
            step(title, lambda sizes=sizes: case(backend, bandwidth, *sizes))
            backend.release()
        if not small:
            step("sfft_2048_px_s", lambda: peers.sfft(crowded_field(2048, 2), 21, 1, backend=backend.name.capitalize()))
        if tests:
            step("tests", lambda: run_tests(backend.name))
    return {**figures, "seconds": round(time.perf_counter() - start, 1)}


def main() -> int:
    """Print the figures and keep them; 1 where a step failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cupy", choices=("cupy", "numpy"))
    parser.add_argument("--small", action="store_true", help="small frames; keeps nothing")
    parser.add_argument("--no-tests", dest="tests", action="store_false", help="leave the test suite out")
    args = parser.parse_args()
    figures = check(args.backend, args.small, args.tests)
    if not args.small:
        RESULTS.mkdir(exist_ok=True)
        device = re.sub(r"\W+", "_", str(figures["environment"]["device"])).strip("_").lower()
        (RESULTS / f"gpu_check_{device}.json").write_text(json.dumps(figures, indent=1) + "\n")
    tests = figures.get("tests")
    bad = [key for key, value in figures.items() if isinstance(value, str) and value.startswith("failed")]
    if isinstance(tests, dict) and tests["exit"] != 0:
        bad.append("tests")
    print("failed: " + ", ".join(bad) if bad else "all steps went through")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
