"""Batches from a cache: rows read and decoded in threads, a bounded number of batches ahead."""

from __future__ import annotations

import contextlib
import functools
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.cache import codecs
from kdcache.cache.format import RowKey
from kdcache.cache.layout import IMAGE, LOGITS, MASK, TapSpec
from kdcache.cache.reader import Cache, Reading
from kdcache.errors import CacheError, ConfigError
from kdcache.pixels import normalised
from kdcache.places import THREADS_AT_URL, Url
from kdcache.train.epoch import epoch_rows, samples_of

T = TypeVar("T")

# Batches read ahead of the step that uses them; each costs its stored size in memory.
_AHEAD = 2

# The threads of an OpenMP pool do not survive a fork, and torch would wait for them for ever.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


@dataclass
class Tally:
    """What a loader took from the storage so far."""

    size_bytes: int = 0
    seconds: float = 0.0  # in which a thread at least waited for them
    _until: float = 0.0  # the end of these seconds

    def add(self, readings: Iterable[Reading]) -> None:
        """Count what was read, by threads that waited at the same time or not."""
        for reading in sorted(readings, key=lambda reading: reading.started):
            self.size_bytes += reading.size_bytes
            self.seconds += max(0.0, reading.ended - max(reading.started, self._until))
            self._until = max(self._until, reading.ended)

    def clear(self) -> None:
        """Begin anew."""
        self.size_bytes, self.seconds = 0, 0.0

    @property
    def bytes_per_s(self) -> float:
        """What the storage gave while it was asked."""
        return self.size_bytes / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, kw_only=True)
class Batch:
    """N rows on one device."""

    image: Tensor  # (N, 3, H, W) float32, ImageNet-normalised
    mask: Tensor  # (N, 1, H, W) uint8: 0 background, 1 person, 254 padding, 255 ignore
    logits: Tensor | None  # (N, 1, H, W) float32, the teacher's; None where the cache has none
    features: dict[str, Tensor]  # tap to (N, C, h, w) float32
    keys: list[RowKey]
    encoded: tuple[Tensor, ...] | None = None  # a frozen encoder's features, where computed before


def batches(
    cache: Cache,
    batch_size: int = 4,
    device: str | torch.device = "cpu",
    *,
    split: str = "train",
    taps: str | Sequence[str] | None = None,
    shuffle: bool = True,
    seed: int = 0,
    epoch: int = 0,
    views: int = 0,
    workers: int = 2,
) -> Iterator[Batch]:
    """One epoch over a split: every sample once, in an order that (seed, epoch) decides.

    A train sample of which the cache has several views comes in another one each epoch, also
    without `shuffle`; `views` takes the first so many of them, 0 all. `taps` names the feature maps
    to read; None is all of them, an empty list reads no feature byte. The last batch may be smaller.
    Raises CacheError for a split or tap that the cache does not have, ConfigError for a size or number
    of workers below 1 or of views below 0.
    """
    for name, number, least in (
        ("batch_size", batch_size, 1),
        ("workers", workers, 1),
        ("views", views, 0),
    ):
        if number < least:
            raise ConfigError(f"{name} = {number}: expected {least} or more")
    if not (samples := samples_of(cache, split, views)):
        splits = ", ".join(sorted({key.split for key in cache.keys}))
        raise CacheError(f"{cache.path} has no rows of split {split!r}; it has {splits or 'none'}")
    rows = epoch_rows(cache, samples, seed, epoch, shuffle=shuffle)
    chosen = cache.taps if taps is None else [taps] if isinstance(taps, str) else taps
    for tap in chosen:
        cache.tap(tap)
    return read_batches(cache, chunked(rows, batch_size), device, chosen, workers)


