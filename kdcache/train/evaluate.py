"""Scoring a student on a split of a cache, against the masks and against the teacher."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcache.cache.reader import Cache
from kdcache.config import TrainConfig
from kdcache.errors import RunError, device_memory
from kdcache.train import losses
from kdcache.train.loader import chunked, read_batches
from kdcache.train.metrics import Segmentation, agreement
from kdcache.train.run_folder import (
    check_cache,
    read_best_projection,
    read_best_student,
    read_config,
    read_record,
)
from kdcache.train.student import Projection, Student, resolve_device

# What moves the cached numbers a little without changing what they mean.
_HARMLESS_CHANGES = ("precision", "execution_provider")


@torch.no_grad()
def score(
    student: Student,
    projection: Projection | None,
    cache: Cache,
    rows: Sequence[int],
    config: TrainConfig,
    *,
    tap: str | None,
    temperature: float,
    device: str | torch.device,
) -> dict[str, float | None]:
    """Metrics and losses of a student over rows: means over images, so the batch size is irrelevant.

    `tap` is what the projection aims at. A value that the rows cannot give (no person, no label,
    no teacher, no projection) is None.
    """
    student.eval()
    if projection is not None:
        projection.eval()
    taps = [tap] if tap is not None else []
    of_student, of_teacher = Segmentation(), Segmentation()
    values: dict[str, list[float]] = defaultdict(list)
    equal = pixels = 0
    for batch in read_batches(cache, chunked(rows, config.batch_size), device, taps):
        output = student(batch.image)
        logits = output.logits.float()
        projected = None if projection is None else projection(output.feature)
        for n in range(len(batch.keys)):
            ours, mask = logits[n], batch.mask[n]
            theirs = None if batch.logits is None else batch.logits[n]
            of_student.add(ours[0], mask[0])
            if theirs is not None:
                of_teacher.add(theirs[0], mask[0])
                same, seen = agreement(ours, theirs, mask)
                equal, pixels = equal + same, pixels + seen
            for name, value in _losses(ours, theirs, mask, config, temperature).items():
                values[name].append(value)
            if projection is not None and projected is not None and tap is not None:
                feature_loss = losses.FEATURE_LOSSES[config.feature_loss]
                target = projection.standardised(batch.features[tap][n : n + 1])
                loss = feature_loss(projected[n : n + 1], target, batch.mask[n : n + 1])
                values["feature_loss"].append(float(loss))
    means = {name: math.fsum(values[name]) / len(values[name]) for name in values}
    return {
        "student_miou": _number(of_student.miou),
        "teacher_miou": _number(of_teacher.miou),
        "iou_person_pooled": _number(of_student.iou_person_pooled),
        "false_positive_rate": _number(of_student.false_positive_rate),
        "agreement": equal / pixels if pixels else None,
        **{name: means.get(name) for name in ("kl", "mse", "bce", "dice", "feature_loss")},
    }


def evaluate(run: Path, cache: Cache, split: str = "val", device: str = "auto") -> dict[str, Any]:
    """Score a run's best student on a split. The KL loss uses the run's final temperature.

    Raises RunError when the run has no student or the cache no rows of the split.
    """
    config, on = read_config(run), resolve_device(device)
    record = read_record(run)
    check_cache(run, record, cache.path, _HARMLESS_CHANGES)
    student, _ = read_best_student(run, with_tap=True)
    rows = cache.rows_of(split)
    if not rows:
        splits = ", ".join(sorted({key.split for key in cache.keys})) or "none"
        raise RunError(f"{cache.path} has no rows of split {split!r}; it has {splits}: use --split")
    projection = read_best_projection(run, student)
    with device_memory("evaluating", "use --device cpu"):
        scores = score(
            student.to(on),
            None if projection is None else projection.to(on),
            cache,
            rows,
            config,
            tap=record["tap"],
            temperature=config.last_temperature,
            device=on,
        )
    return {"split": split, "rows": len(rows), "temperature": config.last_temperature, **scores}


def _losses(
    student: Tensor, teacher: Tensor | None, mask: Tensor, config: TrainConfig, temperature: float
) -> dict[str, float]:
    """The output losses of one image, (1, H, W) each, as far as there are teacher and labels."""
    values = {}
    if teacher is not None:
        values = {
            "kl": losses.kl(student, teacher, mask, temperature=temperature, scale=config.kl_scale),
            "mse": losses.mse(student, teacher, mask),
        }
    if losses.labelled(mask).any():
        values |= {"bce": losses.bce(student, mask), "dice": losses.dice(student, mask)}
    return {name: float(value) for name, value in values.items()}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
