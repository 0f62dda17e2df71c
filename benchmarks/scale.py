"""What do many rows cost before the first of them is read?

    .venv/bin/python benchmarks/scale.py [--rows 1000 --rows 64000 --rows 256000 --rounds 3]

Writes caches of so many rows through CacheWriter, each in a temporary folder that is removed. Their grids
are tiny, so they take 6.5 kB a row; all else is as `extract` writes it: seven arrays, shards of 32 rows,
COCO's file names, every digest in the commit records and in the rows' details. What depends on the size of
a row is not measured here (loaders.py does that).

Every figure is of a process of its own, which has imported what it needs (torch, for the first batch)
before the clock starts; those that are called "whole" include Python's start and the imports. Medians.
"Cold" means that the files' pages were dropped (posix_fadvise); the kernel keeps folders and inodes, so a
disk that was just mounted is slower. "Planned" is what `kdcache plan` says: files and folders.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

import click
import numpy as np

from kdcache.cache import codecs
from kdcache.cache.format import RowKey, describe_row, read_root
from kdcache.cache.layout import IMAGE, MASK, ROWS, Group, Manifest, TapSpec
from kdcache.cache.open_shard import EncodedRow
from kdcache.cache.reader import Cache
from kdcache.cache.shard import encode_chunk
from kdcache.cache.verify import verify
from kdcache.cache.writer import CacheWriter

Figures = dict[str, float]

_SIZE_PX, _GRID = 32, (8, 4, 4)
# Half of the channels repeated, as in layer 34 of YOLOv9-E.
_TAP = TapSpec(
    name="/model.34/Concat_output_0",
    precision="int8",
    shape=_GRID,
    groups=(Group(1, ((4, 8),)), Group(2, ((0, 4),))),
)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def manifest_of(shard_rows: int) -> Manifest:
    """As `extract` makes it, with digests of no model."""
    return Manifest(
        size_px=_SIZE_PX,
        shard_rows=shard_rows,
        compression="zstd",
        logits_dtype="float16",
        taps=(_TAP,),
        fingerprint={
            "size": str(_SIZE_PX),
            "resize": "stretch",
            "precision": "int8",
            "views": "resized only",
            "execution_provider": "cpu float32",
            "yolo_sha256": _sha256("yolo"),
            "yolo_target_layer": _TAP.name,
            "teacher_sha256": _sha256("teacher"),
        },
        versions={"numpy": np.__version__},
    )


def details_of(name: str) -> dict[str, object]:
    """What the array `rows` says of a photo beside its key, as precompute/sources.py makes it."""
    return {
        "source_bytes": 163_241,
        "source_sha256": _sha256(f"image {name}"),
        "label_sha256": _sha256(f"label {name}"),
        "pixels_sha256": _sha256(f"pixels {name}"),
        "source_height_px": 480,
        "source_width_px": 640,
        "placed_px": [0, 0, _SIZE_PX, _SIZE_PX],
        "exif_orientation": 1,
    }


def write(path: Path, rows: int, shard_rows: int) -> None:
    """A cache of so many rows; all but their keys and descriptions are the same."""
    manifest, rng = manifest_of(shard_rows), np.random.default_rng(0)
    feature_CHW = rng.normal(size=_GRID).astype(np.float32)
    feature_CHW[:4] = feature_CHW[:4, ::2, ::2].repeat(2, axis=1).repeat(2, axis=2)
    pixels = (_SIZE_PX, _SIZE_PX)
    with CacheWriter(path, manifest) as writer:
        arrays = {
            IMAGE: rng.integers(0, 255, (*pixels, 3), np.uint8),
            MASK: rng.integers(0, 2, pixels, np.uint8),
            manifest.logits_path: rng.normal(size=pixels).astype(np.float16),
            ROWS: describe_row(RowKey("train", "", 0), {}),
        }
        arrays |= {
            f"{_TAP.folder}/{name}": np.asarray(array)
            for name, array in codecs.encode(feature_CHW, _TAP).items()
        }
        shared = writer.encoded(RowKey("train", "", 0), arrays).chunks
        writer.expect(-(-rows // shard_rows))
        for number in range(rows):
            key = RowKey("train", f"COCO_train2017_{number:012d}.jpg", 0)
            described = encode_chunk(describe_row(key, details_of(key.sample_id)), "zstd")
            writer.append(EncodedRow(key, {**shared, ROWS: described}))


# Each of these runs in a process of its own.


def opening(path: Path) -> Figures:
    before = _resident_bytes()
    started = time.perf_counter()
    cache = Cache(path)  # kept until its memory is looked at
    ended = time.perf_counter()
    found = {"open s": ended - started, "open MB": (_resident_bytes() - before) / 1e6}
    del cache
    return found


def indexed(path: Path) -> Figures:
    """The memory of all shard files' indexes, which a reader keeps: after an epoch it has them all."""
    cache = Cache(path)
    before = _resident_bytes()
    for row in range(0, len(cache), cache.manifest.shard_rows):
        for array in cache.specs:
            cache.locate(row, array)
    return {"after an epoch, more MB": (_resident_bytes() - before) / 1e6}


