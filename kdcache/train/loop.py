"""Training from a cache, top to bottom: student and projection, five losses, resumable by epoch."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kdcache.cache.format import RowKey
from kdcache.cache.layout import TapSpec
from kdcache.cache.reader import Cache
from kdcache.config import TrainConfig
from kdcache.errors import RunError, device_memory
from kdcache.train import losses, schedule
from kdcache.train.evaluate import score
from kdcache.train.loader import Batch, batches
from kdcache.train.overlay import save_overlay
from kdcache.train.run_folder import State, check_cache, open_run, restore, save_epoch, start_run
from kdcache.train.student import TAP_STRIDE, Projection, Student, build_student, resolve_device

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What a training run ended with."""

    run: Path
    epochs: int
    best_epoch: int
    metrics: dict[str, Any]  # of the best epoch
    seconds: float


def train(
    cache_path: Path,
    out: Path,
    config: TrainConfig,
    *,
    device: str = "auto",
    resume: bool = False,
    progress: bool = False,
) -> TrainReport:
    """Train a student from the cache alone and leave a run folder at `out`.

    With `resume` a run that was stopped goes on after its last finished epoch as if it had never
    stopped, on the rows it started with. Raises KdcacheError; finished epochs stay.
    """
    started = time.monotonic()
    on = resolve_device(device)
    record = open_run(out, config, resume)
    cache = Cache(cache_path)
    if resume:
        check_cache(out, record, cache)
        cache = Cache(cache_path, shards=record["shards"])
    # Without a feature loss no feature byte is read and there is nothing to project.
    tap = cache.manifest.taps[0] if config.feature_weight > 0 else None
    val_rows = cache.rows_of("val")
    _check_splits(cache, val_rows)
    with device_memory("building the student", "lower projection_hidden_dim"):
        state = _build(config, cache, tap, on)
    if resume:
        restore(out, state)
    else:
        start_run(out, config, cache, tap)

    for epoch in range(len(state.history), config.epochs):
        epoch_started = time.monotonic()
        temperature = schedule.temperature(config, epoch)
        for group in state.optimizer.param_groups:
            group["lr"] = schedule.learning_rate(config, epoch)

        taps = [tap.name] if tap else []
        source = batches(cache, config.batch_size, on, taps=taps, seed=config.seed, epoch=epoch)
        title = f"epoch {epoch + 1}/{config.epochs}"
        bar = tqdm(
            desc=title,
            total=len(cache) - len(val_rows),
            unit="image",
            disable=None if progress else True,
        )
        metrics = {
            "epoch": epoch + 1,
            "lr": state.optimizer.param_groups[0]["lr"],
            "temperature": temperature,
            **_train_epoch(state, source, config, temperature, title, bar),
        }
        if val_rows:
            with device_memory("validating", "lower --batch-size"):
                scores = score(
                    state.student,
                    state.projection,
                    cache,
                    val_rows,
                    config,
                    tap=tap.name if tap else None,
                    temperature=temperature,
                    device=on,
                )
            metrics |= {f"val_{name}": value for name, value in scores.items()}
        metrics["epoch_s"] = time.monotonic() - epoch_started
        state.history.append(metrics)
        save_epoch(out, state, config, cache)
        log.info("%s: %s", title, _line(metrics))

    picture = out / "visualizations" / "last.jpg"
    save_overlay(picture, state.student, cache, val_rows or cache.rows_of("train"), on)
    return TrainReport(
        run=out,
        epochs=config.epochs,
        best_epoch=state.best_epoch,
        metrics=state.history[state.best_epoch - 1],
        seconds=time.monotonic() - started,
    )


def _check_splits(cache: Cache, val_rows: list[int]) -> None:
    if not cache.rows_of("train"):
        raise RunError(
            f"{cache.path} has no rows of split 'train'; extract some (--split train is the default)"
        )
    if not val_rows:
        log.warning(
            "%s has no rows of split 'val': nothing is validated and the last epoch counts as the "
            "best; extract with --val-fraction, or a second folder with --split val",
            cache.path,
        )


def _build(config: TrainConfig, cache: Cache, tap: TapSpec | None, device: str) -> State:
    """Student, projection and optimiser at their seeded start.

    The projection is drawn after the student, so the feature weight does not move its start.
    """
    torch.manual_seed(config.seed)
    student = build_student(config.student_encoder, config.encoder_weights).to(device)
    projection = None
    if tap is not None:
        projection = _build_projection(config, student, tap, cache.manifest.size_px).to(device)
        log.warning(
            "feature_weight = %g, but with a frozen encoder and the tap in it the feature loss "
            "trains only the projection, which is not part of the student",
            config.feature_weight,
        )
    optimizer = torch.optim.AdamW(
        [{"params": group} for group in _groups(student, projection)],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
    )
    # bf16 needs no loss scaling; GPUs without it get fp16, which does.
    half = config.mixed_precision and device != "cpu" and not torch.cuda.is_bf16_supported()
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=half)
    return State(student=student, projection=projection, optimizer=optimizer, scaler=scaler)


