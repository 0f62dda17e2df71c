"""A cache and an online run see the same numbers: 20 steps of both, compared bit for bit."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdcache.cache.reader import Cache
from kdcache.config import TrainConfig
from kdcache.train import loop
from kdcache.train.step import read
from kdcache.train.student import build_student


@pytest.fixture(scope="module")
def reference():
    path = Path(__file__).parents[1] / "benchmarks/reference_trainer.py"
    spec = importlib.util.spec_from_file_location("reference_trainer", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["reference_trainer"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["reference_trainer"]


def test_20_steps_from_a_float32_cache_equal_20_online(standins, reference, tmp_path, monkeypatch):
    standins.extract(tmp_path / "c", precision="float32", val_fraction=0.0)
    cache = Cache(tmp_path / "c")
    config = TrainConfig(encoder_weights="random", epochs=4, batch_size=2)
    steps, take_step = [], loop.take_step

    def recorded(*arguments):
        taken = take_step(*arguments)
        steps.extend(read([taken]))
        return taken

    monkeypatch.setattr(loop, "take_step", recorded)
    loop.train(cache.path, tmp_path / "run", config, device="cpu")
    torch.manual_seed(config.seed)
    encoder = build_student(config.student_encoder, "random").unet.encoder.state_dict()
    online = reference.Online(
        images=[standins.images / sample for sample in cache.samples],
        masks=[standins.masks / f"{Path(sample).stem}.png" for sample in cache.samples],
        detector=standins.detector,
        tap=cache.taps[0],
        teacher=standins.teacher,
        size=cache.manifest.size_px,
        batch_size=config.batch_size,
        epochs=config.epochs,
    )
    student = online.train()
    assert len(online.losses) == len(steps) == 20
    for ours, theirs in zip(steps, online.losses, strict=True):
        assert {name: ours[name] for name in theirs} == theirs
    cached = load_file(tmp_path / "run/student_last.safetensors")
    assert cached.keys() == student.keys()
    assert all(torch.equal(cached[name], tensor) for name, tensor in student.items())
    assert all(torch.equal(student[f"encoder.{name}"], tensor) for name, tensor in encoder.items())
