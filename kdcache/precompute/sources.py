"""Samples on their way from disk: each file read once, decoded ahead, told apart by its digests."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from kdcache.cache.format import RowKey, augmentation_digest
from kdcache.config import ExtractConfig, ResizeMode
from kdcache.errors import CacheError, DatasetError, SampleError
from kdcache.imaging import U8, decode_image, exif_orientation, place, resize_image, resize_mask
from kdcache.places import THREADS_AT_URL, Url
from kdcache.precompute.dataset import Sample
from kdcache.precompute.policy import Policy, draw, in_use, read_policy
from kdcache.precompute.stages import DECODE, Stages
from kdcache.precompute.views import apply
from kdcache.progress import Progress
from kdcache.stop import StopRequest
from kdcache.tables import printable

log = logging.getLogger(__name__)

_WARNINGS = 20  # of a dirty dataset's thousands; all are in the report and in the cache


class Digests(NamedTuple):
    """What tells a committed row's source files from others."""

    image_bytes: int
    image_sha256: str
    label_sha256: str
    pixels_sha256: str  # of the decoded image, so another encoding of it is the same

    @classmethod
    def of(cls, details: Mapping[str, Any]) -> Digests:
        """From the details of a row; raises CacheError where an earlier kdcache kept fewer."""
        names = ("source_bytes", "source_sha256", "label_sha256", "pixels_sha256")
        try:
            return cls(*(details[name] for name in names))
        except KeyError as error:
            raise CacheError(
                f"the rows of this cache have no {error}: an earlier kdcache made it; nothing can "
                "be appended to it, extract into another --out"
            ) from error


Photo = tuple[str, str]  # split and sample id


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How the pixels of a row are made of its sample."""

    size_px: int
    resize: ResizeMode
    policy: Policy | None = None  # of the views but the first; None: there are no others
    seed: int = 0

    @classmethod
    def of(cls, config: ExtractConfig) -> Preparation:
        """As the settings have it; raises ConfigError for a policy that cannot be read."""
        policy = read_policy(config.augment) if config.views > 1 else None
        return cls(size_px=config.size, resize=config.resize, policy=policy, seed=config.seed)

    @cached_property
    def augmentation(self) -> dict[str, Any] | None:
        """What the manifest says of it."""
        if self.policy is None:
            return None
        return {"policy": in_use(self.policy), "seed": self.seed}

    @cached_property
    def made_by(self) -> str:
        """What each row of a further view says of it."""
        return augmentation_digest(self.augmentation or {})


class Prepared(NamedTuple):
    """A decoded view of a sample at the models' input size."""

    key: RowKey
    image: U8  # (H, W, 3)
    mask: U8  # (H, W)
    details: dict[str, Any]
    doubt: str = ""  # why the mask may not fit the image


class Tally:
    """What became of each sample so far: a row, or skipped for a reason."""

    def __init__(self, strict: bool) -> None:
        self.skipped: dict[str, str] = {}  # sample id or file name to reason
        self.doubtful: dict[str, str] = {}  # sample id to why its mask may not fit it
        self.photos: dict[Photo, Digests] = {}  # what the rows of a sample are made of
        self.rows = 0
        self.handled = 0
        self._strict = strict

    def same_photo(self, row: Prepared) -> None:
        """Raise SampleError where the row is of other files than the earlier views of its sample.

        Those may have been read hours ago, or by an earlier run.
        """
        made_of = Digests.of(row.details)
        if row.key.view and row.key.sample_id in self.skipped:
            raise SampleError(self.skipped[row.key.sample_id])
        if self.photos.setdefault(row.key[:2], made_of) != made_of:
            raise SampleError(
                f"its photo or mask was another when an earlier view was made of it, and view "
                f"{row.key.view} must be of the same"
            )

    def written(self, row: Prepared) -> None:
        """The view is a row now."""
        if row.doubt:
            self.doubtful[row.key.sample_id] = row.doubt
        self.rows += 1
        self.handled += 1

    def add(self, other: Tally) -> None:
        """What became of the samples of a shard; raises DatasetError for a skipped one when `strict`."""
        self.photos.update(other.photos)
        self.doubtful.update(other.doubtful)
        self.rows += other.rows
        self.handled += other.rows
        for sample_id, reason in other.skipped.items():
            self.skip(sample_id, reason)

    def of_photos(self, photos: Iterable[Photo]) -> Tally:
        """A new one that knows what is known of these photos, for a process that makes views of them."""
        known = Tally(self._strict)
        for photo in photos:
            if photo in self.photos:
                known.photos[photo] = self.photos[photo]
            if photo[1] in self.skipped:
                known.skipped[photo[1]] = self.skipped[photo[1]]
        return known

    def skip(self, sample_id: str, reason: str) -> None:
        """The sample cannot be a row; raises DatasetError when `strict`."""
        self.refuse(sample_id, reason)
        self.handled += 1

    def refuse(self, name: str, reason: str) -> None:
        """A file that is no sample; raises DatasetError when `strict`."""
        if self._strict:
            raise DatasetError(f"{name}: {reason} (--strict stops here)")
        if name in self.skipped:  # another view of it
            return
        self.skipped[name] = reason
        if len(self.skipped) <= _WARNINGS:
            log.warning("skipped %s: %s", printable(name), reason)
        if len(self.skipped) == _WARNINGS:
            log.warning("further ones are listed at the end")


