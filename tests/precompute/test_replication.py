"""Repeated channels: what the graph says, by ONNX's definition of Resize, checked in ONNX Runtime."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import CHANNELS
from onnx import TensorProto, helper, numpy_helper

from kdcache.cache.layout import Group, whole
from kdcache.precompute.replication import Part, channel_groups, channel_parts
from kdcache.precompute.yolo import Yolo
from kdcache.standins import TAP

MODES = ["half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners", "tf_half_pixel_for_nn"]
ROUNDINGS = ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]


def constant(name, values):
    return numpy_helper.from_array(np.array(values, np.float32), name)


def pool(name, source, stride):
    attributes = {"kernel_shape": [stride] * 2, "strides": [stride] * 2}
    return helper.make_node("AveragePool", [source], [name], **attributes)


def resize(name, source, scales="x2", **attributes):
    return helper.make_node("Resize", [source, "", scales], [name], **attributes)


def model_of(nodes, output, opset=17):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["n", "c", "h", "w"])],
        [
            constant("x2", [1, 1, 2, 2]),
            constant("x3", [1, 1, 3, 3]),
            constant("x4", [1, 1, 4, 4]),
            constant("wide", [1, 1, 2, 4]),
            constant("half", [1, 1, 1.5, 1.5]),
            constant("channels", [1, 2, 2, 2]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model)
    return model


@pytest.mark.parametrize(
    ("mode", "rounding", "scale"), list(itertools.product(MODES, ROUNDINGS, [2, 3, 4]))
)
def test_resize_counts_as_repeating_exactly_when_onnxruntime_repeats(mode, rounding, scale):
    node = resize(
        "up", "x", f"x{scale}", coordinate_transformation_mode=mode, nearest_mode=rounding
    )
    model = model_of([node], "up")
    pixels = np.random.default_rng(0).normal(size=(1, 3, 16, 16)).astype(np.float32)
    (result,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": pixels})
    repeats = np.array_equal(result, pixels.repeat(scale, 2).repeat(scale, 3))
    if mode == "align_corners":  # depends on the size; not worth knowing
        repeats = False
    assert channel_parts(model, "up") == [Part("x", scale) if repeats else Part("up", 1)]


@pytest.mark.parametrize(
    "node",
    [
        resize("up", "x", mode="linear"),
        resize("up", "x", scales="wide"),
        resize("up", "x", scales="half"),
        resize("up", "x", scales="channels"),
        resize("up", "x", scales="x"),  # not a constant of the graph
        helper.make_node("Relu", ["x"], ["up"]),
    ],
)
def test_graph_that_does_not_show_it_is_one_part(node):
    graph = helper.make_graph([node], "g", [], [], model_of([], "x").graph.initializer)
    assert channel_parts(helper.make_model(graph), "up") == [Part("up", 1)]


def test_old_operators_and_constant_nodes_are_read_too():
    scales = helper.make_node("Constant", [], ["s"], value=constant("s", [1, 1, 2, 2]))
    upsample = helper.make_node("Upsample", ["x", "s"], ["up"], mode="nearest")
    assert channel_parts(model_of([scales, upsample], "up", opset=9), "up") == [Part("x", 2)]
    old_resize = helper.make_node("Resize", ["x", "s"], ["up"], mode="nearest")
    assert channel_parts(model_of([scales, old_resize], "up", opset=10), "up") == [Part("x", 2)]


def test_nested_concats_and_resizes_multiply():
    nodes = [
        pool("p8", "x", 8),
        pool("p4", "x", 4),
        pool("p2", "x", 2),
        resize("up8", "p8"),
        helper.make_node("Concat", ["up8", "p4"], ["inner"], axis=1),
        helper.make_node("Identity", ["inner"], ["same"]),
        resize("up4", "same", mode="nearest"),
        helper.make_node("Concat", ["p2", "up4", "p2"], ["tap"], axis=-3),
    ]
    parts = channel_parts(model_of(nodes, "tap"), "tap")
    assert parts == [Part("p2", 1), Part("p8", 4), Part("p4", 2), Part("p2", 1)]
    shapes = {"p2": (1, 3, 8, 8), "p4": (1, 3, 4, 4), "p8": (1, 3, 2, 2)}
    groups = channel_groups(parts, shapes, (12, 8, 8))
    assert groups == (Group(1, ((0, 3), (9, 12))), Group(2, ((6, 9),)), Group(4, ((3, 6),)))
    assert channel_groups(parts, shapes, (13, 8, 8)) == whole(13)
    assert channel_groups(parts, {**shapes, "p8": (1, 3, 4, 4)}, (12, 8, 8)) == whole(12)


def test_concat_along_another_axis_is_no_concat_of_channels():
    nodes = [resize("up", "x"), helper.make_node("Concat", ["up", "up"], ["tap"], axis=2)]
    assert channel_parts(model_of(nodes, "tap"), "tap") == [Part("tap", 1)]


def open_yolo(path, tap=TAP):
    return Yolo(path, taps=[tap], expects="rgb01", device="cpu", size_px=64)


def test_detector_knows_its_repeated_channels(standins):
    half, all_ = CHANNELS, 2 * CHANNELS
    yolo = open_yolo(standins.detector)
    assert next(iter(yolo.taps.values())).groups == (
        Group(1, ((half, all_),)),
        Group(2, ((0, half),)),
    )


def test_graph_contradicted_by_its_own_features_is_stored_in_full(standins, monkeypatch, caplog):
    monkeypatch.setattr(
        "kdcache.precompute.yolo.channel_groups",
        lambda parts, shapes, shape: (Group(2, ((0, shape[0]),)),),
    )
    with caplog.at_level(logging.WARNING):
        yolo = open_yolo(standins.detector)
    assert next(iter(yolo.taps.values())).groups == whole(2 * CHANNELS)
    assert "stored in full" in caplog.text


@pytest.mark.parametrize(
    ("name", "tap", "stored_once"),
    [
        ("yolov9n_neck.onnx", "/model.14/Concat_output_0", {1: 32, 2: 48}),
        ("yolov9n_neck.onnx", "/model.11/Concat_output_0", {1: 48, 2: 64}),
        # its README counts the outer Resizes; inside them lie 64 channels of another ×2, and
        # among the native ones 48 that a Concat of the network upsampled
        ("yolov9n_featext1024_640.onnx", TAP, {1: 192, 2: 384, 4: 448}),
    ],
)
def test_real_graphs_show_their_repeated_channels(realdata, name, tap, stored_once):
    yolo = Yolo(realdata / name, taps=[tap], expects="rgb01", device="cpu", size_px=640)
    found = {
        group.factor: sum(b - a for a, b in group.channels)
        for group in next(iter(yolo.taps.values())).groups
    }
    assert found == stored_once
