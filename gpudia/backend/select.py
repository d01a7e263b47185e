"""The switch: which backend data are put on."""

from __future__ import annotations

import logging
import os
import platform
from typing import Any

import numpy as np
import scipy
from threadpoolctl import threadpool_info

from gpudia.backend.base import Backend, register_backend
from gpudia.backend.cupy_backend import make_cupy_backend
from gpudia.backend.numpy_backend import cores, make_numpy_backend
from gpudia.errors import BackendError, InputError

__all__ = ["active_backend", "backend_info", "use_backend"]

log = logging.getLogger("gpudia.backend")

NAMES = ("auto", "numpy", "cupy")
_numpy = make_numpy_backend()
register_backend(_numpy)
_active: Backend | None = None
_reason = ""


def _select(name: str, asked_by: str) -> tuple[Backend, str]:
    if name not in NAMES:
        raise InputError(f"{asked_by} must be one of {', '.join(NAMES)}, got {name!r}")
    if name == "numpy":
        return _numpy, f"numpy asked for by {asked_by}"
    try:
        backend = make_cupy_backend()
    except BackendError as error:
        if name == "cupy":
            raise
        return _numpy, f"auto: {str(error).partition(';')[0]}"
    register_backend(backend)
    return backend, f"{name}: an allocation on {backend.device} works"


class use_backend:  # noqa: N801 - reads as a statement, like numpy.errstate
    """Choose where data are put: ``use_backend("cupy")``, or ``with use_backend("numpy"): ...``.

    Parameters
    ----------
    name : {"auto", "numpy", "cupy"}
        "auto" takes CuPy when a real allocation on a device works, else NumPy. The choice holds for the process until
        the next call; as a context manager, until the end of the block.

    Raises
    ------
    InputError
        If `name` is none of these.
    BackendError
        If "cupy" was asked for and cannot run; there is no silent fallback.

    Notes
    -----
    The switch decides where `gpudia.run` and the functions of the first interface put their data. Numeric functions
    such as `gpudia.subtract` take the arrays as they come: CuPy arrays in, CuPy arrays out.
    """

    def __init__(self, name: str) -> None:
        global _active, _reason
        before = _active, _reason
        _active, _reason = _select(name, "backend")
        log.info("backend %s (%s)", _active.name, _reason)
        self._before = before
        self.backend = _active

    def __enter__(self) -> Backend:
        return self.backend

    def __exit__(self, *exception: object) -> None:
        global _active, _reason
        _active, _reason = self._before


def active_backend() -> Backend:
    """Return the backend in force: the last `use_backend`, else the environment's ``GPUDIA_BACKEND``, else auto."""
    global _active, _reason
    if _active is None:
        _active, _reason = _select(os.environ.get("GPUDIA_BACKEND", "auto") or "auto", "GPUDIA_BACKEND")
        log.info("backend %s (%s)", _active.name, _reason)
    return _active


def backend_info() -> dict[str, Any]:
    """Return backend, reason of the choice, device, memory, threads and versions, as a flat dictionary."""
    backend = active_backend()
    info = {
        "backend": backend.name, "reason": _reason, "device": backend.device,
        "free_memory_gb": round(backend.free_bytes() / 1e9, 2), "cores": cores(), "fft_threads": cores(),
        "blas_threads": max((p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas"), default=1),
        "python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__,
    }
    if backend.name == "cupy":
        runtime = backend.xp.cuda.runtime
        info |= {"cupy": backend.xp.__version__, "cuda_runtime": runtime.runtimeGetVersion(),
                 "cuda_driver": runtime.driverGetVersion(), "devices": runtime.getDeviceCount()}
    return info
