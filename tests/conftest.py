"""Fixtures shared by all tests: backends, real frames, a small crowded field."""

import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from strict_namespace import make_strict_backend

from gpudia.backend import backend_info, register_backend, use_backend
from gpudia.backend.cupy_backend import make_cupy_backend
from gpudia.backend.numpy_backend import make_numpy_backend
from gpudia.errors import BackendError

# A busy machine makes no test fail.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

_STRICT = make_strict_backend()
register_backend(_STRICT)


@pytest.fixture(params=["numpy", "strict", pytest.param("cupy", marks=pytest.mark.gpu)])
def backend(request):
    """Every numeric law runs on NumPy, on the strict stand-in, and on CuPy where a device is."""
    if request.param == "numpy":
        return make_numpy_backend()
    if request.param == "strict":
        return _STRICT
    try:
        made = make_cupy_backend()
    except BackendError as error:
        pytest.skip(str(error))
    register_backend(made)
    return made


@pytest.fixture(scope="session")
def strict():
    return _STRICT


@pytest.fixture(autouse=True)
def _restore_switch():
    """A test may throw the switch: put it back."""
    with use_backend(backend_info()["backend"]):
        yield


@pytest.fixture(scope="session")
def real_data():
    """The folder of real frames; the test is skipped where it is not there."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("GPUDIA_TEST_DATA", default))
    if not (folder / "rise").is_dir():
        pytest.skip(f"no real frames: GPUDIA_TEST_DATA or {default} does not hold the folder rise")
    return folder


def held(output):
    """Hold the folder of a run against the contract, where its checker is at hand."""
    checker = Path(__file__).resolve().parents[2] / "shared" / "contract" / "check_output.py"
    if checker.exists():
        found = subprocess.run([sys.executable, str(checker), str(output)], capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stdout + found.stderr


def star_field(shape, seed=0, density=80, fwhm=3.0, shift=(0.0, 0.0), vary=0.0):
    """Noise-free crowded field of Gaussian stars, fluxes rising as 10^(0.3 m); same stars for the same seed."""
    rng = np.random.default_rng(seed)
    height, width = shape
    n = height * width // density
    xs, ys = rng.uniform(-5, width + 5, n), rng.uniform(-5, height + 5, n)
    flux = 150 * 10 ** (0.4 * np.minimum(-np.log10(rng.uniform(0, 1, n)) / 0.3, 7))
    image = np.zeros(shape)
    yy, xx = np.mgrid[:height, :width]
    for x, y, f in zip(xs, ys, flux, strict=True):
        sigma = fwhm / 2.3548 * (1 + vary * (x / width - 0.5))
        x0, x1, y0, y1 = (int(min(max(v, 0), n)) for v, n in
                          ((x - 25, width), (x + 26, width), (y - 25, height), (y + 26, height)))
        dx, dy = xx[y0:y1, x0:x1] - x - shift[0], yy[y0:y1, x0:x1] - y - shift[1]
        image[y0:y1, x0:x1] += f / (2 * np.pi * sigma**2) * np.exp(-(dx**2 + dy**2) / 2 / sigma**2)
    return image


@pytest.fixture(scope="session")
def crowded():
    """Reference and three images (80 x 96) with known kernel (7 px), errors and masks; a dictionary."""
    from scipy.signal import convolve2d

    rng = np.random.default_rng(42)
    shape, K = (80, 96), 7
    truth = star_field(shape, seed=1) + 400.0
    offset = np.arange(K) - K // 2
    images, errors, masks, kernels, backgrounds = [], [], [], [], []
    for i in range(3):
        dx, dy, s = 0.3 * i - 0.2, 0.4 - 0.3 * i, 1.0 + 0.1 * i
        kernel = np.exp(-((offset[None] - dx) ** 2 + (offset[:, None] - dy) ** 2) / 2 / s**2)
        kernel *= (0.8 + 0.1 * i) / kernel.sum()
        background = np.array([20.0 * i - 100.0, 3.0, -2.0])
        y, x = np.meshgrid(np.linspace(-1, 1, shape[0]), np.linspace(-1, 1, shape[1]), indexing="ij")
        model = convolve2d(truth, kernel, mode="same") + background[0] + background[1] * x + background[2] * y
        variance = np.maximum(model, 50.0) / 1.5 + 25.0
        images.append(model + rng.normal(size=shape) * np.sqrt(variance))
        errors.append(np.sqrt(variance))
        masks.append(rng.random(shape) < 0.01)
        kernels.append(kernel)
        backgrounds.append(background)
    return {"reference": truth, "images": np.array(images), "errors": np.array(errors), "masks": np.array(masks),
            "kernels": np.array(kernels), "backgrounds": np.array(backgrounds), "kernel_size": K}
