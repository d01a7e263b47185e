"""The job on real frames: scatter of the RISE stars against their errors, noise of the DECam differences, eso085.

    GPUDIA_TEST_DATA=/path/to/data python bench/real_frames.py [FOLDER TO KEEP THE RUNS IN]
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.table import Table
from common import save

from gpudia import read_lightcurves
from gpudia.cli import main as gpudia
from gpudia.flags import FRAME_FLAGS

DATA = Path(os.environ.get("GPUDIA_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
MIN_FLUX = 5000.0


def rise(output: Path) -> dict:
    """Six of six frames, with one of them as reference."""
    return rise_scatter(output)


def rise_scatter(output: Path, *options: str) -> dict:
    """Scatter about the mean over stated error of the stars above 5000 ADU; a frame that is the reference left out."""
    code = gpudia(["run", str(DATA / "rise"), "--ra", "253.4659", "--dec", "62.9002", "--size", "500", "--output",
                   str(output), "--quiet", *options])
    epochs, curves = Table.read(output / "epochs.ecsv"), read_lightcurves(output)
    figures = {"exit": code, "frames_ok": int((epochs["status"] == "ok").sum()), "frames": len(epochs),
               "scale": [round(float(s), 4) for s in epochs["scale"]],
               "registration_rms": [round(float(s), 3) for s in epochs["registration_rms"]]}
    flags, shift = np.asarray(curves.epochs["flags"]), np.asarray(curves.epochs["shift_x"])
    independent = flags & FRAME_FLAGS.is_reference == 0
    for name, chosen in (("all", independent), ("without_the_dither_of_100_px", independent & (np.abs(shift) < 50))):
        flux, error = (np.asarray(curves.planes[n], float)[chosen] for n in ("FLUX", "FLUX_ERR"))
        bright = np.isfinite(flux).all(axis=0) & (np.asarray(curves.sources["flux_ref"]) >= MIN_FLUX)
        ratio = flux[:, bright].std(axis=0, ddof=1) / np.sqrt((error[:, bright] ** 2).mean(axis=0))
        low, middle, high = np.percentile(ratio, (16, 50, 84))
        figures[f"scatter_over_error_{name}"] = {"stars": int(bright.sum()), "median": round(float(middle), 2),
                                                 "16_84_percent": [round(float(low), 2), round(float(high), 2)]}
    return figures


def _robust_sigma(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return round(float(1.4826 * np.median(np.abs(values - np.median(values)))), 2)


def _sigmas(output: Path) -> dict:
    found = {}
    for path in sorted((output / "difference").glob("*.fits")):
        with fits.open(path) as hdus:
            if hdus[0].header["IMAGE"] != hdus[0].header["REFERENC"]:
                found[path.stem] = _robust_sigma(hdus["DIFF"].data)
    return found


def decam(output: Path) -> dict:
    """Robust sigma of the differences against frame a; an unweighted delta kernel gives 45.8 for b - a."""
    reference = DATA / "decam" / "DEC-OBS18a.mini.fits"
    code = gpudia(["run", str(DATA / "decam"), "--reference", str(reference), "--no-align", "--kernel-size", "17",
                   "--output", str(output), "--quiet"])
    return {"exit": code, "robust_sigma": _sigmas(output)}


def eso085(output: Path) -> dict:
    """Integers, no WCS, no gain: saturation from the dtype. Peers' differences have 86 to 92 ADU."""
    code = gpudia(["run", str(DATA / "eso085"), "--no-align", "--output", str(output), "--quiet"])
    flags = Table.read(output / "epochs.ecsv")["flags"]
    return {"exit": code, "robust_sigma": _sigmas(output),
            "saturation_guessed": bool((flags & FRAME_FLAGS.saturation_guessed > 0).all())}


def main() -> int:
    """Print and keep the figures."""
    if not (DATA / "rise").is_dir():
        print(f"skipped: no real frames in {DATA}; set GPUDIA_TEST_DATA")
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(scratch)
        save("real_frames", {f.__name__: f(folder / f.__name__) for f in (rise, decam, eso085)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
