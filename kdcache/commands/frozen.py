"""Commands of the frozen models and the cache: demo, extract, plan, info, verify, copy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from kdcache.options import (
    EXIT_FAILED,
    EXIT_SKIPPED,
    cache_argument,
    compression_option,
    config_options,
    example,
    frozen_device_option,
    input_options,
    json_option,
    option,
    path,
    place,
    precision_option,
    show,
    with_logging_above_bars,
    workers_option,
)


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
    if logits_only and options["yolo_target_layer"]:
        raise click.UsageError("--tap is of the detector's features: not with --logits-only")
    if logits_only and features_only:
        raise click.UsageError("--logits-only and --features-only leave nothing to store")
    flags = {name: options.pop(name) for name in ExtractConfig.model_fields if name in options}
    flags["yolo_target_layer"] = flags["yolo_target_layer"] or None
    if logits_only or features_only:
        flags["store"] = "logits" if logits_only else "features"
    settings = load(ExtractConfig, config, assignments, flags)
    if flags["augment"] and settings.views == 1:
        raise click.UsageError("--augment is of further views: give --views K, 2 or more")
    from kdcache.precompute import dataset

    if coco is not None:
        data = dataset.coco_dataset(images, coco, all_images, settings.category)
    elif masks is not None:
        data = dataset.folder_dataset(images, masks)
    else:
        data = dataset.unlabelled_dataset(images)
    return {"config": settings, "dataset": data, **options}


@click.command("demo", epilog=example("kdcache demo --out demo", "kdcache info demo/cache.zarr"))
@option("--out", type=path, default=Path("demo"), show_default=True, help="Folder to work in.")
@json_option
@with_logging_above_bars
def demo_command(out: Path, as_json: bool) -> None:
    """Run the whole pipeline on stand-in models and drawn scenes (about a minute on 2 cores)."""
    from kdcache.demo import demo
    from kdcache.report import demo_text

    report = demo(out, progress=True)
    show(report, as_json, demo_text)


@click.command(
    epilog=example(
        "kdcache extract --images val2017 --coco instances_val2017.json --val-fraction 0.1 \\",
        "    --yolo yolov9_e.onnx --teacher 2020-09-23a.pth --out coco.zarr",
        "kdcache extract … --views 4 --augment heavy --tap LAYER_34 --tap LAYER_37 --out rich.zarr",
        "kdcache extract … --out s3://bucket/coco.zarr --dask tcp://10.0.0.1:8786",
    )
)
@input_options
@option(
    "--refresh",
    metavar="teacher|detector|TAP",
    help="Compute one part of the cache anew, with the --teacher or --yolo given.",
)
@option("--strict", is_flag=True, help="Stop at the first image that cannot be used.")
@option("--dask", "scheduler", metavar="ADDRESS|FILE", help="Work on a dask cluster's workers.")
@option(
    "--local-workers",
    type=click.IntRange(1),
    metavar="N",
    help="Work in N processes here, one a GPU where there are GPUs.",
)
@config_options
@json_option
@with_logging_above_bars
def extract(
    strict: bool,
    scheduler: str | None,
    local_workers: int | None,
    refresh: str | None,
    as_json: bool,
    **inputs: Any,
) -> None:
    """Run both frozen models over a dataset, once, into a cache.

    Run again to resume, or to append new images; exit status 3 when some images were skipped.
    With --refresh one model runs again over the pixels in the cache; --images is not needed then.
    """
    if refresh is not None:
        if scheduler or local_workers:
            raise click.UsageError(
                "--refresh works in one process: without --dask, --local-workers"
            )
        _refresh(refresh, as_json, **inputs)
        return
    if scheduler and local_workers:
        raise click.UsageError("--dask and --local-workers: one of them")
    arguments = {**_inputs(**inputs), "strict": strict, "progress": True}
    from kdcache.report import extract_text

    if scheduler or local_workers:
        from kdcache import cluster
        from kdcache.precompute.distributed import extract_on

        workers = (
            cluster.connected(scheduler)
            if scheduler
            else cluster.local_workers(local_workers or 1, device=arguments["device"], nthreads=2)
        )
        with workers as client:
            report = extract_on(client, **arguments)
    else:
        from kdcache.precompute.extract import extract as extract_here

        report = extract_here(**arguments)
    show(report, as_json, extract_text)
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
    flags = {name: given[name] or None for name in ExtractConfig.model_fields if name in given}
    settings = load(ExtractConfig, config, assignments, flags)
    from kdcache.precompute.refresh import refresh
    from kdcache.report import refresh_text

    report = refresh(settings, out, part, device=device, batch_size=batch_size, progress=True)
    show(report, as_json, refresh_text)


@click.command(
    epilog=example(
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
@with_logging_above_bars
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
    show(report, as_json, plan_text)
    if not report.fits:
        sys.exit(EXIT_FAILED)


@click.command(epilog=example("kdcache info coco.zarr", "kdcache info coco.zarr --png rows.png"))
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
    show(describe(opened), as_json, info_text)


@click.command(
    epilog=example(
        "kdcache verify coco.zarr",
        "kdcache verify coco.zarr --yolo yolov9_e.onnx --teacher 2020-09-23a.pth --rows 32",
        "kdcache verify coco.zarr --flip --yolo yolov9_e.onnx --teacher 2020-09-23a.pth",
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
@option(
    "--flip",
    is_flag=True,
    help="Also measure how far mirrored targets are from the models on mirrored photos; kept for "
    "flip_targets.",
)
@frozen_device_option
@option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Threads.")
@json_option
@with_logging_above_bars
def verify(
    cache: Path,
    yolo: Path | None,
    teacher: Path | None,
    rows: int,
    seed: int,
    flip: bool,
    device: Any,
    workers: int,
    as_json: bool,
) -> None:
    """Read every byte of a cache and compare it with what was committed.

    With --yolo or --teacher it also runs them again on the stored pixels of some rows: what is
    stored must lie within the stated error of its precision, and 1e-3 of a channel's largest
    value for what another device may round. Exit status 1 when anything is not as it was written.
    """
    if flip and not (yolo or teacher):
        raise click.UsageError("--flip runs the models: give --yolo FILE, --teacher FILE or both")
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
            flip=flip,
            progress=True,
        )
    else:
        from kdcache.cache.verify import verify as verify_cache

        report = verify_cache(cache, workers=workers, progress=True)
    show(report, as_json, verify_text)
    if not report.ok:
        sys.exit(EXIT_FAILED)


@click.command(
    epilog=example(
        "kdcache copy coco.zarr s3://bucket/coco.zarr",
        "kdcache copy coco.zarr small.zarr --split train --precision int5",
    )
)
@click.argument("source", metavar="SRC", type=place)
@click.argument("destination", metavar="DST", type=place)
@option("--split", type=click.Choice(["train", "val"]), help="Only the rows of one split.")
@option("--views", type=click.IntRange(1), metavar="K", help="Only the first K views.")
@option(
    "--tap", "taps", multiple=True, metavar="NAME", help="Only this tap's features; repeatable."
)
@option("--logits-only", is_flag=True, help="Without the features.")
@option("--features-only", is_flag=True, help="Without the teacher's logits.")
@precision_option("How features are stored there: as they are, or lower.")
@compression_option("How all arrays are compressed there (as they are).")
@workers_option("Threads that read, encode and write.")
@json_option
@with_logging_above_bars
def copy(
    source: Any,
    destination: Any,
    split: str | None,
    views: int | None,
    taps: tuple[str, ...],
    logits_only: bool,
    features_only: bool,
    precision: Any,
    compression: Any,
    workers: int,
    as_json: bool,
) -> None:
    """Copy a cache, whole or thinned, from SRC to DST: folders or URLs.

    Every byte is checked against what was committed, and read back. Run again to go on after a
    stop, or to add what SRC got since. A precision lowered from float32 is what an extraction at it
    gives; from any other, values are rounded twice, and the copy says so.
    """
    if logits_only and (features_only or taps):
        other = "--features-only" if features_only else "--tap"
        raise click.UsageError(f"--logits-only and {other} exclude each other")
    from kdcache.cache.copy import copy_cache
    from kdcache.cache.thin import Thinning
    from kdcache.report import copy_text

    thinning = Thinning(
        split=split,
        views=views,
        taps=taps,
        store="logits" if logits_only else "features" if features_only else "both",
        precision=precision,
        compression=compression,
    )
    report = copy_cache(source, destination, thinning, workers=workers, progress=True)
    show(report, as_json, copy_text)
