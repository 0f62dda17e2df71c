"""Stand-ins for the demo and the tests: true in shape and structure, random or hand-made in content.

The detector is a small ONNX graph with random convolutions whose tap has the real tap's name and
form, Concat(Upsample×2(512 channels), 512 channels) at stride 8, inside the graph. The teacher is
a known linear function of the pixels. Scenes are drawn people on drawn backgrounds.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, ValueInfoProto, checker, helper, numpy_helper, save
from PIL import Image, ImageDraw, ImageFilter

from kdcache.imaging import IMAGENET_MEAN, IMAGENET_STD

TAP = "segmentation_model_34_Concat_output_0"

# The teacher's logit at an RGB pixel in [0, 1]: warm colours are person, cold ones are not.
TEACHER_RGB_WEIGHT = (14.0, -2.0, -14.0)
TEACHER_BIAS = -2.5
TEACHER_BLUR_PX = 5

# An opset and IR version that every supported ONNX Runtime reads.
_OPSET, _IR = 17, 8


def save_detector(path: Path, channels: int = 512, seed: int = 0) -> None:
    """Write the stand-in detector: `images` (N, 3, H, W) RGB in [0, 1] → `detections`.

    Its tap gives (N, 2·channels, H/8, W/8); the first half repeats each value in 2×2 blocks.
    """
    rng = np.random.default_rng(seed)
    widths = [3, 16, 32, channels, channels]
    nodes, weights, name = [], [], "images"
    for level, (width_in, width_out) in enumerate(itertools.pairwise(widths)):
        scale = np.sqrt(2 / (9 * width_in))
        weight = rng.normal(0, scale, (width_out, width_in, 3, 3)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"weight_{level}"))
        inputs = [name, f"weight_{level}"]
        nodes.append(
            helper.make_node("Conv", inputs, [f"conv_{level}"], strides=[2, 2], pads=[1] * 4)
        )
        nodes.append(helper.make_node("Relu", [f"conv_{level}"], [f"relu_{level}"]))
        name = f"relu_{level}"
    scales = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales")
    head = rng.normal(0, 0.01, (4, 2 * channels, 1, 1)).astype(np.float32)
    nodes += [
        helper.make_node("Resize", ["relu_3", "", "scales"], ["upsampled"], mode="nearest"),
        helper.make_node("Concat", ["upsampled", "relu_2"], [TAP], axis=1),
        helper.make_node("Conv", [TAP, "head"], ["detections"]),
    ]
    weights += [scales, numpy_helper.from_array(head, "head")]
    outputs = [_tensor("detections", ["N", 4, "h", "w"])]
    _save(path, "detector", nodes, [_tensor("images", ["N", 3, "H", "W"])], outputs, weights)


def save_teacher(path: Path, bias: float = TEACHER_BIAS) -> None:
    """Write the stand-in teacher: ImageNet-normalised `input` (N, 3, H, W) → `logits` (N, 1, H, W).

    The logit is the mean of w·rgb + b over a 5×5 neighbourhood: exact to check, a little soft
    at edges as real teachers are.
    """
    mean, std = np.asarray(IMAGENET_MEAN), np.asarray(IMAGENET_STD)
    weight = np.asarray(TEACHER_RGB_WEIGHT)
    kernel = (weight * std).astype(np.float32).reshape(1, 3, 1, 1)
    offset = np.array([bias + float(weight @ mean)], np.float32)
    nodes = [
        helper.make_node("Conv", ["input", "kernel", "bias"], ["sharp"]),
        helper.make_node(
            "AveragePool",
            ["sharp"],
            ["logits"],
            kernel_shape=[TEACHER_BLUR_PX] * 2,
            pads=[TEACHER_BLUR_PX // 2] * 4,
            count_include_pad=0,
        ),
    ]
    weights = [numpy_helper.from_array(kernel, "kernel"), numpy_helper.from_array(offset, "bias")]
    inputs, outputs = _tensor("input", ["N", 3, "H", "W"]), _tensor("logits", ["N", 1, "H", "W"])
    _save(path, "teacher", nodes, [inputs], [outputs], weights)


def save_scenes(folder: Path, count: int, height: int, width: int, seed: int = 0) -> None:
    """Write `count` scenes to folder/images/*.jpg and their 0/255 masks to folder/masks/*.png."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image, mask = scene(np.random.default_rng([seed, number]), height, width)
        Image.fromarray(image).save(folder / "images" / f"scene_{number:03d}.jpg", quality=92)
        Image.fromarray(mask * np.uint8(255)).save(folder / "masks" / f"scene_{number:03d}.png")


def scene(
    rng: np.random.Generator, height: int, width: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """One drawn picture (H, W, 3) uint8 RGB with one or two people, and its mask (H, W) of 0/1."""
    picture = Image.fromarray(_background(rng, height, width))
    mask = Image.new("L", (width, height), 0)
    draw, draw_mask = ImageDraw.Draw(picture), ImageDraw.Draw(mask)
    for _ in range(rng.integers(2, 6)):
        _draw_distractor(rng, draw, height, width)
    for _ in range(rng.integers(1, 3)):
        _draw_person(rng, draw, draw_mask, height, width)
    blurred = picture.filter(ImageFilter.GaussianBlur(0.6))
    noisy = np.asarray(blurred, np.float32) + rng.normal(0, 5, (height, width, 3))
    return noisy.clip(0, 255).astype(np.uint8), np.asarray(mask)


def _background(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """A gradient between two cold colours."""
    top, bottom = (np.array([rng.uniform(20, 110), *rng.uniform(90, 220, 2)]) for _ in range(2))
    ramp = np.linspace(0, 1, height)[:, None, None]
    rows = top * (1 - ramp) + bottom * ramp
    return np.broadcast_to(rows, (height, width, 3)).astype(np.uint8)


def _draw_distractor(
    rng: np.random.Generator, draw: ImageDraw.ImageDraw, height: int, width: int
) -> None:
    """A box or ellipse; some are as warm as a person, so colour alone does not settle it."""
    warm = rng.random() < 0.25
    colour = (200, 130, 90) if warm else tuple(int(c) for c in rng.integers(30, 160, 3))
    x, y = rng.uniform(0, width), rng.uniform(0, height)
    half_width, half_height = rng.uniform(0.03, 0.12, 2) * min(height, width)
    box = (x - half_width, y - half_height, x + half_width, y + half_height)
    (draw.rectangle if warm or rng.random() < 0.5 else draw.ellipse)(box, fill=colour)


def _draw_person(
    rng: np.random.Generator,
    draw: ImageDraw.ImageDraw,
    draw_mask: ImageDraw.ImageDraw,
    height: int,
    width: int,
) -> None:
    """A head over a body, in a skin tone and a warm shirt."""
    size = rng.uniform(0.35, 0.7) * height
    x, top = rng.uniform(0.15, 0.85) * width, rng.uniform(0.05, 0.95) * (height - size)
    head = size * 0.13
    skin = tuple(int(c) for c in np.array([225, 170, 135]) * rng.uniform(0.75, 1.05))
    shirt = (int(rng.uniform(180, 250)), int(rng.uniform(30, 140)), int(rng.uniform(10, 70)))
    body = (x - size * 0.2, top + 2 * head, x + size * 0.2, top + size)
    for canvas, shirt_fill, skin_fill in ((draw, shirt, skin), (draw_mask, 1, 1)):
        canvas.rounded_rectangle(body, radius=size * 0.12, fill=shirt_fill)
        canvas.ellipse((x - head, top, x + head, top + 2.2 * head), fill=skin_fill)


def _tensor(name: str, shape: list[int | str]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _save(
    path: Path,
    name: str,
    nodes: list[NodeProto],
    inputs: list[ValueInfoProto],
    outputs: list[ValueInfoProto],
    weights: list[TensorProto],
) -> None:
    graph = helper.make_graph(nodes, name, inputs, outputs, initializer=weights)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR
    )
    checker.check_model(model)
    save(model, path)
