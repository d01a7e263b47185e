"""The command line up to the door of the library: arguments, exit codes, streams. The work is a stand-in."""

import json
import logging
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
from astropy.table import Table
from astropy.time import Time
from astropy.timeseries import TimeSeries

from gpudia import __version__, arguments, cli
from gpudia.errors import BackendError, ConfigError, DataWarning, FrameError, InputError

COMMANDS = ["demo", "run", "subtract", "lightcurve", "info"]


class Library:
    """Stands for the modules that the commands call; keeps the calls and answers with what the test wants."""

    def __init__(self):
        self.calls = []
        self.error = None
        self.counts = {"n_ok": 3, "n_failed": 0, "n_skipped": 0}
        self.curves = None

    def answer(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        logging.getLogger("gpudia.pipeline").info("a message")
        logging.getLogger("gpudia.pipeline").debug("a detail")
        if self.error:
            raise self.error
        return types.SimpleNamespace(**self.counts, summary=lambda: "a summary")

    @property
    def config(self):
        return self.calls[-1][0][0]


@pytest.fixture
def library(monkeypatch):
    fake = Library()
    modules = {
        "gpudia.pipeline": types.SimpleNamespace(run=fake.answer, run_demo=fake.answer, subtract_files=fake.answer),
        "gpudia.photometry": types.SimpleNamespace(read_lightcurves=lambda _: fake.curves),
        "gpudia.backend": types.SimpleNamespace(backend_info=lambda: {"backend": "numpy", "free_memory_gb": 1.5}),
        "gpudia.images": types.SimpleNamespace(write_atomically=lambda path, writer: writer(path)),
    }
    monkeypatch.setattr(cli, "import_module", modules.__getitem__)
    monkeypatch.delenv("GPUDIA_BACKEND", raising=False)
    return fake


# ----------------------------------------------------------------------------------------- help and wrong use


def test_help_is_quick_and_imports_nothing_heavy():
    code = ("import sys; from gpudia.cli import main; main(['--help']); "
            "print([m for m in ('numpy', 'scipy', 'astropy', 'photutils', 'cupy', 'matplotlib') if m in sys.modules])")
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(f"    {name}" in done.stdout for name in COMMANDS)
    assert time.perf_counter() - start < 5  # an idle machine needs 0.1 s; a busy one must not fail this


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_that_it_understands(command, capsys, monkeypatch):
    monkeypatch.setenv("GPUDIA_BACKEND", "nonsense")  # help must work all the same
    assert cli.main([command, "--help"]) == 0
    example = capsys.readouterr().out.rstrip().splitlines()[-1].split()
    assert example[:2] == ["gpudia", command]
    args = arguments.parse([word.strip("'") for word in example[1:]])
    assert cli._COMMANDS[args.command].__name__ == f"_{command}"


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"gpudia {__version__}\n"


def test_python_m_gpudia_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "gpudia", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"gpudia {__version__}\n"


@pytest.mark.parametrize(("argv", "message"), [
    ([], "required: COMMAND"),
    (["fly"], "invalid choice: 'fly'"),
    (["run", "--fly"], "unrecognized arguments: --fly"),
    (["run", "--quiet", "--verbose"], "not allowed with"),
    (["run"], "gpudia: error: frames must be given"),
    (["run", "a.fits"], "gpudia: error: output must be given"),
    (["run", "a.fits", "--output", "o", "--kernel-size", "16"], "kernel_size must be 'auto' or an odd integer"),
    (["run", "a.fits", "--output", "o", "--size", "big"], "size must be an integer of at least 16, got 'big'"),
    (["run", "a.fits", "--output", "o", "--ra", "12"], "dec must be given together with ra"),
    (["run", "a.fits", "--output", "o", "--stack-size", "1"], "stack_size must be 'auto' or an integer of at least 2"),
    (["run", "a.fits", "--output", "o", "--resume", "--overwrite"], "overwrite must be false when resume is true"),
    (["run", "a.fits", "--output", "o", "--select", "seeing < 2"], "known are file, name, mjd, exptime, filter"),
    (["run", "a.fits", "--output", "o", "--select", "fwhm < 6", "--select", "fwhm <"], "select must be a condition"),
    (["run", "a.fits", "--output", "o", "--mixed", "shape"], "mixed must be some of filter, instrument, got ['shape']"),
    (["run", "a.fits", "--output", "o", "--site", "x", "1", "2"], "site must be longitude (degrees east)"),
    (["run", "--config", "no.toml"], "config must be a readable file, got no.toml"),
    (["subtract", "a.fits", "b.fits"], "required: --output"),
    (["lightcurve", "o", "--ra", "1"], "--ra and --dec must be given together"),
    (["lightcurve", "o", "--source", "1", "--ra", "1"], "not allowed with"),
    (["lightcurve", "o", "--format", "parquet"], "--output must be given with --format parquet"),
])
def test_wrong_usage_is_exit_code_2_with_a_message_on_stderr(argv, message, library, capsys):
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""
    assert library.calls == []


# -------------------------------------------------------------------------------------------------------- run


def test_run_hands_over_what_was_given_and_nothing_else(library):
    argv = "run a.fits b --ra 17:51:40.2 --dec -29:53:26 --size 300 --kernel-size 17 --gain 2.4 --output out"
    assert cli.main(argv.split()) == 0
    config = library.config
    assert config.frames == ("a.fits", "b")
    assert (config.size, config.kernel_size, config.gain, config.output) == (300, 17, 2.4, "out")
    assert config.dec == pytest.approx(-(29 + 53 / 60 + 26 / 3600))
    untouched = type(config)(("a.fits", "b"), "out").replace(
        ra=config.ra, dec=config.dec, size=300, kernel_size=17, gain=2.4)
    assert config == untouched


@pytest.mark.parametrize(("value", "degrees"), [("-29.5", -29.5), ("-.5", -0.5), ("-0:30:00", -0.5), ("+29.5", 29.5)])
def test_signed_declinations(library, value, degrees):
    assert cli.main(["run", "a.fits", "--ra", "10", "--dec", value, "--output", "o"]) == 0
    assert library.config.dec == pytest.approx(degrees)


def test_settings_of_several_values(library, tmp_path):
    assert cli.main(["run", "a.fits", "--output", "o", "--select", "fwhm < 6", "--select", "filter == 'rp'", "--mixed",
                     "instrument", "--site", "-70.8", "-30.17", "2198"]) == 0
    config = library.config
    assert config.select == ("fwhm < 6", "filter == 'rp'")
    assert (config.mixed, config.site) == (("instrument",), (-70.8, -30.17, 2198.0))
    path = tmp_path / "settings.toml"
    path.write_text(config.to_toml())
    assert cli.main(["run", "--config", str(path), "--select", "sky < 9"]) == 0
    assert library.config == config.replace(select=["sky < 9"])


def test_switches(library):
    cli.main("run a.fits --output o --no-align --no-products --overwrite".split())
    config = library.config
    assert (config.align, config.products, config.overwrite, config.resume) == (False, False, True, False)


def test_options_take_precedence_over_the_file(library, tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text('frames = ["n/*.fits"]\noutput = "there"\nsize = 99\nalign = false\nkernel_size = 17\n')
    assert cli.main(["run", "--config", str(path), "--size", "120", "--kernel-size", "auto"]) == 0
    config = library.config
    assert (config.frames, config.output, config.align) == (("n/*.fits",), "there", False)
    assert (config.size, config.kernel_size) == (120, "auto")


def test_every_value_option_is_a_setting_and_its_default_is_shown(capsys):
    cli.main(["run", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    settings = cli.RunConfig.__dataclass_fields__
    for name, *_ in arguments.RUN_VALUES:
        assert name in settings
        assert f"--{name.replace('_', '-')} " in text
    positional = {"frames", "output", "ra", "dec", "layout_names", "detect"}
    named = {name for name, *_ in arguments.RUN_VALUES} | {*arguments.SWITCHES, *arguments.SEVERAL}
    assert named | positional == set(settings)
    assert "--size PX side of the region around the target (default: 250)" in text


@pytest.mark.parametrize(("n_ok", "n_failed", "code"), [(3, 0, 0), (2, 1, 3), (0, 3, 1), (0, 0, 1)])
@pytest.mark.parametrize("argv", [["run", "a.fits", "--output", "o"], ["demo"]])
def test_exit_code_of_a_run(library, capsys, argv, n_ok, n_failed, code):
    library.counts |= {"n_ok": n_ok, "n_failed": n_failed}
    assert cli.main(argv) == code
    assert capsys.readouterr().out == "a summary\n"


@pytest.mark.parametrize(("error", "code", "message"), [
    (ConfigError("frames must match at least one file, got 'x'"), 2, "frames must match at least one file"),
    (InputError("mask must have shape (3, 3), got (2, 2)"), 2, "mask must have shape"),
    (FrameError("no 2-D image", "a.fits"), 1, "a.fits: no 2-D image"),
    (BackendError("backend 'cupy' cannot run: no device"), 1, "no device"),
    (PermissionError(13, "Permission denied", "out"), 1, "Permission denied: 'out'"),
    (KeyboardInterrupt(), 130, "interrupted"),
])
def test_errors_become_one_line_and_a_code(library, capsys, error, code, message):
    library.error = error
    assert cli.main(["run", "a.fits", "--output", "o"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("gpudia: error: ")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_programming_error_is_not_hidden(library):
    library.error = ZeroDivisionError("oops")
    with pytest.raises(ZeroDivisionError, match="oops"):
        cli.main(["demo"])


def test_verbose_says_where_an_error_came_from(library, capsys):
    library.error = FrameError("no image", "a.fits")
    cli.main(["run", "a.fits", "--output", "o", "--verbose"])
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "shown", "progress"), [
    ([], ["a message"], True), (["--quiet"], [], False), (["--verbose"], ["a message", "a detail"], True)])
def test_messages_and_progress(library, capsys, option, shown, progress):
    cli.main(["demo", *option])
    assert capsys.readouterr().err.splitlines() == [f"gpudia: {line}" for line in shown]
    assert library.calls == [(("gpudia-demo",), {"progress": progress})]


def test_warnings_are_one_line_and_nothing_is_left_behind(library, capsys, monkeypatch):
    def run_demo(output, progress):
        warnings.simplefilter("default")
        warnings.warn("gain guessed", DataWarning, stacklevel=1)
        return types.SimpleNamespace(n_ok=1, n_failed=0, summary=lambda: "done")

    monkeypatch.setattr(cli, "import_module", lambda _: types.SimpleNamespace(run_demo=run_demo))
    before = warnings.showwarning, logging.getLogger("gpudia").handlers[:], logging.getLogger("gpudia").level
    assert cli.main(["demo"]) == 0
    assert capsys.readouterr().err == "gpudia: warning: gain guessed\n"
    assert before == (warnings.showwarning, logging.getLogger("gpudia").handlers, logging.getLogger("gpudia").level)


# ------------------------------------------------------------------------------------------- subtract and info


def test_subtract_hands_over_its_arguments(library, capsys):
    argv = ("subtract r.fits i.fits --output d.fits --kernel-size 17 --no-align --no-correct-bias --mask m.fits "
            "--gain 2 --saturation 6e4")
    assert cli.main(argv.split()) == 0
    assert library.calls == [((Path("r.fits"), Path("i.fits"), Path("d.fits")), {
        "kernel_size": 17, "spatial_degree": "auto", "background_degree": "auto", "align": False, "correct_bias": False,
        "mask": Path("m.fits"), "error": None, "gain": 2.0, "saturation": 6e4, "overwrite": False})]
    assert capsys.readouterr().out == "a summary\n"


def test_info_is_aligned_or_json(library, capsys):
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["gpudia", __version__]
    assert len({line.index(line.split()[1]) for line in lines}) == 1
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backend"] == "numpy"
    assert {"gpudia", "astropy", "photutils"} <= set(facts)


# ------------------------------------------------------------------------------------------------- lightcurve


@pytest.fixture
def curves(library, tmp_path):
    sources = Table({"source_id": [7, 8, 9], "ra": [253.4659, 253.4669, np.nan], "dec": [62.9002, 62.9002, np.nan]})
    series = TimeSeries(time=Time([60000.25, 60001.5], format="mjd", scale="utc"),
                        data={"flux": [10.0, 11.5], "flags": [0, 4]})
    long = Table({"source_id": [7, 7, 8], "mjd": [1.0, 2.0, 1.0], "flux": [3.0, 4.0, 5.0]})
    asked = []

    def timeseries(source_id):
        asked.append(int(source_id))
        return series

    library.curves = types.SimpleNamespace(sources=sources, timeseries=timeseries, to_table=lambda: long, asked=asked,
                                           to_parquet=lambda path: Path(path).write_text("parquet"))
    return library.curves


def test_all_light_curves_go_to_stdout_as_ecsv(curves, capsys):
    assert cli.main(["lightcurve", "out"]) == 0
    table = Table.read(capsys.readouterr().out, format="ascii.ecsv")
    assert list(table["source_id"]) == [7, 7, 8]


def test_one_light_curve_reads_back_as_a_time_series(curves, capsys, tmp_path):
    assert cli.main(["lightcurve", "out", "--source", "8", "--output", str(tmp_path / "lc.ecsv")]) == 0
    assert curves.asked == [8]
    assert capsys.readouterr().out == ""
    series = TimeSeries.read(tmp_path / "lc.ecsv", format="ascii.ecsv", time_column="time")
    assert list(series.time.mjd) == [60000.25, 60001.5]


def test_csv_has_the_mjd(curves, capsys):
    assert cli.main(["lightcurve", "out", "--source", "7", "--format", "csv"]) == 0
    assert capsys.readouterr().out.splitlines() == ["mjd,flux,flags", "60000.25,10.0,0", "60001.5,11.5,4"]


def test_parquet(curves, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    assert cli.main(["lightcurve", "out", "--format", "parquet", "--output", str(tmp_path / "all.pq")]) == 0
    assert (tmp_path / "all.pq").read_text() == "parquet"
    argv = ["lightcurve", "out", "--source", "7", "--format", "parquet", "--output", str(tmp_path / "one.pq")]
    assert cli.main(argv) == 0
    assert parquet.read_table(tmp_path / "one.pq").column("mjd").to_pylist() == [60000.25, 60001.5]


@pytest.mark.parametrize(("ra", "source"), [("253.4659", 7), ("16:53:51.816", 7), ("253.46689", 8)])
def test_the_star_nearest_to_a_position(curves, ra, source, capsys):
    assert cli.main(["lightcurve", "out", "--ra", ra, "--dec", "62.9002"]) == 0
    assert curves.asked == [source]


def test_no_star_near_the_position(curves, capsys):
    # (253.4669 - 253.4659) deg * cos(62.9002 deg) = 1.64 arcsec apart; the position lies 3.28 west of the first.
    assert cli.main(["lightcurve", "out", "--ra", "253.4639", "--dec", "62.9002"]) == 2
    assert "must be within --radius 2 arcsec of a star, got the nearest at 3.3" in capsys.readouterr().err
    assert cli.main(["lightcurve", "out", "--ra", "253.4639", "--dec", "62.9002", "--radius", "4"]) == 0
    assert curves.asked == [7]


def test_an_existing_file_is_kept_unless_told_otherwise(curves, tmp_path, capsys):
    path = tmp_path / "lc.csv"
    path.write_text("mine")
    argv = ["lightcurve", "out", "--source", "7", "--format", "csv", "--output", str(path)]
    assert cli.main(argv) == 2
    assert "--output must be a new file" in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert cli.main([*argv, "--overwrite"]) == 0
    assert path.read_text().startswith("mjd,flux")


def test_a_reader_that_goes_away_is_no_error():
    code = ("import types, sys; from gpudia import cli; from astropy.table import Table; "
            "curves = types.SimpleNamespace(to_table=lambda: Table({'a': range(200000)})); "
            "cli.import_module = lambda n: types.SimpleNamespace(read_lightcurves=lambda f: curves); "
            "sys.exit(cli.main(['lightcurve', 'out', '--format', 'csv']))")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"a\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 0
