"""Training: learns, leaves the encoder alone, shows what it does, needs the cache only."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import config, metrics, state_digest, train

from kdcache.cache.reader import Cache
from kdcache.errors import DeviceMemoryError, ModelError, ProviderError, RunError
from kdcache.precompute.dataset import unlabelled_dataset
from kdcache.precompute.extract import extract
from kdcache.train import loop, losses, prepare
from kdcache.train.loader import Tally
from kdcache.train.run_folder import read_checkpoint
from kdcache.train.student import build_student


@pytest.fixture(scope="module")
def run(cache, tmp_path_factory):
    """A finished run of three epochs, never to be written to."""
    path = tmp_path_factory.mktemp("runs") / "run"
    train(cache, path)
    return path


def test_losses_fall_and_the_folder_is_complete(run):
    epochs = metrics(run)
    assert [line["epoch"] for line in epochs] == [1, 2, 3]
    assert epochs[-1]["train_total"] < epochs[0]["train_total"]
    expected = {
        "train_kl",
        "train_mse",
        "train_bce",
        "train_dice",
        "train_feature",
        "val_agreement",
    }
    assert (
        expected | {"val_student_miou", "val_teacher_miou", "lr", "temperature"} <= epochs[0].keys()
    )
    for name in (
        "config.toml",
        "run.json",
        "student_best.safetensors",
        "student_last.safetensors",
        "checkpoints/best.pt",
        "checkpoints/last.pt",
        "visualizations/epoch_003.jpg",
    ):
        assert (run / name).stat().st_size > 0, name


def test_total_is_the_weighted_sum(run):
    for line in metrics(run):
        settings = config()
        names = ("kl", "mse", "bce", "dice", "feature")
        total = sum(getattr(settings, f"{n}_weight") * line[f"train_{n}"] for n in names)
        assert line["train_total"] == pytest.approx(total, rel=1e-5)


def test_same_seed_gives_the_same_bytes_and_another_does_not(cache, run, tmp_path):
    train(cache, tmp_path / "again")
    assert state_digest(tmp_path / "again") == state_digest(run)
    assert metrics(tmp_path / "again") == metrics(run)
    train(cache, tmp_path / "other", seed=1)
    assert state_digest(tmp_path / "other") != state_digest(run)


def test_encoder_is_byte_equal_after_training_and_the_rest_is_not(run):
    torch.manual_seed(0)
    start = build_student(config().student_encoder, "random").unet.state_dict()
    end = load_file(run / "student_last.safetensors")
    assert start.keys() == end.keys()
    encoder = [key for key in start if key.startswith("encoder.")]
    assert any("running_mean" in key for key in encoder)
    assert all(start[key].numpy().tobytes() == end[key].numpy().tobytes() for key in encoder)
    moved = [k for k in start if k not in encoder and not torch.equal(start[k], end[k])]
    assert any(key.startswith("decoder.") for key in moved)
    assert any(key.startswith("segmentation_head.") for key in moved)


def test_with_the_frozen_encoder_tap_the_feature_weight_cannot_change_the_student(
    cache, run, tmp_path, caplog
):
    """The design document's setting; training says so."""
    train(cache, tmp_path / "heavy", feature_weight=5.0)
    assert "trains only the projection" in caplog.text
    train(cache, tmp_path / "none", feature_weight=0.0)
    ours = [load_file(tmp_path / name / "student_last.safetensors") for name in ("heavy", "none")]
    reference = load_file(run / "student_last.safetensors")
    assert all(torch.equal(other[key], reference[key]) for other in ours for key in reference)


@pytest.mark.parametrize(
    ("weights", "also"),
    [
        ({"feature_weight": 0.0}, {"teacher_logits"}),
        ({"feature_weight": 0.0, "kl_weight": 0.0, "mse_weight": 0.0}, set()),
    ],
)
def test_nothing_is_read_that_no_loss_is_of(cache, tmp_path, monkeypatch, weights, also):
    """But by validation, which compares with the teacher."""
    read, original = set(), Cache.read_stored

    def noted(self, row, array, out):
        if self.keys[row].split == "train":
            read.add(array)
        return original(self, row, array, out)

    monkeypatch.setattr(Cache, "read_stored", noted)
    train(cache, tmp_path / "run", epochs=1, **weights)
    assert read == {"image", "mask", *also}
    (found,) = metrics(tmp_path / "run")
    assert "train_feature" not in found
    assert ("train_kl" in found) == bool(also)
    assert found["val_agreement"] is not None


