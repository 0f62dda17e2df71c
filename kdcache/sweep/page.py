"""The page of a sweep: who won, what each setting does, curves, pictures; one file that loads nothing."""

from __future__ import annotations

import base64
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kdcache.sweep import plots
from kdcache.sweep.runs import SweepRun
from kdcache.tables import printable

_MIOU, _LOSS, _TEACHER = "val_student_miou", "train_total", "val_teacher_miou"
_METRICS = {  # what a run scored, to its heading
    _MIOU: "val mIoU",
    "val_agreement": "agreement",
    "val_iou_person_pooled": "IoU person, pooled",
    "val_boundary_f": "boundary F",
    "val_kl": "KL",
    "val_feature_loss": "feature loss",
    _LOSS: "training loss",
}
_STATES = ("done", "stopped", "failed", "waiting")
_NONE = "–"
_NUMBER = r"-?\d+(\.\d+)?(e[-+]\d+)?"

_LINES = 6  # in one plot, before they are a thicket
_CURVES = 40
_LETTERS = 160  # of an error in the table; all of it is with the run's settings


@dataclass(frozen=True, kw_only=True)
class _Sweep:
    """The runs, best first, and what they are ranked by."""

    runs: Sequence[SweepRun]
    axes: Mapping[str, Sequence[Any]]
    metric: str

    @cached_property
    def scored(self) -> list[tuple[SweepRun, float]]:
        """The finished runs that can be ranked, with their score."""
        scores = ((run, _score(run.metrics, self.metric)) for run in self.runs)
        return [(run, s) for run, s in scores if run.state == "done" and s is not None]

    @property
    def settings(self) -> list[str]:
        return [axis for axis in self.axes if axis != "seed"]

    @cached_property
    def varied(self) -> set[str]:
        """What is not set alike in all runs."""
        found: dict[str, set[str]] = defaultdict(set)
        for run in self.runs:
            for key, value in run.config.items():
                found[key].add(_shown(value))
        return {key for key, values in found.items() if len(values) > 1}

    @property
    def has_seeds(self) -> bool:
        return len(self.axes.get("seed", ())) > 1


class _Group(NamedTuple):
    """Runs that differ in the seed alone."""

    run: SweepRun  # one of them
    of: int  # so many
    scores: list[float]  # of those that are done


@dataclass(frozen=True)
class _Table:
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    @cached_property
    def numeric(self) -> list[bool]:
        """Which columns are flush right: of numbers, or of several in a cell."""
        columns = zip(self.headings, *self.rows, strict=True)
        return [all(map(_is_number, cells)) for _, *cells in columns]


@dataclass(frozen=True)
class _Plot:
    heading: str
    svg: Markup
    caption: str


