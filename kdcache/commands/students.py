"""Commands of students: train, sweep, evaluate, predict, export, bench."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from kdcache.options import (
    EXIT_SKIPPED,
    as_json_text,
    cache_argument,
    config_options,
    device_option,
    example,
    json_option,
    leads,
    option,
    path,
    place,
    show,
    train_options,
    with_logging_above_bars,
)


@click.command(
    epilog=example(
        "kdcache train coco.zarr --out runs/first --epochs 50 --batch-size 4",
        "kdcache train coco.zarr --out runs/first --resume",
    )
)
@click.argument("cache", type=place, required=False)
@option("--out", type=path, help="Run folder to write; needed.")
@option("--resume", is_flag=True, help="Go on with the run in --out, with its settings.")
@option("--extend", is_flag=True, help="With --resume: to more --epochs than it had.")
@option("--init-from", type=path, metavar="RUN", help="Begin with the best student of a run.")
@option("--print-config", is_flag=True, help="Print all settings as TOML, and do nothing.")
@train_options
@config_options
@json_option
@with_logging_above_bars
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
    if leads():
        show(report, as_json, train_text)


@click.command(
    epilog=example(
        "kdcache sweep coco.zarr --out sweeps/weights --epochs 20 \\",
        "    --grid feature_weight=0,0.5,1 --grid temperature=1,3 --grid seed=0,1",
        "kdcache sweep coco.zarr --out sweeps/lr --random 12 --grid learning_rate=1e-5..1e-3:log",
        "kdcache sweep coco.zarr --out sweeps/seeds --grid seed=0,1,2 --dask tcp://10.0.0.1:8786",
    )
)
@cache_argument
@option("--out", type=path, required=True, help="Folder of the sweep; its runs lie in runs/.")
@option(
    "--grid",
    "axes",
    multiple=True,
    metavar="KEY=V1,V2…",
    help="Values of a setting; each with all of the others'. Also KEY=LOW..HIGH[:log].",
)
@option("--random", type=click.IntRange(1), metavar="N", help="N random draws, not all.")
@option(
    "--jobs",
    type=click.IntRange(1),
    metavar="N",
    help="Processes (one a GPU, else one), or workers of --dask that are used (all).",
)
@option(
    "--together",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="K",
    help="Runs of one process that share each batch.",
)
@option(
    "--dask",
    metavar="ADDRESS|FILE",
    help="Train on the workers of this dask scheduler (or scheduler file), one at a time on each; cache "
    "and --out lie where all see them.",
)
@train_options
@config_options
@json_option
@with_logging_above_bars
def sweep(
    cache: Path,
    out: Path,
    axes: tuple[str, ...],
    random: int | None,
    jobs: int | None,
    together: int,
    dask: str | None,
    device: str,
    config: str | None,
    assignments: tuple[str, ...],
    as_json: bool,
    **flags: Any,
) -> None:
    """Train many students from one cache, and rank them in a table and a page.

    Run again to resume: finished runs are kept, stopped ones go on, failed ones are tried again.
    A TOML file may give the axes too, as a table [grid]. Exit status 3 when some runs failed.
    """
    from kdcache.config import TrainConfig, load
    from kdcache.sweep.grid import parse_axes
    from kdcache.sweep.report import as_facts, sweep_text
    from kdcache.sweep.sweep import sweep as run_sweep

    table: dict[str, Any] = {}
    settings = load(TrainConfig, config, assignments, flags, grid=table)
    parsed = parse_axes(axes, table)
    set_by_name = {assignment.partition("=")[0].strip() for assignment in assignments}
    given = {name for name, value in flags.items() if value is not None} | set_by_name
    if not parsed and (given or config or random):
        raise click.UsageError(
            "settings go with --grid; without it the sweep in --out goes on with its own"
        )
    if twice := sorted(given & parsed.keys()):
        raise click.UsageError(f"{twice[0]} is swept by --grid and set besides; give it once")
    report = run_sweep(
        cache,
        out,
        parsed,
        settings,
        random=random,
        device=device,
        jobs=jobs,
        together=together,
        dask=dask,
        progress=True,
    )
    if as_json:
        click.echo(as_json_text(as_facts(report)))
    else:
        click.echo(sweep_text(report))
    if report.failed:
        sys.exit(EXIT_SKIPPED)


@click.command(
    epilog=example(
        "kdcache evaluate runs/first coco.zarr",
        "kdcache evaluate runs/first student_int8.onnx coco.zarr --csv images.csv --png worst.png",
    )
)
@click.argument("students", metavar="RUN|FILE...", type=path, nargs=-1, required=True)
@cache_argument
@option("--split", default="val", show_default=True, type=click.Choice(["train", "val"]))
@option("--csv", "table_file", type=path, metavar="FILE", help="Write every image's scores.")
@option("--png", type=path, metavar="FILE", help="Draw the images of the lowest mIoU.")
@option(
    "--worst", type=click.IntRange(1), default=8, show_default=True, help="Images that --png draws."
)
@device_option
@json_option
@with_logging_above_bars
def evaluate(
    students: tuple[Path, ...],
    cache: Path,
    split: str,
    table_file: Path | None,
    png: Path | None,
    worst: int,
    device: str,
    as_json: bool,
) -> None:
    """Score students against the masks and the teacher: runs, or .safetensors and .onnx files.

    --json prints an object for one student, a list of them for several.
    """
    import kdcache
    from kdcache.deploy import evaluate as scoring
    from kdcache.deploy.report import evaluate_text
    from kdcache.deploy.trained import open_student

    opened = kdcache.open(cache)
    networks = [open_student(student, device, features=True) for student in students]
    evaluations = [scoring.evaluate(network, opened, split, progress=True) for network in networks]
    if table_file is not None:
        scoring.save_images_csv(table_file, evaluations)
    if png is not None:
        from kdcache.drawing import save

        save(png, scoring.worst_images(evaluations, networks, opened, worst), "PNG")
    facts = [evaluation.facts() for evaluation in evaluations]
    if as_json:
        click.echo(as_json_text(facts[0] if len(facts) == 1 else facts))
    else:
        click.echo(evaluate_text(facts))


@click.command(
    epilog=example(
        "kdcache predict runs/first photos/ --out masks",
        "kdcache predict student.onnx 'photos/*.jpg' --out masks --overlay",
    )
)
@click.argument("student", metavar="RUN|FILE", type=path)
@click.argument("images", metavar="IMAGES...", nargs=-1, required=True)
@option("--out", type=path, required=True, help="Folder for <stem>.png, a mask of 0 and 255.")
@option("--overlay", is_flag=True, help="Also <stem>_overlay.jpg: all but the person darkened.")
@option(
    "--probabilities", is_flag=True, help="Also <stem>_probability.png: 16 bits, 65535 is certain."
)
@option("--batch-size", type=click.IntRange(1), help="Photos a model call (CPU 1, GPU 8).")
@option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Threads.")
@device_option
@json_option
@with_logging_above_bars
def predict(
    student: Path, images: tuple[str, ...], out: Path, as_json: bool, **options: Any
) -> None:
    """Segment photos, folders of them, or glob patterns, with a student.

    Each mask has the size of its file. Exit status 3 when some photos were skipped.
    """
    from kdcache.deploy.predict import predict as predict_images
    from kdcache.deploy.report import predict_text

    report = predict_images(student, images, out, progress=True, **options)
    show(report, as_json, predict_text)
    if report.skipped:
        sys.exit(EXIT_SKIPPED)


@click.command(
    epilog=example(
        "kdcache export runs/first --out student.onnx",
        "kdcache export runs/first --out student_int8.onnx --int8 --preprocessing",
    )
)
@click.argument("student", metavar="RUN|FILE", type=path)
@option("--out", type=path, required=True, help="ONNX file to write.")
@option("--fp16", is_flag=True, help="Weights and arithmetic of 16 bits; input and logits stay 32.")
@option(
    "--int8",
    is_flag=True,
    help="Weights and arithmetic of 8 bits, calibrated on rows of the cache.",
)
@option(
    "--preprocessing", is_flag=True, help="Build it in: uint8 RGB pixels (N, S, S, 3) in, mask out."
)
@option(
    "--fixed-batch", type=click.IntRange(1), metavar="N", help="Take N images, no other number."
)
@option("--cache", type=place, help="Cache to calibrate on and to measure mIoU on (the run's own).")
@option(
    "--calibration-rows",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Training rows that --int8 takes ranges from.",
)
@option("--rows", type=click.IntRange(1), default=64, show_default=True, help="Rows for the mIoU.")
@json_option
def export(
    student: Path,
    out: Path,
    fp16: bool,
    int8: bool,
    cache: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Export a run's best student to ONNX, checked against PyTorch in ONNX Runtime."""
    if fp16 and int8:
        raise click.UsageError("--fp16 and --int8 are two precisions; give one of them")
    from kdcache.deploy.export import export as export_student
    from kdcache.deploy.export import own_cache
    from kdcache.deploy.report import export_text

    report = export_student(
        student,
        out,
        own_cache(student, cache),
        precision="float16" if fp16 else "int8" if int8 else "float32",
        **options,
    )
    show(report, as_json, export_text)


@click.command(
    epilog=example(
        "kdcache bench coco.zarr", "kdcache bench coco.zarr --run runs/first --teacher teacher.onnx"
    )
)
@cache_argument
@option("--run", type=path, help="Take a run's settings, and measure its student.")
@option("--teacher", type=path, help="Measure a teacher beside it.")
@option("--teacher-encoder", metavar="NAME", help="smp encoder of a checkpoint (the cache's).")
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

    show(measure(kdcache.open(cache), **options), as_json, bench_text)
