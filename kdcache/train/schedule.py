"""Learning rate and temperature as pure functions of the position, so a resume has no state to restore."""

from __future__ import annotations

import math

from kdcache.config import TrainConfig


def learning_rate(config: TrainConfig, epoch: int, step: int = 0) -> float:
    """Cosine from `learning_rate` towards `min_lr`, as torch's CosineAnnealingLR(T_max=epochs).

    `step` counts from the start of the run; the first `warmup_steps` rise linearly to the cosine.
    """
    fall = (1 + math.cos(math.pi * epoch / config.epochs)) / 2
    # A floor above the start would turn annealing into warming; keep the start instead.
    floor = min(config.min_lr, config.learning_rate)
    rise = min(1.0, (step + 1) / (config.warmup_steps + 1))
    return rise * (floor + (config.learning_rate - floor) * fall)


def temperature(config: TrainConfig, epoch: int) -> float:
    """T of an epoch; r = epoch/(epochs − 1) runs from 0 to 1, and is 1 for a single epoch.

    linear T₀ + (T₁ − T₀)r; cosine T₁ + (T₀ − T₁)(1 + cos πr)/2; exponential T₀(T₁/T₀)^r.
    """
    first, last = config.temperature, config.final_temperature
    progress = epoch / (config.epochs - 1) if config.epochs > 1 else 1.0
    match config.temperature_schedule:
        case "linear":
            return first + (last - first) * progress
        case "cosine":
            return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2
        case "exponential":
            return first * math.pow(last / first, progress)
        case _:
            return first
