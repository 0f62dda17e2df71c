"""Short trainings from the stand-in cache, and what they leave, for the tests of `train/`."""

from __future__ import annotations

import hashlib
import json

from kdcache.config import TrainConfig
from kdcache.train import loop
from kdcache.train.run_folder import read_checkpoint

FAST = {"encoder_weights": "random", "epochs": 3, "batch_size": 3, "learning_rate": 3e-3}


def config(**changes):
    return TrainConfig(**(FAST | changes))


def train(cache, run, resume=False, **changes):
    return loop.train(cache.path, run, config(**changes), device="cpu", resume=resume)


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
