"""What there is to extract, with which models, into which cache: found out before anything is written."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import codecs
from kdcache.cache.format import RowKey, describe_row, read_root
from kdcache.cache.layout import IMAGE, MASK, ROWS, Manifest, TapSpec, logits_dtype
from kdcache.cache.lock import refuse_unwritable
from kdcache.cache.need import stored_bytes
from kdcache.cache.reader import Cache
from kdcache.cache.writer import is_foreign, shard_kind
from kdcache.config import ExtractConfig
from kdcache.devices import present
from kdcache.errors import CacheError, ConfigError, FingerprintError, SampleError
from kdcache.imaging import INTERPOLATION
from kdcache.onnx_session import Device
from kdcache.places import Place, size_bytes
from kdcache.precompute.coco import PERSON_CATEGORY
from kdcache.precompute.dataset import Dataset, Sample, split_of
from kdcache.precompute.policy import name_of
from kdcache.precompute.sources import Digests, Preparation, Prepared, Tally
from kdcache.precompute.teacher import Teacher
from kdcache.precompute.yolo import Features, Yolo

# On the CPU one image a call is as fast as many and needs the least memory; a GPU wants a batch.
DEFAULT_BATCH = {"cpu": 1, "cuda": 8, "tensorrt": 8}


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What there is to extract."""

    dataset: Dataset
    how: Preparation
    out: Place
    split: str
    whole: bool  # the dataset was not limited, so rows that it does not have are gone from it
    planned: Sequence[tuple[RowKey, Sample]]
    known: Mapping[RowKey, Digests]  # rows that the cache has
    todo: Sequence[tuple[RowKey, Sample]]

    def shards(self, shard_rows: int) -> int:
        """How many shards of so many rows at most what is to be done will fill."""
        kinds = Counter(shard_kind(key) for key, _ in self.todo)
        return sum(-(-rows // shard_rows) for rows in kinds.values())


@dataclass(frozen=True, kw_only=True)
class Models:
    """The frozen models on one device, and what the cache they make is like."""

    device: str
    yolo: Yolo | None  # None: the cache is to hold no features
    teacher: Teacher | None  # None: … no logits
    manifest: Manifest


@dataclass(frozen=True, kw_only=True)
class Job(Survey, Models):
    """What there is to extract, and with what."""


def open_job(
    config: ExtractConfig,
    dataset: Dataset,
    out: Place,
    *,
    split: str,
    device: Device,
    limit: int | None,
    tally: Tally,
) -> Job:
    """Find out what is to be done and load the models; nothing is written."""
    place_on = present(device)
    found = survey(config, dataset, out, split=split, limit=limit, tally=tally)
    return Job(**vars(found), **vars(open_models(config, found.how, place_on)))


def open_models(config: ExtractConfig, how: Preparation, device: str) -> Models:
    """The models that the settings want to be run, on a device that is present."""
    yolo, teacher = _load_models(config, device)
    manifest = _manifest(config, how, yolo, teacher, device)
    return Models(device=device, yolo=yolo, teacher=teacher, manifest=manifest)


def survey(
    config: ExtractConfig,
    dataset: Dataset,
    out: Place,
    *,
    split: str,
    limit: int | None,
    tally: Tally,
) -> Survey:
    """Find out what is to be done; no model is needed for that."""
    how = Preparation.of(config)
    for name, reason in dataset.refused.items():
        tally.refuse(name, reason)
    planned = _planned(dataset, config, split, limit)
    if is_foreign(out):
        raise CacheError(f"--out {out} exists and is not a kdcache cache; choose another")
    refuse_unwritable(out)
    known = _known(out)
    for key, digests in sorted(known.items(), key=lambda item: item[0].view):
        tally.photos.setdefault(key[:2], digests)
    _refuse_second_split(planned, known, out)
    if how.augmentation and any(key.view for key in known):
        _refuse_other_views(out, read_root(out).manifest.augmentation or {}, how.augmentation)
    todo = [(key, sample) for key, sample in planned if key not in known]
    return Survey(
        dataset=dataset,
        how=how,
        out=out,
        split=split,
        whole=limit is None,
        planned=planned,
        known=known,
        todo=todo,
    )


def _known(out: Place) -> dict[RowKey, Digests]:
    """The rows that a cache holds already, if there is one."""
    if not (out / "zarr.json").is_file():
        return {}
    found = Cache(out)
    described = zip(found.keys, found.all_details(), strict=True)
    return {key: Digests.of(details) for key, details in described}


def _planned(
    dataset: Dataset, config: ExtractConfig, split: str, limit: int | None
) -> list[tuple[RowKey, Sample]]:
    """Keys of the samples' views, in the order of the shards, which hold one split and view each.

    View after view: more of them, asked for later, come where they would have been.
    """
    planned = []
    for sample in itertools.islice(dataset.samples, limit):
        its_split = _split(sample, config, split)
        # what is validated on is not augmented
        views = config.views if its_split == "train" else 1
        planned += [(RowKey(its_split, sample.sample_id, view), sample) for view in range(views)]
    return sorted(planned, key=lambda item: (item[0].view, item[0].split))


def _split(sample: Sample, config: ExtractConfig, split: str) -> str:
    if config.val_fraction and split == "train":
        return split_of(sample.sample_id, config.val_fraction, config.seed)
    return split


def _refuse_second_split(
    planned: Sequence[tuple[RowKey, Sample]], known: Mapping[RowKey, Digests], out: Place
) -> None:
    """The same photo in train and val would make the validation score a lie.

    Equal names alone are not enough to refuse: two folders may number their files alike.
    """
    split_of_id = {key.sample_id: key.split for key in known}
    for key, sample in planned:
        split = split_of_id.get(key.sample_id, key.split)
        if split == key.split or key.view or key in known:
            continue
        other = known[key._replace(split=split)]
        try:
            if size_bytes(sample.image_path) != other.image_bytes:
                continue
            image = sample.read().image
        except (OSError, ValueError, SampleError):
            continue  # it cannot be a row, which the extraction will say
        if hashlib.sha256(image).hexdigest() == other.image_sha256:
            raise ConfigError(
                f"{key.sample_id} is in {out} as {split}, now it would be added as {key.split} "
                "too; use the --val-fraction, seed and --split it was extracted with"
            )


def _refuse_other_views(out: Place, made: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """In the words of the options that were, and are, given; the writer looks at each setting."""
    said = [name_of(one["policy"]) for one in (made, asked)]
    if said[0] != said[1]:
        raise FingerprintError(
            f"{out} has views that were made with --augment {said[0]}, now {said[1]} was asked for; make "
            f"further ones as those were made (--augment {said[0]}), or write to another place"
        )


def gone(planned: Sequence[tuple[RowKey, Sample]], known: Mapping[RowKey, Digests]) -> list[str]:
    """Ids of rows of the splits that were asked for which the dataset does not have."""
    here = {(key.split, key.sample_id) for key, _ in planned}
    splits = {split for split, _ in here}
    elsewhere = {key[:2]: key for key in known if key.split in splits and key[:2] not in here}
    return [key.sample_id for key in elsewhere.values()]


def _load_models(config: ExtractConfig, device: str) -> tuple[Yolo | None, Teacher | None]:
    """The models that the settings want to be run; raises ConfigError when one was not given."""
    yolo = teacher = None
    if config.store != "logits":
        yolo = open_yolo(config, config.yolo_target_layer, device, config.size)
    if config.store != "features":
        teacher = open_teacher(config, device, config.size)
    return yolo, teacher


def open_yolo(config: ExtractConfig, taps: Sequence[str], device: str, size_px: int) -> Yolo:
    """The detector that the settings name; raises ConfigError when they name none."""
    if config.yolo_onnx_path is None:
        raise ConfigError("the detector is needed: --yolo FILE.onnx (or extract --logits-only)")
    return Yolo(
        config.yolo_onnx_path, taps=taps, expects=config.yolo_input, device=device, size_px=size_px
    )


def open_teacher(config: ExtractConfig, device: str, size_px: int) -> Teacher:
    """The teacher that the settings name; raises ConfigError when they name none."""
    if config.teacher_checkpoint is None:
        raise ConfigError("the teacher is needed: --teacher FILE (or extract --features-only)")
    return Teacher(
        config.teacher_checkpoint,
        encoder=config.teacher_encoder,
        output=config.teacher_output,
        device=device,
        size_px=size_px,
    )


def provider(device: str) -> str:
    """The execution provider as the fingerprint states it."""
    return f"{device} float32"


def _manifest(
    config: ExtractConfig,
    how: Preparation,
    yolo: Yolo | None,
    teacher: Teacher | None,
    device: str,
) -> Manifest:
    fingerprint = {
        "size": str(config.size),
        "resize": config.resize,
        "interpolation": INTERPOLATION,
        "precision": config.precision,
        "views": "resized only",
        "execution_provider": provider(device),
    }
    taps: tuple[TapSpec, ...] = ()
    if yolo is not None:
        fingerprint |= {
            "yolo_sha256": yolo.sha256,
            "yolo_target_layer": ", ".join(config.yolo_target_layer),
            "yolo_input": config.yolo_input,
        }
        taps = tuple(
            TapSpec(name=name, precision=config.precision, shape=tap.shape, groups=tap.groups)
            for name, tap in yolo.taps.items()
        )
        _refuse_shared_folder(taps)
    if teacher is not None:
        fingerprint |= {"teacher_sha256": teacher.sha256, "teacher_network": teacher.network}
    if config.category != PERSON_CATEGORY:
        fingerprint["category"] = config.category
    libraries = ("kdcache", "numpy", "opencv-python-headless", "pillow", "torch", "onnx")
    return Manifest(
        size_px=config.size,
        shard_rows=config.shard_rows,
        compression=config.compression,
        logits_dtype=None if teacher is None else logits_dtype(config.precision),
        taps=taps,
        fingerprint=fingerprint,
        versions={name: version(name) for name in (*libraries, "torchvision")},
        augmentation=how.augmentation,
    )


def _refuse_shared_folder(taps: Sequence[TapSpec]) -> None:
    names: dict[str, str] = {}
    for tap in taps:
        other = names.setdefault(tap.folder, tap.name)
        if other != tap.name:
            raise ConfigError(
                f"--tap {other} and --tap {tap.name} would be stored in one folder, {tap.folder}: "
                "rename one of the two in the graph, or extract it into another cache"
            )


def row_arrays(
    row: Prepared,
    features: Features | None,
    logits_HW: codecs.F32 | None,
    manifest: Manifest,
) -> dict[str, NDArray[np.generic]]:
    """What the cache holds of a row, by array; None of a model that is not run."""
    arrays: dict[str, NDArray[np.generic]] = {
        IMAGE: row.image,
        MASK: row.mask,
        ROWS: describe_row(row.key, row.details),
    }
    if manifest.logits_dtype is not None and logits_HW is not None:
        arrays[manifest.logits_path] = codecs.teacher_logits(logits_HW, manifest.logits_dtype)
    if features is not None:
        arrays |= feature_arrays(features, manifest.taps)
    return arrays


def feature_arrays(features: Features, taps: Sequence[TapSpec]) -> dict[str, NDArray[np.generic]]:
    """What the cache holds of a row's features, by array."""
    arrays: dict[str, NDArray[np.generic]] = {}
    for tap in taps:
        # on a GPU the features become codes there; the codes come to the host
        encoded = codecs.encode(features[tap.name], tap)
        arrays |= {f"{tap.folder}/{name}": codecs.on_host(a) for name, a in encoded.items()}
    return arrays


def bytes_per_row(
    rows: Iterable[tuple[Prepared, Features | None, codecs.F32 | None]],
    manifest: Manifest,
    but: Collection[str] = (),
) -> float:
    """Mean bytes on disk of rows in all arrays `but` these; rows that cannot be stored do not count."""
    specs = [spec for spec in manifest.arrays() if spec.path not in but]
    sizes = []
    for row in rows:
        try:
            sizes.append(stored_bytes(row_arrays(*row, manifest), specs, manifest.compression))
        except SampleError:  # the extraction will skip and name it
            continue
    return sum(sizes) / max(len(sizes), 1)
