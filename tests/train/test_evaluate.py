"""What a finished run gives: scores, pictures, an ONNX file."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from kdcache.cache.reader import Cache
from kdcache.config import TrainConfig
from kdcache.errors import ModelError, RunError
from kdcache.train import export as export_module
from kdcache.train import loop
from kdcache.train.evaluate import evaluate
from kdcache.train.export import export
from kdcache.train.overlay import overlay, shown_rows
from kdcache.train.run_folder import read_best_student, read_config


@pytest.fixture(scope="module")
def run(cache, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    settings = TrainConfig(
        encoder_weights="random",
        epochs=2,
        batch_size=4,
        learning_rate=3e-3,
        temperature=4.0,
        final_temperature=2.0,
        temperature_schedule="cosine",
    )
    loop.train(cache.path, path, settings, device="cpu")
    return path


def test_evaluate_gives_the_documented_keys_and_the_epochs_own_scores(cache, run):
    scores = evaluate(run, cache, device="cpu")
    documented = {
        "student_miou",
        "teacher_miou",
        "iou_person_pooled",
        "agreement",
        "kl",
        "mse",
        "bce",
        "dice",
        "feature_loss",
    }
    assert documented <= scores.keys()
    assert scores["temperature"] == 2.0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = max(lines, key=lambda line: line["val_student_miou"])
    for key in ("student_miou", "agreement", "mse", "bce", "dice", "feature_loss"):
        assert scores[key] == pytest.approx(best[f"val_{key}"], rel=1e-5), key


def test_scores_do_not_depend_on_the_batch_size(cache, run, monkeypatch):
    whole = evaluate(run, cache, split="train", device="cpu")
    single = read_config(run).model_copy(update={"batch_size": 1})
    monkeypatch.setattr("kdcache.train.evaluate.read_config", lambda run: single)
    again = evaluate(run, cache, split="train", device="cpu")
    for key in ("student_miou", "agreement", "kl", "mse", "bce", "dice", "feature_loss"):
        assert again[key] == pytest.approx(whole[key], rel=1e-4), key


def test_evaluate_refuses_what_it_cannot_score(standins, cache, run, tmp_path):
    with pytest.raises(RunError, match="not a run folder"):
        evaluate(tmp_path, cache)
    standins.extract(tmp_path / "train_only", val_fraction=0.0, limit=2)
    with pytest.raises(RunError, match="no rows of split 'val'; it has train"):
        evaluate(run, Cache(tmp_path / "train_only"))
    standins.extract(tmp_path / "other", yolo_target_layer="relu_2", limit=8)
    with pytest.raises(RunError, match="yolo_target_layer = segmentation.*has relu_2"):
        evaluate(run, Cache(tmp_path / "other"))
    standins.extract(tmp_path / "larger", size=96, limit=2)
    with pytest.raises(RunError, match="size = 64.*has 96"):
        evaluate(run, Cache(tmp_path / "larger"))


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The run exported, once: torch's exporter takes 17 s."""
    folder = tmp_path_factory.mktemp("export")
    return export(run, folder / "student.onnx")


def test_evaluate_takes_another_precision_of_the_same_models(standins, run, tmp_path):
    standins.extract(tmp_path / "exact", precision="float32")
    assert evaluate(run, Cache(tmp_path / "exact"), device="cpu")["student_miou"] > 0


def test_exported_student_gives_pytorchs_logits_at_several_batches(run, exported):
    assert set(exported.max_difference) == {1, 3}
    assert max(exported.max_difference.values()) < 1e-3
    student, _ = read_best_student(run)
    session = onnxruntime.InferenceSession(exported.path)
    for batch in (1, 2, 7):
        pixels = torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        (logits,) = session.run(None, {"image": pixels.numpy()})
        with torch.no_grad():
            reference = student(pixels).logits.numpy()
        assert logits.shape == (batch, 1, 64, 64)
        assert np.allclose(logits, reference, atol=1e-3)


def test_exported_file_is_the_student_alone_and_says_how_to_feed_it(exported):
    model = onnx.load(exported.path)
    assert [i.name for i in model.graph.input] == ["image"]
    assert [o.name for o in model.graph.output] == ["logits"]
    assert list(exported.path.parent.iterdir()) == [exported.path]
    # the projection has 1×1 convolutions to 768 and 1024 channels; the student has neither
    widths = {i.dims[0] for i in model.graph.initializer if len(i.dims) == 4}
    assert not widths & {768, 1024}
    metadata = json.loads({p.key: p.value for p in model.metadata_props}["kdcache"])
    assert metadata["size_px"] == 64
    assert metadata["mean"] == [0.485, 0.456, 0.406]
    assert exported.size_bytes == exported.path.stat().st_size


def test_export_that_differs_from_pytorch_leaves_no_file(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "_write", lambda unet, size, path, _: path.write_bytes(b"x"))
    monkeypatch.setattr(export_module, "_difference", lambda *_: 0.5)
    with pytest.raises(ModelError, match="differs from PyTorch's by 0.5"):
        export(run, tmp_path / "student.onnx")
    assert list(tmp_path.iterdir()) == []


def test_export_to_a_folder_is_refused(run, tmp_path):
    with pytest.raises(ModelError, match="is a folder"):
        export(run, tmp_path)


def test_overlay_shows_each_row_in_five_columns(cache, run):
    student, _ = read_best_student(run)
    rows = shown_rows(cache.rows_of("val"))
    picture = overlay(student, cache, rows, "cpu")
    assert picture.shape == (18 + len(rows) * (240 + 18), 5 * 242, 3)


def test_the_same_few_rows_are_shown_whatever_their_number():
    assert shown_rows(range(100)) == [0, 33, 66, 99]
    assert shown_rows([7, 9]) == [7, 9]
