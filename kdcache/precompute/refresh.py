"""Running one of the models again over the pixels that a cache holds; the rest of the cache stays."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import codecs
from kdcache.cache.format import read_root
from kdcache.cache.layout import Manifest, logits_dtype
from kdcache.cache.need import Need, stored_bytes
from kdcache.cache.reader import Cache
from kdcache.cache.refresh import Refresh
from kdcache.config import ExtractConfig
from kdcache.devices import present
from kdcache.errors import CacheError, ConfigError, FingerprintError, SampleError, nearest
from kdcache.onnx_session import Device
from kdcache.places import Place, picture_of
from kdcache.precompute.check import LOOKED_AT, first_look, say
from kdcache.precompute.job import (
    DEFAULT_BATCH,
    feature_arrays,
    open_teacher,
    open_yolo,
    provider,
)
from kdcache.precompute.sources import Prepared
from kdcache.precompute.teacher import Teacher
from kdcache.precompute.yolo import Features, Yolo, of_image
from kdcache.progress import Progress
from kdcache.stop import StopRequest

TEACHER, DETECTOR = "teacher", "detector"

_Arrays = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, kw_only=True)
class RefreshReport:
    """What a refresh did."""

    cache: Place
    part: str
    device: str
    rows: int
    rows_found: int  # computed by an earlier run that was stopped
    seconds: float


def refresh(
    config: ExtractConfig,
    path: Place,
    part: str,
    *,
    device: Device = "auto",
    batch_size: int | None = None,
    progress: bool = False,
) -> RefreshReport:
    """Compute a part of every row anew: the logits ("teacher"), the features of a tap (its name), or
    those of all taps ("detector").

    The model is the one in `config`; pixels, size and precision are the cache's. The cache is the
    old one until all is done, then the new one; stopped in between, the same call goes on. Raises
    KdcacheError, and the cache stays as it was.
    """
    started = time.monotonic()
    place_on = present(device)
    manifest, model = _target(config, read_root(path).manifest, part, place_on)
    size = batch_size or DEFAULT_BATCH[place_on]
    cache = Cache(path)
    _look(cache, model, manifest, progress)
    with StopRequest().listening() as stop, _unchanged(path), Refresh(path, manifest) as staging:
        counts = [len(commit.keys) for commit in cache.commits]
        first_rows = itertools.accumulate(counts, initial=0)
        first = {c.shard: n for c, n in zip(cache.commits, first_rows, strict=False)}
        todo = list(staging.todo)
        total = sum(len(commit.keys) for commit in todo)
        done = itertools.count(1)
        with Progress(f"refresh {part}", total, "image", shown=progress) as bar:

            def counted(rows: Iterable[_Arrays]) -> Iterator[_Arrays]:
                for row in rows:
                    if stop.asked:  # the shards before this one are kept
                        raise KeyboardInterrupt
                    yield row
                    bar.reach(next(done))

            for commit in todo:
                start = first[commit.shard]
                numbers = range(start, start + len(commit.keys))
                staging.write(commit, counted(_rows(cache, numbers, model, manifest, size)))
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


@contextlib.contextmanager
def _unchanged(path: Place) -> Iterator[None]:
    """An error of the disk in words: the cache has its old part still."""
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"cannot write the new part of {path}: {error}; the cache is the old one still: make room "
            "or mend the disk, then run the same command again"
        ) from error


def _look(cache: Cache, model: Yolo | Teacher, manifest: Manifest, progress: bool) -> None:
    """The first look that an extraction takes, at rows of the cache; and whether the new part fits."""
    if not len(cache):
        return
    numbers = np.unique(np.linspace(0, len(cache) - 1, LOOKED_AT).astype(int))
    photos = [
        Prepared(row.key, row.image.astype(np.uint8), row.mask.astype(np.uint8), {})
        for row in (cache[int(number)] for number in numbers)
    ]
    yolo, teacher = (model, None) if isinstance(model, Yolo) else (None, model)
    picture = picture_of(cache.path)
    found, seen = first_look(photos, yolo, teacher, picture, progress=progress)
    say(found, picture)
    old = {spec.path for spec in cache.manifest.arrays()}
    specs = [spec for spec in manifest.arrays() if spec.path not in old]
    sizes = []
    for number, one in zip(numbers, seen, strict=False):
        arrays = _arrays(cache, int(number), one.features, one.logits, manifest)
        sizes.append(stored_bytes(arrays, specs, manifest.compression))
    need = Need.of(specs, manifest.shard_rows, sum(sizes) / len(sizes), len(cache))
    need.refuse_if_too_much(cache.path, " (the old part goes only when the new one is complete)")


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
    if not manifest.taps:
        raise ConfigError(
            f"--refresh {part}: the cache holds logits only; features cannot be added to it: extract "
            "into another --out"
        )
    taps = [tap.name for tap in manifest.taps]
    if part not in (DETECTOR, *taps):
        known = nearest(part, [TEACHER, DETECTOR, *taps])
        raise ConfigError(f"--refresh {part}: the cache has no such part; nearest: {known}")
    asked = taps if part == DETECTOR else [part]
    yolo = open_yolo(config, asked, device, manifest.size_px)
    if len(asked) < len(taps):
        _refuse_two_detectors(manifest, part, yolo)
    return _with_taps(manifest, yolo), yolo


def _refuse_two_detectors(manifest: Manifest, part: str, yolo: Yolo) -> None:
    """No row could be added to a cache whose taps are of two detectors."""
    for field, now in (("yolo_sha256", yolo.sha256), ("yolo_input", yolo.expects)):
        if manifest.fingerprint[field] != now:
            raise FingerprintError(
                f"--refresh {part}: the cache's other taps were made with {field} = "
                f"{manifest.fingerprint[field]}, this would be with {now}; --refresh {DETECTOR} computes "
                "all of them anew"
            )


def _with_teacher(manifest: Manifest, teacher: Teacher) -> Manifest:
    """The manifest once the logits are those of this teacher; a cache without any gets them."""
    had_logits = manifest.logits_dtype is not None
    new_dtype = logits_dtype(manifest.fingerprint["precision"])
    made_by = {"teacher_sha256": teacher.sha256, "teacher_network": teacher.network}
    return dataclasses.replace(
        manifest,
        fingerprint={**manifest.fingerprint, **made_by},
        logits_dtype=manifest.logits_dtype if had_logits else new_dtype,
        logits_generation=manifest.logits_generation + had_logits,
    )


def _with_taps(manifest: Manifest, yolo: Yolo) -> Manifest:
    """The manifest once the features of the detector's taps are those that it gives."""
    made_by = {"yolo_sha256": yolo.sha256, "yolo_input": yolo.expects}
    if len(manifest.taps) == len(yolo.taps):  # none are left that a copy may have rounded twice
        made_by["precision"] = manifest.taps[0].precision
    taps = tuple(
        dataclasses.replace(tap, **yolo.taps[tap.name]._asdict(), generation=tap.generation + 1)
        if tap.name in yolo.taps
        else tap
        for tap in manifest.taps
    )
    return dataclasses.replace(manifest, fingerprint={**manifest.fingerprint, **made_by}, taps=taps)


