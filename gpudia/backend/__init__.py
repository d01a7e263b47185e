"""The switch between NumPy and CuPy: the only package that imports cupy.

The backend decides where data are *put* (`to_device`); after that the arrays decide: numeric functions ask
`namespace_of` or `backend_of` for what belongs to their arguments, and nobody passes a backend on.
"""

from gpudia.backend.base import (
    Backend,
    backend_of,
    namespace_of,
    native,
    register_backend,
    scalar,
    to_device,
    to_host,
    transfers,
)
from gpudia.backend.memory import or_in_halves
from gpudia.backend.numpy_backend import cores
from gpudia.backend.select import active_backend, backend_info, use_backend

__all__ = [
    "Backend",
    "active_backend",
    "backend_info",
    "backend_of",
    "cores",
    "namespace_of",
    "native",
    "or_in_halves",
    "register_backend",
    "scalar",
    "to_device",
    "to_host",
    "transfers",
    "use_backend",
]
