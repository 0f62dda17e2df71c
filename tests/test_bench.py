"""`kdcache bench`: its figures, its JSON, and what it does with half a cache."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

from kdcache.bench import _usable, bench, read_floor
from kdcache.cache.reader import Cache
from kdcache.cli import main
from kdcache.config import TrainConfig
from kdcache.costs import Cost, costs, ratios
from kdcache.errors import CacheError, ModelError, RunError
from kdcache.precompute.dataset import folder_dataset
from kdcache.precompute.extract import extract
from kdcache.report import costs_text
from kdcache.standins import TAP, save_detector
from kdcache.train.loader import wanted_arrays
from kdcache.train.loop import train
from kdcache.train.prepare import find_taps


def test_the_command_tells_rates_sizes_and_latency(cache, standins, tmp_path):
    config = TrainConfig(encoder_weights="random", epochs=1, projection_hidden_dim=16)
    trained = train(cache.path, tmp_path / "run", config, device="cpu").run
    flags = ["--run", trained, "--teacher", standins.teacher, "--steps", 2, "--device", "cpu"]
    result = CliRunner().invoke(main, ["bench", *map(str, [cache.path, *flags]), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    for key in ("loader_rows_per_s", "floor_rows_per_s", "decoded_rows_per_s", "images_per_s"):
        assert found[key] > 0, key
    assert 0 < found["loader_of_floor"] < 2
    assert 0 <= found["data_wait_fraction"] < 1
    measured = {(cost["network"], cost["runtime"]): cost for cost in found["costs"]}
    assert set(measured) == {
        ("student", "PyTorch"),
        ("student", "ONNX Runtime"),
        ("teacher", "ONNX Runtime"),
    }
    for (network, _), cost in measured.items():
        assert cost["device"] == "cpu"
        assert cost["parameters"] == (6_251_469 if network == "student" else 4)
        assert cost["size_bytes"] == 4 * cost["parameters"]
        assert 0 < cost["latency_ms"] <= cost["latency_p95_ms"]
        assert cost["runs"] >= 10
    # the weights, at least, have to be somewhere
    assert measured["student", "PyTorch"]["memory_bytes"] > 25e6
    text = CliRunner().invoke(main, ["bench", str(cache.path), "--steps", "0"]).stdout
    assert "of the floor" in text
    assert "training" not in text


def test_row_bytes_are_those_that_the_losses_use(cache, standins, tmp_path):
    whole = bench(cache, steps=0, device="cpu")
    assert whole.step_s is None
    assert whole.costs == []
    standins.extract(tmp_path / "c", store="logits", yolo_onnx_path=None)
    half = bench(Cache(tmp_path / "c"), steps=1, device="cpu")
    assert half.row_bytes < whole.row_bytes
    assert half.images_per_s > 0


def test_taps_that_the_student_has_no_map_for_are_left_out(standins, tmp_path):
    """There is no --set in bench; the encoder has nothing at stride 1."""
    save_detector(tmp_path / "d.onnx", channels=2)
    model = onnx.load(tmp_path / "d.onnx")
    model.graph.node.append(onnx.helper.make_node("Relu", ["images"], ["fine"]))
    onnx.save(model, tmp_path / "d.onnx")
    for taps, kept in ((("fine", TAP), [TAP]), (("fine",), [])):
        out = tmp_path / str(len(taps))
        settings = {"yolo_onnx_path": tmp_path / "d.onnx", "yolo_target_layer": taps}
        standins.extract(out, limit=4, val_fraction=0.0, **settings)
        config = _usable(TrainConfig(), Cache(out))
        assert ([tap.name for tap in find_taps(Cache(out), config)], config.feature_weight > 0) == (
            kept,
            bool(kept),
        )


def test_the_floor_reads_every_byte(cache, monkeypatch):
    """Less would make the loader look slow; its bytes decompress to the rows' own."""
    import kdcache.bench as engine

    arrays, found = wanted_arrays(cache, cache.taps, True), []
    decompress = engine.decompress

    def noted(compressed, compression, out):
        decompress(compressed, compression, out)
        found.append(out.tobytes())

    monkeypatch.setattr(engine, "decompress", noted)
    for _ in read_floor(cache, [3], arrays, 1, 2):
        pass
    for array, data in zip(arrays, found, strict=True):
        out = np.empty(cache.specs[array].stored.shape, cache.specs[array].stored.dtype)
        cache.read_stored(3, array, out)
        assert out.tobytes() == data


