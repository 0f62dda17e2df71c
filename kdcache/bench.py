"""`kdcache bench`: what a cache gives on this machine, and what a student costs beside its teacher."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from kdcache.cache.reader import Cache
from kdcache.cache.shard import CRC_BYTES, decompress
from kdcache.config import TrainConfig
from kdcache.costs import Cost, costs
from kdcache.errors import CacheError
from kdcache.places import THREADS_AT_URL, Place, Url
from kdcache.train.augment import augmented
from kdcache.train.epoch import epoch_rows, samples_of
from kdcache.train.loader import (
    Batch,
    Tally,
    chunked,
    read_batches,
    read_stored,
    wanted_arrays,
)
from kdcache.train.parallel import Processes
from kdcache.train.prepare import find_taps, new_state
from kdcache.train.repeatable import Position
from kdcache.train.run_folder import State, read_config
from kdcache.train.step import (
    Taken,
    check_compiler,
    read,
    take_step,
    trained_model,
)
from kdcache.train.student import STRIDES, resolve_device

_ROWS = 256  # that a round reads; those of a small cache more than once
_ROUNDS = 5
_DECODINGS = 3


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """Rates of this machine; medians over rounds in which the floor and the loader alternate."""

    cache: Place
    device: str
    workers: int
    rows: int  # of a round
    row_bytes: float  # that are read of a row: all arrays that the losses use
    loader_rows_per_s: float  # rows as stored, copied into a ready batch
    floor_rows_per_s: float  # the same bytes read and decompressed, by as many threads, and no more
    loader_of_floor: float
    decoded_rows_per_s: float  # rows as a training step takes them
    storage_bytes_per_s: float  # what the storage, or the page cache, gave to all threads
    batch_size: int
    steps: int
    step_s: float | None  # None without steps
    images_per_s: float | None
    data_wait_fraction: float | None
    costs: Sequence[Cost]  # of student and teacher, as far as they were given


def bench(
    cache: Cache,
    *,
    run: Path | None = None,
    teacher: Path | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    workers: int = 2,
    steps: int = 4,
    teacher_encoder: str | None = None,
) -> BenchReport:
    """Time the loader, a training step, and the student beside the teacher.

    With `run` the step has the run's settings and its student is measured; else the default ones,
    from random weights. Raises CacheError for a cache without training rows, KdcacheError for files
    that are not what they should be.
    """
    on = resolve_device(device)
    config = _usable(read_config(run) if run is not None and run.is_dir() else TrainConfig(), cache)
    if not (samples := samples_of(cache, "train", config.views)):
        raise CacheError(f"{cache.path} has no rows of split 'train' to be timed")
    size = batch_size or config.batch_size
    rows = list(islice(cycle(epoch_rows(cache, samples, 0, 0)), _ROWS))
    specs = find_taps(cache, config)
    taps, logits = [tap.name for tap in specs], config.uses_logits
    arrays = wanted_arrays(cache, taps, logits)
    if config.compile and steps:
        check_compiler(on)
    # first, so that a wrong file is told at once
    measured = costs(cache, run, teacher, device, teacher_encoder)
    rates = _loader_rates(cache, rows, arrays, size, workers)

    def decoded() -> Iterator[object]:
        yield from read_batches(cache, chunked(rows, size), on, taps, workers, logits=logits)
        if torch.device(on).type == "cuda":
            torch.cuda.synchronize()

    _seconds(decoded)
    decoded_s = median(_seconds(decoded) for _ in range(_DECODINGS))
    pace = _Pace()
    if steps:
        step_rows = list(islice(cycle(rows), (steps + 1) * size))
        state = new_state(cache, config, specs, "random", on)
        groups = chunked(step_rows, size)
        source = read_batches(cache, groups, on, taps, workers, logits=logits)
        pace = _step_pace(source, steps, config, state)
    return BenchReport(
        cache=cache.path,
        device=on,
        workers=workers,
        rows=len(rows),
        batch_size=size,
        decoded_rows_per_s=len(rows) / decoded_s,
        steps=steps,
        **vars(rates),
        **vars(pace),
        costs=measured,
    )


def _usable(config: TrainConfig, cache: Cache) -> TrainConfig:
    """The settings without the losses that a cache of one model, or of other grids, cannot have."""
    if not cache.has_logits:
        without: dict[str, Any] = {"kl_weight": 0.0, "mse_weight": 0.0}
        if config.feature_attention == "teacher_uncertainty":
            without |= {"feature_attention": "none"}
        config = config.model_copy(update=without)
    taps = config.feature_taps or tuple(cache.taps)
    if not config.feature_taps and isinstance(config.student_tap, str):
        strides, size = STRIDES[config.student_tap], cache.manifest.size_px
        taps = tuple(tap for tap in taps if size / cache.tap(tap).shape[1] in strides)
    own: dict[str, Any] = {"feature_taps": taps} if taps else {"feature_weight": 0.0}
    return config.model_copy(update=own)


@dataclass(frozen=True)
class _LoaderRates:
    row_bytes: float
    loader_rows_per_s: float
    floor_rows_per_s: float
    loader_of_floor: float
    storage_bytes_per_s: float


def _loader_rates(
    cache: Cache, rows: Sequence[int], arrays: Sequence[str], batch_size: int, workers: int
) -> _LoaderRates:
    """The loader and its floor in turns, so that a drifting machine slows both."""
    groups, tally = chunked(rows, batch_size), Tally()

    def loader() -> Iterator[object]:
        return read_stored(cache, groups, arrays, workers, tally=tally)

    def floor() -> Iterator[object]:
        return read_floor(cache, rows, arrays, workers, batch_size)

    for warming in (floor, loader):
        _seconds(warming)
    tally.clear()
    pairs = [(_seconds(loader), _seconds(floor)) for _ in range(_ROUNDS)]
    loader_s, floor_s = (median(times) for times in zip(*pairs, strict=True))
    return _LoaderRates(
        row_bytes=tally.size_bytes / (_ROUNDS * len(rows)),
        loader_rows_per_s=len(rows) / loader_s,
        floor_rows_per_s=len(rows) / floor_s,
        loader_of_floor=floor_s / loader_s,
        storage_bytes_per_s=tally.bytes_per_s,
    )


def read_floor(
    cache: Cache, rows: Sequence[int], arrays: Sequence[str], workers: int, batch_size: int
) -> Iterator[None]:
    """What no reader of batches can do without: pread and decompress, into the memory of a batch.

    Each thread has a batch: memory of a row or two would stay in the processor's cache, where no
    batch of real rows fits.
    """
    descriptors: dict[str, int] = {}
    places: list[tuple[int | Url, int, int, str]] = []
    for row in rows:
        for array in arrays:
            path, offset, length = cache.locate(row, array)
            if isinstance(path, Url):
                places.append((path, offset, length - CRC_BYTES, array))
                continue
            if path not in descriptors:
                descriptors[path] = os.open(path, os.O_RDONLY)
            places.append((descriptors[path], offset, length - CRC_BYTES, array))
    largest = max(length for _, _, length, _ in places)
    compression = cache.manifest.compression
    if isinstance(cache.path, Url):
        workers = max(workers, THREADS_AT_URL)

    def read(some: Sequence[tuple[int | Url, int, int, str]]) -> None:
        stored = np.empty(largest, np.uint8)
        batch = {
            array: np.empty((batch_size, cache.specs[array].stored.size_bytes), np.uint8)
            for array in arrays
        }
        for number, (source, offset, length, array) in enumerate(some):
            out = batch[array][number // len(arrays) % batch_size]
            into = out if compression == "none" else stored[:length]
            if isinstance(source, Url):
                into[:] = np.frombuffer(source.read_range(offset, length), np.uint8)
            else:
                os.preadv(source, [into.data], offset)
            if compression != "none":
                decompress(stored[:length], compression, out)

    try:
        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(read, chunked(places, -(-len(places) // workers)))
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _seconds(make: Callable[[], Iterator[object]]) -> float:
    started = time.perf_counter()
    for _ in make():
        pass
    return time.perf_counter() - started


@dataclass(frozen=True)
class _Pace:
    step_s: float | None = None
    images_per_s: float | None = None
    data_wait_fraction: float | None = None


def _step_pace(source: Iterator[Batch], steps: int, config: TrainConfig, state: State) -> _Pace:
    """Of training steps, the first left out: it builds and warms what the others find."""
    model = trained_model(state, config, Processes()).train()

    start = Position(epoch=0, step=0, rank=0, batch=0)

    def step(batch: Batch) -> Taken:
        return take_step(
            model, state, [augmented(batch, config, start)], config, config.temperature, Processes()
        )

    list(read([step(next(source))]))  # reading waits for a GPU to come to it
    waited, images, started = 0.0, 0, time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(source)
        waited += time.perf_counter() - asked
        taken = step(batch)
        images += len(batch.keys)
    list(read([taken]))
    seconds = time.perf_counter() - started
    return _Pace(seconds / steps, images / seconds, waited / seconds)
