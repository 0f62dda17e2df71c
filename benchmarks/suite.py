"""Every comparison in one run on one machine: `make bench`.

    .venv/bin/python benchmarks/suite.py [--cache coco.zarr] --json bench.json

- epochs, steps and whole runs from a cache against the same with both frozen networks in the loop,
  and the extraction against the bare models (online_vs_cached.py);
- the loader against the floor of its own bytes (`kdcache bench`);
- the same rows stored and read with what people would use instead, also from storage of 200 and
  500 MB/s (loaders.py; formats whose packages are not installed are named and left out).

Rows of random weights compress otherwise than real ones: give --cache a cache of your own for the
figures of storage.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import loaders
import online_vs_cached
from machine import line, machine

from kdcache.allocator import keep_freed_memory
from kdcache.bench import BenchReport, bench
from kdcache.cache.reader import Cache

_SPEEDS_MB_S = (200, 500)


def throttled(cache: Path, rows: int, batch_size: int, speed_mb_s: int, folder: Path) -> Any:
    """What loaders.py finds in a process of its own, whose reads are slowed."""
    found = folder / f"{speed_mb_s}.json"
    command = [sys.executable, loaders.__file__, cache, "--rows", rows, "--batch-size", batch_size]
    command += ["--rounds", 1, "--throttle", speed_mb_s, "--json", found]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.DEVNULL, check=False)
    if done.returncode or not found.exists():
        click.echo(f"not measured: storage of {speed_mb_s} MB/s", err=True)
        return None
    return json.loads(found.read_text(encoding="utf-8"))["rows/s"]


def loader_line(report: BenchReport) -> str:
    """The loader against the floor of its bytes."""
    return (
        f"{report.workers} threads, rows of {report.row_bytes / 1e6:.2f} MB: loader "
        f"{report.loader_rows_per_s:.1f} rows/s, floor {report.floor_rows_per_s:.1f} rows/s, "
        f"{report.loader_of_floor:.3f} of it; decoded {report.decoded_rows_per_s:.1f} rows/s"
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--cache", type=click.Path(path_type=Path, exists=True), help="For the storage.")
@click.option("--size", default=640, help="Side of the square model input, px.")
@click.option("--images", type=click.IntRange(1), default=8, help="Images of an epoch.")
@click.option("--batch-size", type=click.IntRange(1), default=4)
@click.option("--steps", type=click.IntRange(1), default=4, help="Steps of each kind, in epochs.")
@click.option("--runs", type=click.IntRange(0), default=8, help="Whole runs of as many epochs.")
@click.option("--rows", type=click.IntRange(1), default=96, help="Rows stored in each format.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="File for the numbers.")
def main(
    cache: Path | None,
    size: int,
    images: int,
    batch_size: int,
    steps: int,
    runs: int,
    rows: int,
    device: str,
    json_path: Path | None,
) -> None:
    """Print Markdown for docs/log.md; all ratios are of this one run."""
    if rows % batch_size:
        raise click.UsageError(f"--rows {rows} is no multiple of --batch-size {batch_size}")
    keep_freed_memory()
    found: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        epochs = online_vs_cached.compared(
            folder, size, batch_size, images=images, steps=steps, runs=runs, device=device
        )
        stored = cache or folder / "cache.zarr"
        click.echo("loader and floor …", err=True)
        report = bench(Cache(stored), device=device, batch_size=batch_size, steps=0)
        formats = loaders.compare(stored, rows, batch_size, rounds=3)
        slow = {speed: throttled(stored, rows, batch_size, speed, folder) for speed in _SPEEDS_MB_S}
    found |= {"epochs": epochs, "loader": dataclasses.asdict(report), "formats": formats}
    found["throttled, MB/s"] = slow
    click.echo(line(found["machine"]))
    click.echo(f"\n## Online against cached, {size} px, {images} images, batches of {batch_size}\n")
    click.echo(online_vs_cached.table(epochs))
    click.echo(f"\n## The loader against the floor\n\n{loader_line(report)}")
    click.echo(f"\n## Formats: rows/s of {rows} rows\n\n{loaders.table(formats, rows)}")
    for speed, rates in slow.items():
        if rates is not None:
            click.echo(f"\n## Storage of {speed} MB/s\n\n{loaders.table(rates, rows)}")
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=2, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
