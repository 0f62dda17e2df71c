"""Does the feature loss make a better student? A study on real photos and models, resumable.

    .venv/bin/python benchmarks/feature_study.py --realdata ../shared/realdata --work DIR

Photos of people from coco_tiny: train2017 trains, val2017 scores. Student: lite0 with its ImageNet
weights; detector features: YOLOv9-N's P3 concat; teacher: ISNet; input 320. The two sides of an arm
(without and with the feature loss, or on all and on some of its positions) share seed, order and all
else. Their difference is taken on each validation photo (mean over the seeds) and resampled over the
photos. The last student is scored, not the best on the photos that score it.

Run again after a stop: finished runs are kept, a started one goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from kdcache.cache.reader import Cache
from kdcache.config import ExtractConfig, TrainConfig
from kdcache.precompute.dataset import Dataset, coco_dataset, unlabelled_dataset
from kdcache.precompute.extract import extract
from kdcache.train.loader import read_batches
from kdcache.train.loop import train
from kdcache.train.metrics import compare
from kdcache.train.student import Student
from kdcache.train.weights import read_student

TAP = "/model.14/Concat_output_0"
ENCODER = "tu-tf_efficientnet_lite0"
SIZE_PX = 320
LABELLED = 10
RESAMPLES = 10_000

FEATURE_WEIGHT = 1.0
NO_TEACHER = {"kl_weight": 0.0, "mse_weight": 0.0}
FEW_LABELS = {"student_tap": "decoder", **NO_TEACHER}
POSITIONS = (SIZE_PX // 8) ** 2  # of the tap's grid


@dataclass(frozen=True)
class Arm:
    """Settings compared: `without` against `beside`, both on top of `common`."""

    cache: str
    common: dict[str, Any]
    without: dict[str, Any] = field(default_factory=lambda: {"feature_weight": 0.0})
    beside: dict[str, Any] = field(default_factory=lambda: {"feature_weight": FEATURE_WEIGHT})

    @property
    def sides(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.common | self.without, self.common | self.beside


ARMS = {
    "decoder tap, encoder frozen": Arm("train", {"student_tap": "decoder"}),
    "encoder tap, encoder trained": Arm("train", {"train_encoder": "all"}),
    "10 labelled + 30 not, no teacher, decoder tap": Arm("few", FEW_LABELS),
} | {
    f"the same, on {share:.0%} of the positions against all": Arm(
        "few",
        FEW_LABELS | {"feature_weight": FEATURE_WEIGHT},
        without={},
        beside={"feature_positions": round(POSITIONS * share)},
    )
    for share in (0.25, 0.05)
}


def make_caches(realdata: Path, work: Path) -> None:
    """`train` and `val` hold all people photos; in `few` all but the first ten lack their mask."""
    extraction = ExtractConfig(
        yolo_onnx_path=realdata / "yolov9n_neck.onnx",
        teacher_checkpoint=realdata / "teacher_isnet.onnx",
        yolo_target_layer=TAP,
        size=SIZE_PX,
        shard_rows=8,
    )
    coco = realdata / "coco_tiny"

    def people(split: str) -> Dataset:
        annotations = coco / f"annotations/instances_{split}2017.json"
        return coco_dataset(coco / f"{split}2017", annotations)

    for split in ("train", "val"):
        cache = work / f"{split}.zarr"
        extract(extraction, people(split), cache, split=split, device="cpu", progress=True)
    samples = people("train").samples
    rest = work / "unlabelled"
    rest.mkdir(exist_ok=True)
    for sample in samples[LABELLED:]:
        link = rest / sample.sample_id
        if not link.exists():
            link.symlink_to(Path(str(sample.image_path)).resolve())
    few = work / "few.zarr"
    labelled = Dataset(images=people("train").images, samples=samples[:LABELLED])
    extract(extraction, labelled, few, device="cpu", progress=True)
    extract(extraction, unlabelled_dataset(rest), few, device="cpu", progress=True)


def settings(realdata: Path, epochs: int, seed: int, changes: dict[str, Any]) -> TrainConfig:
    """Of one run."""
    return TrainConfig(
        student_encoder=ENCODER,
        encoder_weights=str(realdata / "tf_efficientnet_lite0_imagenet.safetensors"),
        epochs=epochs,
        learning_rate=1e-3,
        min_lr=1e-5,
        standardise_features=True,
        seed=seed,
        **changes,
    )


def run_name(cache: str, changes: dict[str, Any], seed: int) -> str:
    """A folder's name; arms that share a side share its run."""
    words = "-".join(f"{key}_{value}" for key, value in sorted(changes.items()))
    return f"{cache}-{words}-seed_{seed}"


