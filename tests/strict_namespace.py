"""A stand-in for CuPy that runs without a GPU: NumPy arrays behind a wall.

`StrictArray` refuses everything that would be a hidden copy between host and device or an error with CuPy: NumPy
functions on it, arithmetic and indexing with NumPy arrays, float(), bool(), iteration, item(). The namespace has only
functions that CuPy has too. Since NumPy computes underneath, results equal NumPy's to the last bit.
"""

from types import SimpleNamespace

import numpy as np

from gpudia.backend import Backend
from gpudia.backend.numpy_backend import make_numpy_backend

# Functions that gpudia.model uses; each exists in CuPy with the same signature (CuPy 13, API reference).
FUNCTIONS = """abs all any arange argsort ascontiguousarray concatenate conj cos diagonal einsum empty exp eye
flatnonzero floor full isfinite log max maximum mean min minimum moveaxis ones ones_like sin sort sqrt
stack sum swapaxes take take_along_axis where zeros zeros_like
""".split()
CONSTANTS = "bool complex64 complex128 float32 float64 inf int32 int64 nan newaxis pi uint8".split()
SCALARS = (int, float, complex, bool, type(None), str, slice, type(Ellipsis), type, np.dtype)


class HostCopyError(TypeError):
    """Something would have copied between host and device in silence."""


def unwrap(value):
    if isinstance(value, StrictArray):
        return value.hidden
    if isinstance(value, tuple | list):
        return type(value)(unwrap(v) for v in value)
    if isinstance(value, np.ndarray | np.generic):
        raise HostCopyError(f"a host {type(value).__name__} of shape {value.shape} met a device array")
    if not isinstance(value, SCALARS):
        raise HostCopyError(f"{type(value).__name__} met a device array")
    return value


def wrap(value):
    if isinstance(value, np.ndarray | np.generic):
        return StrictArray(np.asarray(value))
    if isinstance(value, tuple):
        return tuple(wrap(v) for v in value)
    return value


class StrictArray:
    __array_ufunc__ = None  # NumPy arrays on the left refuse the operation, too

    def __init__(self, hidden):
        self.hidden = hidden

    def _refuse(self, *_, **__):
        raise HostCopyError("a device array would have been copied to the host in silence; use to_host or scalar")

    __array__ = __float__ = __int__ = __bool__ = __index__ = __complex__ = __iter__ = item = tolist = _refuse

    shape = property(lambda self: self.hidden.shape)
    dtype = property(lambda self: self.hidden.dtype)
    ndim = property(lambda self: self.hidden.ndim)
    size = property(lambda self: self.hidden.size)
    strides = property(lambda self: self.hidden.strides)
    nbytes = property(lambda self: self.hidden.nbytes)
    T = property(lambda self: wrap(self.hidden.T))
    real = property(lambda self: wrap(self.hidden.real))
    imag = property(lambda self: wrap(self.hidden.imag))

    def __len__(self):
        return len(self.hidden)

    def __getitem__(self, key):
        return wrap(self.hidden[unwrap(key)])

    def __setitem__(self, key, value):
        self.hidden[unwrap(key)] = unwrap(value)


def _method(name):
    def method(self, *args, **kwargs):
        args = [unwrap(a) for a in args]
        return wrap(getattr(self.hidden, name)(*args, **{k: unwrap(v) for k, v in kwargs.items()}))
    return method


def _in_place(name):
    def method(self, other):
        self.hidden = getattr(self.hidden, name)(unwrap(other))
        return self
    return method


for _op in ("add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod pow rpow matmul rmatmul "
            "and rand or ror xor rxor lt le gt ge eq ne neg invert abs").split():
    setattr(StrictArray, f"__{_op}__", _method(f"__{_op}__"))
for _op in "iadd isub imul itruediv iand ior".split():
    setattr(StrictArray, f"__{_op}__", _in_place(f"__{_op}__"))
for _op in "all any astype copy max mean min ravel reshape sum transpose".split():
    setattr(StrictArray, _op, _method(_op))


def _function(name):
    def function(*args, **kwargs):
        args = [unwrap(a) for a in args]
        return wrap(getattr(np, name)(*args, **{k: unwrap(v) for k, v in kwargs.items()}))
    return function


def make_strict_backend() -> Backend:
    """A backend named "strict"; everything else about it is NumPy's."""
    plain = make_numpy_backend()
    xp = SimpleNamespace(**{name: _function(name) for name in FUNCTIONS}, **{n: getattr(np, n) for n in CONSTANTS})
    xp.fft = SimpleNamespace(fftfreq=lambda n: wrap(np.fft.fftfreq(n)), rfftfreq=lambda n: wrap(np.fft.rfftfreq(n)))
    xp.lib = SimpleNamespace(stride_tricks=SimpleNamespace(
        as_strided=lambda a, shape, strides: wrap(np.lib.stride_tricks.as_strided(unwrap(a), shape, strides))))
    return Backend(
        name="strict", xp=xp, array_type=StrictArray, upload=lambda a: StrictArray(a.copy()),
        download=lambda a: a.hidden.copy(),
        rfft2=lambda a, s: wrap(plain.rfft2(unwrap(a), s)),
        irfft2=lambda a, s, rows=None: wrap(plain.irfft2(unwrap(a), s, rows)),
        inverse_spd=lambda a: wrap(plain.inverse_spd(unwrap(a))), cholesky=lambda a: wrap(plain.cholesky(unwrap(a))),
        eigh=lambda a: wrap(tuple(plain.eigh(unwrap(a)))),
        free_bytes=plain.free_bytes, release=plain.release, at_once=plain.at_once,
        least_pixels=plain.least_pixels, workers=plain.workers, tile_side=plain.tile_side, run_all=plain.run_all,
        device="stand-in")
