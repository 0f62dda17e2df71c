"""Reading a cache: rows by logical number, every chunk checked against its commit record."""

from __future__ import annotations

import itertools
import logging
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import codecs
from kdcache.cache.format import (
    Commit,
    RowKey,
    commit_name,
    lost_shards,
    parse_row,
    read_commits,
    read_root,
)
from kdcache.cache.layout import IMAGE, MASK, ROW_DESCRIPTION_BYTES, ROWS, Manifest, TapSpec
from kdcache.cache.shard import (
    DamagedError,
    chunk_range,
    chunks_in,
    decode_chunk,
    read_chunk,
    read_index,
)
from kdcache.errors import CacheError
from kdcache.places import Place, Url, place_of, read_some

log = logging.getLogger(__name__)

_FILES_AT_ONCE = 1000


class Reading(NamedTuple):
    """Bytes that came from the storage, and when a thread waited for them."""

    size_bytes: int
    started: float  # by time.perf_counter
    ended: float


@dataclass
class _Shard:
    """What is known of a shard file once it was read: its index, and which slots were right."""

    index: NDArray[np.uint64]  # 16 bytes a row and array stay in memory
    # The file's version, and bit n: slot n of it was right. One object, as threads replace it.
    right: tuple[tuple[int, ...], int] = ((), 0)

    def knows(self, slot: int, version: tuple[int, ...]) -> bool:
        of_version, slots = self.right
        return version == of_version and bool(slots >> slot & 1)

    def learn(self, slot: int, version: tuple[int, ...]) -> None:
        """Threads may forget what another one learns; then it is checked again."""
        of_version, slots = self.right
        self.right = version, (slots if version == of_version else 0) | 1 << slot


