"""Decoding, orientation, resizing and normalisation: the one place for extraction, training and prediction.

Shapes: images are (H, W, 3) uint8 RGB, masks (H, W) uint8 with the values below.

Colour rules for files that are not 8-bit RGB: grey is repeated into three channels; palettes are
looked up; an alpha channel is dropped, as OpenCV's colour reading does; CMYK, YCbCr and Lab are
converted by Pillow, without colour profiles; 16-bit samples are divided by 257, so 65535 becomes 255
instead of clipping at 255; 32-bit samples have no stated range and are refused. Of several frames or
pages the first is taken. Pictures of more than 179 million pixels are refused, as Pillow does: a few
bytes can claim any size.

Orientation: a photo is turned as its EXIF says, and so is a mask that has an EXIF orientation of its
own, as `kdcache predict` writes them; a mask without one is taken as it lies.

Mask rules: the values as stored, 0 and 1 or 0 and 255. A palette is looked up where all its colours in
use are black and white, for some writers put white first; else its indices count. An alpha channel
that says something else than the colours is refused.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from kdcache.config import ResizeMode
from kdcache.errors import SampleError

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
AnyPixel = TypeVar("AnyPixel", bound=np.generic)

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff"}
)
# Pictures that a person would expect to be taken, and that are not.
OTHER_IMAGE_SUFFIXES = frozenset(
    {".heic", ".heif", ".avif", ".gif", ".jp2", ".jxl", ".tga", ".dng", ".cr2", ".nef", ".arw"}
)
# Whatever the suffix says; left to itself, Pillow hands EPS files to Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")

BACKGROUND = 0
PERSON = 1
PADDING = 254  # letterbox border: out of every loss and metric
IGNORE = 255  # e.g. a crowd: out of everything that compares with the mask

# torchvision's ImageNet statistics, which smp's encoders were trained with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# OpenCV's INTER_LINEAR (no antialiasing) is what the frozen models were trained with; the name
# goes into the fingerprint.
INTERPOLATION = "opencv-inter-linear"

# The grey value YOLO's letterbox pads with.
LETTERBOX_GREY = 114


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a source image lies inside the square model input, in pixels."""

    source_height_px: int
    source_width_px: int
    size_px: int
    top_px: int
    left_px: int
    height_px: int
    width_px: int


def place(height: int, width: int, size: int, mode: ResizeMode) -> Placement:
    """Where an image of (height, width) goes in a (size, size) input."""
    top = left = 0
    inner_height = inner_width = size
    if mode == "letterbox":
        scale = size / max(height, width)
        inner_height = max(1, round(height * scale))
        inner_width = max(1, round(width * scale))
        top, left = (size - inner_height) // 2, (size - inner_width) // 2
    return Placement(
        source_height_px=height,
        source_width_px=width,
        size_px=size,
        top_px=top,
        left_px=left,
        height_px=inner_height,
        width_px=inner_width,
    )


def resize_image(image: U8, placement: Placement) -> U8:
    """Resize (H, W, 3) into the (size, size, 3) model input; a letterbox border is grey 114."""
    inner = cv2.resize(
        image, (placement.width_px, placement.height_px), interpolation=cv2.INTER_LINEAR
    )
    return _on_canvas(inner.astype(np.uint8, copy=False), placement, LETTERBOX_GREY)


def resize_mask(mask: U8, placement: Placement) -> U8:
    """Resize (H, W) by nearest neighbour; a letterbox border becomes `PADDING`.

    INTER_NEAREST_EXACT samples at pixel centres, as the image's INTER_LINEAR does; plain
    INTER_NEAREST would shift the mask by up to half a source pixel.
    """
    inner = cv2.resize(
        mask, (placement.width_px, placement.height_px), interpolation=cv2.INTER_NEAREST_EXACT
    )
    return _on_canvas(inner.astype(np.uint8, copy=False), placement, PADDING)


def _on_canvas(inner: U8, placement: Placement, fill: int) -> U8:
    size = placement.size_px
    if inner.shape[:2] == (size, size):
        return inner
    canvas = np.full((size, size, *inner.shape[2:]), fill, np.uint8)
    bottom = placement.top_px + placement.height_px
    right = placement.left_px + placement.width_px
    canvas[placement.top_px : bottom, placement.left_px : right] = inner
    return canvas


def at_source(values_SS: F32, placement: Placement) -> F32:
    """A network's (size, size) map at the size of the source image: border cut off, resized bilinearly."""
    bottom = placement.top_px + placement.height_px
    right = placement.left_px + placement.width_px
    inner = values_SS[placement.top_px : bottom, placement.left_px : right]
    size = (placement.source_width_px, placement.source_height_px)
    return cv2.resize(inner, size, interpolation=cv2.INTER_LINEAR).astype(np.float32, copy=False)


def decode_image(data: bytes) -> U8:
    """Decode an encoded image to (H, W, 3) uint8 RGB with its EXIF orientation applied.

    Raises SampleError for anything Pillow cannot decode completely.
    """
    picture = _open(data, "image")
    try:
        return _to_rgb(_upright(picture))
    except SampleError:
        raise
    except Exception as error:  # damaged EXIF raises many kinds
        raise SampleError(f"cannot be oriented or converted: {_told(error)}") from error


