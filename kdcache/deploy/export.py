"""The student as an ONNX file, compared with PyTorch on real rows before it gets its name."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdcache.cache.reader import Cache
from kdcache.deploy.graph import OPSET, check_only_weights_of, quantise, write_onnx
from kdcache.deploy.trained import (
    HARMLESS_CHANGES,
    NORMALISED,
    PHOTOS,
    TrainedStudent,
    check_cache_of,
    open_onnx_student,
    open_student,
)
from kdcache.durable import replacing
from kdcache.errors import CacheError, KdcacheError, ModelError
from kdcache.imaging import IMAGENET_MEAN, IMAGENET_STD
from kdcache.onnx_graph import read_model
from kdcache.pixels import normalised
from kdcache.places import Place, place_of
from kdcache.train.epoch import shuffled
from kdcache.train.metrics import compare, mean
from kdcache.train.run_folder import check_cache, read_record

log = logging.getLogger(__name__)

Precision = Literal["float32", "float16", "int8"]

CHECKED_BATCHES = (1, 2, 7)

# A logit so close to the threshold may fall on its other side in another runtime.
TIE = 1e-3

# Rows that the ranges of 8-bit activations are taken from.
CALIBRATION_ROWS = 64

_TIMED = 5


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Masks of the file, in ONNX Runtime on the CPU, against PyTorch's."""

    images: int
    max_difference: float  # of a logit
    different_pixels: int  # of the mask, ties left out
    pixels: int
    largest_at_difference: float  # the largest |logit| of PyTorch whose pixel differs


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """An exported student, how far it is from PyTorch's, and what it costs on this machine."""

    path: Path
    opset: int
    precision: Precision
    input: str
    batch: int | None  # the only one, or any
    size_bytes: int
    parameters: int  # of the student
    weights: int  # in the float32 graph, BatchNorm folded away: all of them the student's
    agreement: Mapping[int, Agreement]  # by batch size
    rows: int  # of the cache that mIoU was measured on
    pytorch_miou: float | None
    miou: float | None
    latency_ms: float  # of one image, or of the fixed batch, in ONNX Runtime on this CPU
    pytorch_latency_ms: float


