"""What a run keeps on disk, and how it goes on after a stop.

RUN/config.toml            resolved settings, read back by --config
RUN/run.json               the cache, the commits seen, the taps, versions
RUN/metrics.jsonl          one line an epoch
RUN/checkpoints/last.pt    everything a resume needs; best.pt the same of the best epoch
RUN/student_best.safetensors  RUN/student_last.safetensors
RUN/logs/                  TensorBoard events
RUN/visualizations/        a picture of some validation rows an epoch
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import kdcache
from kdcache.cache.format import read_root
from kdcache.cache.layout import TapSpec
from kdcache.cache.reader import Cache
from kdcache.config import TrainConfig, load
from kdcache.durable import TEMPORARY_SUFFIX, lock, write_atomic
from kdcache.errors import RunError
from kdcache.places import Place
from kdcache.train.projection import Projection, Projections
from kdcache.train.student import Student, TapPoint
from kdcache.train.weights import read_student, save_student

log = logging.getLogger(__name__)

# What `start_run` makes before run.json: all that a stop in between leaves.
_BEFORE_RUN = {"checkpoints", "visualizations", "logs", "config.toml"}

_RECORD = ("cache", "fingerprint", "commits", "taps", "versions")


@dataclass(kw_only=True)
class State:
    """All that changes while training."""

    student: Student
    projections: Projections | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    history: list[dict[str, Any]] = field(default_factory=list)  # metrics of each finished epoch
    steps: int = 0  # taken in the epoch after those
    sums: dict[str, float] = field(default_factory=dict)  # what that epoch's metrics come from
    processes: int = 1  # that share each step's rows

    @property
    def best_epoch(self) -> int:
        """As `best_epoch` has it."""
        return best_epoch(self.history)


def best_epoch(history: Sequence[Mapping[str, Any]]) -> int:
    """1-based epoch of the highest validation mIoU; the last one where there is none."""
    scored = [
        (metrics["val_student_miou"], metrics["epoch"])
        for metrics in history
        if metrics.get("val_student_miou") is not None
    ]
    # the earliest of equals
    return max(scored, key=lambda pair: (pair[0], -pair[1]))[1] if scored else len(history)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The metrics of each finished epoch, as far as they are written; none before the first."""
    try:
        text = (run / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise RunError(f"{run}: its metrics.jsonl is damaged: {error}") from error


def open_run(run: Path, config: TrainConfig, resume: bool, extend: bool = False) -> dict[str, Any]:
    """The record of the run to resume, or an empty one for a new run.

    Raises RunError when a new run would overwrite one, or a resume would change its settings:
    only `extend` lets it have more epochs.
    """
    exists = (run / "run.json").exists()
    if not resume:
        if exists:
            raise RunError(f"{run} holds a run: continue it with --resume, or choose another --out")
        if run.exists() and (not run.is_dir() or any(not _is_before_run(p) for p in run.iterdir())):
            raise RunError(f"{run} exists and is not a run folder; choose another --out")
        return {}
    if not exists:
        raise RunError(f"{run} holds no run to resume; start one without --resume")
    stored = read_config(run)
    for name in TrainConfig.model_fields:
        old, new = getattr(stored, name), getattr(config, name)
        if old == new or (name == "epochs" and extend and new > old):
            continue
        if name == "encoder_weights":  # they were the start, and are not read again
            continue
        way_out = "leave that setting out, or start another run"
        if name == "epochs":
            way_out = "leave --epochs out, or give more of them and --extend"
        raise RunError(
            f"{run} was started with {name} = {old}, now {new} was asked for; "
            f"a resume keeps its settings: {way_out}"
        )
    return read_record(run)


def _is_before_run(path: Path) -> bool:
    """Whether a stop before there was a run may have left this."""
    return path.name in _BEFORE_RUN or path.name.endswith(TEMPORARY_SUFFIX)


@contextmanager
def claimed(run: Path) -> Iterator[None]:
    """Keep other processes from training in the folder while the block lasts.

    Makes the folder, and removes it again if nothing was put there. Raises RunError when another
    process has it.
    """
    run.mkdir(parents=True, exist_ok=True)
    descriptor = lock(run)
    if descriptor is None:
        raise RunError(f"{run}: another process is training there; wait for it, or stop it")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            run.rmdir()
        os.close(descriptor)


def check_cache(
    run: Path, record: dict[str, Any], path: Place, may_differ: Collection[str] = ()
) -> None:
    """Raise RunError when a run meets a cache of other models or preprocessing than its own."""
    fingerprint = read_root(path).manifest.fingerprint
    for name, old in record["fingerprint"].items():
        if name not in may_differ and fingerprint.get(name) != old:
            raise RunError(
                f"{run} was started from a cache with {name} = {old}, {path} has "
                f"{fingerprint.get(name)}; use a cache made as the run's own was"
            )


def start_run(
    run: Path, config: TrainConfig, cache: Cache, taps: Sequence[TapSpec], state: State
) -> None:
    """Lay out the folder with the untrained state; `run.json` comes last and makes it a run."""
    for name in ("checkpoints", "visualizations", "logs"):
        (run / name).mkdir(parents=True, exist_ok=True)
    write_config(run, config)
    save_progress(run, state)
    record = {
        "cache": str(cache.path),
        "fingerprint": dict(cache.manifest.fingerprint),
        "commits": {str(commit.shard): commit.sha256 for commit in cache.commits},
        "taps": [
            {"name": tap.name, "student_tap": point.part, "stride": point.stride}
            for tap, point in zip(taps, state.student.points, strict=True)
        ],
        "versions": {"kdcache": kdcache.__version__, "torch": torch.__version__},
    }
    write_atomic(run / "run.json", json.dumps(record, indent=1).encode())


def write_config(run: Path, config: TrainConfig) -> None:
    """Write the resolved settings, as `--config` reads them back."""
    write_atomic(run / "config.toml", config.to_toml().encode())


def seen_cache(run: Path, record: dict[str, Any], path: Place) -> Cache:
    """The cache with the rows that a run started with, whatever was added since.

    Raises RunError when those rows are gone, or others are in their place.
    """
    check_cache(run, record, path)
    if (then := record["versions"].get("torch")) != torch.__version__:
        log.warning("%s was started with torch %s, this is %s", run, then, torch.__version__)
    cache = Cache(path, shards=[int(shard) for shard in record["commits"]])
    for commit in cache.commits:
        if commit.sha256 != record["commits"][str(commit.shard)]:
            raise RunError(
                f"{path}: the rows of shard {commit.shard} are not those that {run} was started "
                "with; use the cache it was started from, or start another run"
            )
    return cache


def save_progress(run: Path, state: State) -> None:
    """Write all that a resume needs; the file is whole or the one before."""
    _save_checkpoint(run / "checkpoints" / "last.pt", state)


def save_epoch(run: Path, state: State, config: TrainConfig, cache: Cache) -> None:
    """Write what the finished epoch leaves; each file is whole or absent, `last.pt` decides."""
    metadata = {
        "encoder": config.student_encoder,
        "size_px": cache.manifest.size_px,
        "resize": cache.manifest.fingerprint["resize"],
        "interpolation": cache.manifest.fingerprint["interpolation"],
        "temperature": config.last_temperature,
        "kl_scale": config.kl_scale,
        "epoch": len(state.history),
        "kdcache": kdcache.__version__,
    }
    kinds = ["best", "last"] if state.best_epoch == len(state.history) else ["last"]
    for kind in kinds:
        save_student(run / f"student_{kind}.safetensors", state.student.unet, metadata)
        _save_checkpoint(run / "checkpoints" / f"{kind}.pt", state)
    write_metrics(run, state)


def _save_checkpoint(path: Path, state: State) -> None:
    content = {
        "student": state.student.unet.state_dict(),
        "projections": state.projections.state_dict() if state.projections is not None else None,
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "history": state.history,
        "steps": state.steps,
        "sums": state.sums,
        "processes": state.processes,
    }
    # through memory: of a full disk torch makes an internal error, the file system an OSError
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomic(path, buffer.getvalue())


def write_metrics(run: Path, state: State) -> None:
    """Write metrics.jsonl anew from the history, so that a resume leaves no line twice."""
    lines = (json.dumps(metrics) + "\n" for metrics in state.history)
    write_atomic(run / "metrics.jsonl", "".join(lines).encode())


def restore(run: Path, state: State) -> None:
    """Put `state` back to where the last checkpoint left it."""
    path = run / "checkpoints" / "last.pt"
    content = read_checkpoint(path)
    try:
        state.student.unet.load_state_dict(content["student"])
        if state.projections is not None:
            state.projections.load_state_dict(content["projections"])
        state.optimizer.load_state_dict(content["optimizer"])
        state.scaler.load_state_dict(content["scaler"])
        state.history[:] = content["history"]
        state.steps, state.sums = content["steps"], content["sums"]
        state.processes = content["processes"]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise RunError(
            f"{path} is no checkpoint of this run ({type(error).__name__}: {error}); put the run's "
            "own back, or start another run"
        ) from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU, without running code in it."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not look at the checksums in it
            damaged = archive.testzip()
        if damaged is None:
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return content
    except FileNotFoundError as error:
        raise RunError(
            f"{path}: no such checkpoint: put it back, or start another run (--init-from begins "
            "with this one's best student)"
        ) from error
    except Exception as error:  # zipfile and torch raise many kinds, torch with a page of advice
        damaged = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"{path} is damaged ({damaged}); start another run") from error
    raise RunError(f"{path} is damaged (the checksum of {damaged}); start another run")


