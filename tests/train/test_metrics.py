"""Metrics against torchmetrics, and their edges."""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics.classification import BinaryJaccardIndex

from kdcache.imaging import IGNORE, PADDING
from kdcache.train.metrics import Segmentation, agreement


def sample(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(16, 16, generator=generator)
    return logits, torch.randint(0, 2, (16, 16), generator=generator).byte()


def test_miou_and_pooled_iou_equal_torchmetrics():
    ours, pooled, per_image = Segmentation(), BinaryJaccardIndex(), []
    for seed in range(4):
        logits, mask = sample(seed)
        ours.add(logits, mask)
        predicted, person = (logits > 0).int(), mask.int()
        pooled.update(predicted, person)
        both = [
            BinaryJaccardIndex()(predicted, person),
            BinaryJaccardIndex()(1 - predicted, 1 - person),
        ]
        per_image.append(float(sum(both)) / 2)
    assert ours.miou == pytest.approx(sum(per_image) / 4, rel=1e-6)
    assert ours.iou_person_pooled == pytest.approx(float(pooled.compute()), rel=1e-6)


@pytest.mark.parametrize("value", [PADDING, IGNORE])
def test_padding_and_ignored_pixels_do_not_count(value):
    logits, mask = sample(0)
    alone, more = Segmentation(), Segmentation()
    alone.add(logits, mask)
    more.add(torch.cat([logits, -logits]), torch.cat([mask, torch.full_like(mask, value)]))
    assert more.miou == alone.miou
    assert more.iou_person_pooled == alone.iou_person_pooled


def test_images_without_a_person_are_reported_apart():
    scores = Segmentation()
    empty = torch.zeros(4, 4, dtype=torch.uint8)
    scores.add(torch.tensor([1.0, -1, -1, -1]).repeat(4, 1), empty)
    assert math.isnan(scores.miou)
    assert scores.false_positive_rate == 0.25
    assert scores.iou_person_pooled == 0


def test_empty_union_counts_one():
    scores = Segmentation()
    scores.add(torch.full((2, 2), -1.0), torch.zeros(2, 2, dtype=torch.uint8))
    assert scores.iou_person_pooled == 1.0
    everywhere = Segmentation()
    everywhere.add(torch.ones(2, 2), torch.ones(2, 2, dtype=torch.uint8))
    assert everywhere.miou == 1.0  # no background anywhere: its empty union is 1


def test_unlabelled_image_says_nothing():
    scores = Segmentation()
    scores.add(torch.ones(2, 2), torch.full((2, 2), IGNORE, dtype=torch.uint8))
    assert math.isnan(scores.miou)
    assert math.isnan(scores.false_positive_rate)
    assert math.isnan(scores.iou_person_pooled)


def test_agreement_counts_ignored_pixels_but_no_padding():
    mask = torch.tensor([[0, 1, IGNORE, PADDING]], dtype=torch.uint8)
    student, teacher = torch.tensor([[1.0, 1, 1, 1]]), torch.tensor([[1.0, -1, 1, 1]])
    assert agreement(student, teacher, mask) == (2, 3)
