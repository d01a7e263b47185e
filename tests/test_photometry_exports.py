"""Light curves for other programs: written, and read back in the way in which these read them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import QTable, Table
from astropy.time import Time
from astropy.timeseries import TimeSeries
from numpy.testing import assert_allclose

from gpudia import read_lightcurves
from gpudia.cli import main
from gpudia.errors import InputError
from gpudia.flags import SOURCE_FLAGS
from gpudia.photometry import LightCurves, ZeroPoint, export_all, export_star
from gpudia.photometry.exports import three_columns
from gpudia.times import barycentric_times

SITE = (-70.8048, -30.1674, 2198.0)
MJD = 60000 + np.array([3.25, 1.125, 2.5, np.nan, 4.75, 5.0, 6.0])
FLUX = np.array([1000.0, 900.0, -20.0, 950.0, 970.0, np.nan, 980.0], np.float32)
FLAGS = np.array([0, SOURCE_FLAGS.clipped_pixels, 0, 0, SOURCE_FLAGS.saturated, 0, 0])
BJD = barycentric_times(MJD, [SITE] * 7, 268.0, -29.0)


@pytest.fixture(params=[True, False], ids=["site", "no site"])
def curves(request):
    """Three stars in seven epochs: one flagged, one without a time, one not measured, one fainter than nothing."""
    epochs = Table({"file": [f"é {i}.fits" for i in range(7)], "mjd": MJD, "flags": np.zeros(7, int)})
    if request.param:
        for name, value in zip(("longitude", "latitude", "height"), SITE, strict=True):
            epochs[name] = value
    sources = Table({"source_id": [5, 6, 7], "ra": [267.0, 268.0, np.nan], "dec": [-29.5, -29.0, np.nan]})
    for name in ("x", "y", "flux_ref", "flux_ref_err", "n_good", "chi2", "flags"):
        sources[name] = np.ones(3)
    one = np.column_stack([FLUX] * 3)
    planes = {"FLUX_DIFF": one - 1000, "FLUX_DIFF_ERR": np.full_like(one, 9), "FLUX": one,
              "FLUX_ERR": np.full_like(one, 10), "FLAGS": np.column_stack([FLAGS] * 3).astype(np.int32)}
    return LightCurves(sources, epochs, planes, ZeroPoint(25.0, 0.01, 20, 0.02, "cat.csv"))


GOOD = np.array([1, 2, 0, 6])  # epochs with a time, a flux and no flag, in order of time


def times(curves):
    return BJD if "height" in curves.epochs.colnames else MJD + 2400000.5


def test_mulensmodel(curves, tmp_path):
    """MulensData: np.loadtxt(file_name, unpack=True, usecols=(0, 1, 2)), full JD, float64."""
    export_star(curves.timeseries(6), tmp_path / "a.dat", "mulensmodel")
    time, flux, error = np.loadtxt(fname=tmp_path / "a.dat", unpack=True, usecols=(0, 1, 2))
    assert_allclose(time, times(curves)[GOOD], rtol=0, atol=6e-9)
    assert_allclose(flux, FLUX[GOOD], rtol=1e-8)
    assert_allclose(error, 10, rtol=1e-5)
    text = (tmp_path / "a.dat").read_text()
    assert all(words in text for words in ("4 of 7 epochs", "1 saturated", "1 not measured", "1 without a time"))
    assert ("# time: BJD_TDB" if "height" in curves.epochs.colnames else "# time: JD (UTC)") in text
    assert "MulensData(file_name=FILE, phot_fmt='flux')" in text


def test_pylima(curves, tmp_path):
    """Telescope(lightcurve=np.loadtxt(...)): a QTable of time (JD), mag and err_mag, no row that is not finite."""
    export_star(curves.timeseries(6), tmp_path / "a.dat", "pylima", "mag")
    table = QTable(np.loadtxt(tmp_path / "a.dat"), names=["time", "mag", "err_mag"], units=["JD", "mag", "mag"])
    assert np.isfinite(table["mag"].value).all()
    assert (table["err_mag"].value > 0).all()
    bright = [1, 0, 6]
    assert_allclose(table["time"].value, times(curves)[bright], rtol=0, atol=6e-9)
    assert_allclose(table["mag"].value, 25 - 2.5 * np.log10(FLUX[bright]), rtol=1e-6)
    assert_allclose(table["err_mag"].value, 2.5 / np.log(10) * 10 / FLUX[bright], rtol=1e-5)
    text = (tmp_path / "a.dat").read_text()
    assert "1 below 3 sigma" in text
    assert "calibrated: zero point 25.0000 +- 0.0100 (cat.csv)" in text
    assert "lightcurve_names=['time', 'mag', 'err_mag'], lightcurve_units=['JD', 'mag', 'mag']" in text


def test_lightkurve(curves, tmp_path):
    """lightkurve.read: Table.read of extension 1, names in lower case, reference time from JDREFI and JDREFF."""
    export_star(curves.timeseries(6), tmp_path / "a.fits", "lightkurve")
    with fits.open(tmp_path / "a.fits") as hdus:
        header, first = hdus[1].header, hdus[0].header
        table = Table.read(hdus[1])
    assert (first["RA_OBJ"], first["DEC_OBJ"]) == (268.0, -29.0)
    assert first["OBJECT"] == "source 6"
    assert "BJDREFI" not in header  # 2454833 or 2457000 would mean Kepler or TESS
    assert "MJDREFI" not in header
    for name in table.colnames:
        table.rename_column(name, name.lower())
    time = Time(table["time"] + header["JDREFI"] + header["JDREFF"], format="jd", scale=header["TIMESYS"].lower())
    order = [1, 2, 0, 4, 5, 6]  # all but the one without a time
    assert_allclose(time.jd, times(curves)[order], rtol=0, atol=1e-9)
    assert time.scale == ("tdb" if "height" in curves.epochs.colnames else "utc")
    assert_allclose(np.ma.filled(table["flux"], np.nan), FLUX[order])
    assert_allclose(table["flux_err"], 10)
    assert table["quality"].tolist() == FLAGS[order].tolist()
    assert table["flux"].unit == "adu"
    assert len(TimeSeries(time=time, data=table["flux", "flux_err"])) == 6  # what its LightCurve is


def test_every_table_has_magnitudes_and_barycentric_times(curves, tmp_path):
    known = "height" in curves.epochs.colnames
    series, long = curves.timeseries(6), curves.to_table()
    export_all(curves, tmp_path / "all.csv", "csv")
    back = Table.read(tmp_path / "all.csv")
    for table, rows in ((long, slice(7, 14)), (back, slice(7, 14))):
        assert ("bjd_tdb" in table.colnames) == known
        mag = np.ma.filled(np.ma.asarray(table["mag"][rows]).astype(float), np.nan)
        assert_allclose(mag[[0, 1, 6]], 25 - 2.5 * np.log10(FLUX[[0, 1, 6]]), rtol=1e-6)
        assert np.isfinite(table["limit"][rows][2])
        if known:
            assert_allclose(np.ma.filled(np.ma.asarray(table["bjd_tdb"][rows]).astype(float), np.nan), BJD, rtol=0,
                            atol=1e-8)
    if known:
        assert str(series["bjd_tdb"].unit) == "d"
        assert np.isnan(curves.timeseries(7)["bjd_tdb"]).all()  # a star without a position
    assert series.meta["magnitudes"].startswith("calibrated")
    assert series.meta["zero_point_error"] == 0.01


def test_stars_of_one_field_differ_in_light_travel_time(curves):
    """By the Earth's distance projected on the difference of directions: 499 s times 0.9 degrees at most."""
    bjd = curves.barycentric_times()
    if bjd is None:
        assert "height" not in curves.epochs.colnames
        return
    assert bjd.shape == (7, 3)
    assert_allclose(bjd[:, 1], BJD, rtol=0, atol=0)
    apart = np.abs(bjd[:, 0] - bjd[:, 1])[np.isfinite(MJD)] * 86400
    separation = np.radians(np.hypot(0.5, np.cos(np.radians(29.25))))
    assert (apart < 499.0 * 1.017 * separation).all()
    assert apart.max() > 0.5


