"""The switch: selection, refusal, the one door, counted transfers, and who may import what."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from strict_namespace import HostCopyError

import gpudia
from gpudia.backend import (
    backend_info,
    backend_of,
    namespace_of,
    numpy_backend,
    scalar,
    to_device,
    to_host,
    transfers,
    use_backend,
)
from gpudia.backend import select as switch
from gpudia.backend.cupy_backend import make_cupy_backend
from gpudia.backend.numpy_backend import make_numpy_backend
from gpudia.errors import BackendError, InputError

PACKAGE = Path(gpudia.__file__).parent
try:
    make_cupy_backend()
    HAS_GPU = True
except BackendError:
    HAS_GPU = False


def test_context_manager_restores_the_choice_before():
    before = backend_info()["backend"]
    with use_backend("numpy") as backend:
        assert backend.name == backend_info()["backend"] == "numpy"
    assert backend_info()["backend"] == before


def test_plain_call_holds_until_the_next():
    use_backend("numpy")
    assert backend_info()["backend"] == "numpy"
    assert "asked for by backend" in backend_info()["reason"]


def test_unknown_name_is_refused_with_the_value():
    with pytest.raises(InputError, match=r"backend must be one of auto, numpy, cupy, got 'cuda'"):
        use_backend("cuda")


@pytest.mark.skipif(HAS_GPU, reason="a CUDA device is here: cupy runs")
def test_cupy_without_a_device_is_refused_with_reason_and_remedy():
    before = backend_info()
    with pytest.raises(BackendError, match=r"'cupy' cannot run: .*; install the wheel"):
        use_backend("cupy")
    assert backend_info()["backend"] == before["backend"]


@pytest.mark.skipif(HAS_GPU, reason="a CUDA device is here: auto takes it")
def test_auto_without_a_device_says_why_it_takes_numpy():
    with use_backend("auto"):
        info = backend_info()
    assert info["backend"] == "numpy"
    assert info["reason"].startswith("auto: backend 'cupy' cannot run")


def test_the_environment_chooses(monkeypatch):
    monkeypatch.setattr(switch, "_active", None)
    monkeypatch.setenv("GPUDIA_BACKEND", "numpy")
    assert backend_info()["reason"] == "numpy asked for by GPUDIA_BACKEND"
    monkeypatch.setattr(switch, "_active", None)
    monkeypatch.setenv("GPUDIA_BACKEND", "gpu")
    with pytest.raises(InputError, match="GPUDIA_BACKEND must be one of auto, numpy, cupy, got 'gpu'"):
        backend_info()


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">i2", ">u2", "<f4", "<f8"])
def test_the_door_makes_native_contiguous_arrays(backend, dtype):
    values = np.arange(12).reshape(3, 4).astype(dtype)[:, ::2]
    placed = to_device(values, backend)
    back = to_host(placed)
    assert placed.dtype.isnative
    assert back.flags.c_contiguous
    np.testing.assert_array_equal(back, values)


def test_transfers_are_counted(strict):
    transfers.reset()
    placed = to_device(np.zeros((4, 5)), strict)
    assert (transfers.up, transfers.bytes_up) == (1, 160)
    to_device(placed, strict)
    assert transfers.up == 1
    to_host(placed)
    assert (transfers.down, transfers.bytes_down) == (1, 160)
    assert scalar(placed.sum()) == 0.0
    assert transfers.syncs == 1


def test_mixed_and_foreign_arrays_are_refused(strict):
    host, device = np.zeros(3), to_device(np.zeros(3), strict)
    with pytest.raises(InputError, match=r"must be all of one backend, got \['numpy', 'strict'\]"):
        backend_of(host, device)
    with pytest.raises(InputError, match=r"must be arrays of a known backend .*, got builtins.list"):
        namespace_of([1.0])
    assert namespace_of(host, None) is np


def test_the_stand_in_refuses_hidden_copies(strict):
    device = to_device(np.ones(3), strict)
    for hidden in (lambda: np.asarray(device), lambda: device + np.ones(3), lambda: np.ones(3) + device,
                   lambda: float(device[0]), lambda: bool(device[0]), lambda: list(device),
                   lambda: device[np.array([0])], lambda: strict.xp.where(np.ones(3, bool), device, 0.0)):
        with pytest.raises((HostCopyError, TypeError)):
            hidden()


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


# Who may not import whom; the rooms and the direction of the data are described in README, "Inside".
FORBIDDEN = {
    "": ("cupy", "cupyx"),
    "images": ("gpudia.backend", "gpudia.model", "gpudia.photometry", "gpudia.pipeline", "gpudia.report"),
    "model": ("gpudia.images", "gpudia.photometry", "gpudia.pipeline", "gpudia.report", "logging", "astropy.io",
              "astropy.wcs"),
    "photometry": ("gpudia.images", "gpudia.pipeline", "gpudia.report"),
    "backend": ("gpudia.images", "gpudia.model", "gpudia.photometry", "gpudia.pipeline", "gpudia.report"),
    "report": ("gpudia.model", "gpudia.backend", "gpudia.pipeline"),
}


@pytest.mark.parametrize("room", FORBIDDEN)
def test_rooms_import_only_what_they_may(room):
    broken = [f"{path.relative_to(PACKAGE)} imports {name}"
              for path in sorted((PACKAGE / room).rglob("*.py"))
              if not (room == "" and path.parent.name == "backend")
              for name in _imports(path)
              if any(name == f or name.startswith(f + ".") for f in FORBIDDEN[room])]
    assert not broken, "put it into the room that may, or hand the data over through gpudia.pipeline"


@pytest.mark.parametrize(("module", "heavy"), [("gpudia", ("numpy", "astropy", "cupy", "matplotlib")),
                                               ("gpudia.pipeline.tasks", ("cupy", "matplotlib", "gpudia.simulate"))])
def test_importing_is_light(module, heavy):
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_all_public_names_resolve():
    assert [name for name in gpudia.__all__ if not hasattr(gpudia, name)] == []


@pytest.mark.parametrize(("limit", "free"), [("1000000", 400_000 + 50_000), ("500000", 0), ("max", None), ("", None)])
def test_a_container_s_limit_is_the_memory_there_is(limit, free, tmp_path, monkeypatch):
    """What is cached of files in it counts as free; without a limit the machine's memory does."""
    for name, text in (("limit", limit), ("used", "600000"), ("memory.stat", "anon 5\ncached 50000\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(numpy_backend, "_GROUPS", (("/no/such", *"abc"), (str(tmp_path), "limit", "used", "cached")))
    found = make_numpy_backend().free_bytes()
    assert found == free if free is not None else found > 1e6


@pytest.mark.parametrize(("texts", "expected"), [
    (["150000 100000\n"], 2), (["50000 100000"], 1), (["max 100000"], None), (["400000", "100000"], 4),
    (["-1", "100000"], None), ([], None)])
def test_a_container_s_share_is_the_cores_there_are(texts, expected, tmp_path, monkeypatch):
    """Of both versions of control groups; without a limit those of the machine."""
    monkeypatch.delenv("GPUDIA_CORES", raising=False)
    monkeypatch.setattr(numpy_backend.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    files = [tmp_path / f"{k}" for k in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    monkeypatch.setattr(numpy_backend, "_SHARES", ((str(tmp_path / "none"),), tuple(map(str, files))))
    numpy_backend._share.cache_clear()
    try:
        assert numpy_backend.cores() == (expected or 64)
    finally:
        numpy_backend._share.cache_clear()
