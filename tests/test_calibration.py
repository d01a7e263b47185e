"""Magnitudes: the zero point from standards, from files of many kinds, from frames' own catalogs, and none at all."""

from __future__ import annotations

from pathlib import Path

import astropy.units as u
import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from astropy.timeseries import TimeSeries
from conftest import held
from scipy.spatial import cKDTree

import gpudia
from gpudia.cli import main
from gpudia.config import RunConfig
from gpudia.errors import ConfigError, InputError
from gpudia.flags import SOURCE_FLAGS
from gpudia.images import catalog_of
from gpudia.photometry import ZeroPoint, fit_zero_point
from gpudia.pipeline.calibrate import photometric_catalog, zero_point_of
from gpudia.pipeline.looks import Look, Seen
from gpudia.simulate import SimulationSettings, simulate_field, write_series


def standards(n, scatter, rng):
    """Fluxes with errors and catalog magnitudes with errors, zero point 27."""
    flux = 10 ** rng.uniform(3, 5, n)
    flux_err, mag_err = np.sqrt(flux + 1000), rng.uniform(0.005, 0.05, n)
    mag = 27 - 2.5 * np.log10(flux) + np.hypot(mag_err, scatter) * rng.normal(size=n)
    return flux + flux_err * rng.normal(size=n), flux_err, mag, mag_err


@pytest.mark.parametrize("scatter", [0.0, 0.03, 0.1])
def test_the_error_of_a_zero_point_is_that_of_many_draws(scatter):
    rng = np.random.default_rng(1)
    found = [fit_zero_point(*standards(25, scatter, rng)) for _ in range(600)]
    pulls = np.array([(z.value - 27) / z.error for z in found])
    assert abs(pulls.mean()) < 4 / np.sqrt(600)
    assert 0.7 < pulls.std() < 1.2  # a little too careful where the stated errors explain all
    if scatter:
        assert np.median([z.scatter for z in found]) == pytest.approx(np.hypot(scatter, 0.03), rel=0.2)


def test_a_quarter_of_wrong_stars_does_no_harm():
    """Blends are brighter, and some entries are other stars."""
    rng = np.random.default_rng(2)
    flux, flux_err, mag, mag_err = standards(60, 0.02, rng)
    flux[:15] *= rng.uniform(1.3, 10, 15)
    flux[20], mag[21], mag_err[22] = -5.0, np.nan, np.nan
    zero = fit_zero_point(flux, flux_err, mag, mag_err, "file")
    assert abs(zero.value - 27) < 4 * zero.error
    assert zero.error < 0.012
    assert 40 <= zero.n <= 45 + 3
    assert "from" in str(zero) and "file" in str(zero)  # noqa: PT018


def test_too_few_stars_are_no_zero_point():
    with pytest.raises(InputError, match="a zero point needs at least 3 stars with a flux and a magnitude, got 2"):
        fit_zero_point([1e4, 1e4, -1, 1e4], 10, [20, 20, 20, np.nan])
    with pytest.raises(InputError, match="got 0"):
        fit_zero_point([], [], [])


@pytest.mark.parametrize("zero", [ZeroPoint(), ZeroPoint(27.5, source="given"),
                                  ZeroPoint(27.5, 0.01, 12, 0.03, "stars.ecsv")])
def test_cards_keep_a_zero_point(zero, tmp_path):
    hdu = fits.PrimaryHDU()
    hdu.header.update(zero.cards())
    hdu.writeto(tmp_path / "a.fits")
    back = ZeroPoint.from_cards(fits.getheader(tmp_path / "a.fits"))
    assert str(back) == str(zero)
    np.testing.assert_equal((back.error, back.n, back.scatter), (zero.error, zero.n, zero.scatter))
    assert not ZeroPoint.from_cards({}).calibrated
    assert ZeroPoint(1.0, source="é.csv" * 20).cards()["ZPSOURCE"][0].isascii()


# ------------------------------------------------------------------------------------- catalog files and stars


N = 30
RA, DEC, MAG = 10 + np.arange(N) * 0.002, np.full(N, -29.5), np.linspace(14, 18, N)


def settings(path="auto", **changes):
    return RunConfig("-", "-", photometric_catalog=str(path), backend="numpy", **changes)


def sources(**changes):
    """Stars of zero point 25, with errors of 1 %."""
    flux = 10 ** (0.4 * (25 - MAG))
    table = Table({"source_id": np.arange(N), "ra": RA, "dec": DEC, "flux_ref": flux, "flux_ref_err": 0.01 * flux,
                   "flags": np.zeros(N, np.int32)})
    for name, value in changes.items():
        table[name] = value
    return table


def look(catalog=None):
    return Look(Path("ref.fits"), "ref", Seen(catalog=catalog))