def chunked(rows: Sequence[T], size: int) -> list[Sequence[T]]:
    """Consecutive pieces of `size` rows; the last may be smaller."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def read_batches(
    cache: Cache,
    groups: Iterable[Sequence[int]],
    device: str | torch.device,
    taps: Sequence[str],
    workers: int = 2,
    *,
    logits: bool = True,
    tally: Tally | None = None,
) -> Iterator[Batch]:
    """One batch for each group of row numbers, in order; without `logits` none are read.

    What is stored goes to the device as it is, and is decoded there. On the CPU that is done when
    the batch is asked for, in `workers` threads: beside a step it would slow the step by more.
    """
    specs, wanted = [cache.tap(tap) for tap in taps], wanted_arrays(cache, taps, logits)
    place = torch.device(device)
    to_device = _ToDevice(place) if place.type == "cuda" else None
    source = read_stored(cache, groups, wanted, workers, pinned=to_device is not None, tally=tally)
    ready: list[Batch] = []  # emptied before the next is decoded: two need not be in memory
    with contextlib.closing(source):
        for rows, stored in source:
            if to_device is None:
                host = {path: tensor.numpy() for path, tensor in stored.items()}
                pool = _decoders(workers, os.getpid())
                parts = _decoded_on_host(cache, host, specs, len(rows), pool)
            else:
                parts = _decoded(cache, to_device.copied(stored), specs)
            ready.append(_batch(cache, rows, specs, parts))
            del parts
            yield ready.pop()
            if to_device is not None:
                to_device.wait()  # the host's memory is about to be used again


@functools.cache
def _decoders(workers: int, pid: int) -> ThreadPoolExecutor:
    """A process's threads that decode; they never end while it lives.

    A thread that has used OpenCV drops what OpenCV keeps for it while it ends, under a lock, and
    that is after it can be joined. A process forked at that moment, as torch's DataLoader forks,
    finds the lock taken for ever: of 4,000 forked right after a pool was shut down 4 hung.
    """
    return ThreadPoolExecutor(workers, thread_name_prefix="decode")


def _batch(
    cache: Cache, rows: Sequence[int], taps: Sequence[TapSpec], parts: Mapping[str, Tensor]
) -> Batch:
    found = parts.get(LOGITS)
    return Batch(
        image=normalised(parts[IMAGE]),
        mask=parts[MASK][:, None],
        logits=None if found is None else found[:, None].float(),
        features={tap.name: parts[tap.name] for tap in taps},
        keys=[cache.keys[row] for row in rows],
    )


class _ToDevice:
    """Copies to a GPU on a stream of their own: they wait for no step, and none waits to be queued."""

    def __init__(self, place: torch.device) -> None:
        self._place = place
        self._stream = torch.cuda.Stream(place)  # type: ignore[no-untyped-call]

    def copied(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pinned memory as tensors there, for the stream that is in use."""
        in_use = torch.cuda.current_stream(self._place)
        with torch.cuda.stream(self._stream):
            there = {path: t.to(self._place, non_blocking=True) for path, t in stored.items()}
        in_use.wait_stream(self._stream)
        for tensor in there.values():
            tensor.record_stream(in_use)  # its memory is the other stream's
        return there

    def wait(self) -> None:
        """Return when all copies are done."""
        self._stream.synchronize()


def wanted_arrays(cache: Cache, taps: Sequence[str], logits: bool) -> list[str]:
    """The arrays that batches are made of."""
    wanted = [IMAGE, MASK]
    if logits and cache.has_logits:
        wanted.append(cache.manifest.logits_path)
    return wanted + [path for tap in taps for path in cache.arrays_of(cache.tap(tap))]


