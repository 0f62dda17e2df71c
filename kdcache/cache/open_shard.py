"""One shard while it is written: rows go to its files as they come, one file an array."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.format import Commit, RowKey, manifest_digest
from kdcache.cache.layout import ArraySpec, Manifest
from kdcache.cache.shard import Encoded, ShardFile, encode_chunk
from kdcache.durable import fsync
from kdcache.errors import CacheError
from kdcache.places import Place, Url


class EncodedRow(NamedTuple):
    """A row as a cache stores it, by array path."""

    key: RowKey
    chunks: Mapping[str, Encoded]


class OpenShard:
    """The files of one shard, for one process and one thread at a time; any may encode rows.

    Nothing of it exists for a reader until its commit record is written, which is not done here.
    """

    def __init__(self, path: Place, manifest: Manifest, shard: int) -> None:
        self._path = path
        self.manifest = manifest
        self.shard = shard
        self.keys: list[RowKey] = []
        self.bytes_written = 0
        self._specs = manifest.arrays()
        self._files: dict[str, ShardFile] = {}

    def encoded(self, key: RowKey, arrays: Mapping[str, NDArray[np.generic]]) -> EncodedRow:
        """A row, given as array path to values, as it will be stored."""
        return encoded_row(self.manifest, self._specs, key, arrays)

    def append(self, row: EncodedRow) -> None:
        """Add one row."""
        for spec in self._specs:
            if spec.path not in self._files:
                file = self._path / spec.shard_path(self.shard)
                self._files[spec.path] = ShardFile(file, self.manifest.shard_rows)
            chunk = row.chunks[spec.path]
            self._files[spec.path].append(chunk)
            self.bytes_written += len(chunk.stored)
        self.keys.append(row.key)

    def finish(self) -> Commit:
        """Make the files durable under their own names; what is to be recorded of them."""
        if isinstance(self._path, Url):  # uploads, side by side
            with ThreadPoolExecutor(len(self._files), thread_name_prefix="upload") as pool:
                records = list(pool.map(ShardFile.finish, self._files.values()))
        else:
            records = [file.finish() for file in self._files.values()]
        objects = dict(zip(self._files, records, strict=True))
        for spec in self._specs:
            fsync(self._path / spec.path)
        return Commit(
            shard=self.shard,
            manifest=manifest_digest(self.manifest),
            keys=tuple(self.keys),
            objects=objects,
        )

    def abandon(self) -> None:
        """Remove what was not finished."""
        for file in self._files.values():
            file.abandon()


def encoded_row(
    manifest: Manifest,
    specs: list[ArraySpec],
    key: RowKey,
    arrays: Mapping[str, NDArray[np.generic]],
) -> EncodedRow:
    """A row as it will be stored; CacheError when it is not of the manifest's form."""
    for spec in specs:
        array = arrays[spec.path]
        if (array.shape, array.dtype) != (spec.row.shape, np.dtype(spec.row.dtype)):
            raise CacheError(
                f"{key.sample_id}: {spec.path} is {array.dtype} {array.shape}, the cache holds "
                f"{spec.row.dtype} {spec.row.shape}"
            )
    chunks = {
        spec.path: encode_chunk(spec.transform.forward(arrays[spec.path]), manifest.compression)
        for spec in specs
    }
    return EncodedRow(key, chunks)
