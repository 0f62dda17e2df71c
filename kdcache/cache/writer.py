"""Writing a cache: whole shards, data before the commit record, one writer at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import itertools
import json
import logging
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from kdcache.cache.format import (
    AllRemarks,
    Commit,
    Remarks,
    Root,
    RowKey,
    commit_path,
    group_document,
    manifest_digest,
    node_bytes,
    node_digest,
    read_commits,
    read_node,
    read_remarks,
    read_root,
)
from kdcache.cache.layout import ArraySpec, Manifest
from kdcache.cache.shard import LZ4_LEVEL, ZSTD_LEVEL, Encoded, ShardFile, encode_chunk
from kdcache.durable import TEMPORARY_SUFFIX, fsync, lock, write_atomic
from kdcache.errors import CacheError, FingerprintError

log = logging.getLogger(__name__)


class EncodedRow(NamedTuple):
    """A row as a cache stores it, by array path."""

    key: RowKey
    chunks: Mapping[str, Encoded]


class CacheWriter:
    """Appends rows to a new or existing cache; a context manager.

    Rows go to disk as they come; a full shard is committed, and so is the last one when the
    block ends well or is interrupted from the keyboard. Any other exception drops the rows of
    the open shard; whatever was committed stays. Raises FingerprintError when the cache was
    made in another way, CacheError when another writer has it open.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path = path
        self._keys: list[RowKey] = []
        self._files: dict[str, ShardFile] = {}
        # An interrupt may end the block while another thread is inside `append`.
        self._row_lock = threading.RLock()
        self.bytes_written = 0  # compressed rows so far, committed or not
        self._torn = False  # a row reached some arrays only: the open shard must not be committed
        if not path.exists():
            _create(path, manifest)
        self._lock = locked(path)
        try:
            self._root = read_root(path)
            self.manifest = _in_its_generations(manifest, self._root.manifest)
            self._specs = self.manifest.arrays()
            _check_same(path, self._root.manifest, self.manifest)
            commits = read_commits(path, self._root)
            self.committed: set[RowKey] = {key for commit in commits for key in commit.keys}
            self._shards = {commit.shard for commit in commits}
            self._free = 0  # all shards below it are committed
            self._sweep()
            self._lengthen(self._root.array_rows)  # a killed writer may have done it in part
        except BaseException:
            os.close(self._lock)
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
                    self._declare(shards=self._shard)
            finally:
                self._torn = True  # whatever still comes from another thread is refused
                for file in self._files.values():
                    file.abandon()
                os.close(self._lock)

    def encoded(self, key: RowKey, arrays: Mapping[str, NDArray[np.generic]]) -> EncodedRow:
        """A row, given as array path to values, as it will be stored: many threads may make some."""
        self._check_row(key, arrays)
        compression = self.manifest.compression
        chunks = {
            spec.path: encode_chunk(spec.transform.forward(arrays[spec.path]), compression)
            for spec in self._specs
        }
        return EncodedRow(key, chunks)

    def append(self, row: EncodedRow) -> None:
        """Add one row; commits when the shard is full.

        A row of another split than the open shard's starts a new shard, so that a split can be
        copied or dropped by whole files.
        """
        with self._row_lock:
            self._append(row.key, row.chunks)

    def _append(self, key: RowKey, chunks: Mapping[str, Encoded]) -> None:
        if key in self.committed or key in self._keys:
            raise CacheError(f"row {tuple(key)} is in {self._path} already")
        if self._keys and self._keys[-1].split != key.split:
            self.commit()
        self._refuse_torn()
        self._torn = True
        if not self._files:
            self._open_shard()
        for spec in self._specs:
            chunk = chunks[spec.path]
            self._files[spec.path].append(chunk)
            self.bytes_written += len(chunk.stored)
        self._keys.append(key)
        self._torn = False
        if len(self._keys) == self.manifest.shard_rows:
            self.commit()

    def commit(self) -> None:
        """Make the rows of the open shard durable: files, array sizes, then the commit record."""
        self._refuse_torn()
        if not self._keys:
            return
        self._torn = True
        self._declare(rows=(self._shard + 1) * self.manifest.shard_rows)
        objects = {path: file.finish() for path, file in self._files.items()}
        for spec in self._specs:
            fsync(self._path / spec.path)
        record = Commit(
            shard=self._shard,
            manifest=manifest_digest(self.manifest),
            keys=tuple(self._keys),
            objects=objects,
        )
        target = commit_path(self._path, self._root.commits, self._shard)
        target.parent.mkdir(exist_ok=True)
        write_atomic(target, record.document())
        fsync(target.parent.parent)
        self.committed.update(self._keys)
        self._shards.add(self._shard)
        self._keys, self._files = [], {}
        self._torn = False

    def expect(self, rows: int) -> None:
        """Declare room for so many further rows at once, instead of growing shard by shard."""
        shard_rows = self.manifest.shard_rows
        self._declare(rows=(self._shard + -(-rows // shard_rows)) * shard_rows)

    def remark(
        self,
        dataset: str,
        remarks: Remarks,
        in_train_and_val: Sequence[tuple[str, str]] = (),
        replace: bool = True,
    ) -> None:
        """Store what there is to say about a dataset; what was said of it before goes if `replace`."""
        path = self._path / "skipped" / "zarr.json"
        try:
            before = read_remarks(self._path)
        except CacheError:  # lost or altered: `verify` says so, this makes it good
            before = AllRemarks()
        if replace or dataset not in before.datasets:
            before = before.with_one(dataset, remarks)
        document = dataclasses.replace(before, in_train_and_val=in_train_and_val).document()
        if not path.is_file() or path.read_bytes() != document:
            write_atomic(path, document)

    def _refuse_torn(self) -> None:
        if self._torn:
            raise CacheError(
                f"{self._path}: an earlier write failed; run again to write those rows"
            )

    def _check_row(self, key: RowKey, arrays: Mapping[str, NDArray[np.generic]]) -> None:
        for spec in self._specs:
            array = arrays[spec.path]
            if (array.shape, array.dtype) != (spec.row.shape, np.dtype(spec.row.dtype)):
                raise CacheError(
                    f"{key.sample_id}: {spec.path} is {array.dtype} {array.shape}, the cache holds "
                    f"{spec.row.dtype} {spec.row.shape}"
                )

    def _open_shard(self) -> None:
        for spec in self._specs:
            path = self._path / spec.shard_path(self._shard)
            self._files[spec.path] = ShardFile(path, self.manifest.shard_rows)

    @property
    def _shard(self) -> int:
        """The number of the open shard: the lowest free one, so that a lost shard is made good."""
        while self._free in self._shards:  # from where it was: from 0 each time is quadratic
            self._free += 1
        return self._free

    def _declare(self, rows: int = 0, shards: int = 0) -> None:
        """Raise the root's array length or number of shards, on disk."""
        rows, shards = max(rows, self._root.array_rows), max(shards, self._root.shards)
        if (rows, shards) == (self._root.array_rows, self._root.shards):
            return
        # the root first: a length below the root's is a growth that was cut short, not an edit
        self._root = dataclasses.replace(self._root, array_rows=rows, shards=shards)
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
        """Remove what a killed writer left: temporary files, and the shard it had open.

        Raises CacheError when more shards than that have no commit record: those are lost records.
        """
        orphans: dict[int, list[Path]] = {}
        for spec in self._specs:
            for file in (self._path / spec.path).glob("c.*"):
                number = file.name.split(".")[1]
                if number.isdigit() and int(number) not in self._shards:
                    orphans.setdefault(int(number), []).append(file)
        if len(orphans) > 1 or not (self._path / self._root.commits).is_dir():
            raise CacheError(
                f"{self._path} has files of shards {sorted(orphans)} without a commit record, and an "
                "interrupted extraction leaves one such shard at most: restore commits/ from a "
                "backup; or delete those files (c.<shard>.*) to have their rows computed again"
            )
        for file in [
            *self._path.rglob(f"*{TEMPORARY_SUFFIX}"),
            *itertools.chain(*orphans.values()),
        ]:
            file.unlink(missing_ok=True)
        for folder in (self._path / self._root.commits).iterdir():
            if folder.is_dir() and not (folder / "zarr.json").exists():
                shutil.rmtree(folder)
        self._root = remove_replaced(self._path, self._root)


def remove_replaced(path: Path, root: Root) -> Root:
    """Delete what the last refresh made obsolete; the root record then names it no more."""
    if not root.replaced:
        return root
    for name in root.replaced:
        shutil.rmtree(path / name, ignore_errors=True)
    root = dataclasses.replace(root, replaced=())
    write_atomic(path / "zarr.json", root.document())
    return root


def _create(path: Path, manifest: Manifest) -> None:
    """Lay out an empty cache beside `path` and give it its name when all of it is on disk."""
    groups: dict[str, dict[str, Any]] = {"commits": {}, "features": {}}
    groups |= {tap.folder: tap.as_json() for tap in manifest.taps}
    documents = {name: group_document(attributes) for name, attributes in groups.items()}
    documents |= {spec.path: array_document(spec, manifest) for spec in manifest.arrays()}
    nodes = {name: node_digest(json.loads(text)) for name, text in documents.items()}
    documents["skipped"] = AllRemarks().document()
    documents["."] = Root(manifest=manifest, nodes=nodes, array_rows=0, shards=0).document()
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep_staging(path)
    staging = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        staging.mkdir()
        held = locked(staging)
        try:
            for name, document in documents.items():
                (staging / name).mkdir(parents=True, exist_ok=True)
                write_atomic(staging / name / "zarr.json", document)
            staging.rename(path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            os.close(held)
    except OSError as error:
        if path.exists():  # two writers started at once
            raise CacheError(f"{path} was just made by another process; run again") from error
        raise CacheError(
            f"cannot create {path}: {error.strerror}; nothing is left of it"
        ) from error
    fsync(path.parent)


def _sweep_staging(path: Path) -> None:
    """Remove what killed processes left of creating the same cache."""
    for folder in path.parent.glob(f"{glob.escape(path.name)}.*{TEMPORARY_SUFFIX}"):
        with contextlib.suppress(CacheError, OSError):  # another process is at it
            held = locked(folder)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(held)


def array_document(spec: ArraySpec, manifest: Manifest) -> bytes:
    """The zarr.json of an array without rows, in zarr-python's own words."""
    store = MemoryStore()
    compressors: dict[str, list[BytesBytesCodec]] = {
        "zstd": [ZstdCodec(level=ZSTD_LEVEL, checksum=True)],
        "lz4": [
            BloscCodec(
                cname="lz4",
                clevel=LZ4_LEVEL,
                shuffle="bitshuffle",
                typesize=np.dtype(spec.stored.dtype).itemsize,
            )
        ],
        "none": [],
    }
    zarr.create_array(
        store,
        shape=(0, *spec.stored.shape),
        chunks=(1, *spec.stored.shape),
        shards=(manifest.shard_rows, *spec.stored.shape),
        dtype=spec.stored.dtype,
        fill_value=spec.fill_value,
        filters=None,
        compressors=[*compressors[manifest.compression], Crc32cCodec()],
        # "." keeps a shard one file in the array's folder; "/" makes two folders a file
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=("row", *spec.stored.dimensions),
        attributes=spec.attributes(),
    )
    return node_bytes(json.loads(store._store_dict["zarr.json"].to_bytes()))


def locked(path: Path) -> int:
    """The cache's lock, until the returned descriptor is closed; CacheError when another has it."""
    descriptor = lock(path)
    if descriptor is None:
        raise CacheError(
            f"{path} is being written by another process; wait for it or stop it, then run again"
        )
    return descriptor


def _in_its_generations(asked: Manifest, found: Manifest) -> Manifest:
    """What was asked for, with parts that were refreshed under the names they have since."""
    generations = {tap.name: tap.generation for tap in found.taps}
    return dataclasses.replace(
        asked,
        logits_generation=found.logits_generation,
        taps=tuple(
            dataclasses.replace(tap, generation=generations.get(tap.name, 0)) for tap in asked.taps
        ),
    )


def _check_same(path: Path, found: Manifest, asked: Manifest) -> None:
    """Refuse to mix rows made in two ways; a change of library versions is only worth a warning."""
    for what, here, wanted in (
        ("features", bool(found.taps), bool(asked.taps)),
        ("teacher logits", found.logits_dtype is not None, asked.logits_dtype is not None),
    ):
        if here != wanted:
            addable = wanted and what == "teacher logits"
            raise FingerprintError(
                f"{path} was extracted {'with' if here else 'without'} {what}, now it is to be "
                f"{'with' if wanted else 'without'}: use another --out, or the options it was "
                "made with" + (", or --refresh teacher, which adds them" if addable else "")
            )
    for field in sorted(found.fingerprint.keys() | asked.fingerprint.keys()):
        old, new = found.fingerprint.get(field), asked.fingerprint.get(field)
        if old != new:
            raise FingerprintError(
                f"{path} was extracted with {field} = {old}, now {new} was asked for; "
                "use another --out, or the settings and files the cache was made with"
            )
    for field in ("shard_rows", "compression", "size_px", "logits_dtype", "taps"):
        old, new = getattr(found, field), getattr(asked, field)
        if old != new:
            raise FingerprintError(
                f"{path} was written with {field} = {old}, now {new} was asked for; "
                "use another --out, or the settings the cache was made with"
            )
    for library in sorted(found.versions.keys() & asked.versions.keys()):
        old, new = found.versions[library], asked.versions[library]
        if old != new:
            log.warning("the cache was made with %s %s, this is %s", library, old, new)
