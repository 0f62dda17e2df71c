"""One short run of the stand-in cache, and its student exported, for all tests of `deploy/`."""

from __future__ import annotations

import pytest

from kdcache.config import TrainConfig
from kdcache.deploy.export import export
from kdcache.train import loop


@pytest.fixture(scope="session")
def run(cache, tmp_path_factory):
    """A finished run of two epochs, never to be written to."""
    path = tmp_path_factory.mktemp("runs") / "run"
    settings = TrainConfig(
        encoder_weights="random",
        epochs=2,
        batch_size=4,
        learning_rate=3e-3,
        temperature=4.0,
        final_temperature=2.0,
        temperature_schedule="cosine",
    )
    loop.train(cache.path, path, settings, device="cpu")
    return path


@pytest.fixture(scope="session")
def exported(run, cache, tmp_path_factory):
    """The run exported, once: torch's exporter takes 10 s."""
    return export(run, tmp_path_factory.mktemp("export") / "student.onnx", cache)


@pytest.fixture(scope="session")
def deployable(run, cache, tmp_path_factory):
    """The run at 8 bits with its preprocessing."""
    out = tmp_path_factory.mktemp("export") / "photos_int8.onnx"
    return export(run, out, cache, precision="int8", preprocessing=True, calibration_rows=4)
