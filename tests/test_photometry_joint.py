"""One star on all differences together: its place and its fluxes there, against simulated stamps."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

from gpudia.flags import PIXEL_FLAGS
from gpudia.photometry import StarStamp, fit_position, fluxes_at, measure_apertures, moffat_psf, psf_photometry
from gpudia.photometry.psf import shifted_psf

SIZE, SIGMA = 25, 20.0


def stamps_of(place, flux, seed=0, n=20):
    """Stamps of n epochs, seeing 3 to 5 px, of a star at `place` with the fluxes given."""
    rng = np.random.default_rng(seed)
    found = []
    for f, fwhm in zip(np.broadcast_to(flux, n), np.linspace(3, 5, n), strict=True):
        psf = moffat_psf(fwhm, SIZE)
        values = f * shifted_psf(psf[None], np.array([place]))[0] + SIGMA * rng.normal(size=psf.shape)
        found.append(StarStamp(values.astype(np.float32), np.full(psf.shape, SIGMA**2, np.float32),
                               np.zeros(psf.shape, np.uint8), psf.astype(np.float32)))
    return found


FLUX = 4000 * np.sin(np.arange(20))


@pytest.mark.parametrize("start", [(0.0, 0.0), (0.5, -0.5)])
def test_place_is_found_within_its_error(start):
    """Pulls over 60 draws; the place is off by up to half a FWHM at the start."""
    place = np.array([1.1, -0.4])
    found = [fit_position(stamps_of(place, FLUX, seed), start) for seed in range(60)]
    pulls = np.array([(one.offset - place) / one.error for one in found])
    assert abs(pulls.mean()) < 4 / np.sqrt(pulls.size)
    assert abs(pulls.std() - 1) < 4 / np.sqrt(2 * pulls.size)
    assert found[0].error.max() < 0.05
    # sum of f^2 / sigma_f^2 over the epochs
    power = sum(f**2 * (s.psf.astype(float) ** 2).sum() for f, s in zip(FLUX, stamps_of(place, FLUX), strict=True))
    assert found[0].significance == pytest.approx(np.sqrt(power) / SIGMA, rel=0.05)


def test_without_variation_there_is_no_place():
    assert fit_position(stamps_of((0.3, 0.2), 0.0), (0.0, 0.0)) is None
    assert fit_position([], (0.0, 0.0)) is None


def test_light_far_from_the_star_is_another_star():
    assert fit_position(stamps_of((9.0, 0.0), FLUX), (0.0, 0.0)) is None


def test_masked_pixels_and_lost_epochs_count_for_nothing():
    place = np.array([0.4, 0.1])
    stamps = stamps_of(place, FLUX)
    for k, bit in ((2, PIXEL_FLAGS.cosmic_ray), (3, PIXEL_FLAGS.saturated)):
        stamps[k].difference[11:14, 11:14] = 1e6
        stamps[k].flags[11:14, 11:14] = bit
    stamps[5].difference[:] = np.nan
    found = fit_position(stamps, (0.0, 0.0))
    assert np.abs((found.offset - place) / found.error).max() < 4
    flux, error = fluxes_at(stamps, place, 4.0)["psf"]
    assert np.isnan(flux[5])
    assert np.abs((flux - FLUX) / error)[np.isfinite(flux)].max() < 5


@pytest.mark.parametrize("place", [(0.3, -0.2), (-1.2, 2.6)])
def test_fluxes_are_those_of_the_single_images(place):
    stamps = stamps_of(place, FLUX)
    stamps[1].flags[14, 13] = PIXEL_FLAGS.bad
    found = fluxes_at(stamps, place, 4.0)
    centre = np.array(place) + SIZE // 2
    inner = slice(SIZE // 2 - 9, SIZE // 2 + 10)
    for i, one in enumerate(stamps):
        psf = np.zeros_like(one.psf)
        psf[inner, inner] = one.psf[inner, inner]
        same = fluxes_at([one._replace(psf=psf)], place, 4.0)
        single = psf_photometry(one.difference, one.variance, one.flags, centre, psf[inner, inner])
        for (a,), b in zip(same["psf"], single[:2], strict=True):
            assert_allclose(a, b[0], rtol=2e-3, atol=1e-3 * SIGMA)  # the shift rings where the stamp ends
        sums = measure_apertures(one.difference, one.variance, one.flags, centre, 4.0, max_masked_fraction=0.2)
        inside = measure_apertures(shifted_psf(one.psf[None].astype(float), np.array([place]))[0], one.variance,
                                   one.flags, centre, 4.0, max_masked_fraction=0.2)
        assert_allclose(found["ap"][0][i], sums.flux[0] / inside.flux[0], rtol=1e-6)
        assert_allclose(found["ap"][1][i], sums.error[0] / inside.flux[0], rtol=1e-6)


def test_many_faint_epochs_tell_the_place_within_its_error():
    """Fluxes of 0.8 sigma in each of 600 epochs: the noise of the fluxes is most of the place's error."""
    side = 15
    psf, place = moffat_psf(3.0, side), np.array([0.3, -0.2])
    faint = 0.8 * SIGMA / np.sqrt((psf**2).sum())
    rng, light, pulls = np.random.default_rng(5), shifted_psf(psf[None], place[None])[0], []
    for _ in range(10):
        values = faint * light + SIGMA * rng.normal(size=(600, side, side))
        stamps = [StarStamp(v.astype(np.float32), np.full(psf.shape, SIGMA**2, np.float32),
                            np.zeros(psf.shape, np.uint8), psf.astype(np.float32)) for v in values]
        found = fit_position(stamps, (0.0, 0.0))
        if found is not None:  # sum f^2 / sigma^2 is 384 +- 52, the least 10 sqrt(1200) = 346
            pulls.append((found.offset - place) / found.error)
    assert len(pulls) >= 4
    assert np.sqrt((np.array(pulls) ** 2).mean()) < 1 + 4 / np.sqrt(4 * len(pulls))


def test_what_noise_alone_adds_up_to_in_thousands_of_epochs_is_no_variation():
    """sum of (f / sigma)^2 - 1 scatters by sqrt(2 E): 100 is 1.6 sigma of it for 2000 epochs."""
    psf = moffat_psf(2.0, 9)
    rng = np.random.default_rng(7)
    noise = rng.normal(size=(2000, 9, 9)).astype(np.float32)
    flux = (noise * psf).sum(axis=(1, 2)) / np.sqrt((psf**2).sum())
    noise *= np.sqrt((1 + 150 / 2000) / (flux**2).mean())  # by chance, or as errors are 4 % too small
    stamps = [StarStamp(v, np.ones_like(v), np.zeros(v.shape, np.uint8), psf.astype(np.float32)) for v in noise]
    assert fit_position(stamps, (0.0, 0.0)) is None
