"""Blind detection: peaks with their place and shape, false alarms as Gauss has them, variables found in a whole run."""

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from matplotlib.image import imread
from scipy.spatial import cKDTree

import gpudia
from gpudia.cli import main
from gpudia.errors import InputError
from gpudia.flags import CANDIDATE_FLAGS, PIXEL_FLAGS
from gpudia.photometry import KnownStars, associate, detect_peaks, moffat_psf
from gpudia.photometry.psf import shifted_psf
from gpudia.simulate import SimulationSettings, simulate_field, write_series

SHAPE, FWHM, SIGMA = (120, 130), 3.6, 10.0
PSF = moffat_psf(FWHM, 23)
NOBODY = KnownStars(np.empty((0, 2)), np.empty(0))


def with_stars(stars, difference=None, psf=PSF):
    """A difference with stars (x, y, flux) on it."""
    difference = np.zeros(SHAPE) if difference is None else difference
    half = psf.shape[0] // 2
    for x, y, flux in stars:
        column, row = round(x), round(y)
        stamp = shifted_psf(psf[None], np.array([[x - column, y - row]]))[0]
        difference[row - half:row + half + 1, column - half:column + half + 1] += flux * stamp
    return difference


def detect(difference, threshold=5.0, stars=NOBODY, bits=None, sigma=SIGMA):
    variance = np.full(SHAPE, sigma**2)
    bits = np.zeros(SHAPE, np.uint8) if bits is None else bits
    score = gpudia.score_image(difference, variance, PSF, mask=bits != 0)
    return detect_peaks(score, difference, variance, bits, PSF, FWHM, stars, threshold)


def flagged(table, name):
    return (np.asarray(table["flags"]) & getattr(CANDIDATE_FLAGS, name)) != 0


def test_stars_of_either_sign_are_found_where_they_are():
    truth = [(30.0, 40.0, 900.0), (60.4, 41.7, -1500.0), (90.5, 80.5, 700.0), (45.25, 90.6, -600.0)]
    table = detect(with_stars(truth))
    assert len(table) == 4
    found = np.column_stack([table["x"], table["y"]])
    distance, row = cKDTree(found).query(np.array(truth)[:, :2])
    assert distance.max() < 0.06  # no noise: what the parabola leaves
    np.testing.assert_allclose(table["flux_diff"][row], [f for *_, f in truth], rtol=0.02)
    np.testing.assert_allclose(table["score"], table["flux_diff"] / table["flux_diff_err"])
    np.testing.assert_allclose(table["sharpness"], 1.0, atol=0.05)
    np.testing.assert_allclose(table["fwhm"], FWHM, rtol=0.25)  # a Moffat's moments are not a Gaussian's
    assert np.all(table["ellipticity"] < 0.05)
    assert not table["flags"].any()
    assert np.all(np.diff(np.abs(table["score"])) <= 0)


def test_a_bright_star_has_no_lobes_and_a_stretched_one_is_seen_to_be():
    wide = moffat_psf(FWHM, 23, ellipticity=(0.4, 0.0))
    table = detect(with_stars([(60.0, 60.0, 2e5)], psf=wide))
    assert len(table) == 1
    assert table["ellipticity"][0] > 0.2


def test_a_cosmic_ray_is_sharper_than_a_star():
    difference = with_stars([(30.0, 40.0, 900.0)])
    difference[80, 90] += 300.0
    difference[80, 40] -= 300.0
    table = detect(difference)
    rays = np.asarray(table["y"]) > 60
    assert len(table) == 3
    assert rays.sum() == 2
    assert (flagged(table, "cosmic_ray") == rays).all()


def test_the_flag_for_cosmic_rays_spares_faint_stars_in_noise():
    rng = np.random.default_rng(5)
    truth = [(x, y, 420.0) for x in range(20, 120, 18) for y in range(20, 110, 18)]  # 6 sigma
    difference = with_stars(truth, rng.normal(0, SIGMA, SHAPE))
    table = detect(difference)
    near = cKDTree(np.array(truth)[:, :2]).query(np.column_stack([table["x"], table["y"]]))[0] < FWHM
    assert near.sum() > 0.7 * len(truth)
    assert flagged(table, "cosmic_ray")[near].mean() < 0.1


