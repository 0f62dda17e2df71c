"""The `kdcache` command: parses, calls one function, prints. Heavy imports stay inside commands."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from kdcache import __version__
from kdcache.allocator import keep_freed_memory
from kdcache.errors import KdcacheError
from kdcache.options import (
    Command,
    cache_argument,
    config_options,
    device_option,
    frozen_device_option,
    input_options,
    json_option,
    option,
    path,
    run_argument,
)

EXIT_FAILED, EXIT_SKIPPED = 1, 3


class _Group(click.Group):
    """Catches every KdcacheError once: its message on stderr, exit status 1."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except (KdcacheError, OSError) as error:  # a full or read-only disk is no bug
            if isinstance(error, BrokenPipeError):
                raise
            if _leads():
                click.echo(f"error: {error}", err=True)
            context.exit(EXIT_FAILED)
        except KeyboardInterrupt:
            if _leads():
                click.echo(
                    "stopped; what is committed stays: the same command (train: with --resume) "
                    "goes on",
                    err=True,
                )
            context.exit(EXIT_FAILED)


def _example(*lines: str) -> str:
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_example("kdcache demo"),
)
@click.version_option(__version__, "-V", "--version")
def main() -> None:
    """Distil once, train many times.

    `extract` runs the frozen networks over a dataset and stores what a student needs in a cache;
    `train` uses the cache alone.
    """
    _log_to_stderr()
    keep_freed_memory()
    # Pillow's remarks on odd files name no file; what matters of them is an error of ours
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _log_to_stderr() -> None:
    """The course of things: a few lines, as good in a batch job's log as on a terminal."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("kdcache")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if _leads() else logging.ERROR)


def _leads() -> bool:
    """Whether this is the process that speaks, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _with_logging_above_bars(command: Command) -> Command:
    """Log lines must not tear a progress bar."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        from tqdm.contrib.logging import logging_redirect_tqdm

        with logging_redirect_tqdm([logging.getLogger("kdcache")]):
            return command(*args, **kwargs)

    return wrapped


def _inputs(
    images: Path | None,
    masks: Path | None,
    coco: Path | None,
    unlabelled: bool,
    all_images: bool,
    logits_only: bool,
    features_only: bool,
    config: str | None,
    assignments: tuple[str, ...],
    **options: Any,
) -> dict[str, Any]:
    """The input options as arguments of the library's `plan` and `extract`."""
    from kdcache.config import ExtractConfig, load

    if images is None:
        raise click.UsageError("give --images DIR")
    if sum((masks is not None, coco is not None, unlabelled)) != 1:
        raise click.UsageError("give --masks DIR, --coco FILE or --unlabelled, one of them")
    if logits_only and features_only:
        raise click.UsageError("--logits-only and --features-only leave nothing to store")
    flags = {name: options.pop(name) for name in ExtractConfig.model_fields if name in options}
    if logits_only or features_only:
        flags["store"] = "logits" if logits_only else "features"
    settings = load(ExtractConfig, config, assignments, flags)
    from kdcache.precompute import dataset

    if coco is not None:
        data = dataset.coco_dataset(images, coco, all_images, settings.category)
    elif masks is not None:
        data = dataset.folder_dataset(images, masks)
    else:
        data = dataset.unlabelled_dataset(images)
    return {"config": settings, "dataset": data, **options}


@main.command("demo", epilog=_example("kdcache demo --out demo", "kdcache info demo/cache.zarr"))
@option("--out", type=path, default=Path("demo"), show_default=True, help="Folder to work in.")
@json_option
@_with_logging_above_bars
def demo_command(out: Path, as_json: bool) -> None:
    """Run the whole pipeline on stand-in models and drawn scenes (about a minute on 2 cores)."""
    from kdcache.demo import demo
    from kdcache.report import demo_text

    report = demo(out, progress=True)
    _print(report, as_json, demo_text)


@main.command(
    epilog=_example(
        "kdcache extract --images val2017 --coco instances_val2017.json --val-fraction 0.1 \\",
        "    --yolo yolov9_e.onnx --teacher 2020-09-23a.pth --out coco.zarr",
    )
)
@input_options
@option(
    "--refresh",
    metavar="teacher|TAP",
    help="Compute one part of the cache anew, with the --teacher or --yolo given.",
)
@option("--strict", is_flag=True, help="Stop at the first image that cannot be used.")
@config_options
@json_option
@_with_logging_above_bars
def extract(strict: bool, refresh: str | None, as_json: bool, **inputs: Any) -> None:
    """Run both frozen models over a dataset, once, into a cache.

    Run again to resume, or to append new images; exit status 3 when some images were skipped.
    With --refresh one model runs again over the pixels in the cache; --images is not needed then.
    """
    if refresh is not None:
        _refresh(refresh, as_json, **inputs)
        return
    arguments = _inputs(**inputs)
    from kdcache.precompute import extract as engine
    from kdcache.report import extract_text

    report = engine.extract(**arguments, strict=strict, progress=True)
    _print(report, as_json, extract_text)
    if report.skipped or report.changed:
        sys.exit(EXIT_SKIPPED)


