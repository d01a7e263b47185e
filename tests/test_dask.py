"""The same run by other processes: workers of Dask on loopback, reading processes; some of them die."""

import multiprocessing
import os
import signal
import socket
import threading
import time

import numpy as np
import pytest
from astropy.table import Table
from test_resume import SETTINGS, _no_plots, assert_same, frames, series, settings, undisturbed  # noqa: F401

import gpudia
from gpudia.backend import active_backend
from gpudia.errors import ConfigError
from gpudia.pipeline.codec import decode
from gpudia.pipeline.executors import Here, Readers, WorkerDied
from gpudia.pipeline.tasks import do_batch

dask = pytest.importorskip("dask")
distributed = pytest.importorskip("distributed")
pytestmark = [
    pytest.mark.dask,
    # Dask leaves sockets of its own to the garbage collector
    pytest.mark.filterwarnings("ignore:unclosed <socket", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def scheduler():
    """Address of a scheduler on loopback with two workers.

    A LocalCluster ends a worker for good that it does not see some seconds after one of that name died, be it that
    another one is just starting: here workers die often.
    """
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "1 h"}), \
            distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, memory_limit=None,
                                     dashboard_address="127.0.0.1:0") as cluster:
        yield cluster.scheduler_address


def test_workers_of_a_scheduler_give_the_same(settings, undisturbed, scheduler, tmp_path):  # noqa: F811
    result = gpudia.run(settings.replace(output=str(tmp_path / "out"), dask=scheduler))
    assert result.n_ok == SETTINGS.n_epochs
    assert_same(undisturbed, tmp_path / "out")
    assert not list((tmp_path / "out" / "state").glob("shared*"))
    assert "workers at" in (tmp_path / "out" / "gpudia.log").read_text()


def test_a_worker_that_is_killed_costs_nothing_but_time(settings, undisturbed, scheduler, tmp_path):  # noqa: F811
    with distributed.Client(scheduler, set_as_default=False) as client:
        pids = client.run(os.getpid)

        def kill(event):
            if (event.step, event.done) == ("subtract", 1):
                os.kill(next(iter(pids.values())), signal.SIGKILL)

        gpudia.run(settings.replace(output=str(tmp_path / "out"), dask=scheduler, batch_size=1), callback=kill)
        assert_same(undisturbed, tmp_path / "out")
        client.wait_for_workers(2, timeout=60)
        assert set(client.run(os.getpid).values()) != set(pids.values())


def test_workers_on_this_machine_and_resume(settings, undisturbed, tmp_path):  # noqa: F811
    """One worker, interrupted; then in this process."""
    config = settings.replace(output=str(tmp_path / "out"))

    def stop(event):
        if (event.step, event.done) == ("subtract", 1):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        gpudia.run(config.replace(workers=1), callback=stop)
    gpudia.run(config.replace(resume=True))
    assert_same(undisturbed, tmp_path / "out")


def test_an_address_where_nobody_listens_is_said_at_once(settings, tmp_path):  # noqa: F811
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    start = time.monotonic()
    for address in (f"tcp://127.0.0.1:{port}", "nonsense://x:1"):
        with pytest.raises(ConfigError, match=f"dask must be the address of a scheduler that listens.* got {address}"):
            gpudia.run(settings.replace(output=str(tmp_path / "out"), dask=address))
    assert time.monotonic() - start < 60
    assert not (tmp_path / "out" / "epochs.ecsv").exists()


def test_workers_that_do_not_see_the_output_or_are_of_another_version(settings, scheduler, tmp_path,  # noqa: F811
                                                                       monkeypatch):
    from gpudia.pipeline import cluster

    monkeypatch.setattr(cluster, "__version__", "9.9")
    with pytest.raises(ConfigError, match=f"dask must have workers with gpudia 9.9, got {gpudia.__version__} on"):
        gpudia.run(settings.replace(output=str(tmp_path / "out"), dask=scheduler))
    monkeypatch.undo()
    monkeypatch.setattr(cluster, "_version_and_sight", _sees_nothing)
    with pytest.raises(ConfigError, match="output must be on storage that all workers see"):
        gpudia.run(settings.replace(output=str(tmp_path / "other"), dask=scheduler))


def _sees_nothing(_):
    return gpudia.__version__, False


