"""Metrics against torchmetrics and plain definitions, and their edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchmetrics.classification import BinaryJaccardIndex

from kdcache.imaging import IGNORE, PADDING
from kdcache.train.metrics import (
    BOUNDARY_TOLERANCE,
    agreement,
    boundary_f,
    compare,
    mean,
    pooled_iou,
)


def sample(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(16, 16, generator=generator)
    return logits, torch.randint(0, 2, (16, 16), generator=generator).byte()


def test_miou_and_pooled_iou_equal_torchmetrics():
    ours, pooled, per_image = [], BinaryJaccardIndex(), []
    for seed in range(4):
        logits, mask = sample(seed)
        ours.append(compare(logits, mask))
        predicted, person = (logits > 0).int(), mask.int()
        pooled.update(predicted, person)
        both = [
            BinaryJaccardIndex()(predicted, person),
            BinaryJaccardIndex()(1 - predicted, 1 - person),
        ]
        assert ours[-1].iou_person == pytest.approx(float(both[0]), rel=1e-6)
        per_image.append(float(sum(both)) / 2)
    assert mean([one.miou for one in ours]) == pytest.approx(sum(per_image) / 4, rel=1e-6)
    assert pooled_iou(ours) == pytest.approx(float(pooled.compute()), rel=1e-6)


@pytest.mark.parametrize("value", [PADDING, IGNORE])
def test_padding_and_ignored_pixels_do_not_count(value):
    logits, mask = sample(0)
    alone = compare(logits, mask)
    more = compare(torch.cat([logits, -logits]), torch.cat([mask, torch.full_like(mask, value)]))
    for name in ("miou", "iou_person", "intersection", "union", "labelled_pixels"):
        assert getattr(more, name) == getattr(alone, name), name


def test_images_without_a_person_are_reported_apart():
    empty = torch.zeros(4, 4, dtype=torch.uint8)
    scores = compare(torch.tensor([1.0, -1, -1, -1]).repeat(4, 1), empty)
    assert scores.miou is scores.boundary_f is scores.iou_person is None
    assert scores.false_positive_rate == 0.25
    assert pooled_iou([scores]) == 0


def test_empty_union_counts_one():
    nobody = compare(torch.full((2, 2), -1.0), torch.zeros(2, 2, dtype=torch.uint8))
    assert pooled_iou([nobody]) == 1.0
    everywhere = compare(torch.full((2, 2), 1.0), torch.ones(2, 2, dtype=torch.uint8))
    assert everywhere.miou == 1.0


def test_unlabelled_images_say_nothing():
    assert compare(torch.ones(2, 2), torch.full((2, 2), IGNORE, dtype=torch.uint8)) is None
    assert pooled_iou([]) is None
    assert mean([None, None]) is None
    assert mean([None, 0.5]) == 0.5


def test_agreement_counts_ignored_pixels_but_not_padding():
    student = torch.tensor([[1.0, -1.0, 1.0, 1.0]])
    teacher = torch.tensor([[2.0, 1.0, -1.0, 1.0]])
    mask = torch.tensor([[0, 1, PADDING, IGNORE]], dtype=torch.uint8)
    assert agreement(student, teacher, mask) == (2, 3)


def plain_boundary_f(predicted, person, valid):
    """By its definition, pixel by pixel."""

    def boundary(of):
        found = []
        for y, x in np.argwhere(of & valid):
            for there in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                inside = 0 <= there[0] < of.shape[0] and 0 <= there[1] < of.shape[1]
                if inside and valid[there] and not of[there]:
                    found.append((y, x))
                    break
        return found

    ours, theirs = boundary(predicted), boundary(person)
    if not ours or not theirs:
        return float(bool(ours) == bool(theirs))
    tolerance = BOUNDARY_TOLERANCE * math.hypot(*valid.shape)

    def share(of, near):
        return np.mean([any(math.dist(a, b) <= tolerance for b in near) for a in of])

    precision, recall = share(ours, theirs), share(theirs, ours)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("seed", range(12))
def test_boundary_f_is_that_of_its_definition(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(20, 200, 2)

    def blob():
        y, x = np.mgrid[:height, :width]
        centre = rng.uniform(0, 1, 2) * (height, width)
        radius = rng.uniform(0.1, 0.4) * min(height, width)
        return (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2

    person = blob()
    predicted = person ^ (blob() & (rng.random((height, width)) < 0.05))
    valid = ~blob() if seed % 2 else np.ones_like(person)
    expected = plain_boundary_f(predicted & valid, person & valid, valid)
    assert boundary_f(predicted & valid, person & valid, valid) == pytest.approx(expected)


def test_boundary_f_at_its_edges():
    valid = np.ones((100, 100), bool)
    nobody, everywhere = ~valid, valid
    square = nobody.copy()
    square[20:60, 20:60] = True
    assert boundary_f(square, square, valid) == 1
    assert boundary_f(np.roll(square, 1, 1), square, valid) == 1  # 1.06 pixels are allowed
    assert boundary_f(np.roll(square, 2, 1), square, valid) < 0.8
    assert boundary_f(nobody, square, valid) == 0
    # the edge of the picture is no boundary
    assert boundary_f(everywhere, everywhere, valid) == 1
    assert boundary_f(nobody, everywhere, valid) == 1
