"""A trained student from wherever it lies: a run folder, its .safetensors, or an exported .onnx."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.cache.reader import Cache
from kdcache.config import TrainConfig
from kdcache.errors import ModelError, RunError, device_memory
from kdcache.imaging import IMAGENET_MEAN, IMAGENET_STD, INTERPOLATION
from kdcache.pixels import normalised, restored
from kdcache.train.projection import Projections
from kdcache.train.run_folder import (
    check_cache,
    read_best_projections,
    read_best_student,
    read_config,
    read_record,
    saved_student,
)
from kdcache.train.step import Trainee
from kdcache.train.student import StudentOutput, resolve_device

# What an exported file says of itself, as JSON, under this name.
METADATA_KEY = "kdcache"

# What moves the cached numbers a little without changing what they mean.
HARMLESS_CHANGES = ("precision", "execution_provider")

# How the pixels are given to an exported student.
NORMALISED, PHOTOS = "float32 NCHW, ImageNet-normalised", "uint8 NHWC RGB"


@dataclass(frozen=True, kw_only=True)
class TrainedStudent:
    """A student on one device, ready to run."""

    path: Path
    metadata: Mapping[str, Any]  # how it was made, and how pixels are prepared for it
    device: str
    config: TrainConfig  # of its run; as far as a student's own file states it
    record: Mapping[str, Any] | None  # what its run was started from; None of a file
    projections: Projections | None  # of a run that learned features
    unet: nn.Module | None  # the network itself; None of a graph
    run: Callable[[Tensor], StudentOutput]  # on normalised pixels
    takes_photos: Callable[[Tensor], Tensor] | None  # of a graph with its own preprocessing

    @property
    def size_px(self) -> int:
        return int(self.metadata["size_px"])

    def logits(self, photos_NHWC: Tensor) -> Tensor:
        """(N, 1, S, S) float32 logits of (N, S, S, 3) uint8 RGB pixels on the device."""
        with torch.inference_mode(), device_memory("running the student", "lower --batch-size"):
            if self.takes_photos is not None:
                return self.takes_photos(photos_NHWC)
            return self.run(normalised(photos_NHWC)).logits.float()


def open_student(path: Path, device: str = "auto", *, features: bool = False) -> TrainedStudent:
    """The best student of a run folder, or the one in a `.safetensors` or `.onnx` file.

    With `features` a run's projections come too. Raises RunError or ModelError for anything else,
    and for a student whose pixels were prepared otherwise than this version prepares them.
    """
    on = resolve_device(device)
    if path.is_file() and path.suffix.lower() == ".onnx":
        return open_onnx_student(path, on)
    projections: Projections | None = None
    if not path.exists():
        raise RunError(f"{path}: no such run folder or student file")
    if (path / "sweep.json").exists():
        raise RunError(f"{path} is a sweep: its runs are in {path / 'runs'}")
    if path.is_file():
        if path.suffix.lower() != ".safetensors":
            raise ModelError(
                f"{path}: expected a run folder, a .safetensors or an .onnx of a student"
            )
        student, metadata = saved_student(path)
        config, record = _told_config(metadata), None
    else:
        config, record = read_config(path), read_record(path)
        student, metadata = read_best_student(path, with_taps=features)
        _check_of_one_cache(path, metadata, record)
        projections = read_best_projections(path, student) if features else None
    check_preprocessing(path, metadata)
    with device_memory("loading the student", "use --device cpu"):
        network = Trainee(student, projections).eval().to(on)
    return TrainedStudent(
        path=path,
        metadata=metadata,
        device=on,
        config=config,
        record=record,
        projections=projections,
        unet=student.unet,
        run=network,
        takes_photos=None,
    )


def check_cache_of(student: TrainedStudent, cache: Cache) -> None:
    """Raise RunError when a cache holds other pixels, or for a run other targets, than its own."""
    if student.record is not None:
        check_cache(student.path, dict(student.record), cache.path, HARMLESS_CHANGES)
        return
    fingerprint = cache.manifest.fingerprint
    for name, key in (("size_px", "size"), ("resize", "resize")):
        if str(student.metadata[name]) != fingerprint[key]:
            raise RunError(
                f"{student.path} was trained on pixels with {key} = {student.metadata[name]}, "
                f"{cache.path} has {fingerprint[key]}; use a cache made as its own was"
            )


def open_onnx_student(path: Path, device: str) -> TrainedStudent:
    """The student in a file that `kdcache export` wrote, whatever its name, in ONNX Runtime."""
    from kdcache.onnx_graph import pruned, read_model  # here only: a run needs neither
    from kdcache.onnx_session import OnnxNetwork

    model = read_model(path)
    metadata = read_metadata(path, {entry.key: entry.value for entry in model.metadata_props})
    check_preprocessing(path, metadata)
    photos = metadata.get("input") == PHOTOS
    logits = pruned(model, ["logits"], path).SerializeToString()
    network = OnnxNetwork(logits, path, device, int(metadata["size_px"]), photos=photos)

    def run(pixels_NCHW: Tensor) -> StudentOutput:
        logits = network(restored(pixels_NCHW) if photos else pixels_NCHW)
        return StudentOutput(logits, ())

    return TrainedStudent(
        path=path,
        metadata=metadata,
        device=device,
        config=_told_config(metadata),
        record=None,
        projections=None,
        unet=None,
        run=run,
        takes_photos=network if photos else None,
    )


def read_metadata(path: Path, properties: Mapping[str, str]) -> dict[str, Any]:
    """What `kdcache export` wrote into the file; raises ModelError for another's."""
    try:
        metadata: dict[str, Any] = json.loads(properties[METADATA_KEY])
        int(metadata["size_px"])
    except (KeyError, ValueError, TypeError) as error:
        raise ModelError(
            f"{path} does not say how its pixels are prepared: expected a student that "
            "`kdcache export` wrote"
        ) from error
    return metadata


def check_preprocessing(path: Path, metadata: Mapping[str, Any]) -> None:
    """Raise RunError for a student trained on pixels that were prepared otherwise than here."""
    ours = {
        "interpolation": INTERPOLATION,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
    }
    for name, value in ours.items():
        if metadata.get(name, value) != value:
            raise RunError(
                f"{path}: its student was trained on pixels with {name} = {metadata[name]}, this "
                f"version of kdcache has {value}; use the version that made it "
                f"({metadata.get('kdcache', 'unknown')})"
            )
    if metadata.get("resize") not in ("stretch", "letterbox"):
        raise RunError(
            f"{path}: its resize is {metadata.get('resize')!r}; expected stretch or letterbox"
        )


def _check_of_one_cache(path: Path, metadata: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """The student in a run folder must be of the cache that the run states."""
    fingerprint = record["fingerprint"]
    for name, key in (
        ("size_px", "size"),
        ("resize", "resize"),
        ("interpolation", "interpolation"),
    ):
        if name in metadata and str(metadata[name]) != str(fingerprint.get(key)):
            raise RunError(
                f"{path}: its student was trained with {key} = {metadata[name]}, the cache that its "
                f"run.json states has {fingerprint.get(key)}; one of the two files is another run's: "
                "put its own back"
            )


def _told_config(metadata: Mapping[str, Any]) -> TrainConfig:
    """What a student's file says of its training; else the defaults."""
    told = {name: metadata[name] for name in ("temperature", "kl_scale") if name in metadata}
    return TrainConfig(**told)