def _rows(
    cache: Cache, rows: range, model: Yolo | Teacher, manifest: Manifest, batch_size: int
) -> Iterator[_Arrays]:
    """The new arrays of each of these rows, computed in batches of one constant size."""
    for start in range(0, len(rows), batch_size):
        numbers = rows[start : start + batch_size]
        images = np.stack([cache[number].image.astype(np.uint8, copy=False) for number in numbers])
        padding = np.repeat(images[-1:], batch_size - len(images), axis=0)
        images = np.concatenate([images, padding])
        features = model.features(images) if isinstance(model, Yolo) else None
        logits = model.logits(images) if isinstance(model, Teacher) else None
        for n, number in enumerate(numbers):
            its_features = None if features is None else of_image(features, n)
            its_logits = None if logits is None else logits[n]
            yield _arrays(cache, number, its_features, its_logits, manifest)


def _arrays(
    cache: Cache,
    number: int,
    features: Features | None,
    logits_HW: codecs.F32 | None,
    manifest: Manifest,
) -> _Arrays:
    """What the cache stores of a row's outputs; of a refreshed tap every array is new."""
    try:
        if logits_HW is not None:
            dtype = manifest.logits_dtype or "float16"
            return {manifest.logits_path: codecs.teacher_logits(logits_HW, dtype)}
        features = features or {}
        return feature_arrays(features, [tap for tap in manifest.taps if tap.name in features])
    except SampleError as error:
        raise CacheError(
            f"{cache.path}: row {number} ({cache.keys[number].sample_id}) cannot be refreshed: "
            f"{error}; the cache stays as it was"
        ) from error
