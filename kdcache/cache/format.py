"""What a cache looks like on disk, format version 1 (docs/format.md is the specification).

    CACHE/zarr.json                 root group; attribute `kdcache` = the root record: the manifest,
                                    the digest of every other node's zarr.json, the arrays' length
    CACHE/<array>/zarr.json         one Zarr array a field; axis 0 = physical row
    CACHE/<array>/c.<shard>.0…      one file a shard
    CACHE/commits/<shard>/zarr.json a group without members; attribute `kdcache_commit` = the commit record
    CACHE/commits.<n>/, CACHE/<array>.<n>/   the same after, or in the middle of, the n-th refresh
    CACHE/skipped/zarr.json         a group without members; attribute `kdcache_skipped`

Everything is a Zarr node, so any Zarr reader lists, opens and explains a cache without kdcache.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.layout import ROW_DESCRIPTION_BYTES, Manifest, generation_of
from kdcache.cache.shard import ObjectRecord
from kdcache.errors import CacheError, SampleError
from kdcache.places import Place, children, read_some

FORMAT_VERSION = 1
MANIFEST = "kdcache"
COMMIT = "kdcache_commit"
SKIPPED = "kdcache_skipped"
REFRESH = "kdcache_refresh"

_RESTORE = "restore it from a backup, or extract this cache again"

_UNSIGNED = "0" * 64

# A folder that a killed writer made for a commit record has none.
_NO_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class RowKey(NamedTuple):
    """The identity of a row."""

    split: str
    sample_id: str
    view: int


class Reserved(NamedTuple):
    """Shards that several processes are writing at once: their files may have no record yet."""

    token: str  # of the run that gave them out
    first: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Root:
    """The root record: the manifest, and what every zarr.json below the root must be."""

    manifest: Manifest
    nodes: Mapping[str, str]  # path of a node to the digest of its document
    array_rows: int  # length of every array's axis 0
    shards: int  # the shards below this number were all committed when a writer last ended well
    generation: int = 0  # of the commit records: how many refreshes there were
    # paths that the last refresh made obsolete, if they still lie there
    replaced: Sequence[str] = ()
    reserved: Reserved | None = None  # while several processes write, or when they were killed

    @property
    def commits(self) -> str:
        """The folder of the commit records."""
        return generation_of("commits", self.generation)

    def document(self) -> bytes:
        """The zarr.json of the root group."""
        record = {"format_version": FORMAT_VERSION, **self.manifest.as_json()}
        record |= {"nodes": self.nodes, "array_rows": self.array_rows, "shards": self.shards}
        if self.generation:
            record |= {"generation": self.generation, "replaced": list(self.replaced)}
        if self.reserved is not None:
            record["reserved"] = self.reserved._asdict()
        return signed_document(MANIFEST, record)


def manifest_digest(manifest: Manifest) -> str:
    """SHA-256 of what must be the same for all rows of a cache; each commit record holds it.

    How views are made may be settled after the first rows: `augmentation_digest` is in their own.
    """
    content = manifest.as_json()
    content = {n: v for n, v in content.items() if n not in ("versions", "augmentation")}
    return hashlib.sha256(node_bytes(content)).hexdigest()


def augmentation_digest(augmentation: Mapping[str, Any]) -> str:
    """What the rows of augmented views hold of the manifest's `augmentation`."""
    return hashlib.sha256(node_bytes(augmentation)).hexdigest()[:16]


def read_node(cache: Place, root: Root, name: str) -> dict[str, Any]:
    """The zarr.json of a node of the root record; raises CacheError when it is not as written."""
    path = cache / name / "zarr.json"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error.strerror}; {_RESTORE}") from error
    document = _parsed(path, data)
    if data != node_bytes(document) or node_digest(document) != root.nodes[name]:
        raise CacheError(f"{path} was changed after it was written; {_RESTORE}")
    return document


