"""Which channels of a tap repeat each value in blocks, read from the ONNX graph.

A nearest-neighbour Resize that reaches the tap through Concats along the channels writes every
value of its input into an f×f block. The cache stores such channels at their own grid. Data alone
never proves it: a picture of one colour repeats everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from kdcache.cache.layout import Group, whole

# ONNX operators that move values without mixing them.
_TRANSPARENT = {"Identity", "Cast"}
_CHANNEL_AXES = {1, -3}
_PROBE_LENGTH = 8  # output positions beyond a few blocks repeat the same fractions


@dataclass(frozen=True)
class Part:
    """Consecutive channels of a tap: a tensor of the graph, each value of it in f×f blocks."""

    tensor: str
    factor: int


def channel_parts(model: ModelProto, tap: str) -> list[Part]:
    """The tensors that a tap's channels are made of, in order.

    A tap that is no Concat of such tensors is one part with factor 1.
    """
    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output if name}
    constants = _constants(graph)

    def parts(tensor: str, factor: int) -> list[Part]:
        node = producers.get(tensor)
        if node is None:
            return [Part(tensor, factor)]
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type in _TRANSPARENT:
            return parts(node.input[0], factor)
        if node.op_type == "Concat" and attributes.get("axis") in _CHANNEL_AXES:
            return [part for name in node.input for part in parts(name, factor)]
        if node.op_type in ("Resize", "Upsample"):
            scale = _block_size(node, attributes, constants)
            if scale is not None:
                return parts(node.input[0], factor * scale)
        return [Part(tensor, factor)]

    return parts(tap, 1)


def channel_groups(
    parts: Sequence[Part],
    shapes: Mapping[str, Sequence[int]],
    tap_shape: tuple[int, int, int],
) -> tuple[Group, ...]:
    """The parts' channels by block size, given the (1, c, h, w) shape of each part's tensor.

    One group of all channels where the shapes do not add up to the tap's (C, h, w).
    """
    channels, height, width = tap_shape
    ranges: dict[int, list[tuple[int, int]]] = {}
    start = 0
    for part in parts:
        _, count, part_height, part_width = shapes[part.tensor]
        if (part_height * part.factor, part_width * part.factor) != (height, width):
            return whole(channels)
        before = ranges.setdefault(part.factor, [])
        joins = before and before[-1][1] == start
        first = before.pop()[0] if joins else start
        before.append((first, start + count))
        start += count
    if start != channels:
        return whole(channels)
    return tuple(Group(factor, tuple(ranges[factor])) for factor in sorted(ranges))


def _block_size(
    node: NodeProto, attributes: Mapping[str, Any], constants: Mapping[str, np.ndarray]
) -> int | None:
    """f when the node repeats each value in f×f blocks; None when it does not, or does not say so."""
    if attributes.get("mode", b"nearest") != b"nearest" or attributes.get("antialias"):
        return None
    if node.op_type == "Upsample":
        scales = constants.get(node.input[1]) if len(node.input) > 1 else attributes.get("scales")
        coordinates, rounding = b"asymmetric", b"floor"
    else:
        # opset 10 has (X, scales), later ones (X, roi, scales, sizes)
        names = node.input[1:2] if len(node.input) == 2 else node.input[2:3]
        scales = constants.get(names[0]) if names else None
        old = len(node.input) == 2
        coordinates = attributes.get(
            "coordinate_transformation_mode", b"asymmetric" if old else b"half_pixel"
        )
        rounding = attributes.get("nearest_mode", b"floor" if old else b"round_prefer_floor")
    if scales is None or not np.size(scales):
        return None
    axes = attributes.get("axes", range(len(scales)))
    by_axis = dict.fromkeys(range(4), 1.0) | {
        int(axis) % 4: float(scale) for axis, scale in zip(axes, scales, strict=True)
    }
    factor = int(by_axis[2])
    if list(by_axis.values()) != [1, 1, factor, factor]:
        return None
    return factor if _repeats(factor, coordinates, rounding) else None


def _repeats(factor: int, coordinates: bytes, rounding: bytes) -> bool:
    """Whether output position i reads input position i // factor, by ONNX's definition of Resize."""
    length = _PROBE_LENGTH
    i = np.arange(length * factor)
    source = {
        b"half_pixel": (i + 0.5) / factor - 0.5,
        b"half_pixel_symmetric": (i + 0.5) / factor - 0.5,  # the same where factor is whole
        b"pytorch_half_pixel": (i + 0.5) / factor - 0.5,
        b"tf_half_pixel_for_nn": (i + 0.5) / factor,
        b"asymmetric": i / factor,
    }.get(coordinates)
    if source is None:
        return False
    rounded = {
        b"round_prefer_floor": np.ceil(source - 0.5),
        b"round_prefer_ceil": np.floor(source + 0.5),
        b"floor": np.floor(source),
        b"ceil": np.ceil(source),
    }.get(rounding)
    return rounded is not None and np.array_equal(rounded.clip(0, length - 1), i // factor)


def _constants(graph: GraphProto) -> dict[str, np.ndarray]:
    found = {i.name: numpy_helper.to_array(i) for i in graph.initializer if math.prod(i.dims) <= 4}
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    found[node.output[0]] = numpy_helper.to_array(attribute.t)
                elif attribute.name == "value_floats":
                    found[node.output[0]] = np.array(attribute.floats, np.float32)
    return found
