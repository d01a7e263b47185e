"""What a backend is: a namespace of arrays, and the few operations that NumPy and CuPy spell differently."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpudia.errors import InputError

__all__ = [
    "Backend",
    "Transfers",
    "backend_of",
    "namespace_of",
    "native",
    "register_backend",
    "scalar",
    "to_device",
    "to_host",
    "transfers",
]

Array = Any


@dataclass(frozen=True)
class Backend:
    """A home of arrays.

    Parameters
    ----------
    name : str
        ``numpy``, ``cupy`` or the name of a stand-in.
    xp : module
        The array namespace (numpy, cupy).
    array_type : type
        Arrays of this type belong to this backend.
    upload, download : callable
        From a NumPy array and back. Only `to_device`, `to_host` and `scalar` call them.
    rfft2 : callable
        ``(array, shape) -> array`` over the last two axes, padded with zeros to that shape.
    irfft2 : callable
        ``(array, shape, rows=None) -> array``: back again, of that shape; if `rows` is given, its first rows only.
    inverse_spd : callable
        ``(a (B, n, n)) -> (inverse (B, n, n), ok (B,) bool)`` of symmetric positive definite matrices.
    cholesky : callable
        ``(a (n, n)) -> L (n, n)``, lower triangular, a = L L^T; all NaN where `a` is not positive definite.
    eigh : callable
        ``(a (n, n)) -> (eigenvalues, eigenvectors)``.
    free_bytes : callable
        Memory that can be allocated now.
    release : callable
        Give memory that the backend keeps for later arrays back to the device.
    at_once : callable
        ``(bytes per item) -> int``: how many images (or tiles) one step should hold. One on a CPU (they then stay in
        the cache), many on a GPU.
    least_pixels : int
        Pixels that one step should hold at least, so that the calls take no longer than the work.
    workers : int
        How many functions `run_all` runs at the same time.
    tile_side : int
        Preferred side of the tiles in which a large frame is transformed, pixels.
    run_all : callable
        ``(function, items) -> list``: `map`, on several cores where that is useful.
    device : str
        The device in words.
    """

    name: str
    xp: Any
    array_type: type
    upload: Callable[[np.ndarray], Array]
    download: Callable[[Array], np.ndarray]
    rfft2: Callable[[Array, tuple[int, int]], Array]
    irfft2: Callable[..., Array]
    inverse_spd: Callable[[Array], tuple[Array, Array]]
    cholesky: Callable[[Array], Array]
    eigh: Callable[[Array], tuple[Array, Array]]
    free_bytes: Callable[[], int]
    release: Callable[[], None]
    at_once: Callable[[int], int]
    least_pixels: int
    workers: int
    tile_side: int
    run_all: Callable[[Callable[[Any], Any], Iterable[Any]], list[Any]]
    device: str = "cpu"


@dataclass
class Transfers:
    """Counts of copies between host and device: `up` and `down` arrays with their bytes, `syncs` single numbers."""

    up: int = 0
    down: int = 0
    syncs: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    _lock: Any = field(default_factory=threading.Lock, repr=False, compare=False)

    def reset(self) -> None:
        """Set all counts to zero."""
        self.up = self.down = self.syncs = self.bytes_up = self.bytes_down = 0

    def add(self, **counts: int) -> None:
        """Add to the named counts (safe from several threads)."""
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)


#: Counts since the start of the process, or the last ``transfers.reset()``.
transfers = Transfers()

_registered: list[Backend] = []


def register_backend(backend: Backend) -> None:
    """Make the arrays of `backend` known to `backend_of`. A later one of the same name replaces the earlier."""
    _registered[:] = [b for b in _registered if b.name != backend.name] + [backend]


def _home_of(array: Array) -> Backend | None:
    home = next((b for b in _registered if isinstance(array, b.array_type)), None)
    if home is None and type(array).__module__.partition(".")[0] == "cupy":
        # the caller brought CuPy arrays of its own: CuPy runs, whatever the switch says
        from gpudia.backend.cupy_backend import make_cupy_backend

        home = make_cupy_backend()
        register_backend(home)
    return home


def backend_of(*arrays: Array) -> Backend:
    """Return the one backend that all `arrays` belong to; None entries are passed over.

    Raises
    ------
    InputError
        If an argument is not an array of a known backend, or if they belong to different ones.
    """
    found: dict[str, Backend] = {}
    for array in arrays:
        if array is None:
            continue
        home = _home_of(array)
        if home is None:
            known = ", ".join(b.name for b in _registered)
            raise InputError(f"arrays must be arrays of a known backend ({known}), got {type(array).__module__}."
                             f"{type(array).__name__}")
        found[home.name] = home
    if len(found) != 1:
        raise InputError(f"arrays must be all of one backend, got {sorted(found) or 'no array'}; "
                         "move them with gpudia.backend.to_device or to_host")
    return found.popitem()[1]


def namespace_of(*arrays: Array) -> Any:
    """Return the array namespace (numpy, cupy) of `arrays`; see `backend_of`."""
    return backend_of(*arrays).xp


def native(array: Any, dtype: Any = None) -> np.ndarray:
    """Return a C-contiguous NumPy array in native byte order; a masked array's data without its mask."""
    array = np.asarray(np.ma.getdata(array))
    return np.ascontiguousarray(array, dtype=dtype or array.dtype.newbyteorder("="))


def to_device(array: Array, backend: Backend, dtype: Any = None) -> Array:
    """Place one array on a backend: the one door, where byte order and contiguity are made right.

    An array that is there already is returned as it is (or cast). A host array becomes native and C-contiguous first:
    a big-endian FITS array handed to a GPU as it is would silently turn to garbage.
    """
    if isinstance(array, backend.array_type) and backend.array_type is not np.ndarray:
        placed: Array = array
        return placed if dtype is None else placed.astype(dtype)
    host = native(to_host(array), dtype)
    if backend.array_type is not np.ndarray:
        transfers.add(up=1, bytes_up=host.nbytes)
    return backend.upload(host)


def to_host(array: Any) -> np.ndarray:
    """Copy an array to the host (counted); NumPy arrays and sequences pass unchanged or become NumPy arrays."""
    if isinstance(array, np.ndarray):
        return array
    home = _home_of(array)
    if home is None:
        return np.asarray(array)
    host = home.download(array)
    transfers.add(down=1, bytes_down=host.nbytes)
    return host


def scalar(array: Array) -> Any:
    """Return the one number in `array` as a Python number. On a GPU this waits for the device: counted as a sync."""
    transfers.add(syncs=1)
    return array.item() if isinstance(array, np.generic) else backend_of(array).download(array).item()
