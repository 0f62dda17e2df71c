"""What a run starts from: rows checked, student and projections built, what each loss reaches."""

from __future__ import annotations

import contextlib
import json
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kdcache.cache.layout import LOGITS, TapSpec
from kdcache.cache.reader import Cache
from kdcache.config import ENCODER_LEVELS, TrainConfig
from kdcache.errors import RunError, device_memory
from kdcache.imaging import BACKGROUND, PERSON
from kdcache.places import Place
from kdcache.stop import StopRequest
from kdcache.train.epoch import epoch_rows, samples_of
from kdcache.train.flip import check_flip
from kdcache.train.loader import read_batches
from kdcache.train.parallel import Processes
from kdcache.train.projection import Projection, Projections
from kdcache.train.reach import find_reach, reach_text, reaches_student
from kdcache.train.run_folder import (
    State,
    claimed,
    open_run,
    restore,
    seen_cache,
    start_from,
    start_run,
    write_config,
    write_metrics,
)
from kdcache.train.step import (
    Taken,
    Trainee,
    check_compiler,
    of_tap,
    trained_model,
    untrained_state,
)
from kdcache.train.student import LEVELS, STRIDES, TapPoint, build_student, tap_points

log = logging.getLogger(__name__)

# Rows that are looked through for a label before the table of what each loss reaches.
_PROBED_ROWS = 256

# Rows that the mean and deviation of the feature target are taken from.
_STANDARDISE_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class Run:
    """What does not change while a process trains."""

    out: Path
    cache: Cache
    config: TrainConfig
    taps: Sequence[TapSpec]  # that the feature loss is of
    device: str
    processes: Processes
    stop: StopRequest
    samples: Sequence[Sequence[int]]  # rows of each train sample, by view
    val_rows: Sequence[int]
    progress: bool
    said: set[str] = field(default_factory=set)  # what need not be said again in each epoch

    @property
    def tap_names(self) -> list[str]:
        """Those whose features are read."""
        return [tap.name for tap in self.taps]

    def epoch(self, number: int) -> list[int]:
        """The rows of an epoch in their order: of each sample one."""
        return epoch_rows(self.cache, self.samples, self.config.seed, number)

    def picture(self, epoch: int) -> Path:
        """Where an epoch's overlays go."""
        return self.out / "visualizations" / f"epoch_{epoch:03d}.jpg"


@dataclass(kw_only=True)
class Member:
    """One of the runs that train on the same batches; mostly there is one."""

    run: Run
    state: State
    model: nn.Module
    queued: list[Taken] = field(default_factory=list)  # steps whose numbers nobody has read yet

    @property
    def shares_encoder(self) -> bool:
        """Whether its encoder computes the same for all its life, so that others may use it."""
        return not self.run.config.trained_levels and not self.run.config.compile


@dataclass(frozen=True, kw_only=True)
class Start:
    """A run that was asked for."""

    out: Path
    config: TrainConfig
    resume: bool = False
    extend: bool = False  # with `resume`: to more epochs
    init_from: Path | None = None  # a run whose best student it begins with
    shards: Sequence[int] | None = None  # of the cache, that a new run takes the rows of; all