def sending(path: Path) -> Figures:
    """To a process that is spawned, as those of `sweep` and of torch's DataLoader may be."""
    cache = Cache(path)
    started = time.perf_counter()
    data = pickle.dumps(cache)
    pickled = time.perf_counter()
    pickle.loads(data)
    ended = time.perf_counter()
    return {
        "pickle s": pickled - started,
        "unpickle s": ended - pickled,
        "pickle MB": len(data) / 1e6,
    }


def first_batch(path: Path) -> Figures:
    from kdcache.train import batches

    started = time.perf_counter()
    next(iter(batches(Cache(path), batch_size=4)))
    return {"first batch s": time.perf_counter() - started}


def known(path: Path) -> Figures:
    """What `extract` reads of a cache before it knows what is to be added."""
    from kdcache.precompute.job import _known

    started = time.perf_counter()
    _known(path)
    return {"known rows s": time.perf_counter() - started}


def appending(path: Path) -> Figures:
    manifest = read_root(path).manifest
    started = time.perf_counter()
    with CacheWriter(path, manifest):
        opened = time.perf_counter()
    return {"writer s": opened - started}


def verifying(path: Path) -> Figures:
    started = time.perf_counter()
    report = verify(path)
    assert report.ok, report.bad
    return {"verify s": time.perf_counter() - started}


def info_whole(path: Path) -> Figures:
    return {"info, whole s": _seconds("-m", "kdcache", "info", str(path))}


def open_whole(path: Path) -> Figures:
    program = "import sys, kdcache; kdcache.open(sys.argv[1])"
    return {"open, whole s": _seconds("-c", program, str(path))}


def _seconds(*arguments: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def fresh(probe: Callable[[Path], Figures], path: Path) -> Figures:
    """What a probe finds in a new interpreter."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(probe, path).result()


def drop_pages(folder: Path) -> None:
    """Ask the kernel to forget the files, which are on the disk already."""
    for parent, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def medians(probe: Callable[[Path], Figures], path: Path, rounds: int, cold: bool) -> Figures:
    found = []
    for _ in range(rounds):
        if cold:
            drop_pages(path)
        found.append(fresh(probe, path))
    suffix = ", cold" if cold else ""
    return {name + suffix: median(one[name] for one in found) for name in found[0]}


def entries(path: Path) -> tuple[int, int]:
    """Files and folders, the cache's own included."""
    files = folders = 0
    for _, _, names in os.walk(path):
        files, folders = files + len(names), folders + 1
    return files, folders


def measure(
    folder: Path, rows: int, shard_rows: int, rounds: int, verified: bool
) -> dict[str, float]:
    """All figures of a cache of so many rows."""
    from kdcache.cache.need import Need

    path = folder / f"{rows}.zarr"
    started = time.perf_counter()
    write(path, rows, shard_rows)
    found: Figures = {"rows": rows, "written s": time.perf_counter() - started}
    specs = manifest_of(shard_rows).arrays()
    files, folders = entries(path)
    planned = Need.of(specs, shard_rows, 0, rows).files
    found |= {"files": files, "folders": folders, "planned": planned}
    for cold in (False, True):
        for probe in (opening, first_batch):
            found |= medians(probe, path, rounds, cold)
    for probe in (open_whole, info_whole, indexed, sending, appending, known):
        found |= medians(probe, path, rounds, cold=False)
    if verified:
        found |= medians(verifying, path, 1, cold=False)
    return found


def table(found: Sequence[Figures]) -> str:
    """Markdown for docs/log.md and docs/scale.md."""
    lines = ["| | " + " | ".join(f"{one['rows']:,.0f} rows" for one in found) + " |"]
    lines.append("| --- |" + " ---: |" * len(found))
    for name in found[0]:
        digits = 3 if name.endswith((" s", "cold")) else 1 if name.endswith(" MB") else 0
        lines.append(
            f"| {name} | " + " | ".join(f"{one[name]:,.{digits}f}" for one in found) + " |"
        )
    return "\n".join(lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--rows", type=click.IntRange(1), multiple=True, default=[1_000, 64_000, 256_000], metavar="N"
)
@click.option("--shard-rows", type=click.IntRange(1), default=32)
@click.option("--rounds", type=click.IntRange(1), default=3, help="Medians are of so many.")
@click.option("--verify/--no-verify", "verified", default=True, help="Time `verify` too, once.")
@click.option("--folder", type=click.Path(path_type=Path, exists=True), help="Where to write them.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="File for the numbers.")
def main(
    rows: Sequence[int],
    shard_rows: int,
    rounds: int,
    verified: bool,
    folder: Path | None,
    json_path: Path | None,
) -> None:
    """Print a Markdown table for docs/scale.md."""
    from machine import line, machine

    found = []
    for count in rows:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            click.echo(f"{count} rows …", err=True)
            found.append(measure(Path(temporary), count, shard_rows, rounds, verified))
            click.echo(json.dumps(found[-1]), err=True)
    click.echo(f"shards of {shard_rows} rows; medians of {rounds}; {line(machine())}\n")
    click.echo(table(found))
    if json_path is not None:
        results = {"shard_rows": shard_rows, "rounds": rounds, "figures": found}
        json_path.write_text(json.dumps(machine() | results, indent=2) + "\n")


if __name__ == "__main__":
    main()
