"""Computing one part of every row anew: new arrays beside the old, and one switch at the end.

Until the switch the cache is what it was; a refresh that was interrupted goes on where it was. The
switch is one atomic write of the root record, which then names the new arrays and commit records.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.create import array_document
from kdcache.cache.format import (
    Commit,
    Root,
    Staged,
    commit_files,
    commit_name,
    group_document,
    manifest_digest,
    next_commits,
    node_digest,
    parse_commit,
    read_commits,
    read_root,
    read_staged,
)
from kdcache.cache.layout import Manifest
from kdcache.cache.lock import locked
from kdcache.cache.shard import ShardFile, encode_chunk
from kdcache.cache.writer import remove_replaced
from kdcache.durable import TEMPORARY_SUFFIX, fsync, write_atomic
from kdcache.errors import CacheError
from kdcache.places import Place, files_below, make_folder, remove_folder


class Refresh:
    """Writes the arrays that `manifest` has and the cache has not; a context manager.

    `todo` are the commit records whose rows still have to be written with `write`; `switch` makes
    the new arrays the cache's. Raises CacheError when another process has the cache open.
    """

    def __init__(self, path: Place, manifest: Manifest) -> None:
        self._path = path
        self._manifest = manifest
        self._digest = manifest_digest(manifest)
        self._lock = locked(path)
        try:
            self._root = remove_replaced(path, read_root(path))
            for file in files_below(path):
                if file.endswith(TEMPORARY_SUFFIX):
                    (path / file).unlink()
            self._folder = next_commits(self._root)
            self._commits = read_commits(path, self._root)
            old = {spec.path for spec in self._root.manifest.arrays()}
            self._specs = [spec for spec in manifest.arrays() if spec.path not in old]
            self._staged = self._stage()
            done = {
                parse_commit(path, self._folder, shard, data, self._digest).shard
                for shard, data in commit_files(path, self._folder).items()
            }
            self.todo = [commit for commit in self._commits if commit.shard not in done]
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
        self._lock.close()

    def write(self, commit: Commit, rows: Iterable[Mapping[str, NDArray[np.generic]]]) -> None:
        """The new arrays of all rows of a commit record, each by array path, in its order."""
        files = {
            spec.path: ShardFile(
                self._path / spec.shard_path(commit.shard),
                self._manifest.shard_rows,
            )
            for spec in self._specs
        }
        try:
            for arrays in rows:
                for spec in self._specs:
                    stored = spec.transform.forward(arrays[spec.path])
                    files[spec.path].append(encode_chunk(stored, self._manifest.compression))
            objects = {path: file.finish() for path, file in files.items()}
        except BaseException:
            for file in files.values():
                file.abandon()
            raise
        for spec in self._specs:
            fsync(self._path / spec.path)
        kept = {spec.path for spec in self._manifest.arrays()}
        record = dataclasses.replace(
            commit,
            manifest=self._digest,
            objects={p: o for p, o in commit.objects.items() if p in kept} | objects,
        )
        self._lock.check()
        target = self._path / commit_name(self._folder, commit.shard)
        make_folder(target.parent)
        write_atomic(target, record.document())
        fsync(target.parent.parent)
        self.todo.remove(commit)

    def switch(self) -> None:
        """Make the new arrays the cache's own, and remove those they replace."""
        if self.todo:
            raise CacheError(f"{len(self.todo)} shards of {self._path} are not refreshed yet")
        kept = {spec.path for spec in self._manifest.arrays()}
        kept |= {tap.folder for tap in self._manifest.taps} | {"features"}
        gone = [
            name for name in self._root.nodes if name not in kept and name != self._root.commits
        ]
        nodes = {name: digest for name, digest in self._root.nodes.items() if name in kept}
        for name, text in self._documents().items():  # rows may have been added since
            write_atomic(self._path / name / "zarr.json", text)
        staged = json.loads(self._staged.document())
        root = Root(
            manifest=self._manifest,
            nodes={**nodes, **self._staged.nodes, self._folder: node_digest(staged)},
            array_rows=self._root.array_rows,
            shards=self._root.shards,
            generation=self._root.generation + 1,
            replaced=[*gone, self._root.commits],
        )
        write_atomic(self._path / "zarr.json", root.document())
        remove_replaced(self._path, root)

    def _stage(self) -> Staged:
        """Go on with the unfinished refresh there is if it is the same one; else begin anew."""
        try:
            found = read_staged(self._path, self._root)
        except CacheError:  # damaged
            found = None
        documents = self._documents()
        staged = Staged(
            manifest=self._digest,
            nodes={name: node_digest(json.loads(text)) for name, text in documents.items()},
        )
        if found != staged:
            for name in (self._folder, *(found.nodes if found else ()), *staged.nodes):
                remove_folder(self._path / name)
            # the record first: what it names is known to be a refresh's
            make_folder(self._path / self._folder)
            write_atomic(self._path / self._folder / "zarr.json", staged.document())
        for name, text in documents.items():  # also where a kill came in between
            make_folder(self._path / name)
            write_atomic(self._path / name / "zarr.json", text)
        return staged

    def _documents(self) -> dict[str, bytes]:
        """The zarr.json of each new group and array, at the length of the others."""
        documents: dict[str, bytes] = {}
        for spec in self._specs:
            document: dict[str, Any] = json.loads(array_document(spec, self._manifest))
            document["shape"][0] = self._root.array_rows
            documents[spec.path] = json.dumps(document, indent=1, ensure_ascii=False).encode()
        for tap in self._manifest.taps:
            if tap.folder not in self._root.nodes:
                documents[tap.folder] = group_document(tap.as_json())
        return documents