def prepared(
    cache_path: Place,
    start: Start,
    stack: contextlib.ExitStack,
    *,
    device: str,
    processes: Processes,
    stop: StopRequest,
    progress: bool = False,
) -> Member:
    """A run at its start or where it was stopped, its folder laid out and claimed for the `stack`."""
    out, config, resume = start.out, start.config, start.resume
    record = open_run(out, config, resume, start.extend)
    cache = (
        seen_cache(out, record, cache_path) if resume else Cache(cache_path, shards=start.shards)
    )
    if isinstance(cache_path, Path) and out.resolve().is_relative_to(cache_path.resolve()):
        raise RunError(f"--out {out} is inside the cache {cache_path}; choose another")
    if processes.leads:
        stack.enter_context(claimed(out))
    taps = find_taps(cache, config)
    run = Run(
        out=out,
        cache=cache,
        config=config,
        taps=taps,
        device=device,
        processes=processes,
        stop=stop,
        samples=samples_of(cache, "train", config.views),
        val_rows=cache.rows_of("val", view=0),
        progress=progress and processes.leads,
    )
    check_splits(run)
    if config.flip_targets:
        figures = check_flip(cache, [*run.tap_names, *[LOGITS] * config.uses_logits])
        if processes.leads:
            log.info("%s", "\n".join(["flip_targets mirrors half of the rows", *figures]))
    say_views(run)
    if config.compile:
        check_compiler(device)
    with device_memory("building the student", "lower projection_hidden_dim"):
        # weights that are about to be replaced need not be there any more
        state = build(run, "random" if resume or start.init_from else config.encoder_weights)
    if resume:
        restore(out, state)
        check_processes(run, state)
    else:
        if start.init_from is not None:
            start_from(start.init_from, state)
        say_reach(run, state)
    processes.wait()  # nobody looks for a run any more
    if processes.leads:
        if resume:
            write_config(out, config)  # it may have been extended
            write_metrics(out, state)  # a crash may have come before them
        else:
            start_run(out, config, cache, taps, state)
    return Member(run=run, state=state, model=trained_model(state, config, processes))


def check_splits(run: Run) -> None:
    """Raise RunError without a sample for each process; say what a cache without val rows means."""
    path, processes = run.cache.path, run.processes.count
    if len(run.samples) < processes:
        raise RunError(
            f"{path} has {len(run.samples)} samples of split 'train' for {processes} processes; "
            "extract some (--split train is the default)"
        )
    if not run.val_rows:
        log.warning(
            "%s has no rows of split 'val': nothing is validated and the last epoch counts as the "
            "best; extract with --val-fraction, or a second folder with --split val",
            path,
        )


def say_views(run: Run) -> None:
    """Say how many views there are of the samples, where it is not one of each, or not those asked for."""
    if not run.processes.leads:
        return
    counts, asked = Counter(len(views) for views in run.samples), run.config.views
    most = max(counts)
    if asked > most:
        log.warning(
            "views = %d: %s has %d of a train sample at most, which are used; `kdcache extract --views` "
            "makes more",
            asked,
            run.cache.path,
            most,
        )
    if most > 1:
        fewer = len(run.samples) - counts[most]
        log.info(
            "%d train samples in %d views%s: an epoch holds each sample once, in %d epochs in each "
            "of its views",
            len(run.samples),
            most,
            f" ({fewer} of them in fewer)" * bool(fewer),
            most,
        )


def find_taps(cache: Cache, config: TrainConfig) -> tuple[TapSpec, ...]:
    """The taps that the projections aim at: the `feature_taps`, or all of the cache.

    Without a feature loss there are none: no feature byte is read. Raises RunError when the cache
    lacks what a loss is of or the student a tap's grid, CacheError for a name that it does not have.
    """
    if not cache.has_logits and config.uses_logits:
        attends = config.feature_attention == "teacher_uncertainty"
        raise RunError(
            f"{cache.path} holds no teacher logits; train with --set kl_weight=0 --set mse_weight=0, "
            + "--set feature_attention=none, " * attends
            + "or extract them"
        )
    if config.feature_weight == 0:
        return ()
    if not cache.manifest.taps:
        raise RunError(
            f"{cache.path} holds no features; train with --feature-weight 0, or extract them"
        )
    taps = tuple(cache.tap(name) for name in config.feature_taps or cache.taps)
    if config.tap_weights and len(config.tap_weights) != len(taps):
        raise RunError(
            f"tap_weights holds {len(config.tap_weights)} values, the feature loss is of {len(taps)} taps "
            f"({', '.join(tap.name for tap in taps)}): give one for each"
        )
    tap_points(taps, cache.manifest.size_px, config.student_tap)
    return taps


def check_processes(run: Run, state: State) -> None:
    """The rows of an epoch are dealt out by steps, and those by the number of processes."""
    count = run.processes.count
    if state.processes == count:
        return
    if state.steps:
        raise RunError(
            f"{run.out} was stopped in the middle of an epoch that {state.processes} processes shared, "
            f"this is {count}: resume it with torchrun --nproc-per-node={state.processes}"
        )
    log.warning(
        "%s was trained by %d processes, goes on with %d: a step has as many times %d rows now",
        run.out,
        state.processes,
        count,
        run.config.batch_size * run.config.gradient_accumulation,
    )
    state.processes = count


