"""Reading: checked against commit records, and open to other Zarr readers."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr
from conftest import MANIFEST, SIZE, TAP, make_row

import kdcache
from kdcache.cache.reader import Cache
from kdcache.cache.writer import CacheWriter
from kdcache.errors import CacheError


@pytest.fixture
def small(tmp_path):
    """A cache of five known rows in two shards."""
    with CacheWriter(tmp_path / "c", MANIFEST) as writer:
        for number in range(5):
            writer.append(*make_row(number))
    return tmp_path / "c"


def test_rows_have_the_documented_parts(cache):
    row = cache[0]
    assert (row.split, row.view) == ("train", 0)
    assert row.sample_id in cache.samples
    assert row.image.shape == (SIZE, SIZE, 3)
    assert row.image.dtype == np.uint8
    assert set(np.unique(row.mask)) == {0, 1}
    assert row.teacher_logits.dtype == np.float16
    (tap,) = cache.taps
    assert row.features[tap].shape == (16, SIZE // 8, SIZE // 8)
    assert row.features[tap].dtype == np.float32
    assert row.details["source_height_px"] == 90
    assert len(list(cache)) == len(cache) == 10
    with pytest.raises(IndexError):
        cache[10]


def test_plain_zarr_lists_the_cache_and_ties_every_row_to_its_sample(small):
    group = zarr.open_group(small, mode="r")
    members = dict(group.members(max_depth=None))  # a warning would fail this test
    assert {"image", "mask", "teacher_logits", "rows"} <= members.keys()
    described = [bytes(row).rstrip(b"\0") for row in group["rows"][:]]
    found = {json.loads(text)["sample_id"]: i for i, text in enumerate(described) if text}
    assert found == {f"photos/{n}.jpg": n for n in range(5)}
    for number in range(5):
        for path, values in make_row(number)[1].items():
            assert np.array_equal(group[path][number], values)
    assert np.isnan(group["teacher_logits"][5]).all()  # a slot without a row cannot be mistaken


def test_the_page_on_the_format_reads_a_cache_with_zarr_alone(small, monkeypatch):
    """The code of docs/format.md, run as it stands there."""
    page = (Path(__file__).parents[2] / "docs/format.md").read_text()
    code = page[
        page.index("    group = zarr.open_group") : page.index("Without the commit records")
    ]
    code = textwrap.dedent(code) + "\n        seen[index] = sample_id, row['source_bytes'], image\n"
    monkeypatch.chdir(small.parent)
    small.rename("coco.zarr")
    seen = {}
    exec(code, {"zarr": zarr, "json": json, "seen": seen})
    assert {n: pair[:2] for n, pair in seen.items()} == {
        n: (f"photos/{n}.jpg", n) for n in range(5)
    }
    assert all(np.array_equal(seen[n][2], make_row(n)[1]["image"]) for n in range(5))


def test_tensorstore_reads_every_array(small):
    for path, values in make_row(4)[1].items():
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(small / path)}}
        array = tensorstore.open(spec, read=True).result()
        assert np.array_equal(array[4].read().result(), values)


def test_features_decode_as_the_group_attributes_say(small):
    group = zarr.open_group(small / TAP.folder, mode="r")
    names = {"codes": group["codes"][2], "affine": group["affine"][2], "float32": np.float32}
    by_formula = eval(group.attrs["decode"], {}, names)
    assert np.array_equal(by_formula, Cache(small)[2].features[TAP.name])


@pytest.mark.parametrize("array", ["image", "mask", "rows", f"{TAP.folder}/codes"])
def test_flipped_byte_raises_and_names_file_and_sample(small, array):
    path = small / array / f"c.0.{'.'.join('0' * (zarr.open(small / array).ndim - 1))}"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheError, match=r"c\.0\..*photos/0\.jpg"):
        Cache(small).read(0, array)


def test_truncated_and_missing_shards_raise(small):
    path = small / "image/c.1.0.0.0"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(CacheError, match="committed"):
        Cache(small).read(3, "image")
    path.unlink()
    with pytest.raises(CacheError, match="No such file"):
        Cache(small).read(3, "image")


def test_swapped_shards_of_equal_size_raise(tmp_path):
    """Compressed sizes of random pixels agree, so only the committed checksums tell."""
    with CacheWriter(tmp_path / "c", MANIFEST) as writer:
        for number in range(6):
            writer.append(*make_row(number))
    first, second = tmp_path / "c/image/c.0.0.0.0", tmp_path / "c/image/c.1.0.0.0"
    assert first.stat().st_size == second.stat().st_size
    shutil.move(first, tmp_path / "aside")
    shutil.move(second, first)
    shutil.move(tmp_path / "aside", second)
    for row in range(6):
        with pytest.raises(CacheError, match="differs from the committed one"):
            Cache(tmp_path / "c").read(row, "image")


@pytest.mark.parametrize("path", ["zarr.json", "commits/000001/zarr.json"])
def test_edited_records_are_refused(small, path):
    text = (small / path).read_text()
    edited = text.replace("photos/3.jpg", "photos/9.jpg").replace(
        '"yolo_sha256": "a', '"yolo_sha256": "b'
    )
    assert edited != text
    (small / path).write_text(edited)
    with pytest.raises(CacheError, match="changed after it was written"):
        kdcache.open(small)


def test_newer_format_is_refused_by_version(small):
    text = (small / "zarr.json").read_text()
    (small / "zarr.json").write_text(text.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(CacheError, match="version 2.*reads version 1"):
        kdcache.open(small)


def test_missing_cache_and_unknown_tap_are_clear(small, tmp_path):
    with pytest.raises(CacheError, match="kdcache extract"):
        kdcache.open(tmp_path / "nowhere")
    with pytest.raises(CacheError, match=f"no tap 'head'.*{TAP.name}"):
        kdcache.open(small).tap("head")
    with pytest.raises(CacheError, match="local"):
        kdcache.open("s3://bucket/c.zarr")


def test_a_cache_shows_the_shards_asked_for_and_misses_lost_ones(small):
    assert Cache(small, shards=[1]).samples == ["photos/3.jpg", "photos/4.jpg"]
    with pytest.raises(CacheError, match=r"\[7\]"):
        Cache(small, shards=[0, 7])


def test_a_cache_survives_pickling(small):
    copy = pickle.loads(pickle.dumps(Cache(small)))
    assert np.array_equal(copy[4].image, Cache(small)[4].image)


def test_opening_needs_neither_torch_nor_onnxruntime(cache):
    code = (
        "import sys, kdcache; cache = kdcache.open(sys.argv[1]); row = cache[0]; "
        "row.image, row.features[cache.taps[0]]; "
        "assert not {'torch', 'onnxruntime', 'onnx', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(cache.path)], check=True)