def test_what_speaks_against_a_detection_is_said():
    """A star that moved, what is left of a bright star, a saturated neighbour, masked pixels."""
    difference = with_stars([(30.0, 30.0, 5000.0), (33.0, 30.0, -4500.0), (80.0, 30.0, 800.0), (30.0, 90.0, 800.0),
                             (90.0, 90.0, 1500.0)])
    bits = np.zeros(SHAPE, np.uint8)
    bits[84, 30] = PIXEL_FLAGS.saturated
    bits[91, 90] = PIXEL_FLAGS.bad
    stars = KnownStars(np.array([[81.0, 30.0], [30.0, 96.0], [10.0, 110.0]]), np.array([1e5, 900.0, np.nan]))
    table = detect(difference, stars=stars, bits=bits)
    xy = np.column_stack([table["x"], table["y"]])
    row = cKDTree(xy).query([[30, 30], [33, 30], [80, 30], [30, 90], [90, 90]])[1]
    assert [CANDIDATE_FLAGS.decode(flags) for flags in table["flags"][row]] == [
        ("dipole",), ("dipole",), ("bright_star",), ("saturated",), ("masked_pixels",)]
    assert table["star"][row][2] == 0
    assert table["distance"][row][2] == pytest.approx(1.0, abs=0.05)
    assert table["flux_diff"][row][4] == pytest.approx(1500, rel=0.02)  # made up for


def test_false_alarms_are_as_many_as_gauss_has_them():
    """Peaks of a Gaussian field above u: per pixel lambda (2 pi)^-1.5 u exp(-u^2/2) of either sign [Adler 1981]."""
    rng, found, area, moments = np.random.default_rng(6), 0, 0, []
    threshold = 3.5
    for _ in range(80):
        difference = rng.normal(0, SIGMA, SHAPE)
        score = gpudia.score_image(difference, np.full(SHAPE, SIGMA**2), PSF).score
        inner = score[15:-15, 15:-15]
        moments.append(-np.log(np.mean(inner[1:] * inner[:-1])) - np.log(np.mean(inner[:, 1:] * inner[:, :-1])))
        table = detect(difference, threshold)
        x, y = table["x"], table["y"]
        found += int(((x >= 15) & (x < SHAPE[1] - 15) & (y >= 15) & (y < SHAPE[0] - 15)).sum())
        area += inner.size
    expected = 2 * area * np.mean(moments) / (2 * np.pi) ** 1.5 * threshold * np.exp(-threshold**2 / 2)
    assert expected > 100
    assert found == pytest.approx(expected, abs=4 * np.sqrt(expected))


def test_detections_of_one_place_are_one_candidate():
    rng = np.random.default_rng(1)
    places = np.array([[20.0, 20.0], [24.0, 20.0], [60.0, 50.0]])
    xy = np.concatenate([p + rng.normal(0, 0.3, (15, 2)) for p in places])
    score = np.repeat([8.0, -20.0, 12.0], 15) + rng.random(45)
    place = associate(xy, score, 2.0)
    assert [set(place[15 * k:15 * k + 15]) for k in range(3)] == [{2}, {0}, {1}]
    assert len(associate(np.empty((0, 2)), np.empty(0), 2.0)) == 0


