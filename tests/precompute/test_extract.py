"""Extraction end to end: rows are known functions of the pixels; resume, skips, refusals."""

from __future__ import annotations

import dataclasses
import shutil
import threading
import time

import numpy as np
import pytest
from conftest import SIZE, rows_equal

from kdcache.cache.format import read_remarks
from kdcache.cache.reader import Cache
from kdcache.cache.writer import CacheWriter
from kdcache.errors import (
    CacheError,
    ConfigError,
    DatasetError,
    DeviceMemoryError,
    FingerprintError,
    ModelError,
    SampleError,
)
from kdcache.imaging import decode_image, place, resize_image
from kdcache.precompute import extract as engine
from kdcache.precompute.dataset import folder_dataset, split_of
from kdcache.precompute.extract import extract
from kdcache.precompute.job import open_job
from kdcache.precompute.plan import plan
from kdcache.precompute.sources import Tally
from kdcache.precompute.stages import WRITE
from kdcache.precompute.teacher import Teacher
from kdcache.precompute.yolo import Yolo


def test_float32_cache_holds_exactly_what_the_models_give(standins, tmp_path):
    standins.extract(tmp_path / "c", precision="float32", limit=4)
    yolo = Yolo(
        standins.detector,
        taps=standins.config().yolo_target_layer,
        expects="rgb01",
        device="cpu",
        size_px=SIZE,
    )
    teacher = Teacher(standins.teacher, encoder="", device="cpu", size_px=SIZE)
    for row in Cache(tmp_path / "c"):
        image = decode_image((standins.images / row.sample_id).read_bytes())
        image = resize_image(image, place(*image.shape[:2], SIZE, "stretch"))
        assert np.array_equal(row.image, image)
        assert np.array_equal(row.teacher_logits, teacher.logits(image[None])[0])
        for tap, feature in yolo.features(image[None]).items():
            assert np.array_equal(row.features[tap], feature[0])


def test_splits_follow_the_hash_and_never_share_a_shard(cache):
    assert {key.split for key in cache.keys} == {"train", "val"}
    assert all(key.split == split_of(key.sample_id, 0.3, 0) for key in cache.keys)
    assert all(len({key.split for key in commit.keys}) == 1 for commit in cache.commits)


def test_resume_computes_only_what_is_missing_and_ends_equal(
    standins, cache, tmp_path, monkeypatch
):
    standins.extract(tmp_path / "c", limit=4)
    seen = []
    features = Yolo.features
    monkeypatch.setattr(
        Yolo, "features", lambda self, images: seen.append(len(images)) or features(self, images)
    )
    report = standins.extract(tmp_path / "c")
    assert (report.rows_added, report.rows_found, report.rows_total) == (6, 4, 10)
    assert len(seen) == 1 + 6  # it is tried once when it is opened
    assert rows_equal(Cache(tmp_path / "c"), cache)


def test_rows_that_another_process_added_meanwhile_are_not_added_twice(
    standins, cache, tmp_path, monkeypatch
):
    """What is to be done was listed before the other one was done and gave up its lock."""
    look = engine._look

    def overtaken(*arguments):
        monkeypatch.setattr(engine, "_look", look)
        standins.extract(tmp_path / "c", limit=6)
        look(*arguments)

    monkeypatch.setattr(engine, "_look", overtaken)
    with pytest.raises(CacheError, match="another process has added rows .* run the same command"):
        standins.extract(tmp_path / "c")
    assert standins.extract(tmp_path / "c").rows_added == 4
    assert rows_equal(Cache(tmp_path / "c"), cache)


def test_photos_that_another_process_put_into_the_other_split_meanwhile_are_seen(
    standins, tmp_path, monkeypatch
):
    look = engine._look

    def overtaken(*arguments):
        monkeypatch.setattr(engine, "_look", look)
        extract(standins.config(), dataset, tmp_path / "c", split="val", device="cpu")
        look(*arguments)

    dataset = folder_dataset(standins.images, standins.masks)
    monkeypatch.setattr(engine, "_look", overtaken)
    with pytest.raises(CacheError, match="another process has added rows"):
        extract(standins.config(), dataset, tmp_path / "c", device="cpu")
    assert {key.split for key in Cache(tmp_path / "c").keys} == {"val"}


def test_the_last_commit_belongs_to_the_time_of_writing(standins, tmp_path, monkeypatch):
    commit = CacheWriter.commit

    def slow(self):
        time.sleep(0.2)
        commit(self)

    monkeypatch.setattr(CacheWriter, "commit", slow)
    assert standins.extract(tmp_path / "c", limit=2).stages.busy_s[WRITE] >= 0.2


