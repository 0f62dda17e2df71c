"""The rows of an epoch: each sample once, in one of its views, in an order that its number decides."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from kdcache.cache.reader import Cache

T = TypeVar("T")


def samples_of(cache: Cache, split: str, views: int = 0) -> list[list[int]]:
    """The row numbers of each sample of a split, by view; only of views below `views`, 0 is all.

    Samples are in the order of their first rows. Of a split other than train it is view 0 alone:
    a metric must not move because another view was looked at.
    """
    below = views if split == "train" else 1
    found: dict[str, list[int]] = defaultdict(list)
    for row in cache.rows_of(split):
        if not below or cache.keys[row].view < below:
            found[cache.keys[row].sample_id].append(row)
    return [sorted(rows, key=lambda row: cache.keys[row].view) for rows in found.values()]


def epoch_rows(
    cache: Cache, samples: Sequence[Sequence[int]], seed: int, epoch: int, *, shuffle: bool = True
) -> list[int]:
    """A row of each sample; over as many epochs as a sample has views, each of them once.

    Which view it is depends on (seed, sample id, epoch) and on nothing else, so one epoch mixes
    views, and a sample whose other views are still to be extracted goes round its own. The order
    is that of `shuffled`, or without `shuffle` that of the samples.
    """
    rows = [views[_turn(cache, views, seed, epoch) % len(views)] for views in samples]
    return shuffled(rows, seed, epoch) if shuffle else rows


def _turn(cache: Cache, views: Sequence[int], seed: int, epoch: int) -> int:
    """How far a sample has gone round its views."""
    if len(views) == 1:
        return 0
    sample_id = cache.keys[views[0]].sample_id
    digest = hashlib.sha256(f"view:{seed}:{sample_id}".encode()).digest()
    return int.from_bytes(digest, "big") + epoch


def shuffled(items: Sequence[T], seed: int, epoch: int) -> list[T]:
    """The same in the order of an epoch, which (seed, epoch) decides."""
    return [items[i] for i in np.random.default_rng([seed, epoch]).permutation(len(items))]
