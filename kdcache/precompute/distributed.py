"""Stage one on a dask cluster: the shard is the task, its files are written where it is computed.

The client lists the photos, holds the cache and commits; workers load the models once each, on
first use. A worker that dies costs its shards in work, which dask gives to another.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from distributed import Client, Future, get_worker, wait

from kdcache.cache.format import Commit, RowKey
from kdcache.cache.layout import Manifest
from kdcache.cache.open_shard import OpenShard
from kdcache.cache.writer import CacheWriter, may_write, shard_kind
from kdcache.cluster import (
    answer,
    asked,
    check_distinct,
    check_versions,
    devices,
    sealed,
    still_wanted,
    threads_here,
    told_plainly,
    unsealed,
)
from kdcache.config import ExtractConfig
from kdcache.devices import present
from kdcache.durable import write_atomic
from kdcache.errors import CacheError, ClusterError, KdcacheError, ModelError
from kdcache.onnx_graph import model_sha256
from kdcache.onnx_session import Device, use_threads
from kdcache.places import Place, absolute, picture_of
from kdcache.precompute.check import LOOKED_AT, Check, first_look, say
from kdcache.precompute.dataset import Dataset, Sample
from kdcache.precompute.extract import (
    ExtractReport,
    into_cache,
    known_bytes,
    nothing_usable,
    refuse_if_too_much,
    run,
    warm_up,
)
from kdcache.precompute.job import DEFAULT_BATCH, Job, Models, bytes_per_row, open_models, survey
from kdcache.precompute.sources import Preparation, Tally, prepare
from kdcache.precompute.stages import WRITE, Stages, StageTimes
from kdcache.progress import Progress
from kdcache.stop import StopRequest

log = logging.getLogger(__name__)

_MODELS = ("yolo_onnx_path", "teacher_checkpoint")

# While a GPU's shard is compressed and written, the next one's photos go through the models; on the
# CPU they would share its cores.
_AT_ONCE_ON_GPU = 2

# Photos that go to a worker for the first look; all of a dataset, with its annotations, are many.
_TRIED_AT_ONCE = 8 * LOOKED_AT

Todo = Sequence[tuple[RowKey, Sample]]


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What all shards of a run have in common."""

    config: ExtractConfig  # with absolute paths
    how: Preparation  # as the client has read it: of a policy's file too
    sha256: Mapping[str, str]  # of each model file, by its setting
    images: Place
    out: Place
    device: Device
    batch_size: int | None
    workers: int
    strict: bool


class _Looked(NamedTuple):
    """What a worker found out of models and photos before anything was written."""

    device: str
    manifest: Manifest
    photos: int  # of those that were tried, that can be used
    skipped: dict[str, str]
    found: Check | None
    picture: bytes
    bytes_per_row: float


class _Done(NamedTuple):
    """A shard that a worker has written; `commit` is None where no photo of it could be used."""

    commit: Commit | None
    tally: Tally
    times: StageTimes


