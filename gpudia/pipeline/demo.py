"""The demonstration: a simulated field with a microlensing event, through the whole job."""

from __future__ import annotations

import os
from pathlib import Path

from gpudia.config import RunConfig
from gpudia.errors import ConfigError
from gpudia.pipeline.job import run
from gpudia.pipeline.outputs import RunResult
from gpudia.simulate import SimulationSettings, simulate_field, write_series

__all__ = ["run_demo"]


def run_demo(output: str | Path = "gpudia-demo", progress: bool = False) -> RunResult:
    """Simulate a small crowded field with a microlensing event and run the whole job on it.

    Parameters
    ----------
    output : str or path
        A new folder: ``frames`` in it gets the frames and the truth, ``run`` the results.
    progress : bool
        Show progress bars on stderr where that is a terminal.

    Returns
    -------
    RunResult

    Raises
    ------
    ConfigError
        If the folder holds something already or cannot be made.
    """
    folder = Path(os.path.expanduser(output))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"output must be a new or empty folder, got {folder}")
    try:
        (folder / "frames").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output must be a folder that can be written to, got {folder}: {error.strerror}") from error
    series = simulate_field(SimulationSettings())
    write_series(series, folder / "frames")
    target = series.truth[0]
    return run(RunConfig(frames=str(folder / "frames"), output=str(folder / "run"), ra=float(target["ra"]),
                         dec=float(target["dec"]), size=250), progress=progress)
