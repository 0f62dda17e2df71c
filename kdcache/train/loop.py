"""Training from a cache, top to bottom: student and projection, five losses, resumable at any step."""

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
from torch import nn
from tqdm import tqdm

from kdcache.cache.reader import Cache
from kdcache.config import TrainConfig
from kdcache.drawing import save
from kdcache.errors import RunError, device_memory
from kdcache.stop import StopRequest
from kdcache.tables import megabytes
from kdcache.train import schedule
from kdcache.train.advice import advice
from kdcache.train.curves import Curves
from kdcache.train.evaluate import score
from kdcache.train.loader import Batch, Tally, chunked, read_batches, shuffled
from kdcache.train.overlay import overlay, shown_rows
from kdcache.train.parallel import Processes, joined
from kdcache.train.prepare import Run, build, check_processes, check_splits, find_target, say_reach
from kdcache.train.repeatable import only_deterministic, seed
from kdcache.train.run_folder import (
    State,
    claimed,
    open_run,
    restore,
    save_epoch,
    save_progress,
    seen_cache,
    start_from,
    start_run,
    write_config,
    write_metrics,
)
from kdcache.train.step import (
    Taken,
    check_compiler,
    read,
    set_learning_rate,
    take_step,
    trained_model,
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
    cache_path: Path,
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
        record = open_run(out, config, resume, extend)
        cache = seen_cache(out, record, cache_path) if resume else Cache(cache_path)
        if out.resolve().is_relative_to(cache_path.resolve()):
            raise RunError(f"--out {out} is inside the cache {cache_path}; choose another")
        if processes.leads:
            stack.enter_context(claimed(out))
        tap = find_target(cache, config)
        run = Run(
            out=out,
            cache=cache,
            config=config,
            tap=tap,
            device=on,
            processes=processes,
            stop=StopRequest(),
            train_rows=cache.rows_of("train"),
            val_rows=cache.rows_of("val"),
            progress=progress and processes.leads,
        )
        check_splits(run)
        if config.compile:
            check_compiler(on)
        with device_memory("building the student", "lower projection_hidden_dim"):
            # weights that are about to be replaced need not be there any more
            state = build(run, "random" if resume or init_from else config.encoder_weights)
        if resume:
            restore(out, state)
            check_processes(run, state)
        else:
            if init_from is not None:
                start_from(init_from, state)
            say_reach(run, state)
        processes.wait()  # nobody looks for a run any more
        if processes.leads:
            if resume:
                write_config(out, config)  # it may have been extended
                write_metrics(out, state)  # a crash may have come before them
            else:
                start_run(out, config, cache, tap, state)
        with run.stop.listening():
            _train_epochs(run, state)
    return TrainReport(
        run=out,
        epochs=config.epochs,
        best_epoch=state.best_epoch,
        metrics=state.history[state.best_epoch - 1],
        picture=run.picture(config.epochs),
        seconds=time.monotonic() - started,
    )


def _train_epochs(run: Run, state: State) -> None:
    """From where `state` is to the last epoch; every epoch ends on disk."""
    config, model = run.config, trained_model(state, run.config, run.processes)
    shown = shown_rows(run.val_rows or run.train_rows)
    with contextlib.ExitStack() as stack:
        if run.processes.leads:
            curves = Curves(run.out / "logs", len(state.history))
            stack.enter_context(contextlib.closing(curves))
        for epoch in range(len(state.history), config.epochs):
            started = time.monotonic()
            temperature = schedule.temperature(config, epoch)
            pace = _train_epoch(run, model, state, epoch)
            metrics = {
                "epoch": epoch + 1,
                "lr": state.optimizer.param_groups[0]["lr"],
                "temperature": temperature,
                **_means(state.sums),
                **pace,
            }
            if run.processes.leads:
                metrics |= _validate(run, state, temperature)
                picture = overlay(state.student, run.cache, shown, run.device)
                save(run.picture(epoch + 1), picture, "JPEG")
                metrics["epoch_s"] = time.monotonic() - started
            state.history.append(metrics)
            state.steps, state.sums = 0, {}
            if run.processes.leads:
                # The checkpoint last: a stop before it repeats the epoch's end, and its curves.
                curves.add(metrics, picture)
                save_epoch(run.out, state, config, run.cache)
                log.info("epoch %d/%d: %s", epoch + 1, config.epochs, _line(metrics))
                for sign in advice(state.history, config):
                    log.warning("epoch %d: %s", epoch + 1, sign)
            run.processes.wait()


def _train_epoch(run: Run, model: nn.Module, state: State, epoch: int) -> dict[str, float]:
    """The rest of an epoch, from the step that `state` is at; returns this process's pace."""
    config, processes = run.config, run.processes
    order = shuffled(run.train_rows, config.seed, epoch)
    plan = _steps(order, config, processes)
    todo = plan[state.steps :]
    tally, groups = Tally(), [rows for step in todo for rows in step]
    source = read_batches(
        run.cache, groups, run.device, run.taps, logits=run.uses_logits, tally=tally
    )
    title = f"epoch {epoch + 1}/{config.epochs}"
    bar = tqdm(
        desc=title,
        total=len(order),
        initial=round(state.sums.get("images", 0)),
        unit="image",
        disable=None if run.progress else True,
    )
    model.train()
    before, waits, started = state.sums.get("images", 0.0), list[float](), time.monotonic()
    saved = started
    every = 1 if torch.device(run.device).type == "cpu" else _READ_EVERY
    queued: list[Taken] = []
    with bar:
        for number, step in enumerate(todo, 1):
            waited = time.monotonic()
            batches = [next(source) for _ in step]
            waits.append(time.monotonic() - waited)
            queued.append(_take_step(run, model, state, batches, epoch, len(plan)))
            state.steps += 1
            if len(queued) < every and number < len(todo):
                continue
            last = _read(run, state, queued, epoch)
            queued.clear()
            bar.set_postfix(loss=f"{last['total']:.4f}", refresh=False)
            bar.update(round(state.sums["images"]) - bar.n)
            stop = processes.any(run.stop.asked, run.device)
            if processes.leads and (stop or time.monotonic() - saved > _SAVE_EVERY_S):
                save_progress(run.out, state)
                saved = time.monotonic()
            if stop:
                processes.wait()
                raise KeyboardInterrupt
    if not todo:  # stopped while it validated
        return {}
    if processes.leads:
        save_progress(run.out, state)  # validation may take long
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


def _take_step(
    run: Run, model: nn.Module, state: State, batches: list[Batch], epoch: int, steps: int
) -> Taken:
    """One update, at the learning rate, temperature and random numbers of its place in the run."""
    config = run.config
    learning_rate = schedule.learning_rate(config, epoch, epoch * steps + state.steps)
    set_learning_rate(state.optimizer, learning_rate)
    seed(config.seed, epoch, state.steps, run.processes.rank)
    temperature = schedule.temperature(config, epoch)
    remedy = "lower --batch-size (--set gradient_accumulation=N keeps the step as large), or use "
    with (
        device_memory("training", remedy + "--mixed-precision"),
        _at_step(config, epoch, lambda: state.steps + 1),
    ):
        return take_step(model, state, batches, config, temperature, run.processes)


def _read(run: Run, state: State, queued: Sequence[Taken], epoch: int) -> dict[str, float]:
    """Add up what the queued steps measured; returns the last one's numbers."""
    first, numbers = state.steps - len(queued) + 1, itertools.count()
    values: dict[str, float] = {}
    with _at_step(run.config, epoch, lambda: first + next(numbers)):
        for values in read(queued):
            next(numbers)
            # a loss is a mean over its images
            over = {"bce": values["labelled_images"], "dice": values["labelled_images"]}
            for name, value in values.items():
                counted = name in ("images", "labelled_images", "skipped")
                weight = 1 if counted else over.get(name, values["images"])
                state.sums[name] = state.sums.get(name, 0.0) + value * weight
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


def _validate(run: Run, state: State, temperature: float) -> dict[str, Any]:
    if not run.val_rows:
        return {}
    with device_memory("validating", "lower --batch-size"):
        scores = score(
            state.student,
            state.projection,
            run.cache,
            run.val_rows,
            run.config,
            tap=run.tap.name if run.tap else None,
            temperature=temperature,
            device=run.device,
        )
    return {f"val_{name}": value for name, value in scores.items()}


def _line(metrics: dict[str, Any]) -> str:
    parts = [f"loss {metrics['train_total']:.4f}"]
    if metrics.get("val_student_miou") is not None:
        parts.append(f"val mIoU {metrics['val_student_miou']:.4f}")
    if metrics.get("val_agreement") is not None:
        parts.append(f"agreement {metrics['val_agreement']:.4f}")
    if "images_per_s" in metrics:
        parts.append(f"{metrics['images_per_s']:.2f} images/s")
    return ", ".join(parts)
