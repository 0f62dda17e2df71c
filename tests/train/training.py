"""Short trainings, from the stand-in cache or one of several taps, and what they leave."""

from __future__ import annotations

import hashlib
import json
import os
import signal

import numpy as np
import pytest
from conftest import MANIFEST, make_row

from kdcache.cache.format import RowKey, describe_row
from kdcache.cache.layout import IMAGE, LOGITS, ROWS, Manifest, TapSpec, whole
from kdcache.cache.reader import Cache
from kdcache.cache.writer import CacheWriter
from kdcache.config import TrainConfig
from kdcache.imaging import INTERPOLATION
from kdcache.train import loop
from kdcache.train.run_folder import read_checkpoint

FAST = {"encoder_weights": "random", "epochs": 3, "batch_size": 3, "learning_rate": 3e-3}
TAPPED_PX = 64


def config(**changes):
    return TrainConfig(**(FAST | changes))


def train(cache, run, resume=False, **changes):
    return loop.train(cache.path, run, config(**changes), device="cpu", resume=resume)


def tap_at(stride, channels=6, size=TAPPED_PX, name=None):
    """A tap `/neck/pSTRIDE`, whose maps are stored in full."""
    shape = (channels, size // stride, size // stride)
    name = name or f"/neck/p{stride}"
    return TapSpec(name=name, precision="int8", shape=shape, groups=whole(channels))


def tapped_cache(path, *strides, rows=6, val=2, logits=True):
    """A cache of random rows with a tap at each stride, the later the more channels."""
    manifest = Manifest(
        **vars(MANIFEST)
        | {
            "size_px": TAPPED_PX,
            "logits_dtype": "float16" if logits else None,
            "taps": tuple(tap_at(stride, 6 + 2 * n) for n, stride in enumerate(strides)),
            "fingerprint": {
                "size": str(TAPPED_PX),
                "resize": "stretch",
                "interpolation": INTERPOLATION,
            },
        }
    )
    with CacheWriter(path, manifest) as writer:
        for number in range(rows):
            key, arrays = make_row(number, "val" if number >= rows - val else "train", manifest)
            if not logits:
                del arrays[LOGITS]
            writer.append(writer.encoded(key, arrays))
    return Cache(path)


def metrics(run):
    """What training decides, without what the clock decides."""
    timings = {"images_per_s", "step_ms", "data_wait_ms", "epoch_s"}
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timings} for line in lines]


def state_digest(run):
    """Weights, optimiser and random state of the last checkpoint."""
    state = read_checkpoint(run / "checkpoints/last.pt")
    digest = hashlib.sha256()
    for name in ("student", "projections"):
        for tensor in (state[name] or {}).values():
            digest.update(tensor.numpy().tobytes())
    for moments in state["optimizer"]["state"].values():
        for value in moments.values():
            digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def with_views(cache, path, views):
    """A cache of the same rows, and of the row with key k `views(k)` views, of other pixels each."""
    with CacheWriter(path, cache.manifest) as writer:
        for index, row in enumerate(cache):
            arrays = {name: cache.read(index, name) for name in cache.specs}
            details = {k: v for k, v in row.details.items() if k not in RowKey._fields}
            for view in range(views(row.key)):
                key = row.key._replace(view=view)
                image = np.roll(arrays[IMAGE], 3 * view, axis=(0, 1))
                new = {IMAGE: image, ROWS: describe_row(key, details)}
                writer.append(writer.encoded(key, arrays | new))
    return Cache(path)


def assert_resumes_bit_for_bit(cache, folder, step, **changes):
    """A run stopped while it takes that step (from 0), then resumed, is one that was not stopped."""
    train(cache, folder / "whole", **changes)
    take_step, steps = loop.take_step, iter(range(999))

    def stopping(*arguments):
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "take_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(cache, folder / "run", **changes)
    train(cache, folder / "run", resume=True, **changes)
    assert state_digest(folder / "run") == state_digest(folder / "whole")
    assert metrics(folder / "run") == metrics(folder / "whole")
