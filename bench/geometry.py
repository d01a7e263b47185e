"""Shift or resample, what resampling does to the noise, and what a stack as reference is worth.

    python bench/geometry.py                 # everything, about ten minutes; GPUDIA_TEST_DATA for the real frames
    python bench/geometry.py rotation        # one group: rotation, correlation, stack or rise
    python bench/geometry.py --small         # small frames, prints only: does the bench itself still run?
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io.fits import Header
from common import RESULTS, run_groups
from real_frames import DATA, rise_scatter

import gpudia
from gpudia.backend import backend_of
from gpudia.config import RunConfig
from gpudia.flags import FRAME_FLAGS
from gpudia.images import Registration, make_frame, whole_frame
from gpudia.model import ReferencePlan, resample
from gpudia.photometry import measure_apertures
from gpudia.pipeline.prepare import place_batch, prepare
from gpudia.simulate import SimulationSettings, simulate_field, write_series

#: Ways to treat a frame that is turned: name, whether it is resampled, degree of the kernel.
WAYS = (("shift, degree 1", "never", 1), ("shift, degree 2", "never", 2), ("resampled, degree 1", "always", 1))


def rotation(small: bool) -> dict[str, Any]:
    """chi^2 per pixel and rms near bright stars of differences against the angle between frame and reference.

    The transformations are the true ones; the reference is a frame of the series, on which no cosmic rays fall.
    """
    side, epochs = (120, 3) if small else (300, 24)
    series = simulate_field(SimulationSettings(shape=(side, side), n_epochs=epochs, seed=11, rotation=0.5, dither=3.0,
                                               fwhm_range=(3.0, 4.5), cosmic_rays=0.0, n_variables=0,
                                               microlensing=False))
    first, region = series.reference, whole_frame((side, side))
    reference = _frame(first)
    rows = []
    for frame in series.frames:
        if frame is first:
            continue
        turn = np.degrees(np.arctan2(frame.transform[1, 0], frame.transform[0, 0]))
        row: dict[str, Any] = {"degrees": round(abs(float(turn)), 4),
                               "displacement": round(Registration(frame.transform).displacement(region), 3)}
        for name, how, degree in WAYS:
            config = RunConfig("-", "-", resample=how, spatial_degree=degree, background_degree=max(1, degree))
            ready = prepare(_frame(frame), Registration(frame.transform), region, config)
            placed = place_batch([ready], region.shape, backend_of(reference.data))
            plan = ReferencePlan(reference.data, 17, error=np.sqrt(reference.variance), mask=reference.mask != 0,
                                 spatial_degree=degree)
            stack = plan.subtract(placed.data, placed.error, placed.mask)
            row[name] = {"chi2": round(float(stack.chi2[0]), 3), "near_stars": _near_stars(series, stack)}
        rows.append(row)
    rows.sort(key=lambda row: row["displacement"])
    return {"side": side, "kernel": 17, "frames": rows}


def _frame(simulated: Any) -> Any:
    return make_frame(simulated.data, error=simulated.error, bits=simulated.mask, header=Header(simulated.header))


def _near_stars(series: Any, stack: Any, radius: int = 4, count: int = 20) -> float:
    """Median over the brightest stars that nothing masks of the rms of difference / sigma in a box around each."""
    flux = np.asarray(series.truth["flux"])[:, series.reference_index]
    pull = np.where(stack.mask[0], np.nan, stack.difference[0] / np.sqrt(stack.variance[0]))
    found: list[float] = []
    for i in np.argsort(-flux):
        x, y = round(float(series.truth["x"][i])), round(float(series.truth["y"][i]))
        box = pull[max(y - radius, 0):y + radius + 1, max(x - radius, 0):x + radius + 1]
        if box.size == (2 * radius + 1) ** 2 and np.isfinite(box).all():
            found.append(float(np.sqrt((box**2).mean())))
        if len(found) == count:
            break
    return round(float(np.median(found)), 3) if found else float("nan")


def correlation(small: bool) -> dict[str, Any]:
    """Scatter of pixels and of aperture sums in resampled noise, measured over what the variance planes predict."""
    side, draws = (60, 40) if small else (80, 600)
    rng, figures = np.random.default_rng(5), {}
    region = whole_frame((side, side))
    for degrees in (0.0, 0.3, 7.0):
        angle, half = np.radians(degrees), (side - 1) / 2
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        offset = np.array([half + 0.37, half - 0.21]) - turn @ (half, half)
        noise = rng.normal(size=(draws, side, side))
        unit, none = np.ones_like(noise), np.zeros(noise.shape, bool)
        out = resample(noise, unit, none, np.repeat(np.column_stack([turn, offset])[None], draws, 0), region.shape)
        inner = (slice(15, side - 15),) * 2
        sums, errors = [], []
        places = [(x, y) for x in range(20, side - 20, 9) for y in range(20, side - 20, 9)]
        for plane, variance in zip(out.data, out.source_variance, strict=True):
            measured = measure_apertures(plane, variance, None, places, 4.0)
            sums.append(measured.flux)
            errors.append(measured.error)
        pixel = out.data[(slice(None), *inner)]
        figures[f"{degrees} degrees"] = {
            "pixel_sigma": round(float(pixel.std()), 4),
            "pixel_predicted": round(float(np.sqrt(out.variance[(0, *inner)].mean())), 4),
            "neighbours_correlation": round(float((pixel[..., 1:] * pixel[..., :-1]).mean() / (pixel**2).mean()), 3),
            "aperture_sigma_over_predicted": round(float(np.std(sums) / np.mean(errors)), 4),
            "without_the_correlation": round(float(np.std(sums) / np.mean(errors) / np.sqrt(
                out.variance[(0, *inner)].mean() / out.source_variance[(0, *inner)].mean())), 4)}
    return figures


def stack(small: bool) -> dict[str, Any]:
    """Scatter of constant stars against a stack over that against one frame, and the ratio that the errors predict."""
    settings = SimulationSettings(shape=(160, 160) if small else (400, 400), n_epochs=6 if small else 24, seed=21,
                                  rotation=0.02, fwhm_range=(3.2, 4.2), n_variables=0, microlensing=False)
    with tempfile.TemporaryDirectory() as folder:
        write_series(simulate_field(settings), Path(folder) / "frames")
        runs = {name: gpudia.run(RunConfig(str(Path(folder) / "frames"), str(Path(folder) / name), reference=name,
                                           products=False, kernel_size=11 if small else 19))
                for name in ("auto", "stack")}
    one, many = runs["auto"].lightcurves, runs["stack"].lightcurves
    same = _same_stars(one.sources, many.sources)
    flags = np.asarray(one.epochs["flags"]) | np.asarray(many.epochs["flags"])
    alone = flags & (FRAME_FLAGS.is_reference | FRAME_FLAGS.in_reference) == 0
    planes = []
    for curves, stars in ((one, same[0]), (many, same[1])):
        flux, error, bad = (np.asarray(curves.planes[n], float)[alone][:, stars] for n in
                            ("FLUX_DIFF", "FLUX_DIFF_ERR", "FLAGS"))
        planes.append((np.where(bad == 0, flux, np.nan), error))
    (flux_one, error_one), (flux_many, error_many) = planes
    good = np.isfinite(flux_one) & np.isfinite(flux_many)
    brightness = np.asarray(one.sources["flux_ref"], float)[same[0]]
    faint = brightness < np.median(brightness)
    return {"frames_in_stack": int((np.asarray(many.epochs["flags"]) & FRAME_FLAGS.in_reference > 0).sum()),
            "epochs": int(alone.sum()), "all": _ratios(flux_one, flux_many, error_one, error_many, good),
            "faint_half": _ratios(flux_one, flux_many, error_one, error_many, good & faint),
            "pull_rms_single": _pull(flux_one, error_one), "pull_rms_stack": _pull(flux_many, error_many)}


def _same_stars(a: Any, b: Any) -> tuple[np.ndarray, np.ndarray]:
    from scipy.spatial import KDTree

    distance, index = KDTree(np.column_stack([b["x"], b["y"]])).query(np.column_stack([a["x"], a["y"]]))
    usable = (distance < 0.7) & (np.asarray(a["flux_ref"]) > 0)
    return np.flatnonzero(usable), index[usable]


def _ratios(f1: Any, f2: Any, e1: Any, e2: Any, good: Any) -> dict[str, Any]:
    """Rms against the stack over that against one frame, robust, with its error from 200 draws of the stars."""
    def ratio(stars: Any) -> float:
        # differences against one frame share its noise, star by star: the scatter is that about zero
        use = good[:, stars]
        squares = [np.median((f[:, stars] / e1[:, stars])[use] ** 2) for f in (f1, f2)]
        return float(np.sqrt(squares[1] / squares[0]))

    rng, n = np.random.default_rng(1), f1.shape[1]
    draws = [ratio(rng.integers(0, n, n)) for _ in range(200)]
    predicted = np.sqrt(np.median((e2[good] / e1[good]) ** 2))
    return {"measured": round(ratio(np.arange(n)), 3), "error": round(float(np.nanstd(draws)), 3),
            "predicted": round(float(predicted), 3), "values": int(good.sum())}


def _pull(flux: Any, error: Any) -> float:
    return round(float(np.sqrt(np.nanmedian((flux / error) ** 2) / 0.4549)), 3)


def rise(small: bool) -> dict[str, Any]:
    """Scatter over error of the bright stars of six real frames: shifted, resampled, and against a stack."""
    if small or not (DATA / "rise").is_dir():
        return {"skipped": "no real frames here; set GPUDIA_TEST_DATA" if not small else "--small"}
    cases = {"auto": (), "resampled": ("--resample", "always"), "shifted": ("--resample", "never"),
             "stack": ("--reference", "stack")}
    with tempfile.TemporaryDirectory() as folder:
        return {name: rise_scatter(Path(folder) / name, *options) for name, options in cases.items()}


def draw(figures: dict[str, Any]) -> None:
    """chi^2 and rms near stars against the largest displacement that a shift leaves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    page, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharex=True)
    x = [row["displacement"] for row in figures["frames"]]
    for (name, _, _), colour in zip(WAYS, ("#1f5f99", "#2a9d4b", "#c8553d"), strict=True):
        for axis, key in zip(axes, ("chi2", "near_stars"), strict=True):
            axis.plot(x, [row[name][key] for row in figures["frames"]], "o-", ms=4, color=colour, label=name)
    for axis, label in zip(axes, ("chi^2 per pixel", "rms near bright stars, sigma"), strict=True):
        axis.axhline(1.0, color="#999999", lw=1, ls="--")
        axis.set(xlabel="largest displacement that a shift leaves, px", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    page.savefig(RESULTS / "rotation.png", dpi=110)


def main() -> int:
    """Run the groups asked for; print and keep the figures."""
    known = {"rotation": rotation, "correlation": correlation, "stack": stack, "rise": rise}
    return run_groups(__doc__, "geometry", known, {"rotation": draw})


if __name__ == "__main__":
    sys.exit(main())
