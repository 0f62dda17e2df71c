"""Results as text for people; `--json` prints the same reports for machines."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kdcache.cache.format import Mirrored
from kdcache.cache.mirrored import mirrored_words
from kdcache.deploy.report import scores_text
from kdcache.tables import duration, megabytes, printable, table

if TYPE_CHECKING:
    from kdcache.bench import BenchReport
    from kdcache.cache.copy import CopyReport
    from kdcache.cache.verify import VerifyReport
    from kdcache.costs import Cost
    from kdcache.demo import DemoReport
    from kdcache.precompute.check import Check
    from kdcache.precompute.extract import ExtractReport
    from kdcache.precompute.plan import Plan
    from kdcache.precompute.refresh import RefreshReport
    from kdcache.precompute.stages import StageTimes
    from kdcache.train.loop import TrainReport

_SKIPPED_SHOWN = 20


def extract_text(report: ExtractReport) -> str:
    """What an extraction did: rows, pace, what was left out, what was skipped and why."""
    size = report.bytes_added / report.rows_added if report.rows_added else 0.0
    lines = [
        f"{report.cache}: {report.rows_total} rows, {report.rows_added} added in "
        f"{report.seconds:.1f} s on {report.device}"
        + (
            f" ({report.images_per_s:.2f} images/s, {megabytes(size)} a row)"
            if report.rows_added
            else ""
        )
    ]
    if report.rows_found:
        lines.append(f"{report.rows_found} rows were committed before and not computed again")
    if others := report.rows_total - report.rows_added - report.rows_found:
        lines.append(f"{others} more stay in it: other photos or views than were asked for")
    if report.rows_added:
        lines += ["", table(_stage_rows(report.stages))]
        lines.append(f"what set the pace: {report.stages.bottleneck}")
    rest = f"kdcache info {report.cache}"
    return "\n".join(lines + _remarks(dataclasses.asdict(report), _SKIPPED_SHOWN, rest))


def _stage_rows(times: StageTimes) -> list[Sequence[str]]:
    """How busy the threads of each stage were."""
    rows: list[Sequence[str]] = [("stage", "threads", "busy", "of the time")]
    for name, busy_s in times.busy_s.items():
        threads = times.threads[name]
        share = busy_s / threads / times.seconds if times.seconds else 0.0
        rows.append((name, str(threads), f"{busy_s:.1f} s", f"{share:.0%}"))
    return rows


def _remarks(found: Mapping[str, Any], shown: int | None = None, rest: str = "") -> list[str]:
    """What became of images that are no rows, or doubtful ones: `shown` of each kind, and where the
    rest is shown."""
    lines = [f"{count} left out: {why}" for why, count in found["left_out"].items() if count]
    for kind, heading in _KINDS.items():
        entries = found.get(kind) or {}
        if kind == "gone":
            entries = dict.fromkeys(entries, "")
        if kind == "in_train_and_val":
            entries = {f"train {train}, val {val}": "" for train, val in entries}
        if not entries:
            continue
        lines.append(f"{len(entries)} {heading}:")
        lines += [
            f"  {printable(name)}{': ' if why else ''}{why}"
            for name, why in list(entries.items())[:shown]
        ]
        if shown is not None and len(entries) > shown:
            lines.append(f"  … all of them: {rest}")
    return lines


_KINDS = {
    "skipped": "images skipped",
    "changed": "images are not what they were when they were extracted; their rows stay as they are "
    "(another --out takes them as they are now)",
    "gone": "rows are of images that the dataset does not have: removed since, or of another folder",
    "doubtful": "masks may not fit their images",
    "in_train_and_val": "images are in train and in val",
}


def refresh_text(report: RefreshReport) -> str:
    """What was computed anew."""
    found = f", {report.rows_found} of them in an earlier run" if report.rows_found else ""
    return (
        f"{report.cache}: {report.part} of {report.rows} rows computed anew in "
        f"{duration(report.seconds)} on {report.device}{found}"
    )


def plan_text(plan: Plan) -> str:
    """Cost at each precision, what both models score, and what looks wrong."""
    rows = [("precision", "bytes", "a row", "files, folders", "time")]
    rows += [
        (
            name + (" (asked for)" if name == plan.precision else ""),
            megabytes(cost.bytes),
            megabytes(cost.bytes_per_row),
            str(cost.files),
            duration(cost.seconds),
        )
        for name, cost in plan.costs.items()
    ]
    files = "" if plan.free_files is None else f" and {plan.free_files} files or folders"
    room = ""
    if plan.free_bytes is not None:
        fits = "fits" if plan.fits else "DOES NOT FIT"
        room = f"{fits}: {megabytes(plan.free_bytes)}{files} are free; "
    lines = [
        f"{plan.rows} rows to add ({plan.rows_found} are there), on {plan.device}",
        "",
        table(rows),
        "",
        room + f"what is written reaches it at {megabytes(plan.write_bytes_per_s)}/s",
        f"all of it takes about {duration(plan.seconds)}, loading the models and a first look included",
        "",
        table(_check_rows(plan.check)),
        f"picture: {plan.picture}",
        *plan.check.warnings,
        *plan.check.notes,
    ]
    return "\n".join(lines + _remarks(vars(plan), _SKIPPED_SHOWN, "kdcache plan --json"))


def _check_rows(found: Check) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [
        (f"on {found.photos} photos, given", "teacher mIoU", "explained by features")
    ]
    rows += [(name, f"{score:.3f}", "") for name, score in found.teacher.items()]
    rows += [(name, "", f"{score:.3f}") for name, score in found.detector.items()]
    return rows


def info_text(info: Mapping[str, Any]) -> str:
    """What a cache holds and costs, as `describe` found it."""
    stored = info["bytes"]
    rows = max(info["rows"], 1)
    splits = ", ".join(f"{count} {split}" for split, count in info["rows_by_split"].items())
    lines = [
        f"{info['path']}: {info['rows']} rows ({splits or 'empty'}), {info['samples']} samples at "
        f"{info['size_px']} px, {info['shards']} shards of {info['shard_files']} files, "
        f"compression {info['compression']}",
        "",
    ]
    parts = {name: stored[name] for name in ("image", "mask", "teacher_logits")}
    parts |= {f"features {tap}": size for tap, size in stored["features"].items()}
    sizes = [("part", "bytes", "a row")]
    sizes += [(name, megabytes(size), megabytes(size / rows)) for name, size in parts.items()]
    sizes.append(("total", megabytes(stored["total"]), megabytes(stored["total"] / rows)))
    lines += [table(sizes), ""]
    for tap, ratio in info["features_ratio_vs_float32"].items():
        facts = info["taps"][tap]
        channels, height, width = facts["shape"]
        grids = ", ".join(
            f"{count} channels at {height // int(factor)}×{width // int(factor)}"
            for factor, count in facts["stored_channels"].items()
        )
        lines.append(
            f"{tap}: {channels}×{height}×{width} as {facts['precision']}, {ratio:.2f}× smaller than "
            f"float32 ({grids})"
        )
    if len(info["rows_by_view"]) > 1:
        lines += [f"rows by view: {_counted(info['rows_by_view'])}", _augmentation(info)]
    # of rows that the other entries do not speak of
    names = {"views": "view 0"} if len(info["rows_by_view"]) > 1 else {}
    lines += [f"{names.get(field, field)}: {value}" for field, value in info["fingerprint"].items()]
    for part, one in info["mirrored"].items():
        measured = Mirrored(**{name: one[name] for name in Mirrored.__dataclass_fields__})
        stale = "; made by another model since: run `kdcache verify --flip` again"
        lines.append(mirrored_words(part, measured) + stale * one["of_another_model"])
    return "\n".join(lines + _remarks(info))


def _counted(counts: Mapping[int, int]) -> str:
    return ", ".join(f"{view}: {count}" for view, count in counts.items())


def _augmentation(info: Mapping[str, Any]) -> str:
    """Which transforms made the views but the first."""
    policy, seed = info["augmentation"]["policy"], info["augmentation"]["seed"]
    return f"views but 0 were made with seed {seed} by {', '.join(policy) or 'nothing'}"


def verify_text(report: VerifyReport) -> str:
    """What was read of each array, each problem with the rows it spoils, and the verdict."""
    parts = [("part", "files", "bytes", "bad files")]
    parts += [
        (name, str(part.files), megabytes(part.size_bytes), str(part.bad_files))
        for name, part in report.parts.items()
    ]
    lines = [table(parts), ""] if report.parts else []
    if report.models:
        agreement = [
            ("against the models", "rows", "bad", "largest error", "of allowed", "rel. MSE")
        ]
        agreement += [
            (
                name,
                str(part.rows),
                str(part.bad_rows),
                f"{part.largest_error:.2g}",
                f"{part.largest_of_allowed:.0%}",
                "" if part.relative_mse is None else f"{part.relative_mse:.1e}",
            )
            for name, part in report.models.items()
        ]
        lines += [table(agreement), ""]
    if report.mirrored:
        lines += [mirrored_words(part, one) for part, one in report.mirrored.items()]
        lines.append(
            f"these numbers are not kept, and training with flip_targets needs them: {report.not_kept}"
            if report.not_kept
            else "the cache keeps these numbers for `kdcache train --set flip_targets=true`"
        )
        lines.append("")
    for problem in report.bad[:_SKIPPED_SHOWN]:
        rows = ", ".join(problem.rows[:3]) + (" …" if len(problem.rows) > 3 else "")
        lines.append(f"{problem.path}: {problem.problem}" + (f" (rows {rows})" if rows else ""))
    if len(report.bad) > _SKIPPED_SHOWN:
        lines.append(f"… {len(report.bad) - _SKIPPED_SHOWN} more: --json lists all")
    if report.being_written:
        lines.append("a writer has the cache open; what it has not committed was left out")
    verdict = f"NOT OK, {len(report.bad)} problems"
    if report.ok:
        verdict = "every byte is as committed"
        verdict += ", the models agree" if report.models else ""
    lines.append(f"{report.path}: {report.rows} rows, {verdict}")
    return "\n".join(lines)


def copy_text(report: CopyReport) -> str:
    """What a copy did, and in which ways it is not the source."""
    lines = [f"{report.copy}: {report.rows} rows of {report.source}"]
    if report.rows_copied:
        lines[0] += (
            f", {report.rows_copied} copied in {report.shards_copied} shards in "
            f"{duration(report.seconds)} ({megabytes(report.bytes_read)} read, "
            f"{megabytes(report.bytes_written)} written and read back)"
        )
        if report.rows > report.rows_copied:
            lines.append(f"{report.rows - report.rows_copied} rows were there and not copied again")
    else:
        lines[0] += ", all there already: nothing was copied"
    lines += report.changes
    lines += [
        f"relative MSE that this adds to {tap}: {added:.1e}"
        for tap, added in report.added_relative_mse.items()
    ]
    return "\n".join(lines)


def train_text(report: TrainReport) -> str:
    """Where a run is and what its best epoch scores."""
    lines = [
        f"{report.run}: {report.epochs} epochs in {report.seconds:.0f} s, "
        f"best is epoch {report.best_epoch}"
    ]
    if report.metrics.get("val_student_miou") is not None:
        lines.append(scores_text({k.removeprefix("val_"): v for k, v in report.metrics.items()}))
    lines.append(f"picture: {report.picture}; curves: tensorboard --logdir {report.run}/logs")
    return "\n".join(lines)


def bench_text(report: BenchReport) -> str:
    """Rates of the loader and of training, and what student and teacher cost."""
    rows: list[Sequence[str]] = [
        (f"{report.cache}, {report.device}, {report.workers} loader threads", "rows/s"),
        ("read and decompressed, no more (the floor)", f"{report.floor_rows_per_s:.1f}"),
        ("loader, rows in a ready batch", f"{report.loader_rows_per_s:.1f}"),
        ("  of the floor", f"{report.loader_of_floor:.2f}"),
        ("loader, decoded on the device", f"{report.decoded_rows_per_s:.1f}"),
    ]
    if report.images_per_s is not None:
        rows.append((f"training, batch {report.batch_size}", f"{report.images_per_s:.2f}"))
    lines = [
        table(rows),
        f"a row is {megabytes(report.row_bytes)} on disk; the storage (or the memory it is cached in) "
        f"gave {megabytes(report.storage_bytes_per_s)}/s",
    ]
    if report.step_s is not None and report.data_wait_fraction is not None:
        lines.append(
            f"a step takes {report.step_s:.3f} s, {report.data_wait_fraction:.1%} of it waiting for data"
        )
    if report.costs:
        lines += ["", costs_text(report.costs)]
    return "\n".join(lines)


def costs_text(found: Sequence[Cost]) -> str:
    """Student beside teacher, and what the design document expects of the two."""
    from kdcache.costs import ratios  # here only: it loads torch

    rows: list[Sequence[str]] = [
        ("one image at a time", "parameters", "float32", "median", "p95", "runs", "memory")
    ]
    rows += [
        (
            f"{cost.network}, {cost.runtime} on {cost.device}",
            f"{cost.parameters / 1e6:.2f} M",
            megabytes(cost.size_bytes),
            f"{cost.latency_ms:.1f} ms",
            f"{cost.latency_p95_ms:.1f} ms",
            str(cost.runs),
            megabytes(cost.memory_bytes),
        )
        for cost in found
    ]
    compared: list[Sequence[str]] = [("student against teacher", "measured", "design document")]
    for what, measured, expected in ratios(found):
        if what == "smaller":
            values = (f"{measured:.0%}" if measured >= 0 else "no, larger", f"{expected:.0%}")
        else:
            values = (f"{measured:.2f}×", f"{expected:.2f}×")
        compared.append((what, *values))
    lines = [table(rows)]
    if len(compared) > 1:
        lines += ["", table(compared)]
    return "\n".join(lines)


def demo_text(report: DemoReport) -> str:
    """The demo's steps, and the untrained against the trained student."""
    folder, exported = report.folder, report.exported
    comparison: list[Sequence[str]] = [
        ("on the validation scenes", "untrained student", "trained student", "teacher")
    ]
    for name, key, teacher in (
        ("mIoU", "student_miou", report.trained["teacher_miou"]),
        ("agreement with the teacher", "agreement", 1.0),
        ("KL", "kl", None),
    ):
        values = (report.untrained[key], report.trained[key], teacher)
        comparison.append((name, *("" if v is None else f"{v:.3f}" for v in values)))
    return "\n".join(
        [
            "",
            "The models of this demo are stand-ins: a detector with random weights in the form of "
            "YOLOv9-E's layer 34,",
            "a teacher that looks at colours, drawn scenes. The pipeline, cache and student are real.",
            "",
            "extract  " + extract_text(report.extraction),
            "cache    " + ", ".join(_cache_facts(report.cache)),
            f"train    {report.training.run}: {report.training.epochs} epochs in "
            f"{report.training.seconds:.0f} s, no frozen model loaded",
            f"export   {exported.path}: {megabytes(exported.size_bytes)}, opset {exported.opset}; masks "
            f"equal to PyTorch's at batch {', '.join(map(str, exported.agreement))} in ONNX Runtime",
            f"picture  {report.overlay}",
            "",
            table(comparison),
            "",
            "With your own models and data:",
            "  kdcache extract --images DIR --coco FILE --val-fraction 0.1 --yolo FILE.onnx "
            "--teacher FILE --out my.zarr",
            "  kdcache train my.zarr --out runs/first",
            f"Look closer:  kdcache info {folder}/cache.zarr   "
            f"kdcache evaluate {folder}/run {folder}/cache.zarr",
        ]
    )


def _cache_facts(info: Mapping[str, Any]) -> list[str]:
    ratios = info["features_ratio_vs_float32"].values()
    return [
        megabytes(info["bytes"]["total"]),
        f"{megabytes(info['bytes_per_row'])} a row",
        *(f"features {ratio:.1f}× smaller than float32" for ratio in ratios),
    ]