def test_models_are_warmed_up_at_the_size_of_the_batches_where_that_matters(
    standins, tmp_path, monkeypatch
):
    """On a GPU the first batch of a size chooses kernels, or builds an engine for minutes."""
    dataset = folder_dataset(standins.images, standins.masks)
    job = open_job(
        standins.config(), dataset, tmp_path / "c", split="train", device="cpu", limit=None,
        tally=Tally(strict=True),
    )  # fmt: skip
    seen = []
    monkeypatch.setattr(Yolo, "features", lambda self, images: seen.append(images.shape))
    monkeypatch.setattr(Teacher, "logits", lambda self, images: seen.append(images.shape))
    engine.warm_up(job, 3)
    assert seen == []
    engine.warm_up(dataclasses.replace(job, device="cuda"), 3)
    assert seen == [(3, SIZE, SIZE, 3)] * 2


def test_rows_that_are_compressed_at_once_are_written_in_order(
    standins, cache, tmp_path, monkeypatch
):
    """Two threads must meet in each pair of rows, and the first of it is done last."""
    barrier, encode = threading.Barrier(2, timeout=30), engine._encode
    number = {key.sample_id: n for n, key in enumerate(cache.keys)}

    def slow_first(writer, row, *rest):
        barrier.wait()
        if number[row.key.sample_id] % 2 == 0:
            time.sleep(0.05)
        return encode(writer, row, *rest)

    monkeypatch.setattr(engine, "_encode", slow_first)
    standins.extract(tmp_path / "c")
    assert Cache(tmp_path / "c").keys == cache.keys
    assert rows_equal(Cache(tmp_path / "c"), cache)


def test_a_second_run_adds_nothing(standins, tmp_path):
    standins.extract(tmp_path / "c", limit=3)
    before = sorted((p.as_posix(), p.stat().st_mtime_ns) for p in tmp_path.rglob("c.*"))
    report = standins.extract(tmp_path / "c", limit=3)
    assert report.rows_added == report.bytes_added == 0
    assert before == sorted((p.as_posix(), p.stat().st_mtime_ns) for p in tmp_path.rglob("c.*"))


def test_interrupt_keeps_every_finished_row(standins, cache, tmp_path, monkeypatch):
    calls = iter(range(100))
    logits = Teacher.logits

    def interrupted(self, images):
        if (tmp_path / "c").exists() and next(calls) == 5:  # after the first look
            raise KeyboardInterrupt
        return logits(self, images)

    monkeypatch.setattr(Teacher, "logits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        standins.extract(tmp_path / "c")
    assert len(Cache(tmp_path / "c")) == 5
    monkeypatch.undo()
    assert standins.extract(tmp_path / "c").rows_found == 5
    assert rows_equal(Cache(tmp_path / "c"), cache)


@pytest.mark.parametrize("batch_size", [3, 16])
def test_batch_size_does_not_change_the_rows(standins, cache, tmp_path, batch_size):
    dataset = folder_dataset(standins.images, standins.masks)
    engine.extract(standins.config(), dataset, tmp_path / "c", device="cpu", batch_size=batch_size)
    ours = Cache(tmp_path / "c")
    assert sorted(ours.keys) == sorted(cache.keys)
    (tap,) = cache.taps
    for index, key in enumerate(ours.keys):
        theirs = cache[cache.keys.index(key)]
        assert np.array_equal(ours[index].image, theirs.image)
        assert np.allclose(ours[index].features[tap], theirs.features[tap], atol=1e-2)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"precision": "float16"}, "precision"),
        ({"resize": "letterbox"}, "resize"),
        ({"size": 96}, "size"),
        ({"yolo_input": "bgr01"}, "yolo_input"),
    ],
)
def test_other_settings_are_refused_by_name_and_nothing_changes(standins, tmp_path, change, field):
    standins.extract(tmp_path / "c", limit=2)
    with pytest.raises(FingerprintError, match=f"{field} = "):
        standins.extract(tmp_path / "c", **change)
    assert len(Cache(tmp_path / "c")) == 2


def test_other_model_file_is_refused(standins, tmp_path):
    from kdcache.standins import save_detector

    standins.extract(tmp_path / "c", limit=2)
    save_detector(tmp_path / "other.onnx", channels=8, seed=1)
    with pytest.raises(FingerprintError, match="yolo_sha256"):
        standins.extract(tmp_path / "c", yolo_onnx_path=tmp_path / "other.onnx")


def test_photo_of_val_is_refused_in_train(standins, tmp_path):
    standins.extract(tmp_path / "c")
    with pytest.raises(ConfigError, match="as val, now it would be added as train"):
        standins.extract(tmp_path / "c", val_fraction=0.0)


