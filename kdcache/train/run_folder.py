"""What a run keeps on disk, and how it goes on after a stop.

RUN/config.toml            resolved settings, read back by --config
RUN/run.json               the cache, the shards seen, the tap, versions
RUN/metrics.jsonl          one line an epoch
RUN/checkpoints/last.pt    everything a resume needs; best.pt the same of the best epoch
RUN/student_best.safetensors  RUN/student_last.safetensors
RUN/visualizations/        overlay pictures
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kdcache
from kdcache.cache.layout import TapSpec
from kdcache.cache.reader import Cache
from kdcache.config import TrainConfig, load
from kdcache.durable import replacing, write_atomic
from kdcache.errors import RunError
from kdcache.train.student import Projection, Student
from kdcache.train.weights import read_student, save_student

# What `start_run` makes before run.json: all that a stop in between leaves.
_BEFORE_RUN = {"checkpoints", "visualizations", "config.toml"}


@dataclass(kw_only=True)
class State:
    """All that changes while training."""

    student: Student
    projection: Projection | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    history: list[dict[str, Any]] = field(default_factory=list)  # metrics of each finished epoch

    @property
    def best_epoch(self) -> int:
        """1-based epoch of the highest validation mIoU; the last one where there is none."""
        scored = [
            (metrics["val_student_miou"], metrics["epoch"])
            for metrics in self.history
            if metrics.get("val_student_miou") is not None
        ]
        # the earliest of equals
        return max(scored, key=lambda pair: (pair[0], -pair[1]))[1] if scored else len(self.history)


def open_run(run: Path, config: TrainConfig, resume: bool) -> dict[str, Any]:
    """The record of the run to resume, or an empty one for a new run.

    Raises RunError when a new run would overwrite one, or a resume would change its settings.
    """
    exists = (run / "run.json").exists()
    if not resume:
        if exists:
            raise RunError(f"{run} holds a run: continue it with --resume, or choose another --out")
        if run.exists() and (not run.is_dir() or {p.name for p in run.iterdir()} - _BEFORE_RUN):
            raise RunError(f"{run} exists and is not a run folder; choose another --out")
        return {}
    if not exists:
        raise RunError(f"{run} holds no run to resume; start one without --resume")
    stored = read_config(run)
    for name in TrainConfig.model_fields:
        old, new = getattr(stored, name), getattr(config, name)
        if old != new:
            raise RunError(
                f"{run} was started with {name} = {old}, now {new} was asked for; "
                "a resume keeps its settings: leave that setting out, or start another run"
            )
    return read_record(run)


def check_cache(
    run: Path, record: dict[str, Any], cache: Cache, may_differ: Collection[str] = ()
) -> None:
    """Raise RunError when a run meets a cache of other models or preprocessing than its own."""
    fingerprint = cache.manifest.fingerprint
    for name, old in record["fingerprint"].items():
        if name not in may_differ and fingerprint.get(name) != old:
            raise RunError(
                f"{run} was started from a cache with {name} = {old}, {cache.path} has "
                f"{fingerprint.get(name)}; use a cache made as the run's own was"
            )


def start_run(run: Path, config: TrainConfig, cache: Cache, tap: TapSpec | None) -> None:
    """Lay out the folder; `run.json` comes last and makes it a run."""
    for name in ("checkpoints", "visualizations"):
        (run / name).mkdir(parents=True, exist_ok=True)
    write_atomic(run / "config.toml", config.to_toml().encode())
    record = {
        "cache": str(cache.path),
        "fingerprint": dict(cache.manifest.fingerprint),
        "shards": [commit.shard for commit in cache.commits],
        "tap": tap.name if tap else None,
        "versions": {"kdcache": kdcache.__version__, "torch": torch.__version__},
    }
    write_atomic(run / "run.json", json.dumps(record, indent=1).encode())


def save_epoch(run: Path, state: State, config: TrainConfig, cache: Cache) -> None:
    """Write what the finished epoch leaves; each file is whole or absent, `last.pt` decides."""
    metadata = {
        "encoder": config.student_encoder,
        "size_px": cache.manifest.size_px,
        "resize": cache.manifest.fingerprint["resize"],
        "epoch": len(state.history),
        "kdcache": kdcache.__version__,
    }
    content = {
        "student": state.student.unet.state_dict(),
        "projection": state.projection.state_dict() if state.projection is not None else None,
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "history": state.history,
        "rng": torch.get_rng_state(),
        "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    kinds = ["best", "last"] if state.best_epoch == len(state.history) else ["last"]
    for kind in kinds:
        save_student(run / f"student_{kind}.safetensors", state.student.unet, metadata)
        with replacing(run / "checkpoints" / f"{kind}.pt") as temporary:
            torch.save(content, temporary)
    write_metrics(run, state)


def write_metrics(run: Path, state: State) -> None:
    """Write metrics.jsonl anew from the history, so that a resume leaves no line twice."""
    lines = (json.dumps(metrics) + "\n" for metrics in state.history)
    write_atomic(run / "metrics.jsonl", "".join(lines).encode())


def restore(run: Path, state: State) -> None:
    """Put `state` back where the last finished epoch left it; at the start if none was finished."""
    path = run / "checkpoints" / "last.pt"
    if not path.exists():
        return
    content = read_checkpoint(path)
    state.student.unet.load_state_dict(content["student"])
    if state.projection is not None:
        state.projection.load_state_dict(content["projection"])
    state.optimizer.load_state_dict(content["optimizer"])
    state.scaler.load_state_dict(content["scaler"])
    state.history[:] = content["history"]
    torch.set_rng_state(content["rng"])
    if content["rng_cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(content["rng_cuda"])
    write_metrics(run, state)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU, without running code in it."""
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise RunError(f"{path}: no such checkpoint; has the run finished an epoch?") from error
    except Exception as error:  # torch raises many kinds
        raise RunError(f"{path} is damaged ({error}); start the run again") from error
    return content


def read_record(run: Path) -> dict[str, Any]:
    """What a run was started from: cache, fingerprint, shards, tap, versions."""
    try:
        record: dict[str, Any] = json.loads((run / "run.json").read_text())
    except (OSError, ValueError) as error:
        raise RunError(
            f"{run} is not a run folder: its run.json cannot be read: {error}"
        ) from error
    return record


def read_config(run: Path) -> TrainConfig:
    """The settings a run was trained with."""
    if not (run / "config.toml").is_file():
        raise RunError(f"{run} is not a run folder: it has no config.toml; see `kdcache train -h`")
    return load(TrainConfig, str(run / "config.toml"))


def read_best_student(run: Path) -> tuple[Student, dict[str, Any]]:
    """The best student of a run and its metadata, in eval mode on the CPU."""
    read_config(run)
    tensors, metadata = read_student(run / "student_best.safetensors")
    student = Student(metadata["encoder"])
    student.unet.load_state_dict(tensors)
    return student.eval(), metadata


def read_best_projection(run: Path, student: Student) -> nn.Module | None:
    """The projection of the best epoch, None when the run trained without features."""
    weights = read_checkpoint(run / "checkpoints" / "best.pt")["projection"]
    if weights is None:
        return None
    hidden, target_channels = weights["0.weight"].shape[0], weights["3.weight"].shape[0]
    projection = Projection(student.tap_channels, hidden, target_channels)
    projection.load_state_dict(weights)
    return projection.eval()
