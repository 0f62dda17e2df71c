"""Frozen models of the real ones' cost with random weights: for benchmarks that need no download."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper, shape_inference

from kdcache.standins import TAP, _save, _tensor
from kdcache.train.student import _unet

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