def node_digest(document: Mapping[str, Any]) -> str:
    """SHA-256 of a node's document as written, with an array's length as 0: it grows."""
    shape = document.get("shape")
    # 10.0 and True equal numbers, but are no lengths
    if isinstance(shape, list) and shape and type(shape[0]) is int:
        document = {**document, "shape": [0, *shape[1:]]}
    return hashlib.sha256(node_bytes(document)).hexdigest()


def node_bytes(document: Mapping[str, Any]) -> bytes:
    """The text of a zarr.json; every one in a cache is written this way."""
    return json.dumps(document, indent=1, ensure_ascii=False).encode()


def read_root(cache: Place) -> Root:
    """The root record of the cache at a folder; raises CacheError if there is none or it was altered."""
    path = cache / "zarr.json"
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise CacheError(
            f"{cache} is not a kdcache cache: it has no zarr.json; make one with `kdcache extract`"
        ) from None
    record = _attribute(path, data, MANIFEST)
    version = record.get("format_version")
    if version != FORMAT_VERSION:
        raise CacheError(
            f"{cache} has cache format version {version}; this kdcache reads version "
            f"{FORMAT_VERSION}; install the kdcache release that wrote it"
        )
    _check_signature(path, data, record)
    try:
        return Root(
            manifest=Manifest.from_json(record),
            nodes=record["nodes"],
            array_rows=record["array_rows"],
            shards=record["shards"],
            generation=record.get("generation", 0),
            replaced=record.get("replaced", ()),
            reserved=Reserved(**record["reserved"]) if "reserved" in record else None,
        )
    except KeyError as error:
        raise CacheError(
            f"{cache} was written before format version 1 was settled: its manifest has no "
            f"{error}; extract it again"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Commit:
    """One shard's commit record: the keys of its rows and what each of its files must be."""

    shard: int
    manifest: str  # digest of the manifest that its rows were written under
    keys: tuple[RowKey, ...]
    objects: Mapping[str, ObjectRecord]  # by array path
    sha256: str = ""  # of the record, once it is on disk

    def as_json(self) -> dict[str, Any]:
        return {
            "shard": self.shard,
            "manifest": self.manifest,
            "rows": [list(key) for key in self.keys],
            "objects": {path: dataclasses.asdict(record) for path, record in self.objects.items()},
        }

    def document(self) -> bytes:
        """The zarr.json of the commit's group."""
        return signed_document(COMMIT, self.as_json())


def commit_name(commits: str, shard: int) -> str:
    """Where the commit record of a shard lies in the cache; `commits` is the folder of them."""
    return f"{commits}/{shard:06d}/zarr.json"


def commit_files(cache: Place, commits: str) -> dict[int, bytes]:
    """The commit records there are in a folder of them, as they lie there, by shard number."""
    found = {}
    for shard, data in commit_answers(cache, commits).items():
        if not isinstance(data, bytes):
            raise data
        found[shard] = data
    return found


def commit_answers(cache: Place, commits: str) -> dict[int, bytes | OSError]:
    """The same, with the error of each that cannot be read."""
    names = (name for name in children(cache / commits) if re.fullmatch("[0-9]{6,}", name))
    shards = sorted(map(int, names))
    files = [commit_name(commits, shard) for shard in shards]
    answers = zip(shards, read_some(cache, files), strict=True)
    return {shard: data for shard, data in answers if not isinstance(data, _NO_FILE)}


def read_commits(cache: Place, root: Root) -> list[Commit]:
    """All commit records, by shard number; a shard without one does not exist."""
    digest = manifest_digest(root.manifest)
    collects = gc.isenabled()
    gc.disable()  # there are no cycles here, and looking for them among all keys took half the time
    try:
        return [
            parse_commit(cache, root.commits, shard, data, digest)
            for shard, data in commit_files(cache, root.commits).items()
        ]
    finally:
        if collects:
            gc.enable()


def parse_commit(cache: Place, commits: str, shard: int, data: bytes, manifest: str) -> Commit:
    """A shard's commit record; raises CacheError when it was altered, or belongs elsewhere.

    `manifest` is the digest of the cache's own.
    """
    path = cache / commit_name(commits, shard)
    record = _signed(path, data, COMMIT)
    try:
        commit = Commit(
            shard=record["shard"],
            manifest=record["manifest"],
            # one text for all rows of a split, where each row's own took an eighth of the memory
            keys=tuple(RowKey(sys.intern(split), *rest) for split, *rest in record["rows"]),
            objects={name: ObjectRecord(**fields) for name, fields in record["objects"].items()},
            sha256=record["sha256"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CacheError(f"{path} is no commit record of format version 1 ({error!r})") from error
    if commit.shard != shard:
        raise CacheError(f"{path} holds the commit record of shard {commit.shard}")
    if commit.manifest != manifest:
        raise CacheError(
            f"{path} is of a cache that was made with other models or settings: two caches were "
            "copied into one folder; restore the one that this is meant to be"
        )
    return commit


def lost_shards(root: Root, shards: Iterable[int]) -> list[int]:
    """Shards that were committed once and have no record now; `shards` are those that have one."""
    return sorted(set(range(root.shards)).difference(shards))


@dataclass(frozen=True, kw_only=True)
class Staged:
    """What an unfinished refresh has beside the current arrays, in the next folder of commits."""

    manifest: str  # digest of the manifest that it works towards
    nodes: Mapping[str, str]  # paths of its arrays and groups to their documents' digests

    def document(self) -> bytes:
        """The zarr.json of the next folder of commit records."""
        return signed_document(REFRESH, {"manifest": self.manifest, "nodes": self.nodes})


def next_commits(root: Root) -> str:
    """The folder where a refresh puts its commit records."""
    return generation_of("commits", root.generation + 1)


def read_staged(cache: Place, root: Root) -> Staged | None:
    """The unfinished refresh there is, if there is one."""
    path = cache / next_commits(root) / "zarr.json"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    record = _signed(path, data, REFRESH)
    return Staged(manifest=record["manifest"], nodes=record["nodes"])


def group_document(attributes: Mapping[str, Any]) -> bytes:
    """The zarr.json of a Zarr v3 group with these attributes."""
    return node_bytes({"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"})


@dataclass(frozen=True, kw_only=True)
class Remarks:
    """What there is to say about a dataset beside its rows."""

    skipped: Mapping[str, str] = field(default_factory=dict)  # sample id or file to reason
    left_out: Mapping[str, int] = field(default_factory=dict)  # reason to number
    changed: Mapping[str, str] = field(default_factory=dict)  # sample id to what its files are now
    # sample id to why its mask may not fit
    doubtful: Mapping[str, str] = field(default_factory=dict)
    gone: Sequence[str] = ()  # ids of rows that the dataset does not have


@dataclass(frozen=True, kw_only=True)
class Mirrored:
    """How far a mirrored part is from what its model gives on the mirrored photos; padding left out."""

    rows: int  # that it was measured on
    relative_mse: float | None  # Σ error² / Σ (x − mean)²; None for constant maps
    cosine: float | None = None  # of features: along the channels, mean over positions
    equal_pixels: float | None = None  # of logits: share of pixels on the same side of 0
    made_by: Mapping[str, str]  # what the fingerprint said of the model


_LAST = ""  # the key of what an earlier kdcache said of its last dataset, whichever that was


@dataclass(frozen=True, kw_only=True)
class AllRemarks:
    """The remarks on every dataset that was extracted into a cache, by a key that stands for it; and
    what was measured of mirroring its rows."""

    datasets: Mapping[str, Remarks] = field(default_factory=dict)
    # (train id, val id) of images with the same pixels, over all rows
    in_train_and_val: Sequence[tuple[str, str]] = ()
    mirrored: Mapping[str, Mirrored] = field(default_factory=dict)  # by tap, or LOGITS

    def with_one(self, key: str, remarks: Remarks) -> AllRemarks:
        """The same, but for what was said of that dataset before; doubts are of rows, which stay."""
        before = self.datasets.get(key, Remarks())
        remarks = dataclasses.replace(remarks, doubtful={**before.doubtful, **remarks.doubtful})
        others = {name: said for name, said in self.datasets.items() if name not in (key, _LAST)}
        return dataclasses.replace(self, datasets={**others, key: remarks})

    @property
    def together(self) -> Remarks:
        """The remarks of all datasets as of one."""
        left_out: Counter[str] = Counter()
        for remarks in self.datasets.values():
            left_out.update(remarks.left_out)
        merged = {
            name: {k: v for one in self.datasets.values() for k, v in getattr(one, name).items()}
            for name in ("skipped", "changed", "doubtful")
        }
        gone = dict.fromkeys(name for one in self.datasets.values() for name in one.gone)
        return Remarks(**merged, left_out=dict(left_out), gone=list(gone))

    def document(self) -> bytes:
        """The zarr.json of the group `skipped`."""
        return signed_document(SKIPPED, dataclasses.asdict(self))


def read_remarks(cache: Place) -> AllRemarks:
    """What was remarked so far; raises CacheError when it was lost or altered."""
    path = cache / "skipped" / "zarr.json"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CacheError(
            f"{path} was deleted; the next `kdcache extract` writes it again"
        ) from None
    record = _signed(path, data, SKIPPED)
    # an earlier kdcache knew the last dataset only, and at first its skipped images only
    last = {name: record.get(name, {}) for name in ("left_out", "changed")}
    datasets = record.get("datasets", {_LAST: {"skipped": record.get("images", {}), **last}})
    return AllRemarks(
        datasets={key: Remarks(**remarks) for key, remarks in datasets.items()},
        in_train_and_val=[(train, val) for train, val in record.get("in_train_and_val", ())],
        mirrored={part: Mirrored(**one) for part, one in record.get("mirrored", {}).items()},
    )


def signed_document(attribute: str, record: Mapping[str, Any]) -> bytes:
    """A group's zarr.json that holds a record and, as its `sha256`, the digest of the file itself.

    The digest is of the file's bytes with 64 zeros in its own place, so any edit or flipped bit shows.
    """
    unsigned = group_document({attribute: {"sha256": _UNSIGNED, **record}})
    digest = hashlib.sha256(unsigned).hexdigest()
    return unsigned.replace(_UNSIGNED.encode(), digest.encode(), 1)


def _signed(path: Place, data: bytes, attribute: str) -> dict[str, Any]:
    record = _attribute(path, data, attribute)
    _check_signature(path, data, record)
    return record


def _check_signature(path: Place, data: bytes, record: Mapping[str, Any]) -> None:
    digest = str(record.get("sha256", "")).encode()
    unsigned = data.replace(digest, _UNSIGNED.encode(), 1) if digest else data
    if digest != hashlib.sha256(unsigned).hexdigest().encode():
        raise CacheError(
            f"{path} was changed after it was written (its digest does not match); {_RESTORE}"
        )


def _attribute(path: Place, data: bytes, attribute: str) -> dict[str, Any]:
    try:
        record = _parsed(path, data)["attributes"][attribute]
    except (KeyError, TypeError) as error:
        raise CacheError(f"{path} is damaged or not kdcache's: no {attribute!r} in it") from error
    if not isinstance(record, dict):
        raise CacheError(f"{path} is damaged: {attribute!r} is not an object")
    return record


def _parsed(path: Place, data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{path} is damaged: no JSON; {_RESTORE}") from error
    if not isinstance(document, dict):
        raise CacheError(f"{path} is damaged: no JSON object; {_RESTORE}")
    return document


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
