"""Caches of one model alone: extracted, verified, drawn, trained from; what is missing is said."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from conftest import Standins
from training import train

from kdcache.cache.info import describe
from kdcache.cache.picture import save_rows
from kdcache.cache.reader import Cache
from kdcache.cli import main
from kdcache.errors import CacheError, ConfigError, FingerprintError, RunError
from kdcache.precompute.recheck import verify_with_models

SHORT = {"epochs": 1, "feature_weight": 0.0}


@pytest.fixture(scope="module")
def halves(standins: Standins, tmp_path_factory) -> dict[str, Cache]:
    folder = tmp_path_factory.mktemp("halves")
    standins.extract(folder / "logits", store="logits", yolo_onnx_path=None)
    standins.extract(folder / "features", store="features", teacher_checkpoint=None)
    return {name: Cache(folder / name) for name in ("logits", "features")}


def test_each_half_equals_that_of_the_whole(cache, halves):
    whole = {row.sample_id: row for row in cache}
    for row in halves["logits"]:
        assert (row.teacher_logits == whole[row.sample_id].teacher_logits).all()
        assert list(row.features) == []
    for row in halves["features"]:
        (tap,) = row.features
        assert (row.features[tap] == whole[row.sample_id].features[tap]).all()
        with pytest.raises(CacheError, match="made without a teacher: it has no logits"):
            _ = row.teacher_logits


def test_halves_verify_are_described_and_drawn(standins, halves, tmp_path):
    for name, half in halves.items():
        models = {"teacher": standins.teacher} if name == "logits" else {"yolo": standins.detector}
        assert verify_with_models(half.path, **models, rows=2, device="cpu").ok
        stored = describe(half)["bytes"]
        assert bool(stored["teacher_logits"]) == (name == "logits")
        assert bool(stored["features"]) == (name == "features")
        save_rows(tmp_path / f"{name}.png", half, 2)
    with pytest.raises(FingerprintError, match="made without such a model"):
        verify_with_models(halves["logits"].path, yolo=standins.detector, device="cpu")


def test_training_takes_what_there_is_and_names_what_is_not(halves, tmp_path):
    report = train(halves["logits"], tmp_path / "logits", **SHORT)
    assert report.metrics["val_agreement"] is not None
    with pytest.raises(RunError, match="holds no features; train with --feature-weight 0"):
        train(halves["logits"], tmp_path / "run", epochs=1)
    with pytest.raises(RunError, match="holds no teacher logits; train with --set kl_weight=0"):
        train(halves["features"], tmp_path / "run", **SHORT)
    without = {"epochs": 1, "kl_weight": 0.0, "mse_weight": 0.0}
    report = train(halves["features"], tmp_path / "features", **without)
    assert report.metrics["train_feature"] > 0
    assert "train_kl" not in report.metrics
    assert report.metrics["val_student_miou"] is not None
    assert report.metrics["val_teacher_miou"] is report.metrics["val_agreement"] is None


def test_a_whole_is_not_appended_to_a_half(standins, tmp_path):
    standins.extract(tmp_path / "c", store="logits", yolo_onnx_path=None, limit=2)
    with pytest.raises(FingerprintError, match="extracted without features, now .* with"):
        standins.extract(tmp_path / "c")


def test_the_model_that_is_needed_is_asked_for(standins, tmp_path):
    with pytest.raises(ConfigError, match="--yolo FILE.onnx"):
        standins.extract(tmp_path / "c", yolo_onnx_path=None)
    with pytest.raises(ConfigError, match="--teacher FILE"):
        standins.extract(tmp_path / "c", store="logits", teacher_checkpoint=None)


def test_flags(standins, tmp_path):
    inputs = ["--images", standins.images, "--masks", standins.masks, "--size", 64]
    inputs += ["--device", "cpu", "--limit", 2]

    def run(command, *more):
        return CliRunner().invoke(main, [command, *map(str, [*inputs, *more])])

    logits = ("--logits-only", "--teacher", standins.teacher, "--out", tmp_path / "c")
    assert run("plan", *logits, "--png", tmp_path / "p.png").exit_code == 0
    assert run("extract", *logits).exit_code == 0
    assert Cache(tmp_path / "c").taps == []
    features = ("--features-only", "--yolo", standins.detector, "--out", tmp_path / "d")
    assert run("plan", *features, "--png", tmp_path / "p.png").exit_code == 0
    assert run("extract", *features).exit_code == 0
    assert run("extract", *features, "--logits-only").exit_code == 2
