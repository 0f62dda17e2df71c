"""Teachers: checkpoints in every form, nothing in them executed, strict loading."""

from __future__ import annotations

import sys
import types

import numpy as np
import onnx
import pytest
import segmentation_models_pytorch as smp
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file

from kdcache.errors import ModelError
from kdcache.pixels import normalised
from kdcache.precompute.teacher import Teacher, load_checkpoint, network_settings, strip_prefix
from kdcache.standins import TEACHER_BIAS, TEACHER_RGB_WEIGHT

# B0 stands in where the encoder does not matter: it builds three times faster than B3.
SMALL = "timm-efficientnet-b0"


def unet(encoder):
    torch.manual_seed(0)
    with pytest.warns(DeprecationWarning, match="timm-"):
        return smp.Unet(encoder, encoder_weights=None, classes=1).eval()


@pytest.fixture(scope="module")
def small_unet():
    return unet(SMALL)


def prefixed(network, prefix):
    return {prefix + key: value for key, value in network.state_dict().items()}


def assert_same_weights(network, reference):
    ours, theirs = network.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


class Vanishing:
    """Makes classes of a module that is gone when the checkpoint is read."""

    def __enter__(self):
        self.module = types.ModuleType("vanished_lightning")
        for name in ("AttributeDict", "ModelCheckpoint", "Strategy"):
            base = dict if name == "AttributeDict" else object
            kind = type(name, (base,), {"__module__": "vanished_lightning"})
            setattr(self.module, name, kind)
        sys.modules["vanished_lightning"] = self.module
        return self.module

    def __exit__(self, *_):
        del sys.modules["vanished_lightning"]


class Bomb:
    """Its pickle runs a command when it is loaded by plain pickle."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.path}",)


def lightning_checkpoint(network, path, bomb):
    """What pytorch-lightning of 2020 wrote: weights among objects of its own and the user's."""
    with Vanishing() as module:
        callback = module.ModelCheckpoint()
        callback.best_model_score = torch.tensor(0.9)
        callback.inner = module.Strategy()
        content = {
            "epoch": 3,
            "global_step": 1234,
            "pytorch-lightning_version": "0.9.0",
            "callbacks": {module.ModelCheckpoint: callback},
            "hyper_parameters": module.AttributeDict(lr=1e-3, image_path=Bomb(bomb)),
            "state_dict": prefixed(network, "model."),
        }
        torch.save(content, path, **({} if path.suffix == ".ckpt" else _LEGACY))


_LEGACY = {"_use_new_zipfile_serialization": False}  # torch < 1.6, as in 2020


@pytest.mark.parametrize("suffix", [".pth", ".ckpt"])
def test_b3_lightning_checkpoint_loads_strictly_and_runs_nothing(tmp_path, caplog, suffix):
    network = unet("timm-efficientnet-b3")
    path, bomb = tmp_path / f"2020-09-23a{suffix}", tmp_path / "exploded"
    lightning_checkpoint(network, path, bomb)
    teacher = Teacher(path, encoder="timm-efficientnet-b3", device="cpu", size_px=64)
    assert not bomb.exists()
    assert "vanished_lightning.ModelCheckpoint" in caplog.text
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    with torch.no_grad():
        reference = network(normalised(torch.from_numpy(images)))
    assert np.array_equal(teacher.logits(images), reference[:, 0].numpy())


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "module.model.", "net."])
def test_prefixes_are_stripped_at_the_front_only(tmp_path, small_unet, prefix):
    torch.save(prefixed(small_unet, prefix), tmp_path / "t.pth")
    assert_same_weights(load_checkpoint(tmp_path / "t.pth", SMALL), small_unet)


def test_inner_model_of_a_key_stays():
    expected = {"encoder.model.stem.weight", "segmentation_head.0.weight"}
    tensors = {"model." + key: torch.zeros(1) for key in expected}
    assert strip_prefix(tensors).keys() == strip_prefix(strip_prefix(tensors)).keys() == expected


def test_safetensors_load(tmp_path, small_unet):
    save_file(prefixed(small_unet, "model."), tmp_path / "t.safetensors")
    assert_same_weights(load_checkpoint(tmp_path / "t.safetensors", SMALL), small_unet)


def test_checkpoint_of_another_encoder_is_named_by_its_shapes(tmp_path, small_unet):
    torch.save(prefixed(small_unet, "model."), tmp_path / "t.pth")
    message = r"does not fit smp.Unet\('timm-efficientnet-b3'.*teacher_encoder=timm-efficientnet-b0"
    with pytest.raises(ModelError, match=message):
        load_checkpoint(tmp_path / "t.pth", "timm-efficientnet-b3")


def test_checkpoint_of_another_family_is_named_by_its_shapes(tmp_path):
    torch.save(smp.Unet("resnet18", encoder_weights=None).state_dict(), tmp_path / "t.pth")
    with pytest.raises(ModelError, match=r"--set teacher_encoder=resnet18"):
        load_checkpoint(tmp_path / "t.pth", SMALL)


