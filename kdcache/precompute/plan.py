"""What an extraction will cost, before it runs: bytes, files, time at each precision; a first look."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar, get_args

import numpy as np

from kdcache.cache.format import RowKey
from kdcache.cache.layout import IMAGE, MASK, stored_as
from kdcache.cache.need import Need, free, stored_bytes
from kdcache.cache.writer import CacheWriter
from kdcache.config import ExtractConfig, Precision
from kdcache.errors import DatasetError
from kdcache.onnx_session import Device
from kdcache.places import Place, Url
from kdcache.precompute.check import Check, Seen, first_look, look
from kdcache.precompute.dataset import Dataset, Sample
from kdcache.precompute.extract import run, warm_up
from kdcache.precompute.job import DEFAULT_BATCH, Job, bytes_per_row, open_job
from kdcache.precompute.sources import Tally, prepare
from kdcache.precompute.stages import Stages
from kdcache.progress import Progress
from kdcache.stop import StopRequest

T = TypeVar("T")

# Photos that both models run on, spread evenly; and more whose pixels alone are compressed, for
# those vary most from one to the next and cost no model.
_PHOTOS, _PIXELS = 12, 64
# On a GPU so many batches, to see the pace behind the first.
_BATCHES = 4
_WRITTEN_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one precision: all rows that are to be added."""

    bytes_per_row: float
    bytes: int
    files: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an extraction will cost; the plain fields are those of the precision that was asked for."""

    rows: int
    rows_found: int  # that the cache has already
    precision: str
    device: str
    bytes: int
    files: int
    seconds: float
    free_bytes: int | None  # of a disk, not of a store at a URL
    free_files: int | None
    fits: bool
    costs: Mapping[str, Cost]  # by precision
    write_bytes_per_s: float
    teacher_miou: float | None
    check: Check
    picture: Path
    skipped: Mapping[str, str]  # of what was looked at
    left_out: Mapping[str, int]


def plan(
    config: ExtractConfig,
    dataset: Dataset,
    out: Place,
    *,
    split: str = "train",
    device: Device = "auto",
    batch_size: int | None = None,
    workers: int = 2,
    limit: int | None = None,
    picture: Path = Path("plan.png"),
    progress: bool = False,
) -> Plan:
    """Estimate what `extract` with the same arguments would take, from a trial on a few photos.

    Writes `picture`, and beside `out` for a moment a trial cache and a file to time the disk.
    Raises KdcacheError where the extraction would.
    """
    tally = Tally(strict=False)
    started = time.monotonic()
    job = open_job(config, dataset, out, split=split, device=device, limit=limit, tally=tally)
    loading_s = time.monotonic() - started
    size = batch_size or DEFAULT_BATCH[job.device]
    trial = _spread(job.todo, max(_PHOTOS, _BATCHES * size * (job.device != "cpu")))
    prepared = list(prepare(trial, job.how, workers, tally))
    if not prepared:
        raise DatasetError(
            "there is nothing to plan: "
            + (f"{out} has all rows" if not job.todo else "none of the photos tried can be used")
        )
    started = time.monotonic()
    weighed = _spread(prepared, _PHOTOS)
    # models are judged by photos as they are
    photos = [row for row in weighed if not row.key.view] or weighed
    found, seen = first_look(photos, job.yolo, job.teacher, picture, progress=progress)
    checking_s = time.monotonic() - started
    looked_at = {one.row.key for one in seen}
    rest = [row for row in weighed if row.key not in looked_at]
    seen += look(rest, job.yolo, job.teacher)
    with _scratch(
        out, 2 * bytes_per_row(seen, job.manifest) * len(trial) + _WRITTEN_BYTES
    ) as scratch:
        pace = _Pace(
            image_s=_image_s(job, trial, scratch, size, workers, progress),
            write_bytes_per_s=_write_speed(out if isinstance(out, Url) else scratch),
        )
    pixels_bytes = _pixels_bytes(job, workers, tally)
    costs = {
        precision: _cost(job, precision, seen, pixels_bytes, pace)
        for precision in get_args(Precision)
    }
    asked = costs[config.precision]
    space, files = free(out)
    return Plan(
        rows=len(job.todo),
        rows_found=len(job.known),
        precision=config.precision,
        device=job.device,
        bytes=asked.bytes,
        files=asked.files,
        seconds=loading_s + asked.seconds + checking_s * (not job.known),
        free_bytes=space,
        free_files=files,
        fits=Need(rows=len(job.todo), size_bytes=asked.bytes, files=asked.files).fits(space, files),
        costs=costs,
        write_bytes_per_s=pace.write_bytes_per_s,
        teacher_miou=found.teacher_miou,
        check=found,
        picture=picture,
        skipped=tally.skipped,
        left_out=dataset.left_out,
    )


def _spread(todo: Sequence[T], count: int) -> list[T]:
    """So many of them, evenly spread."""
    chosen = np.unique(np.linspace(0, len(todo) - 1, min(count, len(todo))).astype(int))
    return [todo[n] for n in chosen]


@contextlib.contextmanager
def _scratch(out: Place, needed_bytes: float) -> Iterator[Path]:
    """A folder for a trial, beside `out` where the space for it is there: plans are for full disks too."""
    folder = None
    if isinstance(out, Path) and (free(out)[0] or 0) > needed_bytes:
        folder = next(path for path in out.absolute().parents if path.exists())
    with tempfile.TemporaryDirectory(dir=folder, prefix=".kdcache-plan-") as scratch:
        yield Path(scratch)


def _write_speed(folder: Place) -> float:
    """Bytes a second that reach the disk, or the store that `folder` is to be in."""
    data = np.random.default_rng(0).bytes(_WRITTEN_BYTES)
    started = time.monotonic()
    if isinstance(folder, Url):
        target = folder.parent / f"{folder.name}.kdcache-plan"
        target.write_bytes(data)
        seconds = time.monotonic() - started
        target.unlink(missing_ok=True)
        return _WRITTEN_BYTES / seconds
    with (folder / "speed").open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.monotonic() - started
    (folder / "speed").unlink()
    return _WRITTEN_BYTES / seconds


class _Pace(NamedTuple):
    image_s: float  # of the models, with all that goes on beside them
    write_bytes_per_s: float  # that reach the disk


def _image_s(
    job: Job,
    trial: Sequence[tuple[RowKey, Sample]],
    folder: Path,
    batch_size: int,
    workers: int,
    progress: bool,
) -> float:
    """Seconds an image of the real thing, decoding to commit, on a cache that is thrown away."""
    tally = Tally(strict=False)
    warm_up(job, batch_size)
    started = time.monotonic()
    rows = prepare(trial, job.how, workers, tally)
    with (
        StopRequest().listening() as stop,
        CacheWriter(folder / "trial", job.manifest) as writer,
        Progress("trial", len(trial), "image", shown=progress) as bar,
    ):
        stages, stopped = Stages(workers), lambda: stop.asked
        run(rows, job, writer, batch_size, tally, bar, stopped, stages)
        writer.commit()
        if stop.asked:
            raise KeyboardInterrupt
    return (time.monotonic() - started) / max(tally.rows, 1)


def _pixels_bytes(job: Job, workers: int, tally: Tally) -> float:
    """Bytes of photo and mask, mean over more photos than the models run on."""
    specs = [spec for spec in job.manifest.arrays() if spec.path in (IMAGE, MASK)]
    more = _spread(job.todo, _PIXELS)
    sizes = []
    for row in prepare(more, job.how, workers, tally):
        arrays = {IMAGE: row.image, MASK: row.mask}
        sizes.append(stored_bytes(arrays, specs, job.manifest.compression))
    return sum(sizes) / len(sizes)


def _cost(
    job: Job, precision: Precision, seen: Sequence[Seen], pixels_bytes: float, pace: _Pace
) -> Cost:
    """Of all rows, stored at a precision; the slower of models and writer sets the pace."""
    manifest = stored_as(job.manifest, precision)
    started = time.monotonic()
    rest_bytes = bytes_per_row(seen, manifest, but=(IMAGE, MASK))
    writing_s = (time.monotonic() - started) / len(seen)
    per_row = pixels_bytes + rest_bytes
    shards = job.shards(manifest.shard_rows)
    need = Need.of(manifest.arrays(), manifest.shard_rows, per_row, len(job.todo), shards)
    slower = max(pace.image_s, writing_s + per_row / pace.write_bytes_per_s)
    return Cost(
        bytes_per_row=per_row,
        bytes=need.size_bytes,
        files=need.files,
        seconds=len(job.todo) * slower,
    )