def test_nothing_to_find_and_wrong_input():
    assert len(detect(np.zeros(SHAPE))) == 0
    assert len(detect(np.full(SHAPE, np.nan))) == 0
    flat = np.zeros(SHAPE)
    score = gpudia.score_image(flat, flat + 1, PSF)
    with pytest.raises(InputError, match="fwhm must be finite and positive, got nan"):
        detect_peaks(score, flat, flat + 1, flat.astype(np.uint8), PSF, np.nan, NOBODY)
    with pytest.raises(InputError, match=r"bits must have shape \(120, 130\), got \(3, 3\)"):
        detect_peaks(score, flat, flat + 1, np.zeros((3, 3), np.uint8), PSF, 3.0, NOBODY)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A simulated series with variables, and the folder of a run that searched it without looking at the catalog."""
    series = simulate_field(SimulationSettings(shape=(200, 210), n_epochs=6, seed=21, n_variables=4,
                                               fwhm_range=(3.0, 4.5)))
    folder = tmp_path_factory.mktemp("searched")
    write_series(series, folder / "frames")
    assert main(["run", str(folder / "frames"), "--detect", "--kernel-size", "15", "--output", str(folder / "out"),
                 "--quiet"]) == 0
    return series, folder / "out"


def test_variables_are_candidates(searched):
    """Every variable whose difference from the reference is above 8 of its bound in some epoch, in the right place."""
    series, output = searched
    table = Table.read(output / "candidates.ecsv")
    reference = next(f for f in series.frames if f.name == table.meta["reference"])
    tree = cKDTree(np.column_stack([table["x"], table["y"]]))
    seen = 0
    for star in series.variables:
        change = (star["flux"] - star["flux"][reference.index]) * [f.transparency for f in series.frames]
        x, y = (float(v) for v in reference.position(star["x"], star["y"]))
        good = [c for c, f, floor in zip(change, series.frames, star["floor"], strict=True)
                if f is not reference and abs(c) > 8 * np.hypot(floor, star["floor"][reference.index] * f.transparency
                                                                 / reference.transparency)]
        if not good or not (12 < x < 197 and 12 < y < 187):
            continue
        distance, row = tree.query([x, y])
        assert distance < 1.5
        assert table["n_epochs"][row] >= 0.5 * len(good)
        seen += 1
    assert seen >= 3
    best = table[int(np.argmax(np.abs(table["score"])))]
    assert best["flags"] & ~CANDIDATE_FLAGS.one_epoch == 0
    assert np.all(np.diff(np.abs(table["score"])) <= 0)


def test_files_of_the_search(searched):
    series, output = searched
    table, detections = (Table.read(output / f"{name}.ecsv") for name in ("candidates", "detections"))
    assert set(detections["candidate"]) == set(table["id"])
    assert np.abs(detections["score"]).min() >= 5
    assert set(detections["image"]) <= {f.name for f in series.frames} - {table.meta["reference"]}
    for row in table:
        own = detections[detections["candidate"] == row["id"]]
        assert row["n_epochs"] == len(set(own["image"]))
        assert row["n_positive"] + row["n_negative"] == len(own)
        assert imread(output / row["thumbnail"]).shape[0] == 41 * 4
    assert (output / "plots" / "candidates.png").exists()
    name = table["image"][0]
    with fits.open(output / "difference" / f"{name}.fits") as hdus:
        score, white = hdus["SCORE"].data, hdus["DECORR"].data
        x, y = (int(np.rint(table[c][0] - o)) for c, o in zip(("x", "y"), table.meta["origin"], strict=True))
    assert np.nanmax(np.abs(score[y - 2:y + 3, x - 2:x + 3])) == pytest.approx(abs(table["score"][0]), rel=0.1)
    assert np.isfinite(white).mean() > 0.5


def test_the_score_of_a_run_is_what_it_says(searched):
    """Crowded field, kernels fitted, variables in it: the middle of the scores is N(0, 1)."""
    _, output = searched
    for path in (output / "difference").glob("*.fits"):
        with fits.open(path) as hdus:
            if hdus[0].header["IMAGE"] == hdus[0].header["REFERENC"]:
                continue
            score = hdus["SCORE"].data
        assert 1.4826 * np.nanmedian(np.abs(score)) == pytest.approx(1.0, abs=0.1)


def test_a_series_in_which_nothing_varies_has_hardly_a_candidate(tmp_path):
    quiet = SimulationSettings(shape=(180, 190), n_epochs=5, seed=22, n_variables=0, microlensing=False, cosmic_rays=0,
                               saturation=1e9, fwhm_range=(3.0, 4.5))
    write_series(simulate_field(quiet), tmp_path / "frames")
    result = gpudia.run(gpudia.RunConfig(str(tmp_path / "frames"), str(tmp_path / "out"), detect=5, products=False,
                                         kernel_size=15))
    assert result.candidates is not None
    assert (result.candidates["flags"] & ~CANDIDATE_FLAGS.one_epoch == 0).sum() <= 1
    assert "candidates" in result.summary()
    assert not (tmp_path / "out" / "plots" / "candidates.png").exists()


def test_the_threshold_has_a_rule(tmp_path, capsys):
    assert main(["run", str(tmp_path), "--output", str(tmp_path / "out"), "--detect", "2"]) == 2
    assert "detect must be a number of sigma, at least 3, got 2" in capsys.readouterr().err
