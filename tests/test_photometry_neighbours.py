"""Stars that overlap and both vary: the fluxes of one fit, against the fit itself and against the truth."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from gpudia.flags import PIXEL_FLAGS, SOURCE_FLAGS
from gpudia.photometry import CombinedFluxes, Psf, close_pairs, moffat_psf, overlaps, psf_photometry, separate
from gpudia.photometry.psf import shifted_psf
from gpudia.photometry.stamps import Stamps
from gpudia.pipeline.measure import EpochFluxes, _overlaps, separated

SHAPE, SIZE, PSF = (60, 70), 21, moffat_psf(4.0, 21)
THREE = np.array([[30.2, 29.7], [33.1, 30.4], [32.0, 33.2]])
PAIRS = np.array([[0, 1], [0, 2], [1, 2]])


def images(seed, fluxes, n):
    """Differences of three stars on noise that is not the same everywhere."""
    rng = np.random.default_rng(seed)
    variance = rng.uniform(50, 150, SHAPE)
    signal = np.zeros(SHAPE)
    for (x, y), f in zip(THREE, fluxes, strict=True):
        ix, iy = round(x), round(y)
        signal[iy - 10:iy + 11, ix - 10:ix + 11] += f * shifted_psf(PSF[None], np.array([[x - ix, y - iy]]))[0]
    return signal + np.sqrt(variance) * rng.normal(size=(n, *SHAPE)), variance


def measured(seed, fluxes, n=1):
    values, variance = images(seed, fluxes, n)
    single = [psf_photometry(one, variance, None, THREE, PSF) for one in values]
    flux, error = (np.array([getattr(s, name) for s in single]) for name in ("flux", "error"))
    stamps = np.stack([Stamps(THREE[PAIRS[:, k]], SIZE).gather(variance) for k in (0, 1)], axis=1)
    seen = overlaps(np.stack([PSF] * 3), THREE, PAIRS, stamps, SIZE)
    return values, variance, flux, error, np.broadcast_to(seen, (n, *seen.shape))


def test_it_is_the_simultaneous_fit():
    values, variance, flux, error, seen = measured(1, (3000.0, -1500.0, 800.0))
    found, stated = separate(flux, error, PAIRS, seen)
    columns = []
    for x, y in THREE:
        ix, iy = round(x), round(y)
        plane = np.zeros(SHAPE)
        plane[iy - 10:iy + 11, ix - 10:ix + 11] = shifted_psf(PSF[None], np.array([[x - ix, y - iy]]))[0]
        columns.append(plane.ravel())
    design = np.stack(columns, axis=1)
    normal = design.T @ (design / variance.reshape(-1, 1))
    expected = np.linalg.solve(normal, design.T @ (values[0] / variance).ravel())
    # the stamps end at 10 px, the planes of the other stars beyond: a few thousandths of their light
    assert_allclose(found[0], expected, atol=0.01 * 3000)
    assert_allclose(stated[0], np.sqrt(np.diag(np.linalg.inv(normal))), rtol=0.02)


def test_pulls_are_standard_normal_and_single_fluxes_are_wrong():
    truth = np.array([3000.0, -1500.0, 800.0])
    _, _, flux, error, seen = measured(2, truth, n=300)
    found, stated = separate(flux, error, PAIRS, seen)
    pulls = (found - truth) / stated
    assert np.abs(pulls.std(axis=0) - 1).max() < 4 / np.sqrt(600)
    assert np.abs((found - truth).mean(axis=0)).max() < 0.005 * 3000
    assert np.abs((flux - truth).mean(axis=0)).max() > 0.1 * 3000


def test_pairs_are_those_of_the_distances():
    positions = np.array([[0, 0], [0.4, 0], [3, 0], [3, 3.9], [50, 50], [np.nan, 1]])
    assert_array_equal(close_pairs(positions, 1.0, 4.0), [[0, 2], [1, 2], [2, 3]])
    assert close_pairs(positions[:0], 1.0, 4.0).shape == (0, 2)


def test_stars_in_no_pair_stay_as_they_are():
    flux, error = np.ones((2, 4)), np.full((2, 4), 0.1)
    same = separate(flux, error, np.empty((0, 2), int), np.empty((2, 0, 2)))
    assert_array_equal(same[0], flux)
    flux[1, 0] = np.nan
    found, stated = separate(flux, error, np.array([[0, 1]]), np.full((2, 1, 2), 0.5))
    assert_allclose(found[0], [2 / 3, 2 / 3, 1, 1])
    assert np.isnan(found[1, :2]).all()
    assert_allclose(stated[0, :2], 0.1 / np.sqrt(1 - 0.25), rtol=1e-12)
    assert_array_equal(found[:, 2:], 1.0)


@pytest.mark.parametrize("spoilt", [np.nan, 0.0, -1.0])
def test_pixels_without_a_variance_count_for_nothing(spoilt):
    stamps = np.full((1, 2, SIZE, SIZE), 100.0)
    whole = overlaps(PSF[None], THREE, PAIRS[:1], stamps, SIZE)
    stamps[0, 0, 10, 14] = spoilt
    cut = overlaps(PSF[None], THREE, PAIRS[:1], stamps, SIZE)
    assert cut[0, 1] == whole[0, 1]
    assert cut[0, 0] < whole[0, 0]  # a pixel nearer to the other star
    stamps[:] = spoilt
    assert_array_equal(overlaps(PSF[None], THREE, PAIRS[:1], stamps, SIZE), 0.0)


def test_a_run_fits_pairs_together_where_both_vary_and_the_target_gets_what_its_star_gets():
    """Rows 0 and 1 both vary, 2 and 3 do not; row 4, the target, is at the place of row 0."""
    rng = np.random.default_rng(3)
    n, seen = 30, np.array([[0.4, 0.5], [0.3, 0.3]])
    truth = np.zeros((n, 5))
    truth[:, 0], truth[:, 1] = 500 * np.sin(np.arange(n)), 300 * np.cos(2.1 * np.arange(n))
    truth[:, 4] = truth[:, 0]
    alone = truth.copy()
    alone[:, 0] += seen[0, 0] * truth[:, 1]
    alone[:, 1] += seen[0, 1] * truth[:, 0]
    alone[:, 4] = alone[:, 0]
    alone[:, 2:4] += rng.normal(size=(n, 2))
    error = np.ones(5)
    alone[7, 1] = np.nan  # masked there
    measures = SimpleNamespace(pairs=np.array([[0, 1], [2, 3]]), first=np.array([0, 1, 2, 3, 0]), has_target=True)
    fluxes = [CombinedFluxes(f, error, 1000 + f, 2 * error) for f in alone]
    flags = {"psf": np.array([0, 1, 0, 0, 0], np.int32)}
    epochs = [EpochFluxes({"psf": one, "ap": None}, flags, error, 0.01, "stamps", seen) for one in fluxes]
    found = separated(measures, epochs)
    assert all(one.target is None for one in found)  # no place is to be fitted to the light of both
    lost = found.pop(7)
    assert np.isnan(lost.fluxes["psf"].flux_diff[[0, 1, 4]]).all()
    assert_array_equal(lost.flags["psf"], [SOURCE_FLAGS.neighbour, 1, 0, 0, SOURCE_FLAGS.neighbour])
    del epochs[7]
    for now, before, true in zip(found, epochs, np.delete(truth, 7, axis=0), strict=True):
        psf = now.fluxes["psf"]
        assert_array_equal(now.flags["psf"], flags["psf"])
        assert_allclose(psf.flux_diff[[0, 1, 4]], true[[0, 1, 4]], rtol=1e-9, atol=1e-9)
        assert_allclose(psf.flux, 1000 + psf.flux_diff)
        assert_allclose(psf.flux_err / psf.flux_diff_err, 2.0)
        assert (psf.flux_diff_err[[0, 1, 4]] > 1.05).all()
        assert_array_equal(psf.flux_diff[2:4], before.fluxes["psf"].flux_diff[2:4])


def test_masked_pixels_of_an_image_are_in_no_overlap():
    """A_ij is the PSF flux of i on an image of j alone, with the pixels that this image has."""
    two, psf = np.array([[30.2, 29.7], [33.1, 30.4]]), moffat_psf(3.0, 15)
    kernel, bits = np.zeros((7, 7)), np.zeros(SHAPE, np.uint8)
    kernel[3, 3] = 1.0
    bits[30, 32] = PIXEL_FLAGS.cosmic_ray
    bits[31, 31] = PIXEL_FLAGS.clipped  # measured like the rest
    measures = SimpleNamespace(pairs=np.array([[0, 1]]), positions=two, shape=SHAPE,
                               psf=Psf(psf[None], "stack", 9, SHAPE))
    stack = SimpleNamespace(kernel_at=lambda _, x, __: np.stack([kernel] * len(x)),
                            variance=np.full((1, *SHAPE), 100.0))
    other = np.zeros(SHAPE)
    other[30 - 10:30 + 11, 33 - 10:33 + 11] = shifted_psf(np.pad(psf, 3)[None], np.array([[0.1, 0.4]]))[0]
    found = _overlaps(measures, stack, 0, bits, 15)
    alone = psf_photometry(other, stack.variance[0], bits, two, psf, max_masked_fraction=0.5)
    assert found[0, 0] == pytest.approx(alone.flux[0], rel=5e-3)
    assert found[0, 0] < 0.95 * _overlaps(measures, stack, 0, 0 * bits, 15)[0, 0]
