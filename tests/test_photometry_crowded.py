"""Photometry of all stars of a frame at the same time."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.spatial import cKDTree

from gpudia.errors import InputError
from gpudia.flags import SOURCE_FLAGS
from gpudia.photometry import (
    Psf,
    crowded_photometry,
    measure_apertures,
    moffat_psf,
    psf_photometry,
)
from gpudia.photometry.crowded import Scene, first_of_place
from gpudia.photometry.psf import shifted_psf

SHAPE = (120, 110)
PSF = moffat_psf(4.0, 25, 3.0, (0.1, -0.05))


def scene_of(positions, fluxes, psf=PSF, shape=SHAPE):
    """Frame of stars by a plain loop over them, without noise."""
    frame = np.zeros((shape[0] + 60, shape[1] + 60))
    half = psf.shape[-1] // 2
    for k, (x, y) in enumerate(np.asarray(positions, float)):
        ix, iy = int(np.rint(x)) + 30, int(np.rint(y)) + 30
        own = psf if psf.ndim == 2 else psf[k]
        stamp = shifted_psf(own, np.array([[x + 30 - ix, y + 30 - iy]]))[0]
        frame[iy - half : iy + half + 1, ix - half : ix + half + 1] += fluxes[k] * stamp
    return frame[30:-30, 30:-30]


def crowd(seed, n=170, apart=2.5, shape=SHAPE):
    """Stars at random places, none nearer than `apart` to another, brightness spread over five magnitudes."""
    rng = np.random.default_rng(seed)
    places = rng.uniform(0, [shape[1] - 1, shape[0] - 1], (n, 2))
    near = {j for _, j in cKDTree(places).query_pairs(apart)}
    places = places[[k for k in range(n) if k not in near]]
    return places, 10 ** rng.uniform(2.5, 4.5, len(places))


def test_without_noise_fluxes_are_exact():
    positions, fluxes = crowd(1)
    image = scene_of(positions, fluxes)
    found = crowded_photometry(image, np.full(SHAPE, 4.0), None, positions, PSF, 4.0)
    inside = np.isfinite(found.psf.flux)
    assert inside.mean() > 0.5
    assert_allclose(found.psf.flux[inside], fluxes[inside], rtol=1e-5, atol=0.1)
    whole = np.isfinite(found.aperture.flux)
    assert (whole >= inside).all()
    assert_allclose(found.aperture.flux[whole], fluxes[whole], rtol=1e-5, atol=0.1)
    assert_allclose(found.model, image, atol=0.01 * PSF.max() * 100)


def test_fluxes_and_errors_are_those_of_dense_least_squares():
    positions = np.array([(40.0, 40.0), (43.2, 41.1), (38.1, 43.7), (46.3, 37.9), (80.2, 70.4)])
    rng = np.random.default_rng(3)
    variance = rng.uniform(50.0, 150.0, SHAPE)
    image = scene_of(positions, [4e3, 2e3, 900.0, 500.0, 3e3]) + np.sqrt(variance) * rng.normal(size=SHAPE)
    columns = np.stack([scene_of([p], [1.0]).ravel() for p in positions], axis=1) / np.sqrt(variance.ravel())[:, None]
    covariance = np.linalg.inv(columns.T @ columns)
    expected = covariance @ columns.T @ (image / np.sqrt(variance)).ravel()
    found = crowded_photometry(image, variance, None, positions, PSF, 3.0)
    assert_allclose(found.psf.flux, expected, rtol=1e-6)
    # Wings that overlap with less than 1 % of a star's own light count as known.
    assert_allclose(found.psf.error, np.sqrt(np.diag(covariance)), rtol=1e-3)


def test_a_star_alone_has_the_fluxes_of_forced_photometry():
    rng = np.random.default_rng(0)
    positions, variance = np.array([(30.2, 40.4), (85.0, 80.3)]), rng.uniform(20.0, 40.0, SHAPE)
    image = scene_of(positions, [5e3, 2e3]) + np.sqrt(variance) * rng.normal(size=SHAPE)
    mask = rng.uniform(size=SHAPE) < 0.01
    found = crowded_photometry(image, variance, mask, positions, PSF, 4.0)
    for joint, alone in ((found.psf, psf_photometry(image, variance, mask, positions, PSF)),
                         (found.aperture, measure_apertures(image, variance, mask, positions, 4.0, psf=PSF,
                                                            max_masked_fraction=0.2))):
        for name in ("flux", "error", "flags", "n_masked"):
            assert_allclose(getattr(joint, name), getattr(alone, name), rtol=1e-6)


def test_pulls_of_a_crowded_field():
    positions, fluxes = crowd(2, n=260)
    model = scene_of(positions, fluxes)
    variance, rng = model + 100.0, np.random.default_rng(5)
    pulls = {"psf": [], "aperture": []}
    alone = []
    for _ in range(12):
        image = model + np.sqrt(variance) * rng.normal(size=SHAPE)
        found = crowded_photometry(image, variance, None, positions, PSF, 4.0)
        for name, values in pulls.items():
            one = getattr(found, name)
            values.append(((one.flux - fluxes) / one.error)[np.isfinite(one.flux)])
        sums = measure_apertures(image, variance, None, positions, 4.0, psf=PSF)
        alone.append(((sums.flux - fluxes) / sums.error)[np.isfinite(sums.flux)])
    for values in pulls.values():
        every = np.concatenate(values)
        n = len(every)  # about 1500: 5 sigma of a mean and of a width, and 3 % for the stars that count as known
        assert n > 1000
        assert abs(every.mean()) < 5 / np.sqrt(n)
        assert abs(every.std() - 1) < 5 / np.sqrt(2 * n) + 0.03
    assert np.concatenate(alone).std() > 3  # what the neighbours do to plain sums


@pytest.mark.parametrize("varies", [False, True])
def test_neighbours_that_the_list_lacks_are_found(varies):
    positions, fluxes = crowd(3, n=70, apart=14.0)
    rng = np.random.default_rng(8)
    angle = rng.uniform(0, 2 * np.pi, len(positions))
    beside = positions + 5.0 * np.column_stack([np.cos(angle), np.sin(angle)])
    light = 0.3 * fluxes + 1e3
    model = scene_of(np.concatenate([positions, beside]), np.concatenate([fluxes, light]))
    image = model + 5.0 * rng.normal(size=SHAPE)
    psf = np.broadcast_to(PSF, (len(positions), 25, 25)) if varies else PSF
    listed, searched = (crowded_photometry(image, np.full(SHAPE, 25.0), None, positions, psf, 4.0, search=search)
                        for search in (False, True))
    assert len(searched.psf.flux) == len(positions)
    for before, after in zip(listed[:2], searched[:2], strict=True):
        seen = np.isfinite(after.flux)
        off, left = ((one.flux / fluxes - 1)[seen] for one in (before, after))
        assert np.median(np.abs(left)) < 0.2 * np.median(np.abs(off))
        assert (after.error[seen] >= 0.999 * before.error[seen]).all()


def test_a_search_without_anything_to_find_changes_nothing():
    positions, fluxes = crowd(9, n=60, apart=6.0)
    image = scene_of(positions, fluxes) + 5.0 * np.random.default_rng(1).normal(size=SHAPE)
    listed, searched = (crowded_photometry(image, np.full(SHAPE, 25.0), None, positions, PSF, 4.0, search=search)
                        for search in (False, True))
    for one, other in zip(listed[:2], searched[:2], strict=True):
        assert_allclose(other.flux, one.flux, rtol=1e-9)


def test_psf_that_varies():
    positions, fluxes = crowd(4)
    wider = moffat_psf(4.8, 25) - moffat_psf(4.0, 25)
    psf = Psf(np.stack([moffat_psf(4.4, 25), wider, np.zeros_like(wider)]), "stack", 20, SHAPE)
    image = scene_of(positions, fluxes, psf.at(positions))
    for given in (psf, psf.at(positions)):
        found = crowded_photometry(image, np.ones(SHAPE), None, positions, given, 4.0)
        inside = np.isfinite(found.psf.flux)
        assert_allclose(found.psf.flux[inside], fluxes[inside], rtol=1e-5, atol=0.1)


def test_what_a_saturated_star_adds_to_its_neighbours_is_taken_away():
    positions = np.array([(50.0, 50.0), (56.5, 52.0), (90.0, 90.0)])
    fluxes = np.array([5e5, 3e3, 1e3])
    image = scene_of(positions, fluxes)
    mask = np.where(image > 1.2e4, 2, 0)
    assert 5 < (mask > 0).sum() < 60
    image[mask > 0] = 1.2e4
    found = crowded_photometry(image, np.full(SHAPE, 9.0), mask, positions, PSF, 3.0)
    assert np.isnan(found.psf.flux[0])
    assert found.psf.flags[0] & SOURCE_FLAGS.saturated
    assert_allclose(found.psf.flux[1:], fluxes[1:], rtol=1e-5)


def test_entries_at_one_place_are_one_star():
    positions = np.array([(40.0, 40.0), (80.0, 60.0), (40.3, 40.2), (40.0, 40.0), (np.nan, 5.0), (np.nan, 5.0)])
    image = scene_of(positions[:2], [4e3, 1e3])
    found = crowded_photometry(image, np.ones(SHAPE), None, positions, PSF, 4.0)
    for one in (found.psf, found.aperture):
        assert_allclose(one.flux, [4e3, 1e3, 4e3, 4e3, np.nan, np.nan], rtol=1e-5)
        assert np.isfinite(one.error[:4]).all()
        assert np.isnan(one.error[4:]).all()
        assert (one.flags[4:] & SOURCE_FLAGS.outside).all()
    assert first_of_place(np.array([(0.0, 0.0), (0.4, 0.0), (0.8, 0.0)]), 0.5).tolist() == [0, 0, 2]
    apart = crowded_photometry(image, np.ones(SHAPE), None, positions, PSF, 4.0, one_place=0.1)
    assert apart.psf.error[2] > 5 * found.psf.error[2]  # the fit can hardly tell the two apart, and says so


def test_stars_on_edges_count_for_their_neighbours_only():
    positions = np.array([(1.0, 50.0), (6.0, 50.0), (-2.0, 80.0), (14.0, 81.0), (-60.0, 3.0)])
    fluxes = [8e3, 2e3, 9e3, 1e3, 1e3]
    image = scene_of(positions[:4], fluxes)
    found = crowded_photometry(image, np.ones(SHAPE), None, positions, PSF, 4.0)
    assert np.isfinite(found.aperture.flux).tolist() == [False, True, False, True, False]
    assert_allclose(found.aperture.flux[[1, 3]], [2e3, 1e3], rtol=1e-4)
    assert (found.aperture.flags[[0, 2, 4]] & SOURCE_FLAGS.outside).all()


def test_nothing_to_measure():
    found = crowded_photometry(np.ones(SHAPE), np.ones(SHAPE), None, np.empty((0, 2)), PSF, 4.0)
    assert len(found.psf.flux) == len(found.aperture.flux) == 0
    masked = crowded_photometry(np.ones(SHAPE), np.ones(SHAPE), np.ones(SHAPE, bool), [(50.0, 50.0)], PSF, 4.0)
    assert np.isnan(masked.psf.flux).all()
    assert np.isnan(masked.aperture.error).all()
    bad = crowded_photometry(np.ones(SHAPE), np.full(SHAPE, np.nan), None, [(50.0, 50.0)], PSF, 4.0)
    assert np.isnan(bad.psf.flux).all()


def test_scene_is_linear_and_its_transpose_fits():
    positions, fluxes = crowd(6)
    scene = Scene.of(positions, PSF, SHAPE)
    assert_allclose(scene.paint(fluxes), scene_of(positions, fluxes), atol=1e-9)
    assert_allclose(scene.paint(2 * fluxes), 2 * scene.paint(fluxes))
    frame = np.random.default_rng(0).normal(size=SHAPE)
    assert_allclose((scene.paint(fluxes) * frame).sum(), fluxes @ (scene.matrix @ frame.ravel()))


def test_wrong_arguments_are_named():
    frame = np.ones(SHAPE)
    with pytest.raises(InputError, match=r"variance must have shape \(120, 110\), got \(3, 3\)"):
        crowded_photometry(frame, np.ones((3, 3)), None, [(1.0, 2.0)], PSF, 4.0)
    with pytest.raises(InputError, match="psf must be one for all stars or one for each of 1, got 2"):
        crowded_photometry(frame, frame, None, [(1.0, 2.0)], np.stack([PSF, PSF]), 4.0)
    with pytest.raises(InputError, match="radius must be positive and smaller than the image"):
        crowded_photometry(frame, frame, None, [(1.0, 2.0)], PSF, 0.0)
    with pytest.raises(InputError, match="max_masked_fraction must be at least 0 and below 1, got 1"):
        crowded_photometry(frame, frame, None, [(1.0, 2.0)], PSF, 4.0, max_masked_fraction=1)
    with pytest.raises(InputError, match=r"one_place must be finite and at least 0, got -1"):
        crowded_photometry(frame, frame, None, [(1.0, 2.0)], PSF, 4.0, one_place=-1)
