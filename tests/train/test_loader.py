"""Batches: every row once, in a seeded order, and only what is asked for is read."""

from __future__ import annotations

import dataclasses
import gc
import os
import re
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MANIFEST, TAP, make_row

import kdcache
from kdcache.cache.reader import Cache, Reading
from kdcache.cache.writer import CacheWriter
from kdcache.errors import CacheError, ConfigError
from kdcache.pixels import normalised
from kdcache.train.loader import Tally, _decoded, chunked, read_stored


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
    read, original = set(), Cache.read_stored

    def noted(self, row, array, out):
        read.add(array)
        return original(self, row, array, out)

    monkeypatch.setattr(Cache, "read_stored", noted)
    ids(cache, taps=[])
    assert read == {"image", "mask", "teacher_logits"}


def test_stored_rows_come_in_memory_that_is_used_again(cache):
    """As many batches as the docstring says, and no byte but the rows' own."""
    arrays, rows = list(cache.specs), list(range(len(cache)))
    tally, places, seen = Tally(), set(), []
    for group, stored in read_stored(cache, chunked(rows, 2), arrays, tally=tally):
        places.add(stored["image"].data_ptr())
        for n, row in enumerate(group):
            seen.append(row)
            for path, spec in cache.specs.items():
                assert np.array_equal(spec.undo(stored[path][n].numpy()), cache.read(row, path))
    assert seen == rows
    assert len(places) == 3
    stored_bytes = sum(o.size_bytes for c in cache.commits for o in c.objects.values())
    slots, shards = cache.manifest.shard_rows, len(cache.commits)
    assert tally.size_bytes == stored_bytes - shards * len(arrays) * (16 * slots + 4)
    assert tally.bytes_per_s > 0


def test_a_batch_stays_what_it_was_when_the_next_ones_come(cache):
    batches = list(kdcache.train.batches(cache, batch_size=1, shuffle=False))
    again = kdcache.train.batches(cache, batch_size=1, shuffle=False)
    (tap,) = cache.taps
    for kept, fresh in zip(batches, again, strict=True):
        assert torch.equal(kept.image, fresh.image)
        assert torch.equal(kept.features[tap], fresh.features[tap])


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "int6", "int5", "int4"])
@pytest.mark.parametrize("compression", ["zstd", "lz4", "none"])
def test_decoded_where_it_will_be_used_it_is_the_same(tmp_path, precision, compression):
    """What a GPU does with a whole batch, in torch on the CPU: bit for bit what numpy makes of rows."""
    manifest = dataclasses.replace(
        MANIFEST,
        compression=compression,
        logits_dtype="float32" if precision == "float32" else "float16",
        taps=(dataclasses.replace(TAP, precision=precision),),
    )
    with CacheWriter(tmp_path / "c", manifest) as writer:
        for number in range(3):
            writer.append(writer.encoded(*make_row(number, manifest=manifest)))
    cache = Cache(tmp_path / "c")
    arrays = [path for path in cache.specs if path != "rows"]
    ((_, stored),) = read_stored(cache, [range(3)], arrays)
    parts = _decoded(cache, stored, list(cache.manifest.taps))
    for n, row in enumerate(cache):
        assert np.array_equal(parts["image"][n].numpy(), row.image)
        assert np.array_equal(parts["mask"][n].numpy(), row.mask)
        assert np.array_equal(parts["teacher_logits"][n].numpy(), row.teacher_logits)
        assert np.array_equal(parts[TAP.name][n].numpy(), row.features[TAP.name])


def test_no_thread_that_decoded_is_about_to_end(cache):
    """OpenCV would hold a lock in it: a child forked at that moment would wait for it for ever."""
    rounds = []
    for _ in range(2):
        assert ids(cache, workers=3)
        rounds.append({t.ident for t in threading.enumerate() if t.name.startswith("decode")})
    assert rounds[0] <= rounds[1]
    assert rounds[0]


_CHILDREN = """
import multiprocessing, sys
import torch
import kdcache
from kdcache import pixels

def read(cache):
    pixels.normalised(torch.zeros(8, 256, 256, 3, dtype=torch.uint8))  # large enough for threads
    return [key.sample_id for batch in kdcache.train.batches(cache) for key in batch.keys]

def child(cache, queue):
    queue.put(read(cache))

if __name__ == "__main__":
    torch.set_num_threads(2)
    cache = kdcache.open(sys.argv[1])
    expected = read(cache)
    context = multiprocessing.get_context(sys.argv[2])
    queue = context.Queue()
    for _ in range(2):
        context.Process(target=child, args=(cache, queue), daemon=True).start()
    assert [queue.get(timeout=60) for _ in range(2)] == [expected, expected]
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_cache_is_read_in_child_processes(cache, method, tmp_path):
    """Also after their parent has read: they do not wait for its threads, which a fork does not copy.

    Parents are processes of their own: what the tests before have left in this one, such as another
    library's thread with a lock, would be copied too. `make test` lets OpenMP have one thread, with
    which there is nothing to wait for.
    """
    script = tmp_path / "children.py"
    script.write_text(_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    command = [sys.executable, str(script), str(cache.path), method]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"split": "trian"}, CacheError, "no rows of split 'trian'; it has train, val"),
        ({"taps": "relu"}, CacheError, "has no tap 'relu'"),
        ({"batch_size": 0}, ConfigError, "batch_size = 0: expected 1 or more"),
        ({"workers": 0}, ConfigError, "workers = 0: expected 1 or more"),
    ],
)
def test_a_mistake_is_told_when_batches_are_asked_for(cache, options, error, words):
    with pytest.raises(error, match=words):
        kdcache.train.batches(cache, **options)


def test_a_tap_may_be_given_by_its_name_alone(cache):
    (tap,) = cache.taps
    assert set(next(kdcache.train.batches(cache, taps=tap)).features) == {tap}


def test_the_loader_keeps_no_batch_that_was_given_away(cache):
    source = kdcache.train.batches(cache, batch_size=2)
    batch = next(source)
    parts = [weakref.ref(t) for t in (batch.image, batch.mask, *batch.features.values())]
    del batch
    gc.collect()
    assert [part() for part in parts] == [None] * len(parts)
    source.close()


def test_readings_at_the_same_time_count_their_time_once():
    tally = Tally()
    tally.add([Reading(10, 1.0, 2.0), Reading(10, 1.5, 3.0)])  # two threads, 2 s in all
    tally.add([Reading(20, 2.5, 4.0), Reading(20, 6.0, 7.0)])  # goes on, then comes a pause
    assert (tally.size_bytes, tally.seconds) == (60, 4.0)
    assert tally.bytes_per_s == 15.0
    tally.clear()
    assert tally.bytes_per_s == 0.0


def test_a_damaged_row_stops_the_epoch_by_name(cache, tmp_path):
    import shutil

    shutil.copytree(cache.path, tmp_path / "c")
    (tmp_path / "c/mask/c.0.0.0").write_bytes(b"")
    with pytest.raises(CacheError, match="mask/c.0.0.0"):
        ids(Cache(tmp_path / "c"))


def test_the_page_for_other_trainers_runs_as_it_stands(cache, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs/own_trainer.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "coco.zarr").symlink_to(cache.path)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert torch.isfinite(names["distilled"] + names["feature"])
    assert names["feature"].requires_grad
