"""Fluxes against the truth: pulls by magnitude, scatter against the Cramer-Rao bound, photometric scales.

    python bench/photometry.py [single constant stack resampled] [--small]

Simulated series (40 epochs, crowded, PSF that varies over the field, seeing 3 to 6 px, skies and transparencies of
their own) go through `gpudia.run` as files. Pulls are flux_diff over its stated error, of constant stars, without any
subtraction of means. Scatter is that of (flux - truth) about its mean over the epochs (the error of the reference's
flux is common to all and kept apart), over the bound for a known PSF, position, sky and neighbours in that image.
"""

from __future__ import annotations

import math
import sys
import tempfile
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from astropy.io import fits
from common import RESULTS, run_groups
from scipy.spatial import cKDTree
from scipy.stats import median_abs_deviation

import gpudia
from gpudia.flags import FRAME_FLAGS, SOURCE_FLAGS
from gpudia.simulate import SimulatedSeries, SimulationSettings, simulate_field, write_series

BINS = (15.0, 16.0, 17.0, 18.0, 19.0)
SEEDS = (1, 2, 3, 4, 5)
FIELD = {"shape": (400, 400), "n_epochs": 40, "n_variables": 12, "saturation": math.inf}
#: A star is one of the truth that the reference's list has within this distance, pixels.
SAME = 0.7
#: Constant stars nearer than this to a variable one see its light, pixels.
BESIDE = 12.0


