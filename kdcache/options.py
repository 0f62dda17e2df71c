"""What several commands share: options, each described once, examples, printing of results."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

Command = Callable[..., Any]

option = click.option

EXIT_FAILED, EXIT_SKIPPED = 1, 3

_MOST_WORKERS = 8  # more cores than that are for the models


def example(*lines: str) -> str:
    """The end of a command's help: lines to be pasted."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


def leads() -> bool:
    """Whether this is the process that speaks, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def with_logging_above_bars(command: Command) -> Command:
    """Log lines must not tear a progress bar."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        from tqdm.contrib.logging import logging_redirect_tqdm

        with logging_redirect_tqdm([logging.getLogger("kdcache")]):
            return command(*args, **kwargs)

    return wrapped


def show(report: Any, as_json: bool, as_text: Callable[[Any], str]) -> None:
    """Print a result for a person, or as JSON."""
    click.echo(as_json_text(report) if as_json else as_text(report))


def as_json_text(report: Any) -> str:
    """A mapping, a dataclass or a list of them as JSON."""
    import dataclasses

    plain = isinstance(report, Mapping | list)
    values = report if plain else dataclasses.asdict(report)
    return json.dumps(values, indent=1, default=str, ensure_ascii=False)


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


class _PlaceType(click.ParamType[Any]):
    """A path, or where `at_url` a URL too."""

    name = "path"

    def __init__(self, at_url: bool) -> None:
        self._at_url = at_url

    def convert(self, value: Any, param: click.Parameter | None, context: Any) -> Any:
        from kdcache.places import place_of

        if isinstance(value, str) and "://" in value and not self._at_url:
            self.fail(f"{value} is a URL; this has to be a local path", param, context)
        return place_of(value)


path, place = _PlaceType(at_url=False), _PlaceType(at_url=True)
cache_argument = click.argument("cache", type=place)


def _with(options: Sequence[Callable[[Command], Command]], command: Command) -> Command:
    """The options in the order in which help shows them."""
    for one in reversed(options):
        command = one(command)
    return command


def train_options(command: Command) -> Command:
    """What people set daily of a training: of `train` and `sweep`."""
    options = [
        option("--epochs", type=int, help="Passes over the training rows (50)."),
        option("--batch-size", type=int, help="Rows a step (4)."),
        option("--feature-weight", type=float, help="Weight of the feature loss (0.5)."),
        option(
            "--mixed-precision/--no-mixed-precision",
            default=None,
            help="Autocast the networks.",
        ),
        option("--seed", type=int, help="Seed of weights and order (0)."),
        option(
            "--encoder-weights",
            metavar="FILE|imagenet|random",
            help="The student encoder's weights at the start (imagenet: of the hub, or its cache).",
        ),
        device_option,
    ]
    return _with(options, command)


def precision_option(help_text: str) -> Callable[[Command], Command]:
    """How features are stored."""
    choice = click.Choice(["float32", "float16", "int8", "int6", "int5", "int4"])
    return option("--precision", type=choice, help=help_text)


def compression_option(help_text: str) -> Callable[[Command], Command]:
    """How arrays are compressed."""
    return option("--compression", type=click.Choice(["zstd", "lz4", "none"]), help=help_text)


def workers_option(help_text: str) -> Callable[[Command], Command]:
    """How many threads; as many as there are cores, but not too many."""
    return option(
        "--workers",
        type=click.IntRange(1),
        default=min(os.cpu_count() or 1, _MOST_WORKERS),
        show_default=f"the cores, at most {_MOST_WORKERS}",
        help=help_text,
    )


def input_options(command: Command) -> Command:
    """What is to be extracted, with which models, into which cache: of `plan` and `extract`."""
    options: list[Callable[[Command], Command]] = [
        option("--images", type=place, help="Folder of images; needed."),
        option("--masks", type=place, help="Folder of masks, paired by stem."),
        option("--coco", type=place, help="COCO instances JSON (of persons; --set category=NAME)."),
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
            "--out", type=place, required=True, help="Cache to write, or to resume or append to."
        ),
        option("--logits-only", is_flag=True, help="Only the teacher: no --yolo, no features."),
        option("--features-only", is_flag=True, help="Only the detector: no --teacher, no logits."),
        option(
            "--tap",
            "yolo_target_layer",
            multiple=True,
            metavar="NAME",
            help="Tensor of the detector to store (layer 34); repeatable.",
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
        precision_option("How features are stored (int8)."),
        compression_option("zstd is smallest, none reads fastest (zstd)."),
        option("--split", default="train", show_default=True, type=click.Choice(["train", "val"])),
        option(
            "--val-fraction", type=float, metavar="F", help="Share of images put into val, by hash."
        ),
        option("--views", type=int, metavar="K", help="Views of each training image (1)."),
        option(
            "--augment",
            metavar="light|heavy|FILE",
            help="How views but the first are made (light): a policy, or a TOML file of one.",
        ),
        option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N images."),
        option("--batch-size", type=click.IntRange(1), help="Images a model call (CPU 1, GPU 8)."),
        frozen_device_option,
        workers_option("Threads that decode photos, and as many that compress rows."),
    ]
    return _with(options, command)
