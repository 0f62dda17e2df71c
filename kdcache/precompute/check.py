"""A first look at both models on a few photos: do they see what they were made for?

A wrong channel order, scale or normalisation raises no error: it gives a cache of poor targets. So
each model is also run on the pixels in the other usual forms, and the scores compared: the
teacher's mIoU against the masks, and for the detector how well its features tell people from the
rest, by a linear map fitted on the other photos. On real photos a wrong scale costs all of that, a
swapped channel order a few hundredths (docs/log.md).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kdcache import pixels
from kdcache.cache import codecs
from kdcache.config import YoloInput
from kdcache.drawing import lit, masked, save, sheet
from kdcache.errors import ModelError
from kdcache.imaging import BACKGROUND, IGNORE, PADDING, PERSON, U8
from kdcache.precompute.sources import Prepared
from kdcache.precompute.teacher import Teacher
from kdcache.precompute.yolo import Features, Yolo, of_image
from kdcache.progress import Progress

log = logging.getLogger(__name__)
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

TEACHER_GETS = "ImageNet-normalised RGB"
YOLO_INPUTS: tuple[YoloInput, ...] = ("rgb01", "bgr01", "rgb255", "bgr255")

_LOW_MIOU = 0.5  # half of the picture wrong: no teacher to learn from
# Standard errors (over the photos) by which another form must score better to be warned of, and to
# be sure of it.
_LIKELY, _SURE = 1.0, 2.0
# Below so many photos the error itself is chance, and only a difference this large counts.
_ENOUGH, _LARGE = 4, 0.1
_EQUAL = 5e-4  # what shows as the same number
LOOKED_AT = 8  # photos at most
_TELLING = 0.1  # explained share below which the features know nothing of people in any form
_RIDGE = 1e-3  # a thousandth of a unit variance: keeps the fit defined where channels repeat
_PROBED_SIDE = 40  # grid positions a side that the linear map is fitted on


OTHER_TEACHER_INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "ImageNet-normalised BGR": lambda images: pixels.normalised(pixels.swapped(images)),
    "RGB in 0 to 1": pixels.scaled,
    "RGB in 0 to 255": pixels.planes,
    "RGB in -1 to 1": lambda images: pixels.scaled(images, 127.5) - 1,
}


@dataclass(frozen=True, kw_only=True)
class Check:
    """What both models score on a few photos, by the form of the pixels they were given."""

    photos: int
    teacher_miou: float | None  # as it is used; None without a labelled person
    teacher: Mapping[str, float]  # mIoU
    detector: Mapping[str, float]  # share of the mask's variance that the features explain
    warnings: Sequence[str]
    notes: Sequence[str]  # what scores better too, but may do so by chance


class Seen(NamedTuple):
    """A photo and what both models, as they are used, make of it."""

    row: Prepared
    features: Features | None  # None without a detector
    logits: F32 | None  # (H, W); None without a teacher


def look(rows: Iterable[Prepared], yolo: Yolo | None, teacher: Teacher | None) -> list[Seen]:
    """Run the models there are on a few photos, one by one."""
    return [
        Seen(
            row,
            None if yolo is None else of_image(yolo.features(row.image[None]), 0),
            None if teacher is None else teacher.logits(row.image[None])[0],
        )
        for row in rows
    ]


def first_look(
    photos: Sequence[Prepared],
    yolo: Yolo | None,
    teacher: Teacher | None,
    picture: Path,
    *,
    progress: bool = False,
) -> tuple[Check, list[Seen]]:
    """Score the models, draw the teacher on the photos, and tell what looks wrong.

    Four photos are looked at, and the rest, up to `LOOKED_AT` in all, where those leave a doubt: each
    is nine runs of a model. Raises ModelError when the teacher gives probabilities.
    """
    seen: list[Seen] = []
    scored: list[_Scored] = []
    with Progress("first look", len(photos[:LOOKED_AT]), "photo", shown=progress) as bar:
        for some in (photos[:_ENOUGH], photos[_ENOUGH:LOOKED_AT]):
            for photo in some:
                seen += look([photo], yolo, teacher)
                scored.append(_scored(seen[-1], yolo, teacher))
                bar.reach(len(seen))
            _refuse_probabilities(seen)
            found = _judged(seen, scored, yolo)
            if not found.notes:
                break
    _draw(seen, picture)
    return found, seen


def say(found: Check, picture: Path) -> None:
    """Log the scores, and what looks wrong."""
    score = "" if found.teacher_miou is None else f": teacher mIoU {found.teacher_miou:.3f}"
    log.info("first look at %d photos%s; picture: %s", found.photos, score, picture)
    for text in found.warnings:
        log.warning("%s", text)
    for text in found.notes:
        log.info("%s", text)


def _judged(seen: Sequence[Seen], scored: Sequence[_Scored], yolo: Yolo | None) -> Check:
    scores = _columns([one.teacher for one in scored if one.teacher])
    explained = _explained(scored)
    found = [
        _other_teacher_input(scores),
        _other_detector_input(explained, yolo.expects if yolo else ""),
        _nobody(seen),
    ]
    warnings = [text for likely, text in found if text and likely]
    own = float(scores[TEACHER_GETS].mean()) if scores else None
    if own is not None and own < _LOW_MIOU:
        warnings.insert(0, _low(seen, own))
    return Check(
        photos=len(seen),
        teacher_miou=own,
        teacher={name: float(values.mean()) for name, values in scores.items()},
        detector={name: float(values.mean()) for name, values in explained.items()},
        warnings=warnings,
        notes=[text for likely, text in found if text and not likely],
    )


def _low(seen: Sequence[Seen], own: float) -> str:
    """What is wrong with a teacher, or with masks, that agree so little."""
    agrees = [
        _miou(-one.logits, one.row.mask)
        for one in seen
        if one.logits is not None and (one.row.mask == PERSON).any()
    ]
    inverted = float(np.mean(agrees))
    if inverted > max(_LOW_MIOU, own + _LARGE):
        return (
            f"the teacher's mIoU is {own:.3f}, and {inverted:.3f} with its mask inverted: are the masks' "
            "persons 0 and the rest 1 or 255? Invert the masks then"
        )
    return (
        f"the teacher's mIoU is {own:.3f} on the first labelled photos: is it a teacher of this "
        "task, and are these its images?"
    )


def _nobody(seen: Sequence[Seen]) -> tuple[bool, str]:
    """Whether it is likely that the masks were misread, where none has a person; and the words."""
    labelled = [one for one in seen if np.isin(one.row.mask, (BACKGROUND, PERSON)).any()]
    if not labelled or any((one.row.mask == PERSON).any() for one in labelled):
        return False, ""
    return len(labelled) >= _ENOUGH, (
        f"none of the {len(labelled)} labelled photos that were looked at has a person in its mask: "
        "is a person 1 or 255 in the masks?"
    )


def _other_teacher_input(scores: Mapping[str, F64]) -> tuple[bool, str]:
    """Whether another form is likely to be the right one, and the words for it; none if no better."""
    name, likely, words = _better(scores, TEACHER_GETS)
    if not name:
        return False, ""
    return likely, (
        f"the teacher scores {words} on {name} (mIoU {scores[name].mean():.3f}) than on the "
        f"{TEACHER_GETS} that it gets ({scores[TEACHER_GETS].mean():.3f}): was it trained on that? "
        "Then export it to ONNX with that conversion at its input"
    )


def _other_detector_input(scores: Mapping[str, F64], own: str) -> tuple[bool, str]:
    name, likely, words = _better(scores, own)
    if not name or scores[name].mean() < _TELLING:
        return False, ""
    return likely, (
        f"the detector's features tell people from the rest {words} with --yolo-input {name} "
        f"({scores[name].mean():.3f} of the variance) than with {own} ({scores[own].mean():.3f}): "
        "which was it trained on?"
    )


def _better(scores: Mapping[str, F64], own: str) -> tuple[str, bool, str]:
    """The form that beats `own` by the most, whether that is likely to be no chance, and how much."""
    if not scores:
        return "", False, ""
    name = max(scores, key=lambda name: scores[name].mean())
    difference = scores[name] - scores[own]
    if difference.mean() <= _EQUAL:
        return "", False, ""
    count = len(difference)
    if count < _ENOUGH:
        large = bool(difference.mean() > _LARGE)
        return name if large else "", large, "clearly better"
    error = difference.std(ddof=1) / count**0.5
    if difference.mean() <= _LIKELY * error:
        return name, False, f"better, by what may be chance on {count} photos,"
    return name, True, "clearly better" if difference.mean() > _SURE * error else "a little better"


class _Scored(NamedTuple):
    """What one photo tells, by the form of the pixels that the models were given."""

    teacher: dict[str, float]  # mIoU; none without a teacher or a labelled person
    features: dict[str, F64]  # (P, C) at P grid positions; none without a detector or a person
    people: F64  # (P,) the share of person in each grid cell


def _scored(one: Seen, yolo: Yolo | None, teacher: Teacher | None) -> _Scored:
    image, mask = one.row.image, one.row.mask
    agreement: dict[str, float] = {}
    if teacher is not None and one.logits is not None and (mask == PERSON).any():
        agreement[TEACHER_GETS] = _miou(one.logits, mask)
        for name, form in OTHER_TEACHER_INPUTS.items():
            agreement[name] = _miou(teacher.logits_of(image[None], form)[0], mask)
    if yolo is None or one.features is None:
        return _Scored(agreement, {}, np.zeros(0))
    tap = next(iter(yolo.taps))  # what is wrong with the pixels is wrong for all
    _, height, _ = yolo.taps[tap].shape
    step = max(1, height // _PROBED_SIDE)
    features: dict[str, F64] = {}
    for form_of_yolo in YOLO_INPUTS:
        found_CHW: codecs.Array = one.features[tap]
        if form_of_yolo != yolo.expects:
            found_CHW = yolo.features(image[None], form_of_yolo)[tap][0]
        on_host = codecs.on_host(found_CHW)[:, ::step, ::step]
        features[form_of_yolo] = on_host.reshape(len(on_host), -1).T.astype(np.float64)
    people = _share_of_person(_people(one), height)[::step, ::step].ravel()
    return _Scored(agreement, features, people)


def _columns(rows: Sequence[Mapping[str, float]]) -> dict[str, F64]:
    return {name: np.array([row[name] for row in rows]) for name in (rows[0] if rows else ())}


def _refuse_probabilities(seen: Sequence[Seen]) -> None:
    logits = [one.logits for one in seen if one.logits is not None]
    if not logits:
        return
    low, high = min(z.min() for z in logits), max(z.max() for z in logits)
    if low >= 0 and high <= 1:
        raise ModelError(
            f"the teacher's output lies in {low:.3g} to {high:.3g} on all of {len(seen)} photos: these "
            "are probabilities, distillation needs the logits before the sigmoid: export it without"
        )


def _miou(logits_HW: F32, mask: U8) -> float:
    """(IoU_person + IoU_background) / 2 of logit > 0, over labelled pixels."""
    valid = (mask != IGNORE) & (mask != PADDING)
    ours, theirs = (logits_HW > 0)[valid], (mask == PERSON)[valid]
    return (_iou(ours, theirs) + _iou(~ours, ~theirs)) / 2


def _iou(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 1.0


def _explained(scored: Sequence[_Scored]) -> dict[str, F64]:
    """By the form of the pixels, for each photo: 1 − error / variance of the share of person in
    each grid cell, told from the cell's features by a linear map fitted on the other photos."""
    targets = np.stack([one.people for one in scored])
    if len(scored) < 2 or not targets.any():
        return {}
    return {
        form: _told_by_others(np.stack([one.features[form] for one in scored]), targets)
        for form in scored[0].features
    }


