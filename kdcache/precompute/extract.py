"""Stage one as a whole: decode → both frozen models → quantise, compress, write and commit.

Decoding runs ahead in threads and writing behind in one, both bounded, so memory does not grow
with the dataset.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from kdcache.cache import codecs
from kdcache.cache.format import Remarks, RowKey, describe_row
from kdcache.cache.layout import IMAGE, LOGITS, MASK, ROWS, Manifest, TapSpec
from kdcache.cache.reader import Cache
from kdcache.cache.writer import CacheWriter
from kdcache.config import ExtractConfig
from kdcache.errors import (
    CacheError,
    ConfigError,
    DatasetError,
    SampleError,
    device_memory,
)
from kdcache.imaging import INTERPOLATION
from kdcache.precompute.coco import PERSON_CATEGORY
from kdcache.precompute.dataset import Dataset, Sample, split_of
from kdcache.precompute.onnx_session import Device, resolve_device
from kdcache.precompute.sources import Digests, Prepared, Tally, changed, prepare, twins
from kdcache.precompute.teacher import Teacher
from kdcache.precompute.yolo import Yolo
from kdcache.progress import Progress
from kdcache.stop import StopRequest
from kdcache.tables import megabytes

log = logging.getLogger(__name__)

# On the CPU one image a call is as fast as many and needs the least memory; a GPU wants a batch.
_DEFAULT_BATCH = {"cpu": 1, "cuda": 8, "tensorrt": 8}


@dataclass(frozen=True, kw_only=True)
class ExtractReport:
    """What an extraction did."""

    cache: Path
    device: str
    rows_added: int
    rows_total: int
    rows_found: int  # committed by an earlier run and not computed again
    skipped: Mapping[str, str]  # sample id (or file that can be none) to reason
    left_out: Mapping[str, int]
    changed: Mapping[
        str, str
    ]  # sample id to what its files are now, of rows that stay as they were
    gone: Sequence[str]  # ids of rows that the dataset no longer has
    in_train_and_val: Sequence[tuple[str, str]]  # ids of images with the same pixels
    seconds: float  # all of it, loading the models included
    images_per_s: float  # without the loading
    bytes_added: int


def extract(
    config: ExtractConfig,
    dataset: Dataset,
    out: Path,
    *,
    split: str = "train",
    device: Device = "auto",
    batch_size: int | None = None,
    workers: int = 2,
    limit: int | None = None,
    strict: bool = False,
    progress: bool = False,
) -> ExtractReport:
    """Write the rows of `dataset` that the cache at `out` does not hold yet.

    Nothing is created before both models have run and the first image is decoded. Images that
    cannot be used are skipped and reported, or stop the run when `strict`. Raises KdcacheError;
    what was committed before an error stays and is not computed again.
    """
    started = time.monotonic()
    place_on = resolve_device(device)
    tally = Tally(strict)
    for name, reason in dataset.refused.items():
        tally.refuse(name, reason)
    planned = _planned(dataset, config, split, limit)
    if out.exists() and not (out / "zarr.json").is_file():
        raise CacheError(f"--out {out} exists and is not a kdcache cache; choose another")
    known = _known(out)
    tally.pixels |= {key: digests.pixels_sha256 for key, digests in known.items()}
    _refuse_second_split(planned, known, out)
    yolo, teacher = _load_models(config, place_on)
    manifest = _manifest(config, yolo, teacher, place_on)
    todo = [(key, sample) for key, sample in planned if key not in known]
    prepared = prepare(todo, config.size, config.resize, workers, tally)
    first = next(prepared, None)
    if first is None and not out.exists():
        reasons = "; ".join(
            f"{name}: {why}" for name, why in itertools.islice(tally.skipped.items(), 3)
        )
        raise DatasetError(f"none of the {len(todo)} images can be used ({reasons})")
    with StopRequest().listening() as stop, CacheWriter(out, manifest) as writer:
        committed = [(sample, known[key]) for key, sample in planned if key in known]
        old = changed(committed, workers, progress, stop)
        models_ready = time.monotonic()
        writer.expect(len(todo))
        before = len(writer.committed)
        rows = itertools.chain([first] if first else [], prepared)
        size = batch_size or _DEFAULT_BATCH[place_on]

        def facts() -> list[str]:
            return [megabytes(writer.bytes_written), f"{len(tally.skipped)} skipped"]

        with Progress("extract", len(todo), "image", shown=progress, facts=facts) as bar:
            _run(rows, yolo, teacher, writer, size, tally, bar, stop)
        if stop.asked:
            raise KeyboardInterrupt
        writer.commit()
        total = len(writer.committed)
        remarks = Remarks(
            skipped=tally.skipped,
            left_out=dataset.left_out,
            changed=old,
            in_train_and_val=twins(tally.pixels.items()),
        )
        writer.remark(remarks)
    ended = time.monotonic()
    cache = Cache(out)
    new_commits = [commit for commit in cache.commits if known.keys().isdisjoint(commit.keys)]
    return ExtractReport(
        cache=out,
        device=place_on,
        rows_added=total - before,
        rows_total=total,
        rows_found=len(planned) - len(todo),
        gone=_gone(planned, known) if limit is None else [],
        seconds=ended - started,
        images_per_s=(total - before) / (ended - models_ready),
        bytes_added=sum(o.size_bytes for commit in new_commits for o in commit.objects.values()),
        **vars(remarks),
    )


def _known(out: Path) -> dict[RowKey, Digests]:
    """The rows that a cache holds already, if there is one."""
    if not out.exists():
        return {}
    found = Cache(out)
    return {key: Digests.of(row.details) for key, row in zip(found.keys, found, strict=True)}


def _planned(
    dataset: Dataset, config: ExtractConfig, split: str, limit: int | None
) -> list[tuple[RowKey, Sample]]:
    """Keys of the samples, one split after the other (a shard holds one split only)."""
    planned = [
        (RowKey(_split(sample, config, split), sample.sample_id, 0), sample)
        for sample in itertools.islice(dataset.samples, limit)
    ]
    return sorted(planned, key=lambda item: item[0].split)


def _split(sample: Sample, config: ExtractConfig, split: str) -> str:
    if config.val_fraction and split == "train":
        return split_of(sample.sample_id, config.val_fraction, config.seed)
    return split


def _refuse_second_split(
    planned: Sequence[tuple[RowKey, Sample]], known: Mapping[RowKey, Digests], out: Path
) -> None:
    """The same photo in train and val would make the validation score a lie.

    Equal names alone are not enough to refuse: two folders may number their files alike.
    """
    split_of_id = {key.sample_id: key.split for key in known}
    for key, sample in planned:
        split = split_of_id.get(key.sample_id, key.split)
        if split == key.split or key in known or not sample.image_path.is_file():
            continue
        digest = hashlib.sha256(sample.image_path.read_bytes()).hexdigest()
        if digest == known[key._replace(split=split)].image_sha256:
            raise ConfigError(
                f"{key.sample_id} is in {out} as {split}, now it would be added as {key.split} "
                "too; use the --val-fraction, seed and --split it was extracted with"
            )


def _gone(planned: Sequence[tuple[RowKey, Sample]], known: Mapping[RowKey, Digests]) -> list[str]:
    """Ids of rows of the splits that were asked for which the dataset does not have."""
    here = {key for key, _ in planned}
    splits = {key.split for key in here}
    return [key.sample_id for key in known if key.split in splits and key not in here]


def _load_models(config: ExtractConfig, device: str) -> tuple[Yolo, Teacher]:
    if config.yolo_onnx_path is None or config.teacher_checkpoint is None:
        raise ConfigError("both frozen models are needed: --yolo FILE.onnx and --teacher FILE")
    yolo = Yolo(
        config.yolo_onnx_path,
        tap=config.yolo_target_layer,
        expects=config.yolo_input,
        device=device,
        size_px=config.size,
    )
    teacher = Teacher(
        config.teacher_checkpoint,
        encoder=config.teacher_encoder,
        output=config.teacher_output,
        device=device,
        size_px=config.size,
    )
    return yolo, teacher


def _manifest(config: ExtractConfig, yolo: Yolo, teacher: Teacher, device: str) -> Manifest:
    tap = TapSpec(
        name=config.yolo_target_layer,
        precision=config.precision,
        shape=yolo.feature_shape,
        groups=yolo.groups,
    )
    fingerprint = {
        "yolo_sha256": yolo.sha256,
        "yolo_target_layer": config.yolo_target_layer,
        "yolo_input": config.yolo_input,
        "teacher_sha256": teacher.sha256,
        "teacher_network": teacher.network,
        "size": str(config.size),
        "resize": config.resize,
        "interpolation": INTERPOLATION,
        "precision": config.precision,
        "views": "resized only",
        "execution_provider": f"{device} float32",
    }
    if config.category != PERSON_CATEGORY:
        fingerprint["category"] = config.category
    libraries = ("kdcache", "numpy", "opencv-python-headless", "pillow", "torch", "onnx")
    return Manifest(
        size_px=config.size,
        shard_rows=config.shard_rows,
        compression=config.compression,
        logits_dtype="float32" if config.precision == "float32" else "float16",
        taps=(tap,),
        fingerprint=fingerprint,
        versions={name: version(name) for name in libraries},
    )


def _run(
    rows: Iterable[Prepared],
    yolo: Yolo,
    teacher: Teacher,
    writer: CacheWriter,
    batch_size: int,
    tally: Tally,
    bar: Progress,
    stop: StopRequest,
) -> None:
    """Both models over batches of one constant size; rows go to the writer's thread in order.

    When a stop is asked for, the rows of the batch at hand are the last.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="write") as pool:
        writing: deque[tuple[Prepared, Future[None]]] = deque()
        for batch in _batched(rows, batch_size):
            if stop.asked:
                break
            with device_memory("stacking a batch", "lower --batch-size"):
                images = np.stack([row.image for row in batch])
                padding = np.repeat(images[-1:], batch_size - len(batch), axis=0)
                images = np.concatenate([images, padding])
            features, logits = yolo.features(images), teacher.logits(images)
            for row, feature_CHW, logits_HW in zip(batch, features, logits, strict=False):
                write = pool.submit(_write, writer, row, feature_CHW, logits_HW)
                writing.append((row, write))
            while len(writing) > 2 * batch_size:
                _finish(*writing.popleft(), tally)
            bar.reach(tally.handled)
        while writing:
            _finish(*writing.popleft(), tally)
        bar.reach(tally.handled)