@pytest.mark.parametrize(
    ("tally", "words"),
    [
        (Tally(size_bytes=10**9, seconds=20.0), "50.00 MB/s; put the cache on a faster"),
        (Tally(size_bytes=10**9, seconds=1.0), "1.00 GB/s, so it is decompressing"),
    ],
)
def test_the_words_on_waiting_name_what_was_waited_for(tally, words):
    text = loop._waited_words(tally, data_wait_s=2.0, seconds=12.0)
    assert text.startswith("17% of the time went into waiting for data: the steps need 100.00 MB/s")
    assert words in text


def test_slow_storage_is_said(cache, tmp_path, monkeypatch, caplog):
    original = Cache.read_stored

    def slow(self, row, array, out):
        if self.keys[row].split == "val":
            return original(self, row, array, out)
        # said to be far longer than it is: on a busy machine a step takes as long as this read
        started = time.perf_counter() - 10
        time.sleep(0.5)
        return original(self, row, array, out)._replace(started=started)

    monkeypatch.setattr(Cache, "read_stored", slow)
    monkeypatch.setattr(loop, "_JUDGED_STEPS", 2)
    train(cache, tmp_path / "run", epochs=2, batch_size=1, feature_weight=0.0)
    assert caplog.text.count("of the time went into waiting for data") == 1  # not in each epoch
    assert "put the cache on a faster disk" in caplog.text


@pytest.mark.parametrize(
    "changes", [{"student_tap": "decoder"}, {"train_encoder": "last:3"}], ids=["decoder", "encoder"]
)
def test_elsewhere_the_feature_weight_changes_the_student(cache, tmp_path, caplog, changes):
    for weight in (0.0, 5.0):
        train(cache, tmp_path / f"{weight}", feature_weight=weight, epochs=1, **changes)
    assert "trains only the projection" not in caplog.text
    without, with_features = (
        load_file(tmp_path / f"{weight}/student_last.safetensors") for weight in (0.0, 5.0)
    )
    assert any(not torch.equal(without[key], with_features[key]) for key in without)
    frozen = [key for key in without if key.startswith("encoder.blocks.0")]
    torch.manual_seed(0)
    start = build_student(config().student_encoder, "random").unet.state_dict()
    assert all(torch.equal(with_features[key], start[key]) for key in frozen)


def test_the_reach_of_each_loss_is_shown_at_the_start(cache, tmp_path, caplog):
    with caplog.at_level("INFO", logger="kdcache"):
        train(cache, tmp_path / "run", epochs=1)
    (table,) = (r.message for r in caplog.records if r.message.startswith("parameters reached by"))
    assert [line.split()[0] for line in table.splitlines()[1:]] == [
        "kl",
        "mse",
        "bce",
        "dice",
        "feature",
    ]


def test_unlabelled_rows_train_from_the_teacher_and_features_alone(standins, tmp_path):
    """In one cache with labelled ones: batches hold both kinds."""
    standins.extract(tmp_path / "c", limit=4, val_fraction=0.0)
    settings = standins.config(val_fraction=0.0)
    dataset = unlabelled_dataset(standins.images)
    extract(settings, dataset, tmp_path / "c", device="cpu", limit=8)
    cache = Cache(tmp_path / "c")
    masks = [np.unique(row.mask).tolist() for row in cache]
    assert masks[4:] == [[255]] * 4
    train(cache, tmp_path / "run", epochs=2, batch_size=2)
    for line in metrics(tmp_path / "run"):
        assert line["labelled_fraction"] == 0.5
        assert 0 < line["train_dice"] < 1
    extract(settings, dataset, tmp_path / "alone", device="cpu", limit=4)
    train(Cache(tmp_path / "alone"), tmp_path / "run2", epochs=1)
    (line,) = metrics(tmp_path / "run2")
    assert (line["labelled_fraction"], line["train_bce"], line["train_dice"]) == (0.0, None, None)
    assert line["train_kl"] > 0


