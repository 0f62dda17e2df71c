"""A part computed anew: equal to an extraction with that model; until the switch the old one is whole."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from conftest import Standins, rows_equal
from onnx import helper
from tqdm import tqdm

from kdcache.cache.reader import Cache
from kdcache.cache.refresh import Refresh
from kdcache.cache.verify import verify
from kdcache.cli import main
from kdcache.durable import TEMPORARY_SUFFIX
from kdcache.errors import CacheError, ConfigError, FingerprintError, ModelError, SampleError
from kdcache.precompute import refresh as engine
from kdcache.precompute.refresh import refresh
from kdcache.standins import save_detector, save_teacher

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["kdcache.precompute.refresh", "segmentation_models_pytorch"])


@pytest.fixture(scope="module")
def others(standins: Standins, tmp_path_factory) -> dict[str, object]:
    """Another detector and another teacher, as settings."""
    folder = tmp_path_factory.mktemp("others")
    save_detector(folder / "d.onnx", channels=8, seed=1)
    save_teacher(folder / "t.onnx", bias=1.5)
    return {"yolo_onnx_path": folder / "d.onnx", "teacher_checkpoint": folder / "t.onnx"}


@pytest.fixture(scope="module")
def expected(standins, cache, others, tmp_path_factory) -> dict[str, Cache]:
    """What an extraction with one other model gives, by the part that is refreshed."""
    folder = tmp_path_factory.mktemp("expected")
    standins.extract(folder / "t", teacher_checkpoint=others["teacher_checkpoint"])
    standins.extract(folder / "d", yolo_onnx_path=others["yolo_onnx_path"])
    return {"teacher": Cache(folder / "t"), cache.taps[0]: Cache(folder / "d")}


@pytest.fixture
def copy(cache, tmp_path) -> Path:
    shutil.copytree(cache.path, tmp_path / "c")
    return tmp_path / "c"


def same(a: Cache, b: Cache) -> bool:
    """Every row's content, whatever its arrays are called."""

    def content(row):
        parts = [row.image, row.mask, row.teacher_logits, *row.features.values()]
        return [part.tobytes() for part in parts]

    ours, theirs = ({row.sample_id: content(row) for row in cache} for cache in (a, b))
    return ours == theirs


@pytest.mark.parametrize("part", [0, 1])
def test_refresh_equals_an_extraction_with_that_model(standins, copy, others, expected, part):
    part = list(expected)[part]
    before = set(os.listdir(copy))
    report = refresh(standins.config(**others), copy, part, device="cpu")
    assert report.rows == len(expected[part])
    assert same(Cache(copy), expected[part])
    found = verify(copy)
    assert found.ok, found.bad
    kept = {Path(name).stem for name in os.listdir(copy)}
    assert kept == {Path(name).stem for name in before}  # nothing of the old one is left
    manifest = Cache(copy).manifest
    field = "teacher_sha256" if part == "teacher" else "yolo_sha256"
    assert manifest.fingerprint[field] == expected[part].manifest.fingerprint[field]


def test_both_parts_one_after_the_other_and_more_rows_after_that(standins, tmp_path, others):
    standins.extract(tmp_path / "c", limit=5)
    config = standins.config(**others)
    for part in ("teacher", Cache(tmp_path / "c").taps[0], "teacher"):
        refresh(config, tmp_path / "c", part, device="cpu")
    standins.extract(tmp_path / "c", **others)
    standins.extract(tmp_path / "whole", **others)
    assert same(Cache(tmp_path / "c"), Cache(tmp_path / "whole"))
    assert verify(tmp_path / "c").ok


def test_a_half_gets_its_other_half(standins, cache, tmp_path):
    standins.extract(tmp_path / "c", store="features", teacher_checkpoint=None)
    refresh(standins.config(), tmp_path / "c", "teacher", device="cpu")
    assert rows_equal(Cache(tmp_path / "c"), cache)
    assert verify(tmp_path / "c").ok


def test_an_interrupted_refresh_leaves_the_old_and_goes_on(
    standins, cache, copy, others, expected, monkeypatch
):
    config, write, calls = standins.config(**others), Refresh.write, iter(range(99))

    def stop_in_third(self, commit, rows):
        if next(calls) == 2:
            raise KeyboardInterrupt
        write(self, commit, rows)

    monkeypatch.setattr(Refresh, "write", stop_in_third)
    with pytest.raises(KeyboardInterrupt):
        refresh(config, copy, "teacher", device="cpu")
    monkeypatch.undo()
    assert same(Cache(copy), cache)
    assert verify(copy).ok
    report = refresh(config, copy, "teacher", device="cpu")
    assert 0 < report.rows_found < report.rows
    assert same(Cache(copy), expected["teacher"])


