"""How much faster is an epoch from the cache than one that runs both frozen networks in every step?

    .venv/bin/python benchmarks/online_vs_cached.py [--size 128 --images 4 --batch-size 2 --steps 2]

Needs no download: the detector has random weights and YOLOv9-E's cost up to the tap, the teacher is
the real EfficientNet-B3 UNet with random weights, the scenes are drawn. CPU only, float32. Values
decide no time here, but they decide how well codes compress: take bytes per row from real models.

Whole epochs alternate, cached then online, and medians are compared, so that a drifting machine
slows both. Steps must not alternate: the loader's threads would decode the next batches while the
frozen networks run, and the cached step would look free of its own decoding. Each epoch starts with
an empty loader, and these epochs are short, so the ratio is a little lower than in a long run. The
rows of so small a cache lie in memory: a slow disk is not part of this.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper, shape_inference

from kdcache.cache.format import RowKey
from kdcache.cache.info import describe
from kdcache.cache.reader import Cache
from kdcache.config import ExtractConfig, TrainConfig, validated
from kdcache.errors import KdcacheError
from kdcache.precompute.dataset import Sample, folder_dataset
from kdcache.precompute.extract import _decode, _load_models, extract
from kdcache.precompute.teacher import Teacher
from kdcache.precompute.yolo import Yolo
from kdcache.standins import TAP, _save, _tensor, save_scenes
from kdcache.train import Batch, batches
from kdcache.train.loop import _build, _step
from kdcache.train.run_folder import State
from kdcache.train.student import _unet, normalised

SCENE_SIZE_PX = (480, 640)  # (height, width): COCO's usual, unlike the input, so it is resized
TEACHER_ENCODER = "timm-efficientnet-b3"

# Var(weight)·fan_in that keeps the scale of activations through SiLU: 1/E[silu(x)²], x ~ N(0, 1).
_SILU_GAIN = 2.8


class _Graph:
    """Nodes and random weights of a detector, one tensor name after the other."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights = [numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales")]
        self._rng = np.random.default_rng(seed)
        self._widths = {"images": 3}

    def conv(self, x: str, width: int, kernel: int, stride: int = 1) -> str:
        """Conv with bias, then SiLU, as a detector's export holds them once BatchNorm is folded."""
        fan_in = self._widths[x] * kernel**2
        shape = (width, self._widths[x], kernel, kernel)
        weight = self._rng.standard_normal(shape, np.float32) * math.sqrt(_SILU_GAIN / fan_in)
        bias = self._rng.standard_normal(width, np.float32) * 0.1
        names = [f"weight_{len(self.weights)}", f"bias_{len(self.weights)}"]
        for name, values in zip(names, (weight, bias), strict=True):
            self.weights.append(numpy_helper.from_array(values.astype(np.float32), name))
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

    def upsample(self, x: str) -> str:
        """Nearest, ×2."""
        return self._node("Resize", [x, "", "scales"], self._widths[x], mode="nearest")

    def concat(self, x: str, y: str, name: str | None = None) -> str:
        return self._node("Concat", [x, y], self._widths[x] + self._widths[y], name, axis=1)

    def _node(
        self, kind: str, inputs: list[str], width: int, name: str | None = None, **attributes: Any
    ) -> str:
        output = name or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        self._widths[output] = width
        return output


def save_detector(path: Path) -> None:
    """Write `images` (N, 3, H, W) RGB in [0, 1] → the tap (N, 1024, H/8, W/8), YOLOv9-E in cost.

    Strides 2 to 32 and a top-down neck; the counts of blocks were chosen for 34 M parameters and
    150 GFLOPs at 640, which `cost` verifies.
    """
    graph = _Graph()
    stride_4 = graph.blocks(graph.conv(graph.conv("images", 64, 3, 2), 128, 3, 2), 2)
    stride_8 = graph.blocks(graph.conv(stride_4, 256, 3, 2), 6)
    stride_16 = graph.blocks(graph.conv(stride_8, 512, 3, 2), 5)
    stride_32 = graph.blocks(graph.conv(stride_16, 512, 3, 2), 2)
    joined = graph.concat(graph.upsample(stride_32), stride_16)
    neck = graph.blocks(graph.conv(joined, 512, 1), 4)
    graph.concat(graph.upsample(neck), graph.conv(stride_8, 512, 1), TAP)
    inputs, outputs = _tensor("images", ["N", 3, "H", "W"]), _tensor(TAP, ["N", 1024, "h", "w"])
    _save(path, "detector", graph.nodes, [inputs], [outputs], graph.weights)


def cost(path: Path, size_px: int) -> tuple[int, int]:
    """Parameters, and FLOPs (2 · multiply-adds of the convolutions) of one image, from the file."""
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