@pytest.fixture
def spoilt(standins, tmp_path):
    """The scenes with one truncated photo, and one mask of another size."""
    shutil.copytree(standins.images, tmp_path / "images")
    shutil.copytree(standins.masks, tmp_path / "masks")
    photo = tmp_path / "images/scene_003.jpg"
    photo.write_bytes(photo.read_bytes()[:500])
    from PIL import Image

    Image.new("L", (50, 40)).save(tmp_path / "masks/scene_005.png")
    return folder_dataset(tmp_path / "images", tmp_path / "masks")


def test_bad_files_are_skipped_with_their_reason_and_the_same_after_a_resume(
    standins, spoilt, tmp_path
):
    for _ in range(2):
        report = engine.extract(standins.config(), spoilt, tmp_path / "c", device="cpu")
        assert report.rows_total == 8
        assert "cannot be decoded" in report.skipped["scene_003.jpg"]
        assert "40×50" in report.skipped["scene_005.jpg"]
        assert read_remarks(tmp_path / "c").together.skipped == report.skipped


def test_strict_stops_at_the_first_bad_file(standins, spoilt, tmp_path):
    with pytest.raises(DatasetError, match=r"scene_00\d.jpg.*--strict"):
        engine.extract(standins.config(), spoilt, tmp_path / "c", device="cpu", strict=True)


def test_row_whose_features_cannot_be_stored_is_skipped(standins, tmp_path, monkeypatch):
    encode, calls = engine.codecs.encode, iter(range(99))

    def refuse_one(feature, tap):
        if (tmp_path / "c").exists() and next(calls) == 2:  # after the first look
            raise SampleError("feature channel 7 is not finite")
        return encode(feature, tap)

    monkeypatch.setattr(engine.codecs, "encode", refuse_one)
    report = standins.extract(tmp_path / "c", limit=5)
    assert (report.rows_total, list(report.skipped.values())) == (
        4,
        ["feature channel 7 is not finite"],
    )


def test_rows_that_cannot_be_stored_stop_neither_the_first_look_nor_a_plan(
    standins, tmp_path, monkeypatch
):
    encode, calls = engine.codecs.encode, iter(range(999))

    def refuse_some(feature, tap):
        if next(calls) % 3 == 1:
            raise SampleError("feature channel 7 is not finite")
        return encode(feature, tap)

    monkeypatch.setattr(engine.codecs, "encode", refuse_some)
    report = standins.extract(tmp_path / "c", limit=6)
    assert report.rows_total + len(report.skipped) == 6
    assert report.skipped
    dataset = folder_dataset(standins.images, standins.masks)
    options = {"device": "cpu", "picture": tmp_path / "plan.png"}
    assert plan(standins.config(), dataset, tmp_path / "d", **options).bytes > 0


def test_dataset_without_one_good_image_leaves_nothing(standins, tmp_path):
    for name in ("images/a.jpg", "masks/a.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"")
    dataset = folder_dataset(tmp_path / "images", tmp_path / "masks")
    with pytest.raises(DatasetError, match=r"none of the 1 images can be used \(a.jpg: .*empty"):
        engine.extract(standins.config(), dataset, tmp_path / "c", device="cpu")
    assert not (tmp_path / "c").exists()


def test_out_that_is_something_else_is_left_alone(standins, tmp_path):
    (tmp_path / "notes.txt").write_text("keep me")
    for out in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(CacheError, match="exists and is not a kdcache cache; choose another"):
            standins.extract(out)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"yolo_target_layer": "nowhere"}, ModelError),
        ({"yolo_target_layer": "weight_0"}, ModelError),
        ({"teacher_checkpoint": None}, ConfigError),
    ],
)
def test_wrong_models_leave_nothing_behind(standins, tmp_path, change, error):
    with pytest.raises(error):
        standins.extract(tmp_path / "c", **change)
    assert list(tmp_path.iterdir()) == []


def test_out_of_memory_is_one_clear_error_and_keeps_committed_rows(standins, tmp_path, monkeypatch):
    standins.extract(tmp_path / "c", limit=3)

    def exhausted(self, images):
        with engine_memory():
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    from kdcache.errors import device_memory

    def engine_memory():
        return device_memory("running the teacher", "lower --batch-size or --size")

    calls = iter(range(99))
    logits = Teacher.logits
    monkeypatch.setattr(
        Teacher,
        "logits",
        lambda self, images: exhausted(self, images) if next(calls) else logits(self, images),
    )
    with pytest.raises(DeviceMemoryError, match="lower --batch-size"):
        standins.extract(tmp_path / "c")
    assert len(Cache(tmp_path / "c")) == 3
    assert not list((tmp_path / "c").rglob("*.kdtmp"))