class Cache:
    """A cache opened read-only: a sequence of rows, numbered by the commit records.

    Holds no open files, so it may be pickled, forked and shared between threads. It shows the
    rows committed when it was opened, or those of the given `shards` only.
    """

    def __init__(self, path: str | Place, shards: Sequence[int] | None = None) -> None:
        self.path = place_of(path)
        self._folder = str(self.path)
        root = read_root(self.path)
        self.manifest: Manifest = root.manifest
        self._commits = root.commits
        commits = read_commits(self.path, root)
        if lost := lost_shards(root, [commit.shard for commit in commits]):
            log.warning(
                "%s has lost the commit records of shards %s and the rows in them: restore them "
                "from a backup, or run `kdcache extract` again",
                path,
                lost,
            )
        if shards is not None:
            wanted = set(shards)
            commits = [commit for commit in commits if commit.shard in wanted]
            if missing := wanted - {commit.shard for commit in commits}:
                raise CacheError(
                    f"{path} has no commit records of shards {sorted(missing)}, which were asked "
                    "for: they were lost, or it is another cache"
                )
        self.commits: list[Commit] = commits
        self.keys: list[RowKey] = [key for commit in commits for key in commit.keys]
        self._starts = list(
            itertools.accumulate((len(commit.keys) for commit in commits), initial=0)
        )
        self.specs = {spec.path: spec for spec in self.manifest.arrays()}
        self._shards: dict[tuple[int, str], _Shard] = {}

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Row:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of a cache of {len(self)} rows")
        return Row(self, index % len(self))

    def __iter__(self) -> Iterator[Row]:
        return (Row(self, index) for index in range(len(self)))

    @property
    def taps(self) -> list[str]:
        """Names of the tapped tensors."""
        return [tap.name for tap in self.manifest.taps]

    @property
    def has_logits(self) -> bool:
        """Whether there are teacher logits; a cache may be made of the detector alone."""
        return self.manifest.logits_dtype is not None

    @property
    def samples(self) -> list[str]:
        """Sample ids, each once, in row order."""
        return list(dict.fromkeys(key.sample_id for key in self.keys))

    def tap(self, name: str) -> TapSpec:
        """How a tap is stored; raises CacheError naming those that there are."""
        for tap in self.manifest.taps:
            if tap.name == name:
                return tap
        raise CacheError(
            f"{self.path} has no tap {name!r}; it has {', '.join(self.taps) or 'none'}"
        )

    def rows_of(self, split: str, view: int | None = None) -> list[int]:
        """Row numbers of a split, of all views or of one."""
        return [
            index
            for index, key in enumerate(self.keys)
            if key.split == split and view in (None, key.view)
        ]

    def read(self, index: int, array: str) -> NDArray[np.generic]:
        """One row of one array, its transform undone (codes stay codes).

        Raises CacheError when the bytes are not the ones that were committed.
        """
        spec = self.specs[array]
        stored = np.empty(spec.stored.shape, spec.stored.dtype)
        self.read_stored(index, array, stored)
        undone: NDArray[np.generic] = spec.undo(stored)
        return undone

    def read_stored(self, index: int, array: str, out: NDArray[np.generic]) -> Reading:
        """One row of one array as it is stored, decompressed into `out`.

        `out` is C-contiguous and of the array's stored form. Raises as `read` does.
        """
        place, slot = self._place(index)
        commit = self.commits[place]
        path = self._path_of(place, array)
        try:
            record = commit.objects[array]
            shard = self._shard(place, array)
            at = chunk_range(shard.index, slot, record.size_bytes)
            compression = self.manifest.compression
            flat = out.reshape(-1).view(np.uint8)
            direct = flat if compression == "none" else None
            started = time.perf_counter()
            looked_at = None if compression == "zstd" else record.size_bytes
            chunk = read_chunk(path, *at, direct, size_bytes=looked_at)
            reading = Reading(chunk.size_bytes, started, time.perf_counter())
            known = bool(chunk.version) and shard.knows(slot, chunk.version)
            decode_chunk(chunk, record.crc(slot), compression, flat, known=known)
            if chunk.version:
                shard.learn(slot, chunk.version)
        except (DamagedError, OSError, KeyError) as error:
            raise self._unreadable(index, path, error) from error
        return reading

    def all_details(self) -> Iterator[dict[str, Any]]:
        """`Row.details` of every row, in order. Raises as `read` does.

        Each file of them is read once and as a whole, where rows are read one by one otherwise.
        """
        padded = np.empty(ROW_DESCRIPTION_BYTES, np.uint8)
        slots, compression = self.manifest.shard_rows, self.manifest.compression
        files = [self.specs[ROWS].shard_path(commit.shard) for commit in self.commits]
        answers = itertools.chain.from_iterable(  # at a URL many are asked for at once
            read_some(self.path, files[n : n + _FILES_AT_ONCE])
            for n in range(0, len(files), _FILES_AT_ONCE)
        )
        for place, (commit, data) in enumerate(zip(self.commits, answers, strict=True)):
            path, index = self._path_of(place, ROWS), self._starts[place]
            try:
                if isinstance(data, OSError):
                    raise data
                record = commit.objects[ROWS]
                chunks = chunks_in(data, slots, record.size_bytes, len(commit.keys))
                for slot, chunk in enumerate(chunks):
                    index = self._starts[place] + slot
                    decode_chunk(chunk, record.crc(slot), compression, padded)
                    yield parse_row(padded)
            except (DamagedError, OSError, KeyError) as error:
                raise self._unreadable(index, path, error) from error

    def _unreadable(self, index: int, path: str | Url, error: Exception) -> CacheError:
        shard = self.commits[self._place(index)[0]].shard
        return CacheError(
            f"{path}: cannot read row {index} ({self.keys[index].sample_id}): {error}; the file "
            "was damaged or replaced after it was committed: restore it from a backup, or "
            f"delete {(self.path / commit_name(self._commits, shard)).parent} and run extract again"
        )

    def locate(self, index: int, array: str) -> tuple[str | Url, int, int]:
        """The file, offset and length of the bytes that hold one row of an array."""
        place, slot = self._place(index)
        size_bytes = self.commits[place].objects[array].size_bytes
        found = chunk_range(self._shard(place, array).index, slot, size_bytes)
        return self._path_of(place, array), *found

    def _place(self, index: int) -> tuple[int, int]:
        """The number of a row's commit record and its slot in it."""
        index = range(len(self.keys))[index]
        # the last that starts there or before: a record without rows starts where the next does
        place = bisect_right(self._starts, index, hi=len(self.commits)) - 1
        return place, index - self._starts[place]

    def _path_of(self, place: int, array: str) -> str | Url:
        # as text: made for every read, and pathlib takes as long as the read of a small array
        path = f"{self._folder}/{self.specs[array].shard_path(self.commits[place].shard)}"
        return Url(path) if isinstance(self.path, Url) else path

    def _shard(self, place: int, array: str) -> _Shard:
        shard = self._shards.get((place, array))
        if shard is None:
            size_bytes = self.commits[place].objects[array].size_bytes
            path, slots = self._path_of(place, array), self.manifest.shard_rows
            shard = self._shards[place, array] = _Shard(read_index(path, slots, size_bytes))
        return shard

    def decode_features(self, index: int, tap: TapSpec) -> NDArray[np.float32]:
        """The (C, h, w) float32 feature map of one row and tap."""
        feature_CHW: NDArray[np.float32] = codecs.decode(self.read_features(index, tap), tap)
        return feature_CHW

    def read_features(self, index: int, tap: TapSpec) -> dict[str, NDArray[np.generic]]:
        """What is stored of one row and tap, by the arrays' names in the tap's folder."""
        return {name: self.read(index, path) for path, name in self.arrays_of(tap).items()}

    def arrays_of(self, tap: TapSpec) -> dict[str, str]:
        """The arrays of a tap, and their names in its folder."""
        folder = tap.folder + "/"
        return {path: path.removeprefix(folder) for path in self.specs if path.startswith(folder)}


