"""Running one of the models again over the pixels that a cache holds; the rest of the cache stays."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import codecs
from kdcache.cache.format import Commit, read_root
from kdcache.cache.layout import Manifest
from kdcache.cache.reader import Cache
from kdcache.cache.refresh import Refresh
from kdcache.config import ExtractConfig
from kdcache.errors import CacheError, ConfigError, FingerprintError, SampleError, nearest
from kdcache.precompute.job import (
    DEFAULT_BATCH,
    LOGITS_DTYPE,
    open_teacher,
    open_yolo,
    provider,
)
from kdcache.precompute.onnx_session import Device, resolve_device
from kdcache.precompute.teacher import Teacher
from kdcache.precompute.yolo import Yolo
from kdcache.progress import Progress
from kdcache.stop import StopRequest

TEACHER = "teacher"


@dataclass(frozen=True, kw_only=True)
class RefreshReport:
    """What a refresh did."""

    cache: Path
    part: str
    device: str
    rows: int
    rows_found: int  # computed by an earlier run that was stopped
    seconds: float


def refresh(
    config: ExtractConfig,
    path: Path,
    part: str,
    *,
    device: Device = "auto",
    batch_size: int | None = None,
    progress: bool = False,
) -> RefreshReport:
    """Compute the logits (`part` "teacher") or the features of a tap (its name) of every row anew.

    The model is the one in `config`; pixels, size and precision are the cache's. The cache is the
    old one until all is done, then the new one; stopped in between, the same call goes on. Raises
    KdcacheError, and the cache stays as it was.
    """
    started = time.monotonic()
    place_on = resolve_device(device)
    manifest, model = _target(config, read_root(path).manifest, part, place_on)
    size = batch_size or DEFAULT_BATCH[place_on]
    with StopRequest().listening() as stop, Refresh(path, manifest) as staging:
        cache = Cache(path)
        counts = [len(commit.keys) for commit in cache.commits]
        first_rows = itertools.accumulate(counts, initial=0)
        first = {c.shard: n for c, n in zip(cache.commits, first_rows, strict=False)}
        todo = list(staging.todo)
        total = sum(len(commit.keys) for commit in todo)
        done = 0
        with Progress(f"refresh {part}", total, "image", shown=progress) as bar:
            for commit in todo:
                staging.write(
                    commit, _rows(cache, commit, first[commit.shard], model, manifest, size)
                )
                done += len(commit.keys)
                bar.reach(done)
                if stop.asked:
                    raise KeyboardInterrupt
        staging.switch()
    return RefreshReport(
        cache=path,
        part=part,
        device=place_on,
        rows=len(cache),
        rows_found=len(cache) - total,
        seconds=time.monotonic() - started,
    )


def _target(
    config: ExtractConfig, manifest: Manifest, part: str, device: str
) -> tuple[Manifest, Yolo | Teacher]:
    """What the cache's manifest is to become, and the model that makes it so."""
    made_on = manifest.fingerprint["execution_provider"]
    if made_on != provider(device):
        raise FingerprintError(
            f"the cache was extracted with execution_provider = {made_on}, now {provider(device)} "
            "was asked for; refresh it on the --device it was made on, or extract it anew"
        )
    if part == TEACHER:
        teacher = open_teacher(config, device, manifest.size_px)
        return _with_teacher(manifest, teacher), teacher
    if part not in [tap.name for tap in manifest.taps]:
        known = nearest(part, [TEACHER, *(tap.name for tap in manifest.taps)])
        raise ConfigError(f"--refresh {part}: the cache has no such part; nearest: {known}")
    yolo = open_yolo(config, part, device, manifest.size_px)
    return _with_tap(manifest, part, yolo), yolo


def _with_teacher(manifest: Manifest, teacher: Teacher) -> Manifest:
    """The manifest once the logits are those of this teacher; a cache without any gets them."""
    had_logits = manifest.logits_dtype is not None
    new_dtype = LOGITS_DTYPE.get(manifest.fingerprint["precision"], "float16")
    made_by = {"teacher_sha256": teacher.sha256, "teacher_network": teacher.network}
    return dataclasses.replace(
        manifest,
        fingerprint={**manifest.fingerprint, **made_by},
        logits_dtype=manifest.logits_dtype if had_logits else new_dtype,
        logits_generation=manifest.logits_generation + had_logits,
    )


def _with_tap(manifest: Manifest, name: str, yolo: Yolo) -> Manifest:
    """The manifest once a tap's features are those of this detector."""
    made_by = {"yolo_sha256": yolo.sha256, "yolo_input": yolo.expects}
    taps = tuple(
        dataclasses.replace(
            tap, shape=yolo.feature_shape, groups=yolo.groups, generation=tap.generation + 1
        )
        if tap.name == name
        else tap
        for tap in manifest.taps
    )
    return dataclasses.replace(manifest, fingerprint={**manifest.fingerprint, **made_by}, taps=taps)


def _rows(
    cache: Cache,
    commit: Commit,
    first: int,
    model: Yolo | Teacher,
    manifest: Manifest,
    batch_size: int,
) -> Iterator[Mapping[str, NDArray[np.generic]]]:
    """The new arrays of each row of a commit, computed in batches of one constant size."""
    for start in range(0, len(commit.keys), batch_size):
        numbers = range(first + start, first + min(start + batch_size, len(commit.keys)))
        images = np.stack([cache[number].image.astype(np.uint8, copy=False) for number in numbers])
        padding = np.repeat(images[-1:], batch_size - len(images), axis=0)
        images = np.concatenate([images, padding])
        outputs = model.features(images) if isinstance(model, Yolo) else model.logits(images)
        for number, output in zip(numbers, outputs, strict=False):
            try:
                yield _arrays(output, model, manifest)
            except SampleError as error:
                raise CacheError(
                    f"{cache.path}: row {number} ({cache.keys[number].sample_id}) cannot be "
                    f"refreshed: {error}; the cache stays as it was"
                ) from error


def _arrays(
    output: codecs.Array, model: Yolo | Teacher, manifest: Manifest
) -> dict[str, NDArray[np.generic]]:
    """What the cache stores of one output; of a refreshed tap every array is new."""
    if isinstance(model, Teacher):
        dtype = manifest.logits_dtype or "float16"
        return {manifest.logits_path: codecs.teacher_logits(codecs.on_host(output), dtype)}
    (tap,) = manifest.taps
    encoded = codecs.encode(output, tap)
    return {f"{tap.folder}/{name}": codecs.on_host(array) for name, array in encoded.items()}
