"""PSF of a frame and fluxes of all its stars on simulated crowded fields, against the truth.

    python bench/psf_accuracy.py [psf] [fluxes] [--small]

psf: relative error of PSF fluxes of stars all over the field (rms over 100 places, against the true PSF on the stamp)
for fields of several kinds, one exposure and the mean of 20. fluxes: stars above S/N 50 measured one by one and all at
the same time (`crowded_photometry`), relative to the true flux. The stars are those that are found on the frame.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from astropy.io.fits import Header
from common import run_groups
from scipy.spatial import cKDTree

from gpudia.images import detect_stars, make_frame, sky_and_noise
from gpudia.photometry import Psf, crowded_photometry, empirical_psf, measure_apertures, psf_photometry
from gpudia.photometry.psf import shifted_psf
from gpudia.simulate import SimulatedFrame, SimulationSettings, simulate_field

SIDE, SEEDS = 400, (1, 2, 3, 4, 5)
FIELDS: dict[str, dict[str, Any]] = {
    "constant": {"psf_variation": 0.0}, "varying": {}, "varying_15_percent": {"psf_variation": 0.15},
    "fwhm_5": {"fwhm_range": (5.0, 5.0)}, "star_for_30_px": {"star_density": 1 / 30},
    "star_for_800_px": {"star_density": 1 / 800}, "beta_2.5": {"beta": 2.5},
    "fwhm_1.5": {"fwhm_range": (1.5, 1.5), "psf_variation": 0.0},
}


def main() -> int:
    """Print and keep the figures."""
    return run_groups(__doc__, "psf_accuracy", {"psf": psf_errors, "fluxes": flux_errors}, {})


def psf_errors(small: bool) -> dict[str, Any]:
    """Errors by kind of field and depth, per cent, one a seed."""
    figures = {}
    for name, changes in list(FIELDS.items())[:2 if small else None]:
        for depth in (1, 20):
            errors, varying = [], 0
            for seed in SEEDS[:1 if small else None]:
                frame, image, positions, fwhm, _ = _field(seed, depth, small, changes)
                psf = _psf(frame, image, positions, fwhm)
                varying += psf.varies
                errors.append(round(100 * float(np.sqrt(np.mean(_errors(psf, frame) ** 2))), 2))
            figures[f"{name}, {depth} exposures"] = {"rms_percent": errors, "found_varying": varying}
    return figures


def flux_errors(small: bool) -> dict[str, Any]:
    """Error of fluxes of stars above S/N 50: bias and half the 16 to 84 per cent range, per cent."""
    found: dict[str, list[np.ndarray]] = {}
    for seed in SEEDS[:1 if small else None]:
        frame, image, positions, fwhm, truth = _field(seed, 20, small, {})
        psf, radius = _psf(frame, image, positions, fwhm), 1.2 * frame.fwhm
        at, arguments = psf.at(positions), (image, frame.variance, frame.mask, positions)
        joint = crowded_photometry(*arguments, psf, radius, one_place=frame.fwhm / 2)
        more = crowded_photometry(*arguments, psf, radius, one_place=frame.fwhm / 2, search=True)
        alone = {"ap": measure_apertures(*arguments, radius, psf=at, max_masked_fraction=0.2),
                 "psf": psf_photometry(*arguments, at)}
        bright = np.isfinite(joint.psf.flux) & (truth > 50 * joint.psf.error)
        for name, fluxes in {"ap_alone": alone["ap"], "psf_alone": alone["psf"], "ap_joint": joint.aperture,
                             "psf_joint": joint.psf, "ap_joint_search": more.aperture,
                             "psf_joint_search": more.psf}.items():
            found.setdefault(name, []).append((fluxes.flux / truth - 1)[bright])
    figures: dict[str, Any] = {}
    for name, parts in found.items():
        low, middle, high = np.nanpercentile(np.concatenate(parts), (15.87, 50, 84.13))
        figures[name] = {"median_percent": round(100 * float(middle), 2), "width_percent":
                         round(50 * float(high - low), 2), "stars": len(np.concatenate(parts))}
    return figures


def _field(seed: int, depth: float, small: bool,
           changes: dict[str, Any]) -> tuple[SimulatedFrame, np.ndarray, np.ndarray, float, np.ndarray]:
    """A frame, the same without its sky, the stars found on it, their FWHM, the true flux of the brightest at each."""
    side = 200 if small else SIDE
    series = simulate_field(SimulationSettings(
        **({"shape": (side, side), "n_epochs": 1, "seed": seed, "fwhm_range": (3.5, 3.5), "reference_depth": depth}
           | changes)))
    frame = series.reference
    header = Header({"GAIN": frame.gain})
    stars = detect_stars(make_frame(frame.data, error=np.sqrt(frame.variance), bits=frame.mask, header=header))
    positions = np.column_stack([stars["x"], stars["y"]])
    image = frame.data - sky_and_noise(frame.data, frame.mask != 0)[0]
    flux = np.asarray(series.truth["flux"])[:, frame.index] * frame.transparency
    places = np.column_stack([series.truth["x"], series.truth["y"]])
    near = cKDTree(places).query_ball_point(positions, frame.fwhm / 2)
    fwhm = float(np.median(stars["fwhm"][:50]))
    return frame, image, positions, fwhm, np.array([flux[some].max() if some else np.nan for some in near])


def _psf(frame: SimulatedFrame, image: np.ndarray, positions: np.ndarray, fwhm: float) -> Psf:
    return empirical_psf(image, frame.variance, frame.mask, positions, fwhm)


def _errors(psf: Psf, frame: SimulatedFrame) -> np.ndarray:
    size, (height, width) = psf.stamp.shape[0], frame.data.shape
    places = np.random.default_rng(0).uniform(20, [width - 21, height - 21], (100, 2))
    phi = shifted_psf(psf.at(places), places - np.rint(places))
    true = np.stack([frame.psf(x, y, size) for x, y in places])
    return (phi * true).sum(axis=(1, 2)) / (phi**2).sum(axis=(1, 2)) / true.sum(axis=(1, 2)).mean() - 1


if __name__ == "__main__":
    sys.exit(main())
