"""Segmentation metrics by their definitions in docs/losses.md, of one image and of a split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.imaging import IGNORE, PADDING, PERSON

Bools = NDArray[np.bool_]

# Of the diagonal: how far a predicted boundary may lie from the mask's and still count.
# Csurka et al. 2013, "What is a good evaluation measure for semantic segmentation?"
BOUNDARY_TOLERANCE = 0.0075

_NEIGHBOURS = ((0, 1), (2, 1), (1, 0), (1, 2))  # above, below, left, right, in a frame of one pixel


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What one image's logits, cut at 0, are worth against its mask."""

    miou: float | None  # (IoU_person + IoU_background)/2; None without a person in the mask
    iou_person: float | None  # the same
    boundary_f: float | None  # the same
    false_positive_rate: float | None  # share of pixels called person where no person is
    intersection: int
    union: int
    labelled_pixels: int


def compare(logits_HW: Tensor, mask_HW: Tensor) -> Compared | None:
    """Logits against the mask of one image, (H, W) each; None for an image without a label."""
    valid = (mask_HW != PADDING) & (mask_HW != IGNORE)
    if not valid.any():
        return None
    predicted, person = (logits_HW > 0) & valid, mask_HW == PERSON
    intersection, union = int((predicted & person).sum()), int((predicted | person).sum())
    pixels = int(valid.sum())
    has_person = bool(person.any())
    # the background's: what neither calls person, of what one at least calls background
    outside = (pixels - union, pixels - intersection)
    iou = _ratio(intersection, union)
    return Compared(
        miou=(iou + _ratio(*outside)) / 2 if has_person else None,
        iou_person=iou if has_person else None,
        boundary_f=boundary_f(*(t.cpu().numpy() for t in (predicted, person, valid)))
        if has_person
        else None,
        false_positive_rate=None if has_person else int(predicted.sum()) / pixels,
        intersection=intersection,
        union=union,
        labelled_pixels=pixels,
    )


def boundary_f(predicted_HW: Bools, person_HW: Bools, valid_HW: Bools) -> float:
    """F-score of the predicted person's boundary: 1 where every part of either lies within
    0.75 % of the diagonal of the other; 1 when there is none in both.

    A boundary pixel is a person's with a neighbour (above, below, left, right) that is background;
    what is not `valid`, or beyond the picture, is no background.
    """
    ours, theirs = (_boundary(of, valid_HW) for of in (predicted_HW, person_HW))
    if not ours.any() or not theirs.any():
        return float(ours.any() == theirs.any())
    tolerance = BOUNDARY_TOLERANCE * math.hypot(*valid_HW.shape)
    precision = float((_distance_to(theirs)[ours] <= tolerance).mean())
    recall = float((_distance_to(ours)[theirs] <= tolerance).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _boundary(person: Bools, valid: Bools) -> Bools:
    background = np.pad(~person & valid, 1)
    height, width = person.shape
    beside = np.zeros_like(person)
    for top, left in _NEIGHBOURS:
        beside |= background[top : top + height, left : left + width]
    return person & valid & beside


def _distance_to(boundary: Bools) -> NDArray[np.float32]:
    """Of every pixel to the nearest one of the boundary, in pixels."""
    elsewhere = (~boundary).astype(np.uint8)
    distances = cv2.distanceTransform(elsewhere, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return distances.astype(np.float32, copy=False)


def agreement(student: Tensor, teacher: Tensor, mask: Tensor) -> tuple[int, int]:
    """Pixels of the photo where both masks (logit > 0) are equal, and all pixels of the photo."""
    valid = mask != PADDING
    equal = (student > 0) == (teacher > 0)
    return int((equal & valid).sum()), int(valid.sum())


def pooled_iou(images: Sequence[Compared]) -> float | None:
    """IoU of person over all labelled pixels: 1 when neither shows a person, None without one."""
    if not images:
        return None
    return _ratio(sum(one.intersection for one in images), sum(one.union for one in images))


def mean(values: Sequence[float | None]) -> float | None:
    """Over the images that have the value; None when none has."""
    known = [value for value in values if value is not None]
    return float(torch.tensor(known, dtype=torch.float64).mean()) if known else None


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 1.0
