"""Encoder weights from files of every prefix; student files; the offline hub."""

from __future__ import annotations

import time

import pytest
import torch
from safetensors.torch import save_file

from kdcache.errors import ModelError, RunError
from kdcache.train import student as student_module
from kdcache.train.student import Student, build_student
from kdcache.train.weights import read_student, save_student

B0, LITE0 = "timm-efficientnet-b0", "tu-tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def encoder_weights():
    """Timm-named weights of a lite0 encoder, with a classifier behind it."""
    torch.manual_seed(1)
    state = Student(LITE0).unet.encoder.state_dict()
    weights = {
        key.removeprefix("model."): torch.rand_like(value.float()) for key, value in state.items()
    }
    weights |= {"conv_head.weight": torch.ones(2), "classifier.bias": torch.ones(3)}
    return {
        key: value.long() if key.endswith("num_batches_tracked") else value
        for key, value in weights.items()
    }


@pytest.mark.parametrize("prefix", ["", "model.", "encoder.model.", "module.encoder.model."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_encoder_files_load_with_any_prefix(tmp_path, encoder_weights, prefix, suffix):
    weights = {prefix + key: value for key, value in encoder_weights.items()}
    path = tmp_path / f"w{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    loaded = build_student(LITE0, str(path)).unet.encoder.state_dict()
    assert all(
        torch.equal(value, encoder_weights[key.removeprefix("model.")])
        for key, value in loaded.items()
    )


def test_missing_left_over_and_misshapen_tensors_are_named(tmp_path, encoder_weights):
    weights = dict(encoder_weights)
    del weights["bn1.bias"]
    weights["conv_stem.weight"] = torch.ones(1)
    weights["surprise.weight"] = torch.ones(1)
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"bn1.bias is missing.*conv_stem.*\(1,\).*surprise"):
        build_student(LITE0, str(tmp_path / "w.safetensors"))


def test_weights_of_another_encoder_are_refused(tmp_path, encoder_weights):
    save_file(encoder_weights, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match="does not fit the student's encoder"):
        build_student(B0, str(tmp_path / "w.safetensors"))


def test_file_that_is_absent_or_no_weights_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        build_student(B0, str(tmp_path / "absent.pth"))
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ModelError, match="no weights can be read from it"):
        build_student(B0, str(tmp_path / "text.pth"))


@pytest.mark.parametrize("encoder", [B0, LITE0])
def test_offline_imagenet_fails_within_seconds_and_names_the_flag(monkeypatch, tmp_path, encoder):
    from huggingface_hub import constants

    monkeypatch.setattr(student_module, "_reachable", lambda endpoint: False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # restored after the test
    started = time.monotonic()
    with pytest.raises(ModelError, match="--encoder-weights FILE"):
        build_student(encoder, "imagenet")
    assert time.monotonic() - started < 10


def test_unreachable_host_is_found_out_quickly(monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert not student_module._reachable("http://127.0.0.1:9")  # nothing listens there


def test_student_file_holds_weights_and_how_to_use_them(tmp_path):
    torch.manual_seed(0)
    student = Student(B0)
    save_student(tmp_path / "s.safetensors", student.unet, {"encoder": B0, "size_px": 640})
    tensors, metadata = read_student(tmp_path / "s.safetensors")
    assert metadata == {"encoder": B0, "size_px": 640}
    assert all(torch.equal(tensors[k], v) for k, v in student.unet.state_dict().items())


def test_file_that_is_no_student_is_refused(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "s.safetensors")
    with pytest.raises(RunError, match="not a student of kdcache"):
        read_student(tmp_path / "s.safetensors")
    with pytest.raises(RunError, match="kdcache train"):
        read_student(tmp_path / "absent.safetensors")


def test_a_flipped_bit_of_a_student_is_found(tmp_path):
    save_student(tmp_path / "s.safetensors", Student(B0).unet, {"encoder": B0})
    data = bytearray((tmp_path / "s.safetensors").read_bytes())
    data[len(data) // 2] ^= 0x40
    (tmp_path / "s.safetensors").write_bytes(data)
    with pytest.raises(RunError, match="is damaged"):
        read_student(tmp_path / "s.safetensors")


def test_unknown_encoder_names_the_nearest():
    with pytest.raises(ModelError, match=r"nearest: .*timm-efficientnet-b0.*prefix tu-"):
        Student("tim-efficientnet-b0")
