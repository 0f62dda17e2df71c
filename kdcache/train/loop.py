"""Training from a cache, top to bottom: student and projections, five losses, resumable at any step."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from kdcache.config import TrainConfig
from kdcache.drawing import save
from kdcache.errors import KdcacheError, RunError, device_memory
from kdcache.places import Place
from kdcache.stop import StopRequest
from kdcache.tables import megabytes
from kdcache.train import schedule
from kdcache.train.advice import advice
from kdcache.train.augment import augmented
from kdcache.train.curves import Curves
from kdcache.train.loader import Batch, Tally, chunked, read_batches
from kdcache.train.members import encoded, leaving, own_batch, taps_of
from kdcache.train.overlay import overlay, shown_rows
from kdcache.train.parallel import Processes, joined
from kdcache.train.prepare import Member, Start, prepared
from kdcache.train.repeatable import Position, only_deterministic, seed
from kdcache.train.run_folder import (
    save_epoch,
    save_progress,
)
from kdcache.train.score import Scored, scored, summary
from kdcache.train.step import (
    Taken,
    Trainee,
    read,
    set_learning_rate,
    take_step,
)
from kdcache.train.student import resolve_device

log = logging.getLogger(__name__)

# How much of an epoch a crash may cost, beside what signals save.
_SAVE_EVERY_S = 300.0

# Steps after which the host reads the numbers of those it queued; on the CPU after each.
_READ_EVERY = 16

# Of an epoch of so many steps or more, the share of waiting from which on it is worth a word.
_JUDGED_STEPS, _DATA_WAIT = 10, 0.02


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What a training run ended with."""

    run: Path
    epochs: int
    best_epoch: int
    metrics: dict[str, Any]  # of the best epoch
    picture: Path
    seconds: float


def train(
    cache_path: Place,
    out: Path,
    config: TrainConfig,
    *,
    device: str = "auto",
    resume: bool = False,
    extend: bool = False,
    init_from: Path | None = None,
    progress: bool = False,
) -> TrainReport:
    """Train a student from the cache alone and leave a run folder at `out`.

    With `resume` a run that was stopped, at whatever step, goes on as if it had never stopped, on
    the rows it started with; `extend` lets it have more epochs. `init_from` begins with the best
    student of another run. Started by torchrun, the processes train together. SIGINT and SIGTERM
    stop it after the current step, raising KeyboardInterrupt. Raises KdcacheError; what was saved
    stays.
    """
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        processes, on = stack.enter_context(joined(resolve_device(device)))
        stack.enter_context(only_deterministic(config.deterministic))
        stop = StopRequest()
        start = Start(
            out=out,
            config=config,
            resume=resume,
            extend=extend,
            init_from=init_from,
        )
        member = prepared(
            cache_path,
            start,
            stack,
            device=on,
            processes=processes,
            stop=stop,
            progress=progress,
        )
        with stop.listening():
            train_epochs([member])
    return report_of(member, time.monotonic() - started)


def report_of(member: Member, seconds: float) -> TrainReport:
    """What a finished run is worth."""
    run, state = member.run, member.state
    return TrainReport(
        run=run.out,
        epochs=run.config.epochs,
        best_epoch=state.best_epoch,
        metrics=state.history[state.best_epoch - 1],
        picture=run.picture(run.config.epochs),
        seconds=seconds,
    )


def train_epochs(
    members: list[Member], failed: Callable[[Member, KdcacheError], None] | None = None
) -> None:
    """From where the members are, all at the same step, to the last epoch; each ends on disk.

    They share each batch, and where their encoders are frozen one pass of those. A member that
    fails is told to `failed` and leaves the list; the last one's error is raised.
    """
    first = members[0]
    shown = shown_rows(first.run.val_rows or [views[0] for views in first.run.samples])
    with contextlib.ExitStack() as stack:
        curves = {}
        for run, state in ((m.run, m.state) for m in members if m.run.processes.leads):
            writer = Curves(run.out / "logs", len(state.history))
            curves[run.out] = stack.enter_context(contextlib.closing(writer))
        for epoch in range(len(first.state.history), first.run.config.epochs):
            started = time.monotonic()
            pace = _train_epoch(members, epoch, failed)
            scores = _validate(members, epoch) if first.run.processes.leads else {}
            for member in members:
                metrics = _metrics(member, epoch) | pace | scores.get(member.run.out, {})
                _end_epoch(member, metrics, shown, curves.get(member.run.out), started)
            first.run.processes.wait()


def _metrics(member: Member, epoch: int) -> dict[str, Any]:
    return {
        "epoch": epoch + 1,
        "lr": member.state.optimizer.param_groups[0]["lr"],
        "temperature": schedule.temperature(member.run.config, epoch),
        **_means(member.state.sums),
        **(projections.measured() if (projections := member.state.projections) else {}),
    }