class Row:
    """One row; each part is read when it is first asked for."""

    def __init__(self, cache: Cache, index: int) -> None:
        self._cache = cache
        self._index = index
        self.key = cache.keys[index]
        self.split, self.sample_id, self.view = self.key

    def __repr__(self) -> str:
        return f"Row({self._index}: {self.split} {self.sample_id} view {self.view})"

    @cached_property
    def image(self) -> NDArray[np.generic]:
        """(H, W, 3) uint8 RGB, the pixels both frozen models saw."""
        return self._cache.read(self._index, IMAGE)

    @cached_property
    def mask(self) -> NDArray[np.generic]:
        """(H, W) uint8: 0 background, 1 person, 254 padding, 255 ignore."""
        return self._cache.read(self._index, MASK)

    @cached_property
    def teacher_logits(self) -> NDArray[np.generic]:
        """(H, W) float16, or float32 in a cache of precision float32; CacheError without any."""
        if not self._cache.has_logits:
            raise CacheError(f"{self._cache.path} was made without a teacher: it has no logits")
        return self._cache.read(self._index, self._cache.manifest.logits_path)

    @cached_property
    def details(self) -> dict[str, Any]:
        """The row's key, source file size and digest, and where the source lies in the input."""
        return parse_row(self._cache.read(self._index, ROWS))

    @cached_property
    def features(self) -> Mapping[str, NDArray[np.float32]]:
        """Tap name to (C, h, w) float32, decoded on access."""
        return _Features(self._cache, self._index)


class _Features(Mapping[str, NDArray[np.float32]]):
    def __init__(self, cache: Cache, index: int) -> None:
        self._cache = cache
        self._index = index

    def __getitem__(self, tap: str) -> NDArray[np.float32]:
        return self._cache.decode_features(self._index, self._cache.tap(tap))

    def __contains__(self, tap: object) -> bool:
        return tap in self._cache.taps

    def __iter__(self) -> Iterator[str]:
        return iter(self._cache.taps)

    def __len__(self) -> int:
        return len(self._cache.taps)
