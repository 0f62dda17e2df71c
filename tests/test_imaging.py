"""Decoding, orientation, resizing, normalisation."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from kdcache import imaging
from kdcache.errors import SampleError


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def random_pixels(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_files_decode_to_their_pixels(kind):
    pixels = random_pixels(5, 7)
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(
        imaging.decode_image(encoded(Image.fromarray(pixels), kind, **options)), pixels
    )


def test_grey_palette_alpha_and_16_bit_follow_the_stated_rules():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    as_rgb = np.repeat(grey[..., None], 3, axis=2)
    assert np.array_equal(imaging.decode_image(encoded(Image.fromarray(grey))), as_rgb)
    palette = Image.fromarray(as_rgb).quantize(12)
    assert np.array_equal(
        imaging.decode_image(encoded(palette)), np.asarray(palette.convert("RGB"))
    )
    half_transparent = np.dstack([as_rgb, np.full((3, 4), 128, np.uint8)])
    assert np.array_equal(imaging.decode_image(encoded(Image.fromarray(half_transparent))), as_rgb)
    deep = grey.astype(np.uint16) * 257
    assert np.array_equal(imaging.decode_image(encoded(Image.fromarray(deep))), as_rgb)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_as_opencv_applies_it(orientation):
    pixels = random_pixels(8, 12)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(pixels), "JPEG", exif=exif, quality=100)
    ours = imaging.decode_image(data)
    theirs = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs).max() <= 2  # two JPEG decoders


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"not an image", "cannot be decoded"),
        (encoded(Image.new("RGB", (64, 64)), "JPEG")[:200], "cannot be decoded"),
    ],
)
def test_broken_files_are_refused_with_the_reason(data, reason):
    with pytest.raises(SampleError, match=reason):
        imaging.decode_image(data)


@pytest.mark.parametrize("person", [1, 255])
def test_masks_of_both_value_sets_become_zero_and_one(person):
    values = np.array([[0, person], [person, 0]], np.uint8)
    assert imaging.decode_mask(encoded(Image.fromarray(values))).tolist() == [[0, 1], [1, 0]]


def test_mask_of_other_values_is_refused_with_them():
    values = np.array([[0, 128], [255, 7]], np.uint8)
    with pytest.raises(SampleError, match="0, 7, 128, 255"):
        imaging.decode_mask(encoded(Image.fromarray(values)))


def test_grey_mask_saved_as_colour_is_accepted_and_a_coloured_one_refused():
    grey = np.array([[0, 255]], np.uint8)
    assert imaging.decode_mask(encoded(Image.fromarray(grey).convert("RGB"))).tolist() == [[0, 1]]
    with pytest.raises(SampleError, match="colour"):
        imaging.decode_mask(encoded(Image.fromarray(random_pixels(4, 4))))


def test_stretch_equals_bilinear_interpolation_without_antialiasing():
    pixels = random_pixels(37, 53)
    ours = imaging.resize_image(pixels, imaging.place(37, 53, 32, "stretch"))
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    reference = torch.nn.functional.interpolate(tensor, (32, 32), mode="bilinear")
    assert np.abs(ours - reference[0].permute(1, 2, 0).numpy()).max() <= 1


def test_letterbox_keeps_the_shape_and_marks_its_border():
    place = imaging.place(30, 60, 64, "letterbox")
    assert (place.top_px, place.left_px, place.height_px, place.width_px) == (16, 0, 32, 64)
    image = imaging.resize_image(np.full((30, 60, 3), 200, np.uint8), place)
    mask = imaging.resize_mask(np.ones((30, 60), np.uint8), place)
    assert set(np.unique(image[:16])) == {imaging.LETTERBOX_GREY}
    assert set(np.unique(mask[:16])) == set(np.unique(mask[48:])) == {imaging.PADDING}
    assert (image[16:48] == 200).all()
    assert (mask[16:48] == 1).all()


def test_image_and_mask_resize_about_the_same_centres():
    """A bright square stays under its mask, to within the half pixel of the edge."""
    pixels, mask = np.zeros((90, 90, 3), np.uint8), np.zeros((90, 90), np.uint8)
    pixels[31:62, 22:71], mask[31:62, 22:71] = 255, 1
    place = imaging.place(90, 90, 64, "stretch")
    bright = imaging.resize_image(pixels, place)[..., 0] > 127
    assert (bright != imaging.resize_mask(mask, place)).mean() < 0.01


def test_damaged_exif_is_a_reason_not_a_crash():
    info = PngInfo()
    info.add_text("Raw profile type exif", "\nexif\n 10\nzzzz")
    data = encoded(Image.new("RGB", (4, 4)), pnginfo=info)
    with pytest.raises(SampleError, match="oriented or converted"):
        imaging.decode_image(data)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.array([[0, 0.7]], np.float32), "TIFF"),
        (np.array([[0, 300]], np.uint16), "PNG"),
        (np.array([[0, 65535]], np.uint16), "PNG"),
    ],
)
def test_masks_are_judged_by_their_stored_values(values, kind):
    """Converted to 8 bits first, these would pass as empty or as 0/255."""
    with pytest.raises(SampleError, match="mask has"):
        imaging.decode_mask(encoded(Image.fromarray(values), kind))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_is_turned_by_its_own_orientation_and_turned_back(orientation):
    stored = np.zeros((4, 6), np.uint8)
    stored[0, :2] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(stored), "PNG", exif=exif)
    with Image.open(io.BytesIO(data)) as picture:
        shown = np.asarray(ImageOps.exif_transpose(picture))
    assert np.array_equal(imaging.decode_mask(data), shown // 255)
    assert np.array_equal(imaging.turned_back(shown, orientation), stored)
    colours = np.repeat(shown[..., None], 3, axis=2)
    assert np.array_equal(imaging.turned_back(colours, orientation)[..., 0], stored)
