"""What came back of injected stars: fluxes against the truth, pulls, bias and where it comes from, completeness."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.table import Table, vstack
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from gpudia.flags import SOURCE_FLAGS
from gpudia.images import write_table
from gpudia.model import evaluate_terms
from gpudia.photometry import Psf, aperture_correction, epoch_psf
from gpudia.pipeline.outputs import RunResult

__all__ = ["Recovery", "recover"]

Float = NDArray[np.float64]
METHODS = ("ap", "psf")
_NAMES = {"ap": "aperture", "psf": "PSF"}
#: Bins of magnitude, of equal numbers of measurements.
_BINS = 8


@dataclass(frozen=True)
class Recovery:
    """What came back.

    Attributes
    ----------
    output : Path
        The folder.
    run : RunResult
        Of the frames with the injected stars.
    epochs : Table
        One row for each star and epoch; ``injection_epochs.ecsv``.
    bins : Table
        By magnitude; ``injection.ecsv``.
    """

    output: Path
    run: RunResult
    epochs: Table
    bins: Table

    def totals(self, method: str) -> dict[str, float]:
        """Bias and pulls, with the part of the PSF and without, over all measurements by one method, "ap" or "psf"."""
        return _statistics(self.epochs, method)

    def magnitude_at(self, completeness: float) -> float:
        """Magnitude of a change of flux at which this share of the stars is detected; NaN where no bin tells."""
        share, mag = np.asarray(self.bins["detected"]), np.asarray(self.bins["mag"])
        for k in range(len(mag) - 1):
            if share[k] >= completeness > share[k + 1]:
                return float(np.interp(-completeness, -share[k:k + 2], mag[k:k + 2]))
        return math.nan

    def summary(self) -> str:
        """Return what a person wants to know in ten seconds."""
        table, images = self.epochs, len(set(self.epochs["image"]))
        lines = [f"{len(set(table['id']))} stars ({table.meta['shape']}) injected into {images} frames beside the "
                 f"reference; {int(table['usable'].sum())} of {len(table)} fluxes measured"]
        for method in METHODS:
            t = self.totals(method)
            left = 100 * (t["bias"] - t["psf_part"])
            lines.append(f"{_NAMES[method]} fluxes: bias {100 * t['bias']:+.2f} +- {100 * t['bias_err']:.2f} % (PSF "
                         f"{100 * t['psf_part']:+.2f}, left {left:+.2f}); pulls {t['pull_mean']:+.2f} +- "
                         f"{t['pull_mean_err']:.2f}, width {t['pull_width']:.2f} +- {t['pull_width_err']:.2f} "
                         f"({t['pull_left_width']:.2f} without the part of the PSF)")
        there = np.asarray(table["usable"]) & (np.asarray(table["expected"]) != 0)
        detected = np.asarray(table["detected"]) & there
        at = ", ".join(f"{100 * share:.0f} % at {mag:.2f}" for share in (0.9, 0.5)
                       if math.isfinite(mag := self.magnitude_at(share)))
        lines.append(f"blind detection above {table.meta['threshold']:g} sigma: {int(detected.sum())} of "
                     f"{int(there.sum())}" + (f"; {at} (-2.5 log10 of ADU of the reference)" if at else ""))
        return "\n".join([*lines, f"plot: {self.output / 'injection.png'}"])


def recover(output: Path, result: RunResult, exposures: Sequence[Any], ids: NDArray, places: Float,
            truth: dict[str, Float], shape: str, threshold: float) -> Recovery:
    """Compare what a run measured at the injected stars with what was put in, and write the tables.

    Parameters
    ----------
    output : Path
        Folder of the tables.
    shape, threshold : str, float
        The light curve, and the significance of a detection.
    result : RunResult
    exposures : sequence of Exposure
    ids, places : (S,), (S, 2)
        Source ids and positions in the reference frame.
    truth : dict
        ``amplitude`` and ``baseline`` (S,), ADU of the reference; ``light`` (E, S), ADU of the frame.
    """
    at = {str(name): k for k, name in enumerate(result.lightcurves.epochs["name"])}
    columns = {int(number): k for k, number in enumerate(result.lightcurves.sources["source_id"])}
    rows = np.array([columns[int(number)] for number in ids])
    detections = Table.read(result.output / "detections.ecsv")
    fwhm = {str(row["name"]): float(row["fwhm"]) for row in result.epochs}
    reference = next(one for one in exposures if one.is_reference)
    parts = []
    for one, light in zip(exposures, truth["light"], strict=True):
        if one.name in at and not one.is_reference:
            part = _epoch(result, one, reference, places, light, truth["baseline"])
            _add_measured(part, result, at[one.name], rows)
            found = detections[detections["image"] == one.name]
            part["score"] = _matched(found, places, np.asarray(part["expected"]), fwhm[one.name])
            part["detected"] = np.isfinite(part["score"])
            part.add_columns([ids, places[:, 0], places[:, 1], truth["amplitude"]],
                             names=["id", "x", "y", "amplitude"], indexes=[0, 0, 0, 0])
            parts.append(part)
    table = vstack(parts)
    table.meta = {"shape": shape, "threshold": threshold, "reference": reference.name}
    for name, text in _ABOUT.items():
        table[name].description = text
    bins = _by_magnitude(table)
    bins.meta = dict(table.meta)
    write_table(table, output / "injection_epochs.ecsv")
    write_table(bins, output / "injection.ecsv")
    return Recovery(output, result, table, bins)


_ABOUT = {
    "amplitude": "change of flux that was asked for, ADU of the reference",
    "expected": "injected flux over the scale at that place, less what was put into the reference",
    "ap": "difference flux by aperture", "psf": "difference flux by PSF",
    "ap_psf_part": "what the aperture flux is off by, as the PSF of the photometry is not that of the injection",
    "psf_psf_part": "the same for the PSF flux", "score": "of the detection within a FWHM; NaN: none",
    "usable": "measured by both, and not saturated",
}


def _epoch(result: RunResult, one: Any, reference: Any, places: Float, light: Float, baseline: Float) -> Table:
    """Truth of one frame, and what the difference of the PSFs does to the fluxes."""
    with fits.open(result.output / "reference.fits", memmap=False) as hdus:
        header, terms = hdus[0].header, np.asarray(hdus["PSF_TERMS"].data if "PSF_TERMS" in hdus else
                                                   hdus["PSF"].data[None], float)
        own = Psf(terms, header["PSFKIND"], header["PSFSTARS"], hdus["IMAGE"].shape)
    with fits.open(result.output / "difference" / f"{one.name}.fits", memmap=False) as hdus:
        terms = np.asarray(hdus["KERNELS"].data if "KERNELS" in hdus else hdus["KERNEL"].data[None], float)
        shape = hdus["DIFF"].shape
    degree = round((math.sqrt(8 * len(terms) + 1) - 3) / 2)
    xy = places - (header["X0"], header["Y0"])
    kernels = np.tensordot(evaluate_terms(degree, *xy.T, shape), terms, axes=1)
    injected = light / kernels.sum(axis=(1, 2))
    table = Table({"image": [one.name] * len(places), "mjd": [one.mjd] * len(places), "expected": injected - baseline})
    phi, moved = epoch_psf(own.at(xy), kernels), epoch_psf(reference.psf_at(places), kernels)
    turned = (one.registration.orientation() != np.eye(2)).any()
    for method in METHODS:
        of_image, of_reference = (_excess(star, phi, method, header["APRADIUS"])
                                  for star in (one.psf_at(places), moved))
        part = injected * of_image - baseline * of_reference
        table[f"{method}_psf_part"] = np.nan if turned else part
    return table


def _excess(star: Float, phi: Float, method: str, radius: float) -> Float:
    """Relative error of a flux that is measured with phi when the star's PSF is another one, (S,)."""
    star = np.broadcast_to(star, (len(phi), *star.shape[-2:]))
    if method == "ap":
        return np.array([float(aperture_correction(a, radius)) / float(aperture_correction(b, radius)) - 1
                         for a, b in zip(star, phi, strict=True)])
    size = max(star.shape[-1], phi.shape[-1])
    star, phi = (np.pad(p, ((0, 0), *2 * [((size - p.shape[-1]) // 2,) * 2])) for p in (star, phi))
    return (star * phi).sum(axis=(1, 2)) / (phi**2).sum(axis=(1, 2)) - 1


def _add_measured(part: Table, result: RunResult, epoch: int, rows: NDArray) -> None:
    planes, good = result.lightcurves.planes, np.ones(len(part), bool)
    for method in METHODS:
        flux, error = (np.asarray(planes[f"{name}_{method.upper()}"][epoch][rows], float)
                       for name in ("FLUX_DIFF", "FLUX_DIFF_ERR"))
        flags = np.asarray(planes[f"FLAGS_{method.upper()}"][epoch][rows])
        part[method], part[f"{method}_err"], part[f"{method}_flags"] = flux, error, flags
        # fluxes with some masked pixels are quoted as well: they have to be right, too
        good &= np.isfinite(flux) & (error > 0) & ((flags & (SOURCE_FLAGS.saturated | SOURCE_FLAGS.outside)) == 0)
    part["usable"] = good


def _matched(found: Table, places: Float, expected: Float, fwhm: float) -> Float:
    """Score of the most significant detection of the right sign within a FWHM of each place; NaN: there is none."""
    score = np.full(len(places), np.nan)
    if not len(found):
        return score
    xy, heights = np.column_stack([found["x"], found["y"]]), np.asarray(found["score"], float)
    for k, near in enumerate(cKDTree(xy).query_ball_point(places, fwhm)):
        right = [heights[j] for j in near if heights[j] * expected[k] > 0]
        score[k] = max(right, key=abs) if right else np.nan
    return score


def _statistics(table: Table, method: str) -> dict[str, float]:
    """Bias and pulls; errors from the scatter from star to star: the epochs of a star share the reference's noise."""
    table = table[np.asarray(table["usable"], bool)]
    expected, flux, error, part = (np.asarray(table[name], float) for name in (
        "expected", method, f"{method}_err", f"{method}_psf_part"))
    pulls, weight = (flux - expected) / error, expected / error**2
    total = float((weight * expected).sum())
    if len(table) < 2 or total <= 0:
        return dict.fromkeys(("bias", "bias_err", "psf_part", "pull_mean", "pull_mean_err", "pull_width",
                              "pull_width_err", "pull_left_width", "n"), math.nan) | {"n": len(table)}
    bias, mean = float((weight * (flux - expected)).sum()) / total, float(pulls.mean())
    _, star = np.unique(np.asarray(table["id"]), return_inverse=True)
    bias_err, mean_err = (float(np.sqrt((np.bincount(star, values) ** 2).sum())) for values in (
        weight * (flux - expected - bias * expected) / total, (pulls - mean) / len(pulls)))
    width = _width(pulls)
    return {"n": len(table), "bias": bias, "bias_err": bias_err, "psf_part": float((weight * part).sum()) / total,
            "pull_mean": mean, "pull_mean_err": mean_err, "pull_width": width,
            "pull_width_err": 1.2 * width / math.sqrt(2 * len(table)), "pull_left_width": _width(pulls - part / error)}


def _width(pulls: Float) -> float:
    """Half of what the middle 68 % span."""
    low, high = np.percentile(pulls, (15.865, 84.135))
    return float(high - low) / 2


def _by_magnitude(table: Table) -> Table:
    """The statistics of each bin of magnitude of the change, the brightest first."""
    table = table[np.asarray(table["usable"], bool) & (np.asarray(table["expected"]) != 0)]
    mag = -2.5 * np.log10(np.abs(np.asarray(table["expected"], float)))
    order = np.argsort(mag, kind="stable")
    rows = []
    for k in np.array_split(order, min(_BINS, max(1, len(order) // 8))):
        if not len(k):
            continue
        some, share = table[k], float(np.mean(table["detected"][k]))
        row = {"mag": float(mag[k].mean()), "mag_low": float(mag[k].min()), "mag_high": float(mag[k].max()),
               "n": len(k), "snr": float(np.median(np.abs(some["expected"]) / some["psf_err"])), "detected": share,
               "detected_err": math.sqrt(max(share * (1 - share), 0.25 / len(k)) / len(k))}
        for method in METHODS:
            row |= {f"{method}_{name}": value for name, value in _statistics(some, method).items() if name != "n"}
        rows.append(row)
    return Table(rows=rows)
