"""What is changed of a batch between the cache and the student, on the device that trains.

Suffixes of tensors name their axes: N images, C channels, H and W pixels, P = H·W.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.config import TrainConfig
from kdcache.imaging import PADDING
from kdcache.pixels import from_unit_range, unit_range
from kdcache.train.loader import Batch
from kdcache.train.repeatable import Position, drawing

# How much of each channel a grey of the same lightness has (ITU-R BT.601).
_LUMA = (0.299, 0.587, 0.114)


class Strength(NamedTuple):
    """How far colours are changed at most; pixels are in [0, 1]."""

    brightness: float  # a factor from 1 - this to 1 + this; the next two are as well
    contrast: float  # around the image's mean lightness
    saturation: float
    hue: float  # turns of the colour circle, either way
    gamma: float  # an exponent from 1 / (1 + this) to 1 + this
    noise: float  # standard deviation of what is added to each value, from 0 to this


STRENGTHS = {
    "light": Strength(0.15, 0.15, 0.2, 0.02, 0.15, 0.0),
    "heavy": Strength(0.4, 0.4, 0.6, 0.08, 0.5, 0.05),
}


def augmented(batch: Batch, config: TrainConfig, position: Position) -> Batch:
    """The batch as the settings `flip_targets` and `student_augment` have it; without them itself.

    What is drawn depends on the seed and the position alone, and torch's own generator is not used.
    Mirroring is done in the memory of the batch that is given.
    """
    if config.student_augment == "none" and not config.flip_targets:
        return batch
    rng = drawing(config.seed, position)
    chosen = (
        rng.random(len(batch.keys)) < 0.5
    )  # also where none are mirrored: colours stay the same
    if config.flip_targets:
        mirror(batch, chosen)
    if config.student_augment == "none":
        return batch
    image = recoloured(batch.image, STRENGTHS[config.student_augment], rng)
    # at deployment padding is always of its one colour
    image = torch.where(batch.mask == PADDING, batch.image, image)
    return dataclasses.replace(batch, image=image)


def mirror(batch: Batch, chosen_N: NDArray[np.bool_]) -> None:
    """Turn the chosen images from left to right, and all their targets with them, in their memory.

    Elsewhere it would take four times as long at layer 34's size.
    """
    targets = [batch.mask, *batch.features.values()]
    targets += [] if batch.logits is None else [batch.logits]
    for values_NCHW in (batch.image, *targets):
        for n in np.flatnonzero(chosen_N):
            values_NCHW[n] = values_NCHW[n].flip(-1)


def recoloured(image_NCHW: Tensor, most: Strength, rng: np.random.Generator) -> Tensor:
    """ImageNet-normalised images in other colours, each in its own; all values stay within [0, 1].

    Brightness, contrast, saturation and hue are one linear map a pixel, then come gamma and noise.
    """
    draws_N6 = rng.uniform(-1, 1, (len(image_NCHW), len(most)))
    factors = 1 + draws_N6[:, :3] * most[:3]
    brightness_N, contrast_N, saturation_N = factors.T
    turns = _turned_hue(draws_N6[:, 3] * most.hue)
    matrix = (brightness_N * contrast_N)[:, None, None] * (turns @ _saturated(saturation_N))
    around_N = brightness_N * (1 - contrast_N)
    gamma_N = (1 + most.gamma) ** draws_N6[:, 4]
    noise_N = most.noise * np.abs(draws_N6[:, 5])

    device = image_NCHW.device
    pixels_NCP = unit_range(image_NCHW).flatten(2)
    luma_C1 = _on(device, np.array(_LUMA)[:, None])
    mean_N11 = (pixels_NCP.mean(2, keepdim=True) * luma_C1).sum(1, keepdim=True)
    offset_N11 = mean_N11 * _on(device, around_N)[:, None, None]
    pixels_NCP = torch.bmm(_on(device, matrix), pixels_NCP).add_(offset_N11).clamp_(0, 1)
    pixels_NCP.pow_(_on(device, gamma_N)[:, None, None])
    if most.noise:
        generator = torch.Generator(device).manual_seed(int(rng.integers(2**63)))
        noise_NCP = torch.randn(pixels_NCP.shape, generator=generator, device=device)
        pixels_NCP.add_(noise_NCP.mul_(_on(device, noise_N)[:, None, None])).clamp_(0, 1)
    return from_unit_range(pixels_NCP.view_as(image_NCHW))


def _turned_hue(turns_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, 3, 3): RGB turned around the axis of greys (Rodrigues' formula); greys stay."""
    angle = 2 * math.pi * turns_N[:, None, None]
    across = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    cosine = np.cos(angle)
    matrix: NDArray[np.float64] = cosine * np.eye(3) + (1 - cosine) / 3 + np.sin(angle) * across
    return matrix


def _saturated(factors_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, 3, 3): RGB drawn towards its grey, or away from it."""
    factor = factors_N[:, None, None]
    matrix: NDArray[np.float64] = factor * np.eye(3) + (1 - factor) * np.array(_LUMA)
    return matrix


def _on(device: torch.device, values: NDArray[np.floating]) -> Tensor:
    """A few numbers on the device as float32, without waiting for it."""
    return torch.from_numpy(values.astype(np.float32)).to(device, non_blocking=True)
