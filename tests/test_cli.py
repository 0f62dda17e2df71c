"""The command line: help, exit statuses, one clear message, JSON keys."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from kdcache.cli import main
from kdcache.config import ExtractConfig, TrainConfig
from kdcache.options import EXIT_FAILED, EXIT_SKIPPED
from kdcache.standins import TAP


def run(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def extract_arguments(standins, out):
    return (
        "extract",
        "--images",
        standins.images,
        "--masks",
        standins.masks,
        "--yolo",
        standins.detector,
        "--teacher",
        standins.teacher,
        "--size",
        64,
        "--device",
        "cpu",
        "--out",
        out,
    )


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "run"
    result = run(
        "train",
        cache.path,
        "--out",
        path,
        "--epochs",
        1,
        "--encoder-weights",
        "random",
        "--device",
        "cpu",
        "--set",
        "learning_rate=3e-3",
    )
    assert result.exit_code == 0, result.output
    return path


@pytest.mark.parametrize("command", [None, *main.commands])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_help_describes_its_options_and_ends_with_an_example(command, flag):
    result = run(*([command] if command else []), flag)
    assert result.exit_code == 0
    assert "Example:\n  kdcache " in result.output.replace("    kdcache", "  kdcache").replace(
        "  Example", "Example"
    )
    for parameter in main.commands[command].params if command else []:
        assert (
            isinstance(parameter, click.Argument) or parameter.name == "split" or parameter.help
        ), parameter


def test_examples_use_options_that_exist():
    for command in main.commands.values():
        known = {option for parameter in command.params for option in parameter.opts}
        for example in re.findall(r"kdcache (\w+)(.*?)(?=kdcache|$)", command.epilog, re.S):
            if example[0] == command.name:
                assert set(re.findall(r"--[\w-]+", example[1])) <= known


def test_extract_reports_and_resumes(standins, tmp_path):
    arguments = extract_arguments(standins, tmp_path / "c")
    first = run(*arguments, "--limit", 3, "--json")
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout)["rows_added"] == 3
    second = run(*arguments, "--limit", 4)
    assert "4 rows, 1 added" in second.stdout
    assert "3 rows were committed before" in second.stdout


def test_skipped_images_are_listed_with_exit_status_3(standins, tmp_path):
    shutil.copytree(standins.folder, tmp_path / "data")
    (tmp_path / "data/images/scene_001.jpg").write_bytes(b"broken")
    moved = type(standins)(tmp_path / "data")
    result = run(*extract_arguments(moved, tmp_path / "c"), "--limit", 3)
    assert result.exit_code == EXIT_SKIPPED
    assert "1 images skipped:\n  scene_001.jpg: the image cannot be decoded" in result.stdout
    info = run("info", tmp_path / "c", "--json")
    assert "scene_001.jpg" in json.loads(info.stdout)["skipped"]


def test_info_has_the_keys_others_rely_on(cache, tmp_path):
    info = json.loads(run("info", cache.path, "--json").stdout)
    assert {"rows", "samples", "bytes", "features_ratio_vs_float32"} <= info.keys()
    assert {"image", "mask", "teacher_logits", "features"} <= info["bytes"].keys()
    text = run("info", cache.path, "--png", tmp_path / "rows.png").stdout
    assert (tmp_path / "rows.png").exists()
    assert "10 rows" in text
    assert "smaller than float32" in text


def test_train_evaluate_and_resume(cache, trained):
    scores = run("evaluate", trained, cache.path, "--json", "--device", "cpu")
    documented = (
        "student_miou teacher_miou iou_person_pooled agreement kl mse bce dice feature_loss"
    )
    assert set(documented.split()) <= json.loads(scores.stdout).keys()
    assert "agreement with the teacher" in run("evaluate", trained, cache.path).stdout
    again = run("train", cache.path, "--out", trained, "--resume", "--device", "cpu")
    assert again.exit_code == 0
    assert "1 epochs" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "nowhere.zarr"), "not a kdcache cache"),
        (("train", "nowhere.zarr", "--out", "run"), "not a kdcache cache"),
        (("evaluate", "nowhere", "nowhere.zarr"), "not a kdcache cache"),
        (("export", "nowhere", "--out", "s.onnx"), "no such run folder or student file"),
        (("train", "c", "--out", "r", "--set", "epoch=1"), "unknown setting 'epoch'.*epochs"),
        (("train", "c", "--out", "r", "--config", "x"), "no such file"),
    ],
)
def test_failures_are_one_line_and_exit_status_1(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == EXIT_FAILED
    assert result.stdout == ""
    assert re.fullmatch(f"error: .*{message}.*\n", result.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--tap", "nowhere"), "no tensor 'nowhere'"),
        (("--size", 650), "multiple of 32"),
        (("--val-fraction", 1.5), "val_fraction"),
        (("--views", 2, "--augment", "heavier"), "named policies: light, heavy"),
        (("--tap", "relu_1", "--tap", "relu_1"), "stands there twice"),
        (("--yolo", "absent.onnx"), "no such model file"),
        (("--masks", "absent"), "no such folder"),
        (("--device", "cuda"), "sees no CUDA device"),
    ],
)
def test_wrong_extract_inputs_are_one_message_and_leave_nothing(standins, tmp_path, extra, message):
    if "cuda" in extra and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    result = run(*extract_arguments(standins, tmp_path / "c"), *extra)
    assert result.exit_code == EXIT_FAILED
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("extract", "--images", "a", "--out", "c"),
        ("extract", "--images", "a", "--masks", "b", "--coco", "c", "--out", "c"),
        ("train", "c"),
        ("train", "c", "--out", "r", "--epochs", "many"),
        ("nothing",),
    ],
)
def test_wrong_usage_is_exit_status_2(arguments):
    assert run(*arguments).exit_code == 2


def test_interrupt_tells_how_to_go_on(standins, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("kdcache.precompute.extract.extract", interrupted)
    result = run(*extract_arguments(standins, tmp_path / "c"))
    assert result.exit_code == 1
    assert "same command" in result.stderr


def test_read_only_folder_is_one_message(standins, monkeypatch, tmp_path):
    def read_only(*_):
        raise PermissionError(13, "Permission denied", "/data/c")

    monkeypatch.setattr("kdcache.precompute.extract.CacheWriter", read_only)
    result = run(*extract_arguments(standins, tmp_path / "c"))
    assert result.exit_code == 1
    assert result.stderr.endswith("\nerror: [Errno 13] Permission denied: '/data/c'\n")
    assert "Traceback" not in result.stderr


def test_bugs_keep_their_traceback(cache, monkeypatch):
    def buggy(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("kdcache.cache.info.describe", buggy)
    assert isinstance(run("info", cache.path).exception, ZeroDivisionError)


def test_commands_in_the_readme_exist_with_their_options():
    text = (Path(__file__).parents[1] / "README.md").read_text().replace("\\\n", " ")
    found = re.findall(r"^    (?:uv run )?kdcache (\w+)(.*)$", text, re.M)
    assert {"extract", "train", "evaluate", "export", "info"} <= {name for name, _ in found}
    for name, rest in found:
        known = {option for parameter in main.commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[\w-]+", rest)) <= known, name
    for setting in set(re.findall(r"--set (\w+)=", text)) - {"key"}:
        assert setting in TrainConfig.model_fields | ExtractConfig.model_fields


def test_print_config_is_a_file_that_config_reads_back(cache, tmp_path):
    name = "rgb_unet_yolo_feature_distillation_b0_from_b3"
    arguments = ("train", cache.path, "--out", tmp_path / "run", "--config", name, "--epochs", 7)
    result = run(*arguments, "--set", "student_tap=decoder", "--print-config")
    assert result.exit_code == 0
    (tmp_path / "mine.toml").write_text(result.stdout)
    again = run(*arguments[:4], "--config", tmp_path / "mine.toml", "--print-config")
    assert again.stdout == result.stdout
    assert TrainConfig(epochs=7, student_tap="decoder").to_toml() == result.stdout
    assert not (tmp_path / "run").exists()
    assert run("train", "--print-config").stdout == TrainConfig().to_toml()


def test_flags_that_exclude_each_other_are_wrong_usage(cache, standins, tmp_path):
    train = ("train", cache.path, "--out", tmp_path / "run")
    assert run(*train, "--extend").exit_code == 2
    assert run(*train, "--resume", "--extend").exit_code == 2
    assert run("train").exit_code == run("train", cache.path).exit_code == 2
    assert run(*train, "--resume", "--init-from", tmp_path).exit_code == 2
    both = ("extract", "--images", standins.images, "--out", tmp_path / "c", "--unlabelled")
    assert run(*both, "--masks", standins.masks).exit_code == 2
    alone = run(*both, "--augment", "heavy")
    assert (alone.exit_code, "--augment is of further views" in alone.stderr) == (2, True)


def test_views_and_taps_are_extracted_shown_and_trained_from(standins, tmp_path):
    arguments = extract_arguments(standins, tmp_path / "c")
    more = ("--views", 2, "--augment", "light", "--tap", TAP, "--tap", "relu_3", "--limit", 4)
    assert run(*arguments, *more).exit_code == 0
    shown = run("info", tmp_path / "c").stdout
    assert "rows by view: 0: 4, 1: " in shown
    assert "views but 0 were made with seed 0 by flip, window, colour, gamma" in shown
    assert "relu_3: 8×4×4 as int8" in shown
    options = ("--epochs", 1, "--encoder-weights", "random", "--set", "layer_weights=learned")
    trained = run("train", tmp_path / "c", "--out", tmp_path / "run", *options)
    assert trained.exit_code == 0, trained.output
    assert "train samples in 2 views" in trained.stderr
    assert "train_layer_weight_relu_3" in (tmp_path / "run/metrics.jsonl").read_text()


def test_unlabelled_images_are_extracted(standins, tmp_path):
    arguments = [a for a in extract_arguments(standins, tmp_path / "c") if a != standins.masks]
    arguments[arguments.index("--masks")] = "--unlabelled"
    result = run(*arguments, "--limit", 2)
    assert result.exit_code == 0, result.output
    assert "2 rows, 2 added" in result.stdout