def test_checkpoint_of_many_classes_says_so(tmp_path):
    torch.save(
        smp.Unet("resnet18", encoder_weights=None, classes=21).state_dict(), tmp_path / "t.pth"
    )
    with pytest.raises(ModelError, match="it segments 21 classes"):
        load_checkpoint(tmp_path / "t.pth", "resnet18")


def test_missing_and_left_over_tensors_are_named(tmp_path, small_unet):
    weights = prefixed(small_unet, "model.")
    del weights["model.segmentation_head.0.bias"]
    weights["loss.weight"] = torch.ones(2)
    torch.save({"state_dict": weights}, tmp_path / "t.pth")
    with pytest.raises(ModelError, match=r"head.0.bias is missing; loss.weight is left over"):
        load_checkpoint(tmp_path / "t.pth", SMALL)


def test_files_without_weights_are_refused(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ModelError, match="no weights in it"):
        load_checkpoint(tmp_path / "empty.pth", SMALL)
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ModelError, match=r"text\.pth"):
        load_checkpoint(tmp_path / "text.pth", SMALL)
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ModelError, match="not a safetensors file"):
        load_checkpoint(tmp_path / "text.safetensors", SMALL)
    with pytest.raises(ModelError, match="no such model file"):
        Teacher(tmp_path / "absent.pth", encoder=SMALL, device="cpu", size_px=64)


def test_a_state_of_other_keys_is_refused(tmp_path):
    torch.save({1: torch.ones(1)}, tmp_path / "numbers.pth")
    with pytest.raises(ModelError, match="does not fit"):
        load_checkpoint(tmp_path / "numbers.pth", SMALL)


def test_whole_pickled_module_is_refused_not_run(tmp_path, small_unet):
    torch.save(small_unet, tmp_path / "module.pth")
    with pytest.raises(ModelError, match="no weights in it|without running code"):
        load_checkpoint(tmp_path / "module.pth", SMALL)


def test_unknown_encoder_is_refused(tmp_path, small_unet):
    torch.save(small_unet.state_dict(), tmp_path / "t.pth")
    with pytest.raises(ModelError, match="smp has no such encoder"):
        load_checkpoint(tmp_path / "t.pth", "efficientnet-b99")


def test_standin_teacher_is_its_known_function(standins):
    teacher = Teacher(standins.teacher, encoder="", device="cpu", size_px=64)
    colour = np.array([200, 90, 30], np.uint8)
    logits = teacher.logits(np.broadcast_to(colour, (1, 64, 64, 3)))
    assert np.allclose(logits, colour / 255 @ TEACHER_RGB_WEIGHT + TEACHER_BIAS, atol=1e-4)


def test_teacher_that_gives_no_logit_a_pixel_is_refused(standins):
    with pytest.raises(ModelError, match=r"gives \(1, 4, 8, 8\).*expected one logit a pixel"):
        Teacher(standins.detector, encoder="", device="cpu", size_px=64)


def with_end(standins, path, *nodes):
    """The stand-in teacher with further nodes behind its logits; the last one's output is `end`."""
    model = onnx.load(standins.teacher)
    model.graph.node.extend(nodes)
    del model.graph.output[:]
    model.graph.output.append(
        helper.make_tensor_value_info("end", TensorProto.FLOAT, ["N", 1, "H", "W"])
    )
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("operator", ["Sigmoid", "HardSigmoid"])
def test_onnx_teacher_of_probabilities_is_refused_with_the_fix_that_works(
    standins, tmp_path, operator
):
    path = with_end(
        standins,
        tmp_path / "t.onnx",
        helper.make_node("Identity", ["logits"], ["same"]),
        helper.make_node(operator, ["same"], ["p"]),
        helper.make_node("Identity", ["p"], ["end"]),
    )
    with pytest.raises(ModelError, match=rf"ends in {operator}.*--set teacher_output=same"):
        Teacher(path, encoder="", device="cpu", size_px=64)
    cut = Teacher(path, encoder="", device="cpu", size_px=64, output="same")
    whole = Teacher(standins.teacher, encoder="", device="cpu", size_px=64)
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    assert np.array_equal(cut.logits(images), whole.logits(images))
    assert network_settings(cut.network) == {"encoder": "", "output": "same"}
    assert network_settings(whole.network) == {"encoder": "", "output": ""}


def test_teacher_output_that_is_not_there_or_not_for_it_is_refused(standins, tmp_path, small_unet):
    with pytest.raises(ModelError, match=r"no tensor 'logit'.*logits.*teacher_output"):
        Teacher(standins.teacher, encoder="", device="cpu", size_px=64, output="logit")
    torch.save(small_unet.state_dict(), tmp_path / "t.pth")
    with pytest.raises(ModelError, match="for ONNX teachers"):
        Teacher(tmp_path / "t.pth", encoder=SMALL, device="cpu", size_px=64, output="logits")