def extract_on(  # noqa: PLR0913 - those of `extract`, and where
    client: Client,
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
    """Do what `extract` does on the workers of a cluster; the rows and their order are the same.

    `workers` are threads of each worker process, at most those it has. Photos and cache are read
    under the same paths everywhere; model files too, or they are sent. Raises ClusterError where a
    worker does not see them, or would compute otherwise than another.
    """
    started = time.monotonic()
    if str(out).startswith("memory://"):
        raise ClusterError(f"{out} is the memory of one process; the workers are others")
    tally, stages = Tally(strict), Stages(workers)
    found = survey(config, dataset, out, split=split, limit=limit, tally=tally)
    work = _Work(
        config=_with_absolute_paths(config),
        how=found.how,
        sha256={name: model_sha256(path) for name, path in _model_files(config).items()},
        images=absolute(dataset.images),
        out=absolute(out),
        device=device,
        batch_size=batch_size,
        workers=workers,
        strict=strict,
    )
    with told_plainly():
        places = _Places(client, device)
        sent = _send_models(client, work)
        looked = _looked(client, sent, work, [] if found.known else found.todo)
        job = Job(
            **vars(found),
            device=looked.device,
            manifest=looked.manifest,
            yolo=None,
            teacher=None,
        )
        if job.todo and not job.known:
            _say(looked, job)
        elif job.todo:
            refuse_if_too_much(known_bytes(out), job, out)

        def fill(writer: CacheWriter, bar: Progress, stop: StopRequest) -> None:
            if job.todo:
                _write_all(client, sent, work, job, places, writer, tally, bar, stop, stages)

        return into_cache(
            job,
            fill,
            workers=workers,
            tally=tally,
            stages=stages,
            started=started,
            progress=progress,
        )


def _looked(client: Client, sent: Sequence[Future[Any]], work: _Work, todo: Todo) -> _Looked:
    """The first look of a worker, at the first photos of which one can be used."""
    skipped: dict[str, str] = {}
    start = 0
    while True:
        tried = _absolute(todo[start : start + _TRIED_AT_ONCE])
        looked: _Looked = _submitted(client, sent, _look, work, tried).result()
        skipped |= looked.skipped
        start += _TRIED_AT_ONCE
        if looked.photos or start >= len(todo):
            return looked._replace(skipped=skipped)


def _say(looked: _Looked, job: Job) -> None:
    """What the first look tells on one machine."""
    if not looked.photos:
        raise nothing_usable(job, looked.skipped)
    if looked.found is not None:
        picture = picture_of(job.out)
        write_atomic(picture, looked.picture)
        say(looked.found, picture)
    refuse_if_too_much(looked.bytes_per_row, job, job.out)


def _write_all(
    client: Client,
    sent: Sequence[Future[Any]],
    work: _Work,
    job: Job,
    places: _Places,
    writer: CacheWriter,
    tally: Tally,
    bar: Progress,
    stop: StopRequest,
    stages: Stages,
) -> None:
    """Hand out shards, as many as are computed at once, and commit them as they come.

    When a stop is asked for, the shards in work are the last.
    """
    pieces = list(_pieces(job.todo, writer.manifest.shard_rows))
    numbers = writer.free_shards(len(pieces))
    token = writer.reserve(numbers)
    waiting = deque(zip(numbers, pieces, strict=True))
    running: set[Future[Any]] = set()
    view = 0  # of the shards in work
    try:
        while True:
            room = 0 if stop.asked else places.count(job.device) - len(running)
            while waiting and room > 0:
                shard, todo = waiting[0]
                if todo[0][0].view != view and running:
                    break  # what the views before were made of is to be known
                view = todo[0][0].view
                waiting.popleft()
                known = tally.of_photos(key[:2] for key, _ in todo)
                work_on = (work, writer.manifest, shard, token, _absolute(todo), known)
                running.add(_submitted(client, sent, _write_shard, *work_on))
                room -= 1
            if not running:
                writer.remove_temporary()  # of workers that were killed
                return
            for future in _finished(running):
                running.remove(future)
                done: _Done = future.result()
                if done.commit is not None:
                    writer.adopt(done.commit)
                tally.add(done.tally)
                stages.add(done.times, places.workers)
                bar.reach(tally.handled)
    finally:
        client.cancel(list(running))


def _finished(running: set[Future[Any]]) -> set[Future[Any]]:
    """Those that have ended within a second."""
    try:
        ended: set[Future[Any]] = wait(running, timeout=1.0, return_when="FIRST_COMPLETED").done
    except TimeoutError:
        return set()
    return ended


class _Places:
    """How many shards the workers there are compute at once; who joins is asked for its device."""

    def __init__(self, client: Client, asked_for: str) -> None:
        self._client, self._asked_for = client, asked_for
        self._known = {one.address: one for one in devices(client, asked_for)}

    @property
    def workers(self) -> int:
        return max(1, len(self._known))

    def count(self, device: str) -> int:
        threads = self._client.nthreads()
        for address in self._known.keys() - threads.keys():
            log.warning("worker %s is gone; its shards in work go to others", self._known[address])
        self._known = {
            address: self._known[address] for address in threads if address in self._known
        }
        if new := [address for address in threads if address not in self._known]:
            check_versions(self._client, new)
            joined = devices(self._client, self._asked_for, workers=new)
            self._known |= {one.address: one for one in joined}
            check_distinct(list(self._known.values()))
        at_once = 1 if device == "cpu" else _AT_ONCE_ON_GPU
        return sum(min(count, at_once) for count in threads.values())


def _pieces(todo: Todo, rows: int) -> Iterator[Todo]:
    """What goes into one shard: up to so many rows, of one split and view."""
    for _, of_kind in itertools.groupby(todo, key=lambda item: shard_kind(item[0])):
        several = list(of_kind)
        yield from (several[start : start + rows] for start in range(0, len(several), rows))


def _absolute(todo: Todo) -> Todo:
    """The same where the workers' current folder is another."""
    return [
        (
            key,
            dataclasses.replace(
                sample,
                image_path=absolute(sample.image_path),
                mask_path=None if sample.mask_path is None else absolute(sample.mask_path),
            ),
        )
        for key, sample in todo
    ]


def _model_files(config: ExtractConfig) -> dict[str, Path]:
    """The model files that are used, by the setting that names them."""
    wanted = {"logits": _MODELS[1:], "features": _MODELS[:1]}.get(config.store, _MODELS)
    paths = {name: getattr(config, name) for name in wanted}
    return {name: path for name, path in paths.items() if path is not None}


def _with_absolute_paths(config: ExtractConfig) -> ExtractConfig:
    return config.model_copy(
        update={name: path.absolute() for name, path in _model_files(config).items()}
    )


def _send_models(client: Client, work: _Work) -> list[Future[Any]]:
    """The model files as data in the cluster, where not every worker has them under their paths."""
    if all(asked(client, answer, sealed(_has_models, work)).values()):
        return []
    files = _model_files(work.config)
    for name, path in files.items():
        if hashlib.sha256(path.read_bytes()).hexdigest() != work.sha256[name]:
            raise ClusterError(
                f"{path} has its weights in files of their own, and is not on all workers: put it there "
                "under the same path"
            )
    log.info("sending %s to the workers", " and ".join(path.name for path in files.values()))
    return [client.scatter(path.read_bytes(), hash=False) for path in files.values()]


def _submitted(
    client: Client, sent: Sequence[Future[Any]], function: Callable[..., Any], *arguments: Any
) -> Future[Any]:
    return client.submit(unsealed, sealed(function, *arguments), *sent, pure=False)


# From here on: in a worker.


class _Opened:
    """The models of this process, and who uses them when."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self.turn = threading.Lock()
        # dask may give a worker of many threads more than it is meant to do at once
        self.places = threading.Semaphore(1 if models.device == "cpu" else _AT_ONCE_ON_GPU)


_opening = threading.Lock()
_opened: dict[str, _Opened] = {}  # one at most: they fill a GPU


def _open(work: _Work, sent: Sequence[bytes]) -> _Opened:
    """The models, loaded on first use."""
    key = f"{work.device} {work.config.model_dump_json()}"
    with _opening:
        if key not in _opened:
            _opened.clear()
            try:
                use_threads(threads_here())
                config = _with_files(work, sent)
                models = open_models(config, work.how, present(work.device))
                warm_up(models, work.batch_size or DEFAULT_BATCH[models.device])
            except KdcacheError as error:
                raise ClusterError(f"{_here()}: {error}") from error
            _opened[key] = _Opened(models)
        return _opened[key]


def _has_models(work: _Work) -> bool:
    """Whether the files lie here under the client's paths, and are the same."""
    files = _model_files(work.config)
    return all(
        path.is_file() and model_sha256(path) == work.sha256[name] for name, path in files.items()
    )


def _with_files(work: _Work, sent: Sequence[bytes]) -> ExtractConfig:
    """The settings with paths that this machine has."""
    files = _model_files(work.config)
    paths = {}
    for (name, path), data in zip(files.items(), sent, strict=False):
        paths[name] = Path(get_worker().local_directory) / f"{work.sha256[name]}{path.suffix}"
        write_atomic(paths[name], data)
    for name, path in {**files, **paths}.items():
        if not path.is_file():
            raise ModelError(f"{path}: no such file; give all workers the same --{name}")
    return work.config.model_copy(update=paths)


def _look(work: _Work, todo: Todo, *sent: bytes) -> _Looked:
    """Open the models and run them on the first photos."""
    opened = _open(work, sent)
    _check_sees(work.images, "the photos in")
    models, tally = opened.models, Tally(work.strict)
    prepared = prepare(todo, work.how, _threads(work), tally)
    first = list(itertools.islice(prepared, LOOKED_AT))
    found, picture, a_row = None, b"", 0.0
    if first:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "check.png"
            found, seen = first_look(first, models.yolo, models.teacher, file)
            picture = file.read_bytes()
        a_row = bytes_per_row(seen, models.manifest)
    return _Looked(models.device, models.manifest, len(first), tally.skipped, found, picture, a_row)


def _write_shard(
    work: _Work,
    manifest: Manifest,
    shard: int,
    token: str,
    todo: Todo,
    tally: Tally,
    *sent: bytes,
) -> _Done:
    """Compute and write the files of one shard; the client commits it."""
    opened, wanted = _open(work, sent), still_wanted()
    models = opened.models
    with opened.places:
        _refuse_other_results(models.manifest, manifest)
        _check_sees(work.images, "the photos in")
        _check_sees(work.out / "zarr.json", "the cache at")
        stages = Stages(_threads(work))
        rows = prepare(todo, work.how, _threads(work), tally, stages)
        size = work.batch_size or DEFAULT_BATCH[models.device]
        open_shard, commit = OpenShard(work.out, manifest, shard), None
        try:
            with Progress("shard", len(todo), "image", shown=False) as bar:
                run(
                    rows,
                    models,
                    open_shard,
                    size,
                    tally,
                    bar,
                    lambda: not wanted(),
                    stages,
                    opened.turn,
                )
            if not wanted():
                raise CacheError(f"shard {shard} is not wanted any more")
            if open_shard.keys:
                with stages.busy(WRITE):
                    may_write(work.out, shard, token)
                    commit = open_shard.finish()
        except BaseException:
            open_shard.abandon()
            raise
    return _Done(commit, tally, stages.times())


def _threads(work: _Work) -> int:
    return max(1, min(work.workers, threads_here()))


def _refuse_other_results(own: Manifest, others: Manifest) -> None:
    """Raise ClusterError where this worker's rows would not be what the cache's others are."""
    for name in sorted(own.fingerprint.keys() | others.fingerprint.keys()):
        here, there = own.fingerprint.get(name), others.fingerprint.get(name)
        if here != there:
            raise ClusterError(
                f"{_here()} would make rows with {name} = {here}, the others with {there}: give all "
                "workers the same device (--device) and packages"
            )


def _check_sees(place: Place, what: str) -> None:
    if isinstance(place, Path) and not place.exists():
        folder = place.parent if place.name == "zarr.json" else place
        raise ClusterError(
            f"{_here()} does not see {what} {folder}: mount it there under the same path, or use a URL"
        )


def _here() -> str:
    return f"worker {get_worker().address} on {socket.gethostname()}"