class _Deployed(nn.Module):
    """The student's UNet behind what was asked for: its own preprocessing, half precision."""

    mean: Tensor
    std: Tensor

    def __init__(self, unet: nn.Module, photos: bool, half: bool) -> None:
        super().__init__()
        self.unet = copy.deepcopy(unet).half() if half else unet
        self._photos, self._half = photos, half
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        pixels = image
        if self._photos:
            pixels = (image.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        logits: Tensor = self.unet(pixels.half() if self._half else pixels).float()
        return ((logits[:, 0] > 0).to(torch.uint8), logits) if self._photos else logits


def export(
    student: Path,
    out: Path,
    cache: Cache | None = None,
    *,
    precision: Precision = "float32",
    preprocessing: bool = False,
    fixed_batch: int | None = None,
    calibration_rows: int = CALIBRATION_ROWS,
    rows: int = 64,
) -> ExportReport:
    """Write a student, of a run or a `.safetensors`, as ONNX; projection and tap are not in it.

    `image` (N, 3, S, S) float32, ImageNet-normalised, gives `logits` (N, 1, S, S) float32; with
    `preprocessing` `image` (N, S, S, 3) uint8 RGB gives `mask` (N, S, S) uint8 of 0 and 1, and
    `logits`. N is any number, or `fixed_batch`. `int8` takes ranges from training rows of the
    `cache`, whose val rows also measure what the file is worth. Raises KdcacheError, and leaves no
    file, when a float32 mask differs from PyTorch's anywhere but at ties, |logit| <= 1e-3, or a
    logit of any precision is not finite.
    """
    if out.is_dir() or out.suffix != ".onnx":
        raise ModelError(f"--out {out}: name the file to write, such as student.onnx")
    one = open_student(student, "cpu")
    if one.unet is None:
        raise ModelError(f"{student} is exported already; give its run folder or .safetensors")
    if precision == "int8" and cache is None:
        raise CacheError("--int8 takes the ranges of activations from a cache: give --cache CACHE")
    if cache is not None:
        check_cache_of(one, cache)
    metadata = {
        **one.metadata,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "threshold": "logit > 0",
        "input": PHOTOS if preprocessing else NORMALISED,
        "precision": precision,
        "opset": OPSET,
    }
    unet, size_px = one.unet, one.size_px
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        weights = _write(unet, size_px, temporary, metadata, precision, preprocessing, fixed_batch)
        if precision == "int8" and cache is not None:
            log.info("calibrating on %d rows", calibration_rows)
            inputs = _calibration(cache, calibration_rows, preprocessing, fixed_batch or 1)
            quantise(temporary, temporary, inputs)
        exported = open_onnx_student(temporary, "cpu")
        batches = (fixed_batch,) if fixed_batch else CHECKED_BATCHES
        agreement = {n: _agreement(one, exported, _photos(cache, n, size_px)) for n in batches}
        _check(agreement, out, exact=precision == "float32")
        scored = _scored_rows(cache, rows)
        log.info("comparing with PyTorch on %d rows", len(scored))
        timed = _photos(cache, fixed_batch or 1, size_px)
        report = ExportReport(
            path=out,
            opset=OPSET,
            precision=precision,
            input=metadata["input"],
            batch=fixed_batch,
            size_bytes=temporary.stat().st_size,
            parameters=sum(p.numel() for p in unet.parameters()),
            weights=weights,
            agreement=agreement,
            rows=len(scored),
            pytorch_miou=_miou(one, cache, scored),
            miou=_miou(exported, cache, scored),
            latency_ms=_latency_ms(exported, timed),
            pytorch_latency_ms=_latency_ms(one, timed),
        )
    return report


def own_cache(student: Path, given: Place | None) -> Cache | None:
    """The cache that was given, else the one that a run was trained from, if that is still there.

    What lies there now and is none, or another's, is not used, and said.
    """
    if given is not None:
        return Cache(given)
    if not student.is_dir():
        return None
    record = read_record(student)
    path = place_of(record["cache"])
    if not path.exists():
        return None
    try:
        check_cache(student, record, path, HARMLESS_CHANGES)
        return Cache(path)
    except KdcacheError as error:
        log.warning("the cache of %s is not used: %s", student, error)
        return None


def _write(
    unet: nn.Module,
    size_px: int,
    path: Path,
    metadata: Mapping[str, Any],
    precision: Precision,
    photos: bool,
    fixed_batch: int | None,
) -> int:
    """The file, at 16 or 32 bits; returns how many weights it has."""
    shape = (size_px, size_px, 3) if photos else (3, size_px, size_px)
    # two, when any: a batch of one would be taken for a constant
    example = torch.zeros(fixed_batch or 2, *shape, dtype=torch.uint8 if photos else torch.float32)
    network = _Deployed(unet, photos, precision == "float16").eval()
    outputs = ["mask", "logits"] if photos else ["logits"]
    fixed = fixed_batch is not None
    write_onnx(network, example, outputs, path, fixed_batch=fixed, metadata=metadata)
    return check_only_weights_of(read_model(path), unet)


def _photos(cache: Cache | None, count: int, size_px: int) -> Tensor:
    """(count, S, S, 3) uint8: rows of the cache, or seeded noise where there is none."""
    if cache is not None and len(cache):
        rows = [n % len(cache) for n in range(count)]
        return torch.from_numpy(np.stack([cache[row].image.astype(np.uint8) for row in rows]))
    noise = np.random.default_rng(count).integers(0, 256, (count, size_px, size_px, 3), np.uint8)
    return torch.from_numpy(noise)


def _calibration(
    cache: Cache, count: int, photos: bool, batch: int
) -> Iterator[NDArray[np.generic]]:
    """Inputs of the graph from training rows as photos are, drawn with a fixed seed."""
    rows = shuffled(cache.rows_of("train", view=0) or range(len(cache)), 0, 0)[:count]
    if not rows:
        raise CacheError(f"{cache.path} has no rows to take the ranges of activations from")
    for row in rows:
        pixels = torch.from_numpy(cache[row].image.astype(np.uint8)[None]).repeat(batch, 1, 1, 1)
        yield (pixels if photos else normalised(pixels)).numpy()


def _agreement(pytorch: TrainedStudent, exported: TrainedStudent, photos: Tensor) -> Agreement:
    ours, theirs = pytorch.logits(photos), exported.logits(photos)
    different = ((ours > 0) != (theirs > 0)) & (ours.abs() > TIE)
    return Agreement(
        images=len(photos),
        max_difference=float((ours - theirs).abs().max()),
        different_pixels=int(different.sum()),
        pixels=different.numel(),
        largest_at_difference=float(ours[different].abs().max()) if different.any() else 0.0,
    )


def _check(agreement: Mapping[int, Agreement], out: Path, *, exact: bool) -> None:
    for batch, found in agreement.items():
        if not np.isfinite(found.max_difference):
            raise ModelError(
                f"at batch {batch} the exported student's logits are not finite: its weights or "
                f"activations do not fit the precision; {out} was not written"
            )
        if exact and found.different_pixels:
            raise ModelError(
                f"at batch {batch} the exported student's masks differ from PyTorch's on "
                f"{found.different_pixels} of {found.pixels} pixels, where PyTorch's logit is up to "
                f"{found.largest_at_difference:.2g} (logits differ by {found.max_difference:.2g}); "
                f"ties within {TIE:g} are allowed; {out} was not written"
            )


def _scored_rows(cache: Cache | None, count: int) -> Sequence[int]:
    """Val rows, evenly spread; of a cache without, training rows."""
    if cache is None:
        return []
    rows = cache.rows_of("val", view=0) or cache.rows_of("train", view=0)
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))
    return [rows[n] for n in chosen]


def _miou(student: TrainedStudent, cache: Cache | None, rows: Sequence[int]) -> float | None:
    found = []
    for row in (cache[index] for index in rows) if cache is not None else ():
        photo = torch.from_numpy(row.image.astype(np.uint8)[None])
        mask = torch.from_numpy(row.mask.astype(np.uint8))
        scores = compare(student.logits(photo)[0, 0], mask)
        found.append(None if scores is None else scores.miou)
    return mean(found)


def _latency_ms(student: TrainedStudent, photos: Tensor) -> float:
    """Median of a few runs, after one that is not counted."""
    times = []
    for _ in range(_TIMED + 1):
        started = time.perf_counter()
        student.logits(photos)
        times.append(time.perf_counter() - started)
    return 1000 * median(times[1:])
