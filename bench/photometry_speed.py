"""PSF fluxes and aperture sums of many stars on many differences, against photutils; the ratio of times in one run.

    python bench/photometry_speed.py [--small]

photutils' forced PSF photometry (positions fixed, one flux free) works on one image after the other, so that one image
stands for all. Its errors count the pixels as uncorrelated; those of this library are exact: noise of image and
reference through the kernel, error of the kernel, leverage. Both use the same PSF and pixels.
"""

from __future__ import annotations

import sys
import time
import warnings
from functools import partial
from typing import Any

import numpy as np
from astropy.table import Table
from common import best_of, run_groups
from photutils.aperture import CircularAperture, aperture_photometry
from photutils.psf import ImagePSF, PSFPhotometry

from gpudia.model import evaluate_terms
from gpudia.photometry import EpochNoise, epoch_psf, forced_photometry, measure_apertures, moffat_psf
from gpudia.photometry.psf import shifted_psf

RADIUS, SIZE, KERNEL, AT_ONCE = 4.5, 17, 21, 10


class Field:
    """Differences with stars that vary, and what their noise is made of."""

    def __init__(self, n_stars: int, side: int, rng: np.random.Generator) -> None:
        self.shape, self.rng = (side, side), rng
        self.positions = rng.uniform(20, side - 21, (n_stars, 2))
        self.kernel = np.zeros((KERNEL, KERNEL))
        self.kernel[KERNEL // 2 - 5:KERNEL // 2 + 6, KERNEL // 2 - 5:KERNEL // 2 + 6] = 0.9 * moffat_psf(3.0, 11)
        self.psf = moffat_psf(3.5, 25)
        self.epoch_psf = epoch_psf(self.psf, self.kernel)
        self.flux = rng.normal(0, 3000, n_stars)
        self.signal = np.zeros(self.shape)
        half, centres = self.epoch_psf.shape[0] // 2, np.rint(self.positions).astype(int)
        padded = np.pad(self.signal, half)
        for (x, y), stamp, flux in zip(centres, shifted_psf(self.epoch_psf, self.positions - centres), self.flux,
                                       strict=True):
            padded[y:y + 2 * half + 1, x:x + 2 * half + 1] += flux * stamp
        self.signal = padded[half:-half, half:-half].astype(np.float32)
        self.reference = rng.normal(1000, 30, self.shape)
        y, x = np.indices((KERNEL, KERNEL)) - KERNEL // 2
        self.support = x**2 + y**2 <= (KERNEL / 2) ** 2
        n = int(self.support.sum()) + 3
        self.covariance = np.diag(np.full(n, 1e-13))
        self.fitted = np.ones(self.shape, bool)

    def images(self, count: int) -> tuple[Any, Any, Any, list[EpochNoise]]:
        """Differences, variances and flags (count, H, W), and the noise of each."""
        variance = np.full((count, *self.shape), 1000.0, np.float32)
        difference = self.rng.standard_normal((count, *self.shape), np.float32) * np.sqrt(variance) + self.signal
        noises = [EpochNoise(variance[i], self.kernel, variance[0] * 0.2, self.reference, self.covariance,
                             self.support, None, partial(evaluate_terms, 1, shape=self.shape), 0.0, self.fitted)
                  for i in range(count)]
        return difference, variance, np.zeros(difference.shape, np.uint8), noises


def by_photutils(field: Field, difference: Any, variance: Any, stars: slice) -> tuple[float, Any]:
    """Seconds and fluxes of photutils' forced PSF photometry."""
    model = ImagePSF(field.epoch_psf)
    model.x_0.fixed = model.y_0.fixed = True
    where = field.positions[stars]
    start = Table({"x": where[:, 0], "y": where[:, 1], "flux": np.full(len(where), 1000.0)})
    clock = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = PSFPhotometry(model, (SIZE, SIZE), aperture_radius=RADIUS)(difference, error=np.sqrt(variance),
                                                                           init_params=start)
    return time.perf_counter() - clock, np.asarray(found["flux_fit"])


def measure(small: bool) -> dict[str, Any]:
    """Figures of PSF fluxes and of aperture sums."""
    n_stars, n_epochs, side = (500, 20, 400) if small else (5000, 200, 1024)
    field = Field(n_stars, side, np.random.default_rng(1))
    seconds = {"psf": 0.0, "psf_and_aperture": 0.0}
    for _ in range(0, n_epochs, AT_ONCE):
        *planes, noises = field.images(AT_ONCE)
        for name, radius in (("psf", None), ("psf_and_aperture", RADIUS)):
            clock = time.perf_counter()
            found = forced_photometry(*planes, field.positions, field.psf, noises, radius=radius, stamp_size=SIZE)
            seconds[name] += time.perf_counter() - clock
    difference, variance, _ = (plane[-1] for plane in planes)
    some = slice(0, min(n_stars, 1000))
    other, fluxes = by_photutils(field, difference, variance, some)
    other *= n_stars / (some.stop - some.start)
    ours, error = found["psf"].flux[-1, some], found["psf"].error[-1, some]
    off = (np.abs(fluxes - ours) / error)[ours > 0]  # photutils' end at 0
    # like with like: pixel noise alone on both sides, all stars on one image
    own, _ = best_of(lambda: measure_apertures(difference, variance, None, field.positions, RADIUS))
    circles = CircularAperture(field.positions, RADIUS)
    batch_mode, _ = best_of(lambda: aperture_photometry(difference, circles, error=np.sqrt(variance)))
    each = n_stars * n_epochs / 1e6
    return {
        "stars": n_stars, "epochs": n_epochs, "kernel_size": KERNEL, "stamp": SIZE,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "microseconds_per_star_and_epoch": {name: round(value / each, 2) for name, value in seconds.items()},
        "photutils_psf_milliseconds_per_star": round(1e3 * other / n_stars, 3),
        "psf_times_faster": round(other * n_epochs / seconds["psf"], 1),
        "both_times_faster": round(other * n_epochs / seconds["psf_and_aperture"], 1),
        "flux_difference_over_error_where_positive": {
            f"{q} %": round(float(np.nanpercentile(off, q)), 4) for q in (50, 90, 99, 100)},
        "apertures_one_image": {"seconds": round(own, 4), "photutils_seconds": round(batch_mode, 4),
                                "photutils_over_ours": round(batch_mode / own, 2)},
    }


def main() -> int:
    """Print and keep the figures."""
    return run_groups(__doc__, "photometry", {"speed": measure}, {})


if __name__ == "__main__":
    sys.exit(main())
