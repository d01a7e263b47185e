"""What the benches share: the environment header, clocks, the peak memory of a step, JSON under bench/results."""

from __future__ import annotations

import argparse
import json
import platform
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from threadpoolctl import threadpool_info

import gpudia
from gpudia.backend import backend_info

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Versions, processor and libraries: figures without them mean nothing."""
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())
    blas = [f"{i['internal_api']} {i.get('architecture', '')} x{i['num_threads']}" for i in threadpool_info()]
    return {"gpudia": gpudia.__version__, "numpy": np.__version__, "scipy": scipy.__version__, "cpu": cpu,
            "blas": sorted(set(blas)), **backend_info()}


def best_of(function: Callable[[], Any], repeats: int = 3) -> tuple[float, Any]:
    """Shortest wall time of a few runs, seconds, and the last result."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return min(times), result


def extra_memory(function: Callable[[], Any]) -> int:
    """Highest resident memory during a call over that before it, bytes (Linux: the kernel's own high-water mark)."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the mark to what is resident now
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def traced_memory(function: Callable[[], Any]) -> int:
    """Highest memory of NumPy's arrays during a call over that before it, bytes; slows Python's own code down."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        function()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def run_groups(about: str | None, prefix: str, known: dict[str, Callable[[bool], dict[str, Any]]],
               pictures: dict[str, Callable[[dict[str, Any]], None]]) -> int:
    """Command line of a bench: run the groups asked for, print their figures, keep them and draw their pictures.

    `known` has the groups by name, each a function of "small frames?"; with ``--small`` nothing is kept.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", help=f"{', '.join(known)} (default: all)")
    parser.add_argument("--small", action="store_true", help="small frames; prints, keeps nothing")
    args = parser.parse_args()
    for name in args.groups or known:
        if name not in known:
            parser.error(f"groups must be of {', '.join(known)}, got {name}")
        figures = known[name](args.small)
        if args.small:
            print(name, figures)
            continue
        save(f"{prefix}_{name}", figures)
        if name in pictures:
            pictures[name](figures)
    return 0


def save(name: str, figures: dict[str, Any]) -> None:
    """Write figures with the environment to bench/results/NAME.json and print them."""
    RESULTS.mkdir(exist_ok=True)
    record = {"environment": environment(), **figures}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
