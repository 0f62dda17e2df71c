"""A sweep's ranking as text and as JSON."""

from __future__ import annotations

from typing import Any

from kdcache.sweep.runs import SweepRun, measured, ranking
from kdcache.sweep.sweep import SweepReport
from kdcache.tables import duration, printable, table

_SHOWN = 20

_METRICS = {
    "val_student_miou": "val mIoU",
    "val_agreement": "agreement",
    "val_boundary_f": "boundary F",
    "val_kl": "KL",
    "train_total": "training loss",
}


def sweep_text(report: SweepReport) -> str:
    """The best runs, those that failed and why, and where everything lies."""
    ranked = sorted(report.runs, key=ranking)
    finished = [run for run in ranked if run.state == "done"]
    names = [
        name for name in _METRICS if any(run.metrics.get(name) is not None for run in finished)
    ]
    rows = [("rank", *report.axes, *(_METRICS[name] for name in names), "best epoch")]
    rows += [
        (
            str(place),
            *_values(run),
            *(_text(run.metrics.get(name)) for name in names),
            str(run.best_epoch),
        )
        for place, run in enumerate(finished[:_SHOWN], 1)
    ]
    lines = [f"{len(finished)} of {len(ranked)} runs done in {duration(report.seconds)}", ""]
    lines += [table(rows)] if finished else []
    if len(finished) > _SHOWN:
        lines.append(f"… {len(finished) - _SHOWN} more: {report.csv}")
    for run in report.failed:
        lines.append(f"failed: {printable(run.name)}: {run.error}")
    if report.failed:
        lines.append(
            "the same command tries failed runs again; one whose folder is damaged begins anew when that "
            "is deleted"
        )
    lines.append(f"page: {report.page}; table: {report.csv}; runs: {report.out / 'runs'}")
    return "\n".join(lines)


def as_facts(report: SweepReport) -> dict[str, Any]:
    """What `kdcache sweep --json` prints."""
    return {
        "out": report.out,
        "csv": report.csv,
        "page": report.page,
        "seconds": report.seconds,
        "runs": [
            {
                "run": run.path,
                "settings": dict(run.values),
                "state": run.state,
                "error": run.error,
                "best_epoch": run.best_epoch,
                "epochs": len(run.history),
                **measured(run),
            }
            for run in sorted(report.runs, key=ranking)
        ],
    }


def _values(run: SweepRun) -> list[str]:
    return [f"{v:g}" if isinstance(v, float) else str(v) for v in run.values.values()]


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
