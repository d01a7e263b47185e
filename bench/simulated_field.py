"""Photometric scale and chi^2 on the simulated crowded field, degree 1 with a PSF that varies over the frame.

    python bench/simulated_field.py

Several fields of constant stars, seeing 3 to 4.2 px, individual skies and transparencies, cosmic rays of which a third
are in no mask, a reference a hundred times deeper than the images. The kernel is wide enough that the wings of the PSF
left outside are below the figure asked for.
"""

from __future__ import annotations

import sys

import numpy as np
from astropy.io.fits import Header
from common import save

from gpudia import ReferencePlan
from gpudia.images import flag_defects, make_frame
from gpudia.simulate import SimulationSettings, simulate_field

SIDE, K, EPOCHS, SEEDS = 400, 31, 6, (1, 2, 3, 4)


def one_field(seed: int):
    """Relative bias of the scale, its error and chi^2 of each epoch."""
    series = simulate_field(SimulationSettings(
        shape=(SIDE, SIDE), n_epochs=EPOCHS, seed=seed, rotation=0.0, dither=0.0, n_variables=0, microlensing=False,
        fwhm_range=(3.0, 4.2), reference_depth=100))
    reference = series.reference
    frames = [f for f in series.frames if f is not reference]
    plan = ReferencePlan(reference.data, K, error=reference.error, mask=reference.mask != 0, spatial_degree=1,
                         background_degree=1, support="circle", covariance="shared")
    masks = [flag_defects(_frame(f), f.fwhm).mask != 0 for f in frames]
    stack = plan.subtract([f.data for f in frames], [f.error for f in frames], masks)
    truth = np.array([f.scale for f in frames])
    return stack.scale / truth - 1, stack.scale_error / truth, stack.chi2


def _frame(f):
    return make_frame(f.data, error=f.error, bits=f.mask, header=Header({"GAIN": f.gain}))


def main() -> int:
    """Print and keep the figures."""
    bias, error, chi2 = (np.concatenate(values) for values in zip(*map(one_field, SEEDS), strict=True))
    weight = 1 / error**2
    mean = float((weight * bias).sum() / weight.sum())
    save("simulated_field", {
        "epochs": len(bias), "mean_bias_percent": round(100 * mean, 3),
        "error_of_the_mean_percent": round(100 / float(np.sqrt(weight.sum())), 3),
        "median_error_of_one_epoch_percent": round(100 * float(np.median(error)), 3),
        "pull_rms": round(float(np.sqrt(np.mean((bias / error) ** 2))), 2),
        "chi2_mean": round(float(chi2.mean()), 4), "chi2_range": [round(float(v), 4) for v in (chi2.min(), chi2.max())],
    })
    return 0


if __name__ == "__main__":
    sys.exit(main())
