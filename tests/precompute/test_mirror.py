"""`verify --flip`: how far mirrored targets are from the models on mirrored photos, and who keeps it."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import SIZE

from kdcache.cache import mirrored
from kdcache.cache.copy import copy_cache
from kdcache.cache.format import AllRemarks, read_remarks, signed_document
from kdcache.cache.info import describe
from kdcache.cache.layout import LOGITS
from kdcache.cache.lock import locked
from kdcache.cache.reader import Cache
from kdcache.cache.thin import Thinning
from kdcache.cache.verify import verify
from kdcache.cli import main
from kdcache.config import ExtractConfig
from kdcache.errors import ModelError
from kdcache.precompute.mirror import measure_mirrored
from kdcache.precompute.recheck import recheck
from kdcache.precompute.refresh import refresh
from kdcache.precompute.teacher import Teacher
from kdcache.precompute.yolo import Yolo
from kdcache.report import info_text
from kdcache.standins import save_teacher

ROWS = 4


def command(*arguments: object):
    return CliRunner().invoke(main, ["verify", "--device", "cpu", *map(str, arguments)])


@pytest.fixture(scope="module")
def measured(cache, standins, tmp_path_factory):
    """A copy of the stand-in cache that keeps its measurements; never to be written to."""
    path = tmp_path_factory.mktemp("measured") / "c"
    shutil.copytree(cache.path, path)
    models = ("--yolo", standins.detector, "--teacher", standins.teacher, "--rows", ROWS)
    result = command(path, "--flip", *models)
    assert result.exit_code == 0, result.output
    assert (
        "the cache keeps these numbers for `kdcache train --set flip_targets=true`" in result.stdout
    )
    return Cache(path), result.stdout


def test_the_numbers_are_those_of_the_definition(measured, standins):
    cache, _ = measured
    (tap,) = cache.taps
    yolo = Yolo(standins.detector, taps=[tap], expects="rgb01", device="cpu", size_px=SIZE)
    teacher = Teacher(standins.teacher, encoder="", device="cpu", size_px=SIZE)
    found = read_remarks(cache.path).mirrored
    features, logits = [], []
    for index in np.random.default_rng(0).permutation(len(cache))[:ROWS]:
        row = cache[int(index)]
        pixels = np.flip(row.image, 1)[None].copy()
        features.append((np.flip(row.features[tap], 2), yolo.features(pixels)[tap][0]))
        logits.append((np.flip(row.teacher_logits, 1), teacher.logits(pixels)[0]))
    error = sum(((s.astype(float) - n) ** 2).sum() for s, n in features)
    spread = sum(((n.astype(float) - n.mean(dtype=float)) ** 2).sum() for _, n in features)
    cosines = [(s * n).sum(0) / np.sqrt((s**2).sum(0) * (n**2).sum(0)) for s, n in features]
    assert found[tap].relative_mse == pytest.approx(error / spread, rel=1e-4)
    assert found[tap].cosine == pytest.approx(np.mean(cosines), rel=1e-4)
    equal = np.mean([(s > 0) == (n > 0) for s, n in logits])
    assert found[LOGITS].equal_pixels == pytest.approx(equal)
    assert found[tap].rows == found[LOGITS].rows == ROWS
    assert (found[tap].equal_pixels, found[LOGITS].cosine) == (None, None)


def test_a_symmetric_model_is_told_from_one_that_is_not(measured):
    """The teacher is a mean over neighbours, the detector has random convolutions."""
    cache, shown = measured
    (tap,), found = cache.taps, read_remarks(cache.path).mirrored
    assert found[LOGITS].relative_mse < 1e-6
    assert found[LOGITS].equal_pixels > 0.999
    assert found[tap].relative_mse > 0.1
    assert 0 < found[tap].cosine < 0.99
    assert f"{tap}, mirrored: relative MSE {found[tap].relative_mse:.2g}, cosine 0." in shown
    assert "100.00% of mask pixels equal (against the model on 4 mirrored rows)" in shown


def test_the_cache_is_sound_and_info_shows_what_it_keeps(measured):
    cache, _ = measured
    assert verify(cache.path).ok
    info = describe(cache)
    assert info["mirrored"][LOGITS]["of_another_model"] is False
    assert "teacher_logits, mirrored: relative MSE" in info_text(info)
    assert "by another model" not in info_text(info)


def test_padding_does_not_count(standins, tmp_path):
    standins.extract(tmp_path / "c", resize="letterbox", limit=3)
    cache = Cache(tmp_path / "c")
    (tap,), stored = cache.taps, {row.image[:, ::-1].tobytes(): row for row in cache}

    def model(images):
        row = stored[images[0].tobytes()]
        padding = row.mask[None, None, :, ::-1] == 254
        assert 0.2 < padding.mean() < 0.3
        features = row.features[tap][None, :, :, ::-1].copy()
        features[np.broadcast_to(padding[:, :, ::8, ::8], features.shape)] = 99
        logits = row.teacher_logits[None, None, :, ::-1].astype(np.float32)
        return {tap: features, LOGITS: np.where(padding, 99, logits)}

    for one in measure_mirrored(cache, range(3), [model]).values():
        assert one.relative_mse == 0
        assert one.cosine in (None, pytest.approx(1))
        assert one.equal_pixels in (None, 1)


def test_a_model_that_gives_no_numbers_is_named(cache):
    nan = np.full((1, 1, SIZE, SIZE), np.nan, np.float32)
    with pytest.raises(
        ModelError, match="teacher_logits: .* not finite on the mirrored pixels of row 2"
    ):
        measure_mirrored(cache, [2], [lambda images: {LOGITS: nan}])


def test_a_part_measured_later_joins_the_others(measured, standins, tmp_path):
    cache, _ = measured
    shutil.copytree(cache.path, tmp_path / "c")
    before = read_remarks(tmp_path / "c").mirrored
    recheck(verify(tmp_path / "c"), teacher=standins.teacher, rows=2, device="cpu", flip=True)
    after = read_remarks(tmp_path / "c").mirrored
    assert after[cache.taps[0]] == before[cache.taps[0]]
    assert (before[LOGITS].rows, after[LOGITS].rows) == (ROWS, 2)


def test_one_that_cannot_be_written_is_measured_all_the_same(cache, standins, monkeypatch):
    def refuse(path, data):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(mirrored, "write_atomic", refuse)
    result = command(cache.path, "--flip", "--teacher", standins.teacher, "--rows", 1)
    assert result.exit_code == 0
    assert "% of mask pixels equal" in result.stdout
    assert "these numbers are not kept" in result.stdout
    assert "cannot be written: Permission denied" in result.stdout
    as_json = command(cache.path, "--flip", "--teacher", standins.teacher, "--rows", 1, "--json")
    report = json.loads(as_json.stdout)
    assert report["mirrored"][LOGITS]["rows"] == 1
    assert "Permission denied" in report["not_kept"]
    assert read_remarks(cache.path).mirrored == {}


def test_one_that_is_being_written_is_measured_all_the_same(cache, standins):
    held = locked(cache.path)
    try:
        result = command(cache.path, "--flip", "--teacher", standins.teacher, "--rows", 1)
    finally:
        held.close()
    assert result.exit_code == 0
    assert "is being written by another process" in result.stdout
    assert read_remarks(cache.path).mirrored == {}


def test_flip_needs_a_model_and_one_that_agrees(cache, standins, monkeypatch, caplog):
    result = command(cache.path, "--flip")
    assert result.exit_code == 2
    assert "give --yolo FILE, --teacher FILE or both" in result.output
    logits = Teacher.logits
    monkeypatch.setattr(Teacher, "logits", lambda self, images: logits(self, images) + 1)
    report = recheck(verify(cache.path), teacher=standins.teacher, rows=1, device="cpu", flip=True)
    assert (report.ok, report.mirrored) == (False, {})
    assert "mirrored rows were not looked at" in caplog.text


def test_copies_keep_what_was_measured_of_the_parts_they_have(measured, tmp_path):
    cache, _ = measured
    (tap,), all_of_it = cache.taps, read_remarks(cache.path).mirrored
    for name, thinning, parts in (
        ("whole", Thinning(), {tap, LOGITS}),
        ("train", Thinning(split="train"), {tap, LOGITS}),
        ("logits", Thinning(store="logits"), {LOGITS}),
        ("features", Thinning(store="features", precision="int4"), {tap}),
    ):
        copy_cache(cache.path, tmp_path / name, thinning)
        kept = read_remarks(tmp_path / name).mirrored
        assert kept == {part: all_of_it[part] for part in parts}
        assert not any(
            v["of_another_model"] for v in describe(Cache(tmp_path / name))["mirrored"].values()
        )


def test_an_extraction_that_goes_on_keeps_it_and_another_model_makes_it_void(standins, tmp_path):
    standins.extract(tmp_path / "c", limit=3)
    report = verify(tmp_path / "c")
    recheck(report, teacher=standins.teacher, rows=1, device="cpu", flip=True)
    before = read_remarks(tmp_path / "c").mirrored
    standins.extract(tmp_path / "c")
    assert read_remarks(tmp_path / "c").mirrored == before != {}
    save_teacher(tmp_path / "other.onnx", bias=-1.0)
    refresh(
        ExtractConfig(teacher_checkpoint=tmp_path / "other.onnx"),
        tmp_path / "c",
        "teacher",
        device="cpu",
    )
    info = describe(Cache(tmp_path / "c"))
    assert info["mirrored"][LOGITS]["of_another_model"] is True
    assert "made by another model since: run `kdcache verify --flip` again" in info_text(info)


def test_a_cache_of_before_has_no_measurements(cache, tmp_path):
    shutil.copytree(cache.path, tmp_path / "c")
    record = dataclasses.asdict(AllRemarks())
    del record["mirrored"]
    (tmp_path / "c/skipped/zarr.json").write_bytes(signed_document("kdcache_skipped", record))
    assert read_remarks(tmp_path / "c").mirrored == {}
    assert verify(tmp_path / "c").ok


def test_at_a_url_it_is_kept_too(cache, standins, bucket):
    copy_cache(cache.path, bucket / "c")
    result = command(bucket / "c", "--flip", "--teacher", standins.teacher, "--rows", 1)
    assert result.exit_code == 0, result.output
    assert "the cache keeps these numbers" in result.stdout
    assert read_remarks(bucket / "c").mirrored[LOGITS].rows == 1
    assert verify(bucket / "c").ok
