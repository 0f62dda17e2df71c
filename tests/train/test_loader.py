"""Batches: every row once, in a seeded order, and only what is asked for is read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import kdcache
from kdcache.cache.reader import Cache
from kdcache.errors import CacheError
from kdcache.train.student import normalised


def ids(cache, **options):
    return [
        key.sample_id for batch in kdcache.train.batches(cache, **options) for key in batch.keys
    ]


def test_an_epoch_holds_each_row_of_the_split_once(cache):
    train = sorted(cache.keys[row].sample_id for row in cache.rows_of("train"))
    assert sorted(ids(cache, batch_size=3)) == train
    val = [cache.keys[row].sample_id for row in cache.rows_of("val")]
    assert ids(cache, split="val", shuffle=False) == val


def test_order_depends_on_seed_and_epoch_alone(cache):
    first = ids(cache, seed=1, epoch=2)
    assert first == ids(cache, seed=1, epoch=2, batch_size=1, workers=1)
    assert first != ids(cache, seed=1, epoch=3)
    assert first != ids(cache, seed=2, epoch=2)


def test_batches_hold_the_rows_as_documented(cache):
    (tap,) = cache.taps
    for batch in kdcache.train.batches(cache, batch_size=3):
        for n, key in enumerate(batch.keys):
            row = cache[cache.keys.index(key)]
            image = torch.from_numpy(row.image[None].copy())
            assert torch.equal(batch.image[n], normalised(image)[0])
            assert np.array_equal(batch.mask[n, 0], row.mask)
            assert np.array_equal(batch.logits[n, 0], row.teacher_logits.astype(np.float32))
            assert np.array_equal(batch.features[tap][n], row.features[tap])


def test_without_taps_no_feature_byte_is_read(cache, monkeypatch):
    read = []
    original = Cache.read
    monkeypatch.setattr(
        Cache, "read", lambda self, row, array: read.append(array) or original(self, row, array)
    )
    ids(cache, taps=[])
    assert set(read) == {"image", "mask", "teacher_logits"}


def test_a_damaged_row_stops_the_epoch_by_name(cache, tmp_path):
    import shutil

    shutil.copytree(cache.path, tmp_path / "c")
    (tmp_path / "c/mask/c.0.0.0").write_bytes(b"")
    with pytest.raises(CacheError, match="mask/c.0.0.0"):
        ids(Cache(tmp_path / "c"))
