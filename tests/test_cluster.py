"""A cluster is told what is wrong with it before it works, and each worker has a device of its own."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import daskprocesses
import pytest

from kdcache import cluster
from kdcache.errors import ClusterError


def environment(*names):
    """Of a worker."""
    return {name: os.environ.get(name) for name in names}


def process_id():
    return os.getpid()


def interrupts():
    return signal.getsignal(signal.SIGINT)


def never_ends(flag):
    wanted = cluster.still_wanted()
    Path(flag).touch()
    while wanted():
        time.sleep(0.05)
    Path(flag).unlink()


def waited_for(condition, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_local_workers_have_a_gpu_each_before_they_start(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5c0ffee,MIG-7")
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    before = dict(os.environ)
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    with cluster.local_workers(2) as client:
        found = client.run(environment, *names).values()
        assert sorted(map(tuple, (one.values() for one in found))) == [
            ("3", "3", "3"),
            ("GPU-5c0ffee", "3", "3"),
        ]
        assert client.submit(cluster.threads_here).result() == 3
        assert set(client.run(interrupts).values()) == {signal.SIG_IGN}
        described = cluster.devices(client, "cpu")
        assert {(one.gpu, one.threads) for one in described} == {(None, 3)}
        assert {one.visible for one in described} == {"3", "GPU-5c0ffee"}
        addresses = client.scheduler_info()["workers"]
        assert all(address.startswith("tcp://127.0.0.1:") for address in addresses)
    changed = set(before.items()) ^ set(os.environ.items())
    assert {name for name, _ in changed} <= {"__DASK_PARENT_PID"}


def test_more_workers_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    several = r"3 workers for 2 GPUs \(0, 1\): .* ask for 2 or fewer"
    with pytest.raises(ClusterError, match=several), cluster.local_workers(3):
        pass


def on_gpu(gpu, port):
    return cluster.WorkerDevice(
        address=f"tcp://node:{port}", host="node", pid=port, gpu=gpu, visible=None, threads=1
    )


def test_two_workers_on_one_gpu_are_refused():
    several = [on_gpu("a", 1), on_gpu("b", 2), on_gpu("a", 3)]
    with pytest.raises(ClusterError, match=r"node:1 .* and .*node:3 .* same GPU a: .*CUDA_VISIBLE"):
        cluster.check_distinct(several)
    cluster.check_distinct([on_gpu(None, 1), on_gpu(None, 2), on_gpu("a", 3)])


def test_a_scheduler_that_is_not_there_is_one_error_soon(free_port, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_CONNECT_S", 1)
    started = time.monotonic()
    refused = rf"127.0.0.1:{free_port} .*`dask scheduler`.*dask worker"
    with pytest.raises(ClusterError, match=refused), cluster.connected(f"127.0.0.1:{free_port}"):
        pass
    assert time.monotonic() - started < 5
    with (
        pytest.raises(ClusterError, match="cluster.json is no scheduler file"),
        cluster.connected(str(tmp_path / "cluster.json")),
    ):
        pass
    with (
        pytest.raises(ClusterError, match="no dask scheduler answers at nowhere"),
        cluster.connected("nowhere"),
    ):
        pass


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory):
    """A scheduler file, of a scheduler with one worker and its nanny."""
    folder = tmp_path_factory.mktemp("dask")
    with daskprocesses.scheduler(folder) as address, daskprocesses.worker(address, folder):
        yield str(folder / "scheduler.json")


def test_a_scheduler_file_leads_to_its_workers(one_worker, caplog):
    caplog.set_level("INFO", "kdcache")
    with cluster.connected(one_worker) as client:
        (found,) = cluster.devices(client, "cpu")
        assert found.threads == 2  # of dask worker --nthreads
        assert client.submit(cluster.threads_here).result() == 2
    assert caplog.text.count("http://127.0.0.1:") == 1
    assert f"worker {found.address} " in caplog.text


def test_another_version_is_refused_with_both(one_worker, monkeypatch):
    monkeypatch.setattr("kdcache.__version__", "0.0.7")
    with (
        pytest.raises(ClusterError, match=r"has kdcache \d.*, here it is 0\.0\.7: install"),
        cluster.connected(one_worker),
    ):
        pass
    monkeypatch.undo()
    monkeypatch.setattr(cluster, "sys", SimpleNamespace(version_info=(3, 7, 1)))
    with (
        pytest.raises(ClusterError, match=r"has Python 3\.\d+, here it is 3\.7"),
        cluster.connected(one_worker),
    ):
        pass


def test_a_worker_without_kdcache_is_refused(one_worker, tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("def versions():\n    return {'kdcache': '1'}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cluster, "versions", importlib.import_module("only_here").versions)
    none = r"has no kdcache 1 .*No module named 'only_here'.*: install it there"
    with pytest.raises(ClusterError, match=none), cluster.connected(one_worker):
        pass


def test_a_task_sees_that_nobody_waits_for_it(one_worker, tmp_path):
    flag = tmp_path / "runs"
    for end in ("cancelled", "client gone"):
        with cluster.connected(one_worker) as client:
            future = client.submit(never_ends, str(flag), pure=False)
            waited_for(flag.exists)
            if end == "cancelled":
                future.cancel()
                waited_for(lambda: not flag.exists())
        waited_for(lambda: not flag.exists())


def test_a_worker_that_dies_again_and_again_is_one_error(one_worker):
    with cluster.connected(one_worker) as client:
        (before,) = client.run(process_id).values()
        died = pytest.raises(ClusterError, match="4 workers died one after the other")
        with died, cluster.told_plainly():
            client.submit(daskprocesses.dies, pure=False).result(timeout=60)
        client.wait_for_workers(1, timeout=30)
        (after,) = client.run(process_id).values()
    assert before != after


def test_only_what_dask_says_of_connections_becomes_an_error_of_the_cluster():
    timed_out = OSError("Timed out trying to connect to tcp://127.0.0.1:1 after 10 s")
    lost = "scheduler is lost.*Timed out.*the same command goes on"
    with pytest.raises(ClusterError, match=lost), cluster.told_plainly():
        raise timed_out
    with pytest.raises(OSError, match="No space left"), cluster.told_plainly():
        raise OSError(errno.ENOSPC, "No space left on device")


def test_without_workers_it_is_said_and_waited_for(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cluster, "_SOON_S", 0.2)
    monkeypatch.setattr(cluster, "_PATIENCE_S", 0.5)
    with daskprocesses.scheduler(tmp_path) as address:
        none = r"still has no workers after 0.5 s; .*dask worker tcp:"
        with pytest.raises(ClusterError, match=none), cluster.connected(address):
            pass
        assert "has no workers yet; waiting" in caplog.text
        monkeypatch.setattr(cluster, "_PATIENCE_S", 60)
        late = daskprocesses.worker(address, tmp_path)
        opened = threading.Timer(0.5, late.__enter__)
        opened.start()
        with cluster.connected(address) as client:
            assert len(client.scheduler_info()["workers"]) == 1
        late.__exit__(None, None, None)


def test_a_lost_scheduler_is_one_error_and_its_tasks_end(tmp_path):
    flag = tmp_path / "runs"
    with (
        daskprocesses.scheduler(tmp_path) as address,
        daskprocesses.worker(address, tmp_path),
        cluster.connected(address) as client,
    ):
        future = client.submit(never_ends, str(flag))
        waited_for(flag.exists)
        os.kill(client.run_on_scheduler(process_id), signal.SIGKILL)
        with pytest.raises(ClusterError, match="scheduler is lost"), cluster.told_plainly():
            future.result(timeout=60)
        waited_for(lambda: not flag.exists())
