"""The job on real frames: scatter of the RISE stars against their errors, noise of the DECam differences, eso085.

    GPUDIA_TEST_DATA=/path/to/data python bench/real_frames.py [FOLDER TO KEEP THE RUNS IN]

Writes real_frames.json and rise_scatter.png: scatter against stated errors of the RISE stars, the target and the ten
brightest marked.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.table import Row, Table
from common import RESULTS, save
from matplotlib.figure import Figure
from scipy.ndimage import binary_dilation, gaussian_filter
from scipy.stats import chi2

from gpudia import read_lightcurves
from gpudia.cli import main as gpudia
from gpudia.flags import FRAME_FLAGS, SOURCE_FLAGS
from gpudia.photometry import LightCurves, usable
from gpudia.photometry.calibration import MAG_PER_SHARE

DATA = Path(os.environ.get("GPUDIA_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
MIN_FLUX = 5000.0
TARGET = 253.4659, 62.9002


def rise(output: Path) -> dict:
    """Six of six frames, with one of them as reference; the target and the ten brightest stars one by one."""
    figures = rise_scatter(output)
    curves = read_lightcurves(output)
    stars = star_scatter(curves)
    target = SkyCoord(*TARGET, unit="deg").separation(SkyCoord(stars["ra"], stars["dec"], unit="deg")).argmin()
    bright = np.argsort(-np.nan_to_num(stars["flux_ref"]))
    bright = [int(i) for i in bright if np.isfinite(stars["rms"][i]) and i != target][:10]
    chosen = [int(target), *bright]
    draw_scatter(stars, chosen, RESULTS / "rise_scatter.png")
    measured = np.isfinite(stars["rms"])
    low, middle, high = np.percentile(stars["rms"][measured] / stars["stated"][measured], (16, 50, 84))
    ideal = round(float(np.sqrt(chi2.median(4) / 4)), 2)
    return figures | {
        "method": str(Table.read(output / "target.ecsv")["method"][0]),
        "scatter_over_stated_error_all_stars": {
            "stars": int(measured.sum()), "median": round(float(middle), 2), "median_of_perfect_errors": ideal,
            "16_84_percent": [round(float(low), 2), round(float(high), 2)]},
        "target_and_ten_brightest": [_star(stars[i]) for i in chosen]}


def star_scatter(curves: LightCurves) -> Table:
    """Per star: rms of the flux over the usable epochs that are not the reference, and the stated error (rms)."""
    independent = np.asarray(curves.epochs["flags"]) & FRAME_FLAGS.is_reference == 0
    flux, error, flags = (np.asarray(curves.planes[n])[independent] for n in ("FLUX", "FLUX_ERR", "FLAGS"))
    good = usable(flux, error, flags)
    stars = curves.sources["source_id", "ra", "dec", "flux_ref", "n_good", "chi2", "von_neumann", "score", "flags"]
    few = good.sum(axis=0) < 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # stars that were never measured
        stars["rms"] = np.where(few, np.nan, np.nanstd(np.where(good, flux, np.nan).astype(float), axis=0, ddof=1))
        stars["stated"] = np.sqrt(np.nanmean(np.where(good, error, np.nan).astype(float) ** 2, axis=0))
    return stars


def _star(row: Row) -> dict:
    share = 1e3 * MAG_PER_SHARE / row["flux_ref"]
    numbers = {"ra": round(float(row["ra"]), 5), "dec": round(float(row["dec"]), 5),
               "flux": round(float(row["flux_ref"])), "rms_mmag": round(float(row["rms"] * share), 1),
               "stated_mmag": round(float(row["stated"] * share), 1),
               "ratio": round(float(row["rms"] / row["stated"]), 2), "chi2": round(float(row["chi2"]), 2),
               "score": round(float(row["score"]), 1)}
    return {"source_id": int(row["source_id"]), **numbers, "epochs": int(row["n_good"]),
            "flags": list(SOURCE_FLAGS.decode(int(row["flags"])))}


def draw_scatter(stars: Table, chosen: list[int], path: Path) -> None:
    """Scatter in millimagnitudes against brightness, with the stated errors; and their ratio, with that of chance."""
    known = np.isfinite(stars["rms"]) & (np.asarray(stars["flux_ref"], float) > 0)
    flux = np.asarray(stars["flux_ref"], float)
    share, ratio = 1e3 * MAG_PER_SHARE / flux, np.asarray(stars["rms"] / stars["stated"])
    figure = Figure(figsize=(7.2, 6.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    order = np.flatnonzero(known)[np.argsort(flux[known])]
    top.plot(flux[order], (stars["stated"] * share)[order], "-", color="#009e73", lw=1, label="stated error")
    low, high = (np.sqrt(chi2.ppf(p, 4) / 4) for p in (0.025, 0.975))
    bottom.axhspan(low, high, color="#009e73", alpha=0.15, lw=0, label="95 % of constant stars, 5 epochs")
    for axes, y in ((top, stars["rms"] * share), (bottom, ratio)):
        axes.plot(flux[known], y[known], "o", ms=4, color="#0072b2", alpha=0.7, label="star")
        axes.plot(flux[chosen[1:]], y[chosen[1:]], "o", ms=9, mfc="none", color="#0072b2", label="ten brightest")
        axes.plot(flux[chosen[:1]], y[chosen[:1]], "*", ms=13, color="#d55e00", label="target")
        axes.set(xscale="log", yscale="log")
        axes.grid(alpha=0.3)
    bottom.axhline(1, color="k", lw=0.8, ls="--")
    top.set_ylabel("rms over the night (mmag)")
    bottom.set(xlabel="flux on the reference (ADU)", ylabel="rms / stated error")
    top.legend(frameon=False)
    bottom.legend(frameon=False, ncols=2, fontsize=8, loc="lower left")
    figure.savefig(path, dpi=110)


def rise_scatter(output: Path, *options: str) -> dict:
    """Scatter about the mean over stated error of the stars above 5000 ADU; a frame that is the reference left out."""
    code = gpudia(["run", str(DATA / "rise"), "--ra", str(TARGET[0]), "--dec", str(TARGET[1]), "--size", "500",
                   "--output", str(output), "--quiet", *options])
    epochs, curves = Table.read(output / "epochs.ecsv"), read_lightcurves(output)
    figures = {"exit": code, "frames_ok": int((epochs["status"] == "ok").sum()), "frames": len(epochs),
               "scale": [round(float(s), 4) for s in epochs["scale"]],
               "registration_rms": [round(float(s), 3) for s in epochs["registration_rms"]],
               "sky_excess": [round(float(s), 2) for s in epochs["sky_excess"]],
               "model_error": [round(float(s), 4) for s in epochs["model_error"]]}
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


def rise_pattern(_: Path) -> dict:
    """Structure of the sky that stays on the detector: mean of the two dithered frames against that of the others.

    Frames less their smooth sky, in detector coordinates, without stars, smoothed to 2 px; a shift is the control.
    """
    sky, good = {}, {}
    for path in sorted((DATA / "rise").glob("*.fits")):
        frame = fits.getdata(path).astype(float)[280:780, 280:780]
        middle = np.median(frame)
        rest = frame - gaussian_filter(np.where(np.abs(frame - middle) < 100, frame, middle), 20)
        good[path.stem] = ~(binary_dilation(rest > 80, iterations=6) | (np.abs(rest) > 150))
        sky[path.stem] = np.where(good[path.stem], rest, 0)
    dithered = [name for name in sky if name.endswith(("_1_11_1_1", "_1_1_1_1"))]
    groups = [dithered, [name for name in sky if name not in dithered]]
    use = np.logical_and.reduce(list(good.values()))
    weight = np.maximum(gaussian_filter(use.astype(float), 2), 0.3)
    first, other = (gaussian_filter(np.where(use, np.mean([sky[n] for n in names], axis=0), 0), 2) / weight
                    for names in groups)
    covariance = float(np.cov(first[use], other[use])[0, 1])
    return {"correlation": round(float(np.corrcoef(first[use], other[use])[0, 1]), 3),
            "of_a_shifted_one": round(float(np.corrcoef(first[use], np.roll(other, (37, 53), (0, 1))[use])[0, 1]), 3),
            "common_rms_percent_of_sky": round(100 * float(np.sqrt(covariance)) / 1000, 2)}


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
        save("real_frames", {f.__name__: f(folder / f.__name__) for f in (rise, rise_pattern, decam, eso085)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