def test_a_cache_without_training_rows_is_one_error(standins, tmp_path):
    dataset = folder_dataset(standins.images, standins.masks)
    config = standins.config(val_fraction=0.0)
    extract(config, dataset, tmp_path / "c", split="val", limit=2, device="cpu")
    with pytest.raises(CacheError, match="no rows of split 'train'"):
        bench(Cache(tmp_path / "c"), steps=0, device="cpu")


def test_a_run_that_was_compiled_needs_a_compiler_here_too(cache, tmp_path, monkeypatch):
    config = TrainConfig(encoder_weights="random", epochs=1, projection_hidden_dim=16)
    trained = train(cache.path, tmp_path / "run", config, device="cpu").run
    (trained / "config.toml").write_text(config.model_copy(update={"compile": True}).to_toml())

    def no_compiler(graph, inputs):
        raise RuntimeError("g++ is not there")

    monkeypatch.setattr("kdcache.train.step._COMPILER", no_compiler)
    with pytest.raises(RunError, match=r"compile = true: .*g\+\+ is not there"):
        bench(cache, run=trained, steps=1, device="cpu")


def cost(network, runtime, latency_ms, parameters):
    return Cost(
        network=network,
        runtime=runtime,
        device="cpu",
        parameters=parameters,
        size_bytes=4 * parameters,
        latency_ms=latency_ms,
        latency_p95_ms=latency_ms,
        runs=10,
        memory_bytes=0,
    )


def test_the_design_documents_claims_are_rows_of_what_was_measured():
    found = [
        cost("student", "PyTorch", 20.0, 6_250_000),
        cost("student", "ONNX Runtime", 10.0, 6_250_000),
        cost("teacher", "PyTorch", 60.0, 13_160_000),
    ]
    assert ratios(found) == [
        ("faster, PyTorch on cpu", 3.0, 2.5),
        ("smaller", pytest.approx(0.525, abs=1e-3), 0.5),
    ]
    lines = costs_text(found).splitlines()
    assert lines[-2].split()[-2:] == ["3.00×", "2.50×"]
    assert lines[-1].split()[-2:] == ["53%", "50%"]


def test_a_teachers_checkpoint_is_measured_in_both_runtimes(cache, tmp_path):
    """Its graph is made here; a small encoder, for time."""
    import segmentation_models_pytorch as smp

    torch.save(smp.Unet("resnet18", encoder_weights=None).state_dict(), tmp_path / "t.pth")
    found = costs(cache, None, tmp_path / "t.pth", "cpu", teacher_encoder="resnet18")
    assert [c.runtime for c in found] == ["PyTorch", "ONNX Runtime"]
    assert all(c.parameters > 14e6 and c.memory_bytes > 50e6 for c in found)


def test_an_exported_student_has_no_pytorch_to_measure(cache, tmp_path):
    (tmp_path / "s.onnx").write_bytes(b"")
    with pytest.raises(ModelError):
        costs(cache, tmp_path / "s.onnx", None, "cpu")


def test_a_student_of_another_size_is_refused(cache, standins, tmp_path):
    config = TrainConfig(encoder_weights="random", epochs=1, feature_weight=0.0)
    trained = train(cache.path, tmp_path / "run", config, device="cpu").run
    standins.extract(tmp_path / "larger", size=96, limit=2)
    with pytest.raises(RunError, match="takes 64 px.*holds 96"):
        costs(Cache(tmp_path / "larger"), trained, standins.teacher, "cpu")
