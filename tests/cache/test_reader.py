"""Reading: checked against commit records, and open to other Zarr readers."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
from conftest import MANIFEST, SIZE, TAP, make_row

import kdcache
from kdcache.cache import reader
from kdcache.cache.reader import Cache
from kdcache.cache.writer import CacheWriter
from kdcache.errors import CacheError

PRECISIONS = ["float32", "float16", "int8", "int6", "int5", "int4"]


@pytest.fixture
def small(tmp_path):
    """A cache of five known rows in two shards."""
    with CacheWriter(tmp_path / "c", MANIFEST) as writer:
        for number in range(5):
            writer.append(writer.encoded(*make_row(number)))
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
    # a slot without a row cannot be mistaken
    assert (group["mask"][5] == 255).all()
    assert np.isnan(group[f"{TAP.folder}/affine"][5]).all()


PAGE = (Path(__file__).parents[2] / "docs/format.md").read_text()


def code_of_page(first_line: str) -> str:
    """The indented block of docs/format.md that starts with `first_line`."""
    start = PAGE.index("    " + first_line)
    return textwrap.dedent(re.match(r"(?:(?:    .*)?\n)+", PAGE[start:])[0])


def page_functions() -> dict[str, Any]:
    names = {"np": np, "math": math}
    for first_line in ("def undo(", "def features("):
        exec(code_of_page(first_line), names)
    return names


@pytest.fixture(params=list(itertools.product(PRECISIONS, ["zstd", "lz4", "none"])))
def any_cache(request, tmp_path):
    """A cache of five known rows in one of all precisions and compressions, named coco.zarr."""
    precision, compression = request.param
    manifest = dataclasses.replace(
        MANIFEST,
        compression=compression,
        logits_dtype="float32" if precision == "float32" else "float16",
        taps=(dataclasses.replace(TAP, precision=precision),),
    )
    with CacheWriter(tmp_path / "coco.zarr", manifest) as writer:
        for number in range(5):
            writer.append(writer.encoded(*make_row(number, manifest=manifest)))
    return tmp_path / "coco.zarr"


def test_the_page_on_the_format_reads_a_cache_with_zarr_and_numpy_alone(any_cache, monkeypatch):
    """The code of docs/format.md, run as it stands there."""
    cache, seen = Cache(any_cache), {}
    code = code_of_page("group = zarr.open_group")
    code += "        seen[index] = sample_id, row['source_bytes'], image, mask, logits, x\n"
    monkeypatch.chdir(any_cache.parent)
    exec(code, page_functions() | {"zarr": zarr, "json": json, "seen": seen})
    assert list(seen) == list(range(5))
    for number, (sample_id, source_bytes, image, mask, logits, x) in seen.items():
        assert (sample_id, source_bytes) == (f"photos/{number}.jpg", number)
        _, arrays = make_row(number, manifest=cache.manifest)
        for read, name in ((image, "image"), (mask, "mask"), (logits, "teacher_logits")):
            assert read.dtype == arrays[name].dtype
            assert np.array_equal(read, arrays[name])
        assert np.array_equal(x, cache[number].features[TAP.name])


def test_tensorstore_reads_every_array(any_cache):
    """A second implementation of Zarr, with the transforms undone by the page's code."""
    cache, page = Cache(any_cache), page_functions()
    for path, values in make_row(4, manifest=cache.manifest)[1].items():
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(any_cache / path)}}
        stored = tensorstore.open(spec, read=True).result()[4].read().result()
        attributes = json.loads((any_cache / path / "zarr.json").read_text())["attributes"]
        assert np.array_equal(page["undo"](stored, attributes), values)


def test_decode_attribute_of_every_array_undoes_its_transform(any_cache):
    for path, array in zarr.open_group(any_cache, mode="r").arrays():
        if "decode" in array.attrs:
            names = {"np": np, "math": math, "stored": array[3]}
            names["shape"] = array.attrs["row"]["shape"]
            exec("\n".join(array.attrs["decode"]), names)
            assert np.array_equal(names["array"], Cache(any_cache).read(3, path))


