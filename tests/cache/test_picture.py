"""Rows as pictures: each column shows what is stored, and equal features have equal colours."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import MANIFEST, TAP, make_row
from PIL import Image

from kdcache.cache import codecs
from kdcache.cache.format import describe_row
from kdcache.cache.layout import IMAGE, LOGITS, MASK, ROWS, whole
from kdcache.cache.picture import save_rows
from kdcache.cache.reader import Cache
from kdcache.cache.writer import CacheWriter
from kdcache.drawing import lit, masked
from kdcache.errors import CacheError

CELL, STEP, LINE = 240, 242, 18


def write(path, rows, manifest=MANIFEST):
    with CacheWriter(path, manifest) as writer:
        for key, arrays in rows:
            writer.append(writer.encoded(key, arrays))
    return Cache(path)


def cells(path, row: int) -> list[np.ndarray]:
    """The square pictures of a row of the sheet, without the text between them."""
    with Image.open(path) as picture:
        sheet = np.asarray(picture)
    top = 2 * LINE + row * (CELL + LINE)
    return [sheet[top : top + CELL, x : x + CELL] for x in range(0, sheet.shape[1], STEP)]


def test_photo_mask_and_teacher_are_shown(tmp_path):
    key, arrays = make_row(0)
    left = np.arange(32) < 16
    arrays[IMAGE] = np.full((32, 32, 3), 200, np.uint8)
    arrays[MASK] = np.where(left, 1, 0).astype(np.uint8) * np.ones((32, 1), np.uint8)
    arrays[MASK][:8] = 255
    arrays[LOGITS] = np.where(left, -30, 30).astype(np.float16) * np.ones((32, 1), np.float16)
    save_rows(tmp_path / "p.png", write(tmp_path / "c", [(key, arrays)]))
    photo, mask, teacher, _ = cells(tmp_path / "p.png", 0)
    assert np.array_equal(photo[::30, ::30], np.full((8, 8, 3), 200))
    assert mask[200, 20].tolist() == [200] * 3  # person: as it is
    assert mask[200, 220].tolist() == [60] * 3  # background: darkened
    assert mask[10, 20, 2] < mask[10, 20, 0]  # ignored: yellow
    assert teacher[100, 20].tolist() == [60] * 3
    assert teacher[100, 220].tolist() == [200] * 3


def test_equal_features_have_equal_colours_in_every_row(tmp_path):
    rng = np.random.default_rng(0)
    person, ground = rng.normal(size=(2, 6)).astype(np.float32)
    rows = []
    for number, column in ((0, 0), (1, 2)):
        key, arrays = make_row(number)
        feature = np.broadcast_to(ground[:, None, None], TAP.shape).copy()
        feature[:, :, column : column + 2] = person[:, None, None]
        for name, array in codecs.encode(feature, TAP).items():
            arrays[f"{TAP.folder}/{name}"] = array
        rows.append((key, arrays))
    save_rows(tmp_path / "p.png", write(tmp_path / "c", rows))
    first, second = (cells(tmp_path / "p.png", n)[3] for n in (0, 1))
    assert np.array_equal(first[:, :120], second[:, 120:])
    assert np.array_equal(first[:, 120:], second[:, :120])
    assert np.abs(first[0, 0].astype(int) - first[0, 200]).max() > 200


def test_tap_of_one_channel_and_names_beyond_latin(tmp_path):
    tap = dataclasses.replace(TAP, name="層" * 60, shape=(1, 4, 4), groups=whole(1))
    manifest = dataclasses.replace(MANIFEST, taps=(tap,))
    rows = [make_row(0, manifest=manifest)]
    save_rows(tmp_path / "deep/p.jpg", write(tmp_path / "c", rows, manifest))
    with Image.open(tmp_path / "deep/p.jpg") as picture:
        assert picture.format == "PNG"


def test_asked_rows_are_spread_over_the_cache(tmp_path):
    cache = write(tmp_path / "c", [make_row(number) for number in range(9)])
    for count, shown in ((3, 3), (1, 1), (50, 9)):
        save_rows(tmp_path / "p.png", cache, count)
        with Image.open(tmp_path / "p.png") as picture:
            assert picture.height == LINE + shown * (CELL + LINE)


def test_empty_cache_is_one_clear_error(tmp_path):
    with pytest.raises(CacheError, match="no rows to draw"):
        save_rows(tmp_path / "p.png", write(tmp_path / "c", []))
    assert not (tmp_path / "p.png").exists()


def test_lit_and_masked_keep_the_person():
    image = np.full((2, 2, 3), 100, np.uint8)
    mask = np.array([[1, 0], [254, 255]], np.uint8)
    assert lit(image, mask == 1)[..., 0].tolist() == [[100, 30], [30, 30]]
    assert masked(image, mask)[1, 1].tolist() == [135, 105, 25]


def test_letters_that_the_font_lacks_are_written_as_their_codes(tmp_path):
    key, arrays = make_row(0)
    boxes = {}
    for name in ("人.jpg", "\\u4eba.jpg"):
        arrays[ROWS] = describe_row(key._replace(sample_id=name), {})
        save_rows(
            tmp_path / "p.png", write(tmp_path / name, [(key._replace(sample_id=name), arrays)])
        )
        with Image.open(tmp_path / "p.png") as picture:
            boxes[name] = picture.tobytes()
    assert len(set(boxes.values())) == 1
