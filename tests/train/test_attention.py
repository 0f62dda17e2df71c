"""Weights of positions against plain loops over pixels, and the losses that they weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcache.cache.format import RowKey
from kdcache.imaging import IGNORE, PADDING, PERSON
from kdcache.train import losses
from kdcache.train.attention import FLOOR, attention
from kdcache.train.loader import Batch

KINDS = ("mask", "teacher_uncertainty", "feature_energy")
SIDE, GRID = 16, 4
CELL = SIDE // GRID


def example() -> tuple[Batch, torch.Tensor]:
    """People, ignored pixels, padding that cuts cells; an image without a label, one without a person,
    one that is padding throughout."""
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 2, (5, 1, SIDE, SIDE)).astype(np.uint8)
    mask[0, :, :6], mask[1, :, 5:9] = PADDING, IGNORE
    mask[2], mask[3], mask[4] = IGNORE, 0, PADDING
    mask[3, :, :, :3] = PADDING
    target = torch.from_numpy(rng.normal(size=(5, 3, GRID, GRID)).astype(np.float32))
    batch = Batch(
        image=torch.zeros(5, 3, SIDE, SIDE),
        mask=torch.from_numpy(mask),
        logits=torch.from_numpy(3 * rng.normal(size=mask.shape).astype(np.float32)),
        features={"tap": target},
        keys=[RowKey("train", str(n), 0) for n in range(5)],
    )
    return batch, target


def reference(kind: str, batch: Batch, target: torch.Tensor) -> np.ndarray:
    """(N, h, w), pixel by pixel in float64; 0 in an image of padding."""
    mask, features = batch.mask[:, 0].numpy(), target.numpy().astype(np.float64)
    p = 1 / (1 + np.exp(-batch.logits[:, 0].numpy().astype(np.float64)))
    of_pixels = {"mask": mask == PERSON, "teacher_uncertainty": 4 * p * (1 - p)}
    found = np.zeros((len(mask), GRID, GRID))
    for n in range(len(mask)):
        share = np.zeros((GRID, GRID))
        for y in range(GRID):
            for x in range(GRID):
                cell = np.s_[n, y * CELL : (y + 1) * CELL, x * CELL : (x + 1) * CELL]
                photo = mask[cell] != PADDING
                share[y, x] = photo.mean()
                if kind == "feature_energy":
                    found[n, y, x] = (features[n, :, y, x] ** 2).mean()
                elif photo.any():
                    found[n, y, x] = of_pixels[kind][cell][photo].mean()
        if not share.any():
            found[n] = 0
            continue
        if kind == "feature_energy":
            found[n] /= (found[n] * share).sum() / share.sum()
        found[n] += FLOOR
        found[n] /= (found[n] * share).sum() / share.sum()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_weights_equal_those_of_a_loop_over_pixels(kind):
    batch, target = example()
    found = attention(kind, batch, target)
    assert found.shape == (5, 1, GRID, GRID)
    assert found.dtype == torch.float32
    there = ~(batch.mask == PADDING).all(3).all(2)[:, 0]
    expected = torch.from_numpy(reference(kind, batch, target)).float()[there]
    assert torch.allclose(found[there][:, 0], expected, rtol=1e-5, atol=1e-6)
    assert torch.isfinite(found).all()


def test_a_person_counts_eleven_times_what_background_does():
    batch, target = example()
    batch.mask[:] = 0
    batch.mask[:, :, :CELL] = PERSON
    found = attention("mask", batch, target)
    assert torch.allclose(found[:, :, 0] / found[:, :, 1], torch.tensor((FLOOR + 1) / FLOOR))


@pytest.mark.parametrize("mask", [IGNORE, 0], ids=["unlabelled", "without a person"])
def test_where_no_person_is_marked_all_positions_count_alike(mask):
    batch, target = example()
    batch.mask[:] = mask
    assert torch.allclose(attention("mask", batch, target), torch.ones(1))


def test_features_that_are_all_0_count_alike():
    batch, target = example()
    batch.mask[:] = 0
    assert torch.allclose(attention("feature_energy", batch, 0 * target), torch.ones(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_the_loss_is_the_weighted_mean_over_the_positions_of_the_photo(kind, loss):
    batch, target = example()
    projected = torch.from_numpy(np.random.default_rng(1).normal(size=target.shape)).float()
    weights = attention(kind, batch, target)
    value = losses.FEATURE_LOSSES[loss](projected, target, batch.mask, attention=weights)
    a, b = projected.numpy().astype(np.float64), target.numpy().astype(np.float64)
    if loss == "mse":
        of_positions = ((a - b) ** 2).mean(1)
    else:
        norms = np.sqrt((a**2).sum(1) * (b**2).sum(1))
        of_positions = 1 - (a * b).sum(1) / norms
    photo = (batch.mask[:, 0].numpy() != PADDING).reshape(5, GRID, CELL, GRID, CELL)
    share = photo.mean((2, 4))
    expected = (of_positions * share * reference(kind, batch, target)).sum() / share.sum()
    assert value.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_that_is_the_same_everywhere_costs_what_it_costs_without(kind):
    """So no image counts more than another, and what a step divides by stays what it is."""
    batch, target = example()
    weights = attention(kind, batch, target)
    plain = losses.feature_mse(target + 2, target, batch.mask)
    assert losses.feature_mse(target + 2, target, batch.mask, attention=weights).item() == (
        pytest.approx(plain.item(), rel=1e-5)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_images_and_of_positions_add_up(kind):
    batch, target = example()
    projected = target + torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    weights, per = attention(kind, batch, target), losses.counts(batch.mask)
    whole = losses.feature_mse(projected, target, batch.mask, attention=weights).item()
    images = [slice(0, 2), slice(2, 5)]
    added = sum(
        losses.feature_mse(projected[i], target[i], batch.mask[i], per, attention=weights[i])
        for i in images
    )
    assert added.item() == pytest.approx(whole, rel=1e-5)
    drawn = torch.randperm(GRID**2).split(4)
    some = [
        losses.feature_mse(losses.at(projected, p), target, batch.mask, None, p, weights)
        for p in drawn
    ]
    assert torch.stack(some).mean().item() == pytest.approx(whole, rel=1e-5)


def test_none_is_no_weight_at_all():
    assert attention("none", *example()) is None
