"""The PSF of a frame and of an epoch, and what of it an aperture holds."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.ndimage import shift
from scipy.signal import convolve2d

from gpudia.errors import InputError
from gpudia.images import detect_stars, read_frame, sky_and_noise
from gpudia.photometry import (
    Psf,
    aperture_correction,
    choose_aperture_radius,
    empirical_psf,
    epoch_psf,
    measure_apertures,
    moffat_psf,
    psf_photometry,
)
from gpudia.photometry.psf import shifted_psf
from gpudia.photometry.psf_model import field_terms, radius2
from gpudia.photometry.psf_stack import varies
from gpudia.simulate import SimulationSettings, simulate_field

READ_NOISE, SKY = 5.0, 200.0


def star_field(seed, fluxes, size=200, fwhm=4.0):
    """A frame of stars at random places with its variance, the positions and the PSF on 25 px."""
    rng = np.random.default_rng(seed)
    truth = moffat_psf(fwhm, 61, 3.0, (0.1, 0.05))
    positions = rng.uniform(0, size - 1, (len(fluxes), 2))
    frame = np.zeros((size + 80, size + 80))
    for (x, y), flux in zip(positions + 40, fluxes, strict=True):
        ix, iy = round(x), round(y)
        frame[iy - 30 : iy + 31, ix - 30 : ix + 31] += flux * shift(truth, (y - iy, x - ix), order=5)
    frame = frame[40:-40, 40:-40] + SKY
    variance = READ_NOISE**2 + frame
    stamp = truth[18:-18, 18:-18]
    return frame + np.sqrt(variance) * rng.normal(size=frame.shape), variance, positions, stamp / stamp.sum()


def crowded_fluxes(n, brightest):
    """Star counts that rise as 10^(0.3 m) over 8 magnitudes."""
    rank = (np.arange(n) + 0.5) / n
    return brightest * (1 + rank * (10 ** (0.3 * 8) - 1)) ** (-0.4 / 0.3)


def errors_of(stamp, truth):
    """Error of PSF fluxes, of the aperture fraction, and the largest of a pixel in terms of the peak."""
    return (
        abs((stamp * truth).sum() / (stamp**2).sum() - 1),
        abs(aperture_correction(stamp, 4.0) - aperture_correction(truth, 4.0)),
        np.abs(stamp - truth).max() / truth.max(),
    )


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_psf_of_a_crowded_field(seed):
    image, variance, positions, truth = star_field(seed, crowded_fluxes(500, 1e6))  # one star for 80 pixels
    mask = np.zeros(image.shape, bool)
    mask[:, 60] = True
    image[mask] = np.nan
    psf = empirical_psf(image, variance, mask, positions, 4.5, 25)
    assert psf.method == "stack"
    assert psf.n_stars >= 10
    assert_allclose(psf.stamp.sum(), 1.0, rtol=1e-12)
    # A requirement, not a law: 2 % of a *difference* flux is below the noise of anything but a large variation.
    flux, fraction, peak = errors_of(psf.stamp, truth)
    assert flux < 0.02
    assert fraction < 0.02
    assert peak < 0.03


def test_psf_of_a_sparse_field_does_not_depend_on_rough_positions():
    image, variance, positions, truth = star_field(2, np.linspace(2e4, 1e5, 40))
    off = positions + np.random.default_rng(0).normal(0, 0.2, positions.shape)
    for where in (positions, off):
        psf = empirical_psf(image, variance, None, where, 4.0, 25)
        assert psf.method == "stack"
        assert max(errors_of(psf.stamp, truth)) < 0.01


def test_too_few_stars_give_a_moffat_profile():
    image, variance, positions, truth = star_field(3, [5e4, 1e5])
    psf = empirical_psf(image, variance, None, positions, 5.0, 25)
    assert psf.method == "moffat"
    assert psf.n_stars in (1, 2)
    assert max(errors_of(psf.stamp, truth)) < 0.02


def test_faint_stars_give_a_moffat_profile():
    image, variance, positions, truth = star_field(4, np.full(12, 6e3))
    psf = empirical_psf(image, variance, None, positions, 4.5, 25)
    assert psf.method == "moffat"
    assert psf.n_stars >= 4
    assert max(errors_of(psf.stamp, truth)) < 0.05  # signal to noise below 200 in all


def test_saturated_and_masked_stars_are_not_used():
    image, variance, positions, truth = star_field(2, np.linspace(2e4, 1e5, 40))
    level = np.quantile(image, 0.9995)
    mask = np.where(image > level, 2, 0)
    psf = empirical_psf(np.minimum(image, level), variance, mask, positions, 4.0, 25)
    assert psf.n_stars < 40
    assert max(errors_of(psf.stamp, truth)) < 0.02


def simulated(seed, **changes):
    """A simulated frame without its sky, its variance, mask, the stars above S/N 5 and the frame with its true PSF."""
    settings = SimulationSettings(n_epochs=1, seed=seed, fwhm_range=(3.5, 3.5), dither=0.0, **changes)
    series = simulate_field(settings)
    frame = series.reference
    stars = series.catalog(0, 5.0)
    return frame.data - frame.sky, frame.variance, frame.mask, np.c_[stars["x"], stars["y"]], frame


def errors_over_field(psf, frame, seed=0):
    """Relative errors of PSF fluxes of stars of the true PSF all over a frame, of the light on the stamp."""
    size, (height, width) = psf.stamp.shape[0], frame.data.shape
    places = np.random.default_rng(seed).uniform(20, [width - 21, height - 21], (60, 2))
    phi = shifted_psf(psf.at(places), places - np.rint(places))
    true = np.stack([frame.psf(x, y, size) for x, y in places])
    return (phi * true).sum(axis=(1, 2)) / (phi**2).sum(axis=(1, 2)) / true.sum(axis=(1, 2)).mean() - 1


@pytest.mark.parametrize(("depth", "limit"), [(1, 0.012), (20, 0.007)])
def test_psf_follows_the_field(depth, limit):
    image, variance, mask, positions, frame = simulated(
        1, shape=(300, 300), reference_depth=depth, psf_variation=0.15)
    psf = empirical_psf(image, variance, mask, positions, 3.7)
    assert (psf.method, psf.terms.shape[0], psf.shape) == ("stack", 3, (300, 300))
    assert_allclose(psf.at(positions).sum(axis=(1, 2)), 1.0, rtol=1e-12)
    assert_allclose(psf.terms[1:].sum(axis=(1, 2)), 0.0, atol=1e-12)
    error = np.sqrt(np.mean(errors_over_field(psf, frame) ** 2))
    constant = Psf(psf.terms[:1], psf.method, psf.n_stars, psf.shape)
    assert error < limit  # requirements, seen twice as good; without the variation it is
    assert np.std(errors_over_field(constant, frame)) > 0.02


@pytest.mark.parametrize(("changes", "limit"), [({"beta": 2.5}, 0.01), ({"star_density": 1 / 30}, 0.015)])
def test_psf_that_is_the_same_all_over_does_not_vary(changes, limit):
    image, variance, mask, positions, frame = simulated(2, shape=(260, 260), psf_variation=0.0, **changes)
    psf = empirical_psf(image, variance, mask, positions, 3.7)
    assert (psf.method, len(psf.terms)) == ("stack", 1)
    assert np.abs(errors_over_field(psf, frame)).max() < limit


def test_few_stars_never_show_variation():
    image, variance, positions, _ = star_field(5, np.linspace(5e4, 1e5, 11), size=300)
    noise = np.random.default_rng(1).normal(size=(11, 25, 25))
    basis = field_terms(positions, (300, 300))
    follows = basis[:, 1, None, None] * moffat_psf(4.0, 25) * (radius2(25) - 8) + 1e-5 * noise
    assert not varies(follows, np.full(follows.shape, 1e10), basis, moffat_psf(4.0, 25), 4.0)
    assert varies(*(np.concatenate([v, v]) for v in (follows, np.full(follows.shape, 1e10), basis)),
                  moffat_psf(4.0, 25), 4.0)
    assert len(empirical_psf(image, variance, None, positions, 4.0, 25).terms) == 1


def test_psf_at_positions():
    rng = np.random.default_rng(0)
    change = rng.normal(0, 1e-3, (2, 9, 9))
    psf = Psf(np.concatenate([moffat_psf(2.0, 9)[None], change - change.mean(axis=(1, 2))[:, None, None]]), "stack", 9,
              (50, 101))
    found = psf.at([(50.0, 24.5), (100.0, 24.5), (50.0, 0.0), (400.0, 24.5), (np.nan, 3.0), (np.inf, 3.0)])
    expected = [psf.terms[0], psf.terms[0] + psf.terms[1], psf.terms[0] - psf.terms[2], psf.terms[0] + psf.terms[1],
                psf.terms[0], psf.terms[0]]
    assert_allclose(found, expected, atol=1e-15)
    assert psf.at(np.empty((0, 2))).shape == (0, 9, 9)
    one = Psf(psf.terms[:1], "stack", 9, (50, 101))
    assert_allclose(one.at([(3.0, 4.0), (np.nan, 1.0)]), np.stack([psf.stamp, psf.stamp]))


def test_galaxies_and_unknown_neighbours_stay_out():
    image, variance, positions, truth = star_field(2, np.linspace(2e4, 1e5, 40))
    rng = np.random.default_rng(7)
    for x, y in positions[::4]:  # a third of a star's light beside each fourth one, in no list
        angle = rng.uniform(0, 2 * np.pi)
        ix, iy = round(x + 5 * np.cos(angle)), round(y + 5 * np.sin(angle))
        if 12 <= ix < 188 and 12 <= iy < 188:
            image[iy - 12 : iy + 13, ix - 12 : ix + 13] += 2e4 * truth
    for x, y in ((40, 150), (120, 60), (160, 160)):
        image[y - 12 : y + 13, x - 12 : x + 13] += 3e5 * moffat_psf(9.0, 25)
    known = np.concatenate([positions, [(40.0, 150.0), (120.0, 60.0), (160.0, 160.0)]])
    psf = empirical_psf(image, variance, None, known, 4.0, 25)
    assert max(errors_of(psf.stamp, truth)) < 0.02


def test_stars_that_cannot_be_used_leave_the_profile():
    image, variance, positions, _ = star_field(2, np.linspace(2e4, 1e5, 30))
    saturated = np.where(image > np.median(image) + 300, 2, 0)
    assert empirical_psf(image, variance, saturated, positions, 4.0, 25).method == "assumed"
    beyond = [(-40.0, 3.0), (500.0, 20.0), (np.nan, 4.0), (3.0, np.inf)]
    assert empirical_psf(image, variance, None, beyond, 4.0, 25).method == "assumed"
    assert empirical_psf(image, np.full(image.shape, np.nan), None, positions, 4.0, 25).method == "assumed"


def test_stars_on_edges_and_without_places_do_no_harm():
    image, variance, positions, truth = star_field(2, np.linspace(2e4, 1e5, 40))
    odd = [(np.nan, 3.0), (0.0, 0.0), (199.0, 100.0), (-3.0, 50.0), (np.inf, np.nan), tuple(positions[3])]
    psf = empirical_psf(image, variance, None, np.concatenate([positions, odd]), 4.0, 25)
    assert psf.method == "stack"
    assert max(errors_of(psf.stamp, truth)) < 0.01


def test_without_a_star_the_profile_is_assumed():
    noise = np.random.default_rng(0).normal(size=(80, 80))
    for mask in (None, np.ones((80, 80), bool)):
        psf = empirical_psf(noise, np.ones((80, 80)), mask, [(40.0, 40.0)], 4.0)
        assert (psf.method, psf.n_stars) == ("assumed", 0)
        assert_allclose(psf.stamp, moffat_psf(4.0, 25))


def test_moffat_has_its_fwhm_and_is_centred():
    stamp = moffat_psf(6.0, 61)
    row = stamp[30] / stamp.max()
    right = np.interp(0.5, row[60:29:-1], np.arange(30, -1, -1.0))
    assert_allclose(2 * right, 6.0, rtol=0.02)  # the average over pixels widens it by 1 %
    assert_allclose(stamp, stamp[::-1, ::-1], rtol=1e-12)


def test_epoch_psf_is_the_convolution_over_its_scale():
    rng = np.random.default_rng(0)
    psf, kernel = moffat_psf(3.0, 11), rng.uniform(-0.1, 1, (7, 7))
    expected = convolve2d(psf, kernel) / kernel.sum()
    assert_allclose(epoch_psf(psf, kernel), expected, atol=1e-15)
    both = epoch_psf(psf, np.stack([kernel, 3 * kernel]))
    assert both.shape == (2, 17, 17)
    assert_allclose(both[1], expected, atol=1e-15)


def test_shift_moves_the_centroid_and_keeps_the_flux():
    stamp = moffat_psf(3.0, 41, beta=4.0)
    offsets = np.array([(0.0, 0.0), (0.5, -0.3), (-0.25, 0.49)])
    moved = shifted_psf(stamp, offsets)
    grid = np.arange(41) - 20
    assert_allclose(moved[0], stamp, atol=1e-14)
    assert_allclose(moved.sum(axis=(1, 2)), 1.0, atol=1e-5)
    # The wings beyond the stamp shift the first moment by their share of light.
    assert_allclose((moved * grid).sum(axis=(1, 2)), offsets[:, 0], atol=2e-3)
    assert_allclose((moved * grid[:, None]).sum(axis=(1, 2)), offsets[:, 1], atol=2e-3)


@pytest.mark.parametrize("fwhm", [2.5, 4.0, 6.0])
def test_aperture_correction_makes_sums_into_fluxes(fwhm):
    psf = moffat_psf(fwhm, 41)
    positions = np.array([(30.0, 30.0), (60.4, 30.3), (30.5, 60.5)])
    frame = np.zeros((90, 90))
    for (x, y), stamp in zip(positions, shifted_psf(psf, positions - np.rint(positions)), strict=True):
        ix, iy = round(x), round(y)
        frame[iy - 20 : iy + 21, ix - 20 : ix + 21] += 1000 * stamp
    sums = measure_apertures(frame, np.ones(frame.shape), None, positions, 4.0).flux
    other = np.array([(1000 * aperture_correction(psf, 4.0, p))[0] for p in positions])
    # Stars 30 px apart lend each other some 1e-4 of their wings.
    assert_allclose(sums, other, rtol=1e-3)
    assert_allclose(aperture_correction(psf, 4.0, positions), other / 1000, rtol=1e-12)
    assert 0.5 < aperture_correction(psf, 4.0) < 1


def test_aperture_correction_of_gaussian_is_the_formula():
    grid = np.arange(61) - 30
    sigma = 6.0  # wide, so that the sum over pixels is the integral
    psf = np.exp(-0.5 * (grid[:, None] ** 2 + grid**2) / sigma**2)
    psf /= psf.sum()
    assert_allclose(aperture_correction(psf, 9.0), 1 - np.exp(-0.5 * (9 / sigma) ** 2), rtol=2e-3)
    assert_allclose(aperture_correction(np.stack([psf, psf]), 30.4), 1.0, rtol=1e-4)


def test_radius_is_the_median_fwhm():
    assert choose_aperture_radius(4.2) == 4.2
    assert choose_aperture_radius([3.0, np.nan, 5.0, 4.0, -1.0]) == 4.0
    assert choose_aperture_radius(1.0) == 2.0


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["q_e_20200830_1_1_1_1.fits", "q_e_20200830_1_21_1_1.fits"])
def test_aperture_and_psf_fluxes_of_real_stars_agree(real_data, name):
    frame = read_frame(real_data / "rise" / name)
    stars = detect_stars(frame)
    image, positions = frame.data - sky_and_noise(frame.data, frame.mask != 0)[0], np.c_[stars["x"], stars["y"]]
    psf = empirical_psf(image, frame.variance, frame.mask, positions, 5.0)
    assert psf.method == "stack"
    by_psf = psf_photometry(image, frame.variance, frame.mask, positions, psf.at(positions))
    by_aperture = measure_apertures(image, frame.variance, frame.mask, positions, 6.0, psf=psf.at(positions))
    bright = by_psf.flux > 100 * by_psf.error
    assert bright.sum() >= 10
    assert abs(np.nanmedian((by_aperture.flux / by_psf.flux)[bright]) - 1) < 0.02


def test_wrong_arguments_are_named():
    frame, psf = np.ones((50, 50)), moffat_psf(3.0, 11)
    with pytest.raises(InputError, match="fwhm must have a finite, positive value, got nan"):
        choose_aperture_radius(np.nan)
    with pytest.raises(InputError, match="fwhm must be finite and positive, got -1"):
        empirical_psf(frame, frame, None, [(1, 2)], -1.0)
    with pytest.raises(InputError, match="stamp_size must be odd and at least 5, got 24"):
        empirical_psf(frame, frame, None, [(1, 2)], 3.0, 24)
    with pytest.raises(InputError, match="m odd, got shape"):
        aperture_correction(np.ones((4, 4)), 1.0)
    with pytest.raises(InputError, match="finite with a positive sum"):
        aperture_correction(np.zeros((5, 5)), 1.0)
    with pytest.raises(InputError, match="radius must be at most half the PSF stamp's side"):
        aperture_correction(psf, 6.0)
    with pytest.raises(InputError, match=r"positive sum, got -1\.0"):
        epoch_psf(psf, -np.eye(3) / 3)
    with pytest.raises(InputError, match="with K odd"):
        epoch_psf(psf, np.ones((4, 4)))


def test_a_psf_normalised_to_its_peak_is_refused():
    """It would make fluxes of the unit of the peak; a stamp that lacks some of the wings is fine."""
    psf, frame = moffat_psf(4.0, 21), np.ones((40, 40))
    psf_photometry(frame, frame, None, (20.0, 20.0), 0.9 * psf)
    with pytest.raises(InputError, match=r"psf must have a sum of 1, not a peak of 1, to within 0\.5, got"):
        psf_photometry(frame, frame, None, (20.0, 20.0), psf / psf.max())