def _end_epoch(
    member: Member,
    metrics: dict[str, Any],
    shown: Sequence[int],
    curves: Curves | None,
    started: float,
) -> None:
    """Draw and save; processes that do not lead, and have no curves, only count the epoch."""
    run, state = member.run, member.state
    if curves is not None:
        picture = overlay(state.student.eval(), run.cache, shown, run.device)
        save(run.picture(metrics["epoch"]), picture, "JPEG")
        metrics["epoch_s"] = time.monotonic() - started
    state.history.append(metrics)
    state.steps, state.sums = 0, {}
    if curves is not None:
        # The checkpoint last: a stop before it repeats the epoch's end, and its curves.
        curves.add(metrics, picture)
        save_epoch(run.out, state, run.config, run.cache)
        log.info("epoch %d/%d: %s", metrics["epoch"], run.config.epochs, _line(metrics))
        for sign in advice(state.history, run.config):
            log.warning("epoch %d: %s", metrics["epoch"], sign)


def _train_epoch(
    members: list[Member], epoch: int, failed: Callable[[Member, KdcacheError], None] | None
) -> dict[str, float]:
    """The rest of an epoch, from the step that the members are at; returns this process's pace."""
    run, state = members[0].run, members[0].state
    config, processes = run.config, run.processes
    plan = _steps(run.epoch(epoch), config, processes)
    todo = plan[state.steps :]
    tally, groups = Tally(), [rows for step in todo for rows in step]
    source = read_batches(
        run.cache,
        groups,
        run.device,
        taps_of(members),
        logits=any(m.run.config.uses_logits for m in members),
        tally=tally,
    )
    title = f"epoch {epoch + 1}/{config.epochs}"
    bar = tqdm(
        desc=title,
        total=len(run.samples),
        initial=round(state.sums.get("images", 0)),
        unit="image",
        disable=None if run.progress else True,
    )
    for member in members:
        member.model.train()
    before, waits, started = state.sums.get("images", 0.0), list[float](), time.monotonic()
    saved = started
    every = 1 if torch.device(run.device).type == "cpu" else _READ_EVERY
    with bar:
        for number, step in enumerate(todo, 1):
            waited = time.monotonic()
            batches = [next(source) for _ in step]
            waits.append(time.monotonic() - waited)
            place = epoch, members[0].state.steps, processes.rank
            batches = [augmented(b, config, Position(*place, n)) for n, b in enumerate(batches)]
            batches = [encoded(members, batch, half=True) for batch in batches]
            for member in list(members):
                with leaving(members, member, failed):
                    own = [own_batch(member, batch) for batch in batches]
                    member.queued.append(_take_step(member, own, epoch, len(plan)))
                    member.state.steps += 1
            if len(members[0].queued) < every and number < len(todo):
                continue
            for member in list(members):
                with leaving(members, member, failed):
                    last = _read(member, epoch)
            state = members[0].state
            bar.set_postfix(loss=f"{last['total']:.4f}", refresh=False)
            bar.update(round(state.sums["images"]) - bar.n)
            stop = processes.any(run.stop.asked, run.device)
            if processes.leads and (stop or time.monotonic() - saved > _SAVE_EVERY_S):
                _save_all(members)
                saved = time.monotonic()
            if stop:
                processes.wait()
                raise KeyboardInterrupt
    if not todo:  # stopped while it validated
        return {}
    if processes.leads:
        _save_all(members)  # validation may take long
    seconds = time.monotonic() - started
    waited = sum(waits[1:])  # nothing can be read ahead of an epoch's first step
    judged = len(todo) >= _JUDGED_STEPS and "data wait" not in run.said
    if judged and waited > _DATA_WAIT * seconds:
        run.said.add("data wait")
        log.warning("%s", _waited_words(tally, waited, seconds))
    return {
        "images_per_s": (state.sums["images"] - before) / seconds,
        "step_ms": 1000 * seconds / len(todo),
        "data_wait_ms": 1000 * sum(waits) / len(todo),
    }


def _save_all(members: Sequence[Member]) -> None:
    for member in members:
        save_progress(member.run.out, member.state)


def _waited_words(tally: Tally, data_wait_s: float, seconds: float) -> str:
    """Whether it was the storage or the decoding that steps waited for, and what helps."""
    needed = tally.size_bytes / (seconds - data_wait_s)
    text = (
        f"{data_wait_s / seconds:.0%} of the time went into waiting for data: the steps need "
        f"{megabytes(needed)}/s, the storage gave {megabytes(tally.bytes_per_s)}/s"
    )
    if tally.bytes_per_s < needed:
        text += "; put the cache on a faster disk, or extract it at fewer bits"
    else:
        text += (
            ", so it is decompressing and decoding that cannot keep up: a cache of --compression lz4 "
            "or none takes less of it"
        )
    return text + " (each epoch's is data_wait_ms in metrics.jsonl)"