def test_rows_that_are_added_in_between_are_refreshed_too(standins, tmp_path, others, monkeypatch):
    standins.extract(tmp_path / "c", limit=5)
    config, switch = standins.config(**others), Refresh.switch
    monkeypatch.setattr(Refresh, "switch", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        refresh(config, tmp_path / "c", "teacher", device="cpu")
    monkeypatch.setattr(Refresh, "switch", switch)
    standins.extract(tmp_path / "c")
    assert verify(tmp_path / "c").ok
    refresh(config, tmp_path / "c", "teacher", device="cpu")
    standins.extract(tmp_path / "whole", teacher_checkpoint=others["teacher_checkpoint"])
    assert same(Cache(tmp_path / "c"), Cache(tmp_path / "whole"))
    assert verify(tmp_path / "c").ok


def test_another_refresh_takes_the_place_of_an_unfinished_one(
    standins, copy, others, expected, monkeypatch
):
    switch = Refresh.switch
    monkeypatch.setattr(Refresh, "switch", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        refresh(standins.config(**others), copy, "teacher", device="cpu")
    monkeypatch.setattr(Refresh, "switch", switch)
    tap = Cache(copy).taps[0]
    refresh(standins.config(**others), copy, tap, device="cpu")
    assert same(Cache(copy), expected[tap])
    found = verify(copy)
    assert found.ok, found.bad


def test_a_row_that_cannot_be_refreshed_changes_nothing(standins, cache, copy, monkeypatch):
    def refuse(array, tap):
        raise SampleError("feature channel 7 is not finite")

    monkeypatch.setattr(engine.codecs, "encode", refuse)
    monkeypatch.setattr(
        "kdcache.precompute.yolo.whole", lambda channels: cache.manifest.taps[0].groups
    )
    with pytest.raises(CacheError, match=r"row 0 .* cannot be refreshed: feature channel 7"):
        refresh(standins.config(), copy, cache.taps[0], device="cpu")
    assert same(Cache(copy), cache)
    assert verify(copy).ok


def test_a_refresh_looks_first(standins, copy, cache, tmp_path, caplog, monkeypatch):
    """Probabilities, a teacher of another input and a full disk are known before a row is computed."""
    model = onnx.load(standins.teacher)
    model.graph.node.extend(
        [
            helper.make_node("Sigmoid", ["logits"], ["p"]),
            helper.make_node("Max", ["p", "p"], ["end"]),
        ]
    )
    model.graph.output[0].name = "end"
    onnx.save(model, tmp_path / "p.onnx")
    with pytest.raises(ModelError, match="these are probabilities"):
        refresh(standins.config(teacher_checkpoint=tmp_path / "p.onnx"), copy, "teacher")
    save_teacher(tmp_path / "low.onnx", bias=-50)
    monkeypatch.setattr("kdcache.cache.need.free", lambda out: (1000, None))
    settings = standins.config(teacher_checkpoint=tmp_path / "low.onnx")
    with pytest.raises(CacheError, match="10 rows will take about .* 1.0 kB left"):
        refresh(settings, copy, "teacher", device="cpu")
    assert "the teacher's mIoU is" in caplog.text
    assert (tmp_path / "c-check.png").is_file()
    assert not list(copy.glob("commits.*"))
    assert same(Cache(copy), cache)


def test_a_full_disk_leaves_the_old_part(standins, others, copy, cache, monkeypatch):
    def full(self, array):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as small:
        small.setattr("kdcache.cache.shard.ShardFile.append", full)
        with pytest.raises(CacheError, match="No space left.*the cache is the old one still"):
            refresh(standins.config(**others), copy, "teacher", device="cpu")
    assert same(Cache(copy), cache)
    assert verify(copy).ok


def test_a_folder_that_a_killed_refresh_left_empty_is_accounted_for(standins, others, copy):
    config = standins.config(**others)
    manifest, _ = engine._target(config, Cache(copy).manifest, "teacher", "cpu")
    with Refresh(copy, manifest):
        pass
    (copy / "teacher_logits.1/zarr.json").unlink()
    assert verify(copy).ok
    refresh(config, copy, "teacher", device="cpu")
    assert verify(copy).ok


def test_stopped_between_two_rows_it_goes_on(standins, others, copy, cache, expected, monkeypatch):
    config, rows = standins.config(**others), engine._rows

    def stopping(*arguments):
        for number, row in enumerate(rows(*arguments)):
            if number == 1:
                os.kill(os.getpid(), signal.SIGINT)
            yield row

    with monkeypatch.context() as stopped:
        stopped.setattr(engine, "_rows", stopping)
        with pytest.raises(KeyboardInterrupt):
            refresh(config, copy, "teacher", device="cpu")
    assert same(Cache(copy), cache)
    refresh(config, copy, "teacher", device="cpu")
    assert same(Cache(copy), expected["teacher"])


def test_features_cannot_be_added(standins, tmp_path):
    standins.extract(tmp_path / "c", store="logits", limit=2)
    with pytest.raises(ConfigError, match="holds logits only; features cannot be added"):
        refresh(standins.config(), tmp_path / "c", "x", device="cpu")


def test_what_is_missing_is_named(standins, copy, cache):
    with pytest.raises(ConfigError, match="no such part; nearest: .*teacher"):
        refresh(standins.config(), copy, "teach", device="cpu")
    with pytest.raises(ConfigError, match="the teacher is needed: --teacher FILE"):
        refresh(standins.config(teacher_checkpoint=None), copy, "teacher", device="cpu")
    with pytest.raises(ConfigError, match="the detector is needed: --yolo FILE"):
        refresh(standins.config(yolo_onnx_path=None), copy, cache.taps[0], device="cpu")
    with pytest.raises(CacheError, match="is not a kdcache cache"):
        refresh(standins.config(), copy / "nowhere", "teacher", device="cpu")


def test_another_device_than_the_caches_is_refused(standins, copy, monkeypatch):
    monkeypatch.setattr(engine, "present", lambda device: "cuda")
    with pytest.raises(FingerprintError, match="= cpu float32, now cuda float32 was asked for"):
        refresh(standins.config(), copy, "teacher")


def _refresh(config, path, part):
    tqdm.set_lock(threading.RLock())  # its own is a semaphore that a killed process would leave
    refresh(config, path, part, device="cpu")


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("part", [0, 1])
def test_killed_at_random_moments_it_is_the_old_or_the_new(
    standins, cache, others, expected, tmp_path, part, kills
):
    config, rng = standins.config(**others), np.random.default_rng(part)
    part = list(expected)[part]
    outcomes, seconds, shards = [], None, len(cache.commits)
    for trial in range(5 * kills):
        path = tmp_path / f"{trial}.zarr"
        shutil.copytree(cache.path, path)
        process = PROCESSES.Process(target=_refresh, args=(config, path, part))
        process.start()
        while process.is_alive() and not list(path.glob("commits.*")):
            time.sleep(0.0005)
        started = time.monotonic()
        if seconds is not None:
            if trial % 2:  # about the switch
                while process.is_alive() and len(list(path.glob("commits.1/*/*"))) < shards:
                    time.sleep(0.0002)
                time.sleep(rng.uniform(0, 0.02))
            else:
                time.sleep(rng.uniform(0, seconds))
            process.kill()
        process.join()
        if seconds is None:  # the first runs through, to know how long it takes
            seconds = time.monotonic() - started
        if process.exitcode == 0:  # done before it was killed
            continue
        # a file that was being written under its temporary name is what any killed writer leaves
        bad = [p for p in verify(path).bad if not p.path.endswith(TEMPORARY_SUFFIX)]
        assert bad == []
        now = Cache(path)
        outcomes.append("old" if same(now, cache) else "new")
        assert outcomes[-1] == "old" or same(now, expected[part])
        refresh(config, path, part, device="cpu")
        assert same(Cache(path), expected[part])
        assert verify(path).ok
        shutil.rmtree(path)
        if len(outcomes) == kills:
            break
    print(outcomes)
    assert len(outcomes) == kills


def test_the_command(standins, copy, others, expected):
    flags = ["extract", "--out", copy, "--refresh", "teacher", "--device", "cpu"]
    flags += ["--teacher", others["teacher_checkpoint"]]
    result = CliRunner().invoke(main, [*map(str, flags)])
    assert result.exit_code == 0, result.output
    assert "teacher of 10 rows computed anew" in result.stdout
    assert same(Cache(copy), expected["teacher"])
    contradicting = [
        "--images",
        standins.images,
        "--size",
        256,
        "--split",
        "val",
        "--yolo",
        "d.onnx",
    ]
    result = CliRunner().invoke(main, [*map(str, [*flags, *contradicting])])
    assert result.exit_code == 2
    for option in ("--images", "--yolo", "--size", "--split"):
        assert option in result.stderr


def test_a_refresh_is_not_done_by_workers(standins, copy):
    given = [
        "extract",
        "--out",
        str(copy),
        "--refresh",
        "teacher",
        "--teacher",
        str(standins.teacher),
    ]
    result = CliRunner().invoke(main, [*given, "--local-workers", "2"])
    assert result.exit_code == 2
    assert "--refresh works in one process" in result.stderr