TABLES = {
    "a.csv": Table({"ra": RA, "dec": DEC, "mag": MAG}),
    "a.ecsv": Table({"RA": RA * u.deg, "DEC": DEC * u.deg, "Mag": MAG * u.mag, "magerr": np.full(N, 0.01) * u.mag}),
    "b.ecsv": Table({"ra": (RA * u.deg).to(u.hourangle), "dec": (DEC * u.deg).to(u.rad), "mag": MAG}),
    "a.fits": Table({"RAJ2000": RA, "DEJ2000": DEC, "mag": MAG, "e_mag": np.full(N, 0.01)}),
    "a.txt": Table({"ra": [f"{r / 15:.9f}h" for r in RA], "dec": [f"{d:.9f}d" for d in DEC], "mag": MAG}),
}


@pytest.mark.parametrize("name", TABLES)
def test_catalog_files_of_many_kinds(name, tmp_path):
    form = {"txt": "ascii.commented_header"}.get(name.split(".")[1])
    TABLES[name].write(tmp_path / name, **({"format": form} if form else {}))
    if form:  # astropy does not guess a format from .txt
        (tmp_path / name).rename(tmp_path / "a.dat")
        Table.read(tmp_path / "a.dat", format="ascii").write(tmp_path / "a.csv")
        name = "a.csv"
    zero, doubt = zero_point_of(settings(tmp_path / name), look(), sources())
    assert not doubt
    assert (zero.n, zero.source) == (N, name)
    assert zero.value == pytest.approx(25, abs=1e-3)


def test_wrong_catalog_files_are_named(tmp_path):
    good = TABLES["a.csv"]
    cases = {
        "text.csv": (Table({"ra": RA, "dec": DEC, "mag": ["faint"] * N}), "must have numbers in mag"),
        "none.csv": (good["ra", "dec"], "must have a column mag, got ra, dec in .*magnitude_column"),
        "sky.csv": (good["dec", "mag"], "must have a column ra or raj2000, got dec, mag"),
        "jansky.ecsv": (Table({"ra": RA, "dec": DEC, "mag": MAG * u.Jy}), "must be in mag, got mag in Jy"),
        "metre.ecsv": (Table({"ra": RA * u.m, "dec": DEC, "mag": MAG}), "must have positions in angles, got .* in m"),
        "empty.csv": (good[:0], "must have positions in degrees and magnitudes, got no row"),
        "radians.csv": (Table({"ra": RA, "dec": DEC * 60, "mag": MAG}), "must have positions in degrees"),
    }
    for name, (table, message) in cases.items():
        table.write(tmp_path / name)
        with pytest.raises(ConfigError, match=message):
            photometric_catalog(settings(tmp_path / name))
    (tmp_path / "junk").write_bytes(b"\x00\x01junk")
    for name in ("junk", "absent.csv"):
        with pytest.raises(ConfigError, match=f"must be a table that astropy can read, got .*{name}"):
            photometric_catalog(settings(tmp_path / name))
    assert photometric_catalog(settings()) is None
    assert photometric_catalog(settings("none")) is None


def test_settings_that_exclude_each_other():
    with pytest.raises(ConfigError, match=r"photometric_catalog must not be given with zero_point, got a\.csv"):
        settings("a.csv", zero_point=25)
    with pytest.raises(ConfigError, match="zero_point must be given with zero_point_err"):
        settings(zero_point_err=0.1)
    with pytest.raises(ConfigError, match="zero_point must be a number of magnitudes, got 'bright'"):
        settings(zero_point="bright")
    zero, _ = zero_point_of(settings(zero_point=-25, zero_point_err=0.0), look(), sources())
    assert (zero.value, zero.error, zero.source) == (-25, 0.0, "given")


def test_standards_are_stars_that_can_be_trusted(tmp_path):
    TABLES["a.csv"].write(tmp_path / "a.csv")
    stars = sources()
    for i, flag in enumerate(("saturated", "masked_pixels", "variable", "neighbour", "reference_masked")):
        stars["flags"][i] = getattr(SOURCE_FLAGS, flag)
        stars["flux_ref"][i] *= 5
    stars["flux_ref_err"][5] = stars["flux_ref"][5]
    stars["ra"][6] += 2 / 3600
    stars["ra"][7] = np.nan
    zero, _ = zero_point_of(settings(tmp_path / "a.csv"), look(), stars)
    assert zero.n == N - 8
    stars["flags"][8:] = SOURCE_FLAGS.neighbour  # a crowded field: better those than none
    zero, _ = zero_point_of(settings(tmp_path / "a.csv"), look(), stars)
    assert zero.n >= N - 8


def test_a_catalog_of_elsewhere_leaves_magnitudes_instrumental(tmp_path):
    Table({"ra": RA / 15, "dec": DEC, "mag": MAG}).write(tmp_path / "hours.csv")
    zero, doubt = zero_point_of(settings(tmp_path / "hours.csv"), look(), sources())
    assert not zero.calibrated
    assert "0 of 30 stars are within 1 arcsec of an entry of hours.csv (30 entries)" in doubt


