"""What a cache looks like on disk, format version 1 (docs/format.md is the specification).

    CACHE/zarr.json                 root group; attribute `kdcache` = the manifest
    CACHE/<array>/zarr.json         one Zarr array a field; axis 0 = physical row
    CACHE/<array>/c.<shard>.0…      one file a shard
    CACHE/commits/<shard>/zarr.json a group without members; attribute `kdcache_commit` = the commit record
    CACHE/skipped/zarr.json         a group without members; attribute `kdcache_skipped`

Everything is a Zarr node, so any Zarr reader lists, opens and explains a cache without kdcache.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.shard import ObjectRecord
from kdcache.errors import CacheError, SampleError

FORMAT_VERSION = 1
MANIFEST = "kdcache"
COMMIT = "kdcache_commit"
SKIPPED = "kdcache_skipped"

# A row's description as zero-padded UTF-8 JSON: the only text form that zarr-python (without a
# warning) and tensorstore (at all) both read. Zeros compress to nothing.
ROW_DESCRIPTION_BYTES = 2048

IMAGE, MASK, LOGITS, ROWS = "image", "mask", "teacher_logits", "rows"


class RowKey(NamedTuple):
    """The identity of a row."""

    split: str
    sample_id: str
    view: int


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array of the cache: its path in the group and what a row of it looks like."""

    path: str
    dtype: str
    row_shape: tuple[int, ...]
    fill_value: float
    dimensions: tuple[str, ...]

    def shard_path(self, shard: int) -> str:
        """Path of a shard's file in the group: Zarr's default chunk key with `.` as separator."""
        zeros = ["0"] * len(self.row_shape)
        return f"{self.path}/c.{'.'.join([str(shard), *zeros])}"


@dataclass(frozen=True, kw_only=True)
class TapSpec:
    """How the feature maps of one tap are stored."""

    name: str
    precision: str
    shape: tuple[int, int, int]  # (C, h, w)

    @property
    def folder(self) -> str:
        """A path in the group; tap names hold slashes and colons, which are not portable there."""
        return "features/" + re.sub(r"[^A-Za-z0-9_.-]+", "_", self.name).strip("_.")

    def arrays(self) -> list[ArraySpec]:
        channels, height, width = self.shape
        grid = (channels, height, width)
        axes = ("channel", "y", "x")
        if self.precision != "int8":
            return [_spec(f"{self.folder}/values", self.precision, grid, np.nan, axes)]
        return [
            _spec(f"{self.folder}/codes", "uint8", grid, 0, axes),
            _spec(
                f"{self.folder}/affine", "float32", (2, channels), np.nan, ("lo_step", "channel")
            ),
        ]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What holds for every row of a cache."""

    size_px: int
    shard_rows: int
    logits_dtype: str
    taps: tuple[TapSpec, ...]
    fingerprint: Mapping[str, str]
    versions: Mapping[str, str]

    def arrays(self) -> list[ArraySpec]:
        size = self.size_px
        return [
            _spec(IMAGE, "uint8", (size, size, 3), 0, ("y", "x", "rgb")),
            _spec(MASK, "uint8", (size, size), 255, ("y", "x")),
            _spec(LOGITS, self.logits_dtype, (size, size), np.nan, ("y", "x")),
            _spec(ROWS, "uint8", (ROW_DESCRIPTION_BYTES,), 0, ("utf8_json",)),
            *(spec for tap in self.taps for spec in tap.arrays()),
        ]

    def as_json(self) -> dict[str, Any]:
        return signed(
            {
                "format_version": FORMAT_VERSION,
                "size_px": self.size_px,
                "shard_rows": self.shard_rows,
                "logits_dtype": self.logits_dtype,
                "taps": [
                    {"name": tap.name, "precision": tap.precision, "shape": list(tap.shape)}
                    | {"folder": tap.folder, "decode": _DECODE[tap.precision]}
                    for tap in self.taps
                ],
                "fingerprint": dict(self.fingerprint),
                "versions": dict(self.versions),
            }
        )


_DECODE = {
    "float32": "values",
    "float16": "float32(values)",
    "int8": "float32(codes) * affine[1][:, None, None] + affine[0][:, None, None]",
}


def _spec(
    path: str, dtype: str, shape: tuple[int, ...], fill: float, axes: tuple[str, ...]
) -> ArraySpec:
    return ArraySpec(
        path=path, dtype=dtype, row_shape=shape, fill_value=fill, dimensions=("row", *axes)
    )


def read_manifest(cache: Path) -> Manifest:
    """The manifest of the cache at a folder; raises CacheError if there is none or it was altered."""
    path = cache / "zarr.json"
    if not path.is_file():
        raise CacheError(
            f"{cache} is not a kdcache cache: it has no zarr.json; make one with `kdcache extract`"
        )
    record = _read_attribute(path, MANIFEST)
    version = record.get("format_version")
    if version != FORMAT_VERSION:
        raise CacheError(
            f"{cache} has cache format version {version}; this kdcache reads version "
            f"{FORMAT_VERSION}; install the kdcache release that wrote it"
        )
    check_signature(record, path)
    return Manifest(
        size_px=record["size_px"],
        shard_rows=record["shard_rows"],
        logits_dtype=record["logits_dtype"],
        taps=tuple(
            TapSpec(name=tap["name"], precision=tap["precision"], shape=tuple(tap["shape"]))
            for tap in record["taps"]
        ),
        fingerprint=record["fingerprint"],
        versions=record["versions"],
    )


@dataclass(frozen=True, kw_only=True)
class Commit:
    """One shard's commit record: the keys of its rows and what each of its files must be."""

    shard: int
    keys: tuple[RowKey, ...]
    objects: Mapping[str, ObjectRecord]  # by array path

    def as_json(self) -> dict[str, Any]:
        objects = {path: record.as_json() for path, record in self.objects.items()}
        return signed(
            {"shard": self.shard, "rows": [list(k) for k in self.keys]} | {"objects": objects}
        )


