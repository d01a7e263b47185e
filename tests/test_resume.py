"""Runs that end early and go on: nothing is lost or done twice, the numbers are those of an undisturbed run."""

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS, Sip

import gpudia
from gpudia.cli import main
from gpudia.errors import ConfigError, OutputError
from gpudia.pipeline.codec import decode, encode
from gpudia.pipeline.looks import Seen
from gpudia.pipeline.records import RecordFile
from gpudia.pipeline.state import RunState
from gpudia.simulate import SimulationSettings, simulate_field, write_series

SETTINGS = SimulationSettings(shape=(120, 130), n_epochs=6, seed=4, rotation=0.02, fwhm_range=(2.8, 4.0),
                              n_variables=0)
#: Columns of epochs.ecsv that say how long something took.
TIMES = ("seconds",)


@pytest.fixture(scope="module")
def series():
    return simulate_field(SETTINGS)


@pytest.fixture(scope="module")
def frames(series, tmp_path_factory):
    folder = tmp_path_factory.mktemp("frames")
    write_series(series, folder)
    return folder


@pytest.fixture(scope="module")
def settings(series, frames):
    """Settings of a run in batches of two."""
    return gpudia.RunConfig(str(frames), "-", ra=series.truth["ra"][0], dec=series.truth["dec"][0], size=90,
                            kernel_size=9, batch_size=2, readers=0)