def sweep_page(
    title: str,
    runs: Sequence[SweepRun],
    axes: Mapping[str, Sequence[Any]],
    base: Mapping[str, Any],
) -> str:
    """The page as HTML text: the same bytes for the same runs, whatever state they are in.

    `axes` are the swept settings with their values in order, `base` what all runs share. Text from
    outside is escaped; the page asks for no file and no network, and needs no script.
    """
    metric = _MIOU if any(_score(run.metrics, _MIOU) is not None for run in runs) else _LOSS
    sweep = _Sweep(runs=_ranked(runs, metric), axes=axes, metric=metric)
    groups = _groups(sweep) if sweep.has_seeds else []
    environment = Environment(
        loader=PackageLoader("kdcache", "sweep"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.j2").render(
        title=printable(title),
        inks=plots.INKS,
        swept=[
            f"{printable(name)}: {', '.join(dict.fromkeys(map(_shown, values)))}"
            for name, values in axes.items()
        ],
        states={state: sum(run.state == state for run in runs) for state in _STATES},
        by_loss=metric == _LOSS,
        metric=_METRICS[metric],
        best=_best(sweep, groups),
        teacher=_teacher(sweep),
        ranking=_ranking(sweep),
        settings=_settings_table(sweep, groups) if groups else None,
        effects=_effects(sweep),
        curves=_curves(sweep),
        pictures=_pictures(sweep),
        runs=[_run(sweep, run, base) for run in sweep.runs],
    )
    # names of files may hold bytes that are no text
    return page.encode("utf-8", "backslashreplace").decode("utf-8")


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _is_number(text: str) -> bool:
    """Whether a cell begins with a number, or says why it has none."""
    return re.match(rf"({_NUMBER}|{_NONE}|{'|'.join(_STATES)})( |$)", text) is not None


def _score(metrics: Mapping[str, Any], name: str) -> float | None:
    return _number(metrics.get(name))


def _shown(value: Any) -> str:
    if value is None:
        return _NONE
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return " + ".join(map(_shown, value)) or "default"
    return f"{value:.10g}" if isinstance(value, float) else printable(str(value))


def _text(value: float | None) -> str:
    if value is None:
        return _NONE
    return f"{value:.4f}" if abs(value) >= 0.001 or value == 0 else f"{value:.2g}"


def _first(error: str) -> str:
    text = " ".join(printable(line) for line in error.splitlines())
    return text if len(text) <= _LETTERS else text[:_LETTERS] + "…"


def _described(run: SweepRun, axes: Iterable[str]) -> str:
    return ", ".join(f"{printable(axis)} {_shown(run.values.get(axis))}" for axis in axes)


def _ranked(runs: Sequence[SweepRun], metric: str) -> list[SweepRun]:
    """Finished runs, best first, those without a score after them; then the others by state."""
    sign = -1 if metric == _MIOU else 1

    def place(run: SweepRun) -> tuple[int, bool, float]:
        score = _score(run.metrics, metric)
        return _STATES.index(run.state), score is None, sign * (score or 0.0)

    return sorted(runs, key=place)


def _groups(sweep: _Sweep) -> list[_Group]:
    """The settings without the seed, best mean first."""
    runs: dict[str, list[SweepRun]] = defaultdict(list)
    for run in sweep.runs:
        runs[_described(run, sweep.settings)].append(run)
    scores: dict[str, list[float]] = defaultdict(list)
    for run, score in sweep.scored:
        scores[_described(run, sweep.settings)].append(score)
    found = [_Group(same[0], len(same), scores[name]) for name, same in runs.items()]
    sign = -1 if sweep.metric == _MIOU else 1
    return sorted(found, key=lambda g: (not g.scores, sign * statistics.fmean(g.scores or [0.0])))


def _best(sweep: _Sweep, groups: Sequence[_Group]) -> list[str]:
    """What won, its score, and by how much: of the means over seeds, where there are seeds."""
    if not sweep.scored:
        return []
    if groups:
        top = groups[0]
        name = _described(top.run, sweep.settings) or "all seeds"
        scores = [statistics.fmean(group.scores) for group in groups if group.scores]
        of = f"mean of {len(top.scores)} seed{'s' * (len(top.scores) > 1)}"
        spread = statistics.stdev(top.scores) if len(top.scores) > 1 else None
    else:
        (run, _), scores, spread = sweep.scored[0], [score for _, score in sweep.scored], None
        name = _described(run, sweep.axes) or printable(run.name)
        of = f"epoch {_shown(run.best_epoch)} of {len(run.history)}, one run"
    lines = [name, f"{_METRICS[sweep.metric]} {_text(scores[0])} ({of})"]
    if len(scores) > 1:
        lead = abs(scores[1] - scores[0])
        lines.append(f"{_text(lead)} better than the next" if lead else "no better than the next")
        if lead and spread is not None and lead < spread:
            lines[-1] += f", less than its deviation over seeds, {_text(spread)}"
    return lines


def _teacher(sweep: _Sweep) -> str:
    """The teacher's mIoU, where all runs saw the same one on the same rows."""
    scores = {_text(_score(run.metrics, _TEACHER)) for run, _ in sweep.scored}
    return scores.pop() if len(scores) == 1 and _NONE not in scores else ""


def _ranking(sweep: _Sweep) -> _Table:
    """A row a run; columns that no run fills are left out."""
    found = {n for n in _METRICS if any(_score(run.metrics, n) is not None for run in sweep.runs)}
    metrics = [name for name in _METRICS if name in found - ({_LOSS} - {sweep.metric})]
    rows, failed = [], any(run.error for run in sweep.runs)
    for n, run in enumerate(sweep.runs, 1):
        unranked = _NONE if run.state == "done" else run.state
        row = [str(n) if n <= len(sweep.scored) else unranked]
        row += [_shown(run.values.get(axis)) for axis in sweep.axes]
        row += [_text(_score(run.metrics, name)) for name in metrics]
        row += [_shown(run.best_epoch), str(len(run.history)), printable(run.name)]
        rows.append([*row, *[_first(run.error)] * failed])
    headings = ["rank", *map(printable, sweep.axes), *(_METRICS[name] for name in metrics)]
    return _Table([*headings, "best epoch", "of epochs", "run", *["error"] * failed], rows)


def _settings_table(sweep: _Sweep, groups: Sequence[_Group]) -> _Table:
    rows = []
    for run, count, scores in groups:
        mean = _text(statistics.fmean(scores) if scores else None)
        deviation = _text(statistics.stdev(scores) if len(scores) > 1 else None)
        n = str(len(scores)) if len(scores) == count else f"{len(scores)} of {count}"
        span = f"{_text(min(scores))} – {_text(max(scores))}" if scores else _NONE
        values = [_shown(run.values.get(axis)) for axis in sweep.settings]
        rows.append([*values, mean, deviation, n, span])
    headings = [f"mean {_METRICS[sweep.metric]}", "deviation", "n", "lowest – highest"]
    return _Table([*map(printable, sweep.settings), *headings], rows)


def _effects(sweep: _Sweep) -> list[_Plot]:
    """The ranking metric against each setting that has several values."""
    axes = [axis for axis in sweep.settings if len(sweep.axes[axis]) > 1]
    return [_effect(sweep, axis) for axis in axes if sweep.scored]


def _effect(sweep: _Sweep, axis: str) -> _Plot:
    """A line for each combination of the other settings, if they are few."""
    others = [other for other in sweep.settings if other != axis]
    lines: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for run, score in sweep.scored:
        lines[_described(run, others)].append((_shown(run.values.get(axis)), score))
    over = f"the finished ones of {len(sweep.axes['seed'])} seeds" if sweep.has_seeds else ""
    if len(lines) > _LINES:
        lines = {"": [point for points in lines.values() for point in points]}
        over = "all finished runs with that value, whatever their other settings"
        over += " and seeds" if sweep.has_seeds else ""
    # a value that is no longer swept may still have its runs
    values = [*sweep.axes[axis], *(run.values.get(axis) for run, _ in sweep.scored)]
    levels = {_shown(value): _number(value) for value in values}
    caption = "A line for each combination of the other settings. " if len(lines) > 1 else ""
    means = f"mean over {over}; bar: their lowest to highest; faint: each run"
    caption += f"Marker: {means if over else 'a run'}."
    name = printable(axis)
    return _Plot(name, plots.effect(name, levels, lines, _METRICS[sweep.metric]), caption)


def _curves(sweep: _Sweep) -> list[_Plot]:
    """The ranking metric and the training loss by epoch, of the runs that have them."""
    found = [_curve(sweep, metric) for metric in dict.fromkeys((sweep.metric, _LOSS))]
    return [plot for plot in found if plot]


def _curve(sweep: _Sweep, metric: str) -> _Plot | None:
    lines = []
    for run in sweep.runs:
        scores = ((row.get("epoch"), _score(row, metric)) for row in run.history)
        points = [(e or n, score) for n, (e, score) in enumerate(scores, 1) if score is not None]
        if points:
            lines.append((_described(run, sweep.axes) or printable(run.name), points))
    if not lines:
        return None
    shown, label = lines[:_CURVES], _METRICS[metric]
    some = f"The {len(shown)} highest ranked of" if len(shown) < len(lines) else "All"
    caption = f"{some} {len(lines)} run{'s' * (len(lines) > 1)} with a finished epoch."
    if metric == _LOSS:
        caption += " The loss is summed under each run's own settings: its height compares only"
        caption += " runs of equal weights."
    return _Plot(f"{label} by epoch", plots.curves(shown, label), caption)


def _pictures(sweep: _Sweep) -> list[dict[str, str]]:
    """The best finished run's picture and the worst's, and what is to be said of them."""
    if len(sweep.scored) < 2:
        return [_picture(sweep, "The finished run", *one) for one in sweep.scored]
    best, worst = sweep.scored[0], sweep.scored[-1]
    return [_picture(sweep, "Best run", *best), _picture(sweep, "Worst run", *worst)]


def _picture(sweep: _Sweep, which: str, run: SweepRun, score: float) -> dict[str, str]:
    teacher = _score(run.metrics, _TEACHER)
    beside = "" if teacher is None else f", the teacher's {_text(teacher)}"
    try:
        data = run.picture.read_bytes() if run.picture else b""
    except OSError:
        data = b""
    return {
        "uri": f"data:image/jpeg;base64,{base64.b64encode(data).decode()}" if data else "",
        "heading": f"{which}: {_METRICS[sweep.metric]} {_text(score)}{beside}",
        "name": printable(run.name),
        "settings": _described(run, sweep.axes),
    }


def _run(sweep: _Sweep, run: SweepRun, base: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings, with how they stand out: those that do first."""
    rows = []
    for key, value in run.config.items():
        mark = "swept" if key in sweep.axes else "not the same in all runs" * (key in sweep.varied)
        if not mark and key in base and _shown(base[key]) != _shown(value):
            mark = f"elsewhere {_shown(base[key])}"
        rows.append((printable(key), _shown(value), mark))
    return {
        "name": printable(run.name),
        "state": run.state,
        "error": run.error,
        "settings": sorted(rows, key=lambda row: not row[2]),
    }
