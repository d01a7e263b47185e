"""The share of the flux that noise does not explain: found where it is, none where it is not."""

from __future__ import annotations

import numpy as np
import pytest

from gpudia.photometry import model_error
from gpudia.photometry.model_error import _from_the_others

E, S = 60, 40
FLUX = np.geomspace(1e5, 2e3, S)


def series(share, seed=1):
    """Difference fluxes of constant stars with photon-like noise and an error of a share of the flux."""
    rng = np.random.default_rng(seed)
    sigma = np.broadcast_to(np.sqrt(900 + FLUX), (E, S))
    share = np.broadcast_to(share, E)[:, None]
    delta = sigma * rng.normal(size=(E, S)) + share * FLUX * rng.normal(size=(E, S))
    return delta, sigma, FLUX + delta, np.ones((E, S), bool)


def test_noise_alone_leaves_hardly_any():
    """The noise of the 20 brightest stars is 0.3 to 0.9 %: what chance makes of it in 60 epochs is small against it."""
    found = model_error(*series(0.0))
    assert np.median(found) < 0.001
    assert found.max() < 0.003


@pytest.mark.parametrize("share", [0.01, 0.03])
def test_a_share_of_all_epochs_is_found_and_makes_the_pulls_right(share):
    delta, sigma, total, good = series(share)
    found = model_error(delta, sigma, total, good)
    # 60 x 20 absolute values: their median is good to 1.17 / sqrt(1200) = 3 %; single epochs only add to it
    assert np.median(found) == pytest.approx(share, rel=0.2)
    pulls = (delta / np.hypot(sigma, found[:, None] * FLUX))[:, :20]
    assert abs(pulls.std() - 1) < 0.1


def test_epochs_that_are_worse_than_the_others_get_more():
    share = np.zeros(E)
    share[[7, 30]] = 0.05
    found = model_error(*series(share))
    assert (found[[7, 30]] > 0.025).all()
    assert np.median(found) < 0.004  # the noise of the 20 stars is 0.3 to 0.9 %


def test_a_third_of_variable_stars_does_no_harm():
    delta, sigma, total, good = series(0.0)
    delta[:, ::4] += 0.1 * FLUX[::4] * np.sin(np.arange(E))[:, None]
    assert np.median(model_error(delta, sigma, total, good)) < 0.006


def test_epochs_that_tell_nothing_take_what_is_common():
    delta, sigma, total, good = series(0.05)
    delta[3] = 0.0  # the reference itself
    good[4] = False
    good[5, 3:] = False
    delta[6] = np.nan
    found = model_error(delta, sigma, total, good)
    assert np.ptp(found[[3, 4, 5, 6]]) < 1e-12
    assert found[3] == pytest.approx(np.median(found), rel=0.05)
    assert model_error(np.empty((0, 3)), np.empty((0, 3)), np.empty((0, 3)), np.empty((0, 3), bool)).shape == (0,)
    assert (model_error(delta[:, :3], sigma[:, :3], total[:, :3], good[:, :3]) == 0).all()


def test_one_bad_epoch_does_not_spoil_the_means_and_errors_of_all():
    """A scale that is 2 % off in one of ten epochs moves every mean by 0.2 %, the noise of the brightest stars."""
    rng = np.random.default_rng(1)
    flux, sigma = np.full(12, 1e5), np.full((10, 12), 200.0)
    delta = sigma * rng.normal(size=sigma.shape)
    delta[3] += 0.02 * flux
    found = model_error(delta, sigma, flux + delta, np.ones(delta.shape, bool))
    assert found[3] > 0.015
    assert np.delete(found, 3).max() < 0.001


def test_distances_from_the_other_epochs_are_of_unit_variance():
    """Two epochs, one ten times as noisy: pulls of each about the other are those of the noise.

    What both are off by beyond it, at a noise of 1e-3, is known to 0.79 * 2 / sqrt(20) = 0.35 of its square: 6e-4.
    """
    rng = np.random.default_rng(2)
    sigma = np.array([[100.0], [1000.0]]) * np.ones((2, 2000))
    delta, flux = sigma * rng.normal(size=sigma.shape), np.full(2000, 1e6)
    rest, error = _from_the_others(delta, sigma, sigma, np.ones(delta.shape, bool))
    assert np.abs(np.sqrt(((rest / error) ** 2).mean(axis=1)) - 1).max() < 4 / np.sqrt(4000)
    found = model_error(delta[:, :20], sigma[:, :20], flux[:20] + delta[:, :20], np.ones((2, 20), bool))
    assert (found < 6e-4).all()
