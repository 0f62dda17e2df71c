"""The frozen detector: an ONNX graph cut at the tap, which need not be one of its outputs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, ModelProto, NodeProto, ValueInfoProto
from torch import Tensor

from kdcache.cache import codecs
from kdcache.cache.layout import Group, TapSpec, whole
from kdcache.config import YoloInput
from kdcache.errors import ModelError, SampleError, nearest
from kdcache.imaging import U8
from kdcache.precompute.onnx_session import OnnxNetwork, read_model, sha256_file
from kdcache.precompute.replication import channel_groups, channel_parts

log = logging.getLogger(__name__)
F32 = NDArray[np.float32]


class Yolo:
    """The detector on one device. Features are (N, C, h, w) float32 of (N, H, W, 3) uint8 RGB.

    `feature_shape` is (C, h, w); `groups` says which channels repeat each value in blocks. Raises
    ModelError when there is no such tap (naming the nearest) or it is not a grid that divides
    the input.
    """

    def __init__(
        self, path: Path, *, tap: str, expects: YoloInput, device: str, size_px: int
    ) -> None:
        self.sha256 = sha256_file(path) if path.is_file() else ""
        self._expects = expects
        self._on_host = device == "cpu"
        model = read_model(path)
        cut = pruned(model, [tap], path).SerializeToString()
        self._network = OnnxNetwork(cut, path, device, size_px)
        # Noise: features of a plain colour would repeat whatever the graph does.
        pixels = np.random.default_rng(0).integers(0, 256, (1, size_px, size_px, 3), np.uint8)
        noise = yolo_input(pixels, expects)
        features = self._network(noise)
        self.feature_shape = _checked_shape(features.shape, path, tap, size_px)
        self.groups = self._groups(model, path, tap, noise, features[0])

    def features(self, images_NHWC: U8) -> F32 | Tensor:
        """The tap's feature maps where they were computed: numpy on the CPU, torch on a GPU."""
        inputs = yolo_input(images_NHWC, self._expects)
        if self._on_host:
            return self._network(inputs)
        return self._network.on_device(inputs, self.feature_shape)

    def _groups(
        self, model: ModelProto, path: Path, tap: str, noise: F32, features_CHW: F32
    ) -> tuple[Group, ...]:
        """The channels that the graph says repeat, if the features of the noise agree."""
        channels = self.feature_shape[0]
        parts = channel_parts(model, tap)
        names = list(dict.fromkeys(part.tensor for part in parts))
        made = {name for node in model.graph.node for name in node.output}
        if all(part.factor == 1 for part in parts) or not made.issuperset(names):
            return whole(channels)
        # On the CPU, once: few graphs state how many channels each part has.
        cut = pruned(model, names, path).SerializeToString()
        shapes = OnnxNetwork(cut, path, "cpu", noise.shape[2]).output_shapes(noise)
        groups = channel_groups(parts, dict(zip(names, shapes, strict=True)), self.feature_shape)
        spec = TapSpec(name=tap, precision="float32", shape=self.feature_shape, groups=groups)
        try:
            codecs.encode(features_CHW, spec)
        except SampleError as error:
            log.warning("%s: %s; all channels of %s are stored in full", path.name, error, tap)
            return whole(channels)
        return groups


def _checked_shape(
    shape: tuple[int, ...], path: Path, tap: str, size_px: int
) -> tuple[int, int, int]:
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


def pruned(model: ModelProto, outputs: Sequence[str], path: Path) -> ModelProto:
    """The model with these tensors as its only outputs and without the nodes that they do not need."""
    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output if name}
    for name in outputs:
        if name not in producers:
            raise ModelError(
                f"{path}: no tensor {name!r} in the graph; nearest: {nearest(name, producers)}; "
                "choose one with --tap"
            )
    needed, waiting = set(), list(outputs)
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
    known = {info.name: info for info in [*graph.output, *graph.value_info]}
    cut.graph.output.extend(known.get(name, ValueInfoProto(name=name)) for name in outputs)
    return cut


def _names_used(node: NodeProto) -> Iterator[str]:
    """Tensors a node reads, also those its If and Loop bodies take from outside."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            for inner in attribute.g.node:
                yield from _names_used(inner)
