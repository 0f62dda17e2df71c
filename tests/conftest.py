"""Shared fixtures: small stand-ins, a cache extracted from them, and the real data where it lies."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from kdcache import places
from kdcache.cache import codecs
from kdcache.cache.format import RowKey, describe_row
from kdcache.cache.layout import IMAGE, LOGITS, MASK, ROWS, Group, Manifest, TapSpec
from kdcache.cache.reader import Cache
from kdcache.config import ExtractConfig, TrainConfig
from kdcache.deploy.export import export
from kdcache.places import Url, place_of
from kdcache.precompute.dataset import folder_dataset
from kdcache.precompute.extract import ExtractReport, extract
from kdcache.standins import save_detector, save_scenes, save_teacher
from kdcache.train import loop

# No test is timed (other work may share the machine), and every run tries the same examples.
settings.register_profile("kdcache", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("kdcache")

SIZE = 64
SCENES = 10
CHANNELS = 8  # half of the tap's


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The folder of real photos and models; tests that need it skip where it is absent."""
    default = Path(__file__).parents[2] / "shared" / "realdata"
    folder = Path(os.environ.get("KDCACHE_REALDATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder


@dataclass(frozen=True)
class Standins:
    """Stand-in models and scenes on disk."""

    folder: Path

    @property
    def detector(self) -> Path:
        return self.folder / "detector.onnx"

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher.onnx"

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def masks(self) -> Path:
        return self.folder / "masks"

    def config(self, **changes: object) -> ExtractConfig:
        settings = {
            "yolo_onnx_path": self.detector,
            "teacher_checkpoint": self.teacher,
            "size": SIZE,
            "val_fraction": 0.3,
            "shard_rows": 3,
        }
        return ExtractConfig(**(settings | changes))

    def extract(self, out: Path, *, limit: int | None = None, **changes: object) -> ExtractReport:
        dataset = folder_dataset(self.images, self.masks)
        return extract(self.config(**changes), dataset, out, device="cpu", limit=limit)


@pytest.fixture(scope="session")
def standins(tmp_path_factory: pytest.TempPathFactory) -> Standins:
    folder = tmp_path_factory.mktemp("standins")
    save_detector(folder / "detector.onnx", channels=CHANNELS)
    save_teacher(folder / "teacher.onnx")
    save_scenes(folder, SCENES, 90, 120)
    return Standins(folder)


@pytest.fixture(scope="session")
def cache(standins: Standins, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache of the stand-in scenes, never to be written to."""
    path = tmp_path_factory.mktemp("cache") / "scenes.zarr"
    standins.extract(path)
    return Cache(path)


def rows_equal(a: Cache, b: Cache) -> bool:
    """The rows of two caches by key, every array byte for byte."""
    ours, theirs = ({key: i for i, key in enumerate(cache.keys)} for cache in (a, b))
    arrays = [spec.path for spec in a.manifest.arrays()]
    return ours.keys() == theirs.keys() and all(
        a.read(ours[key], path).tobytes() == b.read(theirs[key], path).tobytes()
        for key in ours
        for path in arrays
    )


TAP = TapSpec(
    name="/head/Concat_output_0",
    precision="int8",
    shape=(6, 4, 4),
    groups=(Group(1, ((3, 5),)), Group(2, ((0, 3), (5, 6)))),
)
MANIFEST = Manifest(
    size_px=32,
    shard_rows=3,
    compression="zstd",
    logits_dtype="float16",
    taps=(TAP,),
    fingerprint={"yolo_sha256": "aaaa", "size": "32"},
    versions={"numpy": np.__version__},
)


def repeating(feature_CHW: np.ndarray, tap: TapSpec) -> np.ndarray:
    """The feature map with each block of the tap's coarser channels filled with its first value."""
    feature_CHW = feature_CHW.copy()
    for factor, ranges in tap.groups:
        for start, stop in ranges:
            coarse = feature_CHW[start:stop, ::factor, ::factor]
            feature_CHW[start:stop] = coarse.repeat(factor, axis=1).repeat(factor, axis=2)
    return feature_CHW


def make_row(
    number: int, split: str = "train", manifest: Manifest = MANIFEST
) -> tuple[RowKey, dict[str, np.ndarray]]:
    """A row of random content that depends on its number alone."""
    rng = np.random.default_rng(number)
    size = manifest.size_px
    key = RowKey(split, f"photos/{number}.jpg", 0)
    features = {}
    for tap in manifest.taps:
        values = repeating(rng.normal(size=tap.shape).astype(np.float32), tap)
        encoded = codecs.encode(values, tap)
        features |= {f"{tap.folder}/{name}": array for name, array in encoded.items()}
    return key, {
        IMAGE: rng.integers(0, 256, (size, size, 3), np.uint8),
        MASK: rng.integers(0, 2, (size, size), np.uint8),
        LOGITS: rng.normal(size=(size, size)).astype(manifest.logits_dtype),
        ROWS: describe_row(key, {"source_bytes": number}),
        **features,
    }


@pytest.fixture
def free_port() -> int:
    """A port that nothing listened on a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


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


@pytest.fixture(scope="module")
def store() -> Iterator[Any]:
    """A local S3-compatible server that can be told to fail: a `stores.Store`."""
    from stores import Store  # here only: it takes long to load

    server = Store()
    before = {name: os.environ.get(name) for name in server.environment}
    os.environ.update(server.environment)
    places._filesystem_of.cache_clear()
    yield server
    places._filesystem_of.cache_clear()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    server.close()


@pytest.fixture
def bucket(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Url]:
    """A folder in a healthy store, with short waits between attempts."""
    monkeypatch.chdir(tmp_path)  # pictures of caches there are drawn in the current folder
    monkeypatch.setattr(places, "_FIRST_WAIT_S", 0.01)
    store.heal()
    url = place_of(f"s3://{store.new_bucket()}/data")
    assert isinstance(url, Url)
    yield url
    store.heal()
