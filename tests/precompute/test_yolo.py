"""The detector: taps inside the graph, its inputs, and refusals."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import EPFail

from kdcache import onnx_session
from kdcache.devices import present
from kdcache.errors import DeviceMemoryError, ModelError, ProviderError
from kdcache.onnx_graph import model_sha256, pruned
from kdcache.onnx_session import OnnxNetwork
from kdcache.precompute.yolo import Yolo
from kdcache.standins import TAP


def open_yolo(path, tap=TAP, **changes):
    settings = {"taps": [tap], "expects": "rgb01", "device": "cpu", "size_px": 64}
    return Yolo(path, **(settings | changes))


def features_of(yolo, images):
    """Of a detector with one tap."""
    (features,) = yolo.features(images).values()
    return features


def save_identity(path, batch="N", dtype=TensorProto.FLOAT, channels=3):
    """A detector whose tap is its input, average-pooled to an eighth: exact to check."""
    shape = [batch, channels, "H", "W"]
    node = helper.make_node("AveragePool", ["x"], ["pooled"], kernel_shape=[8, 8], strides=[8, 8])
    graph = helper.make_graph(
        [node],
        "identity",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info("pooled", dtype, [batch, channels, "h", "w"])],
    )
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)


def random_images(count):
    return np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), np.uint8)


def detector_input(images):
    return (images.transpose(0, 3, 1, 2) / 255).astype(np.float32)


def test_inner_tap_gives_what_the_whole_graph_computes(standins):
    model = onnx.load(standins.detector)
    model.graph.output.append(onnx.ValueInfoProto(name=TAP))
    images = random_images(2)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (reference,) = session.run([TAP], {"images": detector_input(images)})
    yolo = open_yolo(standins.detector)
    assert yolo.taps[TAP].shape == (16, 8, 8)
    assert np.allclose(features_of(yolo, images), reference, atol=1e-5)
    # the stand-in is true in structure: the first half repeats each value in 2×2 blocks
    upsampled = reference[:, :8]
    assert np.array_equal(upsampled, upsampled[:, :, ::2, ::2].repeat(2, 2).repeat(2, 3))


def test_nodes_behind_the_tap_are_cut(standins):
    cut = pruned(onnx.load(standins.detector), [TAP], standins.detector)
    assert [output.name for output in cut.graph.output] == [TAP]
    assert "head" not in {i.name for i in cut.graph.initializer}
    assert cut.graph.node[-1].op_type == "Concat"


def test_cut_keeps_what_an_if_body_takes_from_outside(tmp_path):
    """A branch reads `doubled`, which no node lists as its input."""
    branches = [
        helper.make_graph(
            [helper.make_node(kind, ["doubled"], [f"out_{kind}"])],
            kind,
            [],
            [helper.make_tensor_value_info(f"out_{kind}", TensorProto.FLOAT, None)],
        )
        for kind in ("Relu", "Neg")
    ]
    nodes = [
        helper.make_node("Add", ["x", "x"], ["doubled"]),
        helper.make_node("If", ["yes"], ["tap"], then_branch=branches[0], else_branch=branches[1]),
        helper.make_node("Neg", ["tap"], ["end"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info("end", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array(True), "yes")],
    )
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), tmp_path / "g.onnx")
    features = features_of(open_yolo(tmp_path / "g.onnx", tap="tap"), random_images(1))
    assert np.allclose(features, 2 * detector_input(random_images(1)))


@pytest.mark.parametrize("batch", ["N", 1, 2, 3])
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_fixed_batch_and_half_inputs_give_the_same_features(tmp_path, batch, dtype):
    save_identity(tmp_path / "m.onnx", batch, dtype)
    images = random_images(5)
    features = features_of(open_yolo(tmp_path / "m.onnx", tap="pooled"), images)
    blocks = images.transpose(0, 3, 1, 2).reshape(5, 3, 8, 8, 8, 8) / 255
    assert features.dtype == np.float32
    assert np.allclose(features, blocks.mean((3, 5)), atol=2e-3)


@pytest.mark.parametrize("batch", ["N", 2])
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_what_is_bound_to_torch_tensors_equals_what_goes_through_the_host(tmp_path, batch, dtype):
    """The way taken on a GPU, here with the tensors on the CPU."""
    save_identity(tmp_path / "m.onnx", batch, dtype)
    yolo = open_yolo(tmp_path / "m.onnx", tap="pooled")
    on_host = features_of(yolo, random_images(5))
    yolo._network._through_host = False
    with mock.patch.object(OnnxNetwork, "_run", side_effect=AssertionError("through the host")):
        bound = features_of(yolo, random_images(5))
    assert np.array_equal(bound, on_host)


def test_missing_tap_names_the_nearest(standins):
    with pytest.raises(
        ModelError, match=f"no tensor 'segmentation_model_34_Concat'.*nearest: {TAP}"
    ):
        open_yolo(standins.detector, tap="segmentation_model_34_Concat")


def test_tap_that_is_no_grid_of_the_input_says_what_came(standins, tmp_path):
    weights = numpy_helper.from_array(np.zeros((2, 3, 5, 5), np.float32), "w")
    node = helper.make_node("Conv", ["x", "w"], ["valid"])
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info("valid", TensorProto.FLOAT, None)],
        [weights],
    )
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), tmp_path / "g.onnx")
    with pytest.raises(ModelError, match="2×60×60 for a 64×64"):
        open_yolo(tmp_path / "g.onnx", tap="valid")


def test_input_of_another_size_or_kind_is_refused(tmp_path):
    save_identity(tmp_path / "m.onnx", channels=1)
    with pytest.raises(ModelError, match=r"\(N, 3, 64, 64\), x is tensor\(float\) \['N', 1"):
        open_yolo(tmp_path / "m.onnx", tap="pooled")


def test_files_that_are_no_model_are_refused(tmp_path):
    with pytest.raises(ModelError, match="no such model file"):
        open_yolo(tmp_path / "absent.onnx")
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(ModelError, match="not an ONNX model"):
        open_yolo(tmp_path / "text.onnx")


def test_provider_that_is_not_there_or_not_active_is_an_error(standins, monkeypatch):
    """ONNX Runtime only logs that it fell back to the CPU."""
    monkeypatch.setattr(
        onnx_session.onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"]
    )
    with pytest.raises(ProviderError, match="no CUDAExecutionProvider"):
        open_yolo(standins.detector, device="cuda")
    monkeypatch.undo()

    class FellBack:
        def get_providers(self):
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(
        onnx_session.onnxruntime,
        "get_available_providers",
        lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )
    monkeypatch.setattr(onnx_session.onnxruntime, "InferenceSession", lambda *a, **k: FellBack())
    with pytest.raises(ProviderError, match="did not start, .* would run on CPUExecutionProvider"):
        open_yolo(standins.detector, device="cuda")


def test_a_provider_that_fails_while_it_runs_is_an_error_too(standins, monkeypatch):
    """ONNX Runtime's Python class would open another session, on other providers, and go on."""
    yolo = open_yolo(standins.detector)
    inner = yolo._network._session._sess

    class Failing:
        def __getattr__(self, name):
            return getattr(inner, name)

        def run(self, *arguments):
            raise EPFail("TensorRT EP failed to create engine")

    monkeypatch.setattr(yolo._network._session, "_sess", Failing())
    with pytest.raises(ModelError, match="failed to create engine"):
        features_of(yolo, random_images(1))


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_device_that_torch_does_not_see_is_one_clear_error(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ProviderError, match=f"--device {device}: torch .* sees no CUDA device"):
        present(device)


