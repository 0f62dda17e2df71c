"""What a copy of a cache is to hold, and what its manifest then truly says of how its rows were made."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kdcache.cache.format import AllRemarks, Commit
from kdcache.cache.layout import LOGITS, PRECISIONS, Manifest, stored_as
from kdcache.cache.reader import Cache
from kdcache.errors import CacheError, ConfigError

if TYPE_CHECKING:
    from kdcache.config import Compression, Precision

_OF = " of "  # "int5 of int8": codes of 5 bits, made from what 8 bits had left


@dataclass(frozen=True, kw_only=True)
class Thinning:
    """What of a cache is copied and how it is stored there; by default all of it, as it is."""

    split: str | None = None
    views: int | None = None  # only so many, the first ones
    taps: Sequence[str] = ()  # only these; () is all
    store: Literal["both", "logits", "features"] = "both"
    precision: Precision | None = None  # of the features; None: as it is
    compression: Compression | None = None

    def commits(self, cache: Cache) -> list[Commit]:
        """The commit records of the shards to be copied; raises CacheError where there are none."""
        commits = cache.commits
        if self.views is not None:  # each shard is of one view
            commits = [c for c in commits if all(key.view < self.views for key in c.keys)]
        if self.split is None:
            return commits
        splits = {commit.shard: {key.split for key in commit.keys} for commit in commits}
        chosen = [commit for commit in commits if self.split in splits[commit.shard]]
        if mixed := [commit.shard for commit in chosen if len(splits[commit.shard]) > 1]:
            raise CacheError(f"{cache.path}: shards {mixed} hold both splits; copy it whole")
        if not chosen:
            found = ", ".join(sorted(set().union(*splits.values())))
            raise CacheError(
                f"{cache.path} has no rows of split {self.split}, but {found or 'none'}"
            )
        return chosen

    def manifest(self, cache: Cache) -> Manifest:
        """The manifest of the copy; raises CacheError or ConfigError where it cannot be had."""
        manifest = _first_generation(self._parts_of(cache))
        if not any(key.view for commit in self.commits(cache) for key in commit.keys):
            manifest = dataclasses.replace(manifest, augmentation=None)
        if self.precision is not None:
            _refuse_higher(cache, manifest, self.precision)
            rounded = rounded_to(manifest, self.precision)
            manifest = stored_as(manifest, self.precision)
            manifest = _with_fingerprint(manifest, {"precision": rounded})
        if self.compression is not None:
            manifest = dataclasses.replace(manifest, compression=self.compression)
        return manifest

    def _parts_of(self, cache: Cache) -> Manifest:
        """The cache's manifest, with the parts that are wanted."""
        manifest = cache.manifest
        if self.store == "logits":
            if not cache.has_logits:
                raise CacheError(
                    f"{cache.path} has no teacher logits: --logits-only leaves nothing"
                )
            manifest = _without_features(manifest)
        elif self.taps:
            wanted = {cache.tap(name).name for name in self.taps}
            manifest = _with_taps(manifest, wanted)
        if self.store == "features":
            if not manifest.taps:
                raise CacheError(f"{cache.path} has no features: --features-only leaves nothing")
            manifest = _without(dataclasses.replace(manifest, logits_dtype=None), "teacher_")
        return manifest

    def remarks(self, remarks: AllRemarks, cache: Cache) -> AllRemarks:
        """Those that concern what is copied, or may: of a skipped file no split is known."""
        manifest = self._parts_of(cache)
        parts = {tap.name for tap in manifest.taps}
        parts |= set() if manifest.logits_dtype is None else {LOGITS}
        mirrored = {part: one for part, one in remarks.mirrored.items() if part in parts}
        if self.split is None:
            return dataclasses.replace(remarks, mirrored=mirrored)
        here = {key.sample_id for key in cache.keys if key.split == self.split}
        elsewhere = {key.sample_id for key in cache.keys} - here
        datasets = {
            name: dataclasses.replace(
                said,
                changed=_but(said.changed, elsewhere),
                doubtful=_but(said.doubtful, elsewhere),
                gone=[sample_id for sample_id in said.gone if sample_id not in elsewhere],
            )
            for name, said in remarks.datasets.items()
        }
        return AllRemarks(datasets=datasets, mirrored=mirrored)


