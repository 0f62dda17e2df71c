"""Samples on their way from disk: each file read once, decoded ahead, told apart by its digests."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from kdcache.cache.format import RowKey, augmentation_digest
from kdcache.config import ExtractConfig, ResizeMode
from kdcache.errors import DatasetError, SampleError
from kdcache.imaging import U8, decode_image, exif_orientation, place, resize_image, resize_mask
from kdcache.places import THREADS_AT_URL, Url
from kdcache.precompute.dataset import Digests, Sample
from kdcache.precompute.policy import Policy, draw, read_policy
from kdcache.precompute.stages import DECODE, Stages
from kdcache.precompute.views import apply
from kdcache.progress import Progress
from kdcache.stop import StopRequest
from kdcache.tables import printable

log = logging.getLogger(__name__)

_WARNINGS = 20  # of a dirty dataset's thousands; all are in the report and in the cache


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

    @property
    def augmentation(self) -> dict[str, Any] | None:
        """What the manifest says of it: the transforms that are on, for later ones will be off here."""
        if self.policy is None:
            return None
        transforms = self.policy.model_dump(mode="json").items()
        return {"policy": {n: t for n, t in transforms if t["probability"]}, "seed": self.seed}


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
        self.pixels: dict[RowKey, str] = {}  # `pixels_sha256` of the rows there are
        self.handled = 0
        self._strict = strict

    def written(self, row: Prepared) -> None:
        """The sample is a row now."""
        self.pixels[row.key] = row.details["pixels_sha256"]
        if row.doubt:
            self.doubtful[row.key.sample_id] = row.doubt
        self.handled += 1

    def add(
        self, pixels: Mapping[RowKey, str], skipped: Mapping[str, str], doubtful: Mapping[str, str]
    ) -> None:
        """What became of the samples of a shard; raises DatasetError for a skipped one when `strict`."""
        self.pixels.update(pixels)
        self.doubtful.update(doubtful)
        self.handled += len(pixels)
        for sample_id, reason in skipped.items():
            self.skip(sample_id, reason)

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
            yield future.result()
        except SampleError as error:
            tally.skip(key.sample_id, str(error))

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
    if sample.first_made_of not in (None, Digests.of(digests)):
        raise SampleError(
            "its photo or mask is another than its first view was made of, and views are of one photo"
        )
    if how.policy is None or not key.view:
        where = place(height, width, how.size_px, how.resize)
        made: dict[str, Any] = {
            "placed_px": [where.top_px, where.left_px, where.height_px, where.width_px]
        }
        image, mask = resize_image(image, where), resize_mask(mask, where)
    else:
        drawn = draw(how.policy, how.seed, key.sample_id, key.view)
        image, mask, made = apply(drawn, image, mask, how.size_px, how.resize)
        made |= {"augmentation": augmentation_digest(how.augmentation or {}), "drawn": drawn}
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


def twins(rows: Iterable[tuple[RowKey, str]]) -> list[tuple[str, str]]:
    """(train id, val id) of images with the same pixels, from keys and `pixels_sha256`.

    A photo on both sides makes the validation score look better than it is. Each such photo is in
    one pair at least.
    """
    ids_of: dict[str, dict[str, list[str]]] = {}
    for key, digest in rows:
        if not key.view:
            ids_of.setdefault(digest, {}).setdefault(key.split, []).append(key.sample_id)
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
