"""Many trainings from one cache: each a run folder, resumable at any moment, in parallel.

DIR/sweep.json    what was asked for, the commits of the cache that all runs see, and failures
DIR/runs/NAME/    the runs, named by their values
DIR/logs/         what was said of each
DIR/sweep.csv DIR/sweep.html   the table and the page, renewed whenever a run ends
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kdcache.cache.reader import Cache
from kdcache.config import TrainConfig, validated
from kdcache.durable import lock, write_atomic
from kdcache.errors import ConfigError, RunError
from kdcache.places import Place, absolute, place_of
from kdcache.stop import StopRequest
from kdcache.sweep.grid import Axes, Range, combinations, run_name
from kdcache.sweep.live import Live
from kdcache.sweep.page import sweep_page
from kdcache.sweep.runs import SweepRun, read_run, runs_csv
from kdcache.sweep.workers import Crew, Processes, Task, is_begun
from kdcache.train.prepare import Start, find_taps
from kdcache.train.run_folder import check_cache
from kdcache.train.student import build_student, resolve_device
from kdcache.train.together import shared_settings

log = logging.getLogger(__name__)

_POLL_S = 1.0

# Drawing the page takes seconds: while runs end quickly, not after each.
_PAGE_EVERY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    """What became of a sweep; the runs in the order they were asked for."""

    out: Path
    csv: Path
    page: Path
    runs: Sequence[SweepRun]
    axes: Sequence[str]
    seconds: float

    @property
    def failed(self) -> list[SweepRun]:
        return [run for run in self.runs if run.state == "failed"]


@dataclass(kw_only=True)
class _Sweep:
    """The sweep in a folder."""

    out: Path
    cache: Place
    fingerprint: Mapping[str, str]
    shards: Sequence[int]
    base: Mapping[str, Any]
    axes: dict[str, list[Any]]
    values: dict[str, dict[str, Any]]  # of each run, by its name
    errors: dict[str, str] = field(default_factory=dict)

    def save(self) -> None:
        record = {name: value for name, value in vars(self).items() if name != "out"}
        record["cache"] = str(self.cache)
        write_atomic(self.out / "sweep.json", json.dumps(record, indent=1).encode())

    def config(self, name: str) -> TrainConfig:
        return validated(TrainConfig, {**self.base, **self.values[name]})

    def path(self, name: str) -> Path:
        return self.out / "runs" / name

    def run(self, name: str) -> SweepRun:
        return read_run(self.path(name), self.config(name), list(self.axes), self.errors.get(name))

    def runs(self) -> list[SweepRun]:
        return [self.run(name) for name in self.values]


def sweep(
    cache_path: Place,
    out: Path,
    axes: Axes,
    base: TrainConfig,
    *,
    random: int | None = None,
    device: str = "auto",
    jobs: int | None = None,
    together: int = 1,
    dask: str | None = None,
    progress: bool = False,
) -> SweepReport:
    """Train every combination of the axes' values, or `random` draws of them, in `out`.

    Finished runs are kept, a stopped one goes on, failed ones are tried again; a larger grid adds
    to a smaller one. All see the rows that the cache had when the sweep began. `jobs` processes
    train at the same time (one a GPU, else one), each `together` runs on the same batches; with
    `dask` the workers of that cluster, `jobs` of them at most, each on its `device`. SIGINT and
    SIGTERM let them save, raising KeyboardInterrupt. A run's failure does not stop the others.
    Raises KdcacheError before anything runs when the sweep cannot be what it was.
    """
    started = time.monotonic()
    if dask is not None:  # its workers have folders of their own to work in
        cache_path, out = absolute(cache_path), out.absolute()
    if isinstance(cache_path, Path) and out.resolve().is_relative_to(cache_path.resolve()):
        raise RunError(f"--out {out} is inside the cache {cache_path}; choose another")
    cache = Cache(cache_path)
    asked = combinations(axes, base, random=random, seed=base.seed) if axes else []
    with _claimed(out):
        plan = _open(out, cache, axes, base, asked)
        todo = [run.name for run in plan.runs() if run.state != "done"]
        _check(cache, [plan.config(name) for name in todo if not is_begun(plan.path(name))])
        plan.errors = {name: why for name, why in plan.errors.items() if name not in todo}
        plan.save()
        runs = {run.name: run for run in plan.runs()}
        waiting = _grouped(plan, todo, together)
        with (
            _crew(plan, waiting, device, jobs, dask) as crew,
            StopRequest().listening() as stop,
            Live(list(runs.values()), shown=progress) as live,
        ):
            _train_all(plan, runs, waiting, crew, stop, live)
        _write(plan, runs, page=True)
    if stop.asked:
        raise KeyboardInterrupt
    return SweepReport(
        out=out,
        csv=out / "sweep.csv",
        page=out / "sweep.html",
        runs=list(runs.values()),
        axes=list(plan.axes),
        seconds=time.monotonic() - started,
    )


@contextlib.contextmanager
def _crew(
    plan: _Sweep, groups: Sequence[Sequence[str]], device: str, jobs: int | None, dask: str | None
) -> Iterator[Crew]:
    """Who trains: processes here, or a cluster's workers, where there is something to do for them."""
    if dask is None or not groups:
        crew: Crew = Processes(_devices(device, jobs), len(groups))
        yield crew
        return
    from kdcache.sweep.remote import cluster_crew

    configs = [plan.config(name) for names in groups for name in names]
    weights = {config.encoder_weights for config in configs}
    with cluster_crew(
        dask,
        Cache(plan.cache, shards=plan.shards),
        plan.out,
        device=device,
        jobs=jobs,
        files=sorted(weights - {"imagenet", "random"}),
    ) as crew:
        yield crew


