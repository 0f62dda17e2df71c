"""Sixty-four thousand rows: how many files, and that they open. What grows with a cache, in counts."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import MANIFEST, make_row

from kdcache.cache.format import Commit, RowKey, commit_name, manifest_digest
from kdcache.cache.layout import Group, Manifest, TapSpec
from kdcache.cache.need import Need
from kdcache.cache.reader import Cache
from kdcache.cache.shard import ObjectRecord
from kdcache.cache.writer import CacheWriter
from kdcache.config import ExtractConfig

ROWS = 64_000


def entries(path):
    """Files and folders of a cache, its own included; `kdcache plan` foretells them, and two more."""
    return 1 + sum(1 for _ in path.rglob("*"))


def test_64000_committed_rows_take_under_20000_files(tmp_path):
    """The design's tap in the default settings; shard files are empty, all else is as written."""
    config = ExtractConfig()
    tap = TapSpec(
        name=config.yolo_target_layer[0],
        precision=config.precision,
        shape=(1024, 80, 80),
        groups=(Group(1, ((512, 1024),)), Group(2, ((0, 512),))),
    )
    manifest = Manifest(
        size_px=config.size,
        shard_rows=config.shard_rows,
        compression=config.compression,
        logits_dtype="float16",
        taps=(tap,),
        fingerprint={},
        versions={},
    )
    out = tmp_path / "c"
    with CacheWriter(out, manifest) as writer:
        writer.expect(ROWS // config.shard_rows)
    rng, digest_of_all = np.random.default_rng(0), manifest_digest(manifest)
    for shard in range(ROWS // config.shard_rows):
        first = shard * config.shard_rows
        names = [f"COCO_train2017_{first + slot:012d}.jpg" for slot in range(config.shard_rows)]
        objects = {}
        for spec in manifest.arrays():
            (out / spec.shard_path(shard)).touch()
            digest = hashlib.sha256(rng.bytes(8)).hexdigest()
            checksums = rng.bytes(4 * config.shard_rows).hex()
            objects[spec.path] = ObjectRecord(
                size_bytes=10**8, sha256=digest, chunk_crc32c=checksums
            )
        keys = tuple(RowKey("train", name, 0) for name in names)
        (out / commit_name("commits", shard)).parent.mkdir()
        (out / commit_name("commits", shard)).write_bytes(
            Commit(shard=shard, manifest=digest_of_all, keys=keys, objects=objects).document()
        )
    cache = Cache(out)
    assert len(cache) == len(cache.samples) == ROWS
    assert cache.samples[-1] == f"COCO_train2017_{ROWS - 1:012d}.jpg"
    assert sum(path.is_file() for path in out.rglob("*")) < 20_000
    assert Need.of(manifest.arrays(), config.shard_rows, 0, ROWS).files == entries(out) + 2


@pytest.mark.parametrize("shard_rows", [1, 3, 8])
def test_written_rows_take_the_files_that_were_planned(tmp_path, shard_rows):
    manifest = dataclasses.replace(MANIFEST, shard_rows=shard_rows)
    with CacheWriter(tmp_path / "c", manifest) as writer:
        for number in range(7):
            writer.append(writer.encoded(*make_row(number, manifest=manifest)))
    assert Need.of(manifest.arrays(), shard_rows, 0, 7).files == entries(tmp_path / "c") + 2


# `opened` is how often a file of the cache was opened, by whatever means.
COUNTED = """
import sys
from pathlib import Path
from kdcache.cache.format import read_root
from kdcache.cache.info import describe
from kdcache.cache.reader import Cache
from kdcache.cache.writer import CacheWriter

path, opened = sys.argv[1], []

def listen(event, args):
    if event == "open" and str(args[0]).startswith(path) and not Path(args[0]).is_dir():
        opened.append(args[0])

def count(action):
    opened.clear()
    action()
    print(len(opened))

sys.addaudithook(listen)
cache, manifest = Cache(path), read_root(Path(path)).manifest
count(lambda: Cache(path))
count(lambda: describe(cache))
count(lambda: cache[len(cache) - 1].mask)
count(lambda: list(cache.all_details()))
count(lambda: CacheWriter(Path(path), manifest).__exit__(None, None, None))
"""


def counts(path, shards):
    """Files opened by: open, info beside it, one read, all rows' details, a writer."""
    rows = shards * MANIFEST.shard_rows
    with CacheWriter(path, MANIFEST) as writer:
        for number in range(rows):
            writer.append(writer.encoded(*make_row(number)))
    program = [sys.executable, "-c", COUNTED, str(path)]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


def test_files_that_are_opened_grow_with_the_shards_as_docs_scale_says(tmp_path):
    few, more = counts(tmp_path / "4", shards=4), counts(tmp_path / "9", shards=9)
    assert few[:3] == [1 + 4, 1, 2]
    assert [b - a for a, b in zip(few, more, strict=True)] == [5, 0, 0, 5, 5]


def test_a_writer_looks_for_its_next_shard_from_the_last(tmp_path):
    """From the first each time, an extraction would take a time quadratic in its shards."""
    asked = []

    class Counted(set):
        def __contains__(self, number):
            asked.append(number)
            return super().__contains__(number)

    manifest = dataclasses.replace(MANIFEST, shard_rows=1)
    with CacheWriter(tmp_path / "c", manifest) as writer:
        writer._shards = Counted()
        for number in range(40):
            writer.append(writer.encoded(*make_row(number, manifest=manifest)))
    assert len(asked) <= 20 * 40
