"""Batches from a cache: rows read and decoded in threads, a bounded number of batches ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.cache.format import RowKey
from kdcache.cache.layout import IMAGE, LOGITS, MASK
from kdcache.cache.reader import Cache
from kdcache.train.student import normalised

# Batches read ahead of the step that uses them; each costs its decoded size in memory.
_AHEAD = 2


@dataclass(frozen=True, kw_only=True)
class Batch:
    """N rows on one device."""

    image: Tensor  # (N, 3, H, W) float32, ImageNet-normalised
    mask: Tensor  # (N, 1, H, W) uint8: 0 background, 1 person, 254 padding, 255 ignore
    logits: Tensor | None  # (N, 1, H, W) float32, the teacher's; None where the cache has none
    features: dict[str, Tensor]  # tap to (N, C, h, w) float32
    keys: list[RowKey]


def batches(
    cache: Cache,
    batch_size: int = 4,
    device: str | torch.device = "cpu",
    *,
    split: str = "train",
    taps: Sequence[str] | None = None,
    shuffle: bool = True,
    seed: int = 0,
    epoch: int = 0,
    workers: int = 2,
) -> Iterator[Batch]:
    """One epoch over a split: every row once, in an order that (seed, epoch) decides.

    `taps` names the feature maps to read; None is all of them, an empty list reads no feature
    byte. The last batch may be smaller.
    """
    rows = cache.rows_of(split)
    if shuffle:
        rows = shuffled(rows, seed, epoch)
    chosen = cache.taps if taps is None else taps
    return read_batches(cache, chunked(rows, batch_size), device, chosen, workers)


def shuffled(rows: Sequence[int], seed: int, epoch: int) -> list[int]:
    """The rows in the order of an epoch, which (seed, epoch) decides."""
    return [rows[i] for i in np.random.default_rng([seed, epoch]).permutation(len(rows))]


def chunked(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    """Consecutive pieces of `size` rows; the last may be smaller."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def read_batches(
    cache: Cache,
    groups: Iterable[Sequence[int]],
    device: str | torch.device,
    taps: Sequence[str],
    workers: int = 2,
) -> Iterator[Batch]:
    """One batch for each group of row numbers, in order."""
    waiting: deque[tuple[Sequence[int], list[Future[_Parts]]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="loader")
    try:
        for chosen in groups:
            waiting.append((chosen, [pool.submit(_read_row, cache, row, taps) for row in chosen]))
            if len(waiting) > _AHEAD:
                yield _collate(cache, *waiting.popleft(), device)
        while waiting:
            yield _collate(cache, *waiting.popleft(), device)
    finally:
        pool.shutdown(cancel_futures=True)


_Parts = dict[str, NDArray[np.generic]]


def _read_row(cache: Cache, row: int, taps: Sequence[str]) -> _Parts:
    parts = {name: cache.read(row, name) for name in (IMAGE, MASK)}
    if cache.has_logits:
        parts[LOGITS] = cache.read(row, cache.manifest.logits_path)
    return parts | {tap: cache.decode_features(row, cache.tap(tap)) for tap in taps}


def _collate(
    cache: Cache, rows: Sequence[int], parts: list[Future[_Parts]], device: str | torch.device
) -> Batch:
    columns = [future.result() for future in parts]
    stacked = {
        name: torch.from_numpy(np.stack([part[name] for part in columns])).to(device)
        for name in columns[0]
    }
    image, mask, logits = stacked.pop(IMAGE), stacked.pop(MASK), stacked.pop(LOGITS, None)
    return Batch(
        image=normalised(image),
        mask=mask[:, None],
        logits=None if logits is None else logits[:, None].float(),
        features=stacked,
        keys=[cache.keys[row] for row in rows],
    )
