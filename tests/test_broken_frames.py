"""A hundred kinds of broken frames among good ones: each is a row with its reason, and nothing else is harmed."""

import importlib.util
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from broken_frames import KINDS
from conftest import held
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpudia.cli import main
from gpudia.errors import DataWarning, FrameError
from gpudia.flags import FRAME_FLAGS
from gpudia.images import read_frame
from gpudia.photometry import read_lightcurves
from gpudia.simulate import SimulationSettings, simulate_field, write_series

SETTINGS = SimulationSettings(shape=(110, 120), n_epochs=5, seed=4, rotation=0.0, fwhm_range=(2.8, 3.4), n_variables=0)
#: What is the same whatever other frames there are: the reference by name and a model that is given.
MODEL = ["--kernel-size", "9", "--spatial-degree", "0", "--background-degree", "1", "--aperture-radius", "4"]


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """Folder of five good frames; the first is the one that gets broken."""
    folder = tmp_path_factory.mktemp("series")
    write_series(simulate_field(SETTINGS), folder)
    return folder


def run(folder, series, output):
    """The command on a folder and the good frames, with a limit in time; its exit code and what it says on stderr."""
    good = sorted(series.glob("*.fits"))
    command = [sys.executable, "-m", "gpudia", "run", *map(str, good), *folder, "--output", str(output), *MODEL,
               "--reference", str(good[1])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def alone(series, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone") / "out"
    code, said = run([], series, output)
    assert code == 0, said
    return output


@pytest.fixture(scope="module")
def mixed(series, tmp_path_factory):
    """A run on all kinds and the good frames: output, file of every kind, what was said."""
    folder, files = tmp_path_factory.mktemp("mixed"), {}
    source = sorted(series.glob("*.fits"))[0]
    for i, (kind, (make, *_)) in enumerate(KINDS.items()):
        place = folder / f"{i:03d}" / f"kind{i:03d}.fits"
        place.parent.mkdir()
        shutil.copy(source, place)
        made = make(place)
        files[kind] = made if isinstance(made, Path) else place
    output = folder / "out"
    code, said = run([str(path) for path in files.values()], series, output)
    assert code == 3, said
    return output, files, said


@pytest.fixture(scope="module")
def rows(mixed):
    """Rows of epochs.ecsv in the order of the files."""
    output, files, _ = mixed
    table = Table.read(output / "epochs.ecsv")
    assert len(table) == len(files) + SETTINGS.n_epochs
    folders = {Path(path).parent.name: kind for kind, path in files.items()}
    return {folders[found[1]]: row for row in table if (found := re.search(r"/(\d{3})/", row["file"]))}


def test_every_kind_is_a_row_with_the_outcome_that_is_due(rows):
    wrong = []
    for kind, (_, outcome, words) in KINDS.items():
        status, reason = rows[kind]["status"], str(rows[kind]["reason"])
        right = status == outcome or (outcome == "any" and status in ("ok", "failed"))
        right &= status == "ok" or (reason.strip() != "" and "unexpected" not in reason)
        if outcome == "failed":
            right &= re.search(words, reason) is not None
        elif words:
            right &= words in FRAME_FLAGS.decode(rows[kind]["flags"])
        if not right:
            wrong.append(f"{kind}: {status}, {reason}; {outcome} is due, {words}")
    assert not wrong, "\n".join(wrong)


def test_what_is_no_time_is_no_time(rows):
    for kind in ("time text", "time absurd", "time date none", "time 1e15"):
        assert not np.isfinite(rows[kind]["mjd"]), kind
    for kind, row in rows.items():
        if row["status"] == "ok":
            assert ("no_time" in FRAME_FLAGS.decode(row["flags"])) == (not np.isfinite(row["mjd"])), kind
    assert not np.isfinite(rows["exposure time absurd"]["exptime"])
    assert 0 < rows["exposure time absurd"]["mjd"] < 1e5


def test_no_name_leaves_the_output(mixed, alone):
    held(alone)
    output, files, _ = mixed
    expected = {path.parent / path.name for path in map(Path, files.values())}
    for path in output.parent.rglob("*"):
        if output not in path.parents and path != output and not path.is_dir():
            assert path in expected, path
    table = Table.read(output / "epochs.ecsv")
    written = {path.name for path in (output / "difference").iterdir()}
    assert len(set(table["name"])) == len(table)
    assert written == {f"{name}.fits" for name in table["name"][table["status"] == "ok"]}
    assert all(re.fullmatch(r"[^\x00-\x1f\x7f/\\<>\"'&?*:|\u202e\ud800-\udfff]+", name) for name in table["name"])


def test_no_good_frame_is_changed_by_bad_ones(mixed, alone):
    """To the last bits: batches of other frames may sum in another order.

    Errors have parts that all epochs of a series tell (`sky_excess`, the same for all stars of an epoch; `model_error`,
    next to nothing here): the bad frames are copies of one, with one noise, and count as so many epochs.
    """
    one, other = (read_lightcurves(path) for path in (alone, mixed[0]))
    keep = np.flatnonzero([name.startswith("sim-") for name in other.epochs["name"]])
    assert list(other.epochs["name"][keep]) == list(one.epochs["name"])
    np.testing.assert_array_equal(one.sources["source_id"], other.sources["source_id"])
    for name in ("FLUX", "FLUX_DIFF"):
        # stars come in other groups where others lie on some frame: rounding, of bright stars 1 / (1 - h) times as much
        far = np.abs(one.planes[name] - other.planes[name][keep])
        assert np.nanmax(far / one.planes[f"{name}_ERR"]) < 1e-3
        errors = one.planes[f"{name}_ERR"], other.planes[f"{name}_ERR"][keep]
        np.testing.assert_array_equal(*map(np.isnan, errors))
        for mine, theirs in zip(*(error.astype(float) ** 2 for error in errors), strict=True):
            measured = ~np.isnan(mine)
            more = (theirs - mine)[measured]
            assert (np.abs(more - np.median(more)) < 1e-3 * mine[measured] + 1e-3).all()
            assert np.abs(more).max() < 0.2 * np.median(mine[measured])
    np.testing.assert_array_equal(one.planes["FLAGS"], other.planes["FLAGS"][keep])
    for name in ("scale", "chi2", "fwhm", "sky", "mjd"):
        np.testing.assert_allclose(one.epochs[name], other.epochs[name][keep], rtol=1e-9)
    for name in one.epochs["name"]:
        paths = [output / "difference" / f"{name}.fits" for output in (alone, mixed[0])]
        masks, differences = ([fits.getdata(path, hdu) for path in paths] for hdu in ("MASK", "DIFF"))
        np.testing.assert_array_equal(*masks)
        np.testing.assert_allclose(*differences, rtol=1e-5, atol=1e-3)


def test_what_is_said_is_one_line_a_frame_and_no_warning_of_a_library(mixed):
    output, files, said = mixed
    lines = said.splitlines()
    assert len(lines) < len(files) + 10, said
    assert all(line.startswith("gpudia: ") for line in lines), said
    assert "\x1b" not in said
    assert "Warning" not in said
    assert "Traceback" not in (output / "gpudia.log").read_text(encoding="utf-8")


def test_two_files_of_one_stem_are_two_products(series, tmp_path):
    for name in ("a.fits", "a.fit", "A.FITS", "a-2.fits"):
        shutil.copy(sorted(series.glob("*.fits"))[2], tmp_path / name)
    code, said = run([str(tmp_path)], series, tmp_path / "out")
    assert code == 0, said
    names = [path.name.lower() for path in (tmp_path / "out" / "difference").iterdir()]
    assert len(names) == len(set(names)) == SETTINGS.n_epochs + 4


@pytest.mark.parametrize("command", [
    "run LOOP --output out", "run GOOD --output LOOP", "run GOOD --output LOOP/x",
    "run GOOD --output out --reference LOOP", "run GOOD --output out --reference ~no-such-user/x",
    "run GOOD OTHER --output out --positions LOOP", "run GOOD --output out --dask tcp://127.0.0.1:LOOP",
    "run GOOD OTHER --output out --photometric-catalog ~no-such-user/x", "run --config LOOP",
    "inject GOOD --output LOOP", "demo --output LOOP",
    "subtract LOOP GOOD --output d.fits", "subtract GOOD OTHER --output d.fits --mask LOOP",
    "subtract GOOD OTHER --output d.fits --error ~no-such-user/x", "subtract GOOD GOOD --output GOOD",
    "compare LOOP LOOP", "compare LOOP out", "lightcurve LOOP", "lightcurve LOOP --target",
])
def test_paths_that_lead_nowhere_are_one_line(series, tmp_path, monkeypatch, capsys, command):
    """A link to itself, the home of a user that there is not."""
    monkeypatch.chdir(tmp_path)
    Path("LOOP").symlink_to("LOOP")
    good = sorted(series.glob("*.fits"))[:2]
    names = {"GOOD": str(good[0]), "OTHER": str(good[1])}
    assert main([names.get(word, word) for word in command.split()]) in (1, 2)
    said = capsys.readouterr().err.splitlines()
    assert re.match("gpudia: error: .*(LOOP|no-such-user|output must be another file)", said[-1])
    assert Path("LOOP").is_symlink()


def read_quietly(path):
    """Read a frame: a reason, or nothing and what a frame promises; any warning but a DataWarning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DataWarning)
        try:
            frame = read_frame(path)
        except FrameError as error:
            return error.reason
    assert np.isfinite(frame.data).all()
    assert (frame.variance > 0).all()
    assert np.isfinite(frame.variance).all()
    assert (frame.mask == 0).any()
    assert not 0 < abs(frame.mjd) > 2e5
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_reading_says_only_what_is_wrong(kind, series, tmp_path):
    place = tmp_path / "frame.fits"
    shutil.copy(sorted(series.glob("*.fits"))[0], place)
    made = KINDS[kind][0](place)
    reason = read_quietly(made if isinstance(made, Path) else place)
    assert reason is None or reason.strip()


def fuzz():
    """The module bench/fuzz.py, which does the same ten thousand times and more."""
    spec = importlib.util.spec_from_file_location("fuzz", Path(__file__).resolve().parents[1] / "bench" / "fuzz.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(spec.origin).parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


FUZZ = fuzz()
VALUES = st.one_of(st.sampled_from(FUZZ.VALUES), st.integers().map(str), st.floats().map(repr),
                   st.text(st.characters(max_codepoint=255), max_size=60))


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    return FUZZ.originals(tmp_path_factory.mktemp("originals"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_cards_in_any_header(originals, tmp_path, data):
    which = data.draw(st.integers(0, len(originals) - 1))
    cards = data.draw(st.lists(st.tuples(st.integers(0), st.sampled_from(FUZZ.KEYS), VALUES), max_size=4))
    name, original = originals[which]
    content = bytearray(original)
    places = [at for at in range(0, len(content) - 80, 80) if content[at + 8 : at + 10] == b"= "]
    for at, key, value in cards:
        if places:
            at = places[at % len(places)]
            content[at : at + 80] = f"{key:8}= {value}".encode("latin-1").ljust(80)[:80]
    (tmp_path / name).write_bytes(content)
    reason = read_quietly(tmp_path / name)
    assert reason is None or reason.strip()