def _told_by_others(features_NPC: F64, targets_NP: F64) -> F64:
    """Explained share of each photo's variance, by ridge regression on all other photos; (N,)."""
    if not np.isfinite(features_NPC).all():
        return np.full(len(targets_NP), -1.0)
    deviation = features_NPC.std((0, 1))
    scaled = (features_NPC - features_NPC.mean((0, 1))) / np.where(deviation > 0, deviation, 1)
    ones = np.ones((*targets_NP.shape, 1))
    known = np.concatenate([scaled, ones], axis=2)
    gram = np.einsum("npc,npd->ncd", known, known, optimize=True)
    moments = np.einsum("npc,np->nc", known, targets_NP)
    ridge = _RIDGE * targets_NP.size * np.eye(known.shape[2])
    variance = ((targets_NP - targets_NP.mean()) ** 2).mean(1)
    shares = []
    for n in range(len(known)):
        weights = np.linalg.solve(gram.sum(0) - gram[n] + ridge, moments.sum(0) - moments[n])
        error = ((known[n] @ weights - targets_NP[n]) ** 2).mean()
        shares.append(1 - error / max(variance[n], 1e-9))
    clipped: F64 = np.clip(np.array(shares), -1, 1)
    return clipped


def _people(one: Seen) -> NDArray[np.bool_]:
    """Where people are, by the mask; by the teacher where nobody is labelled: a place is a place."""
    labelled = one.row.mask == PERSON
    return labelled if labelled.any() or one.logits is None else one.logits > 0


def _share_of_person(people: NDArray[np.bool_], side: int) -> F64:
    cell = len(people) // side
    share: F64 = people.astype(np.float64).reshape(side, cell, side, cell).mean((1, 3))
    return share


def _draw(seen: Sequence[Seen], picture: Path) -> None:
    """Photo, mask and the teacher's person of each row."""
    cells, captions = [], []
    for row, _, logits in seen:
        cells.append([row.image, masked(row.image, row.mask)])
        cells[-1] += [] if logits is None else [lit(row.image, logits > 0)]
        captions.append(f"{row.key.split}: {row.key.sample_id}")
    titles = ["photo", "mask (yellow: not labelled)", "teacher"][: len(cells[0])]
    try:
        save(picture, sheet(titles, cells, captions), "PNG")
    except OSError as error:
        log.warning("no picture of the first look: %s", error)
