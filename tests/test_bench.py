"""`kdcache bench`: its figures, its JSON, and what it does with half a cache."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from kdcache.bench import bench, read_floor
from kdcache.cache.reader import Cache
from kdcache.cli import main
from kdcache.config import TrainConfig
from kdcache.errors import CacheError, RunError
from kdcache.precompute.dataset import folder_dataset
from kdcache.precompute.extract import extract
from kdcache.train.loader import wanted_arrays
from kdcache.train.loop import train


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
    assert found["student"]["parameters"] == 6_251_469
    assert found["student"]["size_bytes"] == 4 * found["student"]["parameters"]
    assert found["teacher"]["parameters"] == 4
    assert found["teacher"]["latency_ms"] > 0
    text = CliRunner().invoke(main, ["bench", str(cache.path), "--steps", "0"]).stdout
    assert "of the floor" in text
    assert "training" not in text


def test_row_bytes_are_those_that_the_losses_use(cache, standins, tmp_path):
    whole = bench(cache, steps=0, device="cpu")
    assert whole.student is whole.teacher is whole.step_s is None
    standins.extract(tmp_path / "c", store="logits", yolo_onnx_path=None)
    half = bench(Cache(tmp_path / "c"), steps=1, device="cpu")
    assert half.row_bytes < whole.row_bytes
    assert half.images_per_s > 0


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
