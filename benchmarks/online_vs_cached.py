"""How much faster is an epoch from the cache than one that runs both frozen networks in every step?

    .venv/bin/python benchmarks/online_vs_cached.py [--size 128 --images 4 --batch-size 2 --steps 2]

Needs no download: the detector has random weights and YOLOv9-E's cost up to the tap, the teacher is
the real EfficientNet-B3 UNet with random weights, the scenes are drawn. CPU only, float32. Bytes per
row of random weights are not those of real models.

Whole epochs alternate, cached then online, and medians are compared, so that a drifting machine
slows both. Steps must not alternate: the loader's threads would decode the next batches while the
frozen networks run, and the cached step would look free of its own decoding. Each epoch starts with
an empty loader, and these epochs are short, so the ratio is a little lower than in a long run. So
small a cache lies in memory: a slow disk is not part of this.

A busy machine distorts more than it slows: OpenMP's threads spin for one another at the end of every
operator, and one other busy process on 2 cores made the teacher 2 to 24 times slower at 128 px. The
header tells the load at the start; OMP_WAIT_POLICY=passive takes the spinning away.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import click
import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper, shape_inference

from kdcache.allocator import keep_freed_memory
from kdcache.cache.format import RowKey
from kdcache.cache.info import describe
from kdcache.cache.reader import Cache
from kdcache.config import ExtractConfig, TrainConfig, validated
from kdcache.errors import KdcacheError
from kdcache.pixels import normalised
from kdcache.precompute.dataset import Sample, folder_dataset
from kdcache.precompute.extract import extract
from kdcache.precompute.job import open_teacher, open_yolo
from kdcache.precompute.sources import Tally, prepare
from kdcache.precompute.teacher import Teacher
from kdcache.precompute.yolo import Yolo
from kdcache.standins import TAP, _save, _tensor, save_scenes
from kdcache.train import Batch, batches
from kdcache.train.parallel import Processes
from kdcache.train.step import Trainee, take_step, untrained_state
from kdcache.train.student import Projection, _unet, build_student

DETECTOR, TEACHER = "detector.onnx", "teacher.ckpt"
SCENE_SIZE_PX = (480, 640)  # (height, width): COCO's usual, unlike the input, so it is resized

# Var(weight)·fan_in that keeps the scale of activations through SiLU: 1/E[silu(x)²], x ~ N(0, 1).
_SILU_GAIN = 2.8


class _Graph:
    """Nodes and random weights of a detector; methods take and return names of tensors."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights = [numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales")]
        self._rng = np.random.default_rng(0)
        self._widths = {"images": 3}

    def conv(self, x: str, width: int, kernel: int, stride: int = 1) -> str:
        """Conv with bias, then SiLU, as exports hold them once BatchNorm is folded."""
        shape = (width, self._widths[x], kernel, kernel)
        weight = self._rng.standard_normal(shape, np.float32)
        weight *= np.float32(math.sqrt(_SILU_GAIN / math.prod(shape[1:])))
        bias = self._rng.standard_normal(width, np.float32) * np.float32(0.1)
        names = [f"weight_{len(self.nodes)}", f"bias_{len(self.nodes)}"]
        self.weights += map(numpy_helper.from_array, (weight, bias), names)
        pads, strides = [kernel // 2] * 4, [stride] * 2
        linear = self._node("Conv", [x, *names], width, pads=pads, strides=strides)
        gate = self._node("Sigmoid", [linear], width)
        return self._node("Mul", [linear, gate], width)

    def blocks(self, x: str, count: int) -> str:
        """Residual blocks of two 3×3 convolutions through half the width."""
        width = self._widths[x]
        for _ in range(count):
            branch = self.conv(self.conv(x, width // 2, 3), width, 3)
            x = self._node("Add", [x, branch], width)
        return x

    def upsampled_beside(self, coarse: str, fine: str, name: str | None = None) -> str:
        """Concat(nearest ×2 of `coarse`, `fine`)."""
        width = self._widths[coarse]
        upsampled = self._node("Resize", [coarse, "", "scales"], width, mode="nearest")
        inputs = [upsampled, fine]
        return self._node("Concat", inputs, width + self._widths[fine], name, axis=1)

    def _node(
        self, kind: str, inputs: list[str], width: int, name: str | None = None, **attributes: Any
    ) -> str:
        output = name or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        self._widths[output] = width
        return output


def save_detector(path: Path) -> None:
    """Write `images` (N, 3, H, W) RGB in [0, 1] → the tap (N, 1024, H/8, W/8).

    Strides 2 to 32 and a top-down neck; the numbers of blocks were chosen for YOLOv9-E's 34 M
    parameters and 150 GFLOPs at 640, which `cost` counts in the file.
    """
    graph = _Graph()
    stride_4 = graph.blocks(graph.conv(graph.conv("images", 64, 3, 2), 128, 3, 2), 2)
    stride_8 = graph.blocks(graph.conv(stride_4, 256, 3, 2), 6)
    stride_16 = graph.blocks(graph.conv(stride_8, 512, 3, 2), 5)
    stride_32 = graph.blocks(graph.conv(stride_16, 512, 3, 2), 2)
    neck = graph.blocks(graph.conv(graph.upsampled_beside(stride_32, stride_16), 512, 1), 4)
    graph.upsampled_beside(neck, graph.conv(stride_8, 512, 1), TAP)
    inputs, outputs = _tensor("images", ["N", 3, "H", "W"]), _tensor(TAP, ["N", 1024, "h", "w"])
    _save(path, "detector", graph.nodes, [inputs], [outputs], graph.weights)


def cost(path: Path, size_px: int) -> tuple[int, int]:
    """Parameters, and FLOPs of one image (2 · multiply-adds of the convolutions)."""
    model = onnx.load(path)
    for axis, size in enumerate((1, 3, size_px, size_px)):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = size
    weights = {weight.name: math.prod(weight.dims) for weight in model.graph.initializer}
    inferred = {value.name: value for value in shape_inference.infer_shapes(model).graph.value_info}
    flops = 0
    for node in model.graph.node:
        if node.op_type == "Conv":
            *_, height, width = inferred[node.output[0]].type.tensor_type.shape.dim
            flops += 2 * weights[node.input[1]] * height.dim_value * width.dim_value
    return sum(weights.values()) - weights["scales"], flops


def save_teacher(path: Path, encoder: str) -> None:
    """Write a random teacher in the form of a Lightning checkpoint."""
    torch.manual_seed(0)
    state = _unet(encoder).state_dict()
    torch.save({"state_dict": {f"model.{key}": value for key, value in state.items()}}, path)


class _Clock:
    """Seconds spent in each named part."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - started


def online_batches(
    yolo: Yolo,
    teacher: Teacher,
    samples: Sequence[Sample],
    settings: ExtractConfig,
    batch_size: int,
    clock: _Clock,
) -> Iterator[Batch]:
    """The epoch that `batches` reads from the cache, made from the image files."""
    for start in range(0, len(samples), batch_size):
        chosen = samples[start : start + batch_size]
        with clock.part("data"):
            todo = [(RowKey("train", sample.sample_id, 0), sample) for sample in chosen]
            tally = Tally(strict=True)
            rows = list(prepare(todo, settings.size, settings.resize, 2, tally))
            images_NHWC = np.stack([row.image for row in rows])
            masks_NHW = np.stack([row.mask for row in rows])
            pixels = normalised(torch.from_numpy(images_NHWC))
        with clock.part("detector"):
            features = torch.from_numpy(yolo.features(images_NHWC))
        with clock.part("teacher"):
            logits = torch.from_numpy(teacher.logits(images_NHWC))[:, None]
        mask = torch.from_numpy(masks_NHW)[:, None]
        yield Batch(
            image=pixels,
            mask=mask,
            logits=logits,
            features={TAP: features},
            keys=[row.key for row in rows],
        )


def measure(
    folder: Path, settings: ExtractConfig, config: TrainConfig, images: int, steps: int
) -> dict[str, Any]:
    """What the table shows; times are seconds per image, medians over the epochs."""
    _say("making the models and the scenes")
    save_detector(folder / DETECTOR)
    save_teacher(folder / TEACHER, settings.teacher_encoder)
    save_scenes(folder / "scenes", images, *SCENE_SIZE_PX)
    dataset = folder_dataset(folder / "scenes/images", folder / "scenes/masks")
    samples, size = dataset.samples, config.batch_size
    yolo = open_yolo(settings, settings.yolo_target_layer, "cpu", settings.size)
    teacher = open_teacher(settings, "cpu", settings.size)

    _say(f"extracting {images} images")
    # With models already loaded, as loading is paid once for a dataset of any size.
    with mock.patch("kdcache.precompute.job._load_models", return_value=(yolo, teacher)):
        extraction = extract(settings, dataset, folder / "cache.zarr", device="cpu")
    cache = Cache(folder / "cache.zarr")
    torch.manual_seed(config.seed)
    student = build_student(config.student_encoder, "random")
    channels = cache.tap(TAP).shape[0]
    projection = Projection(student.tap_channels, config.projection_hidden_dim, channels)
    state = untrained_state(student, projection, config, "cpu")
    model = Trainee(student, projection).train()

    def step(batch: Batch) -> None:
        take_step(model, state, [batch], config, config.temperature, Processes())

    def source(kind: str, clock: _Clock) -> Iterator[Batch]:
        if kind == "online":
            return online_batches(yolo, teacher, samples, settings, size, clock)
        return batches(cache, size, "cpu", taps=[TAP], shuffle=False)  # in the online order

    _say("warming up")
    first = [next(source(kind, _Clock())) for kind in ("cached", "online")]
    _refuse_different(*first)
    for batch in first:
        step(batch)
    clocks: dict[str, list[_Clock]] = {"cached": [], "online": []}
    epochs = math.ceil(steps / math.ceil(images / size))
    for epoch in range(epochs):
        for kind, finished in clocks.items():
            _say(f"epoch {epoch + 1}/{epochs}, {kind}")
            finished.append(clock := _Clock())
            with clock.part("total"):
                for batch in source(kind, clock):
                    with clock.part("student"):
                        step(batch)
    seconds = {
        f"{part}_{kind}_s": median(clock.seconds[part] for clock in finished) / images
        for kind, finished in clocks.items()
        for part in finished[0].seconds
    }
    # The loader keeps no clock: an epoch waits for it whenever it is not in a step.
    seconds["data_cached_s"] = seconds["total_cached_s"] - seconds["student_cached_s"]
    saved_s = seconds["total_online_s"] - seconds["total_cached_s"]
    parameters, flops = cost(folder / DETECTOR, settings.size)
    return {
        "detector_parameters": parameters,
        "detector_flops": flops,
        "epochs": epochs,
        **seconds,
        "online_over_cached": seconds["total_online_s"] / seconds["total_cached_s"],
        # without the first look: four to eight photos nine times, of whatever number there is
        "extraction_s": 1 / extraction.images_per_s,
        "cache_bytes": describe(cache)["bytes_per_row"],
        "break_even_epochs": 1 / extraction.images_per_s / saved_s if saved_s > 0 else None,
    }


def _refuse_different(cached: Batch, online: Batch) -> None:
    """Times of steps on different data must not be compared."""
    same = torch.equal(cached.image, online.image) and torch.equal(cached.mask, online.mask)
    pairs = ((cached.logits, online.logits), (cached.features[TAP], online.features[TAP]))
    for x, y in pairs:
        same = same and x is not None and y is not None and _close(x, y)
    if not same:
        raise KdcacheError("the first cached and online batches differ")


def _close(x: torch.Tensor, y: torch.Tensor) -> bool:
    return bool((x - y).square().mean() <= 1e-3 * y.var())


def _header(settings: ExtractConfig, config: TrainConfig, images: int) -> dict[str, str | int]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": date.today().isoformat(),
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "size_px": settings.size,
        "images": images,
        "batch_size": config.batch_size,
    }


def _table(found: dict[str, Any]) -> str:
    """Markdown, to be pasted into docs/log.md."""
    rows = ["| per image | online | cached | online / cached |", "| --- | ---: | ---: | ---: |"]
    titles = {"data": "data wait", "student": "student step", "total": "step, total"}
    for part in ("data", "detector", "teacher", "student", "total"):
        pair = [found.get(f"{part}_{kind}_s") for kind in ("online", "cached")]
        shown = [f"{value:.3f} s" if value is not None else "" for value in pair]
        ratio = f"{pair[0] / pair[1]:.2f}" if pair[0] and pair[1] else ""
        rows.append(f"| {' | '.join([titles.get(part, part), *shown, ratio])} |")
    rows.append(f"| extraction, once | | {found['extraction_s']:.3f} s | |")
    rows.append(f"| bytes in the cache | | {found['cache_bytes']:,.0f} | |")
    epochs = found["break_even_epochs"]
    rows.append(f"| break-even, epochs | | {f'{epochs:.2f}' if epochs else 'never'} | |")
    return "\n".join(rows)


def _say(text: str) -> None:
    click.echo(f"{text} …", err=True)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--size", default=640, help="Side of the square model input, px.")
@click.option("--images", type=click.IntRange(1), default=8, help="Images of an epoch.")
@click.option("--batch-size", type=click.IntRange(1), default=4, help="Images a step.")
@click.option("--steps", type=click.IntRange(1), default=4, help="Steps of each kind, in epochs.")
@click.option("--keep", type=click.Path(path_type=Path), help="New folder for files to be kept.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="File for the numbers.")
def main(
    size: int, images: int, batch_size: int, steps: int, keep: Path | None, json_path: Path | None
) -> None:
    """Time epochs from a cache against epochs that run both frozen networks in every step.

    Example: python benchmarks/online_vs_cached.py --size 128 --images 4 --batch-size 2 --steps 2
    """
    keep_freed_memory()  # as the command does; both kinds of epochs gain by it
    if keep is not None and keep.exists() and any(keep.iterdir()):
        raise click.UsageError(f"--keep {keep} is not empty; a cache in it would be resumed")
    with contextlib.ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        models = {"yolo_onnx_path": folder / DETECTOR, "teacher_checkpoint": folder / TEACHER}
        config = TrainConfig(encoder_weights="random", batch_size=batch_size)
        try:
            settings = validated(ExtractConfig, {**models, "size": size})
            header = _header(settings, config, images)
            found = measure(folder, settings, config, images, steps)
        except KdcacheError as error:
            raise click.ClickException(str(error)) from error
    click.echo(", ".join(f"{name} {value}" for name, value in header.items()))
    parameters, flops = found["detector_parameters"], found["detector_flops"]
    click.echo(f"detector: {parameters / 1e6:.1f} M parameters, {flops / 1e9:.1f} GFLOPs\n")
    click.echo(_table(found))
    if json_path is not None:
        json_path.write_text(json.dumps(header | found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
