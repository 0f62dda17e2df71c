"""Copying a cache, whole or thinned, shard by shard, between folders and URLs.

Files whose stored form stays are moved as bytes, against the SHA-256 of the source's commit record;
the others are encoded anew, row by row. What was written is read back before its shard is committed.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from kdcache.cache.compatible import as_found, refuse_other
from kdcache.cache.format import (
    Commit,
    manifest_digest,
    read_commits,
    read_remarks,
    read_root,
)
from kdcache.cache.layout import ArraySpec, Manifest
from kdcache.cache.need import Need, stored_bytes
from kdcache.cache.parts import Loss, Part, parts_of
from kdcache.cache.reader import Cache
from kdcache.cache.shard import ObjectRecord, ShardFile, encode_chunk
from kdcache.cache.thin import Thinning, changes
from kdcache.cache.writer import CacheWriter, is_foreign
from kdcache.durable import NewFile, fsync
from kdcache.errors import CacheError, StorageError
from kdcache.places import Place, Url, read_blocks, resolved
from kdcache.progress import Progress
from kdcache.stop import StopRequest
from kdcache.tables import megabytes, printable

# Rows that are encoded to tell how much all will take.
_TRIED = 3
# Fewer would leave a store waiting while a file is digested.
_THREADS_AT_URL = 4
_LOOKS_EVERY_S = 0.2
_NAMED = 3  # rows of a shard in a message
# Comparing a row of layer 34 takes 23 ms beside the 53 ms of storing it anew.
_MEASURED_EVERY = 4


@dataclass(frozen=True, kw_only=True)
class CopyReport:
    """What a copy did."""

    source: Place
    copy: Place
    changes: list[str]  # in which ways the copy is not the source
    rows: int  # of the source that the copy holds now
    rows_copied: int
    shards_copied: int
    bytes_read: int
    bytes_written: int
    seconds: float
    # by tap, over every fourth row copied: Σ error² / Σ (x − mean)² against the source's features
    added_relative_mse: dict[str, float]


def copy_cache(
    source: Place,
    copy: Place,
    thinning: Thinning | None = None,
    *,
    workers: int = 2,
    progress: bool = False,
) -> CopyReport:
    """Make `copy` hold the rows that `source` has now; those it holds already stay as they are.

    Stopped or killed, the same call goes on. Raises CacheError naming file and rows where the source
    is not as committed: nothing of that shard is committed, and nothing after it. FingerprintError
    where `copy` is another cache.
    """
    started = time.monotonic()
    thinning = thinning or Thinning()
    _refuse_nested(source, copy)
    cache = Cache(source)
    commits, manifest = thinning.commits(cache), thinning.manifest(cache)
    found = _found(copy, manifest)
    todo = _missing(cache, commits, found, manifest, copy)
    _refuse_if_too_much(cache, todo, manifest, copy)
    remarks = thinning.remarks(read_remarks(source), cache)
    with StopRequest().listening() as stop, CacheWriter(copy, manifest) as writer:
        if writer.committed != {key for commit in found for key in commit.keys}:
            raise CacheError(
                f"another process has added rows to {copy} meanwhile; run the same command again"
            )
        if todo or not found:
            writer.take_over(remarks)
        work = _Work(cache, writer, copy, todo)
        if todo:
            work.run(workers, stop, progress)
        if stop.asked:
            raise KeyboardInterrupt
    return CopyReport(
        source=source,
        copy=copy,
        changes=changes(cache, thinning, manifest),
        rows=sum(len(commit.keys) for commit in commits),
        rows_copied=sum(len(commit.keys) for commit in todo),
        shards_copied=len(todo),
        bytes_read=work.bytes_read,
        bytes_written=work.bytes_written,
        seconds=time.monotonic() - started,
        added_relative_mse={tap: loss.relative_mse for tap, loss in work.losses.items()},
    )


def _refuse_nested(source: Place, copy: Place) -> None:
    """Raise CacheError where one of the two lies in the other."""
    from_, to = (f"{resolved(path)}/" for path in (source, copy))
    if to.startswith(from_) or from_.startswith(to):
        how = "are one folder" if from_ == to else "lie in each other"
        raise CacheError(f"{source} and {copy} {how}; copy to a folder beside it")


def _found(copy: Place, manifest: Manifest) -> list[Commit]:
    """The commit records there are; raises CacheError when they are of no such copy."""
    if is_foreign(copy):
        raise CacheError(f"{copy} exists and is not a kdcache cache; choose another place")
    if not (copy / "zarr.json").is_file():
        return []
    root = read_root(copy)
    refuse_other(copy, root.manifest, as_found(manifest, root.manifest))
    return read_commits(copy, root)


def _missing(
    cache: Cache,
    commits: Sequence[Commit],
    found: Sequence[Commit],
    manifest: Manifest,
    copy: Place,
) -> list[Commit]:
    """Shards of the source whose rows the copy has not; CacheError where it has others in their place."""
    home = {key: commit for commit in found for key in commit.keys}
    moved = [part for part in parts_of(cache.manifest, manifest) if part.moved]
    todo = []
    for commit in commits:
        there = [home[key] for key in commit.keys if key in home]
        if not there:
            todo.append(commit)
        elif len(there) < len(commit.keys):
            raise CacheError(
                f"{copy} has {len(there)} of the {len(commit.keys)} rows of shard {commit.shard} of "
                f"{cache.path}: rows were added there by other means; copy to another place"
            )
        elif there[0].keys == commit.keys:
            _refuse_other_bytes(cache, commit, there[0], moved, copy)
    return todo


def _refuse_other_bytes(
    cache: Cache, commit: Commit, there: Commit, moved: Sequence[Part], copy: Place
) -> None:
    """Raise CacheError where a file that should have been moved as it is, is another."""
    for part in moved:
        source, target = part.source[0].path, part.target[0].path
        if target not in there.objects:  # refreshed there since
            continue
        if commit.objects[source].sha256 != there.objects[target].sha256:
            raise CacheError(
                f"{copy} holds the rows of shard {commit.shard} of {cache.path} with other content in "
                f"{target}: it is no copy of it; copy to another place"
            )


def _refuse_if_too_much(
    cache: Cache, todo: Sequence[Commit], manifest: Manifest, copy: Place
) -> None:
    """Raise CacheError where the disk has not the space for the shards to be copied."""
    if isinstance(copy, Url) or not todo:
        return
    parts = parts_of(cache.manifest, manifest)
    rows = sum(len(commit.keys) for commit in todo)
    moved = sum(c.objects[p.source[0].path].size_bytes for c in todo for p in parts if p.moved)
    first = _first_rows(cache)
    tried = [first[c.shard] for c in todo[:: -(-len(todo) // _TRIED)]]
    sizes = [
        stored_bytes(part.row(cache, index), part.target, manifest.compression)
        for part in parts
        if not part.moved
        for index in tried
    ]
    estimated = round(sum(sizes) / len(tried) * rows)
    whole = Need.of(manifest.arrays(), manifest.shard_rows, 0, rows)
    need = Need(rows=rows, size_bytes=moved + estimated, files=whole.files)
    instead = ", or choose another place or fewer bits (--precision)"
    if estimated:
        instead += f"; {megabytes(estimated)} of it are an estimate, from {len(tried)} rows"
    need.refuse_if_too_much(copy, instead)


def _first_rows(cache: Cache) -> dict[int, int]:
    """The number of each shard's first row, by shard."""
    counts = [len(commit.keys) for commit in cache.commits]
    starts = itertools.accumulate(counts, initial=0)
    return {commit.shard: start for commit, start in zip(cache.commits, starts, strict=False)}


