"""Injection and recovery: what is put into the frames comes back, and the books say what does not."""

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from matplotlib.image import imread

import gpudia
from gpudia.cli import main
from gpudia.errors import ConfigError, FrameError
from gpudia.images import copy_with_light, read_frame
from gpudia.pipeline.injection import SHAPES
from gpudia.pipeline.recovery import _statistics
from gpudia.simulate import SimulationSettings, simulate_field, write_series

QUIET = SimulationSettings(shape=(190, 200), n_epochs=4, seed=31, n_variables=0, microlensing=False,
                           fwhm_range=(3.0, 4.0), star_density=1 / 200, mag_range=(15.5, 22.0))


@pytest.fixture(scope="module")
def series():
    return simulate_field(QUIET)


def light_of(shape, seed=0):
    return np.random.default_rng(seed).uniform(0, 50, shape)


@pytest.mark.parametrize(("layout", "compress"), [("lco", False), ("lco", True), ("plain", False)])
def test_a_copy_differs_by_the_light_alone(series, tmp_path, layout, compress):
    source = write_series(series, tmp_path / "frames", layout, compress)[0]
    before, content = read_frame(source), source.read_bytes()
    light = light_of(before.shape)
    after = read_frame(copy_with_light(source, tmp_path / "copy.fits", light, gain=2.0))
    assert source.read_bytes() == content
    np.testing.assert_allclose(after.data - before.data, light, atol=2e-3)  # float32 of some thousand ADU
    if layout == "lco":
        np.testing.assert_allclose(after.variance, before.variance + light / 2.0, rtol=1e-5)
        np.testing.assert_array_equal(after.mask, before.mask | (after.mask & 2))
        assert after.catalog.colnames == before.catalog.colnames
    assert (after.mjd, after.gain, after.filter) == (before.mjd, before.gain, before.filter)
    np.testing.assert_allclose(after.wcs.wcs.crval, before.wcs.wcs.crval)


@pytest.mark.parametrize("kind", [np.uint16, np.int16, ">f8"])
def test_a_copy_keeps_the_kind_of_number(tmp_path, kind):
    data = np.arange(400, dtype=float).reshape(20, 20) * 80
    fits.PrimaryHDU(data.astype(kind)).writeto(tmp_path / "frame.fits")
    light = light_of(data.shape)
    light[0, 0] = 1e6
    copy_with_light(tmp_path / "frame.fits", tmp_path / "copy.fits", light)
    with fits.open(tmp_path / "copy.fits") as hdus:
        found = hdus[0].data
    assert found.dtype.kind == np.dtype(kind).kind
    assert found.dtype.itemsize == np.dtype(kind).itemsize
    limit = np.inf if np.dtype(kind).kind == "f" else np.iinfo(kind).max
    np.testing.assert_allclose(found, np.minimum(data + light, limit), atol=0.5)


@pytest.fixture(scope="module")
def frames(series, tmp_path_factory):
    folder = tmp_path_factory.mktemp("frames")
    write_series(series, folder)
    return folder


@pytest.fixture(scope="module")
def constant(frames, tmp_path_factory):
    """What comes back of constant stars, by the command."""
    output = tmp_path_factory.mktemp("injected") / "out"
    assert main(["inject", str(frames), "--output", str(output), "--n", "40", "--kernel-size", "13", "--seed", "3",
                 "--spatial-degree", "0", "--quiet"]) == 0
    return output


def pulls_of(table, method):
    good = table["usable"]
    return np.asarray((table[method] - table["expected"]) / table[f"{method}_err"])[good]


def test_fluxes_come_back(constant):
    epochs, bins = Table.read(constant / "injection_epochs.ecsv"), Table.read(constant / "injection.ecsv")
    assert len(epochs) == 3 * len(set(epochs["id"]))
    assert epochs["usable"].mean() > 0.8
    for method in ("ap", "psf"):
        pulls = pulls_of(epochs, method)
        # epochs share the reference's noise: no more than one independent pull for each star is counted on
        n = len(set(epochs["id"]))
        assert abs(np.median(pulls)) < 4 * 1.25 / np.sqrt(n)
        assert 1.4826 * np.median(np.abs(pulls)) == pytest.approx(1.0, abs=0.35)
    assert np.all(np.diff(bins["mag"]) > 0)
    assert bins["n"].sum() == epochs["usable"].sum()
    assert imread(constant / "injection.png").shape[2] == 4


def test_completeness_rises_with_the_signal(constant):
    epochs = Table.read(constant / "injection_epochs.ecsv")
    epochs = epochs[epochs["usable"]]
    snr = np.abs(epochs["expected"] / epochs["psf_err"])
    assert epochs["detected"][snr > 9].mean() > 0.9
    assert epochs["detected"][snr < 3].mean() < 0.3
    detected = epochs[epochs["detected"]]
    assert (np.abs(detected["score"]) >= 5).all()
    assert (detected["score"] * detected["expected"] > 0).all()


def test_the_run_measures_the_places(constant):
    """They are sources of the run, with the ids of the table of positions."""
    positions = Table.read(constant / "positions.ecsv")
    curves = gpudia.read_lightcurves(constant / "run")
    rows = np.isin(curves.sources["source_id"], positions["id"])
    assert rows.sum() == len(positions)
    np.testing.assert_allclose(np.sort(curves.sources["x"][rows]), np.sort(positions["x"]))
    assert np.isfinite(curves.sources["ra"][rows]).all()
    plain = gpudia.read_lightcurves(constant / "plain")
    assert not np.isin(positions["id"], plain.sources["source_id"]).any()