def prepare(
    todo: Sequence[tuple[RowKey, Sample]],
    how: Preparation,
    workers: int,
    tally: Tally,
    stages: Stages | None = None,
) -> Iterator[Prepared]:
    """Decoded views in order, twice as many ahead as threads at most; bad ones go to the tally."""
    waiting: deque[tuple[RowKey, Future[Prepared]]] = deque()
    at_url = bool(todo) and isinstance(todo[0][1].image_path, Url)
    threads = max(workers, THREADS_AT_URL) if at_url else workers

    def finished() -> Iterator[Prepared]:
        key, future = waiting.popleft()
        try:
            row = future.result()
            tally.same_photo(row)
        except SampleError as error:
            tally.skip(key.sample_id, str(error))
        else:
            yield row

    clock = stages or Stages(workers)

    def decoded(key: RowKey, sample: Sample) -> Prepared:
        with clock.busy(DECODE):
            return _decoded(key, sample, how)

    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    try:
        for key, sample in todo:
            waiting.append((key, pool.submit(decoded, key, sample)))
            if len(waiting) > 2 * threads:
                yield from finished()
        while waiting:
            yield from finished()
    finally:
        pool.shutdown(cancel_futures=True)


def _decoded(key: RowKey, sample: Sample, how: Preparation) -> Prepared:
    source = sample.read()
    image = decode_image(source.image)
    height, width = image.shape[:2]
    orientation = exif_orientation(source.image)
    mask = sample.mask(source.label, height, width, orientation)
    digests = {
        "source_bytes": len(source.image),
        "source_sha256": _sha256(source.image),
        "label_sha256": _sha256(source.label),
        "pixels_sha256": _sha256(json.dumps(image.shape).encode(), image.data),
    }
    if how.policy is None or not key.view:
        where = place(height, width, how.size_px, how.resize)
        made: dict[str, Any] = {
            "placed_px": [where.top_px, where.left_px, where.height_px, where.width_px]
        }
        image, mask = resize_image(image, where), resize_mask(mask, where)
    else:
        drawn = draw(how.policy, how.seed, key.sample_id, key.view)
        image, mask, made = apply(drawn, image, mask, how.size_px, how.resize)
        made |= {"augmentation": how.made_by, "drawn": drawn}
    details = {
        **digests,
        "source_height_px": height,
        "source_width_px": width,
        **made,
        "exif_orientation": orientation,
    }
    doubt = sample.may_be_turned(source.label, height, width, orientation)
    return Prepared(key, image, mask, details, doubt)


def changed(
    committed: Sequence[tuple[Sample, Digests]], workers: int, progress: bool, stop: StopRequest
) -> dict[str, str]:
    """Which of these samples are not what was committed: sample id to what its files are now.

    Reads all of their files, and ends early when a stop is asked for.
    """
    found: dict[str, str] = {}
    title = "compare with the source files"
    with (
        ThreadPoolExecutor(workers, thread_name_prefix="compare") as pool,
        Progress(title, len(committed), "image", shown=progress) as bar,
    ):
        changes = pool.map(lambda pair: _change(*pair), committed)
        for number, ((sample, _), what) in enumerate(zip(committed, changes, strict=True), 1):
            if what:
                log.warning("%s: %s", printable(sample.sample_id), what)
                found[sample.sample_id] = what
            bar.reach(number)
            if stop.asked:
                pool.shutdown(cancel_futures=True)
                break
    return found


def _change(sample: Sample, known: Digests) -> str:
    try:
        source = sample.read()
    except SampleError as error:
        return str(error)
    if len(source.image) != known.image_bytes:
        return f"the image had {known.image_bytes} bytes, it has {len(source.image)} now"
    if _sha256(source.image) != known.image_sha256:
        return "the image has other bytes of the same number"
    if _sha256(source.label) != known.label_sha256:
        return "the image is the same, its mask or annotations are others"
    return ""


def twins(photos: Mapping[Photo, Digests]) -> list[tuple[str, str]]:
    """(train id, val id) of images with the same pixels.

    A photo on both sides makes the validation score look better than it is. Each such photo is in
    one pair at least.
    """
    ids_of: dict[str, dict[str, list[str]]] = {}
    for (split, sample_id), made_of in photos.items():
        ids_of.setdefault(made_of.pixels_sha256, {}).setdefault(split, []).append(sample_id)
    pairs = []
    for ids in ids_of.values():
        train, val = ids.get("train", []), ids.get("val", [])
        if train and val:
            longest = max(len(train), len(val))
            pairs += [(train[n % len(train)], val[n % len(val)]) for n in range(longest)]
    return pairs


def _sha256(*parts: bytes | memoryview) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
