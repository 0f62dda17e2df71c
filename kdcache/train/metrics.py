"""Segmentation metrics by their definitions in docs/losses.md, accumulated over a split."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kdcache.imaging import IGNORE, PADDING, PERSON


@dataclass
class Segmentation:
    """Scores of one network's logits against the masks; predictions are logit > 0.

    `add` takes logits and masks of one image, (H, W) each.
    """

    _ious: list[float] = field(default_factory=list)  # of images with a person
    _false_positive_rates: list[float] = field(default_factory=list)  # of images without
    _intersection: int = 0
    _union: int = 0
    _pixels: int = 0  # that are labelled

    def add(self, logits: Tensor, mask: Tensor) -> None:
        valid = (mask != PADDING) & (mask != IGNORE)
        if not valid.any():
            return  # an unlabelled image says nothing about the mask
        predicted, person = (logits > 0)[valid], (mask == PERSON)[valid]
        if not person.any():
            self._false_positive_rates.append(float(predicted.float().mean()))
        else:
            self._ious.append((_iou(predicted, person) + _iou(~predicted, ~person)) / 2)
        self._intersection += int((predicted & person).sum())
        self._union += int((predicted | person).sum())
        self._pixels += len(person)

    @property
    def miou(self) -> float:
        """Mean over images with a person of (IoU_person + IoU_background)/2; NaN without one."""
        return _mean(self._ious)

    @property
    def iou_person_pooled(self) -> float:
        """IoU of person over all labelled pixels: 1 when neither shows a person, NaN without one."""
        if not self._pixels:
            return math.nan
        return self._intersection / self._union if self._union else 1.0

    @property
    def false_positive_rate(self) -> float:
        """Share of pixels called person in images without one, mean over those; NaN without one."""
        return _mean(self._false_positive_rates)


def agreement(student: Tensor, teacher: Tensor, mask: Tensor) -> tuple[int, int]:
    """Pixels of the photo where both masks (logit > 0) are equal, and all pixels of the photo."""
    valid = mask != PADDING
    equal = (student > 0) == (teacher > 0)
    return int((equal & valid).sum()), int(valid.sum())


def _iou(a: Tensor, b: Tensor) -> float:
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


def _mean(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).mean()) if values else float("nan")
