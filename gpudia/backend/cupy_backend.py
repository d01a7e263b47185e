"""The CuPy backend. The only module of the library that imports cupy, and only when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

from gpudia.backend.base import Backend
from gpudia.errors import BackendError

__all__ = ["make_cupy_backend"]

_REMEDY = ("install the wheel for your driver (pip install 'gpudia[cuda13]' or 'gpudia[cuda12]'), see that nvidia-smi "
           "lists a device (in Docker: --gpus all), or choose the numpy backend")
#: Share of the free device memory that one step of the solver may take.
_MEMORY_SHARE = 0.5
#: Share of the device memory that CuPy's pool may hold, where the user has set no limit.
_POOL_SHARE = 0.95
#: More images than this at once make nothing faster, whatever the memory.
_MOST_IMAGES = 256


def _probe(cp: Any) -> None:
    """Really allocate, compute and read back: an importable CuPy can still lack a device, a driver or NVRTC."""
    total = float((cp.arange(1000, dtype=cp.float64) * 2.0).sum())
    if total != 999000.0:
        raise RuntimeError(f"a sum on the device gave {total}, expected 999000")


@lru_cache(maxsize=1)
def make_cupy_backend() -> Backend:
    """Return the backend of CuPy arrays on the current device.

    Raises
    ------
    BackendError
        If CuPy is not installed, or if a real allocation and a sum on the device fail; says why and what to do.
    """
    try:
        import cupy as cp
        import cupyx.scipy.fft as cufft
    except ImportError as error:
        raise BackendError(f"backend 'cupy' cannot run: CuPy is not importable ({error}); {_REMEDY}") from error
    try:
        _probe(cp)
        properties = cp.cuda.runtime.getDeviceProperties(cp.cuda.Device().id)
    except Exception as error:  # CuPy raises many kinds here: driver, runtime, compiler, memory
        raise BackendError(f"backend 'cupy' cannot run: {type(error).__name__}: {error}; {_REMEDY}") from error
    # Plans of many shapes would keep their work space for ever otherwise.
    cp.fft.config.get_plan_cache().set_size(8)
    pool = cp.get_default_memory_pool()
    if pool.get_limit() == 0:  # the driver and cuFFT's plans need the rest
        pool.set_limit(fraction=_POOL_SHARE)

    def cholesky(a: Any) -> Any:
        factor = cp.linalg.cholesky(a)  # not positive definite: NaN or a non-positive diagonal, no exception
        return cp.where((cp.diagonal(factor) > 0).all(), factor, cp.nan)

    def inverse_spd(a: Any) -> tuple[Any, Any]:
        factor = cp.linalg.cholesky(a)  # not positive definite: NaN or a non-positive diagonal, no exception
        diagonal = cp.diagonal(factor, axis1=-2, axis2=-1)
        ok = cp.isfinite(diagonal).all(axis=-1) & (diagonal > 0).all(axis=-1)
        safe = cp.where(ok[:, None, None], a, cp.eye(a.shape[-1], dtype=a.dtype))
        inverse = cp.linalg.inv(safe)
        # CuPy promises nothing for a matrix that is not positive definite: believe the product, not the factor
        wrong = cp.abs(inverse @ safe - cp.eye(a.shape[-1], dtype=a.dtype)).max(axis=(-2, -1))
        ok = ok & (wrong < 1e-3)
        return cp.where(ok[:, None, None], inverse, cp.nan), ok

    def irfft2(a: Any, shape: tuple[int, int], rows: int | None = None) -> Any:
        return cufft.irfft2(a, s=shape)[..., :rows, :]

    def free_bytes() -> int:
        return int(cp.cuda.Device().mem_info[0] + cp.get_default_memory_pool().free_bytes())

    def at_once(bytes_per_image: int) -> int:
        return max(1, min(_MOST_IMAGES, int(_MEMORY_SHARE * free_bytes() / max(1, bytes_per_image))))

    def run_all(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        return [function(item) for item in items]

    return Backend(
        name="cupy", xp=cp, array_type=cp.ndarray, upload=cp.asarray, download=cp.asnumpy,
        rfft2=lambda a, shape: cufft.rfft2(a, s=shape), irfft2=irfft2,
        inverse_spd=inverse_spd, cholesky=cholesky, eigh=cp.linalg.eigh, free_bytes=free_bytes,
        release=pool.free_all_blocks, at_once=at_once,
        least_pixels=1, workers=1, tile_side=512, run_all=run_all, device=properties["name"].decode(),
    )
