"""Runs that share each batch end as they would alone, bit for bit."""

from __future__ import annotations

import json
import os
import signal

import pytest
from safetensors.torch import load_file

from kdcache.config import TrainConfig
from kdcache.errors import RunError
from kdcache.train import loop
from kdcache.train.loop import train
from kdcache.train.prepare import Start
from kdcache.train.run_folder import read_metrics
from kdcache.train.together import train_together

FAST = {"encoder_weights": "random", "epochs": 2, "batch_size": 3, "learning_rate": 3e-3}
CLOCK = {"images_per_s", "step_ms", "data_wait_ms", "epoch_s"}


def config(**changes):
    return TrainConfig(**(FAST | changes))


def measured(run):
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in read_metrics(run)]


def assert_same(run, other):
    assert measured(run) == measured(other)
    for name in ("student_best.safetensors", "student_last.safetensors"):
        ours, theirs = load_file(run / name), load_file(other / name)
        assert all(ours[key].equal(theirs[key]) for key in ours), name


MIXED = (
    {"feature_weight": 0.0},
    {"feature_weight": 1.0, "student_tap": "decoder", "feature_positions": 20},
    {"feature_weight": 0.0, "kl_weight": 0.0, "mse_weight": 0.0},
    {"feature_weight": 0.5, "temperature": 2.0, "weight_decay": 0.1},
)


@pytest.mark.parametrize(
    ("settings", "shared"),
    [(MIXED, {}), (MIXED[:2], {"mixed_precision": True, "gradient_accumulation": 2})],
    ids=["float32", "bfloat16, accumulated"],
)
def test_together_equals_apart(cache, tmp_path, settings, shared):
    starts = [
        Start(out=tmp_path / f"t{n}", config=config(**changes, **shared))
        for n, changes in enumerate(settings)
    ]
    found = train_together(cache.path, starts, device="cpu")
    for n, start in enumerate(starts):
        train(cache.path, tmp_path / f"a{n}", start.config, device="cpu")
        assert_same(tmp_path / f"t{n}", tmp_path / f"a{n}")
        assert found[start.out].metrics["val_student_miou"] > 0


def test_the_frozen_encoder_runs_once_a_batch(cache, tmp_path, monkeypatch):
    starts = [Start(out=tmp_path / str(n), config=config(feature_weight=0.0)) for n in range(3)]
    calls = []
    encoded = loop.encoded

    def counted(members, batch, *, half):
        shared = encoded(members, batch, half=half)
        calls.append(shared.encoded is not None)
        return shared

    monkeypatch.setattr(loop, "encoded", counted)
    train_together(cache.path, starts, device="cpu")
    assert calls
    assert all(calls)


@pytest.mark.parametrize("changes", [{"train_encoder": "last:1"}], ids=["trained encoder"])
def test_trained_encoders_share_data_alone(cache, tmp_path, changes):
    starts = [
        Start(out=tmp_path / f"t{n}", config=config(kl_weight=1.0 + n, **changes)) for n in range(2)
    ]
    train_together(cache.path, starts, device="cpu")
    for n, start in enumerate(starts):
        train(cache.path, tmp_path / f"a{n}", start.config, device="cpu")
        assert_same(tmp_path / f"t{n}", tmp_path / f"a{n}")


def test_one_that_fails_leaves_the_others_to_end_as_alone(cache, tmp_path):
    starts = [
        Start(out=tmp_path / "good", config=config(feature_weight=0.0)),
        Start(out=tmp_path / "bad", config=config(learning_rate=1e30, grad_clip=0.0)),
        Start(out=tmp_path / "fine", config=config(kl_weight=2.0, feature_weight=0.0)),
    ]
    found = train_together(cache.path, starts, device="cpu")
    assert isinstance(found[tmp_path / "bad"], RunError)
    assert "step" in str(found[tmp_path / "bad"])
    train(cache.path, tmp_path / "alone", starts[2].config, device="cpu")
    assert_same(tmp_path / "fine", tmp_path / "alone")
    assert found[tmp_path / "good"].epochs == 2


def test_stopped_together_and_resumed_apart_or_together(cache, tmp_path, monkeypatch):
    settings = [config(feature_weight=0.0, kl_weight=1.0 + n, epochs=3) for n in range(2)]
    step, calls = loop.take_step, iter(range(99))

    def stop_in_second_epoch(*arguments):
        if next(calls) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr(loop, "take_step", stop_in_second_epoch)
    starts = [Start(out=tmp_path / f"t{n}", config=c) for n, c in enumerate(settings)]
    with pytest.raises(KeyboardInterrupt):
        train_together(cache.path, starts, device="cpu")
    monkeypatch.undo()
    assert json.loads((tmp_path / "t0/run.json").read_text())
    # one goes on alone, to another step than the other; then what is left goes on together
    train(cache.path, tmp_path / "t0", settings[0], device="cpu", resume=True)
    again = [Start(out=s.out, config=s.config, resume=True) for s in starts]
    train_together(cache.path, again, device="cpu")
    for n, c in enumerate(settings):
        train(cache.path, tmp_path / f"a{n}", c, device="cpu")
        assert_same(tmp_path / f"t{n}", tmp_path / f"a{n}")


def test_runs_of_other_batches_are_refused(cache, tmp_path):
    starts = [Start(out=tmp_path / str(n), config=config(seed=n)) for n in range(2)]
    with pytest.raises(RunError, match="need the same.*seed"):
        train_together(cache.path, starts, device="cpu")
    assert list(tmp_path.iterdir()) == []
