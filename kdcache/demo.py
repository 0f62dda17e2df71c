"""`kdcache demo`: the whole pipeline on stand-ins, so that a stranger sees it work in two minutes."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import kdcache
from kdcache.cache.info import describe
from kdcache.config import ExtractConfig, TrainConfig
from kdcache.deploy.evaluate import evaluate
from kdcache.deploy.export import ExportReport, export
from kdcache.drawing import save
from kdcache.errors import KdcacheError
from kdcache.precompute.dataset import folder_dataset
from kdcache.precompute.extract import ExtractReport, extract
from kdcache.standins import save_detector, save_scenes, save_teacher
from kdcache.train.loop import TrainReport, train
from kdcache.train.overlay import overlay, shown_rows
from kdcache.train.run_folder import read_best_student
from kdcache.train.score import score_images, summary
from kdcache.train.student import build_student

SIZE_PX = 128
SCENES = 48
SCENE_SIZE_PX = (180, 240)  # (height, width): unlike the input, so that resizing is part of it

# From random weights (there is no download in a demo) the decoder needs larger steps than 1e-4.
TRAINING = TrainConfig(
    encoder_weights="random", epochs=6, batch_size=4, learning_rate=3e-3, min_lr=1e-4
)
_MARKER = ".kdcache-demo"


@dataclass(frozen=True, kw_only=True)
class DemoReport:
    """What the demo made and measured."""

    folder: Path
    extraction: ExtractReport
    cache: dict[str, Any]  # as `kdcache info --json`
    training: TrainReport
    untrained: dict[str, Any]
    trained: dict[str, Any]  # as `kdcache evaluate --json`
    exported: ExportReport
    overlay: Path


def demo(folder: Path, progress: bool = False) -> DemoReport:
    """Make stand-ins in `folder`, then extract, train, evaluate and export there, on the CPU.

    A folder of an earlier demo is made anew; raises KdcacheError for a folder of anything else.
    """
    if folder.exists() and any(folder.iterdir()):
        if not (folder / _MARKER).exists():
            raise KdcacheError(f"{folder} is not empty and no earlier demo's; choose another --out")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARKER).touch()
    detector, teacher = folder / "standin_detector.onnx", folder / "standin_teacher.onnx"
    save_detector(detector)
    save_teacher(teacher)
    save_scenes(folder / "scenes", SCENES, *SCENE_SIZE_PX)

    settings = ExtractConfig(
        yolo_onnx_path=detector, teacher_checkpoint=teacher, size=SIZE_PX, val_fraction=0.25
    )
    dataset = folder_dataset(folder / "scenes/images", folder / "scenes/masks")
    extraction = extract(settings, dataset, folder / "cache.zarr", device="cpu", progress=progress)
    cache = kdcache.open(folder / "cache.zarr")
    val_rows = cache.rows_of("val")

    torch.manual_seed(TRAINING.seed)
    untrained_images = score_images(
        build_student(TRAINING.student_encoder, "random").eval(),
        cache,
        val_rows,
        TRAINING,
        temperature=TRAINING.last_temperature,
        device="cpu",
    )
    untrained = summary(list(untrained_images))
    run = folder / "run"
    training = train(folder / "cache.zarr", run, TRAINING, device="cpu", progress=progress)
    exported = export(run, folder / "student.onnx", cache)
    picture = folder / "overlay.jpg"
    shown = overlay(read_best_student(run)[0], cache, shown_rows(val_rows), "cpu")
    save(picture, shown, "JPEG")
    return DemoReport(
        folder=folder,
        extraction=extraction,
        cache=describe(cache),
        training=training,
        untrained=untrained,
        trained=evaluate(run, cache, device="cpu").facts(),
        exported=exported,
        overlay=picture,
    )
