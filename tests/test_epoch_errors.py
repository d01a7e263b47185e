"""What a run says of its epochs' scales and errors, from the stars' fluxes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from gpudia.flags import FRAME_FLAGS
from gpudia.photometry import CombinedFluxes
from gpudia.pipeline.measure import EpochFluxes
from gpudia.pipeline.outputs import _judged

E, S, SIGMA = 10, 12, 200.0
FLUX = np.full(S + 1, 1e5)


def judged(delta, flux=FLUX, first=None, varying=None):
    """Judge epochs of S stars and, as the last row, a target."""
    first = np.arange(S + 1) if first is None else first
    varying = np.zeros(S + 1, bool) if varying is None else varying
    measures = SimpleNamespace(first=first, flux={"psf": flux, "ap": flux}, varying=varying | (first == first[S]))
    looks = [SimpleNamespace(numbers={"scale": 1.0, "scale_err": 1e-4}, flags=0) for _ in delta]
    error, flags = np.full(S + 1, SIGMA), np.zeros(S + 1, np.int32)
    epochs = []
    for d in delta:
        one = CombinedFluxes(d, error, flux + d, error)
        epochs.append(EpochFluxes({"psf": one, "ap": one}, {"psf": flags, "ap": flags}, np.ones(S + 1), 1e-4,
                                  blank=dict.fromkeys(("psf", "ap"), np.empty((2, 0)))))
    return looks, _judged(looks, epochs, measures, "psf", 0.01)


def noise(seed=1):
    return SIGMA * np.random.default_rng(seed).normal(size=(E, S + 1))


def test_a_scale_that_is_off_is_flagged_though_the_errors_have_it_too():
    delta = noise()
    delta[3] -= 0.02 * FLUX
    looks, epochs = judged(delta)
    assert [look.flags != 0 for look in looks] == [i == 3 for i in range(E)]
    assert looks[3].flags == FRAME_FLAGS.scale_mismatch
    assert looks[3].numbers["epsilon"] == pytest.approx(0.02, abs=4 * looks[3].numbers["epsilon_err"])
    assert looks[3].numbers["epsilon_err"] < 0.002  # the noise: 0.2 % over the root of 12
    assert looks[3].numbers["model_error"] > 0.015
    assert looks[3].numbers["scale_err"] == pytest.approx(0.02, abs=4 * looks[3].numbers["epsilon_err"])
    assert np.median([look.numbers["scale_err"] for look in looks]) == 1e-4  # within 2 sigma: nothing is added
    assert (epochs[3].fluxes["psf"].flux_err > 0.014 * FLUX).all()
    assert max(look.numbers["model_error"] for i, look in enumerate(looks) if i != 3) < 0.002


def test_the_target_says_nothing_about_the_scale_nor_does_a_second_entry_of_a_star():
    delta, flux = noise(), FLUX.copy()
    flux[[4, S]] = 1e7  # the target is the star of row 4
    first = np.arange(S + 1)
    first[S], first[6] = 4, 5
    before = [look.numbers["epsilon"] for look in judged(delta, flux, first)[0]]
    delta[:, [4, S]] += 3e4
    delta[:, 6] += 7e3
    after = [look.numbers["epsilon"] for look in judged(delta, flux, first)[0]]
    assert_array_equal(after, before)


def test_a_star_without_a_flux_on_the_reference_keeps_the_error_of_its_difference():
    delta, flux = noise(), FLUX.copy()
    delta[3] -= 0.02 * FLUX
    flux[5] = np.nan
    _, epochs = judged(delta, flux)
    for epoch in epochs:
        psf = epoch.fluxes["psf"]
        assert SIGMA <= psf.flux_diff_err[5] < 2 * SIGMA
        assert np.isnan(psf.flux[5])


def test_what_is_known_to_vary_says_nothing_about_scale_and_model():
    """Two thirds of the bright stars vary by a tenth: neither the others' errors nor the scale follow them."""
    delta, varying = noise(), np.arange(S + 1) % 3 != 0
    plain = judged(delta, varying=varying)
    delta[:, varying] += 0.1 * FLUX[varying] * np.sin(np.arange(E))[:, None]
    looks, epochs = judged(delta, varying=varying)
    for name in ("epsilon", "epsilon_err", "model_error"):
        assert_array_equal([look.numbers[name] for look in looks], [look.numbers[name] for look in plain[0]])
    error = np.array([epoch.fluxes["psf"].flux_diff_err for epoch in epochs])
    assert error.max() < 1.5 * SIGMA  # 10 000 ADU, 50 sigma, with the variation in it
    unknown = judged(delta)[1]
    assert np.median([epoch.fluxes["psf"].flux_diff_err for epoch in unknown]) > 5 * SIGMA


def test_no_epoch_at_all():
    assert judged(np.empty((0, S + 1))) == ([], [])