def test_deterministic_mode_gives_the_same_run_and_is_left_again(cache, run, tmp_path):
    train(cache, tmp_path / "run", deterministic=True)
    assert state_digest(tmp_path / "run") == state_digest(run)
    assert not torch.are_deterministic_algorithms_enabled()


def test_accumulated_batches_see_every_row_once(cache, tmp_path):
    train(cache, tmp_path / "run", epochs=1, batch_size=1, gradient_accumulation=3)
    state = read_checkpoint(tmp_path / "run/checkpoints/last.pt")
    steps = {int(value["step"]) for value in state["optimizer"]["state"].values()}
    assert steps == {-(-len(cache.rows_of("train")) // 3)}


def test_torchrun_trains_as_one_process_that_accumulates(cache, tmp_path, free_port):
    """The command as a user gives it; what the optimiser trains is equal bit for bit."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += [f"--master-port={free_port}", "-m", "kdcache", "train", str(cache.path)]
    command += ["--out", str(tmp_path / "two"), "--epochs", "2", "--batch-size", "2"]
    command += ["--encoder-weights", "random", "--device", "cpu", "--set", "learning_rate=3e-3"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("best is epoch") == 1
    assert done.stderr.count("trains only the projection") == 1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun's processes: sums over threads depend on their number
    train(cache, tmp_path / "one", epochs=2, batch_size=2, gradient_accumulation=2)
    torch.set_num_threads(threads)
    two, one = (read_checkpoint(tmp_path / name / "checkpoints/last.pt") for name in ("two", "one"))
    for network in ("student", "projections"):
        trained = [k for k in one[network] if "running_" not in k and "num_batches" not in k]
        assert all(torch.equal(one[network][key], two[network][key]) for key in trained)
    for ours, theirs in zip(one["history"], two["history"], strict=True):
        assert ours["train_total"] == pytest.approx(theirs["train_total"], rel=1e-6)


def test_curves_and_pictures_of_every_epoch(run):
    events = EventAccumulator(str(run / "logs"), {"images": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    assert {"train/train_kl", "val/val_student_miou", "pace/lr"} <= set(tags["scalars"])
    kl = [(event.step, event.value) for event in events.Scalars("train/train_kl")]
    assert kl == [(line["epoch"], pytest.approx(line["train_kl"])) for line in metrics(run)]
    assert [event.step for event in events.Images("rows")] == [1, 2, 3]
    assert len(list((run / "visualizations").glob("epoch_*.jpg"))) == 3


def test_temperature_and_learning_rate_follow_their_schedules(cache, tmp_path):
    train(
        cache, tmp_path / "run", temperature_schedule="linear", temperature=5.0, feature_weight=0.0
    )
    epochs = metrics(tmp_path / "run")
    assert [line["temperature"] for line in epochs] == [5.0, 3.0, 1.0]
    assert epochs[0]["lr"] == 3e-3 > epochs[1]["lr"] > epochs[2]["lr"]


def test_without_val_rows_training_says_so_and_best_is_last(standins, tmp_path, caplog):
    standins.extract(tmp_path / "c", val_fraction=0.0, limit=4)
    report = train(Cache(tmp_path / "c"), tmp_path / "run", epochs=2)
    assert "no rows of split 'val'" in caplog.text
    assert report.best_epoch == 2
    best, last = (
        load_file(tmp_path / f"run/student_{kind}.safetensors") for kind in ("best", "last")
    )
    assert all(torch.equal(best[key], last[key]) for key in last)


def test_best_is_the_epoch_of_the_highest_miou(cache, run):
    scores = [line["val_student_miou"] for line in metrics(run)]
    best = read_checkpoint(run / "checkpoints/best.pt")
    assert len(best["history"]) == 1 + scores.index(max(scores))


def test_non_finite_loss_stops_with_loss_step_and_samples(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "dice", lambda student, mask, per: student.mean() * float("nan"))
    with pytest.raises(RunError, match=r"epoch 1/3, step 1: loss dice is nan on samples scene_\d+"):
        train(cache, tmp_path / "run")


def test_out_of_memory_names_a_remedy(cache, tmp_path, monkeypatch):
    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop, "take_step", exhausted)
    with pytest.raises(DeviceMemoryError, match="lower --batch-size"):
        train(cache, tmp_path / "run")


def test_tap_of_another_grid_is_learned_where_the_student_has_it(standins, tmp_path):
    standins.extract(tmp_path / "c", yolo_target_layer="relu_1", limit=6)
    train(Cache(tmp_path / "c"), tmp_path / "run", epochs=1)
    (tap,) = json.loads((tmp_path / "run/run.json").read_text())["taps"]
    assert tap == {"name": "relu_1", "student_tap": "encoder", "stride": 4}


@pytest.mark.parametrize("device", ["foo", "meta"])
def test_unknown_device_is_refused(cache, tmp_path, device):
    with pytest.raises(ProviderError, match="expected auto, cpu, cuda"):
        loop.train(cache.path, tmp_path / "run", config(), device=device)


@pytest.mark.parametrize("encoder", ["nosuch", "tu-nosuch", "tu-vit_base_patch16_224"])
def test_encoder_that_smp_cannot_build_is_refused(cache, tmp_path, encoder):
    with pytest.raises(ModelError, match=f"student_encoder = '{encoder}'"):
        train(cache, tmp_path / "run", student_encoder=encoder)
    assert not (tmp_path / "run").exists()


def test_absent_cuda_is_an_error_not_a_slow_run(cache, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ProviderError, match="sees no CUDA device"):
        loop.train(cache.path, tmp_path / "run", config(), device="cuda")


def test_training_needs_neither_onnxruntime_nor_the_models_nor_a_network(standins, tmp_path):
    """The models, photos and masks are gone, and opening a connection fails."""
    home = tmp_path / "gpu_box"
    shutil.copytree(standins.folder, home / "data")
    moved = type(standins)(home / "data")
    moved.extract(tmp_path / "c", limit=6)
    shutil.rmtree(home)
    code = """
import socket, sys
from pathlib import Path

def refuse(*arguments, **options):
    raise AssertionError("training opened a connection")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from kdcache.config import TrainConfig
from kdcache.train.loop import train

settings = TrainConfig(encoder_weights="random", epochs=1, batch_size=3)
train(Path(sys.argv[1]), Path(sys.argv[2]), settings, device="cpu")
loaded = {"onnxruntime", "onnx", "pycocotools", "kdcache.precompute"} & set(sys.modules)
assert not loaded, loaded
"""
    arguments = [sys.executable, "-c", code, str(tmp_path / "c"), str(tmp_path / "run")]
    subprocess.run(arguments, check=True)
    assert (tmp_path / "run/student_best.safetensors").exists()


def test_cache_without_features_names_the_flag(cache, tmp_path, monkeypatch):
    bare = Cache(cache.path)
    monkeypatch.setattr(prepare, "Cache", lambda path, shards: bare)
    bare.manifest = dataclasses.replace(bare.manifest, taps=())
    with pytest.raises(RunError, match="holds no features; train with --feature-weight 0"):
        train(bare, tmp_path / "run")


def test_run_inside_the_cache_is_refused(standins, tmp_path):
    standins.extract(tmp_path / "c", limit=3)
    with pytest.raises(RunError, match="is inside the cache"):
        train(Cache(tmp_path / "c"), tmp_path / "c/run", epochs=1)
    assert not (tmp_path / "c/run").exists()


def test_reach_is_shown_on_a_batch_that_has_a_label(standins, tmp_path, caplog):
    """Whatever batch comes first, BCE and Dice train what they train."""
    standins.extract(tmp_path / "c", limit=1, val_fraction=0.0)
    unlabelled = unlabelled_dataset(standins.images)
    extract(standins.config(val_fraction=0.0), unlabelled, tmp_path / "c", device="cpu", limit=6)
    for seed in range(4):
        caplog.clear()
        caplog.set_level(logging.INFO, "kdcache")
        train(Cache(tmp_path / "c"), tmp_path / f"{seed}", epochs=1, batch_size=1, seed=seed,
              feature_weight=0.0)  # fmt: skip
        table = next(r.message for r in caplog.records if "parameters reached by" in r.message)
        (bce,) = (line for line in table.splitlines() if line.startswith("bce"))
        assert "2 of 2" in bce
