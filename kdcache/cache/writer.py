"""Writing a cache: whole shards, data before the commit record, one writer at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import shutil
import threading
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.compatible import as_found, refuse_other
from kdcache.cache.create import create, create_at_url
from kdcache.cache.format import (
    AllRemarks,
    Commit,
    Remarks,
    Reserved,
    Root,
    RowKey,
    commit_name,
    manifest_digest,
    node_bytes,
    read_commits,
    read_node,
    read_remarks,
    read_root,
)
from kdcache.cache.layout import Manifest
from kdcache.cache.lock import locked
from kdcache.cache.open_shard import EncodedRow, OpenShard, encoded_row
from kdcache.durable import TEMPORARY_SUFFIX, fsync, write_atomic
from kdcache.errors import CacheError, KdcacheError
from kdcache.places import Place, Url, files_below, make_folder, remove_folder

log = logging.getLogger(__name__)


class CacheWriter:
    """Appends rows to a new or existing cache; a context manager.

    Rows go to disk as they come; a full shard is committed, and so is the last one when the
    block ends well or is interrupted from the keyboard. Any other exception drops the rows of
    the open shard; whatever was committed stays. Raises FingerprintError when the cache was
    made in another way, CacheError when another writer has it open.
    """

    def __init__(self, path: Place, manifest: Manifest) -> None:
        self._path = path
        # An interrupt may end the block while another thread is inside `append`.
        self._row_lock = threading.RLock()
        self._open: OpenShard | None = None
        self._bytes_written = 0  # in the shards before it
        self._torn = False  # a row reached some arrays only: the open shard must not be committed
        if isinstance(path, Path) and not path.exists():
            create(path, manifest)
        self._lock = locked(path)
        try:
            if isinstance(path, Url) and not (path / "zarr.json").is_file():
                create_at_url(path, manifest)
            self._root = read_root(path)
            commits = read_commits(path, self._root)
            self.committed: set[RowKey] = {key for commit in commits for key in commit.keys}
            self.manifest = as_found(manifest, self._root.manifest)
            self._specs = self.manifest.arrays()
            refuse_other(path, self._root.manifest, self.manifest)
            self._shards = {commit.shard for commit in commits}
            self._free = 0  # all shards below it are committed
            self._sweep()
            self._declare()  # nothing is reserved: whoever still writes one of those finds that it may not
            self._lengthen(self._root.array_rows)  # a killed writer may have done it in part
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._row_lock:
            try:
                if (kind is None or issubclass(kind, KeyboardInterrupt)) and not self._torn:
                    self.commit()
                    # after an interrupt others may still be at work on theirs
                    keep = self._root.reserved if kind else None
                    self._declare(shards=self._shard, reserved=keep)
            finally:
                self._torn = True  # whatever still comes from another thread is refused
                if self._open is not None:
                    self._open.abandon()
                self._lock.close()

    @property
    def bytes_written(self) -> int:
        """Compressed rows so far, committed or not."""
        return self._bytes_written + (self._open.bytes_written if self._open else 0)

    def encoded(self, key: RowKey, arrays: Mapping[str, NDArray[np.generic]]) -> EncodedRow:
        """A row, given as array path to values, as it will be stored: many threads may make some."""
        return encoded_row(self.manifest, self._specs, key, arrays)

    def append(self, row: EncodedRow) -> None:
        """Add one row; commits when the shard is full.

        A row of another split or view than the open shard's starts a new shard: a split can be
        copied by whole files, and views that are added later are in the same ones.
        """
        with self._row_lock:
            self._append(row)

    def _append(self, row: EncodedRow) -> None:
        keys = self._open.keys if self._open else []
        if row.key in self.committed or row.key in keys:
            raise CacheError(f"row {tuple(row.key)} is in {self._path} already")
        if keys and shard_kind(keys[-1]) != shard_kind(row.key):
            self.commit()
        self._refuse_torn()
        self._torn = True
        if self._open is None:
            self._open = OpenShard(self._path, self.manifest, self._shard)
        self._open.append(row)
        self._torn = False
        if len(self._open.keys) == self.manifest.shard_rows:
            self.commit()

    def commit(self) -> None:
        """Make the rows of the open shard durable: files, array sizes, then the commit record."""
        self._refuse_torn()
        if self._open is None:
            return
        self._torn = True
        self._declare(rows=(self._shard + 1) * self.manifest.shard_rows)
        self._record(self._open.finish())
        self._bytes_written += self._open.bytes_written
        self._open = None
        self._torn = False

    def reserve(self, shards: Sequence[int]) -> str:
        """Let others write these shards, each as an `OpenShard` does; a token for `may_write`.

        What they finish becomes part of the cache by `adopt`.
        """
        token = uuid.uuid4().hex
        self._declare(
            rows=(max(shards) + 1) * self.manifest.shard_rows,
            reserved=Reserved(token, min(shards), max(shards) + 1),
        )
        return token

    def adopt(self, commit: Commit) -> None:
        """Commit a shard whose files were written elsewhere: by another process, or by a copy."""
        if commit.manifest != manifest_digest(self.manifest) or commit.shard in self._shards:
            raise CacheError(f"shard {commit.shard} of {self._path} was made for another cache")
        self._record(commit)
        self._bytes_written += sum(record.size_bytes for record in commit.objects.values())

    def discard(self, shards: Sequence[int]) -> None:
        """Take away what was written of reserved shards that will not be adopted, as far as it can be.

        What stays, because the disk or store has failed, the next writer removes.
        """
        with contextlib.suppress(OSError, KdcacheError):
            self._lock.check()
            for shard in set(shards) - self._shards:
                for spec in self._specs:
                    (self._path / spec.shard_path(shard)).unlink(missing_ok=True)

    def _record(self, commit: Commit) -> None:
        self._lock.check()
        if any(key.view for key in commit.keys):
            self._settle_augmentation()
        target = self._path / commit_name(self._root.commits, commit.shard)
        make_folder(target.parent)
        write_atomic(target, commit.document())
        fsync(target.parent.parent)
        self.committed.update(commit.keys)
        self._shards.add(commit.shard)

    def remove_temporary(self) -> None:
        """Remove what killed processes left of files that others have written since."""
        self._remove_temporary(files_below(self._path))

    def _remove_temporary(self, files: Iterable[str]) -> None:
        for name in files:
            if name.endswith(TEMPORARY_SUFFIX):
                (self._path / name).unlink(missing_ok=True)

    def free_shards(self, count: int) -> list[int]:
        """So many numbers of shards that there are not, from the lowest."""
        numbers = (n for n in itertools.count(self._shard) if n not in self._shards)
        return list(itertools.islice(numbers, count))

    def expect(self, shards: int) -> None:
        """Declare room for so many further shards at once, instead of growing one by one."""
        self._declare(rows=(self._shard + shards) * self.manifest.shard_rows)

    def remark(
        self,
        dataset: str,
        remarks: Remarks,
        in_train_and_val: Sequence[tuple[str, str]] = (),
        replace: bool = True,
    ) -> None:
        """Store what there is to say about a dataset; what was said of it before goes if `replace`."""
        before = self._remarks()
        if replace or dataset not in before.datasets:
            before = before.with_one(dataset, remarks)
        self._write_remarks(dataclasses.replace(before, in_train_and_val=in_train_and_val))

    def take_over(self, remarks: AllRemarks) -> None:
        """Store what another cache says about datasets whose rows come from there, beside the own."""
        merged = self._remarks()
        for dataset, said in remarks.datasets.items():
            merged = merged.with_one(dataset, said)
        pairs = dict.fromkeys((*merged.in_train_and_val, *remarks.in_train_and_val))
        mirrored = {**remarks.mirrored, **merged.mirrored}  # the own are of the own models
        self._write_remarks(
            dataclasses.replace(merged, in_train_and_val=list(pairs), mirrored=mirrored)
        )

    def _remarks(self) -> AllRemarks:
        try:
            return read_remarks(self._path)
        except CacheError:  # lost or altered: `verify` says so, writing them makes it good
            return AllRemarks()

    def _write_remarks(self, remarks: AllRemarks) -> None:
        path, document = self._path / "skipped" / "zarr.json", remarks.document()
        if not path.is_file() or path.read_bytes() != document:
            write_atomic(path, document)

    def _refuse_torn(self) -> None:
        if self._torn:
            raise CacheError(
                f"{self._path}: an earlier write failed; run again to write those rows"
            )

    @property
    def _shard(self) -> int:
        """The number of the open shard: the lowest free one, so that a lost shard is made good."""
        while self._free in self._shards:  # from where it was: from 0 each time is quadratic
            self._free += 1
        return self._free

    def _settle_augmentation(self) -> None:
        """Say in the root how the views are made of which the first are about to be committed."""
        manifest, augmentation = self._root.manifest, self.manifest.augmentation
        if augmentation == manifest.augmentation:
            return
        versions = {**self.manifest.versions, **manifest.versions}
        settled = dataclasses.replace(manifest, augmentation=augmentation, versions=versions)
        self._root = dataclasses.replace(self._root, manifest=settled)
        write_atomic(self._path / "zarr.json", self._root.document())

    def _declare(self, rows: int = 0, shards: int = 0, reserved: Reserved | None = None) -> None:
        """Raise the root's array length or number of shards, on disk; say what is reserved now."""
        rows, shards = max(rows, self._root.array_rows), max(shards, self._root.shards)
        root = dataclasses.replace(self._root, array_rows=rows, shards=shards, reserved=reserved)
        if root == self._root:
            return
        # the root first: a length below the root's is a growth that was cut short, not an edit
        self._root = root
        write_atomic(self._path / "zarr.json", self._root.document())
        self._lengthen(rows)

    def _lengthen(self, rows: int) -> None:
        """Bring every array's zarr.json to the root's length; they never shrink."""
        for spec in self._specs:
            document = read_node(self._path, self._root, spec.path)
            if document["shape"][0] < rows:
                document["shape"][0] = rows
                write_atomic(self._path / spec.path / "zarr.json", node_bytes(document))

    def _sweep(self) -> None:
        """Remove what a killed writer left: temporary files, and the shards it had open.

        Raises CacheError when more shards than it can have had open have no commit record: those
        are lost records.
        """
        files, arrays = files_below(self._path), {spec.path for spec in self._specs}
        orphans: dict[int, list[str]] = {}
        for file in files:
            folder, _, name = file.rpartition("/")
            number = name.split(".")[1] if name.startswith("c.") else ""
            if folder in arrays and number.isdigit() and int(number) not in self._shards:
                orphans.setdefault(int(number), []).append(file)
        lost = [number for number in sorted(orphans) if not self._was_reserved(number)]
        commits = f"{self._root.commits}/"
        if len(lost) > 1 or not any(file.startswith(commits) for file in files):
            raise CacheError(
                f"{self._path} has files of shards {lost} without a commit record, and an "
                "interrupted extraction leaves one such shard at most: restore commits/ from a "
                "backup; or delete those files (c.<shard>.*) to have their rows computed again"
            )
        self._remove_temporary(files)
        for name in itertools.chain(*orphans.values()):
            (self._path / name).unlink(missing_ok=True)
        if isinstance(self._path, Path):
            for record in (self._path / self._root.commits).iterdir():
                if record.is_dir() and not (record / "zarr.json").exists():
                    shutil.rmtree(record)
        self._root = remove_replaced(self._path, self._root)

    def _was_reserved(self, shard: int) -> bool:
        reserved = self._root.reserved
        return reserved is not None and reserved.first <= shard < reserved.stop


def is_foreign(path: Place) -> bool:
    """Whether something is there that is no cache, nor what a killed writer left of making one."""
    if not path.exists() or (path / "zarr.json").is_file():
        return False
    return isinstance(path, Path) or not all(name.endswith("zarr.json") for name in path.files())


def may_write(path: Place, shard: int, token: str) -> None:
    """Raise CacheError when a shard is not this run's to finish: others have taken it over."""
    root = read_root(path)
    if (
        root.reserved is None
        or root.reserved.token != token
        or (path / commit_name(root.commits, shard)).is_file()
    ):
        raise CacheError(f"shard {shard} of {path} is written by others now; nothing of it is kept")


def remove_replaced(path: Place, root: Root) -> Root:
    """Delete what the last refresh made obsolete; the root record then names it no more."""
    if not root.replaced:
        return root
    for name in root.replaced:
        remove_folder(path / name)
    root = dataclasses.replace(root, replaced=())
    write_atomic(path / "zarr.json", root.document())
    return root


def shard_kind(key: RowKey) -> tuple[str, int]:
    """Rows of one shard have this in common."""
    return key.split, key.view
