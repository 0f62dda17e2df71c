"""Scoring trained students on a split of a cache, and where they are worst."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.cache.reader import Cache
from kdcache.deploy.trained import TrainedStudent, check_cache_of, open_student
from kdcache.drawing import U8, compared, lit, masked, sheet
from kdcache.durable import write_atomic
from kdcache.errors import RunError, device_memory
from kdcache.imaging import IGNORE, PADDING, PERSON
from kdcache.progress import Progress
from kdcache.train.loader import read_batches
from kdcache.train.score import Scored, loss_names, score_images, summary

_COLUMNS = (
    "student",
    "split",
    "sample_id",
    "view",
    "miou",
    "iou_person",
    "boundary_f",
    "false_positive_rate",
    "agreement",
    "teacher_miou",
)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A student's scores on a split, and those of every image."""

    student: Path
    split: str
    temperature: float  # of the KL loss: the run's last one
    scores: Mapping[str, float | None]
    images: Sequence[Scored]

    def facts(self) -> dict[str, Any]:
        """What `kdcache evaluate --json` prints."""
        return {
            "student": str(self.student),
            "split": self.split,
            "rows": len(self.images),
            "temperature": self.temperature,
            **self.scores,
        }


def evaluate(
    student: Path | TrainedStudent,
    cache: Cache,
    split: str = "val",
    device: str = "auto",
    *,
    progress: bool = False,
) -> Evaluation:
    """Score a student on a split: a run's best one, or one in a file of its own.

    On view 0 of each sample, the photos as they are. The KL loss uses the run's final temperature.
    Raises KdcacheError when there is no student, when it was made for other pixels than the cache
    holds, or the cache has no rows of the split.
    """
    one = (
        student
        if isinstance(student, TrainedStudent)
        else open_student(student, device, features=True)
    )
    check_cache_of(one, cache)
    rows = cache.rows_of(split, view=0)
    if not rows:
        splits = ", ".join(sorted({key.split for key in cache.keys})) or "none"
        raise RunError(f"{cache.path} has no rows of split {split!r}; it has {splits}: use --split")
    temperature = one.config.last_temperature
    images: list[Scored] = []
    with (
        device_memory("evaluating", "use --device cpu"),
        Progress(f"evaluate {one.path}", len(rows), "images", shown=progress) as shown,
    ):
        for image in score_images(
            one.run,
            cache,
            rows,
            one.config,
            projections=one.projections,
            temperature=temperature,
            device=one.device,
        ):
            images.append(image)
            shown.reach(len(images))
    return Evaluation(
        student=one.path,
        split=split,
        temperature=temperature,
        scores=summary(images),
        images=images,
    )


def save_images_csv(path: Path, evaluations: Sequence[Evaluation]) -> None:
    """Write a line for each image and student; a value that an image cannot give is empty."""
    text = io.StringIO()
    losses = loss_names([one for evaluation in evaluations for one in evaluation.images])
    writer = csv.DictWriter(text, [*_COLUMNS, *losses], lineterminator="\n")
    writer.writeheader()
    for evaluation in evaluations:
        writer.writerows(_line(evaluation, one) for one in evaluation.images)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.getvalue().encode("utf-8", "surrogateescape"))


def _line(evaluation: Evaluation, one: Scored) -> dict[str, Any]:
    scores = {} if one.student is None else vars(one.student)
    return {
        "student": evaluation.student,
        "split": one.key.split,
        "sample_id": one.key.sample_id,
        "view": one.key.view,
        **{name: scores.get(name) for name in _COLUMNS[4:8]},
        "agreement": one.agreement,
        "teacher_miou": None if one.teacher is None else one.teacher.miou,
        **one.losses,
    }


def worst_images(
    evaluations: Sequence[Evaluation],
    students: Sequence[TrainedStudent],
    cache: Cache,
    count: int = 8,
) -> U8:
    """A sheet of the images of the lowest mIoU, a mean over the students, worst first.

    Photo, mask, teacher, and for each student where it and the mask differ. Raises RunError when
    no image has both a label and a person.
    """
    shown = _worst(evaluations, count)
    if not shown:
        raise RunError(f"{cache.path}: no image of the split shows a labelled person to be drawn")
    rows = {key: n for n, key in enumerate(cache.keys)}
    titles = ["photo", "mask (yellow: not labelled)"]
    titles += ["teacher"] * cache.has_logits
    titles += [str(one.path) for one in students]
    cells, captions = [], []
    for number, (key, mious) in enumerate(shown, 1):
        cells.append(_views(cache, rows[key], students))
        scores = ", ".join(f"{miou:.3f}" for miou in mious)
        captions.append(f"{number}. mIoU {scores}  {key.split}: {key.sample_id}")
    captions[0] += "  (red: student only, blue: mask only)"
    return sheet(titles, cells, captions)


def _worst(evaluations: Sequence[Evaluation], count: int) -> list[tuple[Any, list[float]]]:
    """Keys of images with a person, with each student's mIoU, from the lowest mean on."""
    found = []
    for of_students in zip(*(evaluation.images for evaluation in evaluations), strict=True):
        mious = [one.student.miou for one in of_students if one.student is not None]
        known = [miou for miou in mious if miou is not None]
        if known:
            found.append((of_students[0].key, known))
    return sorted(found, key=lambda pair: statistics.fmean(pair[1]))[:count]


def _views(cache: Cache, index: int, students: Sequence[TrainedStudent]) -> list[U8]:
    row = cache[index]
    image, mask = row.image.astype(np.uint8), row.mask.astype(np.uint8)
    views = [image, masked(image, mask)]
    if row.teacher_logits is not None:
        views.append(lit(image, row.teacher_logits.astype(np.float32) > 0))
    labelled = (mask != PADDING) & (mask != IGNORE)
    for student in students:
        (batch,) = read_batches(cache, [[index]], student.device, taps=[], logits=False)
        predicted = student.run(batch.image).logits[0, 0].float().detach().cpu().numpy() > 0
        views.append(compared(image, predicted & labelled, (mask == PERSON) & labelled))
    return views
