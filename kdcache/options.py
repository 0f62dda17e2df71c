"""Options that several commands share, each described once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Command = Callable[..., Any]

option = click.option

_MOST_WORKERS = 8  # more cores than that are for the models


def config_options(command: Command) -> Command:
    """Settings from a file or by name."""
    config = option("--config", metavar="NAME|FILE", help="Named config or TOML file.")
    assignments = option(
        "--set",
        "assignments",
        multiple=True,
        metavar="KEY=VALUE",
        help="Set any setting by its name.",
    )
    return config(assignments(command))


json_option = option("--json", "as_json", is_flag=True, help="Print JSON.")
device_option = option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
)
frozen_device_option = option(
    "--device",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "cpu", "cuda", "tensorrt"]),
    help="Where the frozen models run.",
)
cache_argument = click.argument("cache", type=click.Path(path_type=Path))
run_argument = click.argument("run", type=click.Path(path_type=Path))
path = click.Path(path_type=Path)


def input_options(command: Command) -> Command:
    """What is to be extracted, with which models, into which cache: of `plan` and `extract`."""
    options = [
        option("--images", type=path, help="Folder of images; needed."),
        option("--masks", type=path, help="Folder of masks, paired by stem."),
        option("--coco", type=path, help="COCO instances JSON (of persons; --set category=NAME)."),
        option(
            "--unlabelled", is_flag=True, help="There are no masks: distil from the models alone."
        ),
        option("--all-images", is_flag=True, help="COCO: also images without a person."),
        option("--yolo", "yolo_onnx_path", type=path, help="The frozen detector, an ONNX file."),
        option(
            "--teacher",
            "teacher_checkpoint",
            type=path,
            help="The frozen teacher: .pth, .ckpt, .safetensors or .onnx.",
        ),
        option(
            "--out", type=path, required=True, help="Cache to write, or to resume or append to."
        ),
        option("--logits-only", is_flag=True, help="Only the teacher: no --yolo, no features."),
        option("--features-only", is_flag=True, help="Only the detector: no --teacher, no logits."),
        option(
            "--tap",
            "yolo_target_layer",
            metavar="NAME",
            help="Tensor of the detector to store (layer 34).",
        ),
        option(
            "--yolo-input",
            type=click.Choice(["rgb01", "bgr01", "rgb255", "bgr255"]),
            help="Channel order and range the detector expects (rgb01).",
        ),
        option("--size", type=int, metavar="PX", help="Side of the model input (640)."),
        option(
            "--resize", type=click.Choice(["stretch", "letterbox"]), help="How images are fitted."
        ),
        option(
            "--precision",
            type=click.Choice(["float32", "float16", "int8", "int6", "int5", "int4"]),
            help="How features are stored (int8).",
        ),
        option(
            "--compression",
            type=click.Choice(["zstd", "lz4", "none"]),
            help="zstd is smallest, none reads fastest (zstd).",
        ),
        option("--split", default="train", show_default=True, type=click.Choice(["train", "val"])),
        option(
            "--val-fraction", type=float, metavar="F", help="Share of images put into val, by hash."
        ),
        option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N images."),
        option("--batch-size", type=click.IntRange(1), help="Images a model call (CPU 1, GPU 8)."),
        frozen_device_option,
        option(
            "--workers",
            type=click.IntRange(1),
            default=min(os.cpu_count() or 1, _MOST_WORKERS),
            show_default=f"the cores, at most {_MOST_WORKERS}",
            help="Threads that decode photos, and as many that compress rows.",
        ),
    ]
    for one in reversed(options):
        command = one(command)
    return command