def test_a_star_that_is_on_the_reference_gives_negative_differences(frames, tmp_path):
    config = gpudia.RunConfig(str(frames), str(tmp_path / "out"), kernel_size=13, spatial_degree=0)
    found = gpudia.inject(config, gpudia.Injection(n=25, shape="sine", seed=4, flux=(3000.0, 30000.0)))
    expected = np.asarray(found.epochs["expected"])
    assert (expected < 0).sum() > 5
    assert (expected > 0).sum() > 5
    for method in ("ap", "psf"):
        assert 1.4826 * np.median(np.abs(pulls_of(found.epochs, method))) < 1.6
        total = found.totals(method)
        # what is left beyond the two PSFs' difference is within its error, and 3 % in any case
        assert abs(total["bias"] - total["psf_part"]) < 4 * total["bias_err"] + 0.005
        assert abs(total["bias"]) < 0.05
    text = found.summary()
    assert "25 stars (sine) injected into 3 frames" in text
    assert "blind detection above 5 sigma" in text


@pytest.mark.parametrize("shape", SHAPES)
def test_light_curves(shape):
    from gpudia.pipeline.injection import _CURVES

    rng, amplitude = np.random.default_rng(1), np.array([10.0, 100.0, 1000.0])
    flux = _CURVES[shape](np.linspace(0, 1, 2001), amplitude, rng)
    assert flux.shape == (2001, 3)
    assert (flux >= 0).all()
    reach = np.ptp(flux, axis=0) if shape != "constant" else flux.max(axis=0)
    np.testing.assert_allclose(reach, amplitude * (2 if shape == "sine" else 1), rtol=0.2)


@pytest.mark.parametrize(("change", "message"), [
    ({"n": 0}, "n must be an integer of at least 1, got 0"),
    ({"shape": "square"}, "shape must be one of constant, step, sine, paczynski, got 'square'"),
    ({"flux": (5.0, 1.0)}, r"flux must be two positive numbers in ascending order, got \(5.0, 1.0\)"),
    ({"flux": (0.0, 1.0)}, "flux must be two positive numbers"),
    ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
])
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        gpudia.Injection(**change)


def test_what_cannot_be_injected_is_said(frames, tmp_path, capsys):
    config = gpudia.RunConfig(str(frames), str(tmp_path / "out"), reference="stack")
    with pytest.raises(ConfigError, match="reference must be 'auto' or a file for an injection, got 'stack'"):
        gpudia.inject(config)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    assert main(["inject", str(frames), "--output", str(tmp_path / "full")]) == 2
    assert "output must be a new or empty folder" in capsys.readouterr().err
    one = sorted(frames.glob("*.fits"))[0]
    with pytest.raises(FrameError, match="frames must be at least two that can be subtracted"):
        gpudia.inject(gpudia.RunConfig(str(one), str(tmp_path / "one"), kernel_size=13, spatial_degree=0))


@pytest.fixture(scope="module")
def wide(frames, tmp_path_factory):
    """Options of a quick run."""
    return [str(frames), "--kernel-size", "13", "--spatial-degree", "0", "--no-products", "--quiet"]


@pytest.mark.parametrize(("text", "message"), [
    ("a,b\n1,2\n", "positions must have columns x, y or ra, dec, got a, b"),
    ("x,y\n1,nan\n", "positions must be finite numbers with whole numbers as id"),
    ("x,y,id\n50,60,1.5\n", "positions must be finite numbers with whole numbers as id"),
    ("x,y,id\n50,60,7\n70,60,7\n", "positions must have ids of their own"),
    (None, "positions must be a table that astropy can read"),
])
def test_positions_that_are_none_are_refused(wide, tmp_path, capsys, text, message):
    path = tmp_path / "positions.csv"
    if text is not None:
        path.write_text(text)
    assert main(["run", *wide, "--positions", str(path), "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_positions_on_the_sky_are_measured(series, wide, tmp_path):
    x, y = np.array([60.0, 90.5, 5000.0]), np.array([70.0, 100.25, 50.0])
    ra, dec = series.reference.wcs.all_pix2world(x, y, 0)
    Table({"RA": ra, "DEC": dec}).write(tmp_path / "positions.csv")
    assert main(["run", *wide, "--positions", str(tmp_path / "positions.csv"), "--reference",
                 wide[0] + f"/{series.reference.name}.fits", "--output", str(tmp_path / "out")]) == 0
    sources = gpudia.read_lightcurves(tmp_path / "out").sources[-2:]
    np.testing.assert_allclose(sources["x"], x[:2], atol=1e-6)
    np.testing.assert_allclose(sources["y"], y[:2], atol=1e-6)
    np.testing.assert_allclose(sources["ra"], ra[:2])
    assert "1 of 3 lie outside" in (tmp_path / "out" / "gpudia.log").read_text()


def test_pulls_are_told_with_the_part_of_the_psf_and_without():
    """Noise of one sigma, and 2 sigma from star to star that the PSFs' difference explains."""
    rng, n = np.random.default_rng(1), 4000
    part, error = 20.0 * rng.normal(size=n), np.full(n, 10.0)
    found = _statistics(Table({"id": np.arange(n), "expected": np.full(n, 500.0), "usable": np.ones(n, bool),
                               "psf": 500.0 + part + error * rng.normal(size=n), "psf_err": error,
                               "psf_psf_part": part}), "psf")
    assert found["pull_width"] == pytest.approx(np.sqrt(5), rel=4 * found["pull_width_err"] / found["pull_width"])
    assert found["pull_left_width"] == pytest.approx(1.0, abs=4 * 1.2 / np.sqrt(2 * n))
