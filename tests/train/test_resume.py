"""A run that was stopped, killed, extended or taken up again goes on without a trace."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import save_file
from training import FAST, assert_resumes_bit_for_bit, config, metrics, state_digest, train

from kdcache.cache.reader import Cache
from kdcache.config import TrainConfig
from kdcache.errors import RunError
from kdcache.standins import TAP
from kdcache.train import loop, run_folder
from kdcache.train.run_folder import claimed, read_checkpoint, read_config
from kdcache.train.student import build_student

FAST_ENCODER = TrainConfig().student_encoder


@pytest.fixture(scope="module")
def run(cache, tmp_path_factory):
    """A finished run of three epochs, never to be written to."""
    path = tmp_path_factory.mktemp("runs") / "run"
    train(cache, path)
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixed_precision": True, "feature_weight": 0.0, "epochs": 2},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
    ],
    ids=["float32", "bfloat16", "compiled"],
)
def test_resume_continues_as_if_never_stopped(cache, tmp_path, changes):
    """Stopped in the middle of the second epoch, then resumed, equals one go: bit for bit."""
    steps_an_epoch = -(-len(cache.rows_of("train")) // FAST["batch_size"])
    assert_resumes_bit_for_bit(cache, tmp_path, steps_an_epoch + 1, **changes)


def test_resume_ignores_rows_added_later(standins, tmp_path, monkeypatch):
    standins.extract(tmp_path / "c", limit=6)
    growing = Cache(tmp_path / "c")
    train(growing, tmp_path / "alone", epochs=2)
    step = loop.take_step

    def stop_at_once(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(loop, "take_step", stop_at_once)
    with pytest.raises(KeyboardInterrupt):
        train(growing, tmp_path / "run", epochs=2)
    monkeypatch.undo()
    standins.extract(tmp_path / "c")
    assert len(Cache(tmp_path / "c")) == 10
    train(growing, tmp_path / "run", epochs=2, resume=True)
    assert state_digest(tmp_path / "run") == state_digest(tmp_path / "alone")


def test_a_finished_run_resumes_to_itself(cache, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").unlink()  # a crash after the last checkpoint, before it
    report = train(cache, tmp_path / "run", resume=True)
    assert report.epochs == 3
    assert metrics(tmp_path / "run") == metrics(run)
    assert state_digest(tmp_path / "run") == state_digest(run)


def test_init_from_begins_with_the_best_student_of_another_run(cache, run, tmp_path, caplog):
    def begin(name, **changes):
        settings = config(epochs=1, **(changes | {"learning_rate": 1e-30}))
        loop.train(cache.path, tmp_path / name, settings, device="cpu", init_from=run)
        return read_checkpoint(tmp_path / name / "checkpoints/last.pt")

    best = read_checkpoint(run / "checkpoints/best.pt")
    state = begin("same")
    weights = [k for k in best["student"] if "running" not in k and "num_batches" not in k]
    assert all(torch.equal(best["student"][k], state["student"][k]) for k in weights)
    assert torch.equal(
        best["projections"]["each.0.0.weight"], state["projections"]["each.0.0.weight"]
    )
    other_target = begin("standard", standardise_features=True)["projections"]
    assert torch.equal(best["projections"]["each.0.0.weight"], other_target["each.0.0.weight"])
    assert not torch.equal(best["projections"][std := "each.0.target_std"], other_target[std])
    begin("other", projection_hidden_dim=16)
    assert f"its projection to {TAP} has another shape" in caplog.text
    with pytest.raises(RunError, match="has the encoder timm-efficientnet-b0"):
        begin("resnet", student_encoder="resnet18")


def test_extend_goes_on_to_more_epochs_and_keeps_that(cache, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    with pytest.raises(RunError, match="give more of them and --extend"):
        train(cache, tmp_path / "run", resume=True, epochs=4)
    longer = config(epochs=4)
    loop.train(cache.path, tmp_path / "run", longer, device="cpu", resume=True, extend=True)
    assert [line["epoch"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert metrics(tmp_path / "run")[:3] == metrics(run)
    assert read_config(tmp_path / "run").epochs == 4
    with pytest.raises(RunError, match="epochs = 4, now 2"):
        loop.train(cache.path, tmp_path / "run", config(epochs=2), resume=True, extend=True)


def test_resume_refuses_other_rows_in_the_place_of_its_own(standins, tmp_path):
    standins.extract(tmp_path / "c", limit=4)
    train(Cache(tmp_path / "c"), tmp_path / "run", epochs=1, feature_weight=0.0)
    shutil.rmtree(tmp_path / "c")
    standins.extract(tmp_path / "c", limit=4, val_fraction=0.9)
    with pytest.raises(RunError, match=r"rows of shard 0 are not those that .* was started with"):
        train(Cache(tmp_path / "c"), tmp_path / "run", epochs=1, feature_weight=0.0, resume=True)


def _train_until_killed(path, out, changes):
    """Saves after every step, and is killed after the fourth."""
    loop._SAVE_EVERY_S = 0.0
    step, calls = loop.take_step, iter(range(99))

    def die_at_the_fifth(*arguments):
        if next(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*arguments)

    loop.take_step = die_at_the_fifth
    loop.train(path, out, config(**changes), device="cpu")


@pytest.mark.parametrize(
    "changes",
    [{"train_encoder": "all"}, {"mixed_precision": True, "student_tap": "decoder"}],
    ids=["float32", "bfloat16"],
)
def test_killed_run_resumes_bit_for_bit(cache, tmp_path, changes):
    """With stochastic depth in the trained encoder: its seeds come from the position."""
    changes |= {"batch_size": 2, "epochs": 2}
    train(cache, tmp_path / "whole", **changes)
    process = multiprocessing.get_context("spawn").Process(
        target=_train_until_killed, args=(cache.path, tmp_path / "run", changes)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    saved = read_checkpoint(tmp_path / "run/checkpoints/last.pt")
    steps_an_epoch = -(-len(cache.rows_of("train")) // 2)
    assert len(saved["history"]) * steps_an_epoch + saved["steps"] == 4
    train(cache, tmp_path / "run", resume=True, **changes)
    assert state_digest(tmp_path / "run") == state_digest(tmp_path / "whole")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_a_second_signal_interrupts_at_once_and_the_run_resumes(cache, run, tmp_path, monkeypatch):
    step, calls = loop.take_step, iter(range(99))

    def stop_twice(*arguments):
        if next(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(loop, "take_step", stop_twice)
    with pytest.raises(KeyboardInterrupt):
        train(cache, tmp_path / "run")
    assert next(calls) == 2
    monkeypatch.undo()
    train(cache, tmp_path / "run", resume=True)
    assert state_digest(tmp_path / "run") == state_digest(run)


def test_existing_run_is_not_overwritten_and_a_resume_keeps_its_settings(
    standins, cache, run, tmp_path
):
    standins.extract(tmp_path / "other", yolo_target_layer="relu_1")
    other = Cache(tmp_path / "other")
    with pytest.raises(RunError, match="--resume"):
        train(cache, run)
    with pytest.raises(RunError, match="started with kl_weight = 1.0, now 2.0"):
        train(cache, run, resume=True, kl_weight=2.0)
    with pytest.raises(RunError, match="started with epochs = 3, now 9"):
        train(cache, run, resume=True, epochs=9)
    with pytest.raises(RunError, match="started from a cache with yolo_target_layer"):
        train(other, run, resume=True)
    standins.extract(tmp_path / "exact", precision="float32")
    with pytest.raises(RunError, match="precision = int8.*has float32"):
        train(Cache(tmp_path / "exact"), run, resume=True)
    with pytest.raises(RunError, match="no run to resume"):
        train(cache, tmp_path / "absent", resume=True)


def test_a_stop_before_the_run_began_and_a_foreign_folder_are_told_apart(cache, tmp_path):
    (tmp_path / "begun/checkpoints").mkdir(parents=True)
    (tmp_path / "begun/config.toml.kdtmp").touch()
    train(cache, tmp_path / "begun", epochs=1, feature_weight=0.0)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").touch()
    with pytest.raises(RunError, match="not a run folder; choose another"):
        train(cache, tmp_path / "photos")


def test_two_trainings_in_one_folder_are_one_too_many(cache, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    with (
        claimed(tmp_path / "run"),
        pytest.raises(RunError, match="another process is training there"),
    ):
        train(cache, tmp_path / "run", resume=True)
    with claimed(tmp_path / "new"):
        with pytest.raises(RunError, match="another process is training there"):
            train(cache, tmp_path / "new")
        assert not list((tmp_path / "new").iterdir())
    assert not (tmp_path / "new").exists()


def test_resume_needs_the_weights_it_began_with_no_more(cache, tmp_path):
    weights = tmp_path / "w.safetensors"
    torch.manual_seed(7)
    save_file(build_student(FAST_ENCODER, "random").unet.encoder.state_dict(), weights)
    train(cache, tmp_path / "run", epochs=1, feature_weight=0.0, encoder_weights=str(weights))
    weights.unlink()
    shutil.copytree(tmp_path / "run", tmp_path / "longer")
    asked = config(epochs=2, feature_weight=0.0, encoder_weights="imagenet")
    loop.train(cache.path, tmp_path / "longer", asked, device="cpu", resume=True, extend=True)
    assert len(metrics(tmp_path / "longer")) == 2
    loop.train(cache.path, tmp_path / "next", asked, device="cpu", init_from=tmp_path / "run")


def test_stopped_in_an_epoch_of_two_processes_resumes_with_two_only(cache, run, tmp_path, caplog):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run/checkpoints/last.pt"
    content = read_checkpoint(path)
    torch.save(content | {"processes": 2, "steps": 1}, path)
    with pytest.raises(RunError, match="shared, this is 1: .* --nproc-per-node=2"):
        train(cache, tmp_path / "run", resume=True)
    torch.save(content | {"processes": 2}, path)
    train(cache, tmp_path / "run", resume=True)
    assert "was trained by 2 processes, goes on with 1" in caplog.text


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("checkpoints/last.pt", flip, "is damaged"),
        ("checkpoints/last.pt", lambda path: path.write_bytes(b""), "is damaged"),
        ("checkpoints/last.pt", lambda path: path.unlink(), "no such checkpoint"),
        ("checkpoints/last.pt", lambda path: torch.save({"a": 1}, path), "no checkpoint of this"),
        ("checkpoints/last.pt", lambda path: torch.save([1], path), "no checkpoint of this run"),
        ("run.json", lambda path: path.write_text("[]"), "its run.json has no cache"),
        ("run.json", lambda path: path.write_text("{}"), "its run.json has no cache"),
        ("run.json", lambda path: path.write_text("{"), "cannot be read"),
    ],
)
def test_damaged_runs_are_one_clear_error(cache, run, tmp_path, name, damage, message):
    shutil.copytree(run, tmp_path / "run")
    damage(tmp_path / "run" / name)
    with pytest.raises(RunError, match=message):
        train(cache, tmp_path / "run", resume=True)


def test_full_disk_is_an_os_error_and_keeps_the_checkpoint(cache, run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    before = (tmp_path / "run/checkpoints/last.pt").read_bytes()

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "write_atomic", full)
    with pytest.raises(OSError, match="No space left"):
        train(cache, tmp_path / "run", resume=True)
    assert (tmp_path / "run/checkpoints/last.pt").read_bytes() == before