def measure(small: bool, field: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """Figures of a run with these settings, over several simulated skies."""
    parts = [one_series(seed, small, field or {}, settings) for seed in (SEEDS[:1] if small else SEEDS)]
    pulls: dict[str, Any] = {}
    for method in ("ap", "psf"):
        pulls[method] = {}
        for low, high in pairwise(BINS):
            found = np.concatenate([p["pulls"][method][:, (p["mag"] >= low) & (p["mag"] < high)].ravel()
                                    for p in parts])
            n = sum(int(((p["mag"] >= low) & (p["mag"] < high)).sum()) for p in parts)
            pulls[method][f"{low:g}-{high:g}"] = {"stars": n, **described(found)}
    scale = np.concatenate([p["scale"] for p in parts])
    return {"settings": {**settings, **(field or {}), "seeds": len(parts)}, "runs": [p["run"] for p in parts],
            "pulls": pulls, "scatter_over_bound": {m: joined([p["scatter"][m] for p in parts]) for m in ("ap", "psf")},
            "scale_pull": described(scale), "variables": {m: joined([p["variables"][m] for p in parts])
                                                          for m in ("ap", "psf")}}


def described(pulls: np.ndarray) -> dict[str, float]:
    """Mean and width of pulls: standard deviation, and the robust one."""
    pulls = pulls[np.isfinite(pulls)]
    if not len(pulls):
        return {"n": 0}
    return {"n": len(pulls), "mean": rounded(pulls.mean()), "std": rounded(pulls.std()),
            "mad_std": rounded(median_abs_deviation(pulls, scale="normal")),
            "beyond_4_sigma": int((np.abs(pulls) > 4).sum())}


def joined(parts: list[np.ndarray]) -> dict[str, float]:
    """Median and quartiles."""
    values = np.concatenate(parts)
    values = values[np.isfinite(values)]
    low, middle, high = np.percentile(values, [25, 50, 75]) if len(values) else [math.nan] * 3
    return {"stars": len(values), "median": rounded(middle), "quartiles": [rounded(low), rounded(high)]}


def rounded(value: float) -> float:
    return round(float(value), 4)


def one_series(seed: int, small: bool, field: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Simulate, run and compare one series."""
    smaller = {"shape": (200, 200), "n_epochs": 12} if small else {}
    series = simulate_field(SimulationSettings(seed=seed, **(FIELD | field | smaller)))
    with tempfile.TemporaryDirectory() as folder:
        write_series(series, f"{folder}/frames")
        target = series.truth[0]
        result = gpudia.run(gpudia.RunConfig(
            frames=f"{folder}/frames", output=f"{folder}/out", ra=float(target["ra"]), dec=float(target["dec"]),
            size=min(series.settings.shape), products=False, find_defects=True, **settings))
        with fits.open(f"{folder}/out/reference.fits") as hdus:
            cards = dict(hdus[0].header)
    return compared(series, result, cards)


def compared(series: SimulatedSeries, result: Any, cards: dict[str, Any]) -> dict[str, Any]:
    """Pulls, scatter over the bound and scales of one run."""
    curves = result.lightcurves
    epochs, stars = curves.epochs, curves.sources
    names = [frame.name for frame in series.frames]
    which = np.array([names.index(str(name)) for name in epochs["name"]])
    # a stack has the flux unit and the grid of its best frame
    reference = series.frames[names.index(cards["FRAME000"])]
    unit, truth = reference.transparency, series.truth
    lit = np.flatnonzero(np.asarray(truth["mag"]) < 21.5)
    places = np.column_stack(reference.position(truth["x"], truth["y"]))[lit]
    distance, nearest = cKDTree(places).query(np.column_stack([stars["x"], stars["y"]]))
    star = lit[nearest]
    constant = np.asarray(truth["kind"])[star] == "constant"
    known = distance < SAME
    usable = (np.asarray(stars["flags"]) & SOURCE_FLAGS.saturated) == 0
    own = (np.asarray(epochs["flags"]) & FRAME_FLAGS.is_reference) != 0
    flux = np.asarray(truth["flux"])[star][:, which].T * unit  # (epochs, stars), ADU of the reference
    true_scale = np.array([series.frames[e].transparency for e in which]) / unit
    bound = np.array([[series.cramer_rao(int(s), int(e)) for s in star] for e in which]) / true_scale[:, None]
    varying = cKDTree(places[np.asarray(truth["kind"])[lit] != "constant"])
    alone = varying.query(np.column_stack([stars["x"], stars["y"]]))[0] > BESIDE
    good = known & usable & (alone | ~constant)
    found: dict[str, Any] = {"mag": np.asarray(truth["mag"])[star][good & constant], "pulls": {}, "scatter": {},
                             "variables": {}}
    for method in ("ap", "psf"):
        planes = curves.planes
        difference, error = planes[f"FLUX_DIFF_{method.upper()}"], planes[f"FLUX_DIFF_ERR_{method.upper()}"]
        difference = np.where(own[:, None], np.nan, difference)
        found["pulls"][method] = (difference / error)[:, good & constant]
        rest = difference - flux
        with np.errstate(all="ignore"):
            weight = np.where(np.isfinite(rest), 1 / bound**2, 0.0)
            rest = rest - np.nansum(weight * rest, axis=0) / weight.sum(axis=0)
            n = np.isfinite(rest).sum(axis=0)
            ratio = np.sqrt(np.nansum((rest / bound) ** 2, axis=0) / np.where(n > 1, n - 1, np.nan))
        mag = np.asarray(truth["mag"])[star]
        found["scatter"][method] = ratio[good & (mag < 19)]
        found["variables"][method] = ratio[good & ~constant]
    ratio = (np.asarray(epochs["scale"]) / true_scale)[~own]
    found["scale"] = (ratio - 1) * (true_scale / np.asarray(epochs["scale_err"]))[~own]
    found["run"] = {"ok": result.n_ok, "stars": len(stars), "psf": cards["PSFKIND"],
                    "recommended": str(result.target["method"][0]), "in_reference": cards["NCOMBINE"],
                    "resampled": int(((np.asarray(epochs["flags"]) & FRAME_FLAGS.resampled) != 0).sum()),
                    "chi2": rounded(np.median(epochs["chi2"])),
                    "scale_over_truth": [rounded(ratio.mean()), rounded(ratio.std())]}
    return found


def draw(figures: dict[str, Any], name: str) -> None:
    """Plot the pulls' mean and width by magnitude."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharex=True)
    middles = [(low + high) / 2 for low, high in pairwise(BINS)]
    for i, (method, label) in enumerate((("ap", "aperture"), ("psf", "PSF"))):
        bins = list(figures["pulls"][method].values())
        places = [m + 0.08 * (i - 0.5) for m, b in zip(middles, bins, strict=True) if b["n"]]
        bins = [b for b in bins if b["n"]]
        errors = [[1 / math.sqrt(2 * b["n"]) for b in bins], [1 / math.sqrt(b["n"]) for b in bins]]
        for axis, key, error in zip(axes, ("std", "mean"), errors, strict=True):
            axis.errorbar(places, [b[key] for b in bins], error, fmt="os"[i], label=label, capsize=3)
    for axis, title, middle, width in zip(axes, ("width of the pulls", "mean of the pulls"), (1, 0), (0.05, 0.1),
                                          strict=True):
        axis.axhspan(middle - width, middle + width, color="0.9")
        axis.axhline(middle, color="0.5", lw=1)
        axis.set(xlabel="magnitude of constant stars", title=title, ylim=(middle - 0.35, middle + 0.35))
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(RESULTS / f"photometry_{name}.png", dpi=110)


#: Series and settings by name: everything that changes how the noise gets into the fluxes.
GROUPS: dict[str, dict[str, Any]] = {
    "single": {"reference": "auto", "spatial_degree": 1},
    "constant": {"reference": "stack", "spatial_degree": 0, "field": {"psf_variation": 0.0}},
    "stack": {"reference": "stack", "spatial_degree": 1},
    "resampled": {"reference": "stack", "spatial_degree": 1, "resample": "always"},
}


def main() -> int:
    """Print and keep the figures."""
    groups = {name: partial(measure, **settings) for name, settings in GROUPS.items()}
    return run_groups(__doc__, "photometry", groups, {name: partial(draw, name=name) for name in groups})


if __name__ == "__main__":
    sys.exit(main())