def test_magnitudes_of_a_frame_s_own_catalog():
    flux = 10 ** (0.4 * (23 - MAG))
    own = {"x": np.arange(N), "y": np.arange(N), "ra": RA, "dec": DEC, "flux": flux}
    calibrated = catalog_of(Table(own | {"MAG": MAG, "MAGERR": np.full(N, 0.02)}))
    np.testing.assert_allclose(calibrated["mag_err"], 0.02)
    zero, _ = zero_point_of(settings(), look(calibrated), sources())
    assert (zero.n, zero.source) == (N, "catalog of ref")
    assert zero.value == pytest.approx(25, abs=1e-3)
    assert not zero_point_of(settings("none"), look(calibrated), sources())[0].calibrated
    for magnitudes in ({}, {"mag": -2.5 * np.log10(flux)}, {"mag": 25 - 2.5 * np.log10(flux)},
                       {"mag": np.full(N, np.nan)}):
        plain = catalog_of(Table(own | magnitudes))
        assert not zero_point_of(settings(), look(plain), sources())[0].calibrated


# ------------------------------------------------------------------------------------------------- the whole job


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three frames whose catalogs have magnitudes; the output folder and the simulated series."""
    folder = tmp_path_factory.mktemp("calibrated")
    series = simulate_field(SimulationSettings(shape=(180, 190), n_epochs=3, seed=4, rotation=0.02, n_variables=0,
                                               fwhm_range=(2.8, 4.0), zero_point=28.0))
    paths = write_series(series, folder / "frames")
    stars = cKDTree(np.column_stack([series.truth["ra"], series.truth["dec"]]))
    for path in paths:
        with fits.open(path) as hdus:
            catalog = Table(hdus["CAT"].data)
            nearest = stars.query(np.column_stack([catalog["ra"], catalog["dec"]]))[1]
            catalog["mag"] = np.asarray(series.truth["mag"])[nearest]
            catalog["magerr"] = 0.005
            hdus["CAT"] = fits.BinTableHDU(catalog, name="CAT")
            hdus.writeto(path, overwrite=True)
    assert main(["run", str(folder / "frames"), "--ra", str(series.truth["ra"][0]), "--dec",
                 str(series.truth["dec"][0]), "--size", "150", "--kernel-size", "15", "--output",
                 str(folder / "out"), "--quiet"]) == 0
    return folder / "out", series


def test_a_run_s_magnitudes_are_those_of_the_sky(run):
    output, series = run
    held(output)
    target = TimeSeries.read(output / "target.ecsv", format="ascii.ecsv", time_column="time")
    reference = next(f for f in series.frames if f.name == target.meta["reference"])
    true_zero = 28.0 + 2.5 * np.log10(reference.transparency)
    # neighbours within the apertures: see the README
    assert target.meta["zero_point"] == pytest.approx(true_zero, abs=3 * target.meta["zero_point_error"] + 0.02)
    assert target.meta["zero_point_n"] >= 3
    assert target.meta["magnitudes"].startswith("calibrated: zero point 2")
    assert target["mag"].info.description == target.meta["magnitudes"]
    assert str(target["mag"].unit) == "mag"
    truth = [28.0 - 2.5 * np.log10(series.truth["flux"][0][f.index]) for name in target["image"] for f in series.frames
             if f.name == name]
    common = target.meta["flux_ref_err"] / target["flux_ref"][0] * 1.0857
    off = np.asarray(getattr(target["mag"], "value", target["mag"])) - truth
    allowed = np.asarray(getattr(target["mag_err"], "value", target["mag_err"])) * 4
    assert (np.abs(off) < allowed + 4 * common + 3 * target.meta["zero_point_error"] + 0.02).all()


def test_a_finished_run_can_be_calibrated_anew(run):
    """The setting may change when a run is gone on with: no frame is done again, and only magnitudes change."""
    output, _ = run
    before, count = Table.read(output / "target.ecsv"), (output / "journal.jsonl").read_text().count('"event": "epoch"')
    settings = RunConfig.from_toml(output / "run.toml", resume=True, zero_point=20.0)
    gpudia.run(settings)
    after = Table.read(output / "target.ecsv")
    assert (output / "journal.jsonl").read_text().count('"event": "epoch"') == count
    np.testing.assert_array_equal(after["flux"], before["flux"])
    np.testing.assert_allclose(np.asarray(after["mag"] - before["mag"], float), 20.0 - before.meta["zero_point"],
                               rtol=0, atol=1e-9)
    assert "zero point 20.0000 (given)" in after.meta["magnitudes"]


def test_a_run_s_products_know_the_zero_point(run):
    output, _ = run
    curves = gpudia.read_lightcurves(output)
    meta = Table.read(output / "target.ecsv").meta
    assert curves.zero_point.calibrated
    assert curves.zero_point.value == pytest.approx(meta["zero_point"])
    for name in ("lightcurves.fits", "reference.fits"):
        assert fits.getheader(output / name)["ZEROPNT"] == pytest.approx(meta["zero_point"])
    seen = np.isfinite(curves.sources["mag"])
    flux = np.asarray(curves.sources["flux_ref"], float)
    np.testing.assert_allclose(np.asarray(curves.sources["mag"])[seen],
                               curves.zero_point.value - 2.5 * np.log10(flux[seen]), rtol=1e-6)
    listed = Table.read(output / "variables.ecsv")
    assert listed["mag"].description == meta["magnitudes"]