def chain(precision: str) -> tuple[str, ...]:
    """The precisions that features went through, the stored one first: "int5 of int8" are two."""
    return tuple(precision.split(_OF))


def rounded_to(manifest: Manifest, precision: str) -> str:
    """What the fingerprint says of the precision once the rows are stored at a lower one.

    From float32 it is what an extraction at that precision gives; else values are rounded twice.
    Without features there is nothing that could be rounded twice: logits are float32 or float16.
    """
    before = manifest.fingerprint["precision"]
    if chain(before)[0] == precision:
        return before
    if before == "float32" or not manifest.taps:
        return precision
    return precision + _OF + before


def changes(cache: Cache, thinning: Thinning, after: Manifest) -> list[str]:
    """In which ways a copy differs from the cache, in words; none for a plain copy."""
    before, kept = cache.manifest, {tap.name: tap for tap in after.taps}
    words = []
    if thinning.split is not None:
        words.append(f"rows of split {thinning.split} only")
    if (asked := thinning.views) is not None:
        views = 1 + max((key.view for key in cache.keys), default=0)
        if asked < views:
            words.append("the first view only" if asked == 1 else f"{asked} of {views} views")
        elif asked > views:
            words.append(f"{views} of the {asked} views asked for: it has no more")
    for tap in before.taps:
        if tap.name not in kept:
            words.append(f"without the features of {tap.name}")
        elif kept[tap.name].precision != tap.precision:
            words.append(f"features of {tap.name}: {tap.precision} → {kept[tap.name].precision}")
    if before.logits_dtype != after.logits_dtype:
        to = after.logits_dtype
        words.append(
            "without the teacher's logits"
            if to is None
            else f"teacher's logits: {before.logits_dtype} → {to}"
        )
    if before.compression != after.compression:
        words.append(f"compression: {before.compression} → {after.compression}")
    return words


def _refuse_higher(cache: Cache, manifest: Manifest, precision: Precision) -> None:
    """Raise ConfigError for a precision above that of what is stored."""
    stored = {tap.precision for tap in manifest.taps}
    stored |= {p for p in PRECISIONS if p == chain(manifest.fingerprint["precision"])[0]}
    lowest = max(stored, key=PRECISIONS.index)
    if PRECISIONS.index(precision) < PRECISIONS.index(lowest):
        raise ConfigError(
            f"--precision {precision}: {cache.path} holds {lowest}, and what was rounded away does not "
            f"come back; give {lowest} or lower (they go {', '.join(PRECISIONS)}), or extract again"
        )


def _first_generation(manifest: Manifest) -> Manifest:
    """The same, as if no part had ever been refreshed."""
    taps = tuple(dataclasses.replace(tap, generation=0) for tap in manifest.taps)
    return dataclasses.replace(manifest, taps=taps, logits_generation=0)


def _with_taps(manifest: Manifest, wanted: Collection[str]) -> Manifest:
    taps = tuple(tap for tap in manifest.taps if tap.name in wanted)
    layers = {"yolo_target_layer": ", ".join(tap.name for tap in taps)}
    if len(taps) == len(manifest.taps) or not layers.keys() <= manifest.fingerprint.keys():
        layers = {}
    return _with_fingerprint(dataclasses.replace(manifest, taps=taps), layers)


def _without_features(manifest: Manifest) -> Manifest:
    """Only the logits, as an extraction of them alone at the same precision gives them."""
    precision = chain(manifest.fingerprint["precision"])[0]
    manifest = _without(dataclasses.replace(manifest, taps=()), "yolo_")
    return _with_fingerprint(manifest, {"precision": precision})


def _without(manifest: Manifest, start: str) -> Manifest:
    """The same, without what the fingerprint says of one of the models."""
    rest = {n: value for n, value in manifest.fingerprint.items() if not n.startswith(start)}
    return dataclasses.replace(manifest, fingerprint=rest)


def _with_fingerprint(manifest: Manifest, entries: Mapping[str, str]) -> Manifest:
    return dataclasses.replace(manifest, fingerprint={**manifest.fingerprint, **entries})


def _but(said: Mapping[str, str], elsewhere: Collection[str]) -> dict[str, str]:
    return {sample_id: why for sample_id, why in said.items() if sample_id not in elsewhere}
