"""The stated errors of photometric scales are those that scales scatter by."""

import math

import numpy as np
import pytest
from astropy.io import fits
from conftest import star_field

import gpudia
from gpudia.backend import to_device, to_host
from gpudia.model import ReferencePlan, resample
from gpudia.simulate import SimulationSettings, simulate_field, write_series


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_scales_of_resampled_images_scatter_as_is_stated(backend, shift):
    """200 draws of noise: their standard deviation is known to 5 %; pixels that share noise to be counted as such."""
    shape, draws = (70, 80), 200
    reference = star_field(shape, seed=3, density=40)
    clean = 0.8 * star_field(shape, seed=3, density=40, fwhm=3.4, shift=(shift, shift)) + 50.0
    variance = np.broadcast_to(clean / 2.0 + 30.0, (draws, *shape))
    images = clean + np.random.default_rng(5).normal(size=variance.shape) * np.sqrt(variance)
    map_back = np.tile([[1.0, 0.0, shift], [0.0, 1.0, shift]], (draws, 1, 1))
    placed = resample(*(to_device(a, backend) for a in (images, variance.copy(), np.zeros(images.shape, bool))),
                      map_back, shape)
    plan = ReferencePlan(to_device(reference, backend), 7)
    stack = plan.subtract(placed.data, placed.variance**0.5, placed.mask)
    counted = stack.with_noise_ratio(placed.source_variance / placed.variance)
    pulls = [to_host((s.scale - s.scale.mean()) / s.scale_error).std() for s in (stack, counted)]
    # half a pixel's shift by Lanczos-3 leaves 0.63 of the variance of a pixel, and all of that of wide sums
    assert pulls[1] == pytest.approx(1.0, abs=0.15)
    assert (pulls[0] > 1.15) == (shift > 0)


def test_scales_against_a_stack_are_off_the_best_frames_unit_by_what_is_stated(tmp_path):
    """Stacks of two of five frames, whose scales have an error in common, that of the better one's own noise.

    Without it they are off by 1.44 of the stated errors (rms). Six such errors, and four more of each field, tell the
    rms to a sixth.
    """
    pulls = []
    for seed in range(6):
        series = simulate_field(SimulationSettings(
            seed=seed, shape=(110, 110), n_epochs=5, fwhm_range=(3.0, 3.3), transparency_range=(0.9, 1.0),
            sky_range=(800.0, 1000.0), sky_gradient=0.0, star_density=0.02, mag_range=(16.0, 21.0), psf_variation=0.0,
            ellipticity=0.0, rotation=0.0, n_variables=0, microlensing=False, cosmic_rays=0.0, bad_pixels=0.0,
            bad_columns=0.0, saturation=math.inf))
        write_series(series, tmp_path / f"frames{seed}")
        output = tmp_path / f"out{seed}"
        epochs = gpudia.run(gpudia.RunConfig(frames=tmp_path / f"frames{seed}", output=output, reference="stack",
                                             stack_size=2, spatial_degree=0, kernel_size=9, products=False)).epochs
        truth = {frame.name: frame.transparency for frame in series.frames}
        best = fits.getheader(output / "reference.fits")["FRAME000"]
        others = epochs[epochs["name"] != best]
        expected = np.array([truth[name] / truth[best] for name in others["name"]])
        pulls.append((np.asarray(others["scale"]) - expected) / np.asarray(others["scale_err"]))
    assert 0.7 < np.sqrt(np.mean(np.square(pulls))) < 1.25