def test_streams_and_wrong_words(curves, tmp_path):
    series, stream = curves.timeseries(6), io.StringIO()
    export_star(series, stream, "pylima")
    assert len(np.loadtxt(io.StringIO(stream.getvalue()))) == 4
    cases = [
        (lambda: export_star(series, stream, "votable"), "format must be one of ecsv, csv, .*, got 'votable'"),
        (lambda: export_star(series, stream, "lightkurve"), "to must be a file for the format lightkurve"),
        (lambda: three_columns(series, "flux_psf"), "quantity must be one of flux, mag, flux_diff, got 'flux_psf'"),
        (lambda: export_all(curves, stream, "pylima"), "got 'pylima': choose one star"),
        (lambda: export_all(curves, stream, "parquet"), "to must be a file for the format parquet"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message):
            call()
    assert not list(tmp_path.iterdir())


def test_the_command_writes_each_format(curves, tmp_path, capsys):
    curves.write(tmp_path / "lightcurves.fits")
    assert str(read_lightcurves(tmp_path).zero_point) == str(curves.zero_point)
    for form in ("ecsv", "csv", "parquet", "pylima", "mulensmodel", "lightkurve"):
        if form == "parquet":
            pytest.importorskip("pyarrow")
        path = tmp_path / f"star.{form}"
        assert main(["lightcurve", str(tmp_path), "--source", "6", "--format", form, "--output", str(path)]) == 0
        assert path.stat().st_size > 100
    assert main(["lightcurve", str(tmp_path), "--format", "pylima"]) == 2
    assert "choose one star" in capsys.readouterr().err
    assert main(["lightcurve", str(tmp_path), "--target"]) == 2
    assert "target needs the folder of a run with --ra and --dec" in capsys.readouterr().err
    curves.timeseries(6).write(tmp_path / "target.ecsv", format="ascii.ecsv")
    assert main(["lightcurve", str(tmp_path), "--target", "--format", "mulensmodel", "--quantity", "flux_diff"]) == 0
    assert_allclose(np.loadtxt(io.StringIO(capsys.readouterr().out))[:, 1], FLUX[GOOD] - 1000, rtol=1e-6)


def test_a_notebook_shows_what_it_is(curves):
    assert repr(curves).startswith("<LightCurves of 3 stars in 7 epochs, MJD 60001.12 to 60006.00; planes FLUX_DIFF")
    assert "calibrated" in repr(curves)