def _batched(rows: Iterable[Prepared], size: int) -> Iterator[list[Prepared]]:
    """itertools.batched of Python 3.12, on 3.11."""
    rows = iter(rows)
    while batch := list(itertools.islice(rows, size)):
        yield batch


def _write(
    writer: CacheWriter,
    row: Prepared,
    feature_CHW: codecs.Array,
    logits_HW: codecs.F32,
) -> None:
    (tap,) = writer.manifest.taps
    # on a GPU the features become codes there; the codes come to the host
    encoded = codecs.encode(feature_CHW, tap)
    arrays = {
        IMAGE: row.image,
        MASK: row.mask,
        LOGITS: codecs.teacher_logits(logits_HW, writer.manifest.logits_dtype),
        ROWS: describe_row(row.key, row.details),
        **{f"{tap.folder}/{name}": codecs.on_host(array) for name, array in encoded.items()},
    }
    writer.append(row.key, arrays)


def _finish(row: Prepared, write: Future[None], tally: Tally) -> None:
    try:
        write.result()
        tally.written(row)
    except SampleError as error:
        tally.skip(row.key.sample_id, str(error))
    except OSError as error:
        raise CacheError(
            f"cannot write row {row.key.sample_id}: {error}; rows committed so far are safe: free "
            "some space or mend the disk, then run the same command again"
        ) from error