def _refresh(
    part: str,
    as_json: bool,
    *,
    out: Path,
    device: Any,
    batch_size: int | None,
    config: str | None,
    assignments: tuple[str, ...],
    **given: Any,
) -> None:
    from kdcache.config import ExtractConfig, load

    used = {"out", "refresh", "device", "batch_size", "config", "assignments", "as_json"}
    used |= {"teacher_checkpoint"} if part == "teacher" else {"yolo_onnx_path", "yolo_input"}
    context = click.get_current_context()
    needless = [
        option.opts[0]
        for option in context.command.params
        if option.name not in used
        and context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
    ]
    if needless:
        raise click.UsageError(
            f"--refresh {part} takes rows, and how they are stored, from the cache: without "
            f"{', '.join(needless)}"
        )
    flags = {name: given[name] for name in ExtractConfig.model_fields if name in given}
    settings = load(ExtractConfig, config, assignments, flags)
    from kdcache.precompute.refresh import refresh
    from kdcache.report import refresh_text

    report = refresh(settings, out, part, device=device, batch_size=batch_size, progress=True)
    _print(report, as_json, refresh_text)


@main.command(
    epilog=_example(
        "kdcache plan --images train2017 --coco instances_train2017.json --yolo yolov9_e.onnx \\",
        "    --teacher 2020-09-23a.pth --out /data/coco.zarr",
    )
)
@input_options
@option(
    "--png",
    "picture",
    type=path,
    default=Path("plan.png"),
    show_default=True,
    help="Picture to draw: photo, mask, teacher.",
)
@config_options
@json_option
@_with_logging_above_bars
def plan(as_json: bool, **inputs: Any) -> None:
    """Tell what `extract` with the same options would take, and look at both models first.

    Bytes, files and time at each precision, from a trial on a few photos; what the models score on
    them, and whether another channel order, scale or normalisation scores better. Exit status 1
    when it does not fit on the disk.
    """
    arguments = _inputs(**inputs)
    from kdcache.precompute.plan import plan as make_plan
    from kdcache.report import plan_text

    report = make_plan(**arguments, progress=True)
    _print(report, as_json, plan_text)
    if not report.fits:
        sys.exit(EXIT_FAILED)


@main.command(epilog=_example("kdcache info coco.zarr", "kdcache info coco.zarr --png rows.png"))
@cache_argument
@option("--png", type=path, metavar="FILE", help="Draw rows: photo, mask, teacher, features.")
@option(
    "--rows", type=click.IntRange(1), default=6, show_default=True, help="Rows that --png draws."
)
@json_option
def info(cache: Path, png: Path | None, rows: int, as_json: bool) -> None:
    """Show what a cache holds and what it costs."""
    import kdcache
    from kdcache.cache.info import describe
    from kdcache.report import info_text

    opened = kdcache.open(cache)
    if png is not None:
        from kdcache.cache.picture import save_rows

        save_rows(png, opened, rows)
    _print(describe(opened), as_json, info_text)


@main.command(
    epilog=_example(
        "kdcache verify coco.zarr",
        "kdcache verify coco.zarr --yolo yolov9_e.onnx --teacher 2020-09-23a.pth --rows 32",
    )
)
@cache_argument
@option("--yolo", type=path, help="Run the detector again on some rows and compare.")
@option("--teacher", type=path, help="Run the teacher again on some rows and compare.")
@option(
    "--rows",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Rows that the models are run on.",
)
@option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Which rows.")
@frozen_device_option
@option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Threads.")
@json_option
@_with_logging_above_bars
def verify(
    cache: Path,
    yolo: Path | None,
    teacher: Path | None,
    rows: int,
    seed: int,
    device: Any,
    workers: int,
    as_json: bool,
) -> None:
    """Read every byte of a cache and compare it with what was committed.

    With --yolo or --teacher it also runs them again on the stored pixels of some rows: what is
    stored must lie within the stated error of its precision, and 1e-3 of a channel's largest
    value for what another device may round. Exit status 1 when anything is not as it was written.
    """
    from kdcache.report import verify_text

    if yolo or teacher:
        from kdcache.precompute.recheck import verify_with_models

        report = verify_with_models(
            cache,
            yolo=yolo,
            teacher=teacher,
            rows=rows,
            seed=seed,
            device=device,
            workers=workers,
            progress=True,
        )
    else:
        from kdcache.cache.verify import verify as verify_cache

        report = verify_cache(cache, workers=workers, progress=True)
    _print(report, as_json, verify_text)
    if not report.ok:
        sys.exit(EXIT_FAILED)