def commit_path(cache: Path, shard: int) -> Path:
    """Where the commit record of a shard lies."""
    return cache / "commits" / f"{shard:06d}" / "zarr.json"


def read_commits(cache: Path) -> list[Commit]:
    """All commit records, by shard number; a shard without one does not exist."""
    folder = cache / "commits"
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    paths = [folder / name / "zarr.json" for name in names if name.isdigit()]
    return [_read_commit(path) for path in paths if path.is_file()]


def _read_commit(path: Path) -> Commit:
    record = _read_attribute(path, COMMIT)
    check_signature(record, path)
    if f"{record['shard']:06d}" != path.parent.name:
        raise CacheError(f"{path} holds the commit record of shard {record['shard']}")
    return Commit(
        shard=record["shard"],
        keys=tuple(RowKey(*key) for key in record["rows"]),
        objects={path: ObjectRecord(**fields) for path, fields in record["objects"].items()},
    )


def group_document(attributes: Mapping[str, Any]) -> bytes:
    """The zarr.json of a Zarr v3 group with these attributes."""
    document = {"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"}
    return json.dumps(document, indent=1, ensure_ascii=False).encode()


def read_skipped(cache: Path) -> dict[str, str]:
    """Sample id to reason, of the images the last extraction had to skip."""
    path = cache / "skipped" / "zarr.json"
    return dict(_read_attribute(path, SKIPPED)) if path.is_file() else {}


def _read_attribute(path: Path, attribute: str) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())["attributes"][attribute]
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{path} is damaged or not kdcache's: no {attribute!r} in it") from error
    if not isinstance(record, dict):
        raise CacheError(f"{path} is damaged: {attribute!r} is not an object")
    return record


def signed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the SHA-256 of its canonical JSON, so that an edit or a flipped bit shows."""
    return record | {"sha256": _digest(record)}


def check_signature(record: Mapping[str, Any], path: Path) -> None:
    """Raise CacheError when a signed record of the file at `path` is not what was signed."""
    rest = {key: value for key, value in record.items() if key != "sha256"}
    if record.get("sha256") != _digest(rest):
        raise CacheError(
            f"{path} was changed after it was written (its digest does not match); "
            "restore it from a backup, or extract this cache again"
        )


def _digest(record: Mapping[str, Any]) -> str:
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def describe_row(key: RowKey, details: Mapping[str, Any]) -> NDArray[np.uint8]:
    """A row's key and details as the zero-padded bytes of the `rows` array."""
    text = json.dumps({**key._asdict(), **details}, ensure_ascii=False).encode()
    if len(text) > ROW_DESCRIPTION_BYTES:
        raise SampleError(
            f"the description of the row takes {len(text)} bytes, {ROW_DESCRIPTION_BYTES} fit; "
            "shorten the file's path"
        )
    padded = np.zeros(ROW_DESCRIPTION_BYTES, np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    return padded


def parse_row(padded: NDArray[np.generic]) -> dict[str, Any]:
    """The inverse of `describe_row`."""
    description: dict[str, Any] = json.loads(padded.tobytes().rstrip(b"\0"))
    return description