def test_who_does_whole_batches(monkeypatch):
    """Processes on the CPU, where they use the cores and the memory holds a batch for each."""
    free = active_backend().free_bytes()
    for count, uses_them in (("2", True), ("4", True), ("5", False)):
        monkeypatch.setenv("GPUDIA_CORES", count)
        monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
        assert Readers(2).does_batches(free // 5) is uses_them
    monkeypatch.setenv("GPUDIA_CORES", "2")
    assert not Readers(2).does_batches(free // 3)
    assert not Here().does_batches(1)


@pytest.mark.parametrize(("total", "count", "size"), [(2000, 2, 16), (400, 2, 12), (2000, 16, 7), (60, 2, 4)])
def test_batches_of_processes_leave_none_waiting_for_long(total, count, size):
    """Of work that is the same for all frames the last batch is a sixteenth or so of a process's share, or less."""
    with gpudia.use_backend("numpy"):
        assert Readers(count).frames_of_batch(32, total) == size
        assert Readers(count).frames_of_batch(3, total) == 3  # no more than the memory holds
    assert Here().frames_of_batch(32, total) == 32


def deadly(item, shared):
    """A task: kills its process for one item."""
    if item == "poison":
        os._exit(1)
    return shared + item.encode()


@pytest.mark.parametrize("kind", ["readers", "cluster"])
def test_an_item_that_kills_its_processes_fails_alone(kind, scheduler, tmp_path):
    from gpudia.pipeline.cluster import Cluster

    (tmp_path / "state").mkdir()
    items = ["a", "b", "poison", "c", "d"]
    executor = Readers(2) if kind == "readers" else Cluster(scheduler, 0, tmp_path)
    try:
        found = dict(executor.map(deadly, items, b"x"))
    finally:
        executor.close()
    assert isinstance(found.pop(2), WorkerDied)
    assert found == {0: b"xa", 1: b"xb", 3: b"xc", 4: b"xd"}


def echo(item, shared):
    return item.encode()


def test_neighbours_of_an_item_that_kills_its_worker_are_tried_again_alone(scheduler, tmp_path, monkeypatch):
    """Dask may count the deaths of a worker against all that it was given."""
    from gpudia.pipeline.cluster import Cluster

    (tmp_path / "state").mkdir()
    blamed, honest = [b"a", b"b"], Cluster._result

    def result(self, future):
        done = honest(self, future)
        if done in blamed:
            blamed.remove(done)
            return WorkerDied("as said of a neighbour")
        return done

    monkeypatch.setattr(Cluster, "_result", result)
    executor = Cluster(scheduler, 0, tmp_path)
    try:
        found = list(executor.map(echo, ["a", "b", "c"], b""))
    finally:
        executor.close()
    assert sorted(found) == [(0, b"a"), (1, b"b"), (2, b"c")]
    assert not blamed


def slow(item, shared):
    time.sleep(1)
    return item.encode()


@pytest.mark.parametrize("task", [slow, echo], ids=["nothing is done yet", "a result is still there"])
def test_workers_of_this_machine_that_end_for_good_are_started_again(task, tmp_path, monkeypatch):
    from gpudia.pipeline import cluster

    monkeypatch.setattr(cluster, "_PATIENCE", 1)
    (tmp_path / "state").mkdir()
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "0.5s"}):
        executor = cluster.Cluster(None, 1, tmp_path)
        try:
            results = executor.map(task, ["a", "b", "c"], b"")
            found = dict([next(results)])
            time.sleep(0.5)  # by now all are, if they are quick
            for nanny in list(executor._cluster.workers.values()):
                executor._cluster.sync(nanny.close)
            found.update(results)
        finally:
            executor.close()
    assert found == {0: b"a", 1: b"b", 2: b"c"}


def deadly_batch(item, shared):
    """A batch: its process dies of one frame."""
    if any(decode(look).name == "sim-0003" for look in item):
        os._exit(1)
    return do_batch(item, shared)


def test_a_frame_that_kills_its_processes_fails_alone(settings, undisturbed, tmp_path, monkeypatch):  # noqa: F811
    """Not those that were in a batch with it, or at work beside it."""
    monkeypatch.setenv("GPUDIA_CORES", "2")
    monkeypatch.setattr("gpudia.pipeline.job.do_batch", deadly_batch)
    found = gpudia.run(settings.replace(output=str(tmp_path / "out"), readers=2)).epochs
    expected = Table.read(undisturbed / "epochs.ecsv")
    assert expected.meta["REFERENC"] != "sim-0003"
    dead = found["name"] == "sim-0003"
    assert list(found["reason"]) == list(np.where(dead, "the process that worked on it died, twice", ""))
    for name in ("scale", "chi2", "n_clipped"):
        np.testing.assert_array_equal(found[name][~dead], expected[name][~dead])


def wrong(item, shared):
    """A task with a programming error."""
    raise ZeroDivisionError(item)


@pytest.mark.parametrize("kind", ["here", "readers", "cluster"])
def test_a_programming_error_passes(kind, scheduler, tmp_path):
    from gpudia.pipeline.cluster import Cluster

    (tmp_path / "state").mkdir()
    executor = {"here": Here, "readers": lambda: Readers(1),
                "cluster": lambda: Cluster(scheduler, 0, tmp_path)}[kind]()
    try:
        with pytest.raises(ZeroDivisionError, match="a"):
            list(executor.map(wrong, ["a"], b"x"))
    finally:
        executor.close()


def lethal(item, shared):
    """A task of which its process dies."""
    os._exit(1)


def lethal_elsewhere(item, shared):
    """A task of which another process than this one dies."""
    if multiprocessing.parent_process() is not None:
        os._exit(1)
    return b"here"


def endless(item, shared):
    """A task that does not end by itself."""
    time.sleep(600)


@pytest.mark.parametrize("when", ["results are waited for", "processes are to end"])
def test_an_interrupt_does_not_wait_for_what_processes_are_at(when):
    """The first one is told between results; whoever waits beyond that is interrupted at once."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start without it
    executor = Readers(2)
    results = executor.map(endless, ["a", "b"], b"")
    if when == "processes are to end":
        list(executor.map(deadly, ["a"], b""))  # they work
        begun = executor._submit(endless, "a", b"")
        while not begun.running():  # until then closing takes it back
            time.sleep(0.01)
    threading.Timer(3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        executor.close() if when == "processes are to end" else next(results)
    executor.close()  # does not wait for them, either
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("first", [wrong, lethal])
def test_what_comes_of_preparing_changes_no_result(first):
    executor = Readers(2)
    try:
        executor.prepare(first)
        assert dict(executor.map(deadly, ["a", "b", "c"], b"x")) == {0: b"xa", 1: b"xb", 2: b"xc"}
    finally:
        executor.close()


@pytest.mark.parametrize(("started", "task", "result"), [(False, deadly, b"xa"), (True, deadly, b"xa"),
                                                         (True, lethal_elsewhere, b"here")])
def test_what_is_begun_has_its_result_whatever_becomes_of_the_process(started, task, result):
    executor = Readers(1)
    try:
        if started:
            executor.prepare(deadly)
        assert executor.begin(task, "a", b"x")() == result
    finally:
        executor.close()
