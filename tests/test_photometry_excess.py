"""Scatter beyond the errors: right on average with few residuals and with many, common to epochs or their own."""

from __future__ import annotations

import numpy as np
import pytest

from gpudia.photometry import excess_scatter
from gpudia.photometry.excess import _FACTOR, _NU, _POWER

GRID = np.append(0.0, np.geomspace(1e-4, 0.3, 81))


def drawn(rng, share, shape):
    """Noise of 0.2 to 1.5 %, and an error of a share."""
    sigma = rng.uniform(0.002, 0.015, shape[1]) * np.ones(shape)
    return np.hypot(sigma, np.reshape(share, (-1, 1))) * rng.normal(size=shape), sigma


def found(rest, sigma, good=None):
    return excess_scatter(rest, sigma, np.ones_like(rest), np.ones(rest.shape, bool) if good is None else good, GRID)


@pytest.mark.parametrize("share", [0.0, 0.003, 0.01, 0.03])
@pytest.mark.parametrize(("epochs", "stars"), [(5, 4), (5, 40), (40, 4)])
def test_errors_with_what_was_found_are_those_of_new_data(epochs, stars, share):
    """Pulls of other data: 20 residuals in all tell the variance to 35 %, which widens them; 160 and more to 13 %."""
    rng, pulls = np.random.default_rng(4), []
    for _ in range(60):
        s = found(*drawn(rng, share, (epochs, stars)))
        rest, sigma = drawn(rng, share, (epochs, stars))
        pulls.append(rest / np.hypot(sigma, s[:, None]))
    width = np.std(pulls)
    assert width == pytest.approx(1, abs=0.15 if epochs * stars < 100 else 0.05)


def test_epochs_of_their_own_get_their_own_and_the_others_what_they_have_in_common():
    rng, share = np.random.default_rng(1), np.full(60, 0.004)
    share[[7, 30]] = 0.05
    s = found(*drawn(rng, share, (60, 40)))
    assert s[[7, 30]] == pytest.approx(0.05, rel=4 * 0.79 / np.sqrt(40))
    assert np.delete(s, [7, 30]) == pytest.approx(0.004, rel=0.25)


def test_an_epoch_with_nothing_to_tell_takes_what_is_common():
    rng = np.random.default_rng(2)
    rest, sigma = drawn(rng, 0.02, (30, 20))
    good = np.ones(rest.shape, bool)
    good[3], rest[3], sigma[3] = False, np.nan, np.nan
    s = found(rest, sigma, good)
    assert np.median(s) < s[3] < 1.5 * np.median(s)  # it might be an odd one
    assert np.median(s) == pytest.approx(0.02, rel=0.05)
    assert (found(rest, sigma, np.zeros(rest.shape, bool)) == 0).all()


def test_a_tenth_of_outliers_does_little():
    rng = np.random.default_rng(3)
    rest, sigma = drawn(rng, 0.01, (30, 40))
    clean = found(rest, sigma)
    rest[:, ::10] *= 30
    assert np.median(found(rest, sigma) / clean) < 2  # their sum of squares gives 10


def test_the_likelihood_is_calibrated_for_normal_data():
    """Its score is zero on average at the right scale, and its curvature the inverse variance of the estimate."""
    z = np.linspace(-12, 12, 100_001)
    chance = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi) * (z[1] - z[0])
    ratio = (_FACTOR * z) ** 2 / _NU
    score = (_NU + 1) * ratio / (1 + ratio) - 1
    assert abs((chance * score).sum()) < 1e-4
    curvature = (chance * 2 * (_NU + 1) * ratio / (1 + ratio) ** 2).sum()
    assert curvature / (chance * score**2).sum() == pytest.approx(_POWER, rel=1e-3)
    assert np.sqrt((chance * score**2).sum()) / curvature == pytest.approx(0.79, abs=0.01)


def test_epochs_that_exclude_all_but_nothing_are_borne():
    """Levers so long that any s but 0 is out of question, beside an epoch that has an excess."""
    rng = np.random.default_rng(4)
    rest, lever = rng.normal(size=(5, 256)), np.full((5, 256), 1e6)
    rest[4] *= 1e4
    grid = np.append(0, np.geomspace(1e-4, 1, 80))
    s = excess_scatter(rest, np.ones(rest.shape), lever, np.ones(rest.shape, bool), grid)
    assert s[:4].max() < 1e-5
    assert s[4] == pytest.approx(rest[4].std() / 1e6, rel=0.1)
