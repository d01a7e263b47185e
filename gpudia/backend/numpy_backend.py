"""The NumPy backend: SciPy's FFT and LAPACK, images spread over the cores that this process may use."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import scipy.fft
from scipy.linalg import lapack
from threadpoolctl import ThreadpoolController

from gpudia.backend.base import Backend

__all__ = ["cores", "make_numpy_backend"]

#: Threads take turns at Python's own code: with 4 images of 250 px to each step two cores took 13 ms an image, with one
#: 18 ms; at 100 px 2.6 and 9 ms. Frames of 512 px are best taken one by one, for the cache.
_LEAST_PIXELS = 1 << 18
#: Side of a matrix from which on LAPACK may use all cores. NumPy and SciPy have a BLAS each, and the threads of the one
#: still spin when the other wants the cores: a matrix of 444 took 76 ms on two cores after a product in NumPy, and 5 ms
#: on one.
_LEAST_THREADED = 1500

_inside_pool = threading.local()
#: Made once: looking for the libraries takes longer than many a sum.
_libraries = ThreadpoolController()


#: Where a container finds the share of the cores' time that it may have, and the time that is shared, in the two
#: versions of control groups.
_SHARES = (("/sys/fs/cgroup/cpu.max",), ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"))


def cores() -> int:
    """Return the number of cores that this process may use.

    Its affinity, at most what a container's limit comes to (``docker run --cpus``), and GPUDIA_CORES where that is set.
    """
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("GPUDIA_CORES", "")
    return min(found, _share(), int(limit) if limit.isdigit() and int(limit) else found)


@functools.cache
def _share() -> int:
    """Cores that a container may use, rounded up."""
    for files in _SHARES:
        with contextlib.suppress(OSError, ValueError):  # no such group, or "max": no limit
            quota, period = map(int, " ".join(Path(file).read_text() for file in files).split())
            if quota > 0:
                return -(-quota // period)
    return sys.maxsize


def _fft_workers(planes: np.ndarray) -> int:
    """All cores for stacks of planes: sharing out the rows of a single one takes longer than it saves."""
    alone = getattr(_inside_pool, "yes", False) or math.prod(planes.shape[:-2]) < cores()
    return 1 if alone else cores()


def _rfft2(array: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """One axis after the other: rows of zeros are not transformed, which saves a quarter for small stamps."""
    workers = _fft_workers(array)
    rows = scipy.fft.rfft(array[..., :shape[0], :], shape[1], workers=workers)
    return scipy.fft.fft(rows, shape[0], axis=-2, overwrite_x=True, workers=workers)


def _irfft2(array: np.ndarray, shape: tuple[int, int], rows: int | None = None) -> np.ndarray:
    workers = _fft_workers(array)
    columns = scipy.fft.ifft(array, shape[0], axis=-2, workers=workers)[..., :rows, :]
    return scipy.fft.irfft(columns, shape[1], workers=workers)


def _inverse_spd(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    inverse, ok = np.full_like(a, np.nan), np.zeros(len(a), bool)
    with _libraries.limit(limits=1 if a.shape[-1] < _LEAST_THREADED else None, user_api="blas"):
        for i, matrix in enumerate(a):
            if not np.isfinite(matrix).all():
                continue
            factor, failed = lapack.dpotrf(matrix, lower=1)
            if failed:
                continue
            lower, failed = lapack.dpotri(factor, lower=1, overwrite_c=1)
            inverse[i] = np.tril(lower, -1).T
            inverse[i] += np.tril(lower)
            ok[i] = not failed
    return inverse, ok


def _cholesky(a: np.ndarray) -> np.ndarray:
    with _libraries.limit(limits=1 if len(a) < _LEAST_THREADED else None, user_api="blas"):
        factor, failed = lapack.dpotrf(a, lower=1, clean=1)
    return np.full_like(a, np.nan) if failed else np.ascontiguousarray(factor)


#: Where a container finds its memory, in the two versions of control groups: folder, files of the limit and of what is
#: used, and how much of that is copies of files, which go when memory is needed.
_GROUPS = (("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
           ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))


def _free_bytes() -> int:
    """Memory that is free on the machine and, in a container, within its limit."""
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":") for line in lines)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        free = 2 << 30
    for folder, limit, used, cached in _GROUPS:
        with contextlib.suppress(OSError, ValueError, KeyError):  # no such group, or "max": no limit
            numbers = dict(line.split() for line in Path(folder, "memory.stat").read_text().splitlines())
            most, now = (int(Path(folder, name).read_text()) for name in (limit, used))
            free = min(free, max(0, most - now + int(numbers[cached])))
    return free


def _run_all(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Map over the cores; inside, BLAS and FFT keep to one thread each so that cores are not shared."""
    items = list(items)
    workers = min(cores(), len(items))
    if workers < 2 or getattr(_inside_pool, "yes", False):
        return [function(item) for item in items]

    def mark() -> None:
        _inside_pool.yes = True

    with _libraries.limit(limits=1, user_api="blas"), ThreadPoolExecutor(workers, initializer=mark) as pool:
        return list(pool.map(function, items))


def make_numpy_backend() -> Backend:
    """Return the backend of NumPy arrays."""
    return Backend(
        name="numpy", xp=np, array_type=np.ndarray, upload=lambda a: a, download=np.asarray,
        rfft2=_rfft2, irfft2=_irfft2, inverse_spd=_inverse_spd, cholesky=_cholesky, eigh=np.linalg.eigh,
        free_bytes=_free_bytes, release=lambda: None, at_once=lambda _: 1,
        least_pixels=_LEAST_PIXELS, workers=cores(), tile_side=300, run_all=_run_all,
        device=f"cpu, {cores()} cores",
    )