def read_stored(
    cache: Cache,
    groups: Iterable[Sequence[int]],
    arrays: Sequence[str],
    workers: int = 2,
    *,
    pinned: bool = False,
    tally: Tally | None = None,
) -> Generator[tuple[Sequence[int], dict[str, Tensor]]]:
    """The rows of each group as they are stored: (N, *stored form) of each array, in host memory.

    That memory is used again: a group's is valid until the next is asked for. All of it is
    `_AHEAD` + 1 batches. Raises CacheError for rows that are not what was committed.
    """
    tally = Tally() if tally is None else tally
    ring = [_Buffers(cache, arrays, pinned) for _ in range(_AHEAD + 1)]
    waiting: deque[tuple[Sequence[int], dict[str, Tensor], list[Future[list[Reading]]]]] = deque()
    # at a URL a read is all waiting
    threads = max(workers, THREADS_AT_URL) if isinstance(cache.path, Url) else workers
    pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
    try:
        for number, rows in enumerate(groups):
            stored = ring[number % len(ring)].of(len(rows))
            places = [(n, row, path) for n, row in enumerate(rows) for path in arrays]
            shares = chunked(places, -(-len(places) // threads))
            reads = [pool.submit(_read, cache, share, stored) for share in shares]
            waiting.append((rows, stored, reads))
            if len(waiting) > _AHEAD:
                yield _finished(*waiting.popleft(), tally)
        while waiting:
            yield _finished(*waiting.popleft(), tally)
    finally:
        pool.shutdown(cancel_futures=True)


class _Buffers:
    """Host memory of one batch, that grows to the largest."""

    def __init__(self, cache: Cache, arrays: Sequence[str], pinned: bool) -> None:
        self._forms = {path: cache.specs[path].stored for path in arrays}
        self._pinned = pinned
        self._rows = 0
        self._tensors: dict[str, Tensor] = {}

    def of(self, rows: int) -> dict[str, Tensor]:
        if rows > self._rows:
            self._tensors = {
                path: torch.empty(
                    (rows, *form.shape), dtype=getattr(torch, form.dtype), pin_memory=self._pinned
                )
                for path, form in self._forms.items()
            }
            self._rows = rows
        return {path: tensor[:rows] for path, tensor in self._tensors.items()}


def _read(
    cache: Cache, places: Sequence[tuple[int, int, str]], stored: Mapping[str, Tensor]
) -> list[Reading]:
    """Arrays of rows into their places in a batch, given as (place, row, array)."""
    arrays = {path: tensor.numpy() for path, tensor in stored.items()}
    return [cache.read_stored(row, path, arrays[path][n]) for n, row, path in places]


def _finished(
    rows: Sequence[int],
    stored: dict[str, Tensor],
    reads: Iterable[Future[list[Reading]]],
    tally: Tally,
) -> tuple[Sequence[int], dict[str, Tensor]]:
    tally.add(reading for read in reads for reading in read.result())
    return rows, stored


def _decoded(
    cache: Cache,
    stored: Mapping[str, Any],
    taps: Sequence[TapSpec],
    out: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Image, mask, logits and feature maps of one row or of a batch, in numpy or torch."""
    undone = {path: cache.specs[path].undo(array) for path, array in stored.items()}
    parts = {name: undone[name] for name in (IMAGE, MASK)}
    if cache.manifest.logits_path in undone:
        parts[LOGITS] = undone[cache.manifest.logits_path]
    for tap in taps:
        arrays = {name: undone[path] for path, name in cache.arrays_of(tap).items()}
        parts[tap.name] = codecs.decode(arrays, tap, None if out is None else out[tap.name])
    return parts


def _decoded_on_host(
    cache: Cache,
    stored: Mapping[str, NDArray[Any]],
    taps: Sequence[TapSpec],
    rows: int,
    pool: ThreadPoolExecutor,
) -> dict[str, Tensor]:
    """The same of a batch in numpy, a row at a time: one row fits the processor's cache."""
    form = {IMAGE: cache.specs[IMAGE].row, MASK: cache.specs[MASK].row}
    if cache.manifest.logits_path in stored:
        form[LOGITS] = cache.specs[cache.manifest.logits_path].row
    out = {name: np.empty((rows, *row.shape), row.dtype) for name, row in form.items()}
    maps = {tap.name: np.empty((rows, *tap.shape), np.float32) for tap in taps}

    def decode(n: int) -> None:
        one = {path: array[n] for path, array in stored.items()}
        parts = _decoded(cache, one, taps, {name: array[n] for name, array in maps.items()})
        for name, array in out.items():
            array[n] = parts[name]

    for _ in pool.map(decode, range(rows)):
        pass
    return {name: torch.from_numpy(array) for name, array in (out | maps).items()}
