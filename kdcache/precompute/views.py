"""Augmented views: drawn from policy, seed, sample id and view, applied to image and mask together.

Geometry is exact: a window of whole source pixels is cut out, mirrored where asked, and resized once, by
the code that makes view 0. Colours are changed after that, in the image only.

Where source pixels lie: with `placed_px` = [top, left, height, width] of the input and `window_px` the
same of the source photo, a point x of the input (pixel centres at +0.5) shows, from the left of the window,

    u = (x - placed left) / placed width × window width,       mirrored: window width - u

so the source point window left + u; rows alike, never mirrored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from kdcache.config import ResizeMode
from kdcache.errors import ConfigError, nearest
from kdcache.imaging import LETTERBOX_GREY, PADDING, U8, place, resize_image, resize_mask
from kdcache.precompute.degrade import PHOTOMETRIC

_GEOMETRIC = ("flip", "window")


class View(NamedTuple):
    """One view at the models' input size."""

    image: U8  # (S, S, 3)
    mask: U8  # (S, S)
    placement: dict[str, Any]  # `window_px`, `placed_px`, `flipped`: see above


class Box(NamedTuple):
    """A rectangle of whole pixels; it may lie outside what it is a part of."""

    top: int
    left: int
    height: int
    width: int


def apply(
    parameters: Mapping[str, Any], image: U8, mask: U8, size_px: int, resize: ResizeMode
) -> View:
    """The view of an (H, W, 3) photo and its (H, W) mask that `draw` described: the same bytes anywhere.

    Without parameters it is view 0. Where the window reaches beyond the photo, and in a letterbox's
    border, the mask is `PADDING` and the image grey, whatever the weather: as the detector knows it.
    Raises ConfigError for a transform that this kdcache does not have.
    """
    known = (*_GEOMETRIC, *PHOTOMETRIC)
    for name in parameters:
        if name not in known:
            raise ConfigError(f"unknown transform {name!r}; nearest known: {nearest(name, known)}")
    height, width = mask.shape
    window = Box(0, 0, height, width)
    if "window" in parameters:
        window = window_of(height, width, **parameters["window"])
    flipped = "flip" in parameters
    seen, seen_mask = _cut(image, mask, window, flipped)
    where = place(window.height, window.width, size_px, resize)
    picture = resize_image(seen, where)
    for name, change in PHOTOMETRIC.items():
        if name in parameters:
            picture = change(picture, **parameters[name])
    label = resize_mask(seen_mask, where)
    picture[label == PADDING] = LETTERBOX_GREY
    placement = {
        "window_px": list(window),
        "placed_px": [where.top_px, where.left_px, where.height_px, where.width_px],
        "flipped": flipped,
    }
    return View(picture, label, placement)


def window_of(height: int, width: int, scale: float, ratio: float, x: float, y: float) -> Box:
    """The part of an (height, width) photo that is seen, one pixel at least.

    Its sides are the photo's over `scale`, its aspect the photo's times `ratio`; x and y, 0 to 1, place
    it between left and right, top and bottom of the room there is, or the photo in a larger window.
    """
    stretch = math.sqrt(ratio)
    seen_height = max(1, round(height / scale / stretch))
    seen_width = max(1, round(width / scale * stretch))
    top, left = round(y * (height - seen_height)), round(x * (width - seen_width))
    return Box(top, left, seen_height, seen_width)


def _cut(image: U8, mask: U8, window: Box, flipped: bool) -> tuple[U8, U8]:
    """The window of both: photo where there is one, else border; left and right exchanged if asked."""
    height, width = mask.shape
    top, left = max(window.top, 0), max(window.left, 0)
    bottom, right = (
        min(window.top + window.height, height),
        min(window.left + window.width, width),
    )
    # torchvision's order: left, top, right, bottom
    border = [
        left - window.left,
        top - window.top,
        window.left + window.width - right,
        window.top + window.height - bottom,
    ]

    def cut(tensor: torch.Tensor, fill: int) -> torch.Tensor:
        part = F.crop(tensor, top, left, bottom - top, right - left)
        if any(border):
            part = F.pad(part, border, fill=fill)
        mirrored: torch.Tensor = F.horizontal_flip(part) if flipped else part
        return mirrored

    # Pillow's arrays are read-only, of which torch would warn; negative strides it refuses
    photo = torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)
    label = torch.from_numpy(np.require(mask, requirements=["C", "W"]))
    seen = cut(tv_tensors.Image(photo), LETTERBOX_GREY).permute(1, 2, 0)
    return seen.numpy(), cut(tv_tensors.Mask(label), PADDING).numpy()
