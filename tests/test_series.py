"""The series table of a run, the selection of frames, mixed filters and instruments, barycentric times: end to end."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from astropy.timeseries import TimeSeries
from conftest import held
from test_report import Page

import gpudia
from gpudia.cli import main
from gpudia.errors import ConfigError, FrameError
from gpudia.flags import FRAME_FLAGS
from gpudia.images import FrameQuality, barycentric_times
from gpudia.pipeline.executors import Here
from gpudia.pipeline.looks import Look
from gpudia.pipeline.sifting import drop_odd, note_barycentric, note_untimed, select_frames, series_table
from gpudia.selection import SERIES_COLUMNS
from gpudia.simulate import SimulationSettings, simulate_field, write_series

CTIO = (-70.8048, -30.1674, 2198.0)
N = 5


def look(name, fwhm=4.0, sky=1000.0, band="rp", camera="fa15", mjd=60000.0):
    found = Look(Path(f"{name}.fits"), name, mjd=mjd, exptime=60.0, filter=band, instrument=camera, site=CTIO)
    found.quality = FrameQuality(fwhm, 0.1, 200, sky, 30.0, 0.001)
    return found


def broken(name):
    found = Look(Path(f"{name}.fits"), name)
    found.fail(FrameError("cannot be read"))
    return found


def config(**changes):
    return gpudia.RunConfig("a.fits", "out", **changes)


# ------------------------------------------------------------------------------------------------ the parts


def test_the_table_has_every_column_with_unit_and_description_and_a_row_for_every_frame():
    table = series_table([look("a"), broken("b")])
    assert table.colnames == [*(column.name for column in SERIES_COLUMNS), "longitude", "latitude", "height"]
    for column in SERIES_COLUMNS:
        assert str(table[column.name].unit or "") == column.unit
        assert table[column.name].description == column.about
        assert table[column.name].dtype.kind == ("U" if column.is_text else "i" if column.name == "n_stars" else "f")
    assert dict(zip(table.colnames, table[0], strict=True)) == pytest.approx({
        "file": "a.fits", "name": "a", "mjd": 60000.0, "exptime": 60.0, "filter": "rp", "instrument": "fa15",
        "airmass": math.nan, "fwhm": 4.0, "ellipticity": 0.1, "n_stars": 200, "sky": 1000.0, "sky_noise": 30.0,
        "saturated_fraction": 0.001, "longitude": CTIO[0], "latitude": CTIO[1], "height": CTIO[2]}, nan_ok=True)
    assert table["n_stars"][1] == -1
    assert all(np.isnan(table[c.name][1]) for c in SERIES_COLUMNS if not c.is_text and c.name != "n_stars")


def test_all_conditions_must_hold_and_the_first_that_does_not_is_the_reason():
    looks = [look("a"), look("b", fwhm=7.21), look("c", sky=9000.0), look("d", fwhm=math.nan), look("e", band="")]
    select_frames(looks, ["fwhm < 6", "sky < 5000", "filter == 'rp'"])
    assert [(k.status, k.reason) for k in looks] == [
        ("ok", ""), ("skipped", "not selected: fwhm < 6, got 7.21"), ("skipped", "not selected: sky < 5000, got 9000"),
        ("skipped", "not selected: fwhm < 6, got an unknown one"),
        ("skipped", "not selected: filter == 'rp', got an unknown one")]


def test_without_conditions_nothing_is_skipped():
    looks = [look("a"), broken("b")]
    select_frames(looks, [])
    assert [k.status for k in looks] == ["ok", "failed"]


def test_a_failed_frame_stays_failed_unless_it_is_known_not_to_be_wanted():
    looks = [look("a"), broken("b"), look("c", band="gp")]
    looks[2].fail(FrameError("no stars"))
    select_frames(looks, ["filter == 'rp'"])
    assert [k.status for k in looks] == ["ok", "failed", "skipped"]
    assert looks[1].reason == "cannot be read"


def test_a_selection_of_nothing_is_refused_with_the_reasons():
    looks = [*(look("a", fwhm=width) for width in (7.0, 7.0, 8.0, 9.0, 9.5)), look("b", sky=9.0), broken("c")]
    with pytest.raises(ConfigError, match=r"^select must leave at least one frame, got none of 6: 5 not selected: "
                                          r"fwhm < 6, got 7; 8; 9; ... \| 1 not selected: sky > 10, got 9$"):
        select_frames(looks, ["fwhm < 6", "sky > 10"])
    select_frames([broken("c")], ["fwhm < 6"])  # nothing was readable: that is for the run to say


def test_odd_frames_fail_and_cameras_may_differ_only_when_that_is_said():
    looks = [look(str(i), band="gp" if i == 3 else "rp", camera="fa16" if i > 5 else "fa15") for i in range(12)]
    with pytest.raises(ConfigError, match=r"^instrument must be the same in all frames, got fa16 \(6\), fa15 \(5\)"):
        drop_odd(looks, config())
    assert [i for i, k in enumerate(looks) if k.status == "failed"] == [3]  # of the filters one alone was odd
    drop_odd(looks, config(mixed=["instrument"]))
    assert looks[3].reason == "filter must be that of the series, rp, got gp"
    half = [look(str(i), band="gp" if i % 2 else "rp") for i in range(4)]
    with pytest.raises(ConfigError, match=r"got rp \(2\), gp \(2\): keep one with --select \"filter == 'rp'\", or let"):
        drop_odd(half, config(mixed=["instrument"]))
    drop_odd(half, config(mixed=["filter"]))
    select_frames(half, ["filter == 'gp'"])
    drop_odd(half, config())
    assert [k.status for k in half] == ["skipped", "ok", "skipped", "ok"]


def test_frames_without_a_time_are_flagged_and_said_once(caplog):
    looks = [look("a"), *(look(name, mjd=math.nan) for name in "bcdefg"), broken("h")]
    note_untimed(looks)
    assert [bool(k.flags & FRAME_FLAGS.no_time) for k in looks] == [False] + 6 * [True] + [False]
    said = [r.getMessage() for r in caplog.records if "no time" in r.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("6 of 8 frames have no time in their headers: b, c, d, e, f, ...;")
    caplog.clear()
    note_untimed(looks[:1])
    assert not caplog.records


def test_barycentric_times_need_a_target_and_a_site():
    looks = [look("a"), look("b", mjd=60010.0), look("c", mjd=math.nan), broken("d")]
    looks[1].site = None
    note_barycentric(looks, config(), Here())()
    assert "bjd_tdb" not in series_table(looks).colnames
    note_barycentric(looks, config(ra=268.0, dec=-29.0), Here())()
    times = series_table(looks)["bjd_tdb"]
    assert str(times.unit) == "d"
    assert times.info.description == "mid-exposure, BJD_TDB, of the target"
    np.testing.assert_array_equal(times, barycentric_times([60000.0, *[math.nan] * 3], [CTIO] * 4, 268.0, -29.0))
    there = (20.81, -32.38, 1760.0)
    note_barycentric(looks, config(ra=268.0, dec=-29.0, site=there), Here())()  # the setting comes before the header
    expected = barycentric_times([60000.0, 60010.0, math.nan, math.nan], [there] * 4, 268.0, -29.0)
    np.testing.assert_array_equal(series_table(looks)["bjd_tdb"], expected)


# ----------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def field():
    return simulate_field(SimulationSettings(shape=(150, 150), n_epochs=N, seed=4, fwhm_range=(2.8, 4.0),
                                             n_variables=0))


@pytest.fixture(scope="module")
def frames(field, tmp_path_factory):
    folder = tmp_path_factory.mktemp("frames")
    write_series(field, folder, layout="plain")
    return folder


@pytest.fixture(scope="module")
def options(field):
    return ["--ra", str(field.truth["ra"][0]), "--dec", str(field.truth["dec"][0]), "--size", "130", "--kernel-size",
            "11", "--spatial-degree", "0", "--quiet"]


@pytest.fixture(scope="module")
def done(frames, options, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "out"
    assert main(["run", str(frames), *options, "--no-products", "--output", str(output)]) == 0
    return output


def changed(frames, folder, **cards):
    """A copy of the frames with other cards: keyword -> one value for every frame; None takes the card away."""
    shutil.copytree(frames, folder)
    for index, path in enumerate(sorted(folder.glob("*.fits"))):
        with fits.open(path, mode="update") as hdus:
            for keyword, values in cards.items():
                if values[index] is None:
                    del hdus[0].header[keyword]
                else:
                    hdus[0].header[keyword] = values[index]
    return folder


def test_a_run_writes_what_is_known_of_every_frame(done, field):
    epochs = Table.read(done / "epochs.ecsv")
    for column in SERIES_COLUMNS:
        assert str(epochs[column.name].unit or "") == column.unit
        assert epochs[column.name].description == column.about
    assert set(epochs["filter"]) == {"rp"}
    assert set(epochs["instrument"]) == {"simulated"}
    np.testing.assert_allclose(epochs["exptime"], 60.0)
    np.testing.assert_allclose(epochs["mjd"], [f.mjd for f in field.frames], rtol=0, atol=1e-9)
    assert (epochs["n_stars"] > 20).all()
    assert (epochs["sky_noise"] > np.sqrt(epochs["sky"] / field.settings.gain) * 0.8).all()


def test_a_run_gives_barycentric_times_of_the_target(done, field):
    target = TimeSeries.read(done / "target.ecsv", format="ascii.ecsv", time_column="time")
    expected = barycentric_times([f.mjd for f in field.frames], [CTIO] * N, field.truth["ra"][0], field.truth["dec"][0])
    for table in (target, Table.read(done / "epochs.ecsv")):
        np.testing.assert_allclose(np.asarray(table["bjd_tdb"]), expected, rtol=0, atol=1e-9)
    curves = gpudia.read_lightcurves(done)
    np.testing.assert_allclose(curves.epochs["bjd_tdb"], expected, rtol=0, atol=1e-9)


def test_frames_that_are_not_selected_are_skipped_rows_and_no_failure(frames, done, options, tmp_path, capsys):
    before = Table.read(done / "epochs.ecsv")
    limit = float(np.sort(before["fwhm"])[-1])
    output = tmp_path / "out"
    assert main(["run", str(frames), *options, "--output", str(output), "--select", f"fwhm < {limit}", "--select",
                 "filter == 'rp'"]) == 0
    held(output)
    out = capsys.readouterr().out
    assert f"{N - 1} of {N} frames ok, 0 failed, 1 skipped" in out
    assert f"1 not selected: fwhm < {limit}" in out
    epochs = Table.read(output / "epochs.ecsv")
    skipped = epochs[epochs["status"] == "skipped"]
    assert list(skipped["fwhm"]) == [before["fwhm"].max()]
    assert skipped["reason"][0] == f"not selected: fwhm < {limit}, got {limit:.6g}"
    assert len(Table.read(output / "target.ecsv")) == N - 1
    assert len(gpudia.read_lightcurves(output).epochs) == N - 1
    assert len(list((output / "difference").glob("*.fits"))) == N - 1
    page = Page(output / "report.html")
    assert "1 was skipped" in page.words
    name, reason = skipped["name"][0], skipped["reason"][0]
    # The page's script greys the rows whose status is this one.
    assert [(r["image"], r["why"]) for r in page.rows() if r["status"] == "skipped"] == [(name, reason)]
    with fits.open(output / "lightcurves.fits") as hdus:
        assert "skipped" not in set(hdus["EPOCHS"].data["status"])


def test_the_reference_may_be_a_skipped_frame_only_where_it_is_named(frames, done, options, tmp_path):
    name = Table.read(done / "target.ecsv").meta["reference"]
    for kind, extra in {"auto": [], "named": ["--reference", str(frames / f"{name}.fits")]}.items():
        output = tmp_path / kind
        assert main(["run", str(frames), *options, "--no-products", "--output", str(output), "--select",
                     f"name != '{name}'", *extra]) == 0
        held(output)
        epochs = Table.read(output / "epochs.ecsv")
        row = epochs[epochs["name"] == name][0]
        assert row["status"] == "skipped"
        assert (row["flags"] & FRAME_FLAGS.is_reference > 0) == (kind == "named")
        assert (Table.read(output / "target.ecsv").meta["reference"] == name) == (kind == "named")
        assert (epochs["status"] == "ok").sum() == N - 1
    # Each frame has the same difference as in a run with all of them.
    same, before = (Table.read(folder / "epochs.ecsv") for folder in (tmp_path / "named", done))
    others = same["status"] == "ok"
    np.testing.assert_allclose(same["scale"][others], before["scale"][others], rtol=1e-6)


@pytest.mark.parametrize(("conditions", "text"), [
    (["seeing < 2"], "seeing is none (known are file, name, mjd"),
    (["fwhm <"], "select must be a condition like"),
    (["fwhm < 0.5"], "select must leave at least one frame, got none of 5: "),
])
def test_a_wrong_selection_is_wrong_usage(frames, options, conditions, text, tmp_path, capsys):
    output = tmp_path / "out"
    selected = [word for condition in conditions for word in ("--select", condition)]
    assert main(["run", str(frames), *options, "--output", str(output), *selected]) == 2
    assert text in capsys.readouterr().err
    assert output.exists() == ("leave" in text)  # a condition that is none is refused before anything is read


def test_a_mixture_of_filters_stops_the_run_and_a_selection_resolves_it(frames, options, tmp_path, capsys):
    mixed = changed(frames, tmp_path / "mixed", FILTER=["rp", "gp", "rp", "gp", None])
    output = tmp_path / "out"
    command = ["run", str(mixed), *options, "--no-products", "--output", str(output)]
    assert main(command) == 2
    assert ("filter must be the same in all frames, got rp (2), gp (2): keep one with --select \"filter == 'rp'\""
            in capsys.readouterr().err)
    assert main([*command, "--select", "filter == 'rp'"]) == 0
    assert list(Table.read(output / "epochs.ecsv")["status"]) == ["ok", "skipped", "ok", "skipped", "skipped"]
    assert main([*command, "--overwrite", "--mixed", "filter"]) == 0
    assert set(Table.read(output / "epochs.ecsv")["status"]) == {"ok"}


def test_cameras_are_mixed_only_when_that_is_said(frames, options, tmp_path, capsys):
    mixed = changed(frames, tmp_path / "mixed", INSTRUME=["fa15", "fa16", "fa15", "fa16", "fa16"])
    command = ["run", str(mixed), *options, "--no-products", "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert "instrument must be the same in all frames, got fa16 (3), fa15 (2)" in capsys.readouterr().err
    assert main([*command, "--mixed", "instrument"]) == 0


def test_without_a_site_there_are_no_barycentric_times(frames, options, tmp_path):
    bare = changed(frames, tmp_path / "bare", LATITUDE=[None] * N)
    output = tmp_path / "out"
    assert main(["run", str(bare), *options, "--no-products", "--output", str(output)]) == 0
    held(output)
    assert "bjd_tdb" not in Table.read(output / "epochs.ecsv").colnames
    assert "bjd_tdb" not in Table.read(output / "target.ecsv").colnames
    assert "no barycentric times" in (output / "gpudia.log").read_text()
    site = ["--site", *(str(value) for value in CTIO), "--overwrite"]
    assert main(["run", str(bare), *options, "--no-products", "--output", str(output), *site]) == 0
    assert np.isfinite(Table.read(output / "target.ecsv")["bjd_tdb"]).all()
