"""The benches still run, and what they conclude from their figures is right; no time is asserted."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


def printed_by(script, *arguments):
    """What a bench prints, run on small frames."""
    done = subprocess.run([sys.executable, str(BENCH / script), *arguments, "--small"], capture_output=True, text=True,
                          timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu_check

    return gpu_check


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import engine

    return engine


def test_gpu_check_goes_through_on_numpy():
    printed = printed_by("gpu_check.py", "--backend", "numpy", "--no-tests")
    assert "all steps went through" in printed
    assert "numpy_against_device" in printed


def test_numpy_agrees_with_itself(gpu_check):
    figures = gpu_check.compare(gpu_check.make_numpy_backend(), small=True)
    for case in figures.values():
        assert case == {"kernel": 0.0, "sigma": 0.0, "scale": 0.0, "flags_differ": 0, "status_differ": 0}


def test_the_counts_of_a_test_report(gpu_check):
    report = ("FAILED tests/test_a.py::test_b[cupy] - oh\nERROR tests/test_c.py::test_d\n"
              "= 1 failed, 20 passed, 3 skipped, 1 error in 9s =")
    assert gpu_check.counts_of(report) == {"failed": 1, "passed": 20, "skipped": 3, "error": 1,
                                           "failures": ["tests/test_a.py::test_b[cupy]", "tests/test_c.py::test_d"]}
    assert gpu_check.counts_of("") == {"failures": []}


def test_a_step_that_fails_is_named_and_the_others_go_on(gpu_check, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "compare", lambda *_: 1 / 0)
    monkeypatch.setattr(gpu_check, "SMALL_CASES", [])
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--backend", "numpy", "--small", "--no-tests"])
    assert gpu_check.main() == 1
    out = capsys.readouterr().out
    assert "failed: ZeroDivisionError" in out
    assert out.rstrip().endswith("failed: numpy_against_device")
    assert "copy_bandwidth" in out


def test_bytes_of_the_iterations(gpu_check):
    field = gpu_check.field_of(64, 2)
    for precision, size in (("mixed", 4), ("double", 8)):
        plan = gpu_check.plan_of(field, 7, 0, gpu_check.make_numpy_backend(), precision=precision)
        pixels = np.prod(plan.design.tiling.fft_shape)
        assert gpu_check.work_of(plan, 3.0)["bytes"] == 3 * 10 * size * pixels


def test_the_ratios_of_the_engine(engine):
    case = {"image_s": 0.1, "plan_s": 2.0, "scale": [1.0, 2.0]}  # 0.2 s an image in a batch of 20
    figures = {"degree_0": case, "degree_1": case, "degree_2": {**case, "image_s": 0.3}, "degree_1_direct": case,
               "ois_s": 13.6, "explicit_s": None, "hotpants_s": None, "hotpants_derived_s": 0.4, "cutouts": case,
               "cutouts_explicit_s": 11.0,
               "whole": {"sfft_s": 20.0, "all": case, "informative": {**case, "scale": [1.001, 2.0]}}}
    found = engine.ratios(figures)
    assert found["degree 0 / HOTPANTS"] == 0.5
    assert found["degree 2 / degree 1"] == 2.0
    assert found["ois / degree 0"] == 68.0
    assert found["explicit / degree 0"] is None
    assert found["explicit / cutouts"] == 100.0
    assert found["sfft / whole, all"] == 100.0
    assert found["whole, informative / (sfft / 10)"] == 0.1
    assert found["informative: largest change of the scale"] == pytest.approx(1e-3)


def test_the_fpacked_bench_runs_on_a_small_frame():
    printed = printed_by("fpacked.py")
    for case in json.loads(printed).values():
        assert case["tiles_s"] > 0
        assert case["read_over_read"] == pytest.approx(case["read_region_s"] / case["read_whole_s"], rel=0.02)


@pytest.mark.parametrize("group", ["growth", "memory"])
def test_the_engines_groups_run_on_small_frames(group):
    printed = printed_by("engine.py", group)
    assert group in printed


def test_the_registration_bench_finds_no_wrong_one():
    printed = printed_by("registration.py")
    assert "simulated" in printed


@pytest.mark.parametrize("group", ["rotation", "correlation", "stack"])
def test_the_groups_of_the_geometry_run_on_small_frames(group):
    printed = printed_by("geometry.py", group)
    assert group in printed


@pytest.mark.parametrize("group", ["stream", "kills"])
def test_the_groups_of_the_long_job_run_on_small_frames(group):
    printed = printed_by("job.py", group)
    assert group in printed
    assert "'faults': []" in printed or group == "stream"
