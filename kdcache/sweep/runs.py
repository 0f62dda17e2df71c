"""The trainings of a sweep, as its table, page and CSV file tell of them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kdcache.config import TrainConfig
from kdcache.errors import RunError
from kdcache.train.run_folder import best_epoch, read_metrics
from kdcache.train.weights import is_whole_student

# What the clock decides, and what the settings say.
_NOT_MEASURED = ("epoch", "lr", "temperature", "images_per_s", "step_ms", "data_wait_ms", "epoch_s")


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """A run folder, or one to be, with what it measured so far."""

    name: str  # of its folder
    path: Path
    values: Mapping[str, Any]  # swept setting to this run's value
    state: Literal["done", "failed", "stopped", "waiting"]
    error: str  # of a failed one
    best_epoch: int | None
    metrics: Mapping[str, Any]  # of that epoch, by their names in metrics.jsonl
    history: Sequence[Mapping[str, Any]]  # of every finished epoch
    config: Mapping[str, Any]  # all settings
    picture: Path | None  # of that epoch: photo, mask, teacher, student, difference


def read_run(
    path: Path, config: TrainConfig, axes: Sequence[str], error: str | None = None
) -> SweepRun:
    """What a run's folder says of it; `error` is what ended it when it was trained last."""
    history: Sequence[Mapping[str, Any]] = []
    try:
        history = read_metrics(path)
    except RunError as damaged:  # a resume writes it anew
        error = error or str(damaged)
    best = best_epoch(history) if history else None
    student = path / "student_best.safetensors"
    state: Literal["done", "failed", "stopped", "waiting"] = "waiting"
    if len(history) >= config.epochs and is_whole_student(student):
        state = "done"
    elif len(history) >= config.epochs:
        error = error or f"its {student.name} is missing or damaged"
        error += f"; delete {path} to have it trained again"
        state = "failed"
    elif error is not None:
        state = "failed"
    elif (path / "run.json").exists():
        state = "stopped"
    picture = path / "visualizations" / f"epoch_{best or 0:03d}.jpg"
    return SweepRun(
        name=path.name,
        path=path,
        values={axis: getattr(config, axis) for axis in axes},
        state=state,
        error=error or "" if state == "failed" else "",
        best_epoch=best,
        metrics=history[best - 1] if best else {},
        history=history,
        config=config.model_dump(),
        picture=picture if picture.exists() else None,
    )


def measured(run: SweepRun) -> dict[str, Any]:
    """The best epoch's metrics, without what the clock decides: the same for the same run."""
    return {name: value for name, value in run.metrics.items() if name not in _NOT_MEASURED}


def ranking(run: SweepRun) -> tuple[int, float]:
    """Sorts finished runs before others, the highest validation mIoU, or lowest loss, first."""
    miou = run.metrics.get("val_student_miou")
    loss = run.metrics.get("train_total")
    score = -miou if miou is not None else loss
    return (run.state != "done", float("inf") if score is None else score)


def runs_csv(runs: Sequence[SweepRun], axes: Sequence[str]) -> str:
    """A line a run, in the order given: its settings, state, and what its best epoch measured."""
    names = list(dict.fromkeys(name for run in runs for name in measured(run)))
    text = io.StringIO()
    columns = ["run", *axes, "state", "best_epoch", "epochs", *names, "error"]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for run in runs:
        facts = {"run": run.name, "state": run.state, "best_epoch": run.best_epoch}
        facts |= {"epochs": len(run.history), "error": run.error}
        # lists as TOML has them, to be pasted into --set
        values = {k: json.dumps(v) if isinstance(v, tuple) else v for k, v in run.values.items()}
        writer.writerow(facts | values | measured(run))
    return text.getvalue()
