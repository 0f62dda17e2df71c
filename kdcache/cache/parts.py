"""How each array of a copy comes to be: its files as they are, or its rows stored anew."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import codecs
from kdcache.cache.layout import ArraySpec, Manifest, TapSpec
from kdcache.cache.reader import Cache
from kdcache.errors import CacheError, SampleError
from kdcache.tables import printable


class Part(NamedTuple):
    """Arrays of the copy that are made of the same arrays of the source, together."""

    source: tuple[ArraySpec, ...]
    target: tuple[ArraySpec, ...]
    moved: bool  # one array, whose file stays as it is
    taps: tuple[TapSpec, TapSpec] | None = None  # before and after, where codes are made anew

    def row(
        self, cache: Cache, index: int, loss: Loss | None = None
    ) -> Mapping[str, NDArray[np.generic]]:
        """A row's arrays by their path in the copy; CacheError where they cannot be stored so."""
        try:
            return self._row(cache, index, loss)
        except SampleError as error:
            name = printable(cache.keys[index].sample_id)
            raise CacheError(
                f"{cache.path}: row {index} ({name}) cannot be stored at that precision: {error}; "
                "nothing of its shard is copied"
            ) from error

    def _row(
        self, cache: Cache, index: int, loss: Loss | None
    ) -> Mapping[str, NDArray[np.generic]]:
        if self.taps is None:
            (source,), (target,) = self.source, self.target
            array = cache.read(index, source.path)
            if source.row.dtype != target.row.dtype:  # of teacher's logits only
                array = codecs.teacher_logits(array.astype(np.float32), target.row.dtype)
            return {target.path: array}
        before, after = self.taps
        feature_CHW = cache.decode_features(index, before)
        encoded = codecs.encode(feature_CHW, after)
        if loss is not None:
            loss.add(feature_CHW, codecs.decode(encoded, after))
        return {f"{after.folder}/{name}": array for name, array in encoded.items()}


def parts_of(before: Manifest, after: Manifest) -> list[Part]:
    """How each array of the copy comes to be, the largest files first."""
    sources = {spec.path: spec for spec in before.arrays()}
    targets = {spec.path: spec for spec in after.arrays()}
    old_taps = {tap.name: tap for tap in before.taps}
    parts, names = [], {after.logits_path: before.logits_path}
    for tap in after.taps:
        old = old_taps[tap.name]
        made_of = tuple(sources[spec.path] for spec in old.arrays(before.compression))
        made = tuple(targets[spec.path] for spec in tap.arrays(after.compression))
        if old.precision == tap.precision:
            names |= {new.path: was.path for was, new in zip(made_of, made, strict=True)}
        else:
            parts.append(Part(made_of, made, moved=False, taps=(old, tap)))
            targets = {path: spec for path, spec in targets.items() if spec not in made}
    for path, target in targets.items():
        source = sources[names.get(path, path)]
        same = (source.row, source.transform) == (target.row, target.transform)
        moved = same and before.compression == after.compression
        parts.append(Part((source,), (target,), moved=moved))
    return sorted(parts, key=lambda part: -max(spec.row.size_bytes for spec in part.target))


class Loss:
    """What a lower precision did to the features of one tap; threads add to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._error = self._sum = self._square = 0.0
        self._count = 0

    def add(self, before_CHW: codecs.F32, after_CHW: codecs.F32) -> None:
        """Another row, as it was and as it is."""
        before = before_CHW.reshape(-1)
        error = after_CHW.reshape(-1) - before
        sums = float(before.sum(dtype=np.float64)), float(before @ before), float(error @ error)
        with self._lock:
            self._sum, self._square = self._sum + sums[0], self._square + sums[1]
            self._error, self._count = self._error + sums[2], self._count + before.size

    @property
    def relative_mse(self) -> float:
        """Σ error² / Σ (x − mean)²; 0 for constant features, which are stored exactly."""
        spread = self._square - self._sum**2 / self._count if self._count else 0.0
        return self._error / spread if spread > 0 else 0.0
