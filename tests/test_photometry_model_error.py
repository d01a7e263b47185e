"""The share of the flux that noise does not explain: found where it is, none where it is not."""

from __future__ import annotations

import numpy as np
import pytest

from gpudia.photometry import model_error

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
    """Two sigma of chance in each epoch: a few of 60 get a share, which is small against the noise."""
    found = model_error(*series(0.0))
    assert (found > 0).mean() < 0.1
    assert np.median(found) == 0.0


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


def test_what_cannot_be_told_is_zero():
    delta, sigma, total, good = series(0.05)
    delta[3] = 0.0  # the reference itself
    good[4] = False
    good[5, 3:] = False
    delta[6] = np.nan
    found = model_error(delta, sigma, total, good)
    others = np.median(found)
    assert (np.abs(found[[3, 4, 5, 6]] - found[[3, 4, 5, 6]].min()) < 1e-12).all()  # what all have in common
    assert found[3] <= others
    assert model_error(np.empty((0, 3)), np.empty((0, 3)), np.empty((0, 3)), np.empty((0, 3), bool)).shape == (0,)
    assert (model_error(delta[:, :3], sigma[:, :3], total[:, :3], good[:, :3]) == 0).all()
