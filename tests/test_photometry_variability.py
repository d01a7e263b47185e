"""Indices of variability against their definitions; the ranked list against simulated variables."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

from gpudia.errors import InputError
from gpudia.flags import SOURCE_FLAGS
from gpudia.photometry import variability, variability_score


def constant_stars(n_epochs, n_stars, seed=0):
    """Fluxes and errors of constant stars; every epoch has its own error."""
    rng = np.random.default_rng(seed)
    error = rng.uniform(1, 3, (n_epochs, 1)) * np.ones((1, n_stars))
    return 100 + error * rng.normal(size=error.shape), error


def test_indices_of_equal_errors_are_the_textbook_ones():
    flux = np.random.default_rng(3).normal(50, 4, (30, 6))
    found = variability(flux, np.full(flux.shape, 2.0))
    off = flux - flux.mean(axis=0)
    square = (off**2).sum(axis=0) / 29
    assert_allclose(found.chi2, square / 4, rtol=1e-12)
    assert_allclose(found.von_neumann, (np.diff(flux, axis=0) ** 2).sum(axis=0) / 29 / square, rtol=1e-12)
    assert_allclose(found.amplitude, np.percentile(flux, 95, axis=0) - np.percentile(flux, 5, axis=0), rtol=1e-12)
    assert_allclose(found.excess, np.sqrt(np.maximum(square - 4, 0)), rtol=1e-12)
    product = off[1:] * off[:-1] / 4 * 30 / 29
    assert_allclose(found.stetson_j, (np.sign(product) * np.sqrt(np.abs(product))).sum(axis=0) / 29, rtol=1e-12)


def test_constant_stars_have_the_expected_values_whatever_their_errors():
    """chi^2 of 1, eta of 2, J of 0, each within 4 standard errors of the mean over 2000 stars."""
    flux, error = constant_stars(40, 2000)
    found = variability(flux, error)
    for index, expected in ((found.chi2, 1), (found.von_neumann, 2), (found.stetson_j, 0)):
        # J of 40 epochs: the mean is taken off, which leaves neighbours anti-correlated by 1 / 40
        assert index.mean() == pytest.approx(expected, abs=4 * index.std() / np.sqrt(2000) + (expected == 0) * 2 / 40)


def test_slow_variables_have_a_small_ratio_and_a_positive_j():
    flux, error = constant_stars(40, 200)
    slow = variability(flux + 6 * np.sin(np.arange(40) / 8)[:, None], error)
    assert slow.von_neumann.max() < 1.2
    assert slow.stetson_j.min() > 0.5
    assert np.median(slow.excess) == pytest.approx(6 / np.sqrt(2), rel=0.1)


def test_flagged_and_unmeasured_epochs_take_no_part():
    flux, error = constant_stars(20, 3)
    flags = np.zeros(flux.shape, np.int32)
    want = variability(np.delete(flux, [4, 9], axis=0), np.delete(error, [4, 9], axis=0))
    flux[4], flux[9] = 1e9, np.nan
    flags[4] = SOURCE_FLAGS.saturated
    flags[7] = SOURCE_FLAGS.clipped_pixels | SOURCE_FLAGS.limit  # what a variable star may have: stays
    found = variability(flux, error, flags)
    assert found.n_good.tolist() == [18, 18, 18]
    for a, b in zip(found, want, strict=True):
        assert_allclose(a, b, rtol=1e-12)
    nothing = variability(flux, error, np.full(flux.shape, SOURCE_FLAGS.masked_pixels))
    assert nothing.n_good.tolist() == [0, 0, 0]
    assert all(np.isnan(a).all() for a in nothing[1:])
    one = variability(flux[:1], error[:1])
    assert np.isfinite(one.mean).all()
    assert np.isnan(one.chi2).all()


@pytest.fixture(scope="module")
def field():
    """600 stars, 40 epochs; errors leave out 1 % of the flux, so that bright constant stars have a chi^2 of 100.

    Of every 20th star the light varies: by twice the whole scatter of a star of its brightness, as a sine.
    """
    rng = np.random.default_rng(8)
    true = 10 ** rng.uniform(2.5, 5.5, 600)
    stated = np.sqrt(true + 900) * np.ones((40, 1))
    scatter = np.hypot(stated, 0.01 * true)
    flux = true + scatter * rng.normal(size=stated.shape)
    variable = np.arange(600) % 20 == 0
    wave = np.sqrt(2) * np.sin(np.arange(40)[:, None] * rng.uniform(0.1, 3, 600))
    flux[:, variable] += (2 * scatter * wave)[:, variable]
    return flux, stated, true, variable


def test_the_top_of_the_list_are_the_variables(field):
    flux, stated, true, variable = field
    found = variability(flux, stated)
    score = variability_score(found.chi2, found.n_good, true)
    assert variable[np.argsort(-score)[:30]].all()
    assert (score[variable] > 5).all()
    assert not (score[~variable] > 5).any()
    # without regard to brightness chi^2 would list bright constant stars
    assert variable[np.argsort(-found.chi2)[:30]].mean() < 0.7
    assert abs(np.median(score[~variable])) < 0.2
    assert np.percentile(np.abs(score[~variable]), 68.27) == pytest.approx(1, abs=0.25)


def test_scores_of_constant_stars_are_no_wider_than_normal():
    """Right errors: no more beyond z than a normal variable has, and not many fewer, for few epochs and for many."""
    for n in (4, 6, 20, 200):
        rng = np.random.default_rng(n)
        chi2 = rng.chisquare(n - 1, 20000) / (n - 1)
        score = variability_score(chi2, np.full(20000, n), rng.uniform(1, 2, 20000))
        assert 0.0228 / 3 < (score > 2).mean() < 0.0228 + 4 * np.sqrt(0.0228 / 20000)
        assert (score > 5).mean() <= 1e-4


def test_errors_that_are_too_large_make_no_star_variable():
    flux, error = constant_stars(30, 100)
    found = variability(flux, 3 * error)
    assert variability_score(found.chi2, found.n_good, np.arange(1.0, 101)).max() < 0


def test_scores_of_odd_stars():
    """Few epochs, no flux, unfair company, a field of three stars."""
    chi2, n = np.array([1.0, 1.0, np.nan, 40.0]), np.array([2, 30, 0, 30])
    score = variability_score(chi2, n, np.array([1.0, np.nan, 3.0, 4.0]))
    assert np.isnan(score).tolist() == [True, False, True, False]
    assert score[3] > 15
    rng = np.random.default_rng(0)
    chi2 = np.append(rng.chisquare(29, 50) / 29, np.full(50, 30.0))
    fair = np.arange(100) < 50
    score = variability_score(chi2, np.full(100, 30), np.tile(np.arange(1.0, 51), 2), fair)
    assert (score[~fair] > 10).all()
    assert np.abs(score[fair]).max() < 4
    assert variability_score([], [], []).shape == (0,)


def test_shapes_are_checked():
    with pytest.raises(InputError, match=r"must be \(n_epochs, n_sources\), got \(3,\) and \(3,\)"):
        variability(np.ones(3), np.ones(3))
