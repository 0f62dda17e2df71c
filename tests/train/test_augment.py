"""What is changed of a batch: colours of the image alone, or all of it mirrored together."""

from __future__ import annotations

import colorsys
import copy
import dataclasses

import numpy as np
import pytest
import torch
from training import config, metrics, state_digest, train

from kdcache.cache.format import RowKey
from kdcache.pixels import normalised, restored, unit_range
from kdcache.train import loop
from kdcache.train.augment import STRENGTHS, Strength, augmented, mirror, recoloured
from kdcache.train.loader import Batch
from kdcache.train.prepare import Start
from kdcache.train.repeatable import Position, drawing, seed
from kdcache.train.together import train_together

START = Position(epoch=0, step=0, rank=0, batch=0)
NOTHING = Strength(0, 0, 0, 0, 0, 0)


def batch_of(count=6, size=16):
    """Random pixels, and padding along one side of the first image."""
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 2, (count, 1, size, size)).astype(np.uint8)
    mask[0, :, :3] = 254
    pixels = torch.from_numpy(rng.integers(0, 256, (count, size, size, 3), np.uint8))
    return Batch(
        image=normalised(pixels),
        mask=torch.from_numpy(mask),
        logits=torch.from_numpy(rng.normal(size=(count, 1, size, size)).astype(np.float32)),
        features={"a": torch.randn(count, 5, 4, 4), "b": torch.randn(count, 3, 8, 8)},
        keys=[RowKey("train", f"{n}.jpg", 0) for n in range(count)],
    )


def equal(ours, theirs, image=True):
    features = all(torch.equal(ours.features[tap], theirs.features[tap]) for tap in theirs.features)
    targets = torch.equal(ours.mask, theirs.mask) and torch.equal(ours.logits, theirs.logits)
    return features and targets and (not image or torch.equal(ours.image, theirs.image))


def seen(batch, position=START, **changes):
    return augmented(copy.deepcopy(batch), config(**changes), position)


def test_without_the_settings_the_batch_is_the_same_object():
    batch = batch_of()
    assert augmented(batch, config(), START) is batch


@pytest.mark.parametrize("strength", STRENGTHS)
def test_colours_change_and_targets_do_not(strength):
    batch = batch_of()
    new = seen(batch, student_augment=strength)
    assert equal(new, batch, image=False)
    padding = (batch.mask == 254).expand_as(batch.image)
    assert torch.equal(new.image[padding], batch.image[padding])
    assert (new.image[~padding] != batch.image[~padding]).float().mean() > 0.9
    pixels = unit_range(new.image)
    assert pixels.min() > -1e-6
    assert pixels.max() < 1 + 1e-6


def test_what_is_drawn_depends_on_seed_and_position_alone():
    batch = batch_of()
    random_state = torch.get_rng_state()
    first = seen(batch, student_augment="heavy", flip_targets=True)
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.rand(3)
    assert equal(seen(batch, student_augment="heavy", flip_targets=True), first)
    images = [seen(batch, student_augment="light").image]
    images += [seen(batch, student_augment="light", seed=1).image]
    for field in Position._fields:
        images.append(seen(batch, START._replace(**{field: 1}), student_augment="light").image)
    for n, one in enumerate(images):
        assert not any(torch.equal(one, other) for other in images[:n])


def test_the_generator_of_a_batch_is_not_that_of_its_step():
    seed(7, 1, 2, 3)
    of_step = torch.initial_seed()
    assert drawing(7, Position(1, 2, 3, 0)).integers(2**63) != of_step


@pytest.mark.parametrize("strength", STRENGTHS)
def test_each_image_has_colours_of_its_own_and_no_influence_on_others(strength):
    batch = batch_of()
    alike = dataclasses.replace(batch, image=batch.image[1:2].repeat(6, 1, 1, 1))
    new = seen(alike, student_augment=strength).image[1:]
    assert all(not torch.equal(new[a], new[b]) for a in range(5) for b in range(a))
    other = copy.deepcopy(batch)
    other.image[2:] = 0.3
    ours, theirs = (seen(one, student_augment=strength).image for one in (batch, other))
    assert torch.equal(ours[:2], theirs[:2])


def coloured(pixels, **strength):
    """What one of the changes makes of unit-range (H, W, 3) pixels, and its draw from -1 to 1."""
    image = normalised(torch.from_numpy(pixels)[None])
    most = NOTHING._replace(**strength)
    new = unit_range(recoloured(image, most, np.random.default_rng(5)))[0].permute(1, 2, 0).numpy()
    draws = np.random.default_rng(5).uniform(-1, 1, 6)
    return new, float(draws[Strength._fields.index(next(iter(strength)))])


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(1).integers(60, 160, (8, 8, 3), np.uint8)


def luma(pixels):
    return pixels @ np.array([0.299, 0.587, 0.114])


