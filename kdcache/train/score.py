"""Scoring a student on rows of a cache, against the masks and against the teacher, image by image."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kdcache.cache.format import RowKey
from kdcache.cache.layout import plain
from kdcache.cache.reader import Cache
from kdcache.config import TrainConfig
from kdcache.train import losses
from kdcache.train.loader import Batch, chunked, read_batches
from kdcache.train.metrics import Compared, agreement, compare, mean, pooled_iou
from kdcache.train.projection import Projections, feature_losses
from kdcache.train.student import StudentOutput

_LOSSES = ("kl", "mse", "bce", "dice", "feature_loss")


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One image; a value that its row cannot give is None."""

    key: RowKey
    student: Compared | None
    teacher: Compared | None
    equal_pixels: int  # that student and teacher agree on
    seen_pixels: int  # of the photo; 0 without a teacher
    losses: Mapping[str, float] = field(default_factory=dict)

    @property
    def agreement(self) -> float | None:
        """Share of the photo's pixels on which student and teacher agree."""
        return self.equal_pixels / self.seen_pixels if self.seen_pixels else None


@torch.no_grad()
def score_images(
    network: Callable[[Tensor], StudentOutput],
    cache: Cache,
    rows: Sequence[int],
    config: TrainConfig,
    *,
    projections: Projections | None = None,
    temperature: float,
    device: str | torch.device,
) -> Iterator[Scored]:
    """Scores of each row, one after the other, so that no batch size has an influence.

    `network` takes ImageNet-normalised pixels and gives logits, and with `projections` the feature
    maps that those made, which are compared with the features of their taps.
    """
    taps = () if projections is None else projections.taps
    for batch in read_batches(cache, chunked(rows, config.batch_size), device, taps):
        yield from scored(batch, network(batch.image), projections, config, temperature)


def scored(
    batch: Batch,
    output: StudentOutput,
    projections: Projections | None,
    config: TrainConfig,
    temperature: float,
) -> list[Scored]:
    """The scores of each image of a batch, from what a student made of it."""
    images = range(len(batch.keys))
    return [_scored(batch, n, output, projections, config, temperature) for n in images]


def summary(images: Sequence[Scored]) -> dict[str, float | None]:
    """Means over images of all that was scored; what the rows cannot give is None."""
    of_student = [one.student for one in images if one.student is not None]
    of_teacher = [one.teacher for one in images if one.teacher is not None]
    seen = sum(one.seen_pixels for one in images)
    names = loss_names(images)
    values = {name: [one.losses[name] for one in images if name in one.losses] for name in names}
    return {
        "student_miou": mean([one.miou for one in of_student]),
        "teacher_miou": mean([one.miou for one in of_teacher]),
        "iou_person_pooled": pooled_iou(of_student),
        "boundary_f": mean([one.boundary_f for one in of_student]),
        "teacher_boundary_f": mean([one.boundary_f for one in of_teacher]),
        "false_positive_rate": mean([one.false_positive_rate for one in of_student]),
        "agreement": sum(one.equal_pixels for one in images) / seen if seen else None,
        **{name: math.fsum(v) / len(v) if v else None for name, v in values.items()},
    }


def loss_names(images: Sequence[Scored]) -> list[str]:
    """The losses that images may have, then those of single taps that some have."""
    return list(dict.fromkeys([*_LOSSES, *(name for one in images for name in one.losses)]))


def _scored(
    batch: Batch,
    n: int,
    output: StudentOutput,
    projections: Projections | None,
    config: TrainConfig,
    temperature: float,
) -> Scored:
    ours, mask = output.logits[n].float(), batch.mask[n]
    theirs = None if batch.logits is None else batch.logits[n]
    found = _losses(ours, theirs, mask, config, temperature)
    if projections is not None:
        one = slice(n, n + 1)
        row = dataclasses.replace(
            batch,
            image=batch.image[one],
            mask=batch.mask[one],
            logits=None if batch.logits is None else batch.logits[one],
            features={tap: batch.features[tap][one] for tap in projections.taps},
            keys=batch.keys[one],
            encoded=None,
        )
        of_taps = feature_losses([f[one] for f in output.features], projections, row, config)
        found["feature_loss"] = float(projections.total(of_taps))
        if len(of_taps) > 1:
            found |= {f"feature_loss_{plain(tap)}": float(loss) for tap, loss in of_taps.items()}
    equal, seen = (0, 0) if theirs is None else agreement(ours, theirs, mask)
    return Scored(
        key=batch.keys[n],
        student=compare(ours[0], mask[0]),
        teacher=None if theirs is None else compare(theirs[0], mask[0]),
        equal_pixels=equal,
        seen_pixels=seen,
        losses=found,
    )


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
