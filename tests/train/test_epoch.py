"""An epoch holds each sample once, in one of its views, and each view in its turn."""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from training import (
    FAST,
    assert_resumes_bit_for_bit,
    config,
    metrics,
    state_digest,
    train,
    with_views,
)

import kdcache
from kdcache.cache.format import RowKey
from kdcache.deploy.evaluate import evaluate
from kdcache.deploy.export import _calibration
from kdcache.errors import ConfigError
from kdcache.train import loop
from kdcache.train.epoch import epoch_rows, samples_of, shuffled
from kdcache.train.parallel import Processes


class Keys:
    """As much of a cache as the choice of rows looks at."""

    def __init__(self, keys):
        self.keys = keys

    def rows_of(self, split):
        return [n for n, key in enumerate(self.keys) if key.split == split]


def keys_of(views):
    """Keys of train samples with so many views each, and of one val sample."""
    keys = [RowKey("train", f"{n}.jpg", v) for n, count in enumerate(views) for v in range(count)]
    return [*keys, RowKey("val", "v.jpg", 0)]


def chosen(keys, seed, epoch, views=0):
    cache = Keys(keys)
    return [keys[row] for row in epoch_rows(cache, samples_of(cache, "train", views), seed, epoch)]


VIEWS = st.lists(st.integers(1, 5), min_size=1, max_size=12)
SEED, EPOCH = st.integers(0, 2**63 - 1), st.integers(0, 10**4)


@given(VIEWS, SEED, EPOCH)
def test_over_as_many_epochs_as_there_are_views_each_is_used_once(views, seed, start):
    for n, count in enumerate(views):
        seen = [
            key.view
            for epoch in range(start, start + count)
            for key in chosen(keys_of(views), seed, epoch)
            if key.sample_id == f"{n}.jpg"
        ]
        assert sorted(seen) == list(range(count))


@given(VIEWS, SEED, EPOCH, st.randoms())
def test_the_view_depends_on_seed_sample_and_epoch_alone(views, seed, epoch, random):
    keys = keys_of(views)
    expected = set(chosen(keys, seed, epoch))
    assert len(expected) == len(views)
    random.shuffle(keys)
    assert set(chosen(keys, seed, epoch)) == expected
    few = [key for key in keys if key.sample_id == "0.jpg"]  # beside no other sample
    assert set(chosen(few, seed, epoch)) < expected | {None}


@given(st.integers(1, 40), SEED, EPOCH)
def test_with_one_view_the_order_is_that_of_the_rows_shuffled(samples, seed, epoch):
    keys = keys_of([1] * samples)
    rows = Keys(keys).rows_of("train")
    assert chosen(keys, seed, epoch) == [keys[row] for row in shuffled(rows, seed, epoch)]
    order = np.random.default_rng([seed, epoch]).permutation(samples)
    assert shuffled(rows, seed, epoch) == [rows[n] for n in order]


def test_an_epoch_mixes_views_evenly():
    counts = Counter(key.view for key in chosen(keys_of([4] * 2000), 0, 0))
    assert sorted(counts) == [0, 1, 2, 3]
    assert min(counts.values()) > 430  # of 500 each


def test_only_the_first_views_are_taken_where_that_is_asked_for():
    keys = keys_of([4, 1, 3])
    assert {key.view for e in range(8) for key in chosen(keys, 0, e, views=2)} == {0, 1}
    assert {key.view for key in chosen(keys, 0, 5, views=1)} == {0}
    lost = [key for key in keys if key != RowKey("train", "0.jpg", 0)]
    assert {key.sample_id for key in chosen(lost, 0, 0, views=1)} == {"1.jpg", "2.jpg"}


def test_validation_has_view_0_whatever_there_is():
    keys = [RowKey("val", "a.jpg", view) for view in (2, 0, 1)]
    assert samples_of(Keys(keys), "val", views=3) == [[1]]