def _build_projection(
    config: TrainConfig, student: Student, tap: TapSpec, size_px: int
) -> Projection:
    channels, height, width = tap.shape
    grid = size_px // TAP_STRIDE
    if (height, width) != (grid, grid):
        raise RunError(
            f"tap {tap.name} is {channels}×{height}×{width} in this cache, the student's tap is "
            f"{student.tap_channels}×{grid}×{grid} (stride {TAP_STRIDE}); extract a tap of that "
            "grid, or train with --feature-weight 0"
        )
    return Projection(student.tap_channels, config.projection_hidden_dim, channels)


def _groups(student: Student, projection: nn.Module | None) -> list[list[nn.Parameter]]:
    """The trained parameters: the student's, then the projection's."""
    groups = [[p for p in student.parameters() if p.requires_grad]]
    return groups if projection is None else [*groups, list(projection.parameters())]


def _train_epoch(
    state: State,
    source: Iterator[Batch],
    config: TrainConfig,
    temperature: float,
    title: str,
    bar: tqdm[Any],
) -> dict[str, float]:
    """One pass over the batches; the mean of every loss and the pace."""
    state.student.train()
    if state.projection is not None:
        state.projection.train()
    sums: dict[str, float] = {}
    images, steps, data_wait_s, started = 0, 0, 0.0, time.monotonic()
    while True:
        waited = time.monotonic()
        batch = next(source, None)
        data_wait_s += time.monotonic() - waited
        if batch is None:
            break
        steps += 1
        with device_memory("training", "lower --batch-size, or use --mixed-precision"):
            values = _step(state, batch, config, temperature, f"{title}, step {steps}")
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value * len(batch.keys)
        images += len(batch.keys)
        bar.set_postfix(loss=f"{values['total']:.4f}", refresh=False)
        bar.update(len(batch.keys))
    bar.close()
    seconds = time.monotonic() - started
    return {
        **{f"train_{name}": value / images for name, value in sums.items()},
        "images_per_s": images / seconds,
        "step_ms": 1000 * seconds / steps,
        "data_wait_ms": 1000 * data_wait_s / steps,
    }


def _step(
    state: State, batch: Batch, config: TrainConfig, temperature: float, where: str
) -> dict[str, float]:
    """One optimiser step; returns the value of every loss and of their weighted total."""
    device = batch.image.device
    with _autocast(config, device):
        output = state.student(batch.image)
        projected = state.projection(output.feature) if state.projection is not None else None
    losses_now = _losses(output.logits, projected, batch, config, temperature)
    total = sum(
        (getattr(config, f"{name}_weight") * loss for name, loss in losses_now.items()),
        start=torch.zeros((), device=device),
    )
    values = {name: float(loss.detach()) for name, loss in {**losses_now, "total": total}.items()}
    _refuse_non_finite(values, batch.keys, where)
    state.optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(total).backward()
    state.scaler.unscale_(state.optimizer)
    if config.grad_clip:
        # Apart: a joint norm would let the feature weight leak into the student's step.
        for group in _groups(state.student, state.projection):
            nn.utils.clip_grad_norm_(group, config.grad_clip)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    return values


def _losses(
    logits: Tensor,
    projected: Tensor | None,
    batch: Batch,
    config: TrainConfig,
    temperature: float,
) -> dict[str, Tensor]:
    """Each loss by the name of its weight: kl, mse, bce, dice and, with a projection, feature."""
    values = {
        "kl": losses.kl(
            logits, batch.logits, batch.mask, temperature=temperature, scale=config.kl_scale
        ),
        "mse": losses.mse(logits, batch.logits, batch.mask),
        "bce": losses.bce(logits, batch.mask),
        "dice": losses.dice(logits, batch.mask),
    }
    if projected is not None:
        (target,) = batch.features.values()
        values["feature"] = losses.FEATURE_LOSSES[config.feature_loss](projected, target)
    return values


def _autocast(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if not config.mixed_precision:
        return contextlib.nullcontext()
    bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16 if bf16 else torch.float16)


def _refuse_non_finite(values: dict[str, float], keys: list[RowKey], where: str) -> None:
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        samples = ", ".join(key.sample_id for key in keys)
        raise RunError(
            f"{where}: loss {bad[0]} is {values[bad[0]]} on samples {samples}; the run stops at its "
            "last finished epoch: lower learning_rate, or train without --mixed-precision"
        )


def _line(metrics: dict[str, Any]) -> str:
    parts = [f"loss {metrics['train_total']:.4f}"]
    if metrics.get("val_student_miou") is not None:
        parts.append(f"val mIoU {metrics['val_student_miou']:.4f}")
    if metrics.get("val_agreement") is not None:
        parts.append(f"agreement {metrics['val_agreement']:.4f}")
    parts.append(f"{metrics['images_per_s']:.2f} images/s")
    return ", ".join(parts)