def test_each_change_is_what_its_name_says(pixels):
    unit = pixels / 255
    new, draw = coloured(pixels, brightness=0.4)
    np.testing.assert_allclose(new, unit * (1 + 0.4 * draw), atol=1e-6)
    new, draw = coloured(pixels, contrast=0.4)
    mean = luma(unit).mean()
    np.testing.assert_allclose(new, mean + (unit - mean) * (1 + 0.4 * draw), atol=1e-6)
    new, draw = coloured(pixels, saturation=0.4)
    grey = luma(unit)[..., None]
    np.testing.assert_allclose(new, grey + (unit - grey) * (1 + 0.4 * draw), atol=1e-6)
    new, draw = coloured(pixels, gamma=0.5)
    np.testing.assert_allclose(new, unit ** (1.5**draw), atol=1e-5)


def test_hue_turns_colours_and_leaves_greys():
    red = np.full((4, 4, 3), (180, 60, 60), np.uint8)
    new, draw = coloured(red, hue=1 / 3)
    np.testing.assert_allclose(new.sum(-1), red.sum(-1) / 255, atol=1e-5)
    hue = colorsys.rgb_to_hsv(*new[0, 0])[0]
    assert abs((hue - draw / 3 + 0.5) % 1 - 0.5) < 0.02
    grey = np.full((4, 4, 3), 77, np.uint8)
    np.testing.assert_allclose(coloured(grey, hue=0.3)[0], grey / 255, atol=1e-6)


def test_no_strength_changes_nothing():
    image = batch_of().image
    same = recoloured(image, NOTHING, np.random.default_rng(0))
    assert torch.equal(restored(same), restored(image))


def test_noise_is_another_at_each_pixel(pixels):
    new, draw = coloured(np.full((64, 64, 3), 128, np.uint8), noise=0.05)
    assert new.std() == pytest.approx(0.05 * abs(draw), rel=0.05)


def ramp(count, size):
    """The position from the left, from 0 to 1, of each pixel or cell."""
    return ((torch.arange(size) + 0.5) / size).expand(count, 1, size, size).clone()


def test_image_and_targets_are_mirrored_together():
    count, size = 64, 16
    batch = Batch(
        image=ramp(count, size).expand(-1, 3, -1, -1).clone(),
        mask=(ramp(count, size) > 0.7).to(torch.uint8),
        logits=ramp(count, size),
        features={"a": ramp(count, 4).expand(-1, 5, -1, -1).clone(), "b": ramp(count, 8)},
        keys=[RowKey("train", f"{n}.jpg", 0) for n in range(count)],
    )
    new = augmented(batch, config(flip_targets=True), START)
    assert torch.equal(new.image[:, :1], new.logits)
    assert torch.equal(new.mask, (new.logits > 0.7).to(torch.uint8))
    for tap, cells in (("a", 4), ("b", 8)):
        pooled = torch.nn.functional.avg_pool2d(new.logits, size // cells)
        np.testing.assert_allclose(
            new.features[tap], pooled.expand_as(new.features[tap]), atol=1e-6
        )
    turned = (new.logits[:, 0, 0, 0] > 0.5).sum()
    assert 16 < turned < 48
    assert all(
        torch.equal(new.logits[n], ramp(1, size)[0])
        for n in range(count)
        if new.logits[n, 0, 0, 0] < 0.5
    )


def test_mirroring_twice_is_what_it_was():
    batch = batch_of()
    twice, chosen = copy.deepcopy(batch), np.array([True, False] * 3)
    mirror(twice, chosen)
    assert not torch.equal(twice.features["a"], batch.features["a"])
    mirror(twice, chosen)
    assert equal(twice, batch)


def test_a_run_sees_other_colours_and_repeats_itself(cache, tmp_path):
    short = {"epochs": 1, "gradient_accumulation": 2, "batch_size": 2}
    for name in ("one", "two"):
        train(cache, tmp_path / name, student_augment="heavy", **short)
    train(cache, tmp_path / "plain", **short)
    assert state_digest(tmp_path / "one") == state_digest(tmp_path / "two")
    assert state_digest(tmp_path / "one") != state_digest(tmp_path / "plain")


def test_the_frozen_encoder_is_shared_by_runs_of_the_same_colours(cache, tmp_path):
    starts = [
        Start(
            out=tmp_path / f"t{n}", config=config(student_augment="light", epochs=1, kl_weight=kl)
        )
        for n, kl in enumerate((1.0, 2.0))
    ]
    train_together(cache.path, starts, device="cpu")
    for n, start in enumerate(starts):
        loop.train(cache.path, tmp_path / f"a{n}", start.config, device="cpu")
        assert state_digest(tmp_path / f"a{n}") == state_digest(tmp_path / f"t{n}")
        assert metrics(tmp_path / f"a{n}") == metrics(tmp_path / f"t{n}")