def _take_step(member: Member, batches: list[Batch], epoch: int, steps: int) -> Taken:
    """One update, at the learning rate, temperature and random numbers of its place in the run."""
    config, state, processes = member.run.config, member.state, member.run.processes
    learning_rate = schedule.learning_rate(config, epoch, epoch * steps + state.steps)
    set_learning_rate(state.optimizer, learning_rate)
    seed(config.seed, epoch, state.steps, processes.rank)
    temperature = schedule.temperature(config, epoch)
    remedy = "lower --batch-size (--set gradient_accumulation=N keeps the step as large), or use "
    with (
        device_memory("training", remedy + "--mixed-precision"),
        _at_step(config, epoch, lambda: state.steps + 1),
    ):
        return take_step(member.model, state, batches, config, temperature, processes)


def _read(member: Member, epoch: int) -> dict[str, float]:
    """Add up what the queued steps measured; returns the last one's numbers."""
    state, queued = member.state, member.queued
    first, numbers = state.steps - len(queued) + 1, itertools.count()
    values: dict[str, float] = {}
    with _at_step(member.run.config, epoch, lambda: first + next(numbers)):
        for values in read(queued):
            next(numbers)
            # a loss is a mean over its images
            over = {"bce": values["labelled_images"], "dice": values["labelled_images"]}
            for name, value in values.items():
                counted = name in ("images", "labelled_images", "skipped")
                weight = 1 if counted else over.get(name, values["images"])
                state.sums[name] = state.sums.get(name, 0.0) + value * weight
    queued.clear()
    return values


@contextlib.contextmanager
def _at_step(config: TrainConfig, epoch: int, step: Callable[[], int]) -> Iterator[None]:
    """Say where in the run an error came, and what can be done."""
    try:
        yield
    except RunError as error:
        raise RunError(
            f"epoch {epoch + 1}/{config.epochs}, step {step()}: {error}; the run stops at "
            "what it last saved, and a resume would come here again: start another with a lower "
            "learning_rate or loss weight"
            + (" or without --mixed-precision" * config.mixed_precision)
        ) from error


def _means(sums: dict[str, float]) -> dict[str, float | None]:
    """The metrics of an epoch: a loss is a mean over its images, BCE and Dice over labelled ones."""
    counts = ("images", "labelled_images", "skipped")
    losses = {name: value for name, value in sums.items() if name not in counts}
    over = {"bce": sums["labelled_images"], "dice": sums["labelled_images"]}
    means = {
        f"train_{name}": value / count if (count := over.get(name, sums["images"])) else None
        for name, value in losses.items()
    }
    means["labelled_fraction"] = sums["labelled_images"] / sums["images"]
    return means | {"skipped_steps": sums["skipped"]}


def _steps(
    order: Sequence[int], config: TrainConfig, processes: Processes
) -> list[list[Sequence[int]]]:
    """The batches of rows that this process puts into each step of an epoch.

    Rows too few for every process at the end join the step before, so that each is used once and
    no process is without one.
    """
    steps = chunked(order, config.batch_size * config.gradient_accumulation * processes.count)
    if len(steps) > 1 and len(steps[-1]) < processes.count:
        last = steps.pop()
        steps[-1] = [*steps[-1], *last]
    own = (np.array_split(step, processes.count)[processes.rank].tolist() for step in steps)
    return [chunked(rows, config.batch_size) for rows in own]


def _validate(members: Sequence[Member], epoch: int) -> dict[Path, dict[str, Any]]:
    """Each member's scores on the validation rows, by its folder; none without such rows."""
    run = members[0].run
    if not run.val_rows:
        return {}
    found: dict[Path, list[Scored]] = {member.run.out: [] for member in members}
    groups = chunked(run.val_rows, run.config.batch_size)
    with torch.no_grad(), device_memory("validating", "lower --batch-size"):
        for member in members:
            member.model.eval()
        for batch in read_batches(run.cache, groups, run.device, taps_of(members)):
            shared = encoded(members, batch, half=False)
            for member in members:
                config, state = member.run.config, member.state
                trainee = Trainee(state.student, state.projections)
                output = trainee(batch.image, None, shared.encoded)
                temperature = schedule.temperature(config, epoch)
                projections = state.projections
                found[member.run.out] += scored(batch, output, projections, config, temperature)
    return {
        out: {f"val_{name}": value for name, value in summary(images).items()}
        for out, images in found.items()
    }


def _line(metrics: dict[str, Any]) -> str:
    parts = [f"loss {metrics['train_total']:.4f}"]
    if metrics.get("val_student_miou") is not None:
        parts.append(f"val mIoU {metrics['val_student_miou']:.4f}")
    if metrics.get("val_agreement") is not None:
        parts.append(f"agreement {metrics['val_agreement']:.4f}")
    if "images_per_s" in metrics:
        parts.append(f"{metrics['images_per_s']:.2f} images/s")
    return ", ".join(parts)