def build(run: Run, encoder_weights: str) -> State:
    """Student, projections and optimiser at their seeded start."""
    torch.manual_seed(run.config.seed)
    state = new_state(
        run.cache, run.config, run.taps, encoder_weights, run.device, run.processes.count
    )
    if run.config.standardise_features and state.projections is not None:
        rows = run.epoch(0)[:_STANDARDISE_ROWS]
        for tap in run.taps:
            projection = state.projections.by_tap[tap.name]
            projection.standardise(run.cache.decode_features(row, tap) for row in rows)
    return state


def new_state(
    cache: Cache,
    config: TrainConfig,
    taps: Sequence[TapSpec],
    encoder_weights: str,
    device: str,
    processes: int = 1,
) -> State:
    """Student, projections and optimiser at their start, drawn from torch's global generator.

    The projections are drawn after the student, so the feature weight does not move its start.
    """
    points = tap_points(taps, cache.manifest.size_px, config.student_tap) if taps else ()
    student = build_student(
        config.student_encoder, encoder_weights, points, config.trained_levels
    ).to(device)
    projections = None
    if taps:
        of_taps = {
            tap.name: Projection(channels, config.projection_hidden_dim, tap.shape[0])
            for tap, channels in zip(taps, student.tap_channels, strict=True)
        }
        learned = config.layer_weights == "learned"
        projections = Projections(of_taps, config.tap_shares(len(taps)), learned).to(device)
    return untrained_state(student, projections, config, device, processes)


def say_reach(run: Run, state: State) -> None:
    """Show what each loss can change, and warn where features are learned to be thrown away."""
    if not run.processes.leads:
        return
    (batch,) = read_batches(
        run.cache, [_probe_rows(run)], run.device, run.tap_names, logits=run.config.uses_logits
    )
    with device_memory("back-propagating the first batch", "lower --batch-size"):
        reach = find_reach(Trainee(state.student, state.projections), batch, run.config)
    log.info("%s", reach_text(reach, run.config))
    points = dict(zip(run.tap_names, state.student.points, strict=True))
    lost = [
        tap
        for tap, point in points.items()
        if point.part == "encoder"
        and not reaches_student(reach, "feature" if len(run.taps) == 1 else of_tap(tap))
    ]
    if lost:
        log.warning(
            "feature_weight = %g, but the feature loss%s trains only the projection, which is not part "
            "of the student: %s let it reach it",
            run.config.feature_weight,
            "" if len(run.taps) == 1 else f" of {', '.join(lost)}",
            _ways_to_reach(points, lost),
        )


def _ways_to_reach(points: Mapping[str, TapPoint], lost: Collection[str]) -> str:
    """Settings with which the feature loss of these taps trains more than projections."""
    levels = ENCODER_LEVELS + 1 - LEVELS[min(points[tap].stride for tap in lost)]
    ways = [f"--set train_encoder=last:{levels}"]
    if all(points[tap].stride in STRIDES["decoder"] for tap in lost):
        parts = ["decoder" if tap in lost else point.part for tap, point in points.items()]
        same = len(set(parts)) == 1
        value = parts[0] if same else json.dumps(parts, separators=(",", ":"))
        ways.insert(0, f"--set student_tap={value}" if same else f"--set 'student_tap={value}'")
    return " or ".join(ways)


def _probe_rows(run: Run) -> list[int]:
    """The first batch; its last row is a labelled one from further on if it has none else.

    Without a label BCE and Dice would seem to reach nothing.
    """
    order = run.epoch(0)
    size = run.config.batch_size
    for number, row in enumerate(order[:_PROBED_ROWS]):
        if np.isin(run.cache[row].mask, (BACKGROUND, PERSON)).any():
            return [*order[: min(size, len(order)) - 1], row] if number >= size else order[:size]
    return order[:size]