@main.command(
    epilog=_example(
        "kdcache train coco.zarr --out runs/first --epochs 50 --batch-size 4",
        "kdcache train coco.zarr --out runs/first --resume",
    )
)
@click.argument("cache", type=path, required=False)
@option("--out", type=path, help="Run folder to write; needed.")
@option("--resume", is_flag=True, help="Go on with the run in --out, with its settings.")
@option("--extend", is_flag=True, help="With --resume: to more --epochs than it had.")
@option("--init-from", type=path, metavar="RUN", help="Begin with the best student of a run.")
@option("--print-config", is_flag=True, help="Print all settings as TOML, and do nothing.")
@option("--epochs", type=int, help="Passes over the training rows (50).")
@option("--batch-size", type=int, help="Rows a step (4).")
@option("--feature-weight", type=float, help="Weight of the feature loss (0.5).")
@option("--mixed-precision/--no-mixed-precision", default=None, help="Autocast the networks.")
@option("--seed", type=int, help="Seed of weights and order (0).")
@option(
    "--encoder-weights",
    metavar="FILE|imagenet|random",
    help="The student encoder's weights at the start (imagenet: of the hub, or its local cache).",
)
@device_option
@config_options
@json_option
@_with_logging_above_bars
def train(
    cache: Path | None,
    out: Path | None,
    resume: bool,
    extend: bool,
    init_from: Path | None,
    print_config: bool,
    device: str,
    config: str | None,
    assignments: tuple[str, ...],
    as_json: bool,
    **flags: Any,
) -> None:
    """Train a student from a cache; neither frozen model is needed.

    On several GPUs: `torchrun --nproc-per-node=4 -m kdcache train …`; --batch-size is of each.
    """
    if extend and not resume:
        raise click.UsageError("--extend goes with --resume")
    if extend and not (flags["epochs"] or config or assignments):
        raise click.UsageError("--extend goes with more --epochs")
    if resume and init_from is not None:
        raise click.UsageError("--init-from begins a run; --resume goes on with one")
    if not print_config and (cache is None or out is None):
        raise click.UsageError("give the cache and --out: kdcache train CACHE --out RUN")
    from kdcache.config import DEFAULT_CONFIG, TrainConfig, load
    from kdcache.report import train_text

    stored = out / "config.toml" if resume and out is not None else None
    base = str(stored) if stored is not None and stored.exists() else DEFAULT_CONFIG
    settings = load(TrainConfig, config, assignments, flags, base)
    if print_config or cache is None or out is None:
        click.echo(settings.to_toml(), nl=False)
        return
    from kdcache.train import loop

    report = loop.train(
        cache,
        out,
        settings,
        device=device,
        resume=resume,
        extend=extend,
        init_from=init_from,
        progress=True,
    )
    if _leads():
        _print(report, as_json, train_text)


@main.command(epilog=_example("kdcache evaluate runs/first coco.zarr"))
@run_argument
@cache_argument
@option("--split", default="val", show_default=True, type=click.Choice(["train", "val"]))
@device_option
@json_option
def evaluate(run: Path, cache: Path, split: str, device: str, as_json: bool) -> None:
    """Score a run's best student against the masks and the teacher."""
    import kdcache
    from kdcache.report import evaluate_text
    from kdcache.train.evaluate import evaluate as score_run

    _print(score_run(run, kdcache.open(cache), split, device), as_json, evaluate_text)


@main.command(epilog=_example("kdcache export runs/first --out student.onnx"))
@run_argument
@option("--out", type=path, required=True, help="ONNX file to write.")
@json_option
def export(run: Path, out: Path, as_json: bool) -> None:
    """Export a run's best student to ONNX, checked against PyTorch in ONNX Runtime."""
    from kdcache.report import export_text
    from kdcache.train.export import export as export_run

    _print(export_run(run, out), as_json, export_text)


def _print(report: Any, as_json: bool, as_text: Callable[[Any], str]) -> None:
    click.echo(_json(report) if as_json else as_text(report))


def _json(report: Any) -> str:
    import dataclasses

    values = report if isinstance(report, Mapping) else dataclasses.asdict(report)
    return json.dumps(values, indent=1, default=str, ensure_ascii=False)


@main.command(
    epilog=_example(
        "kdcache bench coco.zarr", "kdcache bench coco.zarr --run runs/first --teacher teacher.onnx"
    )
)
@cache_argument
@option("--run", type=path, help="Take a run's settings, and measure its student.")
@option("--teacher", type=path, help="Measure a teacher beside it.")
@option("--batch-size", type=click.IntRange(1), help="Rows a step (the run's, else 4).")
@option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Loader threads.")
@option(
    "--steps",
    type=click.IntRange(0),
    default=4,
    show_default=True,
    help="Training steps that are timed, after one that is not.",
)
@device_option
@json_option
def bench(cache: Path, as_json: bool, **options: Any) -> None:
    """Time a cache on this machine: the loader against its floor, and training steps.

    The floor is what no reader can do without: reading the same bytes and decompressing them, in as
    many threads. Small caches lie in memory after the first round; then no disk is measured.
    """
    import kdcache
    from kdcache.bench import bench as measure
    from kdcache.report import bench_text

    _print(measure(kdcache.open(cache), **options), as_json, bench_text)