def test_engines_that_cannot_be_kept_are_named_with_their_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    with pytest.raises(ProviderError, match="cannot keep engines in .*XDG_CACHE_HOME"):
        onnx_session._providers(b"graph", "tensorrt")


def test_outputs_of_other_types_take_the_way_through_the_host(tmp_path):
    save_identity(tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    model.graph.node.append(helper.make_node("Cast", ["pooled"], ["wide"], to=TensorProto.DOUBLE))
    onnx.save(model, tmp_path / "m.onnx")
    network = open_yolo(tmp_path / "m.onnx", tap="wide")._network
    assert network._session.get_outputs()[0].type == "tensor(double)"
    assert network._through_host
    assert network(torch.zeros(2, 3, 64, 64)).dtype == torch.float32


def test_memory_that_runs_out_beside_the_models_is_one_clear_error(standins, monkeypatch):
    yolo = open_yolo(standins.detector)

    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("kdcache.precompute.yolo.yolo_input", full)
    with pytest.raises(DeviceMemoryError, match="running the detector.*lower --batch-size"):
        features_of(yolo, random_images(1))


def test_tensorrt_keeps_its_engines_apart_by_graph_gpu_and_version(tmp_path, monkeypatch):
    """They take minutes to build; one of another graph, GPU or version must not be taken."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")  # and it is removed again
    gpu = {"name": "GPU 1"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu["name"])

    def folder(model):
        (name, options), (second, _) = onnx_session._providers(model, "tensorrt")
        assert (name, second) == ("TensorrtExecutionProvider", "CUDAExecutionProvider")
        assert options["trt_engine_cache_enable"] == "1"
        return Path(options["trt_engine_cache_path"])

    first = folder(b"graph 1")
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"  # float32 means float32
    assert first.is_dir()
    assert first.is_relative_to(tmp_path)
    assert folder(b"graph 1") == first
    others = {folder(b"graph 2")}
    gpu["name"] = "GPU 2"
    others.add(folder(b"graph 1"))
    monkeypatch.setattr(onnx_session.onnxruntime, "__version__", "99")
    others.add(folder(b"graph 1"))
    monkeypatch.setattr(onnx_session, "_version", lambda package: "99")
    others.add(folder(b"graph 1"))
    assert len(others - {first}) == 4


def test_weights_listed_as_inputs_by_old_exports_are_not_asked_for(standins, tmp_path):
    """IR version 3 lists every weight as an input, those behind the tap too."""
    model = onnx.load(standins.detector)
    for weight in model.graph.initializer:
        info = helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims)
        model.graph.input.append(info)
    onnx.save(model, tmp_path / "old.onnx")
    old, new = open_yolo(tmp_path / "old.onnx"), open_yolo(standins.detector)
    assert np.array_equal(features_of(old, random_images(1)), features_of(new, random_images(1)))


def test_weights_in_external_files_load_and_belong_to_the_digest(standins, tmp_path):
    model = onnx.load(standins.detector)
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="m.data", size_threshold=0)
    first = open_yolo(path)
    assert np.array_equal(
        features_of(first, random_images(1)),
        features_of(open_yolo(standins.detector), random_images(1)),
    )
    data = bytearray((tmp_path / "m.data").read_bytes())
    data[3] ^= 1
    (tmp_path / "m.data").write_bytes(data)
    assert model_sha256(path) != first.sha256
    (tmp_path / "m.data").unlink()
    with pytest.raises(ModelError, match="its weights are in m.data, which is not beside it"):
        open_yolo(path)


@pytest.mark.parametrize(("field", "value"), [("ir_version", 99), ("opset", 99)])
def test_model_newer_than_the_runtime_is_named_with_its_versions(standins, tmp_path, field, value):
    model = onnx.load(standins.detector)
    if field == "opset":
        model.opset_import[0].version = value
    else:
        model.ir_version = value
    onnx.save(model, tmp_path / "new.onnx")
    with pytest.raises(ModelError, match=r"(IR version|ai.onnx) 99.*newer onnxruntime$"):
        open_yolo(tmp_path / "new.onnx")
