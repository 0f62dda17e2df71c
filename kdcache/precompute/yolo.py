"""The frozen detector: an ONNX graph cut at the tap, which need not be one of its outputs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, ModelProto, NodeProto, ValueInfoProto

from kdcache.config import YoloInput
from kdcache.errors import ModelError, nearest
from kdcache.imaging import U8
from kdcache.precompute.onnx_session import OnnxNetwork, read_model, sha256_file

F32 = NDArray[np.float32]


class Yolo:
    """The detector on one device. Features are (N, C, h, w) float32 of (N, H, W, 3) uint8 RGB.

    Raises ModelError when there is no such tap (naming the nearest) or it is not a grid that
    divides the input.
    """

    def __init__(
        self, path: Path, *, tap: str, expects: YoloInput, device: str, size_px: int
    ) -> None:
        self.sha256 = sha256_file(path) if path.is_file() else ""
        self._expects = expects
        model = tapped(read_model(path), tap, path)
        self._network = OnnxNetwork(model.SerializeToString(), path, device, size_px)
        self.feature_shape = self._checked_shape(path, tap, size_px)

    def features(self, images_NHWC: U8) -> F32:
        """The tap's feature maps, (N, C, h, w)."""
        return self._network(yolo_input(images_NHWC, self._expects))

    def _checked_shape(self, path: Path, tap: str, size_px: int) -> tuple[int, int, int]:
        """(C, h, w), found by running one grey image: graphs state their shapes rarely."""
        shape = self.features(np.full((1, size_px, size_px, 3), 114, np.uint8)).shape
        if len(shape) != 4 or shape[0] != 1:
            raise ModelError(f"{path}: tap {tap} gives {shape}; expected (1, C, h, w)")
        _, channels, height, width = shape
        if size_px % height or size_px % width or height != width:
            raise ModelError(
                f"{path}: tap {tap} gives {channels}×{height}×{width} for a {size_px}×{size_px} "
                f"input; expected a square grid that divides it (80×80 at 640 for the design's "
                "tap): choose another --tap or --size"
            )
        return channels, height, width


def yolo_input(images_NHWC: U8, expects: YoloInput) -> F32:
    """uint8 RGB pixels as the (N, 3, H, W) float32 input a detector expects."""
    pixels = images_NHWC[..., ::-1] if expects.startswith("bgr") else images_NHWC
    planes = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32)
    return planes / np.float32(255) if expects.endswith("01") else planes


def tapped(model: ModelProto, tap: str, path: Path) -> ModelProto:
    """The model with `tap` as its only output and without the nodes that it does not need."""
    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output if name}
    if tap not in producers:
        raise ModelError(
            f"{path}: no tensor {tap!r} in the graph; nearest: {nearest(tap, producers)}; "
            "choose one with --tap"
        )
    needed, waiting = set(), [tap]
    while waiting:
        node = producers.get(waiting.pop())
        if node is not None and id(node) not in needed:
            needed.add(id(node))
            waiting.extend(_names_used(node))
    kept = [node for node in graph.node if id(node) in needed]
    used = {name for node in kept for name in _names_used(node)}
    cut = ModelProto()
    cut.CopyFrom(model)
    del cut.graph.node[:], cut.graph.output[:], cut.graph.initializer[:], cut.graph.input[:]
    cut.graph.node.extend(kept)
    cut.graph.initializer.extend(i for i in graph.initializer if i.name in used)
    # Exports of IR version 3 list their weights as inputs too; those are no inputs to feed.
    weights = {i.name for i in graph.initializer}
    cut.graph.input.extend(i for i in graph.input if i.name in used - weights)
    # ONNX Runtime infers the type of an output that is only named.
    known = [*graph.output, *graph.value_info]
    cut.graph.output.append(
        next((info for info in known if info.name == tap), ValueInfoProto(name=tap))
    )
    return cut


def _names_used(node: NodeProto) -> Iterator[str]:
    """Tensors a node reads, also those its If and Loop bodies take from outside."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            for inner in attribute.g.node:
                yield from _names_used(inner)
