"""A corpus of what real folders hold: each file becomes a row, or is refused for the right reason."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Standins
from PIL import Image
from pycocotools import mask as coco_mask

from kdcache.cache.format import read_remarks
from kdcache.cache.reader import Cache
from kdcache.errors import DatasetError
from kdcache.precompute.dataset import Dataset, coco_dataset, folder_dataset
from kdcache.precompute.extract import extract

HEIGHT, WIDTH = 40, 60


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape or (HEIGHT, WIDTH, 3), np.uint8)


RGB = Image.fromarray(noise())


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


JPEG, PNG = saved(RGB, "JPEG"), saved(RGB, "PNG")


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return saved(RGB, "JPEG", exif=tags)


def wide(dtype: str, kind: str, scale: float = 1.0) -> bytes:
    return saved(Image.fromarray((noise(HEIGHT, WIDTH).astype(float) * scale).astype(dtype)), kind)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header says it is that large."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return PNG[:8] + chunk + PNG[8 + 25 :]


def frames(kind: str) -> bytes:
    return saved(RGB, kind, save_all=True, append_images=[Image.new("RGB", RGB.size)])


PERSON = noise(HEIGHT, WIDTH) > 127
SHAPE_IN_ALPHA = Image.fromarray(
    np.dstack([np.zeros((HEIGHT, WIDTH, 3)), PERSON * 255]).astype(np.uint8)
)


def palette_mask(white_first: bool = False, colour: tuple[int, int, int] = (255, 255, 255)):
    """`PERSON` as a picture of two colours of a palette."""
    mask = Image.fromarray((PERSON ^ white_first).astype(np.uint8))
    mask.putpalette([*colour, 0, 0, 0] if white_first else [0, 0, 0, *colour])
    return mask


# file name to bytes, of images that become rows; all have a mask of their own size
GOOD_IMAGES: dict[str, bytes] = {
    "plain.jpg": JPEG,
    "plain.png": PNG,
    "UPPER.JPG": JPEG,
    "plain.jpeg": JPEG,
    "plain.jpe": JPEG,
    "plain.jfif": JPEG,
    "plain.webp": saved(RGB, "WEBP"),
    "lossless.webp": saved(RGB, "WEBP", lossless=True),
    "plain.bmp": saved(RGB, "BMP"),
    "plain.tif": saved(RGB, "TIFF"),
    "deflate.tiff": saved(RGB, "TIFF", compression="tiff_adobe_deflate"),
    "progressive.jpg": saved(RGB, "JPEG", progressive=True),
    "grey.jpg": saved(RGB.convert("L"), "JPEG"),
    "grey.png": saved(RGB.convert("L"), "PNG"),
    "bilevel.png": saved(RGB.convert("1"), "PNG"),
    "palette.png": saved(RGB.convert("P"), "PNG"),
    "palette_transparent.png": saved(RGB.convert("P"), "PNG", transparency=3),
    "palette_bytes.png": saved(RGB.convert("P"), "PNG", transparency=bytes(range(100))),
    "alpha.png": saved(RGB.convert("RGBA"), "PNG"),
    "alpha.webp": saved(RGB.convert("RGBA"), "WEBP"),
    "grey_alpha.png": saved(RGB.convert("LA"), "PNG"),
    "cmyk.jpg": saved(RGB.convert("CMYK"), "JPEG"),
    "cmyk.tif": saved(RGB.convert("CMYK"), "TIFF"),
    "ycbcr.tif": saved(RGB.convert("YCbCr"), "TIFF"),
    "lab.tif": saved(RGB.convert("LAB"), "TIFF"),
    "16_bit.png": wide("uint16", "PNG", 257),
    "16_bit.tif": wide("uint16", "TIFF", 257),
    "really_png.jpg": PNG,
    "really_jpeg.png": JPEG,
    "animated.webp": frames("WEBP"),
    "pages.tif": frames("TIFF"),
    "trailing_bytes.jpg": JPEG + b"GoPro" * 100,
    "two pictures.jpg": JPEG + JPEG,
    "with space.jpg": JPEG,
    " leading.jpg": JPEG,
    "täglich_写真_😀.jpg": JPEG,
    "quote'\"`$(x).jpg": JPEG,
    "new\nline.jpg": JPEG,
    "many.dots.in.it.jpg": JPEG,
    "-rf.jpg": JPEG,
    "a" * 200 + ".jpg": JPEG,
    "deep/er/and/deeper/1.jpg": JPEG,
    "1.jpg": JPEG,
    "10.jpg": JPEG,
    ".hidden.jpg": JPEG,
    "exif_0.jpg": exif(0),
    "exif_1.jpg": exif(1),
    "exif_3.jpg": exif(3),
    "exif_9.jpg": exif(9),
    "icc.jpg": saved(RGB, "JPEG", icc_profile=b"no profile at all"),
    "dpi.jpg": saved(RGB, "JPEG", dpi=(0, 0)),
}
# file name to (bytes, reason)
BAD_IMAGES: dict[str, tuple[bytes, str]] = {
    "empty.jpg": (b"", "the image file is empty"),
    "empty.png": (b"", "empty"),
    "truncated.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "truncated.png": (PNG[: len(PNG) // 2], "truncated"),
    "truncated.webp": (saved(RGB, "WEBP")[:200], "cannot be decoded"),
    "truncated.bmp": (saved(RGB, "BMP")[:500], "cannot be decoded"),
    "truncated.tif": (saved(RGB, "TIFF")[:500], "cannot be decoded"),
    "header_only.jpg": (JPEG[:20], "cannot be decoded"),
    "flipped.png": (flipped(PNG, len(PNG) // 2), "cannot be decoded"),
    "zeros.jpg": (bytes(5000), "it is no JPEG, PNG"),
    "text.jpg": (b"this is no image\n" * 40, "it is no JPEG, PNG"),
    "html.jpg": (b"<html>404 Not Found</html>", "it is no JPEG, PNG"),
    "._resource_fork.jpg": (b"\x00\x05\x16\x07" + bytes(4000), "it is no JPEG, PNG"),
    "git_lfs.png": (b"version https://git-lfs.github.com/spec/v1\n", "it is no JPEG, PNG"),
    "pickle.png": (b"\x80\x04\x95", "it is no JPEG, PNG"),
    "bomb.png": (png_claiming(60_000, 60_000), "pixels"),
    "zero_wide.png": (png_claiming(0, 10), "cannot be decoded"),
    "float.tif": (wide("float32", "TIFF"), "8- or 16-bit"),
    "32_bit_of_8.tif": (wide("int32", "TIFF"), "8- or 16-bit"),
    "32_bit_of_16.tif": (wide("int32", "TIFF", 257), "8- or 16-bit"),
    "really_gif.jpg": (saved(RGB, "GIF"), "it is no JPEG, PNG"),
    "really_eps.jpg": (saved(RGB, "EPS"), "it is no JPEG, PNG"),
    "phone.HEIC": (b"ftypheic", "HEIC is not supported"),
    "moving.gif": (saved(RGB, "GIF"), "GIF is not supported"),
    "negative.tif": (wide("int32", "TIFF", -1), "8- or 16-bit"),
    "24_bit.tif": (wide("int32", "TIFF", 60_000), "8- or 16-bit"),
    "exif_6.jpg": (exif(6), "rotate the mask"),
    "exif_8.jpg": (exif(8), "rotate the mask"),
}
# stem to (bytes of its mask, reason); the image is good
BAD_MASKS: dict[str, tuple[bytes, str]] = {
    "mask_empty": (b"", "the mask file is empty"),
    "mask_truncated": (saved(RGB.convert("L"), "PNG")[:200], "the mask cannot be decoded"),
    "mask_text": (b"not a mask", "the mask cannot be decoded: it is no JPEG, PNG"),
    "mask_bomb": (png_claiming(60_000, 60_000), "the mask cannot be decoded"),
    "mask_in_alpha": (saved(SHAPE_IN_ALPHA, "PNG"), "alpha channel"),
    "mask_in_grey_alpha": (saved(SHAPE_IN_ALPHA.convert("LA"), "PNG"), "alpha channel"),
    "mask_small": (saved(Image.new("L", (20, 20)), "PNG"), r"mask is 20×20, the image 40×60"),
    "mask_turned": (saved(Image.new("L", (HEIGHT, WIDTH)), "PNG"), "mask is 60×40, the image"),
    "mask_classes": (saved(Image.fromarray(noise(HEIGHT, WIDTH) % 21), "PNG"), "values 0, 1, 2"),
    "mask_half": (saved(Image.new("L", (WIDTH, HEIGHT), 128), "PNG"), "values 128"),
    "mask_jpeg": (saved(RGB.convert("L"), "JPEG"), "values 0, 1, 2"),
    "mask_16_bit": (wide("uint16", "PNG", 257), "values 0, 257"),
    "mask_colour": (saved(RGB, "PNG"), "colour picture"),
    "mask_voc": (saved(RGB.convert("P"), "PNG"), "the values"),
    "mask_float": (wide("float32", "TIFF"), "pixel mode F"),
    "mask_cmyk": (saved(RGB.convert("CMYK"), "TIFF"), "pixel mode CMYK"),
}
GOOD_MASKS: dict[str, Callable[[], bytes]] = {
    "mask_0_1": lambda: saved(Image.fromarray(noise(HEIGHT, WIDTH) % 2), "PNG"),
    "mask_0_255": lambda: saved(Image.fromarray(noise(HEIGHT, WIDTH) % 2 * 255), "PNG"),
    "mask_bilevel": lambda: saved(RGB.convert("1"), "PNG"),
    "mask_none": lambda: saved(Image.new("L", (WIDTH, HEIGHT)), "PNG"),
    "mask_all": lambda: saved(Image.new("L", (WIDTH, HEIGHT), 255), "PNG"),
    "mask_grey_rgb": lambda: saved(Image.new("RGB", (WIDTH, HEIGHT), (255,) * 3), "PNG"),
    "mask_opaque": lambda: saved(Image.new("RGBA", (WIDTH, HEIGHT), (255,) * 4), "PNG"),
    "mask_palette": lambda: saved(palette_mask(white_first=False), "PNG"),
    "mask_palette_white_first": lambda: saved(palette_mask(white_first=True), "PNG"),
    "mask_palette_voc": lambda: saved(palette_mask(colour=(128, 0, 0)), "PNG"),
    "mask_bmp": lambda: saved(Image.new("L", (WIDTH, HEIGHT), 255), "BMP"),
}
PLAIN_MASK = saved(Image.fromarray(noise(HEIGHT, WIDTH) // 128), "PNG")


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def build(folder: Path) -> Dataset:
    """The corpus on disk, each image in a folder of its own, for many share a stem."""
    images = GOOD_IMAGES | {name: data for name, (data, _) in BAD_IMAGES.items()}
    for number, (name, data) in enumerate(images.items()):
        put(folder / f"images/{number:03d}/{name}", data)
        put(folder / f"masks/{number:03d}" / Path(name).with_suffix(".png"), PLAIN_MASK)
    masks = {stem: data for stem, (data, _) in BAD_MASKS.items()}
    masks |= {stem: make() for stem, make in GOOD_MASKS.items()}
    for stem, data in masks.items():
        put(folder / f"images/masks/{stem}.jpg", JPEG)
        put(folder / f"masks/masks/{stem}.png", data)
    put(folder / "images/no_mask.jpg", JPEG)
    (folder / "images/circle").symlink_to(folder / "images")
    (folder / "images/dangling.jpg").symlink_to(folder / "nowhere.jpg")
    return folder_dataset(folder / "images", folder / "masks")


@pytest.fixture(scope="module")
def extracted(standins: Standins, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("corpus")
    dataset = build(folder)
    report = extract(standins.config(val_fraction=0.0), dataset, folder / "c", device="cpu")
    again = extract(standins.config(val_fraction=0.0), dataset, folder / "c", device="cpu")
    return dataset, report, again, Cache(folder / "c")


def short(sample_id: str) -> str:
    """A name in the tables above from a sample id."""
    return sample_id.split("/", 1)[1] if sample_id[:3].isdigit() else Path(sample_id).stem


def test_every_good_file_becomes_a_row(extracted):
    *_, cache = extracted
    assert {short(name) for name in cache.samples} == {*GOOD_IMAGES, *GOOD_MASKS}


def test_every_bad_file_is_named_with_its_reason(extracted):
    _, report, *_ = extracted
    reasons = {short(name): why for name, why in report.skipped.items()}
    expected = {name: reason for name, (_, reason) in (BAD_IMAGES | BAD_MASKS).items()}
    expected |= {
        "no_mask": "no mask of the same name",
        "circle": "in itself",
        "dangling": "nowhere",
    }
    assert reasons.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in reasons[name], name
        assert " at 0x" not in reasons[name], name


def test_nothing_is_dropped_in_silence(extracted):
    dataset, report, *_ = extracted
    assert len(GOOD_IMAGES | BAD_IMAGES | GOOD_MASKS | BAD_MASKS) >= 80
    assert report.rows_total + len(report.skipped) == len(dataset.samples) + len(dataset.refused)


def test_a_second_run_says_the_same(extracted):
    _, report, again, cache = extracted
    assert again.skipped == report.skipped == read_remarks(cache.path).together.skipped
    assert (again.rows_added, again.changed) == (0, {})


def test_rows_hold_the_pixels_of_their_files(extracted):
    *_, cache = extracted
    rows = {short(row.sample_id): row for row in cache}
    for name in ("plain.png", "alpha.png", "plain.bmp", "plain.tif", "really_png.jpg"):
        assert np.array_equal(rows[name].image, rows["lossless.webp"].image), name
    for name in ("16_bit.png", "16_bit.tif"):
        grey = Image.fromarray(noise(HEIGHT, WIDTH)).resize((4, 4), Image.Resampling.BOX)
        assert rows[name].image.std() > 10, name
        assert abs(int(rows[name].image.mean()) - int(np.asarray(grey).mean())) < 10, name


def test_palettes_are_read_by_what_they_mean(extracted):
    """Black and white by their colours, whichever comes first; other palettes by their indices."""
    masks = {Path(row.sample_id).stem: row.mask for row in extracted[-1]}
    for name in ("mask_palette_white_first", "mask_palette_voc"):
        assert np.array_equal(masks[name], masks["mask_palette"]), name
    assert 0.3 < masks["mask_palette"].mean() < 0.7


def test_photos_that_exif_turns_within_their_size_are_doubtful(extracted):
    _, report, again, cache = extracted
    assert again.doubtful == {}  # it wrote no row
    assert {short(name) for name in report.doubtful} == {"exif_3.jpg"}
    assert read_remarks(cache.path).together.doubtful == report.doubtful
    assert "orientation 3" in next(iter(report.doubtful.values()))


def test_masks_below_the_images_are_no_photos(tmp_path):
    put(tmp_path / "d/a.jpg", JPEG)
    put(tmp_path / "d/masks/a.png", PLAIN_MASK)
    dataset = folder_dataset(tmp_path / "d", tmp_path / "d/masks")
    assert [sample.sample_id for sample in dataset.samples] == ["a.jpg"]
    assert dataset.refused == {}


def test_one_pixel_and_a_very_long_picture_are_pictures(standins, tmp_path):
    for name, size in (("one", (1, 1)), ("long", (1, 5000)), ("wide", (5000, 1))):
        put(tmp_path / f"images/{name}.png", saved(Image.new("RGB", size, 200), "PNG"))
        put(tmp_path / f"masks/{name}.png", saved(Image.new("L", size, 255), "PNG"))
    dataset = folder_dataset(tmp_path / "images", tmp_path / "masks")
    for resize in ("stretch", "letterbox"):
        config = standins.config(val_fraction=0.0, resize=resize)
        assert extract(config, dataset, tmp_path / resize, device="cpu").rows_total == 3
        assert all((row.mask == 1).any() for row in Cache(tmp_path / resize))


POLYGON = [[5.0, 5, 30, 5, 30, 30, 5, 30]]
BLOCK = np.zeros((HEIGHT, WIDTH), np.uint8)
BLOCK[5:30, 5:30] = 1
COMPRESSED = coco_mask.encode(np.asfortranarray(BLOCK))
UNCOMPRESSED = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}
GOOD_COCO = {
    "polygon": {"segmentation": POLYGON},
    "two_polygons": {"segmentation": [*POLYGON, [40.0, 5, 50, 5, 50, 30]]},
    "compressed": {"segmentation": {**COMPRESSED, "counts": COMPRESSED["counts"].decode()}},
    "uncompressed": {"segmentation": UNCOMPRESSED},
    "category_as_text": {"segmentation": POLYGON, "category_id": "1"},
    "outside": {"segmentation": [[-9.0, -9, 90, -9, 90, 90, -9, 90]]},
    "crowd_as_text": {"segmentation": POLYGON, "iscrowd": "false"},
}
BAD_COCO = {
    "missing": ({"segmentation": POLYGON}, "No such file"),
    "a" * 300: ({"segmentation": POLYGON}, "File name too long"),
    "no_segmentation": ({}, "it is empty"),
    "empty": ({"segmentation": []}, "it is empty"),
    "empty_polygon": ({"segmentation": [[]]}, "0 numbers"),
    "line": ({"segmentation": [[1.0, 1, 5, 5]]}, "4 numbers"),
    "odd": ({"segmentation": [[1.0, 1, 5, 5, 9, 9, 9]]}, "7 numbers"),
    "nested": ({"segmentation": [[[1, 1], [5, 5], [9, 1]]]}, "polygon 0 is not a flat list"),
    "flat": ({"segmentation": POLYGON[0]}, "polygon 0 is not a flat list"),
    "words": ({"segmentation": [["1", "1", "5", "5", "9", "1"]]}, "polygon 0 is not a flat list"),
    "null": ({"segmentation": [[None] * 6]}, "polygon 0 is not a flat list"),
    "number": ({"segmentation": 5}, "neither polygons nor run lengths"),
    "no_counts": ({"segmentation": {"size": [HEIGHT, WIDTH]}}, "neither polygons nor run lengths"),
    "other_size": ({"segmentation": {"size": [9, 9], "counts": [0, 81]}}, "do not cover"),
    "short_counts": ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [7]}}, "do not cover"),
    "half_count": (
        {"segmentation": {**UNCOMPRESSED, "counts": [0.5, HEIGHT * WIDTH - 0.5]}},
        "not all whole numbers",
    ),
    "count_as_text": (
        {"segmentation": {**UNCOMPRESSED, "counts": ["0", str(HEIGHT * WIDTH)]}},
        "not all whole numbers",
    ),
    "negative_count": (
        {"segmentation": {**UNCOMPRESSED, "counts": [-10, HEIGHT * WIDTH + 10]}},
        "not all whole numbers",
    ),
    "nan": ({"segmentation": [[float("nan")] * 6]}, "not numbers within"),
    "resized": ({"segmentation": POLYGON}, "the image 20×20"),
    "zero": ({"segmentation": POLYGON}, "empty"),
}
LEFT_OUT_COCO = {
    "only_crowd": {"segmentation": UNCOMPRESSED, "iscrowd": 1},
    "only_dog": {"segmentation": POLYGON, "category_id": 2},
}


def test_coco_annotations_of_every_kind(standins, tmp_path):
    annotated = GOOD_COCO | {n: fields for n, (fields, _) in BAD_COCO.items()} | LEFT_OUT_COCO
    images, annotations = [], []
    for number, (name, fields) in enumerate([*annotated.items(), ("without", None)]):
        entry = {"id": number, "file_name": f"{name}.jpg", "height": HEIGHT, "width": WIDTH}
        images.append(entry)
        if fields is not None:
            # some exporters write ids as text
            image_id = str(number) if number % 2 else number
            annotations.append({"image_id": image_id, "category_id": 1, "id": number, **fields})
        data = {"resized": saved(Image.new("RGB", (20, 20)), "JPEG"), "zero": b""}
        if len(name) < 256 and name != "missing":
            put(tmp_path / f"images/{name}.jpg", data.get(name, JPEG))
    categories = [{"id": 1, "name": "person"}, {"id": 2, "name": "dog"}]
    document = {"images": images, "annotations": annotations, "categories": categories}
    put(tmp_path / "coco.json", json.dumps(document).encode())
    dataset = coco_dataset(tmp_path / "images", tmp_path / "coco.json")
    config = standins.config(val_fraction=0.0)
    report = extract(config, dataset, tmp_path / "c", device="cpu")
    assert {Path(name).stem for name in Cache(tmp_path / "c").samples} == GOOD_COCO.keys()
    assert {Path(name).stem for name in report.skipped} == BAD_COCO.keys()
    for name, reason in report.skipped.items():
        assert BAD_COCO[Path(name).stem][1] in reason, name
        if "segmentation" in reason:
            assert "COCO annotation " in reason, name
    assert report.left_out["no person in it"] == len(LEFT_OUT_COCO) + 1


def coco_file(path: Path, *entries: object, **lists: object) -> Path:
    """A COCO file of `plain.jpg` with a person, and of further entries of its list of images."""
    put(path.parent / "images/plain.jpg", JPEG)
    plain = {"id": 1, "file_name": "plain.jpg", "height": HEIGHT, "width": float(WIDTH)}
    person = {"id": 9, "image_id": 1, "category_id": 1, "segmentation": POLYGON}
    document = {
        "images": [plain, *entries],
        "annotations": [person],
        "categories": [{"id": 1, "name": "person"}],
    }
    put(path, json.dumps(document | lists).encode())
    return path


OTHER = {"id": 2, "file_name": "b.jpg", "height": HEIGHT, "width": WIDTH}


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        (OTHER | {"file_name": "a\0.jpg"}, "NUL"),
        (OTHER | {"file_name": "/etc/passwd"}, "leads out"),
        (OTHER | {"file_name": "a/../../b.jpg"}, "leads out"),
        (OTHER | {"file_name": "\ud800.jpg"}, "UTF-8"),
        (OTHER | {"file_name": 5}, "file_name is 5, expected text"),
        (OTHER | {"height": 40.5}, "height is 40.5, expected a whole number"),
        (OTHER | {"height": "40"}, "height is '40', expected a whole number"),
        (OTHER | {"width": 0}, "expected 1 to"),
        (OTHER | {"width": -5}, "expected 1 to"),
        (OTHER | {"height": 10**9}, "expected 1 to"),
        (OTHER | {"file_name": ""}, "file_name is ''"),
        (OTHER | {"file_name": None}, "file_name is None"),
        (OTHER | {"id": [1]}, "id is [1]"),
        (OTHER | {"id": None}, "id is None, expected a whole number or text"),
        (OTHER | {"id": True}, "id is True"),
        (None, "expected an object"),
        ([1], "expected an object"),
    ],
)
def test_a_bad_entry_of_images_is_skipped_and_the_rest_taken(tmp_path, entry, why):
    dataset = coco_dataset(tmp_path / "images", coco_file(tmp_path / "c.json", entry))
    assert [sample.sample_id for sample in dataset.samples] == ["plain.jpg"]
    ((name, reason),) = dataset.refused.items()
    assert name.startswith("images[1] of c.json")
    assert why in reason


@pytest.mark.parametrize(
    ("lists", "why"),
    [
        ({"annotations": [None]}, r"annotations\[0\]: expected an object"),
        ({"annotations": [{"image_id": 1}]}, r"annotations\[0\]: category_id is None"),
        (
            {"annotations": [{"image_id": 1, "category_id": 1, "iscrowd": "maybe"}]},
            r"annotations\[0\]: iscrowd is 'maybe', expected 0 or 1",
        ),
        ({"categories": []}, "it has none"),
        ({"images": [None]}, r"no entry of images can be used; images\[0\]"),
    ],
)
def test_what_would_change_a_mask_refuses_the_file(tmp_path, lists, why):
    with pytest.raises(DatasetError, match=why):
        coco_dataset(tmp_path / "images", coco_file(tmp_path / "c.json", **lists))


def test_json_nested_without_end_is_refused(tmp_path):
    put(tmp_path / "c.json", b"[" * 200_000)
    put(tmp_path / "images/plain.jpg", JPEG)
    with pytest.raises(DatasetError, match="not a JSON object"):
        coco_dataset(tmp_path / "images", tmp_path / "c.json")


def test_one_file_under_two_names_is_refused(tmp_path):
    path = coco_file(tmp_path / "c.json", OTHER | {"file_name": "./plain.jpg"})
    with pytest.raises(DatasetError, match="no image with a person that can be used"):
        coco_dataset(tmp_path / "images", path, all_images=True)
