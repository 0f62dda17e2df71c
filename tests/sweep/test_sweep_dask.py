"""A cluster's workers train what processes here would, whatever happens to them and to the sweep."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import daskprocesses
import pytest

from kdcache.cache.reader import Cache
from kdcache.config import TrainConfig
from kdcache.errors import ClusterError
from kdcache.sweep import remote
from kdcache.sweep.sweep import _is_free, sweep
from kdcache.sweep.workers import Task
from kdcache.train.prepare import Start

BASE = TrainConfig(encoder_weights="random", epochs=4, batch_size=3, learning_rate=3e-3)
AXES = {"kl_weight": [0.5, 1.0]}


@pytest.fixture(scope="module")
def alone(cache, tmp_path_factory):
    """The runs, trained by a process here."""
    out = tmp_path_factory.mktemp("sweeps") / "alone"
    sweep(cache.path, out, AXES, BASE, device="cpu")
    return out


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory):
    """The address of a scheduler with two workers of two threads each."""
    folder = tmp_path_factory.mktemp("dask")
    with (
        daskprocesses.scheduler(folder) as address,
        daskprocesses.worker(address, folder, "--nworkers", 2, KDCACHE_THREADS="1"),
    ):
        yield address


def lines_written(out):
    return sum(len(path.read_text().splitlines()) for path in out.glob("runs/*/metrics.jsonl"))


def assert_same(out, other):
    """The rows of the table and the weights; nothing else is left behind."""
    rows = (out / "sweep.csv").read_text().splitlines()
    assert len(rows) > 1
    assert set(rows) <= set((other / "sweep.csv").read_text().splitlines())
    for run in (out / "runs").iterdir():
        theirs = (other / "runs" / run.name / "student_best.safetensors").read_bytes()
        assert theirs == (run / "student_best.safetensors").read_bytes()
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in other.iterdir())


def waited_for(condition, timeout_s=100):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_workers_give_the_numbers_that_processes_give(
    cache, alone, two_workers, tmp_path, caplog, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # the workers are elsewhere
    caplog.set_level("INFO", "kdcache")
    out = (tmp_path / "s").relative_to(tmp_path)
    report = sweep(cache.path, out, AXES, BASE, device="cpu", dask=two_workers)
    assert_same(tmp_path / "s", alone)
    assert report.failed == []
    on = re.findall(r"kl_weight=\S+: on (tcp://\S+)", caplog.text)
    assert len(set(on)) == len(on) == 2  # one on each
    assert "epoch 4/4" in (tmp_path / "s/logs/kl_weight=0.5.log").read_text()
    caplog.clear()
    sweep(cache.path, out, AXES, BASE, device="cpu", dask="127.0.0.1:9")  # nothing is left to do


def test_killed_and_stopped_it_goes_on_and_ends_the_same(cache, alone, two_workers, tmp_path):
    """The client by SIGKILL, then by SIGINT: what it leaves behind saves and stops."""
    out = tmp_path / "s"
    words = [sys.executable, "-m", "kdcache", "sweep", cache.path, "--out", out, "--device", "cpu"]
    words += ["--dask", two_workers, "--encoder-weights", "random", "--batch-size", 3]
    words += ["--epochs", 4, "--set", "learning_rate=3e-3", "--grid", "kl_weight=0.5,1"]
    for how in (signal.SIGKILL, signal.SIGINT):
        before = lines_written(out)
        process = subprocess.Popen(list(map(str, words)), stderr=subprocess.PIPE, text=True)
        waited_for(lambda before=before: lines_written(out) > before)
        process.send_signal(how)
        _, said = process.communicate(timeout=60)
        waited_for(lambda: all(map(_is_free, (out / "runs").iterdir())))
        assert lines_written(out) < 8
        time.sleep(1)
        assert all(map(_is_free, (out / "runs").iterdir()))  # nothing trains unseen
        assert process.returncode == (1 if how == signal.SIGINT else -9), said
    assert said.splitlines()[-1].startswith("stopped; what is committed stays")
    assert "Traceback" not in said
    sweep(cache.path, out, {}, BASE, device="cpu", dask=two_workers)
    assert_same(out, alone)


def test_a_crew_that_is_closed_stops(cache, two_workers, tmp_path):
    (tmp_path / "s").mkdir()
    start = Start(out=tmp_path / "s/run", config=BASE.model_copy(update={"epochs": 500}))
    task = Task(cache=cache.path, starts=[start], log=tmp_path / "s/run.log")
    with remote.cluster_crew(two_workers, cache, tmp_path / "s", device="cpu", jobs=1) as crew:
        assert crew.has_room
        crew.give(task)
        assert not crew.has_room  # of two workers
        waited_for((start.out / "metrics.jsonl").exists)
        crew.close()
    waited_for(lambda: _is_free(start.out))
    assert list((tmp_path / "s").glob(".visible-*")) == []


def test_a_killed_workers_runs_go_on_in_another(cache, alone, two_workers, tmp_path, monkeypatch):
    ready, killed = remote.Workers.ready, []
    out = tmp_path / "s"

    def kill_the_first(crew, timeout_s):
        if not killed and crew._given and lines_written(out):
            ((_, address),) = crew._given.values()
            killed.append((out / "runs/kl_weight=0.5/metrics.jsonl").read_text())
            os.kill(crew._admitted[address].pid, signal.SIGKILL)
        return ready(crew, 0.05)

    monkeypatch.setattr(remote.Workers, "ready", kill_the_first)
    report = sweep(cache.path, out, {"kl_weight": [0.5]}, BASE, device="cpu", dask=two_workers)
    assert [run.state for run in report.runs] == ["done"]
    assert_same(out, alone)
    # the epoch that was finished, with its times, was not trained again
    assert (out / "runs/kl_weight=0.5/metrics.jsonl").read_text().startswith(killed[0])


def test_a_worker_that_does_not_see_the_folder_is_refused(
    cache, two_workers, tmp_path, monkeypatch
):
    monkeypatch.setattr(remote, "unseen", daskprocesses.blind)
    with pytest.raises(ClusterError, match=r"worker tcp://.* it does not see .* the same path"):
        sweep(cache.path, tmp_path / "s", AXES, BASE, device="cpu", dask=two_workers)
    assert list((tmp_path / "s").glob("runs/*")) == []


def test_a_worker_says_what_it_does_not_see(cache, standins, tmp_path):
    shards, digest = [commit.shard for commit in cache.commits], remote._digest(cache)
    mark = tmp_path / "mark"
    assert "does not see" in remote.unseen(cache.path, shards, digest, mark, [])
    mark.touch()
    assert remote.unseen(cache.path, shards, digest, mark, [str(mark)]) == ""
    assert "does not see b3.pth" in remote.unseen(cache.path, shards, digest, mark, ["b3.pth"])
    assert "cannot read the cache" in remote.unseen(tmp_path, shards, digest, mark, [])
    standins.extract(tmp_path / "c", precision="float16")
    assert len(Cache(tmp_path / "c").commits) == len(shards)
    assert "another cache" in remote.unseen(tmp_path / "c", shards, digest, mark, [])


def test_what_kills_every_worker_is_one_failed_run(cache, two_workers, tmp_path, monkeypatch):
    """The third is one that its nanny started meanwhile."""
    monkeypatch.setattr(remote, "train", daskprocesses.dies)
    report = sweep(
        cache.path, tmp_path / "s", {"kl_weight": [0.5]}, BASE, device="cpu", dask=two_workers
    )
    (run,) = report.failed
    assert re.match(r"3 workers were lost in the same epoch of it, .*out of memory\?", run.error)
