"""The design document's troubleshooting entries, each said when its sign shows, and once."""

from __future__ import annotations

from kdcache.config import TrainConfig
from kdcache.train.advice import advice

CONFIG = TrainConfig(epochs=50)


def epochs(*totals, kl=0.5, feature=0.5):
    return [
        {"epoch": n + 1, "train_total": total, "train_kl": kl, "train_feature": feature}
        for n, total in enumerate(totals)
    ]


def test_a_healthy_run_is_left_alone():
    history = epochs(5.0, 4.0, 3.0, 2.5, 2.2, 2.0, 1.9)
    assert all(advice(history[: n + 1], CONFIG) == [] for n in range(len(history)))


def test_kl_too_large():
    (text,) = advice(epochs(20.0, kl=30.0), CONFIG)
    assert "KL is 30" in text
    assert "kl_scale" in text
    assert advice(epochs(20.0, 19.0, kl=30.0), CONFIG) == []  # said already


def test_feature_loss_stuck_at_0():
    (text,) = advice(epochs(2.0, feature=1e-9), CONFIG)
    assert "--yolo-input" in text
    without = [{k: v for k, v in e.items() if k != "train_feature"} for e in epochs(2.0)]
    assert advice(without, CONFIG) == []


def test_slow_convergence():
    (text,) = advice(epochs(2.0, 2.0, 2.0, 2.0, 2.0, 1.995), CONFIG)
    assert "learning_rate" in text
    assert advice(epochs(2.0, 1.9, 1.8, 1.7, 1.6, 1.5), CONFIG) == []
    late = [{**e, "epoch": e["epoch"] + 40} for e in epochs(2.0, 2.0, 2.0, 2.0, 2.0, 2.0)]
    assert advice(late, CONFIG) == []  # a schedule that ends is no trouble


def test_validation_without_a_label_is_said():
    history = [epoch | {"val_student_miou": None} for epoch in epochs(2.0, 1.0)]
    (text,) = advice(history[:1], CONFIG)
    assert "no validation row has a labelled person" in text
    assert advice(history, CONFIG) == []


def test_steps_that_float16_skipped_are_said():
    (text,) = advice([epochs(2.0)[0] | {"skipped_steps": 40.0}], CONFIG)
    assert "float16 overflowed in 40 steps" in text
    assert advice([epochs(2.0)[0] | {"skipped_steps": 3.0}], CONFIG) == []
