"""Stage one as a whole: decode → both frozen models → quantise, compress, write and commit.

Decoding runs ahead in threads, encoding and compressing behind in as many, writing in one, all
bounded, so memory does not grow with the dataset.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from kdcache.cache import codecs
from kdcache.cache.format import Remarks
from kdcache.cache.need import Need
from kdcache.cache.open_shard import EncodedRow, OpenShard
from kdcache.cache.reader import Cache
from kdcache.cache.writer import CacheWriter
from kdcache.config import ExtractConfig
from kdcache.errors import (
    CacheError,
    DatasetError,
    SampleError,
    device_memory,
)
from kdcache.onnx_session import Device
from kdcache.places import Place, Url, picture_of
from kdcache.precompute.check import LOOKED_AT, first_look, say
from kdcache.precompute.dataset import Dataset
from kdcache.precompute.job import (
    DEFAULT_BATCH,
    Job,
    Models,
    Survey,
    bytes_per_row,
    gone,
    open_job,
    row_arrays,
)
from kdcache.precompute.sources import Prepared, Tally, changed, prepare, twins
from kdcache.precompute.stages import (
    COMPRESS,
    DETECTOR,
    ENCODE,
    FOR_PHOTOS,
    FOR_WRITER,
    TEACHER,
    WRITE,
    Stages,
    StageTimes,
)
from kdcache.precompute.yolo import Features, of_image
from kdcache.progress import Progress
from kdcache.stop import StopRequest
from kdcache.tables import megabytes

log = logging.getLogger(__name__)

_ALWAYS: contextlib.AbstractContextManager[object] = contextlib.nullcontext()


@dataclass(frozen=True, kw_only=True)
class ExtractReport:
    """What an extraction did."""

    cache: Place
    device: str
    rows_added: int
    rows_total: int
    rows_found: int  # committed by an earlier run and not computed again
    skipped: Mapping[str, str]  # sample id (or file that can be none) to reason
    left_out: Mapping[str, int]
    # sample id to what its files are now, of rows that stay as they were
    changed: Mapping[str, str]
    doubtful: Mapping[str, str]  # sample id to why its mask may not fit it
    gone: Sequence[str]  # ids of rows that the dataset does not have
    in_train_and_val: Sequence[tuple[str, str]]  # ids of images with the same pixels
    seconds: float  # all of it, loading the models included
    images_per_s: float  # without the loading
    bytes_added: int
    stages: StageTimes  # of what came after the first look


def extract(
    config: ExtractConfig,
    dataset: Dataset,
    out: Place,
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
    tally = Tally(strict)
    job = open_job(config, dataset, out, split=split, device=device, limit=limit, tally=tally)
    stages = Stages(workers)
    prepared = prepare(job.todo, job.how, workers, tally, stages)
    first = list(itertools.islice(prepared, 0 if job.known else LOOKED_AT))
    if not first and not job.known:
        raise nothing_usable(job, tally.skipped)
    if first:
        _look(first, job, out, progress)
    elif job.todo:
        refuse_if_too_much(known_bytes(out), job, out)
    size = batch_size or DEFAULT_BATCH[job.device]
    if job.todo:
        warm_up(job, size)
    rows = itertools.chain(first, prepared)

    def fill(writer: CacheWriter, bar: Progress, stop: StopRequest) -> None:
        stopped = lambda: stop.asked  # noqa: E731
        run(rows, job, writer, size, tally, bar, stopped, stages)
        with stages.busy(WRITE):
            writer.commit()

    return into_cache(
        job,
        fill,
        workers=workers,
        tally=tally,
        stages=stages,
        started=started,
        progress=progress,
    )


Fill = Callable[[CacheWriter, Progress, StopRequest], None]


def into_cache(
    job: Job,
    fill: Fill,
    *,
    workers: int,
    tally: Tally,
    stages: Stages,
    started: float,
    progress: bool,
) -> ExtractReport:
    """Let `fill` write the rows that are to be done, with all that is around that."""
    with StopRequest().listening() as stop, CacheWriter(job.out, job.manifest) as writer:
        _refuse_if_overtaken(job, writer, job.out)
        first_views = [(key, sample) for key, sample in job.planned if not key.view]
        committed = [(sample, job.known[key]) for key, sample in first_views if key in job.known]
        old = changed(committed, workers, progress, stop)
        models_ready = time.monotonic()
        stages.clear()
        writer.expect(job.shards(writer.manifest.shard_rows))
        before = len(writer.committed)

        def facts() -> list[str]:
            return [megabytes(writer.bytes_written), f"{len(tally.skipped)} skipped"]

        with Progress("extract", len(job.todo), "image", shown=progress, facts=facts) as bar:
            fill(writer, bar, stop)
        times = stages.times()
        total = len(writer.committed)
        remarks = Remarks(
            skipped=tally.skipped,
            left_out=job.dataset.left_out,
            changed=old,
            doubtful=tally.doubtful,
            gone=gone(job.planned, job.known) if job.whole else [],
        )
        same = twins(tally.photos)
        # a stopped run has not seen all of the dataset
        writer.remark(_key(job.dataset, job.split), remarks, same, replace=not stop.asked)
        if stop.asked:
            raise KeyboardInterrupt
    ended = time.monotonic()
    cache = Cache(job.out)
    new_commits = [commit for commit in cache.commits if job.known.keys().isdisjoint(commit.keys)]
    return ExtractReport(
        cache=job.out,
        device=job.device,
        rows_added=total - before,
        rows_total=total,
        rows_found=len(job.planned) - len(job.todo),
        in_train_and_val=same,
        seconds=ended - started,
        images_per_s=(total - before) / (ended - models_ready),
        bytes_added=sum(o.size_bytes for commit in new_commits for o in commit.objects.values()),
        stages=times,
        **vars(remarks),
    )


def nothing_usable(survey: Survey, skipped: Mapping[str, str]) -> DatasetError:
    """The error where none of the images can be used."""
    some = itertools.islice(skipped.items(), 3)
    reasons = "; ".join(f"{name}: {why}" for name, why in some)
    return DatasetError(f"none of the {len(survey.todo)} images can be used ({reasons})")


def _refuse_if_overtaken(job: Job, writer: CacheWriter, out: Place) -> None:
    """What is to be done, and whether it is in another split, was told by the rows known before the
    cache was this process's alone."""
    if writer.committed != job.known.keys():
        raise CacheError(
            f"another process has added rows to {out} while this one loaded its models; run the same "
            "command again, which looks at them first"
        )