@pytest.mark.parametrize("array", ["image", "mask", "rows", f"{TAP.folder}/codes_x2"])
def test_flipped_byte_raises_and_names_file_and_sample(small, array):
    path = small / array / f"c.0.{'.'.join('0' * (zarr.open(small / array).ndim - 1))}"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheError, match=r"c\.0\..*photos/0\.jpg"):
        Cache(small).read(0, array)


def test_all_details_are_each_rows_own(any_cache):
    cache = Cache(any_cache)
    assert list(cache.all_details()) == [row.details for row in cache]


@pytest.mark.parametrize(
    ("harm", "row", "match"),
    [
        (lambda data: bytes(data[:3] + bytes([data[3] ^ 1]) + data[4:]), 3, "photos/3.jpg"),
        (lambda data: bytes(data[:-1]), 3, "were committed"),
        (lambda data: bytes(data[:-1] + bytes([data[-1] ^ 1])), 3, "index is damaged"),
    ],
    ids=["flipped", "shorter", "index"],
)
def test_damaged_details_raise_after_those_before(small, harm, row, match):
    path = small / "rows/c.1.0"
    path.write_bytes(harm(path.read_bytes()))
    found, details = [], Cache(small).all_details()
    with pytest.raises(CacheError, match=rf"c\.1\.0.*{match}"):
        found.extend(details)
    assert len(found) == row


def test_what_is_read_is_what_zarr_reads_and_each_index_is_read_once(any_cache, monkeypatch):
    opened, original = [], reader.read_index
    monkeypatch.setattr(
        reader, "read_index", lambda path, *rest: opened.append(path) or original(path, *rest)
    )
    cache = Cache(any_cache)
    for row in (4, 0, 3, 1, 2, 0, 4):
        for path, spec in cache.specs.items():
            out = np.empty(spec.stored.shape, spec.stored.dtype)
            reading = cache.read_stored(row, path, out)
            theirs = zarr.open_array(any_cache / path, mode="r")[row]
            assert out.tobytes() == theirs.tobytes()
            assert reading.size_bytes > 4
    assert len(opened) == len(set(opened)) == len(cache.specs) * len(cache.commits)


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_short_reads_are_continued_and_an_early_end_is_an_error(tmp_path, monkeypatch, compression):
    manifest = dataclasses.replace(MANIFEST, compression=compression)
    with CacheWriter(tmp_path / "c", manifest) as writer:
        for number in range(5):
            writer.append(writer.encoded(*make_row(number, manifest=manifest)))
    expected, preadv = Cache(tmp_path / "c").read(2, "image"), os.preadv

    sizes = itertools.cycle((1000, 999, 3, 1))

    def short(descriptor, into, at):
        return preadv(descriptor, [into[0][: next(sizes)]], at)

    monkeypatch.setattr(os, "preadv", short)
    assert np.array_equal(Cache(tmp_path / "c").read(2, "image"), expected)
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: 0)
    with pytest.raises(CacheError, match="ends .* bytes early"):
        Cache(tmp_path / "c").read(2, "image")


@pytest.mark.parametrize("compression", ["zstd", "lz4", "none"])
def test_a_file_that_changes_after_it_was_read_is_checked_again(tmp_path, compression):
    """Chunks that were right are not checked twice, as long as nobody writes to the file."""
    manifest = dataclasses.replace(MANIFEST, compression=compression)
    with CacheWriter(tmp_path / "c", manifest) as writer:
        for number in range(3):
            writer.append(writer.encoded(*make_row(number, manifest=manifest)))
    cache = Cache(tmp_path / "c")
    expected = cache.read(0, "mask")
    for _ in range(2):
        assert np.array_equal(cache.read(0, "mask"), expected)
    path = tmp_path / "c" / cache.specs["mask"].shard_path(0)
    times = os.stat(path)
    data = bytearray(path.read_bytes())
    data[cache.locate(0, "mask")[1] + 9] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # its ctime tells all the same
    with pytest.raises(CacheError, match="c.0"):
        cache.read(0, "mask")


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
            writer.append(writer.encoded(*make_row(number)))
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
