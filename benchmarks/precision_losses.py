"""How far does each precision of the cache move each loss, at the same weights?

    R=../shared/realdata
    .venv/bin/python benchmarks/precision_losses.py --images $R/coco_tiny/val2017 \\
        --coco $R/coco_tiny/annotations/instances_val2017.json --yolo $R/yolov9n_neck.onnx \\
        --tap /model.14/Concat_output_0 --teacher $R/teacher_isnet.onnx --size 320 --limit 16

A student is trained for one epoch from a float32 cache, which equals an online run bit for bit
(tests/test_online_equals_cached.py); its losses are then taken over the rows of a cache of each
precision. Logits are float16 in all but the float32 cache.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from kdcache.cache.reader import Cache
from kdcache.config import ExtractConfig, TrainConfig
from kdcache.deploy.evaluate import evaluate
from kdcache.precompute.dataset import coco_dataset
from kdcache.precompute.extract import extract
from kdcache.train.loop import train

PRECISIONS = ("float32", "float16", "int8", "int6", "int5", "int4")
LOSSES = ("kl", "mse", "bce", "dice", "feature_loss")
_path = click.Path(path_type=Path)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--images", type=_path, required=True)
@click.option("--coco", type=_path, required=True)
@click.option("--yolo", type=_path, required=True)
@click.option("--tap", required=True)
@click.option("--teacher", type=_path, required=True)
@click.option("--size", default=320)
@click.option("--limit", default=16, help="Images.")
def main(
    images: Path, coco: Path, yolo: Path, tap: str, teacher: Path, size: int, limit: int
) -> None:
    """Print a Markdown table for docs/log.md."""
    with tempfile.TemporaryDirectory() as folder:
        work, scores = Path(folder), {}
        for precision in PRECISIONS:
            settings = ExtractConfig(
                yolo_onnx_path=yolo,
                yolo_target_layer=tap,
                teacher_checkpoint=teacher,
                size=size,
                precision=precision,
            )
            cache = work / precision
            extract(settings, coco_dataset(images, coco), cache, device="cpu", limit=limit)
            if precision == "float32":
                config = TrainConfig(encoder_weights="random", epochs=1, learning_rate=1e-3)
                train(cache, work / "run", config, device="cpu")
            scores[precision] = evaluate(work / "run", Cache(cache), "train", "cpu").scores
            click.echo(f"{precision} done", err=True)
    click.echo(f"| loss | float32 | {' | '.join(PRECISIONS[1:])} |")
    click.echo("| --- |" + " ---: |" * len(PRECISIONS))
    for loss in LOSSES:
        exact, *others = (scores[p][loss] or 0.0 for p in PRECISIONS)
        moved = [f"{other / exact - 1:+.1e}" for other in others]
        click.echo(f"| {loss} | {exact:.6g} | {' | '.join(moved)} |")


if __name__ == "__main__":
    main()