class _Stopped(Exception):  # noqa: N818 - nothing is wrong here, but elsewhere
    """Another thread has failed."""


class _Work:
    """The shards to be copied, and how far that is."""

    def __init__(
        self, cache: Cache, writer: CacheWriter, copy: Place, todo: Sequence[Commit]
    ) -> None:
        self._cache, self._writer, self._copy, self._todo = cache, writer, copy, todo
        self._parts = parts_of(cache.manifest, writer.manifest)
        self._first = _first_rows(cache)
        self.losses = {part.taps[1].name: Loss() for part in self._parts if part.taps and todo}
        self._lock = threading.Lock()
        self._failed = threading.Event()
        self.bytes_read = self.bytes_written = 0

    def run(self, workers: int, stop: StopRequest, progress: bool) -> None:
        """Copy them; when a stop is asked for, those begun are the last."""
        shards = self._writer.free_shards(len(self._todo))
        self._writer.reserve(shards)
        total = sum(self._size_bytes(commit, part) for commit in self._todo for part in self._parts)
        if any(isinstance(path, Url) for path in (self._cache.path, self._copy)):
            workers = max(workers, _THREADS_AT_URL)
        # shards that keep all threads at work: of one with codes to be made, these take all the time
        moved = all(part.moved for part in self._parts)
        ahead = -(-workers // len(self._parts)) if moved else workers
        begun: deque[tuple[Commit, int, list[Future[dict[str, ObjectRecord]]]]] = deque()
        bar = Progress("copy", -(-total // 10**6), "MB", shown=progress)
        with bar, ThreadPoolExecutor(workers, thread_name_prefix="copy") as pool:
            try:
                for commit, shard in zip(self._todo, shards, strict=True):
                    if stop.asked:
                        break
                    jobs = [pool.submit(self._write, commit, shard, part) for part in self._parts]
                    begun.append((commit, shard, jobs))
                    while len(begun) > ahead:
                        self._commit(*begun[0], bar)
                        begun.popleft()
                while begun:
                    self._commit(*begun[0], bar)
                    begun.popleft()
            except BaseException as error:
                job_failed = self._failed.is_set()
                self._failed.set()
                pool.shutdown(cancel_futures=True)
                # else a record may have been written just before; a dead store removes nothing
                if job_failed and not isinstance(error, StorageError):
                    self._writer.discard([shard for _, shard, _ in begun])
                raise

    def _commit(
        self,
        commit: Commit,
        shard: int,
        jobs: Sequence[Future[dict[str, ObjectRecord]]],
        bar: Progress,
    ) -> None:
        """Record a shard once all of its files are written."""
        pending = set(jobs)
        while pending:
            done, pending = wait(pending, _LOOKS_EVERY_S, return_when=FIRST_EXCEPTION)
            for job in done:
                if isinstance(job.exception(), Exception):
                    self._failed.set()
                job.result()
            bar.reach(self.bytes_read // 10**6)
        objects = {path: record for job in jobs for path, record in job.result().items()}
        specs = self._writer.manifest.arrays()
        for spec in specs:
            fsync(self._copy / spec.path)
        self._writer.adopt(
            Commit(
                shard=shard,
                manifest=manifest_digest(self._writer.manifest),
                keys=commit.keys,
                objects={spec.path: objects[spec.path] for spec in specs},
            )
        )
        self.bytes_written += sum(record.size_bytes for record in objects.values())

    def _write(self, commit: Commit, shard: int, part: Part) -> dict[str, ObjectRecord]:
        """The files of a part of a shard, written and read back."""
        write = self._moved if part.moved else self._encoded
        try:
            records = write(commit, shard, part)
            for spec in part.target:
                self._read_back(self._copy / spec.shard_path(shard), records[spec.path])
        except OSError as error:
            raise CacheError(
                f"cannot write shard {shard} of {self._copy}: {error}; what is committed stays: make "
                "room or mend the disk, then run the same command again"
            ) from error
        return records

    def _moved(self, commit: Commit, shard: int, part: Part) -> dict[str, ObjectRecord]:
        (source,), (target,) = part.source, part.target
        record = commit.objects[source.path]
        file = NewFile(self._copy / target.shard_path(shard))
        try:
            for block in self._blocks(commit, source):
                file.write(block)
                self._has_read(len(block))
            if (file.size_bytes, file.sha256) != (record.size_bytes, record.sha256):
                raise self._damaged(commit, source, "its bytes are not those that were committed")
            file.place()
        except BaseException:
            file.abandon()
            raise
        return {target.path: record}

    def _blocks(self, commit: Commit, spec: ArraySpec) -> Iterator[bytes]:
        size = commit.objects[spec.path].size_bytes
        try:
            yield from read_blocks(self._cache.path / spec.shard_path(commit.shard), size)
        except OSError as error:
            raise self._damaged(commit, spec, f"it cannot be read: {error}") from error

    def _damaged(self, commit: Commit, spec: ArraySpec, why: str) -> CacheError:
        first, ids = self._first[commit.shard], [key.sample_id for key in commit.keys]
        named = ", ".join(map(printable, ids[:_NAMED])) + " …" * (len(ids) > _NAMED)
        return CacheError(
            f"{self._cache.path / spec.shard_path(commit.shard)} (rows {first} to "
            f"{first + len(ids) - 1}: {named}): {why}; nothing of its shard is copied: restore it from "
            "a backup, then run the same command again (`kdcache verify` names all that is damaged)"
        )

    def _encoded(self, commit: Commit, shard: int, part: Part) -> dict[str, ObjectRecord]:
        manifest = self._writer.manifest
        files = {
            spec.path: ShardFile(self._copy / spec.shard_path(shard), manifest.shard_rows)
            for spec in part.target
        }
        loss = self.losses[part.taps[1].name] if part.taps else None
        size, rows = self._size_bytes(commit, part), len(commit.keys)
        try:
            for slot in range(rows):
                index = self._first[commit.shard] + slot
                arrays = part.row(self._cache, index, None if slot % _MEASURED_EVERY else loss)
                for spec in part.target:
                    stored = spec.transform.forward(arrays[spec.path])
                    files[spec.path].append(encode_chunk(stored, manifest.compression))
                self._has_read(size * (slot + 1) // rows - size * slot // rows)
            return {path: file.finish() for path, file in files.items()}
        except BaseException:
            for file in files.values():
                file.abandon()
            raise

    def _read_back(self, path: Place, record: ObjectRecord) -> None:
        digest = hashlib.sha256()
        for block in read_blocks(path, record.size_bytes):
            digest.update(block)
        if digest.hexdigest() != record.sha256:
            raise CacheError(
                f"{path} was written, but other bytes come back from there; its shard is not committed: "
                "check the disk or store, then run the same command again"
            )

    def _has_read(self, count: int) -> None:
        """Count bytes; ends the thread where another one has failed."""
        if self._failed.is_set():
            raise _Stopped
        with self._lock:
            self.bytes_read += count

    def _size_bytes(self, commit: Commit, part: Part) -> int:
        return sum(commit.objects[spec.path].size_bytes for spec in part.source)