@torch.no_grad()
def ious(student_file: Path, cache: Cache) -> list[float]:
    """mIoU of person and background of each row, NaN where no person is labelled."""
    tensors, metadata = read_student(student_file)
    student = Student(metadata["encoder"])
    student.unet.load_state_dict(tensors)
    student.eval()
    found = []
    for batch in read_batches(cache, [[row] for row in range(len(cache))], "cpu", taps=[]):
        one = compare(student(batch.image).logits[0, 0], batch.mask[0, 0])
        found.append(math.nan if one is None or one.miou is None else one.miou)
    return found


def interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean over photos and its 95 % bootstrap interval; (photos,)."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(differences), size=(RESAMPLES, len(differences)))
    low, high = np.percentile(differences[drawn].mean(1), [2.5, 97.5])
    return float(differences.mean()), float(low), float(high)


def table(scores: dict[str, list[float]], arms: Sequence[str], seeds: int) -> str:
    """Markdown for docs/log.md: percent points of mIoU."""
    lines = ["| arm | without | with | difference | 95 % | by seed |",
             "| --- | ---: | ---: | ---: | ---: | --- |"]  # fmt: skip
    for name in arms:
        arm = ARMS[name]
        pairs = [
            [np.array(scores[run_name(arm.cache, side, seed)]) for seed in range(seeds)]
            for side in arm.sides
        ]
        without, with_features = (100 * np.nanmean(pair, axis=0) for pair in pairs)
        known = ~np.isnan(without)
        mean, low, high = interval((with_features - without)[known])
        by_seed = [100 * np.nanmean(b - a) for a, b in zip(*pairs, strict=True)]
        lines.append(
            f"| {name} | {without[known].mean():.1f} | {with_features[known].mean():.1f} | "
            f"{mean:+.2f} | {low:+.2f} to {high:+.2f} | {', '.join(f'{d:+.2f}' for d in by_seed)} |"
        )
    return "\n".join(lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--realdata", type=click.Path(path_type=Path), required=True, help="See above.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Caches and runs.")
@click.option("--epochs", default=12)
@click.option("--seeds", default=3)
@click.option("--arm", "arms", multiple=True, type=click.Choice(list(ARMS)), help="Only these.")
def main(realdata: Path, work: Path, epochs: int, seeds: int, arms: tuple[str, ...]) -> None:
    """Make the caches, train all pairs, and print the table."""
    arms = arms or tuple(ARMS)
    work.mkdir(parents=True, exist_ok=True)
    make_caches(realdata, work)
    results = work / "scores.json"
    scores = json.loads(results.read_text()) if results.exists() else {}
    planned = [
        (ARMS[name].cache, side, seed)
        for seed in range(seeds)
        for name in arms
        for side in ARMS[name].sides
    ]
    val = Cache(work / "val.zarr")
    for number, (cache, side, seed) in enumerate(planned, 1):
        name = run_name(cache, side, seed)
        if name in scores:
            continue
        click.echo(f"{number}/{len(planned)} {name}", err=True)
        out, config = work / name, settings(realdata, epochs, seed, side)
        resume = (out / "run.json").exists()
        train(work / f"{cache}.zarr", out, config, device="cpu", resume=resume, progress=True)
        scores[name] = ious(out / "student_last.safetensors", val)
        results.write_text(json.dumps(scores, indent=1))
    click.echo(table(scores, arms, seeds))


if __name__ == "__main__":
    main()