def _key(dataset: Dataset, split: str) -> str:
    """Stands for a dataset in the cache's remarks, without telling where it lies."""
    images = dataset.images if isinstance(dataset.images, Url) else dataset.images.resolve()
    return hashlib.sha256(f"{split}: {images}".encode()).hexdigest()[:16]


def _look(first: Sequence[Prepared], job: Job, out: Place, progress: bool) -> None:
    """Say what both models score on the first photos, and refuse what cannot fit on the disk."""
    picture = picture_of(out)
    found, seen = first_look(first, job.yolo, job.teacher, picture, progress=progress)
    say(found, picture)
    refuse_if_too_much(bytes_per_row(seen, job.manifest), job, out)


def known_bytes(out: Place) -> float:
    """Bytes of a row in the cache that there is."""
    commits = Cache(out).commits
    total = sum(o.size_bytes for commit in commits for o in commit.objects.values())
    return total / sum(len(commit.keys) for commit in commits)


def refuse_if_too_much(a_row: float, job: Job, out: Place) -> None:
    """Raise CacheError where the rows, of so many bytes each, do not fit on the disk."""
    shard_rows = job.manifest.shard_rows
    need = Need.of(job.manifest.arrays(), shard_rows, a_row, len(job.todo), job.shards(shard_rows))
    need.refuse_if_too_much(
        out,
        ", choose another --out or fewer bits (--precision int5 halves int8; `kdcache plan` shows "
        "each)",
    )


def run(
    rows: Iterable[Prepared],
    models: Models,
    writer: CacheWriter | OpenShard,
    batch_size: int,
    tally: Tally,
    bar: Progress,
    stopped: Callable[[], bool],
    stages: Stages,
    turn: contextlib.AbstractContextManager[object] = _ALWAYS,
) -> None:
    """Both models over batches of one constant size.

    Threads encode and compress the rows, one writes them in order. When a stop is asked for, the
    rows of the batch at hand are the last. The models run inside `turn`, where others wait for it.
    """
    ahead = max(2 * batch_size, stages.workers)
    with (
        ThreadPoolExecutor(1, thread_name_prefix="write") as pool,
        ThreadPoolExecutor(stages.workers, thread_name_prefix="encode") as encoders,
    ):
        writing: deque[tuple[Prepared, Future[None]]] = deque()
        for batch in stages.waited_for(_batched(rows, batch_size), FOR_PHOTOS):
            if stopped():
                break
            with device_memory("stacking a batch", "lower --batch-size"):
                images = np.stack([row.image for row in batch])
                padding = np.repeat(images[-1:], batch_size - len(batch), axis=0)
                images = np.concatenate([images, padding])
            with turn, stages.busy(DETECTOR):
                features = None if models.yolo is None else models.yolo.features(images)
            with turn, stages.busy(TEACHER):
                logits = None if models.teacher is None else models.teacher.logits(images)
            for n, row in enumerate(batch):
                its_features = None if features is None else of_image(features, n)
                its_logits = None if logits is None else logits[n]
                encoded = encoders.submit(_encode, writer, row, its_features, its_logits, stages)
                writing.append((row, pool.submit(_write, writer, encoded, stages)))
            with stages.busy(FOR_WRITER):
                while len(writing) > ahead:
                    _finish(*writing.popleft(), tally)
            bar.reach(tally.handled)
        with stages.busy(FOR_WRITER):
            while writing:
                _finish(*writing.popleft(), tally)
        bar.reach(tally.handled)


def _batched(rows: Iterable[Prepared], size: int) -> Iterator[list[Prepared]]:
    """itertools.batched of Python 3.12, on 3.11."""
    rows = iter(rows)
    while batch := list(itertools.islice(rows, size)):
        yield batch


def warm_up(models: Models, batch_size: int) -> None:
    """Run both models once at the size of the batches to come, before any clock.

    On a GPU that chooses kernels, with TensorRT it builds an engine for minutes; on the CPU it does
    nothing but cost a batch.
    """
    if models.device == "cpu":
        return
    size_px = models.manifest.size_px
    images = np.zeros((batch_size, size_px, size_px, 3), np.uint8)
    if models.yolo is not None:
        models.yolo.features(images)
    if models.teacher is not None:
        models.teacher.logits(images)


def _encode(
    writer: CacheWriter | OpenShard,
    row: Prepared,
    features: Features | None,
    logits_HW: codecs.F32 | None,
    stages: Stages,
) -> EncodedRow:
    with stages.busy(ENCODE), device_memory("encoding a row", "lower --batch-size"):
        arrays = row_arrays(row, features, logits_HW, writer.manifest)
    with stages.busy(COMPRESS):
        return writer.encoded(row.key, arrays)


def _write(writer: CacheWriter | OpenShard, encoded: Future[EncodedRow], stages: Stages) -> None:
    row = encoded.result()
    with stages.busy(WRITE):
        writer.append(row)


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
