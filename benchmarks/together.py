"""Are runs that train together faster than the same runs one after the other? In turns, in one process.

    .venv/bin/python benchmarks/together.py CACHE --runs 8 --epochs 4

For storage of a given speed: benchmarks/throttle.c. Their students are equal, which a test holds.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import click

from kdcache.allocator import keep_freed_memory
from kdcache.config import TrainConfig
from kdcache.train.prepare import Start
from kdcache.train.together import train_together


@click.command()
@click.argument("cache", type=click.Path(path_type=Path))
@click.option("--runs", default=4, show_default=True, help="How many, of different KL weights.")
@click.option("--epochs", default=2, show_default=True)
@click.option("--feature-weight", default=0.0, show_default=True)
@click.option("--pairs", default=2, show_default=True, help="How often both are timed.")
@click.option("--device", default="auto", show_default=True)
def main(
    cache: Path, runs: int, epochs: int, feature_weight: float, pairs: int, device: str
) -> None:
    """Print seconds apart and together, and their ratio, for each pair."""
    keep_freed_memory()
    logging.getLogger("kdcache").setLevel(logging.ERROR)
    ratios = []
    for _ in range(pairs):
        with TemporaryDirectory() as folder:
            apart, together = (
                _starts(Path(folder) / name, runs, epochs, feature_weight)
                for name in ("apart", "together")
            )
            apart_s = _seconds(cache, [[start] for start in apart], device)
            together_s = _seconds(cache, [together], device)
        ratios.append(apart_s / together_s)
        click.echo(f"apart {apart_s:.1f} s, together {together_s:.1f} s: {ratios[-1]:.2f}")
    click.echo(f"median {median(ratios):.2f}")


def _starts(folder: Path, runs: int, epochs: int, feature_weight: float) -> list[Start]:
    return [
        Start(
            out=folder / str(number),
            config=TrainConfig(
                encoder_weights="random",
                epochs=epochs,
                feature_weight=feature_weight,
                kl_weight=0.5 + 0.1 * number,
            ),
        )
        for number in range(runs)
    ]


def _seconds(cache: Path, groups: list[list[Start]], device: str) -> float:
    started = time.perf_counter()
    for group in groups:
        train_together(cache, group, device=device)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
