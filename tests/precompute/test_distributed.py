"""Extraction on dask workers: the same cache as one process makes, also when they die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import MANIFEST, Standins, make_row, rows_equal
from distributed import Client

from kdcache.cache.format import commit_answers, read_root
from kdcache.cache.open_shard import OpenShard
from kdcache.cache.reader import Cache
from kdcache.cache.verify import verify
from kdcache.cache.writer import CacheWriter, may_write
from kdcache.cluster import asked, local_workers, sealed, unsealed
from kdcache.errors import CacheError, ClusterError, DatasetError, FingerprintError
from kdcache.precompute import distributed
from kdcache.precompute.dataset import Dataset, folder_dataset
from kdcache.precompute.distributed import extract_on
from kdcache.precompute.extract import extract
from kdcache.standins import TAP, save_scenes


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with local_workers(2, device="cpu", nthreads=2) as found:
        yield found


def dataset_of(standins: Standins) -> Dataset:
    return folder_dataset(standins.images, standins.masks)


def same_files(a: Path, b: Path) -> None:
    """Every file of both, but for what is said of their datasets."""
    names = {file.relative_to(a) for file in a.rglob("*") if file.is_file()}
    assert names == {file.relative_to(b) for file in b.rglob("*") if file.is_file()}
    for name in sorted(names):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_workers_write_the_cache_that_one_process_writes(client, standins, cache, tmp_path):
    report = extract_on(
        client, standins.config(), dataset_of(standins), tmp_path / "c.zarr", device="cpu"
    )
    assert (report.rows_added, report.skipped, report.device) == (len(cache), {}, "cpu")
    same_files(tmp_path / "c.zarr", Path(str(cache.path)))
    assert verify(tmp_path / "c.zarr").ok
    assert (tmp_path / "c.zarr-check.png").is_file()
    assert report.stages.busy_s["detector"] > 0
    again = extract_on(
        client, standins.config(), dataset_of(standins), tmp_path / "c.zarr", device="cpu"
    )
    assert (again.rows_added, again.rows_found) == (0, len(cache))


def test_views_of_a_policy_that_only_the_client_can_read_and_several_taps(
    client, standins, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # where the workers are not
    (tmp_path / "mine.toml").write_text("[flip]\nprobability = 0.5\n[noise]\nprobability = 1.0\n")
    taps = (TAP, "relu_3")
    config = standins.config(views=3, augment="mine.toml", yolo_target_layer=taps)
    report = extract_on(client, config, dataset_of(standins), tmp_path / "c.zarr", device="cpu")
    assert report.rows_added == report.rows_total > 20
    standins.extract(tmp_path / "d.zarr", views=3, augment="mine.toml", yolo_target_layer=taps)
    same_files(tmp_path / "c.zarr", tmp_path / "d.zarr")
    assert verify(tmp_path / "c.zarr").ok


def test_they_append_to_what_one_process_began(client, standins, cache, tmp_path):
    out = tmp_path / "c.zarr"
    standins.extract(out, limit=4)
    report = extract_on(client, standins.config(), dataset_of(standins), out, device="cpu")
    assert report.rows_found == 4
    assert rows_equal(Cache(out), cache)
    assert verify(out).ok
    with pytest.raises(FingerprintError, match="precision"):
        extract_on(
            client, standins.config(precision="int5"), dataset_of(standins), out, device="cpu"
        )


def test_bad_photos_are_skipped_by_name_wherever_they_are(client, standins, tmp_path, monkeypatch):
    images, masks = tmp_path / "images", tmp_path / "masks"
    for folder, source in ((images, standins.images), (masks, standins.masks)):
        folder.mkdir()
        for file in source.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    names = sorted(file.name for file in images.iterdir())
    for name in (names[1], *names[3:6]):
        (images / name).write_bytes(b"no image")
    dataset, config = folder_dataset(images, masks), standins.config(val_fraction=0.0)
    report = extract_on(client, config, dataset, tmp_path / "c.zarr", device="cpu")
    here = extract(config, dataset, tmp_path / "here.zarr", device="cpu")
    assert set(report.skipped) == {names[1], *names[3:6]}
    assert report.skipped == here.skipped
    assert Cache(tmp_path / "c.zarr").keys == Cache(tmp_path / "here.zarr").keys
    assert rows_equal(Cache(tmp_path / "c.zarr"), Cache(tmp_path / "here.zarr"))
    assert verify(tmp_path / "c.zarr").ok  # no shard of skipped photos looks lost
    with pytest.raises(DatasetError, match=r"--strict stops here"):
        extract_on(client, config, dataset, tmp_path / "s.zarr", device="cpu", strict=True)
    # the first usable photo comes after those that a worker is sent first
    monkeypatch.setattr(distributed, "_TRIED_AT_ONCE", 1)
    for name in names[:2]:
        (images / name).write_bytes(b"no image")
    report = extract_on(client, config, dataset, tmp_path / "f.zarr", device="cpu")
    assert report.rows_added == 10 - 5
    for name in names:
        (images / name).write_bytes(b"no image")
    with pytest.raises(
        DatasetError, match=r"none of the 10 images can be used \(.*cannot be decoded"
    ):
        extract_on(client, config, dataset, tmp_path / "n.zarr", device="cpu")
    assert not (tmp_path / "n.zarr").exists()


def test_models_are_sent_to_workers_that_lack_them(
    client, standins, cache, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(distributed, "asked", lambda *_: {"a": True, "b": False})
    # other settings, so that the workers open the models anew
    with caplog.at_level("INFO", "kdcache"):
        extract_on(
            client,
            standins.config(seed=0, precision="float32"),
            dataset_of(standins),
            tmp_path / "c.zarr",
            device="cpu",
        )
    assert "sending detector.onnx and teacher.onnx" in caplog.text
    written = asked(client, distributed.answer, sealed(_local_files))
    assert any(len(files) == 2 for files in written.values())
    standins.extract(tmp_path / "here.zarr", precision="float32")
    assert rows_equal(Cache(tmp_path / "c.zarr"), Cache(tmp_path / "here.zarr"))


def _local_files() -> list[str]:
    from distributed import Worker

    (worker,) = Worker._instances
    return [file.name for file in Path(worker.local_directory).glob("*.onnx")]


def test_a_worker_that_does_not_see_photos_or_cache_or_computes_otherwise_is_named(
    client, standins, tmp_path
):
    nowhere = replace(dataset_of(standins), images=tmp_path / "unmounted")
    with pytest.raises(ClusterError, match="worker tcp.* does not see the photos in .*unmounted"):
        extract_on(client, standins.config(), nowhere, tmp_path / "c.zarr", device="cpu")
    other = replace(MANIFEST, fingerprint={**MANIFEST.fingerprint, "execution_provider": "cuda"})
    with pytest.raises(ClusterError, match="worker .*execution_provider = None.*cuda"):
        client.submit(
            unsealed, sealed(distributed._refuse_other_results, MANIFEST, other), pure=False
        ).result()
    with pytest.raises(ClusterError, match="memory of one process"):
        extract_on(client, standins.config(), dataset_of(standins), "memory://b/c", device="cpu")


def test_workers_write_to_a_store(bucket, standins, cache):
    out = bucket / "scenes.zarr"
    with local_workers(2, device="cpu") as found:  # they inherit where the store is
        extract_on(found, standins.config(), dataset_of(standins), out, device="cpu")
    assert rows_equal(Cache(out), cache)
    assert verify(out).ok


def test_only_the_run_that_gave_a_shard_out_may_finish_it(tmp_path):
    out = tmp_path / "c"
    with CacheWriter(out, MANIFEST) as writer:
        token = writer.reserve([0, 1, 2])
        shard = OpenShard(out, writer.manifest, 1)
        shard.append(shard.encoded(*make_row(7)))
        may_write(out, 1, token)
        commit = shard.finish()
        writer.adopt(commit)
        with pytest.raises(CacheError, match="shard 1 of .* is written by others"):
            may_write(out, 1, token)  # a second worker that was thought to be lost
        with pytest.raises(CacheError, match="shard 1"):
            writer.adopt(commit)
    with pytest.raises(CacheError, match="shard 2 of .* is written by others"):
        may_write(out, 2, token)  # the run has ended
    assert read_root(out).reserved is None
    assert [key.sample_id for key in Cache(out).keys] == [make_row(7)[0].sample_id]


def test_what_several_killed_workers_left_is_swept(tmp_path):
    out = tmp_path / "c"
    killed = CacheWriter(out, MANIFEST)
    token = killed.reserve(range(5))
    for number in (1, 2, 4):
        shard = OpenShard(out, killed.manifest, number)
        shard.append(shard.encoded(*make_row(number)))
        if number < 4:
            shard.finish()
        else:  # it died before
            for file in shard._files.values():
                file._file._file.close()
    killed._lock.close()
    assert len(list(out.rglob("*.kdtmp"))) > 0
    with CacheWriter(out, MANIFEST) as writer:
        with pytest.raises(CacheError, match="written by others"):
            may_write(out, 3, token)  # one of them that lives on
        writer.append(writer.encoded(*make_row(0)))
    assert len(Cache(out)) == 1
    assert verify(out).ok
    for number in (2, 3):  # without a reservation these are lost records
        for spec in MANIFEST.arrays():
            (out / spec.shard_path(number)).write_bytes(b"")
    with pytest.raises(CacheError, match=r"files of shards \[2, 3\] without a commit record"):
        CacheWriter(out, MANIFEST)


@pytest.fixture(scope="module")
def many(standins: Standins, tmp_path_factory: pytest.TempPathFactory) -> Standins:
    """More and larger scenes: there is time to interfere."""
    folder = tmp_path_factory.mktemp("many")
    for model in (standins.detector, standins.teacher):
        (folder / model.name).write_bytes(model.read_bytes())
    save_scenes(folder, 48, 200, 260)
    return Standins(folder)


SLOW = {"size": 256, "shard_rows": 2}


@pytest.fixture(scope="module")
def many_rows(many: Standins, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    out = tmp_path_factory.mktemp("many_rows") / "c.zarr"
    many.extract(out, **SLOW)
    return Cache(out)


def when_begun(out: Path, act: object, *, commits: int = 3) -> threading.Thread:
    """Call `act` as soon as so many shards are committed."""

    def watch() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if (out / "commits").is_dir() and len(commit_answers(out, "commits")) >= commits:
                act()  # type: ignore[operator]
                return
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_a_worker_killed_in_the_middle_changes_nothing(many, many_rows, tmp_path):
    out, seen = tmp_path / "c.zarr", []
    with local_workers(2, device="cpu") as client:
        pids = list(client.run(os.getpid).values())

        def kill() -> None:
            while not list(out.rglob("*.kdtmp")):  # one is in the middle of a shard
                pass
            seen.append(len(commit_answers(out, "commits")))
            os.kill(pids[0], signal.SIGKILL)

        killer = when_begun(out, kill)
        report = extract_on(client, many.config(**SLOW), dataset_of(many), out, device="cpu")
        killer.join()
    assert seen
    assert seen[0] < len(many_rows.commits)
    assert report.rows_added == len(many_rows)
    assert Cache(out).keys == many_rows.keys
    assert rows_equal(Cache(out), many_rows)
    assert verify(out).ok


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_client_that_ends_in_the_middle_loses_no_commit(how, many, many_rows, tmp_path):
    out = tmp_path / "c.zarr"
    arguments = ["--images", many.images, "--masks", many.masks, "--out", out, "--device", "cpu"]
    arguments += ["--yolo", many.detector, "--teacher", many.teacher, "--size", 256]
    arguments += ["--set", "shard_rows=2", "--val-fraction", "0.3", "--local-workers", 2]
    process = subprocess.Popen(
        [sys.executable, "-m", "kdcache", "extract", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
    )
    when_begun(out, lambda: process.send_signal(how)).join()
    _, told = process.communicate()
    there = len(Cache(out))
    assert 0 < there < len(many_rows)
    if how == signal.SIGINT:
        assert process.returncode == 1
        assert "stopped; what is committed stays" in told
        assert not list(out.rglob("*.kdtmp"))
    many.extract(out, **SLOW)
    assert rows_equal(Cache(out), many_rows)
    assert verify(out).ok
