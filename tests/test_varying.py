"""Bright stars that vary are found before the series is solved, and the scales do not follow them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table

import gpudia
from gpudia.flags import PIXEL_FLAGS
from gpudia.photometry import plainly_varying
from gpudia.pipeline import job, measure
from gpudia.pipeline.measure import _at_places
from gpudia.pipeline.reference import RunReference, _discs, _reach, also_varying
from gpudia.pipeline.varying import find_varying

E, S = 12, 40
FLUX = np.geomspace(1e5, 2e3, S)


def series(seed=1, share=0.0):
    rng = np.random.default_rng(seed)
    sigma = np.broadcast_to(np.sqrt(900 + FLUX), (E, S))
    delta = sigma * rng.normal(size=(E, S)) + share * FLUX * rng.normal(size=(E, S))
    return delta, sigma, np.broadcast_to(FLUX, (E, S)), np.ones((E, S), bool)


@pytest.mark.parametrize("share", [0.0, 0.01])
def test_constant_stars_are_not_called_variable_whatever_the_model_leaves(share):
    """A chi^2 per degree of freedom above 3.1 with 11 of these is 3e-4 by chance: 12 of 40000 stars; and 1 % of rms."""
    found = [plainly_varying(*series(seed, share)).mean() for seed in range(100)]
    assert np.mean(found) < 1e-3


@pytest.mark.parametrize("share", [0.0, 0.01])
def test_variables_are_found_and_nothing_else(share):
    delta, sigma, total, good = series(share=share)
    which = np.array([0, 7, 20])
    delta[:, which] += 0.15 * FLUX[which] * np.sin(2 * np.arange(E))[:, None]
    good[3, :5] = False
    delta[4, 7] = np.nan
    np.testing.assert_array_equal(np.flatnonzero(plainly_varying(delta, sigma, total, good)), which)


def test_what_most_of_the_light_does_is_no_variation_of_single_stars():
    delta, sigma, total, good = series()
    delta[:, :25] += 0.2 * FLUX[:25] * np.random.default_rng(3).normal(size=(E, 25))
    assert not plainly_varying(delta, sigma, total, good).any()


def test_with_nothing_to_tell_from_none_varies():
    delta, sigma, total, good = series()
    for some in (slice(0), slice(1), slice(2)):
        assert not plainly_varying(delta[some], sigma[some], total[some], good[some]).any()
    assert not plainly_varying(delta, sigma, total, ~good).any()
    assert plainly_varying(delta[:, :0], sigma[:, :0], total[:, :0], good[:, :0]).shape == (0,)


def test_what_is_kept_out_reaches_as_far_as_the_worst_seeing_but_not_over_all_of_the_region():
    few, many = np.full((3, 2), 50.0), np.full((60, 2), 50.0)
    assert _reach(few, (200, 200), 3.0, [3.0, 4.0, 5.0]) == pytest.approx(10.0)
    assert _reach(few, (200, 200), 3.0, [3.0, 4.0, 40.0]) == pytest.approx(12.0)  # out of focus
    assert _reach(many, (200, 200), 3.0, [3.0, 4.0, 5.0]) == pytest.approx(6.0)
    assert _reach(few, (200, 200), np.nan, []) == pytest.approx(6.0)
    assert _discs(few[:1], (200, 200), 10.0).sum() == pytest.approx(np.pi * 100, rel=0.05)


def test_what_is_found_to_vary_does_not_take_more_than_a_quarter_of_the_region_either():
    look, cutout = SimpleNamespace(fwhm=3.0), SimpleNamespace(shape=(200, 200))
    given = RunReference(look, cutout, None, None, None, "", 9, None, "circle", varying=np.array([[20.0, 20.0]]),
                         reach=10.0)
    places = np.random.default_rng(2).uniform(0, 199, (60, 2))
    assert also_varying(given, places[:0]) is given
    few = also_varying(given, np.vstack([[[20.4, 20.0]], places[:5]]))  # the first is the one that was given
    np.testing.assert_array_equal(few.varying, np.vstack([given.varying, places[:5]]))
    assert few.reach == 10.0
    assert also_varying(given, places).reach == pytest.approx(6.0)


def test_rows_that_vary_are_those_at_the_places_and_all_entries_of_the_same_star():
    positions = np.array([[10.0, 10.0], [30.0, 30.0], [30.4, 30.0], [50.0, 50.0]])
    first = np.array([0, 1, 1, 3])  # rows 1 and 2 are one star
    np.testing.assert_array_equal(_at_places(positions, first, np.array([[30.9, 30.0]]), 0.6), [0, 1, 1, 0])
    np.testing.assert_array_equal(_at_places(positions, first, np.array([[30.0, 29.0], [50.0, 50.0]]), 0.6),
                                  [0, 0, 0, 1])
    assert not _at_places(positions, first, np.empty((0, 2)), 0.6).any()
    assert _at_places(positions[:0], first[:0], positions, 0.6).shape == (0,)


PLACES = np.random.default_rng(5).permutation([(x, y) for x in range(16, 150, 24) for y in range(16, 150, 24)])
#: The brightest varies by 12 %: by more, and the fit would clip it.
LIGHT, VARIABLE = np.geomspace(60000, 1500, len(PLACES)), 0


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """Folder of 15 frames of 36 stars with a Gaussian PSF of 3 to 5 px; the true scales."""
    folder, rng = tmp_path_factory.mktemp("frames"), np.random.default_rng(8)
    y, x = np.mgrid[:160, :160]
    scales = rng.uniform(0.8, 1.2, 15)
    for i, scale in enumerate(scales):
        light, sigma = LIGHT * scale, (3 + 2 * rng.random() * (i > 0)) / 2.3548
        light[VARIABLE] *= 1 + 0.12 * np.sin(1.3 * i)
        image = 300.0 + sum(f / (2 * np.pi * sigma**2) * np.exp(-((x - a) ** 2 + (y - b) ** 2) / 2 / sigma**2)
                            for f, (a, b) in zip(light, PLACES + rng.uniform(-0.3, 0.3, 2), strict=True))
        header = fits.Header({"GAIN": 1.0, "RDNOISE": 5.0, "MJD-OBS": 60000.0 + i, "EXPTIME": 60.0, "FILTER": "r"})
        data = rng.poisson(image) + rng.normal(0, 5, image.shape)
        fits.writeto(folder / f"f{i:02d}.fits", data.astype(np.float32), header)
    return folder, scales


def scale_errors(frames, output):
    """Errors of the scales, in the unit of their median, and the stated ones."""
    folder, scales = frames
    gpudia.run(gpudia.RunConfig(frames=str(folder), output=str(output), products=False, kernel_size=15,
                                spatial_degree=0, align=False))
    epochs = Table.read(output / "epochs.ecsv")
    ratio = np.asarray(epochs["scale"]) / scales
    return ratio / np.median(ratio) - 1, np.asarray(epochs["scale_err"] / epochs["scale"])


def test_scales_do_not_follow_a_bright_star_that_varies(frames, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "gpudia.pipeline")
    found = []
    monkeypatch.setattr(job, "find_varying", lambda *all_of_it: found.append(find_varying(*all_of_it)) or found[-1])
    off, error = scale_errors(frames, tmp_path / "found")
    assert len(found[0][0]) == 1
    assert np.abs(found[0][0] - PLACES[VARIABLE]).max() < 1
    assert "1 of the" in caplog.text
    monkeypatch.setattr(job, "find_varying", lambda *_: (np.empty((0, 2)), found[0][1]))
    pulled, _ = scale_errors(frames, tmp_path / "not_looked_for")
    # 15 pulls; the reference's part of the errors, common to all, is in the median, too
    assert np.sqrt(np.mean((off / error) ** 2)) < 1 + 4 / np.sqrt(2 * 15)
    assert pulled.std() > 2 * off.std()


def test_stars_are_in_the_order_of_what_is_lost_of_them():
    """A free place, one with not quite half of it masked on half of the frames, one with all on one, one at an edge."""
    seen = np.zeros((4, 60, 60), np.uint8)
    seen[:2, 10:40, 21:30] = PIXEL_FLAGS.bad
    seen[3, 35:50, 35:50] = PIXEL_FLAGS.saturated
    seen[:, :, 55:] = PIXEL_FLAGS.border
    seen[:, 5:15, 5:15] = PIXEL_FLAGS.clipped  # that is measured
    places = np.array([(50.0, 20.0), (42.0, 42.0), (20.0, 20.0), (51.0, 30.0), (10.0, 10.0), (-30.0, 10.0)])
    assert list(measure._safest_first(places, 4.0, seen)) == [0, 4, 2, 1, 3, 5]


@pytest.mark.parametrize("reference", ["auto", "stack"])
def test_fluxes_do_not_depend_on_the_order_of_the_stars(reference, frames, tmp_path, monkeypatch):
    """But for what single precision leaves of sums in another order."""
    found = []
    for name, order in (("as they are", lambda places, *_: np.arange(len(places))),
                        ("backwards", lambda places, *_: np.arange(len(places))[::-1])):
        monkeypatch.setattr(measure, "_safest_first", order)
        gpudia.run(gpudia.RunConfig(frames=str(frames[0]), output=str(tmp_path / name), products=False, kernel_size=15,
                                    spatial_degree=0, align=False, reference=reference))
        with fits.open(tmp_path / name / "lightcurves.fits") as hdus:
            found.append([hdus[column].data for column in ("FLUX_DIFF_PSF", "FLUX_DIFF_ERR_PSF", "FLUX_DIFF_ERR_AP")])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * np.nanmedian(np.abs(found[0][1])))
