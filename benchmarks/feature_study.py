"""Do features, views, taps and attention make a better student? On real photos, resumable.

    .venv/bin/python benchmarks/feature_study.py --realdata ../shared/realdata --work DIR

Photos of people from coco_tiny: train2017 trains, val2017 scores. Student: lite0 with its ImageNet
weights; detector features: YOLOv9-N's P3 concat; teacher: ISNet; input 320. The two sides of an arm
(without and with the feature loss, or on all and on some of its positions) share seed, order and all
else. Their difference is taken on each validation photo (mean over the seeds) and resampled over the
photos. The last student is scored, not the best on the photos that score it.

As many views as epochs are fresh augmentation in each, as an online trainer makes it: the same pixels
go through the same models. So `--epochs 16` with the views arms compares a cache with that.

Run again after a stop: finished runs are kept, a started one goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
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
TAPS = (TAP, "/model.15/Concat_output_0", "/model.11/Concat_output_0")  # strides 8, 8 and 16
ENCODER = "tu-tf_efficientnet_lite0"
SIZE_PX = 320
LABELLED = 10
VIEWS = 16
RESAMPLES = 10_000

FEATURE_WEIGHT = 1.0
NO_TEACHER = {"kl_weight": 0.0, "mse_weight": 0.0}
FEW_LABELS = {"student_tap": "decoder", **NO_TEACHER}
WITH_FEATURES = FEW_LABELS | {"feature_weight": FEATURE_WEIGHT}
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
}
ARMS |= {
    f"the same, on {share:.0%} of the positions against all": Arm(
        "few",
        WITH_FEATURES,
        without={},
        beside={"feature_positions": round(POSITIONS * share)},
    )
    for share in (0.25, 0.05)
}
ARMS |= {
    f"{views} views against 1": Arm(
        "views", {"feature_weight": 0.0}, without={"views": 1}, beside={"views": views}
    )
    for views in (2, 4, VIEWS)
}
_ONE_TAP = {"feature_taps": TAPS[:1]}
ARMS |= {
    "three taps against one": Arm("few_taps", WITH_FEATURES, without=_ONE_TAP, beside={}),
    "three taps, learned against fixed weights": Arm(
        "few_taps",
        WITH_FEATURES,
        without={},
        beside={"layer_weights": "learned", "layer_lr_factor": 10.0},
    ),
    "standardised targets against plain ones": Arm(
        "few_taps",
        WITH_FEATURES | _ONE_TAP,
        without={"standardise_features": False},
        beside={},
    ),
} | {
    f"attention {kind} against none": Arm(
        "few_taps", WITH_FEATURES | _ONE_TAP, without={}, beside={"feature_attention": kind}
    )
    for kind in ("mask", "teacher_uncertainty", "feature_energy")
}


def make_caches(realdata: Path, work: Path, wanted: Collection[str]) -> None:
    """`train`, `views` and `val` hold all people photos; in `few` and `few_taps` all but the first ten
    lack their mask."""
    one_tap = ExtractConfig(
        yolo_onnx_path=realdata / "yolov9n_neck.onnx",
        teacher_checkpoint=realdata / "teacher_isnet.onnx",
        yolo_target_layer=(TAP,),
        size=SIZE_PX,
        shard_rows=8,
    )
    three_taps = one_tap.model_copy(update={"yolo_target_layer": TAPS})
    coco = realdata / "coco_tiny"

    def people(split: str) -> Dataset:
        annotations = coco / f"annotations/instances_{split}2017.json"
        return coco_dataset(coco / f"{split}2017", annotations)

    views = three_taps.model_copy(update={"views": VIEWS, "augment": "heavy"})
    for name, split, settings in (
        ("train", "train", one_tap),
        ("views", "train", views),
        ("val", "val", one_tap),
    ):
        if name in (*wanted, "val"):
            cache = work / f"{name}.zarr"
            extract(settings, people(split), cache, split=split, device="cpu", progress=True)
    samples = people("train").samples
    rest = work / "unlabelled"
    rest.mkdir(exist_ok=True)
    for sample in samples[LABELLED:]:
        link = rest / sample.sample_id
        if not link.exists():
            link.symlink_to(Path(str(sample.image_path)).resolve())
    labelled = Dataset(images=people("train").images, samples=samples[:LABELLED])
    for name, settings in (("few", one_tap), ("few_taps", three_taps)):
        if name in wanted:
            for dataset in (labelled, unlabelled_dataset(rest)):
                extract(settings, dataset, work / f"{name}.zarr", device="cpu", progress=True)


def settings(realdata: Path, epochs: int, seed: int, changes: dict[str, Any]) -> TrainConfig:
    """Of one run."""
    common: dict[str, Any] = {
        "student_encoder": ENCODER,
        "encoder_weights": str(realdata / "tf_efficientnet_lite0_imagenet.safetensors"),
        "epochs": epochs,
        "learning_rate": 1e-3,
        "min_lr": 1e-5,
        "standardise_features": True,
        "seed": seed,
    }
    return TrainConfig(**common | changes)


def run_name(cache: str, changes: dict[str, Any], epochs: int, seed: int) -> str:
    """A folder's name; arms that share a side share its run."""
    words = "-".join(f"{key}_{_word(value)}" for key, value in sorted(changes.items()))
    return f"{cache}-{words}-epochs_{epochs}-seed_{seed}"


def _word(value: Any) -> str:
    return f"{len(value)}" if isinstance(value, tuple) else str(value)


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


def table(scores: dict[str, list[float]], arms: Sequence[str], epochs: int, seeds: int) -> str:
    """Markdown for docs/log.md: percent points of mIoU."""
    lines = ["| arm | without | with | difference | 95 % | by seed |",
             "| --- | ---: | ---: | ---: | ---: | --- |"]  # fmt: skip
    for name in arms:
        arm = ARMS[name]
        pairs = [
            [np.array(scores[run_name(arm.cache, side, epochs, seed)]) for seed in range(seeds)]
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
    make_caches(realdata, work, {ARMS[name].cache for name in arms})
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
        name = run_name(cache, side, epochs, seed)
        if name in scores:
            continue
        click.echo(f"{number}/{len(planned)} {name}", err=True)
        out, config = work / name, settings(realdata, epochs, seed, side)
        resume = (out / "run.json").exists()
        train(work / f"{cache}.zarr", out, config, device="cpu", resume=resume, progress=True)
        scores[name] = ious(out / "student_last.safetensors", val)
        results.write_text(json.dumps(scores, indent=1))
    click.echo(table(scores, arms, epochs, seeds))


if __name__ == "__main__":
    main()