def _devices(device: str, jobs: int | None) -> list[str]:
    """One for each process: GPUs in turn."""
    on = resolve_device(device)
    gpus = [on] if on != "cuda" else [f"cuda:{n}" for n in range(torch.cuda.device_count())]
    return list(itertools.islice(itertools.cycle(gpus), jobs or len(gpus)))


@contextlib.contextmanager
def _claimed(out: Path) -> Iterator[None]:
    if (
        out.exists()
        and not (out / "sweep.json").exists()
        and (not out.is_dir() or any(out.iterdir()))
    ):
        raise RunError(f"{out} exists and holds no sweep; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    descriptor = lock(out)
    if descriptor is None:
        raise RunError(f"{out}: another process is sweeping there; wait for it, or stop it")
    try:
        yield
    finally:
        os.close(descriptor)


def _open(
    out: Path,
    cache: Cache,
    axes: Axes,
    base: TrainConfig,
    asked: Sequence[tuple[dict[str, Any], TrainConfig]],
) -> _Sweep:
    """The sweep of a folder with what is asked for added, or a new one."""
    runs = {run_name(of_axes): of_axes for of_axes, _ in asked}
    own = {key: value for key, value in base.model_dump().items() if key not in axes}
    found = _read(out)
    if found is None:
        if not runs:
            raise ConfigError("nothing to sweep: give --grid key=value,value,…")
        return _Sweep(
            out=out,
            cache=cache.path,
            fingerprint=dict(cache.manifest.fingerprint),
            shards=[commit.shard for commit in cache.commits],
            base=own,
            axes=_listed(axes, runs.values()),
            values=runs,
        )
    check_cache(out, {"fingerprint": found.fingerprint}, cache.path)
    found.cache = cache.path  # it may have moved
    if not runs:
        return found
    for key in own.keys() & found.base.keys():
        if own[key] != found.base[key]:
            raise RunError(
                f"{out} was swept with {key} = {found.base[key]}, now {own[key]} was asked for: "
                "leave that setting out, or choose another --out"
            )
    # what was fixed before and is swept now, or the other way round, each run has for itself
    values = dict(found.values)
    names = {_identity(found.config(name)): name for name in values}
    for of_axes, config in asked:
        if _identity(config) not in names:
            values[_unused(run_name(of_axes), values, config)] = of_axes
    found.axes = _listed(
        axes, [of_axes for of_axes, _ in asked] + list(values.values()), found.axes
    )
    for name, of_axes in values.items():
        before = found.base if name in found.values else own
        values[name] = {key: of_axes.get(key, before.get(key)) for key in found.axes}
    found.base = {k: v for k, v in {**found.base, **own}.items() if k not in found.axes}
    found.values = values
    return found


def _identity(config: TrainConfig) -> str:
    """The same for the same settings, whichever of them were axes."""
    return config.model_dump_json()


def _unused(name: str, taken: Collection[str], config: TrainConfig) -> str:
    """The name, or with what tells it from a run of other settings that has it."""
    if name not in taken:
        return name
    return f"{name}-{hashlib.sha256(_identity(config).encode()).hexdigest()[:8]}"


def _listed(
    axes: Axes, runs: Iterable[Mapping[str, Any]], before: Mapping[str, Sequence[Any]] | None = None
) -> dict[str, list[Any]]:
    """The axes with all values that runs have, in order: those asked for first."""
    listed: dict[str, list[Any]] = {}
    for key in dict.fromkeys([*axes, *(before or {})]):
        asked = axes.get(key, [])
        values = [] if isinstance(asked, Range) else list(asked)
        values += [run[key] for run in runs if key in run] + list((before or {}).get(key, []))
        listed[key] = list(dict.fromkeys(values))
    return listed


def _read(out: Path) -> _Sweep | None:
    path = out / "sweep.json"
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        record |= {name: _with_tuples(record[name]) for name in ("base", "values")}
        record["axes"] = {key: list(_with_tuples(of)) for key, of in record["axes"].items()}
        return _Sweep(out=out, **(record | {"cache": place_of(record["cache"])}))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{path} is no record of a sweep: {error}; choose another --out") from error


def _with_tuples(value: Any) -> Any:
    """Settings as JSON has them as the settings have them: lists in them are tuples."""
    if isinstance(value, dict):
        return {key: _with_tuples(one) for key, one in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _check(cache: Cache, configs: Sequence[TrainConfig]) -> None:
    """Raise what every run would end with, before the first begins."""
    for config in configs:
        find_taps(cache, config)
    for encoder, weights in {(c.student_encoder, c.encoder_weights) for c in configs}:
        build_student(encoder, weights)


def _train_all(
    plan: _Sweep,
    runs: dict[str, SweepRun],
    waiting: list[list[str]],
    crew: Crew,
    stop: StopRequest,
    live: Live,
) -> None:
    """Give out the groups that wait until all have ended, and keep `runs` up to date."""
    drawn, stopping, told = time.monotonic(), False, False
    try:
        while waiting or crew.tasks:
            if stop.asked and not stopping:
                stopping = True
                waiting.clear()
                crew.stop()
            while crew.has_room and (names := _next_free(plan, waiting)):
                crew.give(_task(plan, names))
            if waiting and crew.has_room and not crew.tasks and not told:
                told = True
                log.warning(
                    "%s: another process is training there; waiting for it",
                    plan.path(waiting[0][0]),
                )
            for ended in crew.ready(_POLL_S):
                for path, error in ended.items():
                    if error and not stopping:
                        plan.errors[path.name] = error
                    runs[path.name] = run = plan.run(path.name)
                    if run.state == "failed":
                        log.warning("%s failed: %s", run.name, run.error)
                # stopped, and not by us: whoever trained them was lost, or is needed elsewhere
                lost = [p.name for p, error in ended.items() if error == ""]
                lost = [name for name in lost if runs[name].state != "done"]
                if lost and not stopping:
                    waiting.insert(0, lost)
                plan.save()
                late = time.monotonic() - drawn > _PAGE_EVERY_S
                _write(plan, runs, page=late)
                drawn = time.monotonic() if late else drawn
            training = [start.out.name for task in crew.tasks for start in task.starts]
            runs |= {name: plan.run(name) for name in training}
            live.show(list(runs.values()), training)
    finally:
        crew.close()


def _grouped(plan: _Sweep, names: Sequence[str], together: int) -> list[list[str]]:
    """Runs one by one, or those that can share their batches up to so many at once."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name in names:
        config = plan.config(name)
        # a run without features would have the others' read for it
        key = (*shared_settings(config), config.feature_weight > 0) if together > 1 else (name,)
        groups.setdefault(key, []).append(name)
    return [
        group[first : first + together]
        for group in groups.values()
        for first in range(0, len(group), together)
    ]


def _next_free(plan: _Sweep, waiting: list[list[str]]) -> list[str] | None:
    """The first runs that nobody trains: what a killed sweep left behind is still saving."""
    for names in waiting:
        if all(_is_free(plan.path(name)) for name in names):
            waiting.remove(names)
            return names
    return None


def _task(plan: _Sweep, names: Sequence[str]) -> Task:
    starts = [
        Start(
            out=plan.path(name),
            config=plan.config(name),
            shards=plan.shards,
        )
        for name in names
    ]
    return Task(cache=plan.cache, starts=starts, log=plan.out / "logs" / f"{names[0]}.log")


def _is_free(run: Path) -> bool:
    if not run.exists():
        return True
    descriptor = lock(run)
    if descriptor is None:
        return False
    os.close(descriptor)
    return True


def _write(plan: _Sweep, runs: Mapping[str, SweepRun], *, page: bool) -> None:
    """The table, and the page, of what there is by now."""
    found = list(runs.values())
    write_atomic(plan.out / "sweep.csv", runs_csv(found, list(plan.axes)).encode())
    if page:
        text = sweep_page(f"Sweep {plan.out.name}", found, plan.axes, plan.base)
        write_atomic(plan.out / "sweep.html", text.encode())
