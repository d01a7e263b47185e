"""Programs that do the same job, timed on the same data: each in a process of its own, with all cores.

Every function takes a `Field` and the model's settings and returns seconds an image, or None where the program is not
installed. HOTPANTS is run where its binary is on the PATH; elsewhere its time is derived from a measured ratio, and
said to be: on one and the same machine it took 1/68 of the time of `ois` (Bramich) at 512 px, K = 21, and a tenth of
that of `sfft` (NumPy, degree 1) at 2048 px, K = 21.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import multiprocessing
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
from fields import Field

from gpudia import build_the_U_matrix

__all__ = ["HOTPANTS_OF_OIS", "HOTPANTS_OF_SFFT", "alone", "explicit", "hotpants", "ois_bramich", "sfft"]

HOTPANTS_OF_OIS, HOTPANTS_OF_SFFT = 1 / 68, 1 / 10


def _best(function: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def ois_bramich(field: Field, kernel_size: int, repeats: int = 1) -> float | None:
    """`ois.optimal_system`, Bramich's kernel, constant over the frame, no weights, no mask."""
    if importlib.util.find_spec("ois") is None:
        return None
    import ois

    image = np.where(field.masks[0], np.median(field.images[0]), field.images[0])
    return _best(lambda: ois.optimal_system(image, field.reference, kernelshape=(kernel_size, kernel_size),
                                            bkgdegree=1, method="Bramich"), repeats)


def sfft(field: Field, kernel_size: int, degree: int = 1, repeats: int = 1, backend: str = "Numpy") -> float | None:
    """SFFT on its backend "Numpy" or "Cupy", no weights, masked pixels filled with the median; compiled before."""
    if importlib.util.find_spec("sfft") is None:
        return None
    from sfft.sfftcore.SFFTConfigure import SingleSFFTConfigure
    from sfft.sfftcore.SFFTSubtract import GeneralSFFTSubtract

    filled = [np.where(mask, np.median(plane), plane).T.copy() for plane, mask in
              ((field.reference, field.reference_mask), (field.images[0], field.masks[0]))]
    common = {"BACKEND_4SUBTRACT": backend, "NUM_CPU_THREADS_4SUBTRACT": multiprocessing.cpu_count(),
              "VERBOSE_LEVEL": 0}
    with contextlib.redirect_stdout(io.StringIO()):
        settings = SingleSFFTConfigure.SSC(NX=filled[0].shape[0], NY=filled[0].shape[1], KerHW=kernel_size // 2,
                                           KerPolyOrder=degree, BGPolyOrder=1, ConstPhotRatio=False, **common)

        def once() -> None:
            GeneralSFFTSubtract.GSS(PixA_I=filled[0], PixA_J=filled[1], PixA_mI=filled[0], PixA_mJ=filled[1],
                                    SFFTConfig=settings, ContamMask_I=None, **common)

        once()
        return _best(once, repeats)


def explicit(field: Field, kernel_size: int, repeats: int = 1) -> float | None:
    """U as a matrix, masked rows dropped, numpy.linalg.lstsq: one unweighted pass, as a plain script would do it."""
    h, K = kernel_size // 2, kernel_size
    height, width = field.reference.shape

    def once() -> None:
        U, _, _ = build_the_U_matrix(field.reference, K)
        y, x = (v[h:-h, h:-h].ravel() for v in np.mgrid[-1:1:height * 1j, -1:1:width * 1j])
        keep = ~field.masks[0][h:-h, h:-h].ravel()
        U = np.column_stack([U, np.ones(len(U)), x, y])[keep]
        np.linalg.lstsq(U, field.images[0][h:-h, h:-h].ravel()[keep], rcond=None)

    return _best(once, repeats)


def hotpants(field: Field, kernel_size: int, degree: int = 1, repeats: int = 1) -> float | None:
    """The binary where it is on the PATH, files and all."""
    if shutil.which("hotpants") is None:
        return None
    from astropy.io import fits

    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("image.fits", "reference.fits", "difference.fits")]
        for path, plane in zip(paths, (field.images[0], field.reference), strict=False):
            fits.writeto(path, plane.astype(np.float32))
        command = ["hotpants", "-inim", paths[0], "-tmplim", paths[1], "-outim", paths[2], "-r", str(kernel_size // 2),
                   "-ko", str(degree), "-bgo", "1", "-c", "t", "-n", "i", "-tu", "1e9", "-iu", "1e9", "-v", "0"]
        return _best(lambda: subprocess.run([str(c) for c in command], check=True, capture_output=True), repeats)


def _put(queue: Any, function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    queue.put(function(*args, **options))


def alone(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a function in a new process and return what it returns.

    Raises
    ------
    RuntimeError
        If the process ends without a result.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_put, args=(queue, function, args, options))
    process.start()
    while True:
        try:
            result = queue.get(timeout=1.0)
            break
        except Empty:
            if not process.is_alive() and queue.empty():
                raise RuntimeError(f"{function.__name__} ended with exit code {process.exitcode}") from None
    process.join()
    return result
