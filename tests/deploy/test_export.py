"""An exported student is the student, says how to be fed, and is alone in its file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner

from kdcache.cli import main
from kdcache.deploy import export as export_module
from kdcache.deploy.export import export
from kdcache.deploy.graph import check_only_weights_of
from kdcache.deploy.report import export_text
from kdcache.deploy.trained import PHOTOS, open_student
from kdcache.errors import CacheError, ModelError, RunError
from kdcache.imaging import IMAGENET_MEAN, IMAGENET_STD
from kdcache.pixels import normalised
from kdcache.train.projection import Projection
from kdcache.train.run_folder import read_best_student, read_checkpoint


def photos(cache, count):
    rows = [cache[n % len(cache)].image.astype(np.uint8) for n in range(count)]
    return np.stack(rows)


def assert_masks_equal(logits, reference):
    """But for ties within 1e-3 of the threshold."""
    different = (logits > 0) != (reference > 0)
    assert not (different & (np.abs(reference) > 1e-3)).any()


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_masks_are_pytorchs_at_every_batch(run, cache, exported, batch):
    student, _ = read_best_student(run)
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    pixels = normalised(torch.from_numpy(photos(cache, batch)))
    (logits,) = session.run(None, {"image": pixels.numpy()})
    with torch.no_grad():
        reference = student(pixels).logits.numpy()
    assert logits.shape == (batch, 1, 64, 64)
    assert np.allclose(logits, reference, atol=1e-3)
    assert_masks_equal(logits, reference)


def test_the_report_tells_what_was_compared(exported):
    assert set(exported.agreement) == {1, 2, 7}
    assert all(found.different_pixels == 0 for found in exported.agreement.values())
    assert exported.agreement[7].pixels == 7 * 64 * 64
    assert exported.miou == pytest.approx(exported.pytorch_miou, abs=1e-6)
    assert exported.size_bytes == exported.path.stat().st_size
    text = export_text(exported)
    assert "opset 18" in text
    assert "any batch" in text
    assert "none of the projection's" in text


def test_the_file_says_how_to_feed_it(exported):
    model = onnx.load(exported.path)
    assert [i.name for i in model.graph.input] == ["image"]
    assert [o.name for o in model.graph.output] == ["logits"]
    assert list(exported.path.parent.iterdir()) == [exported.path]
    assert next(o.version for o in model.opset_import if not o.domain) == exported.opset == 18
    metadata = json.loads({p.key: p.value for p in model.metadata_props}["kdcache"])
    assert metadata["size_px"] == 64
    assert metadata["resize"] == "stretch"
    assert metadata["mean"] == list(IMAGENET_MEAN)
    assert metadata["std"] == list(IMAGENET_STD)
    assert metadata["opset"] == 18
    assert metadata["threshold"] == "logit > 0"


def test_projection_and_tap_are_not_in_the_file(run, exported):
    """Not by name, not by shape, not by value; and adding one is noticed."""
    model, (student, _) = onnx.load(exported.path), read_best_student(run)
    weights = read_checkpoint(run / "checkpoints/best.pt")["projections"]
    own = student.unet.state_dict()
    values = {name: tensor.numpy() for name, tensor in weights.items() if tensor.numel() > 16}
    for initializer in model.graph.initializer:
        array = onnx.numpy_helper.to_array(initializer)
        assert (
            array.size < 16 or initializer.name.removeprefix("unet.").removesuffix("_bias") in own
        )
        for value in values.values():
            assert array.shape != value.shape or not np.array_equal(array, value)
    assert 0.9 * exported.parameters < exported.weights < exported.parameters
    foreign = Projection(40, 96, 128)
    model.graph.initializer.append(
        onnx.numpy_helper.from_array(foreign.state_dict()["0.weight"].numpy(), "sneaked_in")
    )
    with pytest.raises(ModelError, match=r"not the student's.*\(96, 40, 1, 1\)"):
        check_only_weights_of(model, student.unet)


def test_int8_with_preprocessing_takes_photos_and_tells_its_loss(run, cache, deployable):
    session = onnxruntime.InferenceSession(deployable.path, providers=["CPUExecutionProvider"])
    (image,) = session.get_inputs()
    assert (image.type, image.shape[1:]) == ("tensor(uint8)", [64, 64, 3])
    assert [output.name for output in session.get_outputs()] == ["mask", "logits"]
    mask, logits = session.run(None, {"image": photos(cache, 3)})
    assert mask.shape == (3, 64, 64)
    assert mask.dtype == np.uint8
    assert np.array_equal(mask, logits[:, 0] > 0)
    student = open_student(run, "cpu")
    reference = student.logits(torch.from_numpy(photos(cache, 3))).numpy()
    assert ((logits > 0) == (reference > 0)).mean() > 0.9
    assert deployable.size_bytes < 8e6
    assert deployable.miou is not None
    assert deployable.pytorch_miou is not None
    lost = deployable.pytorch_miou - deployable.miou
    assert f"{lost:+.4f}" in export_text(deployable)
    kinds = {i.data_type for i in onnx.load(deployable.path).graph.initializer if len(i.dims) == 4}
    assert kinds == {onnx.TensorProto.INT8}
    model = onnx.load(deployable.path)
    assert {o.domain for o in model.opset_import} == {node.domain for node in model.graph.node}


def test_fp16_fixed_batch_and_preprocessing_together(run, cache, tmp_path):
    report = export(
        run,
        tmp_path / "new" / "s.onnx",
        cache,
        precision="float16",
        preprocessing=True,
        fixed_batch=2,
    )
    assert set(report.agreement) == {2}
    assert report.size_bytes < 14e6
    session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [2, 64, 64, 3]
    # a fixed batch is filled up: one photo, or three, are no trouble for kdcache
    student, graph = open_student(run, "cpu"), open_student(report.path, "cpu")
    assert graph.metadata["input"] == PHOTOS
    for count in (1, 3):
        pixels = torch.from_numpy(photos(cache, count))
        ours, theirs = student.logits(pixels), graph.logits(pixels)
        assert torch.allclose(ours, theirs, atol=0.05)
    again = read_best_student(run)[0].unet.state_dict()
    assert all(t.dtype != torch.float16 for t in again.values())


def test_an_export_that_differs_leaves_no_file(run, tmp_path, monkeypatch):
    def moved(*_):
        found = export_module.Agreement(
            images=1,
            max_difference=0.5,
            different_pixels=3,
            pixels=9,
            largest_at_difference=0.2,
        )
        return found

    monkeypatch.setattr(export_module, "_agreement", moved)
    with pytest.raises(ModelError, match="differ from PyTorch's on 3 of 9 pixels"):
        export(run, tmp_path / "student.onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_refused_before_anything_is_written(run, exported, tmp_path):
    for out in (tmp_path, tmp_path / "student"):
        with pytest.raises(ModelError, match="name the file to write"):
            export(run, out)
    with pytest.raises(ModelError, match="exported already"):
        export(exported.path, tmp_path / "s.onnx")
    with pytest.raises(CacheError, match="give --cache"):
        export(run, tmp_path / "s.onnx", precision="int8")
    both = CliRunner().invoke(
        main, ["export", str(run), "--out", str(tmp_path / "s"), "--fp16", "--int8"]
    )
    assert both.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_the_runs_own_cache_is_found_and_its_absence_is_no_error(run, cache, tmp_path):
    assert export_module.own_cache(run, None).path == cache.path
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    record = json.loads((moved / "run.json").read_text())
    record["cache"] = str(tmp_path / "gone.zarr")
    (moved / "run.json").write_text(json.dumps(record))
    assert export_module.own_cache(moved, None) is None
    assert export_module.own_cache(moved, cache.path).path == cache.path


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_logits_that_are_not_finite_are_refused_at_every_precision(
    run, cache, tmp_path, monkeypatch, precision
):
    found = export_module.Agreement(
        images=1,
        max_difference=float("nan"),
        different_pixels=3,
        pixels=9,
        largest_at_difference=0.2,
    )
    monkeypatch.setattr(export_module, "_agreement", lambda *_: found)
    monkeypatch.setattr(export_module, "_write", lambda unet, size, path, *_: path.write_bytes(b""))
    monkeypatch.setattr(export_module, "quantise", lambda *_: None)
    monkeypatch.setattr(export_module, "open_onnx_student", lambda *_: None)
    with pytest.raises(ModelError, match="not finite"):
        export(run, tmp_path / "s.onnx", cache, precision=precision)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_of_other_pixels_is_refused_or_left_alone(run, standins, tmp_path, caplog):
    """The one that is given, and what lies today where the run's own was."""
    standins.extract(tmp_path / "boxed", resize="letterbox", limit=3)
    boxed = export_module.own_cache(run, tmp_path / "boxed")
    with pytest.raises(RunError, match="resize = stretch.*letterbox"):
        export(run, tmp_path / "s.onnx", boxed)
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    record = json.loads((moved / "run.json").read_text())
    record["cache"] = str(tmp_path / "boxed")
    (moved / "run.json").write_text(json.dumps(record))
    assert export_module.own_cache(moved, None) is None
    assert "is not used: " in caplog.text


def test_a_terminated_export_leaves_nothing(run, cache, tmp_path):
    code = (
        "import os, signal, sys\n"
        "from kdcache.deploy import export\n"
        "export._write = lambda *a: os.kill(os.getpid(), signal.SIGTERM)\n"
        "from kdcache.cli import main\n"
        "main(sys.argv[1:])"
    )
    words = [sys.executable, "-c", code, "export", run, "--out", tmp_path / "s.onnx"]
    ended = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == "stopped"
    assert list(tmp_path.iterdir()) == []
