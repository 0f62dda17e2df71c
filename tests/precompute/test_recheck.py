"""`verify` against the models: a true cache agrees, a well-formed cache of wrong numbers does not."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import SIZE

from kdcache.cache.layout import LOGITS
from kdcache.cache.reader import Cache
from kdcache.cache.verify import verify
from kdcache.cache.writer import CacheWriter
from kdcache.cli import main
from kdcache.errors import FingerprintError, ModelError
from kdcache.precompute.recheck import recheck
from kdcache.precompute.teacher import Teacher
from kdcache.standins import save_detector


def rewritten(cache: Cache, path, part: str, change, sample: str):
    """A sound copy of a cache, with one array of one sample replaced before it was written."""
    with CacheWriter(path, cache.manifest) as writer:
        for index, key in enumerate(cache.keys):
            arrays = {s.path: cache.read(index, s.path).copy() for s in cache.manifest.arrays()}
            if key.sample_id == sample:
                arrays[part] = change(arrays[part])
            writer.append(writer.encoded(key, arrays))
    return verify(path)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "int5", "int4"])
def test_a_true_cache_agrees_within_its_bound(standins, tmp_path, precision):
    standins.extract(tmp_path / "c", precision=precision, limit=4)
    report = recheck(
        verify(tmp_path / "c"), yolo=standins.detector, teacher=standins.teacher, device="cpu"
    )
    assert report.ok
    assert [part.rows for part in report.models.values()] == [4, 4]
    (features, logits) = report.models.values()
    assert features.largest_of_allowed <= 1
    assert features.relative_mse < {"int5": 1e-2, "int4": 5e-2}.get(precision, 1e-4)
    assert logits.relative_mse < 1e-6
    if precision == "float32":
        assert features.largest_error == logits.largest_error == 0


@pytest.mark.parametrize(
    ("array", "change"),
    [
        ("affine", lambda a: np.roll(a, 1, axis=1)),  # channels mixed up
        ("affine", lambda a: a * np.float32(1.05)),
        ("codes_x1", lambda a: a.transpose(0, 2, 1).copy()),
        ("codes_x2", lambda a: np.where(np.arange(a.size).reshape(a.shape) == 77, 255 - a, a)),
        (LOGITS, lambda a: a + np.float16(0.5)),
        (LOGITS, lambda a: np.roll(a, 1, axis=0)),
    ],
)
def test_wrong_numbers_that_were_well_committed_are_found(cache, standins, tmp_path, array, change):
    part = array if array == LOGITS else f"{cache.manifest.taps[0].folder}/{array}"
    sample = cache.samples[3]
    report = rewritten(cache, tmp_path / "c", part, change, sample)
    assert report.ok
    checked = recheck(report, yolo=standins.detector, teacher=standins.teacher, device="cpu")
    assert not checked.ok
    (problem,) = checked.bad
    assert part.startswith(problem.path)
    assert problem.rows == [sample]
    assert "times as far as allowed" in problem.problem


def test_model_that_gives_no_numbers_now(cache, standins, monkeypatch):
    monkeypatch.setattr(
        Teacher, "logits", lambda self, images: np.full((1, SIZE, SIZE), np.nan, np.float32)
    )
    report = recheck(verify(cache.path), teacher=standins.teacher, rows=2, device="cpu")
    assert [p.problem.split(": ")[1] for p in report.bad] == [
        "the model now gives values that are not finite"
    ] * 2


def test_the_seed_chooses_the_rows(cache, standins):
    report = verify(cache.path)
    seen = [
        recheck(report, teacher=standins.teacher, rows=3, seed=seed, device="cpu").models[LOGITS]
        for seed in (0, 0, 1)
    ]
    assert seen[0] == seen[1] != seen[2]
    assert seen[0].rows == 3


def command(*arguments: object):
    return CliRunner().invoke(main, ["verify", "--device", "cpu", *map(str, arguments)])


def test_command_shows_and_prints_the_agreement(cache, standins):
    models = ("--yolo", standins.detector, "--teacher", standins.teacher, "--rows", 2)
    result = command(cache.path, *models)
    assert result.exit_code == 0, result.output
    assert "every byte is as committed, the models agree" in result.stdout
    report = json.loads(command(cache.path, *models, "--json").stdout)
    assert report["ok"]
    assert report["models"]["teacher_logits"]["rows"] == 2


def test_other_or_missing_model_is_refused_before_anything_is_read(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("kdcache.precompute.recheck.verify", None)
    save_detector(tmp_path / "other.onnx", channels=8, seed=1)
    result = command(cache.path, "--yolo", tmp_path / "other.onnx")
    assert result.exit_code == 1
    assert "is not the model that the cache was extracted with: its yolo_sha256" in result.stderr
    result = command(cache.path, "--teacher", tmp_path / "none.pth")
    assert "no such model file" in result.stderr
    monkeypatch.undo()
    with pytest.raises(FingerprintError, match="yolo_sha256"):
        recheck(verify(cache.path), yolo=tmp_path / "other.onnx")
    with pytest.raises(ModelError, match="no such model"):
        recheck(verify(cache.path), yolo=tmp_path / "none.onnx")


def test_empty_cache_agrees_with_nothing(cache, standins, tmp_path):
    with CacheWriter(tmp_path / "c", cache.manifest):
        pass
    result = command(tmp_path / "c", "--teacher", standins.teacher)
    assert result.exit_code == 0
    assert "the models were not run: the cache is empty" in result.stderr
    assert "models agree" not in result.stdout


def test_damaged_root_record_is_in_the_report(cache, standins, tmp_path):
    shutil.copytree(cache.path, tmp_path / "c")
    (tmp_path / "c/zarr.json").write_text("{}")
    result = command(tmp_path / "c", "--teacher", standins.teacher, "--json")
    assert (result.exit_code, json.loads(result.stdout)["ok"]) == (1, False)


def test_models_are_not_run_on_a_damaged_cache(cache, standins, tmp_path):
    report = rewritten(cache, tmp_path / "c", LOGITS, lambda a: a, "")
    assert report.ok
    shard = next((tmp_path / "c" / LOGITS).glob("c.*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    result = command(tmp_path / "c", "--teacher", standins.teacher)
    assert result.exit_code == 1
    assert "the models were not run: the cache is damaged" in result.stderr
    assert "against the models" not in result.stdout
