"""What networks are given is what the formulas say, to the bit: caches of all machines agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcache import pixels
from kdcache.imaging import IMAGENET_MEAN, IMAGENET_STD

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 6, 5, 3), np.uint8)


def test_normalised_is_the_formula_in_float32():
    mean, std = np.float32(IMAGENET_MEAN), np.float32(IMAGENET_STD)
    expected = (IMAGES.astype(np.float32) / np.float32(255) - mean) / std
    found = pixels.normalised(torch.from_numpy(IMAGES))
    assert found.is_contiguous()
    assert np.array_equal(found.numpy(), expected.transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("expects", "order", "over"),
    [("rgb01", 1, 255), ("bgr01", -1, 255), ("rgb255", 1, 1), ("bgr255", -1, 1)],
)
def test_yolo_input_has_the_channel_order_and_range_asked_for(expects, order, over):
    expected = IMAGES[..., ::order].astype(np.float32) / np.float32(over)
    found = pixels.yolo_input(torch.from_numpy(IMAGES), expects)
    assert found.is_contiguous()
    assert np.array_equal(found.numpy(), expected.transpose(0, 3, 1, 2))


def test_pixels_on_the_device_are_the_same_and_not_changed(recwarn):
    for images in (IMAGES, IMAGES[:, ::-1], np.broadcast_to(IMAGES[:1], (4, 6, 5, 3))):
        found = pixels.on_device(images, "cpu")
        pixels.normalised(found)
        assert np.array_equal(found.numpy(), images)
    assert not recwarn.list  # torch warns of arrays that are not writable


def test_restored_pixels_are_those_that_were_normalised():
    """All 256 values in every channel."""
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(1, 1, 1, 3)
    assert torch.equal(pixels.restored(pixels.normalised(values)), values)