def exif_orientation(data: bytes) -> int:
    """How EXIF turns a decodable image: 1 not at all, 2 to 4 keep its size, 5 to 8 swap the sides."""
    with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
        return _orientation(picture)


def turned_back(array: NDArray[AnyPixel], orientation: int) -> NDArray[AnyPixel]:
    """(H, W) or (H, W, 3) as it lies in the file whose EXIF `orientation` turned it upright."""
    if orientation > 4:
        array = array.swapaxes(0, 1)
    # what a viewer mirrors, by the EXIF 2.3 specification's table of orientations
    if orientation in (3, 4, 6, 7):
        array = array[::-1]
    if orientation in (2, 3, 7, 8):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)


def _upright(picture: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(picture) if _orientation(picture) > 1 else picture


def _orientation(picture: Image.Image) -> int:
    found = picture.getexif().get(ExifTags.Base.Orientation, 1)
    return found if found in range(2, 9) else 1


def decode_mask(data: bytes) -> U8:
    """Decode a mask file to (H, W) uint8 of 0 and 1; files with values {0, 1} or {0, 255} are accepted.

    It is turned as its own EXIF orientation says.
    """
    picture = _open(data, "mask")
    try:
        picture = _upright(picture)
    except Exception as error:  # damaged EXIF raises many kinds
        raise SampleError(f"the mask cannot be oriented: {_told(error)}") from error
    values = _mask_values(picture)
    found = np.unique(values)
    if np.isin(found, (0, 1)).all():
        return values.astype(np.uint8)
    if np.isin(found, (0, 255)).all():
        return np.asarray(values == 255, np.uint8)
    shown = ", ".join(str(int(value)) for value in found[:8]) + (", …" if len(found) > 8 else "")
    raise SampleError(
        f"mask has the values {shown}; expected only 0 and 1, or only 0 and 255 "
        "(background and person); convert the masks first"
    )


def _open(data: bytes, what: str) -> Image.Image:
    if not data:
        raise SampleError(f"the {what} file is empty (0 bytes)")
    try:
        picture = Image.open(io.BytesIO(data), formats=_FORMATS)
        picture.load()
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise SampleError(f"the {what} cannot be decoded: {_told(error)}") from error
    return picture


def _told(error: Exception) -> str:
    """An error of Pillow's in words for a person: without the address of our buffer."""
    if isinstance(error, UnidentifiedImageError):
        return "it is no JPEG, PNG, WebP, BMP or TIFF, or its start is damaged"
    return f"{type(error).__name__}: {error}"


def _mask_values(picture: Image.Image) -> NDArray[np.generic]:
    """The values as stored: converting first would clip or round other value sets into good ones.

    A colour mask is accepted when its channels agree (a grey picture saved as RGB).
    """
    if picture.mode == "P":
        return _palette_values(picture)
    if picture.mode in ("L", "1") or picture.mode.startswith("I"):
        return np.asarray(picture)
    if picture.mode not in ("RGB", "RGBA", "LA"):
        raise SampleError(
            f"mask has Pillow's pixel mode {picture.mode}; expected one channel of 0/1 or 0/255"
        )
    channels = np.asarray(picture.convert("RGB"))
    if not (channels == channels[..., :1]).all():
        raise SampleError("mask is a colour picture; expected one channel of 0/1 or 0/255")
    grey = channels[..., 0]
    if picture.mode in ("RGBA", "LA"):
        alpha = np.asarray(picture.getchannel("A"))
        if not (alpha == alpha[0, 0]).all() and not np.array_equal(alpha, grey):
            raise SampleError(
                "mask has an alpha channel that differs from its colours: which of the two is the "
                "mask? Save it as one channel of 0/1 or 0/255"
            )
    return grey


def _palette_values(picture: Image.Image) -> NDArray[np.generic]:
    """A palette mask's indices, or its colours where those in use are black and white."""
    colours = np.asarray(picture.convert("RGB"))
    grey = colours[..., 0]
    if (colours == grey[..., None]).all() and np.isin(grey, (0, 255)).all():
        return grey
    return np.asarray(picture)


def _to_rgb(picture: Image.Image) -> U8:
    if picture.mode.startswith("I") or picture.mode == "F":
        return _wide_grey_to_rgb(np.asarray(picture), picture.mode)
    if isinstance(picture.info.get("transparency"), bytes):
        picture = picture.convert("RGBA")  # Pillow warns where a palette's alpha is dropped at once
    return np.asarray(picture.convert("RGB"))


def _wide_grey_to_rgb(values: NDArray[np.generic], mode: str) -> U8:
    """16-bit samples to 8 bits; `convert("RGB")` would clip them to white without a word."""
    if mode in ("F", "I"):
        raise SampleError(
            f"its samples have 32 bits (values from {values.min()} to {values.max()}); expected 8- or "
            "16-bit samples"
        )
    grey = np.rint(values.astype(np.float64) / 257).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)
