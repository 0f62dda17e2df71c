"""Pixels as networks take them: uint8 goes to the device, and becomes floating point there.

A GPU gets a quarter of the bytes that way, and the host does none of the arithmetic. Divisors are
tensors on the device because torch multiplies by the reciprocal of a Python number on a GPU, which
may be off by one unit in the last place from what the host computes.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from kdcache.config import YoloInput
from kdcache.imaging import IMAGENET_MEAN, IMAGENET_STD, U8


def on_device(images_NHWC: U8, device: str | torch.device) -> Tensor:
    """The same uint8 pixels as a tensor; to a GPU through pinned memory, without waiting for it."""
    pixels = torch.from_numpy(np.ascontiguousarray(images_NHWC))
    if torch.device(device).type == "cpu":
        return pixels
    return pixels.pin_memory().to(device, non_blocking=True)


def planes(images_NHWC: Tensor) -> Tensor:
    """uint8 pixels as (N, 3, H, W) float32 of the same values."""
    return images_NHWC.permute(0, 3, 1, 2).contiguous().float()


def scaled(images_NHWC: Tensor, over: float = 255) -> Tensor:
    """uint8 pixels as (N, 3, H, W) float32, divided by `over`."""
    return planes(images_NHWC).div_(_constant((over,), images_NHWC.device))


def normalised(images_NHWC: Tensor) -> Tensor:
    """uint8 RGB pixels as the ImageNet-normalised (N, 3, H, W) float32 input of the UNets."""
    return from_unit_range(scaled(images_NHWC))


def from_unit_range(pixels_NCHW: Tensor) -> Tensor:
    """RGB in [0, 1] with ImageNet's normalisation, in the memory of what is given."""
    mean_C11, std_C11 = _imagenet(pixels_NCHW.device)
    return pixels_NCHW.sub_(mean_C11).div_(std_C11)


def unit_range(normalised_NCHW: Tensor) -> Tensor:
    """The RGB in [0, 1] that `normalised` made its float32 of, up to rounding."""
    mean_C11, std_C11 = _imagenet(normalised_NCHW.device)
    return normalised_NCHW * std_C11 + mean_C11


def restored(normalised_NCHW: Tensor) -> Tensor:
    """The uint8 pixels, (N, H, W, 3), that `normalised` made float32 of: exactly those."""
    values = unit_range(normalised_NCHW) * 255
    return values.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _imagenet(device: torch.device) -> tuple[Tensor, Tensor]:
    return _constant(IMAGENET_MEAN, device), _constant(IMAGENET_STD, device)


@cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(n, 1, 1) float32, once a device: the host waits for such a copy."""
    return torch.tensor(values, device=device)[:, None, None]


def swapped(images_NHWC: Tensor) -> Tensor:
    """RGB pixels as BGR."""
    return images_NHWC.flip(-1)


def yolo_input(images_NHWC: Tensor, expects: YoloInput) -> Tensor:
    """uint8 RGB pixels as the (N, 3, H, W) float32 input a detector expects."""
    pixels = swapped(images_NHWC) if expects.startswith("bgr") else images_NHWC
    return scaled(pixels) if expects.endswith("01") else planes(pixels)
