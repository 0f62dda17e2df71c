"""What a finished run gives: scores of one student and of several, of each image, pictures."""

from __future__ import annotations

import csv
import json
import statistics

import pytest
from click.testing import CliRunner
from PIL import Image

from kdcache.cache.reader import Cache
from kdcache.cli import main
from kdcache.deploy import trained
from kdcache.deploy.evaluate import evaluate, save_images_csv, worst_images
from kdcache.deploy.report import evaluate_text
from kdcache.deploy.trained import open_student
from kdcache.errors import RunError
from kdcache.train.overlay import overlay, shown_rows
from kdcache.train.run_folder import read_best_student, read_config


def test_evaluate_gives_the_documented_keys_and_the_epochs_own_scores(cache, run):
    scores = evaluate(run, cache, device="cpu").facts()
    documented = {
        "student_miou",
        "teacher_miou",
        "iou_person_pooled",
        "boundary_f",
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
    for key in ("student_miou", "boundary_f", "agreement", "mse", "bce", "dice", "feature_loss"):
        assert scores[key] == pytest.approx(best[f"val_{key}"], rel=1e-5), key


def test_scores_do_not_depend_on_the_batch_size(cache, run, monkeypatch):
    whole = evaluate(run, cache, split="train", device="cpu").scores
    single = read_config(run).model_copy(update={"batch_size": 1})
    monkeypatch.setattr(trained, "read_config", lambda run: single)
    again = evaluate(run, cache, split="train", device="cpu").scores
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


def test_evaluate_takes_another_precision_of_the_same_models(standins, run, tmp_path):
    standins.extract(tmp_path / "exact", precision="float32")
    assert evaluate(run, Cache(tmp_path / "exact"), device="cpu").scores["student_miou"] > 0


def test_overlay_shows_each_row_in_five_columns(cache, run):
    student, _ = read_best_student(run)
    rows = shown_rows(cache.rows_of("val"))
    picture = overlay(student, cache, rows, "cpu")
    assert picture.shape == (18 + len(rows) * (240 + 18), 5 * 242, 3)


def test_the_same_few_rows_are_shown_whatever_their_number():
    assert shown_rows(range(100)) == [0, 33, 66, 99]
    assert shown_rows([7, 9]) == [7, 9]


def invoked(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_students_own_file_and_its_export_score_as_its_run(cache, run, exported, deployable):
    of_run = evaluate(run, cache, device="cpu").scores
    alone = evaluate(run / "student_best.safetensors", cache, device="cpu")
    assert alone.temperature == 2.0
    for name, value in of_run.items():
        if name == "feature_loss":
            assert value is not None
            assert alone.scores[name] is None
        else:
            assert alone.scores[name] == value, name
    graph = evaluate(exported.path, cache, device="cpu").scores
    for name in ("student_miou", "boundary_f", "agreement", "kl", "mse", "bce", "dice"):
        assert graph[name] == pytest.approx(of_run[name], rel=1e-4), name
    eight_bits = evaluate(deployable.path, cache, device="cpu").scores
    assert eight_bits["student_miou"] == pytest.approx(of_run["student_miou"], abs=0.05)


def test_several_students_are_one_table_and_a_list_in_json(cache, run, exported):
    text = invoked("evaluate", run, exported.path, cache.path)
    assert text.exit_code == 0, text.output
    lines = text.stdout.splitlines()
    assert [line.split()[0] for line in lines[3:5]] == [str(run), str(exported.path)]
    assert lines[5].startswith("design document")
    assert "0.65-0.70" in lines[5]
    listed = json.loads(invoked("evaluate", run, exported.path, cache.path, "--json").stdout)
    assert [one["student"] for one in listed] == [str(run), str(exported.path)]
    single = json.loads(invoked("evaluate", run, cache.path, "--json").stdout)
    assert single == listed[0]


def test_the_design_documents_expectations_stand_beside_the_measured_values(cache, run):
    facts = evaluate(run, cache, device="cpu").facts()
    lines = evaluate_text([facts]).splitlines()
    (agreement,) = (line for line in lines if line.startswith("agreement"))
    assert f"{facts['agreement']:.4f}" in agreement
    assert agreement.endswith(">= 0.85")


def test_csv_has_every_image_of_every_student(cache, run, exported, tmp_path):
    evaluations = [evaluate(path, cache, device="cpu") for path in (run, exported.path)]
    save_images_csv(tmp_path / "new" / "images.csv", evaluations)
    with (tmp_path / "new" / "images.csv").open() as file:
        lines = list(csv.DictReader(file))
    val = [cache.keys[row].sample_id for row in cache.rows_of("val")]
    assert [line["sample_id"] for line in lines] == 2 * val
    of_run = [float(line["miou"]) for line in lines if line["student"] == str(run)]
    assert statistics.fmean(of_run) == pytest.approx(evaluations[0].scores["student_miou"])
    assert lines[0]["feature_loss"]
    assert not lines[-1]["feature_loss"]


def test_worst_images_are_drawn_from_the_lowest_miou_on(cache, run, exported, tmp_path):
    result = invoked(
        "evaluate", run, exported.path, cache.path, "--png", tmp_path / "w.png", "--worst", 2
    )
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "w.png") as picture:
        # photo, mask, teacher and both students
        assert picture.size == (5 * 242, 18 + 2 * (240 + 18))
    students = [open_student(run, "cpu")]
    evaluations = [evaluate(students[0], cache)]
    ranked = sorted(evaluations[0].images, key=lambda one: one.student.miou)
    one = worst_images(evaluations, students, cache, 1)
    reordered = Cache(cache.path)
    again = worst_images(evaluations, students, reordered, 2)
    assert (again[: len(one)] == one).all()
    assert ranked[0].student.miou <= ranked[1].student.miou


def test_a_file_without_its_run_is_refused_on_other_pixels(standins, run, tmp_path):
    standins.extract(tmp_path / "larger", size=96, limit=2)
    with pytest.raises(RunError, match="size = 64.*has 96"):
        evaluate(run / "student_best.safetensors", Cache(tmp_path / "larger"), "train", "cpu")
    standins.extract(tmp_path / "boxed", resize="letterbox", limit=2)
    with pytest.raises(RunError, match="resize = stretch.*has letterbox"):
        evaluate(run / "student_best.safetensors", Cache(tmp_path / "boxed"), "train", "cpu")
