"""What became of students, as text for people; `--json` prints the same reports for machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kdcache.tables import megabytes, printable, table

if TYPE_CHECKING:
    from kdcache.deploy.export import ExportReport
    from kdcache.deploy.predict import PredictReport

_SKIPPED_SHOWN = 20

_SCORES = {
    "student_miou": "student mIoU",
    "teacher_miou": "teacher mIoU",
    "iou_person_pooled": "student IoU of person, pooled",
    "boundary_f": "student boundary F",
    "teacher_boundary_f": "teacher boundary F",
    "false_positive_rate": "false positives where no person is",
    "agreement": "agreement with the teacher",
    "kl": "KL",
    "mse": "MSE",
    "bce": "BCE",
    "dice": "Dice",
    "feature_loss": "feature loss",
}

_SHORT = {
    "student_miou": "mIoU",
    "teacher_miou": "teacher's",
    "iou_person_pooled": "person, pooled",
    "boundary_f": "boundary F",
    "teacher_boundary_f": "teacher's",
    "false_positive_rate": "false pos.",
    "agreement": "agreement",
    "kl": "KL",
    "mse": "MSE",
    "bce": "BCE",
    "dice": "Dice",
    "feature_loss": "feature",
}

# The design document's section on expected results, after training on data of COCO's size.
_EXPECTED = {
    "student_miou": "0.65-0.70",
    "teacher_miou": "0.89",
    "agreement": ">= 0.85",
    "kl": "0.1-1.0",
    "feature_loss": "< 1.0",
}


def scores_text(scores: Mapping[str, Any]) -> str:
    """The scores of a student, one a line."""
    return table(
        [
            (label, f"{scores[name]:.4f}")
            for name, label in _SCORES.items()
            if scores.get(name) is not None
        ]
    )


def evaluate_text(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """The scores of one student or of several, side by side, and what the design document expects."""
    first = evaluations[0]
    temperatures = dict.fromkeys(f"{one['temperature']:g}" for one in evaluations)
    lines = [
        f"{first['rows']} rows of split {first['split']}; KL at T = {', '.join(temperatures)}",
        "",
    ]
    names = [name for name in _SCORES if any(one[name] is not None for one in evaluations)]
    if len(evaluations) == 1:
        rows: list[Sequence[str]] = [("", "measured", "design document")]
        rows += [(_SCORES[n], f"{first[n]:.4f}", _EXPECTED.get(n, "")) for n in names]
        lines.insert(0, str(first["student"]))
    else:
        rows = [("", *(_SHORT[name] for name in names))]
        for one in evaluations:
            values = ("" if one[name] is None else f"{one[name]:.4f}" for name in names)
            rows.append((str(one["student"]), *values))
        rows.append(("design document", *(_EXPECTED.get(name, "") for name in names)))
    lines.append(table(rows))
    lines.append("(the design document's values are for training on data of COCO's size)")
    return "\n".join(lines)


def predict_text(report: PredictReport) -> str:
    """How many masks were written, and what was skipped and why."""
    lines = [
        f"{report.images} masks in {report.out}, {report.seconds:.1f} s on {report.device} "
        f"({report.images_per_s:.2f} images/s)"
    ]
    lines += [f"{count} left out: {why}" for why, count in report.left_out.items()]
    if report.skipped:
        lines.append(f"{len(report.skipped)} images skipped:")
        shown = list(report.skipped.items())[:_SKIPPED_SHOWN]
        lines += [f"  {printable(name)}: {why}" for name, why in shown]
        if len(report.skipped) > _SKIPPED_SHOWN:
            lines.append("  … all of them: kdcache predict --json")
    return "\n".join(lines)


def export_text(report: ExportReport) -> str:
    """The exported file, how its masks compare with PyTorch's, and what it is worth and costs."""
    batch = "any batch" if report.batch is None else f"batch {report.batch}"
    lines = [
        f"{report.path}: {megabytes(report.size_bytes)}, {report.precision}, opset {report.opset}, "
        f"{batch}, input {report.input}",
        f"{report.parameters / 1e6:.2f} M parameters of the student, {report.weights / 1e6:.2f} M weights "
        "in the file, none of the projection's",
        "",
    ]
    rows: list[Sequence[str]] = [
        ("against PyTorch", "other pixels, no ties", "of", "logits within")
    ]
    rows += [
        (
            f"batch {batch_size}",
            str(found.different_pixels),
            str(found.pixels),
            f"{found.max_difference:.2g}",
        )
        for batch_size, found in report.agreement.items()
    ]
    lines += [table(rows), ""]
    measured: list[Sequence[str]] = [("on this CPU", "PyTorch", "this file")]
    if report.miou is not None and report.pytorch_miou is not None:
        lost = round(report.pytorch_miou - report.miou, 4) + 0.0  # no minus before a zero
        measured.append(
            (f"mIoU on {report.rows} rows", f"{report.pytorch_miou:.4f}", f"{report.miou:.4f}")
        )
        measured.append(("  lost by the export", "", f"{lost:+.4f}"))
    latencies = (report.pytorch_latency_ms, report.latency_ms)
    measured.append((f"latency of {report.batch or 1}", *(f"{ms:.1f} ms" for ms in latencies)))
    lines.append(table(measured))
    if report.miou is None:
        lines.append(
            "mIoU was not measured: there is no cache of this student's; give --cache CACHE"
        )
    return "\n".join(lines)
