"""Schedules at one, two and fifty epochs."""

from __future__ import annotations

import pytest
import torch

from kdcache.config import TrainConfig
from kdcache.train import schedule


@pytest.mark.parametrize("epochs", [1, 2, 50])
def test_learning_rate_equals_torchs_cosine_annealing(epochs):
    config = TrainConfig(epochs=epochs)
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=config.learning_rate)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, config.min_lr)
    for epoch in range(epochs):
        expected = optimizer.param_groups[0]["lr"]
        assert schedule.learning_rate(config, epoch) == pytest.approx(expected, rel=1e-9)
        optimizer.step()
        annealing.step()


def test_learning_rate_below_the_floor_does_not_rise():
    config = TrainConfig(learning_rate=1e-7, min_lr=1e-6, epochs=3)
    assert {schedule.learning_rate(config, epoch) for epoch in range(3)} == {1e-7}


@pytest.mark.parametrize("kind", ["linear", "cosine", "exponential"])
@pytest.mark.parametrize("epochs", [2, 50])
def test_temperature_runs_from_first_to_final(kind, epochs):
    config = TrainConfig(
        epochs=epochs, temperature_schedule=kind, temperature=4.0, final_temperature=1.0
    )
    values = [schedule.temperature(config, epoch) for epoch in range(epochs)]
    assert values[0] == pytest.approx(4.0)
    assert values[-1] == pytest.approx(1.0)
    assert values == sorted(values, reverse=True)
    assert config.last_temperature == 1.0


@pytest.mark.parametrize(
    ("kind", "middle"), [("linear", 2.5), ("cosine", 2.5), ("exponential", 2.0)]
)
def test_temperature_in_the_middle(kind, middle):
    config = TrainConfig(
        epochs=3, temperature_schedule=kind, temperature=4.0, final_temperature=1.0
    )
    assert schedule.temperature(config, 1) == pytest.approx(middle)


def test_single_epoch_uses_the_final_temperature_and_none_stays_fixed():
    scheduled = TrainConfig(epochs=1, temperature_schedule="linear", final_temperature=1.5)
    assert schedule.temperature(scheduled, 0) == 1.5
    fixed = TrainConfig(epochs=5, temperature=3.0, final_temperature=1.0)
    assert [schedule.temperature(fixed, epoch) for epoch in range(5)] == [3.0] * 5
    assert fixed.last_temperature == 3.0


def test_warm_up_rises_linearly_to_the_schedule():
    config = TrainConfig(epochs=10, learning_rate=1.0, min_lr=0.0, warmup_steps=3)
    rates = [schedule.learning_rate(config, 0, step) for step in range(5)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0]
