"""Sixty-four thousand rows: how many files, and that they open."""

from __future__ import annotations

import hashlib

import numpy as np

from kdcache.cache.format import Commit, RowKey, commit_name, manifest_digest
from kdcache.cache.layout import Group, Manifest, TapSpec
from kdcache.cache.reader import Cache
from kdcache.cache.shard import ObjectRecord
from kdcache.cache.writer import CacheWriter
from kdcache.config import ExtractConfig

ROWS = 64_000


def test_64000_committed_rows_take_under_20000_files(tmp_path):
    """The design's tap in the default settings; shard files are empty, all else is as written."""
    config = ExtractConfig()
    tap = TapSpec(
        name=config.yolo_target_layer,
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
        writer.expect(ROWS)
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