def read_record(run: Path) -> dict[str, Any]:
    """What a run was started from: cache, fingerprint, shards, taps, versions."""
    try:
        record: dict[str, Any] = json.loads((run / "run.json").read_text())
        missing = [name for name in _RECORD if name not in record]
    except (OSError, ValueError, TypeError) as error:
        raise RunError(
            f"{run} is not a run folder: its run.json cannot be read: {error}"
        ) from error
    if missing or not isinstance(record, dict):
        raise RunError(f"{run}: its run.json has no {', '.join(missing) or 'fields'}; put it back")
    return record


def read_config(run: Path) -> TrainConfig:
    """The settings a run was trained with."""
    if not (run / "config.toml").is_file():
        raise RunError(f"{run} is not a run folder: it has no config.toml; see `kdcache train -h`")
    return load(TrainConfig, str(run / "config.toml"))


def read_best_student(run: Path, with_taps: bool = False) -> tuple[Student, dict[str, Any]]:
    """The best student of a run and its metadata, in eval mode on the CPU.

    `with_taps` lets it give the feature maps that the run's projections take.
    """
    taps = read_record(run)["taps"] if with_taps else []
    points = [TapPoint(tap["student_tap"], tap["stride"]) for tap in taps]
    return saved_student(run / "student_best.safetensors", points)


