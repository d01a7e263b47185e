"""The scale error from constant stars."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

from gpudia.errors import InputError
from gpudia.photometry import constant_star_epsilon


def epochs(seed, n_epochs=300, n_stars=200, epsilon=0.004):
    """Difference fluxes of stars, all epochs with one scale error."""
    rng = np.random.default_rng(seed)
    flux = 1e3 * rng.pareto(1.0, n_stars) + 1e3
    sigma = np.sqrt(100**2 + flux) * rng.uniform(0.8, 1.2, (n_epochs, n_stars))
    return -epsilon * flux + sigma * rng.normal(size=sigma.shape), sigma, flux, rng


def test_recovers_epsilon_within_its_error():
    delta, sigma, flux, _ = epochs(0)
    result = constant_star_epsilon(delta, sigma, flux)
    pulls = (result.epsilon - 0.004) / result.error
    # Clipping at 3 sigma trims a normal distribution by 1.3 % and the enlargement of errors lowers the pulls a little.
    assert abs(pulls.mean()) < 4 / np.sqrt(len(pulls))
    assert abs(pulls.std() - 1) < 4 / np.sqrt(2 * len(pulls)) + 0.05
    assert (result.n_stars > 190).all()
    assert abs(result.chi2.mean() - 1) < 0.05


def test_variables_and_broken_errors_do_not_matter():
    delta, sigma, flux, rng = epochs(1)
    variable = rng.permutation(len(flux))[:30]
    delta[:, variable] += flux[variable] * rng.uniform(0.3, 3, 30)
    brightest = np.argmax(flux)
    delta[:, brightest] += 0.5 * flux[brightest]
    delta[:, 5], sigma[:, 6] = np.nan, 0.0
    result = constant_star_epsilon(delta, sigma, flux)
    assert np.abs((result.epsilon - 0.004) / result.error).mean() < 1.2  # 0.8 for a normal distribution
    assert (result.n_stars <= len(flux) - 2).all()


def test_an_epoch_does_not_depend_on_the_others():
    """They end after different numbers of rounds."""
    delta, sigma, flux, _ = epochs(4, n_epochs=1000, n_stars=60)
    together = constant_star_epsilon(delta, sigma, flux)
    alone = [constant_star_epsilon(*one, flux) for one in zip(delta, sigma, strict=True)]
    for column, values in zip(together, zip(*alone, strict=True), strict=True):
        np.testing.assert_array_equal(column, values)


def test_sign_is_that_of_the_definition():
    """A kernel sum too large by 1 %: f = P F - (1.01 P) F."""
    flux = np.linspace(100, 1000, 20)
    true_scale = 0.7
    delta = (true_scale * flux - 1.01 * true_scale * flux) / (1.01 * true_scale)
    result = constant_star_epsilon(delta, np.ones(20), flux)
    assert_allclose(result.epsilon, 0.01 / 1.01, rtol=1e-12)
    assert result.epsilon.shape == ()
    assert result.n_stars == 20


def test_errors_grow_with_the_scatter():
    rng = np.random.default_rng(3)
    flux = rng.uniform(1e3, 1e4, 100)
    delta = rng.normal(size=(400, 100)) * 50
    honest, small = (constant_star_epsilon(delta, np.full(delta.shape, s), flux) for s in (50.0, 10.0))
    assert_allclose(small.chi2.mean(), 25, rtol=0.1)
    assert_allclose(small.error.mean(), honest.error.mean(), rtol=0.1)
    assert_allclose(small.epsilon.std(), small.error.mean(), rtol=0.15)


def test_good_selects_and_too_few_stars_give_nan():
    delta, sigma, flux, _ = epochs(2, n_epochs=4)
    good = np.arange(len(flux)) < 100
    chosen = constant_star_epsilon(delta, sigma, flux, good)
    assert_allclose(chosen.epsilon, constant_star_epsilon(delta[:, :100], sigma[:, :100], flux[:100]).epsilon)
    none = constant_star_epsilon(delta, sigma, flux, np.arange(len(flux)) < 2)
    assert np.isnan(none.epsilon).all()
    assert np.isnan(none.error).all()
    assert np.isnan(constant_star_epsilon(delta[0], sigma[0], -flux).epsilon)


def test_shapes_are_named():
    with pytest.raises(InputError, match=r"got \(3, 4\), \(3, 4\) and \(3,\)"):
        constant_star_epsilon(np.ones((3, 4)), np.ones((3, 4)), np.ones(3))


def test_without_stars_nothing_is_known():
    for shape in ((0,), (4, 0)):
        result = constant_star_epsilon(np.empty(shape), np.empty(shape), np.empty(0))
        assert result.epsilon.shape == shape[:-1]
        assert np.isnan(result.epsilon).all()
        assert np.isnan(result.error).all()
        assert (result.n_stars == 0).all()