def save_teacher(path: Path) -> None:
    """Write a random teacher in the form of a Lightning checkpoint."""
    torch.manual_seed(0)
    state = _unet(TEACHER_ENCODER).state_dict()
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


def cached_epoch(state: State, cache: Cache, config: TrainConfig, clock: _Clock) -> None:
    """What `kdcache train` does in an epoch; unshuffled, so that the order is the online one."""
    source = batches(cache, config.batch_size, "cpu", taps=[TAP], shuffle=False)
    while True:
        with clock.part("data"):
            batch = next(source, None)
        if batch is None:
            break
        with clock.part("student"):
            _step(state, batch, config, config.temperature, "cached")


def online_epoch(
    state: State, online: _Online, samples: Sequence[Sample], config: TrainConfig, clock: _Clock
) -> None:
    """The same steps with both frozen networks in each."""
    for start in range(0, len(samples), config.batch_size):
        batch = online.batch(samples[start : start + config.batch_size], clock)
        with clock.part("student"):
            _step(state, batch, config, config.temperature, "online")


class _Online:
    """Batches made from the image files by the frozen models."""

    def __init__(self, yolo: Yolo, teacher: Teacher, settings: ExtractConfig) -> None:
        self._yolo, self._teacher, self._settings = yolo, teacher, settings

    def batch(self, samples: Sequence[Sample], clock: _Clock) -> Batch:
        with clock.part("data"):
            keys = [RowKey("train", sample.sample_id, 0) for sample in samples]
            pairs = zip(keys, samples, strict=True)
            rows = [_decode(key, sample, self._settings) for key, sample in pairs]
            images_NHWC = np.stack([row.image for row in rows])
            masks_NHW = np.stack([row.mask for row in rows])
            pixels = normalised(torch.from_numpy(images_NHWC))
        with clock.part("detector"):
            features = torch.from_numpy(self._yolo.features(images_NHWC))
        with clock.part("teacher"):
            logits = torch.from_numpy(self._teacher.logits(images_NHWC))[:, None]
        mask = torch.from_numpy(masks_NHW)[:, None]
        return Batch(image=pixels, mask=mask, logits=logits, features={TAP: features}, keys=keys)


def measure(folder: Path, size_px: int, images: int, batch_size: int, steps: int) -> dict[str, Any]:
    """Everything the table shows. Times are seconds per image, medians over the epochs."""
    settings = validated(
        ExtractConfig,
        {
            "yolo_onnx_path": folder / "detector.onnx",
            "teacher_checkpoint": folder / "teacher.ckpt",
            "teacher_encoder": TEACHER_ENCODER,
            "size": size_px,
        },
    )
    _say("making the models and the scenes")
    save_detector(folder / "detector.onnx")
    save_teacher(folder / "teacher.ckpt")
    save_scenes(folder / "scenes", images, *SCENE_SIZE_PX)
    dataset = folder_dataset(folder / "scenes/images", folder / "scenes/masks")
    parameters, flops = cost(folder / "detector.onnx", size_px)

    _say(f"extracting {images} images")
    extraction = extract(settings, dataset, folder / "cache.zarr", device="cpu")
    # A dataset loads the models once, so their loading is taken out of the time an image needs.
    # It includes one trial image through each, here as in `extract`.
    started = time.perf_counter()
    online = _Online(*_load_models(settings, "cpu"), settings)
    loading_s = time.perf_counter() - started

    cache = Cache(folder / "cache.zarr")
    config = TrainConfig(encoder_weights="random", batch_size=batch_size)
    state = _build(config, cache, cache.tap(TAP), "cpu")
    state.student.train()
    _warm_up(state, cache, online, dataset.samples, config)
    epochs = -(-steps // -(-images // batch_size))
    clocks: dict[str, list[_Clock]] = {"cached": [], "online": []}
    for epoch in range(epochs):
        _say(f"epoch {epoch + 1}/{epochs}, cached and online")
        for kind in clocks.values():
            kind.append(_Clock())
        cached_epoch(state, cache, config, clocks["cached"][-1])
        online_epoch(state, online, dataset.samples, config, clocks["online"][-1])

    def per_image(kind: str, part: str) -> float:
        return median(clock.seconds[part] for clock in clocks[kind]) / images

    totals = {
        kind: median(sum(clock.seconds.values()) for clock in found) / images
        for kind, found in clocks.items()
    }
    extraction_s = (extraction.seconds - loading_s) / images
    saved_s = totals["online"] - totals["cached"]
    return {
        "detector_parameters": parameters,
        "detector_flops": flops,
        "epochs_of_each": epochs,
        "detector_s": per_image("online", "detector"),
        "teacher_s": per_image("online", "teacher"),
        "student_step_online_s": per_image("online", "student"),
        "student_step_cached_s": per_image("cached", "student"),
        "data_wait_online_s": per_image("online", "data"),
        "data_wait_cached_s": per_image("cached", "data"),
        "online_s": totals["online"],
        "cached_s": totals["cached"],
        "online_over_cached": totals["online"] / totals["cached"],
        "extraction_s": extraction_s,
        "model_loading_s": loading_s,
        "cache_bytes": describe(cache)["bytes_per_row"],
        "break_even_epochs": extraction_s / saved_s if saved_s > 0 else None,
    }


def _warm_up(
    state: State, cache: Cache, online: _Online, samples: Sequence[Sample], config: TrainConfig
) -> None:
    """One step of each kind, which also shows that both kinds are fed the same."""
    _say("warming up")
    cached = next(batches(cache, config.batch_size, "cpu", taps=[TAP], shuffle=False))
    computed = online.batch(samples[: config.batch_size], _Clock())
    for batch in (cached, computed):
        _step(state, batch, config, config.temperature, "warm-up")
    difference = (cached.features[TAP] - computed.features[TAP]).square().mean()
    same = torch.equal(cached.image, computed.image) and torch.equal(cached.mask, computed.mask)
    if not same or difference > 1e-2 * computed.features[TAP].var():
        raise KdcacheError("cached and online batches differ; their times cannot be compared")


def _header(size_px: int, images: int, batch_size: int) -> dict[str, str]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": date.today().isoformat(),
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "size_px": str(size_px),
        "images": str(images),
        "batch_size": str(batch_size),
    }