@pytest.fixture(scope="module")
def undisturbed(settings, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "out"
    gpudia.run(settings.replace(output=str(output)))
    return output


@pytest.fixture(scope="module", autouse=True)
def _no_plots():
    """The page is made of the tables that are compared; drawing it takes longer than all else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpudia.report.write_report", lambda output, _: (output / "report.html").write_text("-"))
        yield


def assert_same(one, other):
    """Equal tables and images, bit by bit, but for times."""
    tables = [Table.read(folder / "epochs.ecsv") for folder in (one, other)]
    assert tables[0].colnames == tables[1].colnames
    for name in set(tables[0].colnames) - set(TIMES):
        np.testing.assert_array_equal(*(np.asarray(t[name]) for t in tables), err_msg=name)
    assert (one / "target.ecsv").read_bytes() == (other / "target.ecsv").read_bytes()
    for name in ("lightcurves.fits", "reference.fits", *(f"difference/{row['name']}.fits" for row in tables[0])):
        assert fits.FITSDiff(one / name, other / name, ignore_keywords=["CHECKSUM", "DATASUM"],
                             ignore_fields=list(TIMES)).identical, name


class Unplugged(Exception):  # noqa: N818
    """Ends a run from its callback."""


def unplug(step, count):
    def callback(event):
        if (event.step, event.done) == (step, count):
            raise Unplugged

    return callback


@pytest.mark.parametrize(("step", "count"), [("read", 3), ("register", 2), ("subtract", 2), ("subtract", 6)])
def test_a_run_that_ended_early_goes_on_and_gives_the_same(settings, undisturbed, step, count, tmp_path):
    config = settings.replace(output=str(tmp_path / "out"))
    with pytest.raises(Unplugged):
        gpudia.run(config, callback=unplug(step, count))
    events = []
    gpudia.run(config.replace(resume=True), callback=events.append)
    again = sum(event.step == step for event in events)
    assert again == 6 - count or step == "register"  # registrations are kept by the group
    assert_same(undisturbed, tmp_path / "out")
    assert not list((tmp_path / "out" / "state" / "pieces").iterdir())


def test_a_finished_run_can_be_gone_on_with_and_does_nothing_again(settings, undisturbed, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(undisturbed, output)
    events = []
    gpudia.run(settings.replace(output=str(output), resume=True), callback=events.append)
    assert not events
    assert_same(undisturbed, output)


def test_what_was_half_written_when_a_process_was_killed_goes(settings, tmp_path, monkeypatch):
    """In an earlier run, or beside the one that goes on; hidden files of others stay."""
    from gpudia.pipeline import tasks

    real, output, name = tasks.write_difference, tmp_path / "out", f".{'0a' * 16}.x.fits"

    def leaves_something(path, *arguments):
        (path.parent / name).write_bytes(b"half")
        real(path, *arguments)

    (output / "difference").mkdir(parents=True)
    for path in (output / name, output / "difference" / name, output / ".mine.fits"):
        path.write_bytes(b"half")
    monkeypatch.setattr(tasks, "write_difference", leaves_something)
    gpudia.run(settings.replace(output=str(output), overwrite=True))
    assert [path.relative_to(output) for path in output.rglob(".*")] == [Path(".mine.fits")]


def test_numbers_do_not_depend_on_how_frames_are_split(settings, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setenv("GPUDIA_CORES", "2")  # so that two processes do batches
    gpudia.run(settings.replace(output=str(tmp_path / "out"), batch_size=5, readers=2))
    assert_same(undisturbed, tmp_path / "out")
    assert "gpudia.backend" not in (tmp_path / "out" / "gpudia.log").read_text()  # of each process


def test_other_settings_are_named(settings, undisturbed, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(undisturbed, output)
    with pytest.raises(ConfigError, match="got others: size was 90, is 92; say overwrite"):
        gpudia.run(settings.replace(output=str(output), resume=True, size=92))


def test_a_frame_that_changed_and_one_more_are_noticed(series, settings, frames, tmp_path, caplog):
    """The changed frame is done again, the new one as well; the others are not read again."""
    folder, output = tmp_path / "frames", tmp_path / "out"
    shutil.copytree(frames, folder)
    names = sorted(p.name for p in folder.glob("*.fits"))
    (folder / names[-1]).rename(tmp_path / names[-1])
    config = settings.replace(frames=(str(folder),), output=str(output))
    first = gpudia.run(config)
    changed = next(n for n in names if first.epochs.meta["REFERENC"] not in n)
    with fits.open(folder / changed, mode="update") as hdus:
        hdus["SCI"].data = hdus["SCI"].data + np.float32(100)
    (tmp_path / names[-1]).rename(folder / names[-1])
    events = []
    result = gpudia.run(config.replace(resume=True), callback=events.append)
    assert sorted(e.file for e in events if e.step == "read") == [str(folder / n) for n in (changed, names[-1])]
    assert f"read again: {changed.removesuffix('.fits')}" in caplog.text
    assert result.n_ok == 6
    gpudia.run(config.replace(output=str(tmp_path / "anew")))
    assert_same(tmp_path / "anew", output)


def test_a_file_that_changes_in_mid_run_fails_alone(settings, frames, tmp_path):
    folder = tmp_path / "frames"
    shutil.copytree(frames, folder)
    one = sorted(folder.glob("*.fits"))[0]

    def change(event):
        if (event.step, event.done) == ("register", 6):
            for piece in (tmp_path / "out" / "state" / "pieces").glob("*.piece"):
                piece.unlink()
            one.write_bytes(b"")

    result = gpudia.run(settings.replace(frames=(str(folder),), output=str(tmp_path / "out"), reference=str(
        sorted(folder.glob("*.fits"))[1])), callback=change)
    row = result.epochs[0]
    assert (row["status"], result.n_failed) == ("failed", 1)
    assert "file must stay as it is during a run" in row["reason"]


def test_two_runs_in_one_folder_exclude_each_other(settings, tmp_path):
    config = settings.replace(output=str(tmp_path / "out"))
    said = []

    def second(event):
        if (event.step, event.done) == ("read", 1):
            with pytest.raises(ConfigError) as error:
                gpudia.run(config.replace(resume=True))
            said.append(str(error.value))

    gpudia.run(config, callback=second)
    assert f"output must not be in use by another run, got {tmp_path / 'out'} with process {os.getpid()}" in said[0]


def test_an_unfinished_run_is_not_replaced_unasked(settings, undisturbed, tmp_path):
    config = settings.replace(output=str(tmp_path / "out"))
    with pytest.raises(Unplugged):
        gpudia.run(config, callback=unplug("subtract", 2))
    with pytest.raises(ConfigError, match="an unfinished run in it; say resume"):
        gpudia.run(config)
    gpudia.run(config.replace(overwrite=True))
    assert_same(undisturbed, tmp_path / "out")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_when_what_is_in_hand_is_done(settings, undisturbed, number, tmp_path):
    config = settings.replace(output=str(tmp_path / "out"))
    before = signal.getsignal(number)

    def send(event):
        if (event.step, event.done) == ("subtract", 1):
            os.kill(os.getpid(), number)

    events = []
    with pytest.raises(KeyboardInterrupt):
        gpudia.run(config, callback=lambda event: (events.append(event), send(event)))
    assert events[-1].done == 2  # the batch
    assert signal.getsignal(number) is before
    gpudia.run(config.replace(resume=True))
    assert_same(undisturbed, tmp_path / "out")


def test_a_second_signal_ends_at_once(settings, tmp_path):
    def send(event):
        if (event.step, event.done) == ("subtract", 1):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    events = []
    with pytest.raises(KeyboardInterrupt):
        gpudia.run(settings.replace(output=str(tmp_path / "out")),
                   callback=lambda event: (events.append(event), send(event)))
    assert events[-1].done == 1


def test_the_command_says_how_to_go_on(settings, undisturbed, tmp_path):
    """A process of its own, interrupted at its first line of the journal: exit code 130."""
    output = tmp_path / "out"
    (tmp_path / "run.toml").write_text(settings.replace(output=str(output)).to_toml())
    program = "import sys; from gpudia.cli import main; sys.exit(main())"
    process = subprocess.Popen([sys.executable, "-c", program, "run", "--config", str(tmp_path / "run.toml")],
                               stderr=subprocess.PIPE, text=True)
    while not (output / "journal.jsonl").exists() and process.poll() is None:
        threading.Event().wait(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "a run goes on with --resume" in said
    assert main(["run", "--config", str(tmp_path / "run.toml"), "--resume", "--quiet"]) == 0
    assert_same(undisturbed, output)


def test_a_full_disk_stops_the_run_and_no_frame_is_blamed(settings, undisturbed, monkeypatch, tmp_path):
    import errno

    from gpudia.pipeline import tasks

    real, calls = tasks.write_difference, []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*arguments)

    config = settings.replace(output=str(tmp_path / "out"))
    monkeypatch.setattr(tasks, "write_difference", full)
    with pytest.raises(OutputError, match="cannot be written: No space left on device; when that is mended go on"):
        gpudia.run(config)
    monkeypatch.undo()
    gpudia.run(config.replace(resume=True))
    assert_same(undisturbed, tmp_path / "out")


def test_no_room_is_said_before_the_work(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(OutputError, match=r"output must have room for 0.000632 GB, got 1e-06 GB free"):
        gpudia.run(settings.replace(output=str(tmp_path / "out")))


def test_a_size_that_no_memory_holds_is_refused(settings, tmp_path):
    with pytest.raises(ConfigError, match=r"size must be at most twice the reference's longer side \(130 px\), got 1"):
        gpudia.run(settings.replace(output=str(tmp_path / "out"), size=100_000_000))


def test_a_file_that_vanishes_in_mid_run_fails_alone(settings, frames, tmp_path):
    folder = tmp_path / "frames"
    shutil.copytree(frames, folder)
    paths = sorted(folder.glob("*.fits"))

    def remove(event):
        if (event.step, event.done) == ("register", 6):
            for piece in (tmp_path / "out" / "state" / "pieces").glob("*.piece"):
                piece.unlink()
            paths[0].unlink()

    result = gpudia.run(settings.replace(frames=tuple(map(str, paths)), output=str(tmp_path / "out"),
                                         reference=str(paths[1])), callback=remove)
    assert (result.n_ok, result.n_failed) == (5, 1)
    assert "got one that was changed or removed" in result.epochs[0]["reason"]


# ------------------------------------------------------------------------------------------------------ records


def test_records_outlive_a_torn_end(tmp_path):
    """Whatever the byte at which the plug was pulled, whole records are there and later ones can be added."""
    path = tmp_path / "records"
    file = RecordFile(path)
    file.add({"a": b"first", "b": b""})
    file.add({"c": b"x" * 100})
    file.close()
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        file = RecordFile(path)
        found = {key: file[key] for key in file.keys()}  # noqa: SIM118
        assert found == {k: v for k, v in {"a": b"first", "b": b"", "c": b"x" * 100}.items() if k in found}
        file.add({"d": b"later"})
        file.close()
        again = RecordFile(path)
        assert again["d"] == b"later"
        assert len(again) == len(found) + 1
        again.close()


def test_records_that_may_be_on_the_disk_soon(tmp_path, monkeypatch):
    """The disk is waited for at once, or once a second; they can be read, and outlive the process, anyway."""
    from gpudia.pipeline import records

    waits, now = [], [100.0]
    monkeypatch.setattr(records.os, "fsync", waits.append)
    monkeypatch.setattr(records.time, "monotonic", lambda: now[0])
    file = RecordFile(tmp_path / "records")
    for k in range(20):
        now[0] += 0.25
        file.add({f"{k}": b"x" * k}, soon=True)
        assert file[f"{k}"] == b"x" * k
    assert 4 <= len(waits) <= 6
    before = len(waits)
    file.add({"now": b""})
    assert len(waits) == before + 1
    file.close()
    again = RecordFile(tmp_path / "records")
    assert len(again) == 21
    again.close()


def test_a_flipped_bit_ends_what_is_believed(tmp_path):
    path = tmp_path / "records"
    file = RecordFile(path)
    file.add({"a": b"first"})
    file.add({"b": b"second"})
    file.close()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    file = RecordFile(path)
    assert "a" in file
    assert "b" not in file
    file.close()


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "records").write_text("something else, longer than the first line")
    with pytest.raises(ConfigError, match="state must be a file of records"):
        RecordFile(tmp_path / "records")


def test_values_come_back_bit_by_bit(series):
    frame = gpudia.images.make_frame(series.frames[0].data, header=fits.Header({"OBJECT": "x", "GAIN": 2.0}),
                                     wcs=series.frames[0].wcs)
    values = {"frame": frame, 3: [1.5, float("nan"), None, True, "é"], "t": (1, b"\x00"), "n": np.float32(0.1),
              "stars": Table({"x": [1.0, 2.0], "name": ["a", "bc"]}, meta={"ids": "catalog"})}
    back = decode(encode(values))
    for field in dataclasses.fields(frame):
        one, other = getattr(frame, field.name), getattr(back["frame"], field.name)
        if field.name == "wcs":
            np.testing.assert_allclose(one.pixel_to_world_values(3, 4), other.pixel_to_world_values(3, 4), rtol=1e-13)
        else:
            np.testing.assert_array_equal(one, other)
    assert back[3][0] == 1.5
    assert np.isnan(back[3][1])
    assert back[3][2:] == [None, True, "é"]
    assert back["t"] == (1, b"\x00")
    assert type(back["n"]) is np.float32
    assert list(back["stars"]["name"]) == ["a", "bc"]
    assert back["stars"].meta == {"ids": "catalog"}
    assert encode(back) == encode(decode(encode(back)))


def test_records_of_other_classes_are_not_taken(tmp_path):
    """A version of this library whose classes have other fields: what it knew is worked out anew."""
    record = encode(Seen()).replace(b"catalog", b"listing")
    with pytest.raises(ValueError, match="another version"):
        decode(record)
    with contextlib.closing(RunState(tmp_path / "state")) as state:
        state.add_setup("inputs", record)
        state.add_batch("one", record)
        assert state.setup("inputs") is None
        assert state.batch("one") is None


def test_distorted_world_coordinates_come_back():
    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.crval, wcs.wcs.crpix = ["RA---TAN-SIP", "DEC--TAN-SIP"], (10.0, -20.0), (40.0, 30.0)
    wcs.wcs.cd = np.diag([-1e-4, 1e-4])
    a = np.zeros((3, 3))
    a[2, 0] = 1e-5
    wcs.sip = Sip(a, a.T, None, None, wcs.wcs.crpix)
    back = decode(encode(wcs))
    np.testing.assert_allclose(back.all_pix2world(3, 4, 0), wcs.all_pix2world(3, 4, 0), rtol=1e-13)
    assert abs(back.all_pix2world(3, 4, 0)[0] - back.wcs_pix2world(3, 4, 0)[0]) > 1e-8


def test_a_record_runs_nothing(tmp_path):
    """A module or a name that is none of this library's dataclasses is refused."""
    for module, name in (("os", "system"), ("gpudia.cli", "main"), ("gpudia.cli", "os")):
        good = encode(gpudia.images.Region(0, 0, (2, 2)))
        text = good[8:].replace(b'"gpudia.images.cutouts", "Region"', f'"{module}", "{name}"'.encode())
        with pytest.raises(ValueError, match="a record holds no"):
            decode(len(text).to_bytes(8, "little") + text)
    with pytest.raises(TypeError, match="object cannot be part of a record"):
        encode(object())


def test_processes_that_read_end_with_the_one_that_is_killed():
    """They hold its standard output, which ends when the last of them does."""
    code = ("import os, time; from gpudia.pipeline.executors import _pool; pool = _pool(2); "
            "print(pool.submit(os.getpid).result(), flush=True); time.sleep(600)")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert int(process.stdout.readline()) != process.pid
    process.kill()
    assert process.communicate(timeout=60)[0] == b""
