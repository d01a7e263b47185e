"""Places without a star, and what the fluxes there say of the errors of all."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from astropy.table import Table
from scipy.spatial import cKDTree

from gpudia.photometry import CombinedFluxes
from gpudia.pipeline.blank import blank_places, sky_scatter, with_sky_excess
from gpudia.pipeline.candidates import _judged
from gpudia.pipeline.measure import EpochFluxes

FWHM, SHAPE = 4.0, (300, 260)
E, N, STATED = 8, 256, 50.0


def places(n=60, flux=10.0, mask=None, varying=None):
    rng = np.random.default_rng(1)
    stars = rng.uniform(0, (SHAPE[1], SHAPE[0]), (n, 2))
    varying = np.zeros(n, bool) if varying is None else varying
    mask = np.zeros(SHAPE, bool) if mask is None else mask
    return stars, blank_places(mask, stars, np.full(n, flux), np.ones(n), varying, FWHM, 6)


@pytest.mark.parametrize(("flux", "varying", "reach"), [(10.0, False, 1), (1e4, False, 2), (np.nan, False, 2),
                                                        (10.0, True, 3)])
def test_places_keep_away_from_stars_and_masked_pixels(flux, varying, reach):
    mask = np.zeros(SHAPE, np.uint8)
    mask[:, 100:140] = 1
    stars, found = places(60, flux, mask, np.full(60, varying))
    assert 16 <= len(found) <= 256
    assert cKDTree(stars).query(found)[0].min() > reach * FWHM
    assert not ((found[:, 0] > 100 - FWHM) & (found[:, 0] < 139 + FWHM)).any()
    assert (found > FWHM - 1).all()
    assert (found < np.array(SHAPE[::-1]) - FWHM).all()
    assert cKDTree(found).query(found, k=2)[0][:, 1].min() >= 2 * FWHM


def test_no_places_where_there_is_no_room():
    assert places(12_000)[1].shape == (0, 2)
    assert places(mask=np.ones(SHAPE, bool))[1].shape == (0, 2)
    none = np.empty(0)
    found = [len(blank_places(np.zeros(SHAPE), np.empty((0, 2)), none, none, none.astype(bool), FWHM, n))
             for n in (0, 16, 32, 64, 3000)]
    assert found == [256, 256, 128, 64, 24]


def epochs_of(truth, seed=2, n=N):
    """Epochs whose fluxes scatter by `truth` times what is stated; a faint and a bright star with other errors."""
    rng = np.random.default_rng(seed)
    error = np.array([60.0, 600.0])
    epochs = []
    for width in truth:
        blank = np.array([width * STATED * rng.normal(size=n), np.full(n, STATED)])
        one = CombinedFluxes(np.ones(2), error, np.array([1e3, 1e6]), 2 * error)
        epochs.append(EpochFluxes({"psf": one}, {}, np.ones(2), 0.0, blank={"psf": blank}))
    return epochs


def widened(truth, n=N):
    looks = [SimpleNamespace(numbers={}) for _ in truth]
    return looks, with_sky_excess(looks, epochs_of(truth, n=n), "psf")


def test_what_is_stated_right_stays_as_it_is():
    looks, found = widened(np.ones(E))
    assert max(look.numbers["sky_excess"] for look in looks) < 1.03  # 2048 values tell it to 1.7 %
    assert found[0].fluxes["psf"].flux_diff_err == pytest.approx([60.0, 600.0], rel=0.03)


def test_errors_of_faint_and_bright_stars_grow_by_the_same_flux():
    truth = np.array([1.0, 1.0, 1.0, 1.5, 1.0, 1.0, 1.5, 1.0])
    looks, found = widened(truth)
    assert [look.numbers["sky_excess"] for look in looks] == pytest.approx(truth, rel=4 * 0.79 / np.sqrt(N))
    one, excess = found[3].fluxes["psf"], looks[3].numbers["sky_excess"]
    more = STATED**2 * (excess**2 - 1)
    assert one.flux_diff_err**2 == pytest.approx([60**2 + more, 600**2 + more])
    assert one.flux_err**2 == pytest.approx([120**2 + more, 1200**2 + more])


def test_the_reference_itself_and_runs_without_blank_places_stay_as_they_are():
    looks, found = widened([0.0, 1.5, 1.5])  # on the reference all differences are zero
    assert looks[0].numbers["sky_excess"] == 1.0
    assert looks[1].numbers["sky_excess"] == pytest.approx(1.5, rel=0.2)
    looks, found = widened([1.5, 1.5], n=0)
    assert [look.numbers["sky_excess"] for look in looks] == [1.0, 1.0]
    assert (found[0].fluxes["psf"].flux_diff_err == [60.0, 600.0]).all()


def test_detections_have_to_be_significant_with_what_the_sky_scatters_by():
    """5.5 sigma is one of the noise where that is right, and chance where the sky scatters by 1.5 of it."""
    epochs = dict(zip("abcdefgh", epochs_of(np.array([1.0, 1.5] * 4)), strict=True))
    looks = [SimpleNamespace(name=name) for name in epochs]
    table = Table({"image": ["a", "b", "b", "h"], "score": [5.5, 5.5, -12.0, 12.0], "x": [1.0, 2.0, 3.0, 4.0],
                   "flux_diff_err": [50.0, 50.0, 50.0, 500.0]})
    found = _judged(table, looks, epochs, 5.0)
    size = sky_scatter(list(epochs.values()), "psf")[1]
    assert list(found["x"]) == [1.0, 3.0, 4.0]
    assert found["flux_diff_err"] == pytest.approx(np.hypot([50.0, 50.0, 500.0], size[[0, 1, 7]]))
    assert found["score"] * found["flux_diff_err"] == pytest.approx([275.0, -600.0, 6000.0])  # the flux is as it was
    assert found["score"][2] == pytest.approx(12.0, rel=0.02)  # a star's own noise is larger
    assert len(_judged(table[:0], [], {}, 5.0)) == 0