def _table(found: dict[str, Any]) -> str:
    """Markdown, to be pasted into docs/log.md."""
    ratio = found["online_over_cached"]
    never = found["break_even_epochs"] is None
    rows = [
        ("s per image", "online", "cached", "online / cached"),
        ("---", "---:", "---:", "---:"),
        _times(found, "data wait", "data_wait_online_s", "data_wait_cached_s"),
        ("detector", f"{found['detector_s']:.3f}", "", ""),
        ("teacher", f"{found['teacher_s']:.3f}", "", ""),
        _times(found, "student step", "student_step_online_s", "student_step_cached_s"),
        ("step, total", f"{found['online_s']:.3f}", f"{found['cached_s']:.3f}", f"**{ratio:.2f}**"),
        ("extraction, once", "", f"{found['extraction_s']:.3f}", ""),
        ("bytes per image in the cache", "", f"{found['cache_bytes']:,.0f}", ""),
        (
            "epochs until extraction has paid",
            "",
            "never" if never else f"{found['break_even_epochs']:.2f}",
            "",
        ),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _times(found: dict[str, Any], title: str, online: str, cached: str) -> tuple[str, ...]:
    ratio = f"{found[online] / found[cached]:.2f}"
    return title, f"{found[online]:.3f}", f"{found[cached]:.3f}", ratio


def _say(text: str) -> None:
    click.echo(f"{text} …", err=True)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--size", default=640, help="Side of the square model input, px.")
@click.option("--images", type=click.IntRange(min=1), default=8, help="Images of an epoch.")
@click.option("--batch-size", type=click.IntRange(min=1), default=4, help="Images a step.")
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=4,
    help="Timed steps of each kind, rounded up to whole epochs.",
)
@click.option(
    "--keep",
    type=click.Path(path_type=Path),
    help="Make everything in this new folder and keep it.",
)
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write the numbers there too."
)
def main(
    size: int, images: int, batch_size: int, steps: int, keep: Path | None, json_path: Path | None
) -> None:
    """Time epochs from a cache against epochs that run both frozen networks in every step.

    Example: python benchmarks/online_vs_cached.py --size 128 --images 4 --batch-size 2 --steps 2
    """
    if keep is not None and keep.exists() and any(keep.iterdir()):
        raise click.UsageError(f"--keep {keep} is not empty; an old cache there would be resumed")
    with contextlib.ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            found = measure(folder, size, images, batch_size, steps)
        except KdcacheError as error:
            raise click.ClickException(str(error)) from error
    header = _header(size, images, batch_size)
    click.echo(", ".join(f"{name} {value}" for name, value in header.items()))
    click.echo(
        f"detector up to the tap: {found['detector_parameters'] / 1e6:.1f} M parameters, "
        f"{found['detector_flops'] / 1e9:.1f} GFLOPs at {size}×{size}\n"
    )
    click.echo(_table(found))
    if json_path is not None:
        json_path.write_text(json.dumps(header | found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