def saved_student(path: Path, points: Sequence[TapPoint] = ()) -> tuple[Student, dict[str, Any]]:
    """The student in a .safetensors file and its metadata, in eval mode on the CPU."""
    tensors, metadata = read_student(path)
    student = Student(metadata["encoder"], points)
    student.unet.load_state_dict(tensors)
    return student.eval(), metadata


def read_best_projections(run: Path, student: Student) -> Projections | None:
    """The projections of the best epoch, None when the run trained without features.

    `student` is the run's best, with taps.
    """
    weights = read_checkpoint(run / "checkpoints" / "best.pt")["projections"]
    if weights is None:
        return None
    names = [tap["name"] for tap in read_record(run)["taps"]]
    try:
        of_taps = {}
        for n, (name, channels) in enumerate(zip(names, student.tap_channels, strict=True)):
            hidden, target = (len(weights[f"each.{n}.{layer}.weight"]) for layer in (0, 3))
            of_taps[name] = Projection(channels, hidden, target)
        projections = Projections(of_taps, weights["shares"].tolist(), "departure" in weights)
        projections.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        raise RunError(
            f"{run}: the projections in checkpoints/best.pt are for another student than the one beside "
            "them; one of its files is another run's: put its own back"
        ) from error
    return projections.eval()


def start_from(run: Path, state: State) -> None:
    """Begin with the best weights of another run, and with its projections to the same taps.

    What each tap counts starts as this run's settings say. Raises RunError when that run's student
    is another network.
    """
    other, metadata = read_best_student(run, with_taps=True)
    ours, theirs = state.student.unet.state_dict(), other.unet.state_dict()
    if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in theirs.items()}:
        raise RunError(
            f"--init-from {run}: its student has the encoder {metadata['encoder']}, this run's "
            "student is another network; set student_encoder to that"
        )
    state.student.unet.load_state_dict(theirs)
    found = read_best_projections(run, other)
    if state.projections is None or found is None:
        return
    for tap, projection in state.projections.by_tap.items():
        own = projection.state_dict()
        weights = found.by_tap[tap].state_dict() if tap in found.taps else {}
        if not weights:
            log.warning("--init-from %s: it has no projection to %s; ours starts afresh", run, tap)
        elif any(own[name].shape != tensor.shape for name, tensor in weights.items()):
            log.warning(
                "--init-from %s: its projection to %s has another shape; ours starts afresh",
                run,
                tap,
            )
        else:
            # the target stays this run's own: the other may not have standardised it
            target = {name: tensor for name, tensor in own.items() if name.startswith("target_")}
            projection.load_state_dict(weights | target)
