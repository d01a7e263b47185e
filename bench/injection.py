"""Injection and recovery on real frames: bias, pulls and completeness on the RISE and eso085 frames.

    GPUDIA_TEST_DATA=/path/to/data python bench/injection.py [rise eso085] [--small]

The same as `gpudia inject`; plots go to bench/results/injection_*.png.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from astropy.table import Table
from common import RESULTS, run_groups
from real_frames import DATA

from gpudia import Injection, RunConfig, inject

#: Position, size and other settings, and stars, of each set of frames.
SETS = {"rise": ({"ra": 253.4659, "dec": 62.9002, "size": 500}, 150), "eso085": ({"align": False}, 200)}
SHAPES = ("constant", "sine")


def measure(name: str, small: bool) -> dict[str, Any]:
    """Figures for each light curve, and the plot of the first one."""
    settings, n = SETS[name]
    figures: dict[str, Any] = {}
    for shape in SHAPES[:1] if small else SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            found = inject(RunConfig(frames=str(DATA / name), output=folder, **settings),
                           Injection(n=20 if small else n, shape=shape))
            print(found.summary())
            methods = {m: {k: round(float(v), 4) for k, v in found.totals(m).items()} for m in ("ap", "psf")}
            figures[shape] = {**methods, "scatter_over_error": {m: scatter(found.epochs, m) for m in methods},
                              "summary": found.summary().splitlines()[:-1],
                              "by_magnitude": [{k: round(float(row[k]), 4) for k in found.bins.colnames}
                                               for row in found.bins]}
            if not small and shape == SHAPES[0]:
                RESULTS.mkdir(exist_ok=True)
                shutil.copy(Path(folder) / "injection.png", RESULTS / f"injection_{name}.png")
    return figures


def scatter(epochs: Table, method: str) -> float | None:
    """Scatter of (flux - truth) about a star's mean over its stated error, the median star; None with few epochs.

    This is what right errors give in these frames: less than 0.92 (5 epochs), as epochs share the reference's noise.
    """
    ratios = []
    for star in epochs[np.asarray(epochs["usable"])].group_by("id").groups:
        if len(star) > 2:
            rest, error = (np.asarray(a, float) for a in (star[method] - star["expected"], star[f"{method}_err"]))
            ratios.append(rest.std(ddof=1) / np.sqrt((error**2).mean()))
    return round(float(np.median(ratios)), 4) if ratios else None


def main() -> int:
    """Print and keep the figures."""
    if not (DATA / "rise").is_dir():
        print(f"skipped: no real frames in {DATA}; set GPUDIA_TEST_DATA")
        return 0
    groups = {name: lambda small, name=name: measure(name, small) for name in SETS}
    return run_groups(__doc__, "injection", groups, {})


if __name__ == "__main__":
    sys.exit(main())