@given(VIEWS, st.integers(2, 4), st.integers(1, 3))
def test_processes_share_the_samples(views, count, batch_size):
    keys = keys_of(views)
    cache, settings = Keys(keys), config(batch_size=batch_size)
    order = epoch_rows(cache, samples_of(cache, "train"), 0, 3)
    plans = [loop._steps(order, settings, Processes(rank, count)) for rank in range(count)]
    assert len({len(plan) for plan in plans}) == 1
    taken = [row for plan in plans for step in plan for rows in step for row in rows]
    assert sorted(taken) == sorted(order)


@pytest.fixture(scope="module")
def viewed(cache, tmp_path_factory):
    """Three views of most train samples, two and one of others."""
    path = tmp_path_factory.mktemp("viewed") / "c"
    train = [key for key in cache.keys if key.split == "train"]
    counts = dict.fromkeys(train, 3) | {train[0]: 2, train[1]: 1}
    return with_views(cache, path, lambda key: counts.get(key, 1))


def test_batches_hold_each_sample_once(cache, viewed):
    samples = {key.sample_id for key in cache.keys if key.split == "train"}
    seen = Counter()
    for epoch in range(6):
        keys = [k for b in kdcache.train.batches(viewed, 3, epoch=epoch) for k in b.keys]
        assert sorted(key.sample_id for key in keys) == sorted(samples)
        seen.update(keys)
    assert set(seen) == {key for key in viewed.keys if key.split == "train"}
    assert set(seen.values()) == {2, 3, 6}
    in_order = [k for b in kdcache.train.batches(viewed, shuffle=False, epoch=1) for k in b.keys]
    assert [key.sample_id for key in in_order] == list(dict.fromkeys(k.sample_id for k in in_order))
    first = [k.view for b in kdcache.train.batches(viewed, views=1, epoch=2) for k in b.keys]
    assert set(first) == {0}
    with pytest.raises(ConfigError, match="views = -1: expected 0 or more"):
        kdcache.train.batches(viewed, views=-1)


def test_one_of_several_views_trains_as_the_cache_of_one(cache, viewed, tmp_path, caplog):
    caplog.set_level(logging.INFO, "kdcache")
    train(cache, tmp_path / "one")
    assert "views" not in caplog.text
    train(viewed, tmp_path / "first", views=1)
    assert "views" not in caplog.text
    assert state_digest(tmp_path / "first") == state_digest(tmp_path / "one")
    assert metrics(tmp_path / "first") == metrics(tmp_path / "one")


def test_a_run_says_how_many_views_there_are(viewed, tmp_path, caplog):
    caplog.set_level(logging.INFO, "kdcache")
    train(viewed, tmp_path / "run", views=5, epochs=1)
    samples = len({key.sample_id for key in viewed.keys if key.split == "train"})
    assert f"{samples} train samples in 3 views (2 of them in fewer): an epoch holds" in caplog.text
    assert "views = 5" in caplog.text
    assert "has 3 of a train sample at most" in caplog.text


@pytest.mark.parametrize("augment", ["none", "heavy"])
def test_resume_in_mid_epoch_goes_on_in_the_same_views(viewed, tmp_path, augment):
    steps = -(-len(samples_of(viewed, "train")) // FAST["batch_size"])
    assert_resumes_bit_for_bit(viewed, tmp_path, steps + 1, student_augment=augment)


def test_a_student_is_evaluated_and_calibrated_on_view_0(cache, viewed, run):
    """So the numbers are those of the cache of one view; there the views of a sample lie apart."""
    for split in ("train", "val"):
        assert evaluate(run, viewed, split).scores == evaluate(run, cache, split).scores
    ours, theirs = (list(_calibration(one, 4, True, 1)) for one in (viewed, cache))
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_training_looks_at_view_0_of_validation_rows_alone(cache, tmp_path):
    both = with_views(cache, tmp_path / "c", lambda key: 2 if key.split == "val" else 1)
    for name, one in (("one", cache), ("two", both)):
        train(one, tmp_path / name, epochs=1)
    assert metrics(tmp_path / "two") == metrics(tmp_path / "one")
    assert metrics(tmp_path / "two")[0]["val_agreement"] is not None
