"""Laying out an empty cache: every node of it, whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from kdcache.cache.format import AllRemarks, Root, group_document, node_bytes, node_digest
from kdcache.cache.layout import ArraySpec, Manifest
from kdcache.cache.lock import FolderLock
from kdcache.cache.shard import LZ4_LEVEL, ZSTD_LEVEL
from kdcache.durable import TEMPORARY_SUFFIX, fsync, write_atomic
from kdcache.errors import CacheError
from kdcache.places import Url


def create(path: Path, manifest: Manifest) -> None:
    """Lay out an empty cache beside `path` and give it its name when all of it is on disk."""
    documents = _documents(manifest)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(f"cannot create {path}: {error.strerror} ({path.parent})") from error
    _sweep_staging(path)
    staging = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        staging.mkdir()
        held = FolderLock(staging)
        try:
            for name, document in documents.items():
                (staging / name).mkdir(parents=True, exist_ok=True)
                write_atomic(staging / name / "zarr.json", document)
            staging.rename(path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            held.close()
    except OSError as error:
        # two writers started at once, and one may have swept away what the other had begun
        if path.exists() or isinstance(error, FileNotFoundError):
            raise CacheError(f"{path} was just made by another process; run again") from error
        raise CacheError(
            f"cannot create {path}: {error.strerror}; nothing is left of it"
        ) from error
    fsync(path.parent)


def create_at_url(path: Url, manifest: Manifest) -> None:
    """Lay out an empty cache; the root's document, without which there is none, comes last."""
    for name, document in _documents(manifest).items():
        (path / name / "zarr.json" if name != "." else path / "zarr.json").write_bytes(document)


def _documents(manifest: Manifest) -> dict[str, bytes]:
    """The zarr.json of every node of an empty cache by its path, the root's (`.`) last."""
    groups: dict[str, dict[str, Any]] = {"commits": {}, "features": {}}
    groups |= {tap.folder: tap.as_json() for tap in manifest.taps}
    documents = {name: group_document(attributes) for name, attributes in groups.items()}
    documents |= {spec.path: array_document(spec, manifest) for spec in manifest.arrays()}
    nodes = {name: node_digest(json.loads(text)) for name, text in documents.items()}
    documents["skipped"] = AllRemarks().document()
    # what makes further views is said when the first of them is committed
    manifest = dataclasses.replace(manifest, augmentation=None)
    documents["."] = Root(manifest=manifest, nodes=nodes, array_rows=0, shards=0).document()
    return documents


def _sweep_staging(path: Path) -> None:
    """Remove what killed processes left of creating the same cache."""
    for folder in path.parent.glob(f"{glob.escape(path.name)}.*{TEMPORARY_SUFFIX}"):
        with contextlib.suppress(CacheError, OSError):  # another process is at it
            held = FolderLock(folder)
            shutil.rmtree(folder, ignore_errors=True)
            held.close()


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
