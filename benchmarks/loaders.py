"""How fast do rows of a cache come into a ready batch, beside what people would use instead?

    .venv/bin/python benchmarks/loaders.py coco.zarr [--rows 96 --batch-size 4 --rounds 3]

Every reader gets the rows of the cache as arrays and has to give batches: each array of N rows in
one block of memory. "zstd" readers store what a zstd cache stores (packed codes, predicted pixels),
the uncompressed ones what a cache of `--compression none` stores, so no reader has less to do for
its format. One thread each but where it says two, page cache warm unless it says cold; rounds alternate,
medians.

--throttle N makes reads of the files as slow as storage of N MB/s (throttle.c, needs a C compiler); a
reader that is faster than that gets its bytes in other ways, such as a memory map, and is left out.

HDF5 (h5py, hdf5plugin), LitData and MosaicML streaming are measured where they are installed: in an
environment of their own (streaming wants an older numpy), with kdcache in it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import zarr
from machine import machine
from numpy.typing import NDArray

from kdcache.allocator import keep_freed_memory
from kdcache.bench import read_floor
from kdcache.cache.format import RowKey, describe_row
from kdcache.cache.layout import ROWS
from kdcache.cache.reader import Cache
from kdcache.cache.writer import CacheWriter
from kdcache.config import Compression
from kdcache.train.loader import chunked, read_stored

Row = dict[str, NDArray[Any]]
Batch = dict[str, NDArray[Any]]
_SHARD_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Reader:
    """One way to store the rows; `epoch` gives a batch for each group of row numbers."""

    name: str
    compressed: bool
    folder: Path
    epoch: Callable[[Sequence[Sequence[int]]], Iterator[object]]
    # what a reader that unpacks into files of its own left there
    forget: Callable[[], None] = lambda: None


def gathered(groups: Sequence[Sequence[int]], row: Callable[[int], Row]) -> Iterator[Batch]:
    """Batches of rows that come one by one: the copy into a ready batch."""
    ready: Batch = {}
    for group in groups:
        for n, number in enumerate(group):
            for name, array in row(number).items():
                if name not in ready:
                    ready[name] = np.empty((len(groups[0]), *array.shape), array.dtype)
                ready[name][n] = array
        yield ready


def written(source: Cache, path: Path, rows: Sequence[int], compression: Compression) -> Cache:
    """A cache of these rows of another; a row that comes again is stored again."""
    manifest = replace(source.manifest, compression=compression, shard_rows=32)
    with CacheWriter(path, manifest) as writer:
        for number, row in enumerate(rows):
            key = RowKey("train", f"{number}", 0)
            arrays = {spec.path: source.read(row, spec.path) for spec in manifest.arrays()}
            writer.append(writer.encoded(key, arrays | {ROWS: describe_row(key, {})}))
    return Cache(path)


def stored_row(cache: Cache, number: int) -> Row:
    """A row as the cache stores it, uncompressed."""
    row = {}
    for path, spec in cache.specs.items():
        if path != ROWS:
            row[path] = np.empty(spec.stored.shape, spec.stored.dtype)
            cache.read_stored(number, path, row[path])
    return row


def readers(folder: Path, source: Cache, rows: Sequence[int], skipped: list[str]) -> list[Reader]:
    """All there are, their rows written."""
    found = []
    for compression in ("zstd", "none"):
        cache = written(source, folder / f"kdcache-{compression}", rows, compression)
        arrays = [path for path in cache.specs if path != ROWS]
        found += [ours(cache, arrays), ours(cache, arrays, 2), floor(cache, arrays)]
        if compression == "zstd":
            found.append(by_zarr(cache, arrays))
        for make in (
            (hdf5, mosaic, litdata) if compression == "zstd" else (memmap, npy, mosaic, litdata)
        ):
            try:
                target = folder / f"{make.__name__}-{compression}"
                target.mkdir()
                found.append(make(target, cache, len(rows), compression == "zstd"))
            except ImportError as error:
                skipped.append(f"{make.__name__}: {error}")
    return found


def ours(cache: Cache, arrays: Sequence[str], threads: int = 1) -> Reader:
    compressed = cache.manifest.compression == "zstd"
    name = "kdcache" if threads == 1 else f"kdcache, {threads} threads"
    return Reader(
        name, compressed, Path(str(cache.path)), lambda g: read_stored(cache, g, arrays, threads)
    )


def floor(cache: Cache, arrays: Sequence[str]) -> Reader:
    def epoch(groups: Sequence[Sequence[int]]) -> Iterator[object]:
        rows = [row for group in groups for row in group]
        return read_floor(cache, rows, arrays, 1, len(groups[0]))

    compressed = cache.manifest.compression == "zstd"
    name = "floor: pread and decompress" if compressed else "floor: pread"
    return Reader(name, compressed, Path(str(cache.path)), epoch)


def by_zarr(cache: Cache, arrays: Sequence[str]) -> Reader:
    group = {path: zarr.open_array(cache.path / path, mode="r") for path in arrays}

    def row(number: int) -> Row:
        return {path: np.asarray(array[number]) for path, array in group.items()}

    return Reader("zarr-python", True, Path(str(cache.path)), lambda groups: gathered(groups, row))


def hdf5(folder: Path, cache: Cache, count: int, compressed: bool) -> Reader:
    import h5py
    import hdf5plugin

    with h5py.File(folder / "rows.h5", "w") as file:
        for number in range(count):
            for path, array in stored_row(cache, number).items():
                if not number:
                    file.create_dataset(
                        path,
                        (count, *array.shape),
                        array.dtype,
                        chunks=(1, *array.shape),
                        **hdf5plugin.Zstd(clevel=1),
                    )
                file[path][number] = array

    def epoch(groups: Sequence[Sequence[int]]) -> Iterator[Batch]:
        with h5py.File(folder / "rows.h5", "r", rdcc_nbytes=0) as file:
            sets = [file[path] for path in cache.specs if path != ROWS]
            ready = {s.name: np.empty((len(groups[0]), *s.shape[1:]), s.dtype) for s in sets}
            for group in groups:
                for n, number in enumerate(group):
                    for one in sets:
                        one.read_direct(ready[one.name], np.s_[number], np.s_[n])
                yield ready

    return Reader("HDF5", compressed, folder, epoch)


def mosaic(folder: Path, cache: Cache, count: int, compressed: bool) -> Reader:
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    first = stored_row(cache, 0)
    forms = {name.replace("/", "|"): (a.dtype, a.shape) for name, a in first.items()}
    options = {"compression": "zstd:1"} if compressed else {}
    with MDSWriter(
        out=str(folder / "mds"),
        columns=dict.fromkeys(forms, "bytes"),
        size_limit=_SHARD_BYTES,
        **options,
    ) as writer:
        for number in range(count):
            arrays = stored_row(cache, number).items()
            writer.write({name.replace("/", "|"): array.tobytes() for name, array in arrays})
    clean_stale_shared_memory()
    opened: list[Any] = []

    def epoch(groups: Sequence[Sequence[int]]) -> Iterator[Batch]:
        if not opened:
            opened.append(StreamingDataset(local=str(folder / "mds"), batch_size=1, shuffle=False))

        def row(number: int) -> Row:
            item = opened[0][number]
            return {k: np.frombuffer(item[k], d).reshape(s) for k, (d, s) in forms.items()}

        return gathered(groups, row)

    def forget() -> None:
        opened.clear()
        clean_stale_shared_memory()
        for file in (folder / "mds").glob("*.mds") if compressed else ():
            file.unlink()

    return Reader("MosaicML streaming", compressed, folder, epoch, forget)


def litdata(folder: Path, cache: Cache, count: int, compressed: bool) -> Reader:
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(
        str(folder / "ld"), chunk_bytes=_SHARD_BYTES, compression="zstd" if compressed else None
    )
    for number in range(count):
        writer[number] = stored_row(cache, number)
    writer.done()
    writer.merge()
    opened: list[Any] = []

    def epoch(groups: Sequence[Sequence[int]]) -> Iterator[Batch]:
        if not opened:
            opened.append(StreamingDataset(str(folder / "ld"), shuffle=False))
        return gathered(groups, lambda number: opened[0][number])

    kept = {file.name for file in (folder / "ld").iterdir()}

    def forget() -> None:
        opened.clear()
        for file in (folder / "ld").iterdir():
            if file.name not in kept:
                file.unlink()

    return Reader("LitData", compressed, folder, epoch, forget)


def memmap(folder: Path, cache: Cache, count: int, compressed: bool) -> Reader:
    arrays: dict[str, np.memmap[Any, Any]] = {}
    for number in range(count):
        for path, array in stored_row(cache, number).items():
            if not number:
                file, shape = folder / path.replace("/", "|"), (count, *array.shape)
                arrays[path] = np.memmap(file, array.dtype, "w+", shape=shape)
            arrays[path][number] = array
    for written_array in arrays.values():
        written_array.flush()

    def row(number: int) -> Row:
        return {path: array[number] for path, array in arrays.items()}

    return Reader("memory map", compressed, folder, lambda groups: gathered(groups, row))


def npy(folder: Path, cache: Cache, count: int, compressed: bool) -> Reader:
    names = [path for path in cache.specs if path != ROWS]

    def file(number: int, name: str) -> Path:
        return folder / f"{number}-{name.replace('/', '|')}.npy"

    for number in range(count):
        for path, array in stored_row(cache, number).items():
            np.save(file(number, path), array)

    def row(number: int) -> Row:
        return {name: np.load(file(number, name)) for name in names}

    return Reader(".npy files", compressed, folder, lambda groups: gathered(groups, row))


def seconds(reader: Reader, groups: Sequence[Sequence[int]]) -> float:
    started = time.perf_counter()
    for _ in reader.epoch(groups):
        pass
    return time.perf_counter() - started


def disk_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def drop_pages(folder: Path) -> None:
    """Ask the kernel to forget the files; what another process maps stays."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def measure(reader: Reader, count: int, batch_size: int) -> dict[str, float]:
    """Rows a second: the first epoch after writing, then warm in order and at random, then cold."""
    in_order = chunked(range(count), batch_size)
    at_random = chunked(np.random.default_rng(0).permutation(count).tolist(), batch_size)
    reader.forget()
    found = {"disk": float(disk_bytes(reader.folder))}
    drop_pages(reader.folder)
    found["first, cold"] = count / seconds(reader, in_order)
    found["in order"] = count / seconds(reader, in_order)
    found["at random"] = count / seconds(reader, at_random)
    found["disk after"] = float(disk_bytes(reader.folder))
    reader.forget()
    found["first, warm"] = count / seconds(reader, in_order)
    return found


def compare(
    cache: Path, count: int, batch_size: int, rounds: int, throttle_mb_s: float | None = None
) -> dict[str, dict[str, float]]:
    """For each reader its rates, rows a second, and bytes on disk; those that are absent are named."""
    keep_freed_memory()
    source, skipped = Cache(cache), list[str]()
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(dir=cache.resolve().parent) as folder:
        rows = list(islice(cycle(range(len(source))), count))
        all_readers = readers(Path(folder), source, rows, skipped)
        os.environ["THROTTLE_FOLDER"] = folder
        for number in range(rounds):
            for reader in all_readers:
                click.echo(f"round {number + 1}/{rounds}, {reader.name} …", err=True)
                name = f"{reader.name}, {'zstd' if reader.compressed else 'uncompressed'}"
                found.setdefault(name, []).append(measure(reader, count, batch_size))
        shutil.rmtree(folder, ignore_errors=True)
    rates = {
        name: {key: median(one[key] for one in times) for key in times[0]}
        for name, times in found.items()
    }
    if throttle_mb_s is not None:
        for name, one in list(rates.items()):
            possible = throttle_mb_s * 1e6 / (one["disk"] / count)
            if one["first, warm"] > 1.1 * possible:
                skipped.append(f"{name}: its reads are not throttled")
                del rates[name]
    for text in dict.fromkeys(skipped):
        click.echo(f"not measured: {text}", err=True)
    return rates


def table(found: dict[str, dict[str, float]], count: int) -> str:
    """Markdown for docs/log.md."""
    columns = ["first, cold", "first, warm", "in order", "at random"]
    rows = ["| stored as | MB/row | after | " + " | ".join(columns) + " |"]
    rows.append("| --- |" + " ---: |" * (len(columns) + 2))
    for name, one in found.items():
        sizes = [f"{one[key] / count / 1e6:.2f}" for key in ("disk", "disk after")]
        cells = [*sizes, *(f"{one[key]:.0f}" for key in columns)]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def throttled_again(speed_mb_s: float) -> int:
    """Run this command again with reads of that speed; returns its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "throttle.so"
        source = Path(__file__).with_name("throttle.c")
        compiler = ["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
        subprocess.run(compiler, check=True)
        environment = os.environ | {"LD_PRELOAD": str(library), "THROTTLE_MB_S": str(speed_mb_s)}
        return subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("cache", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--rows",
    "count",
    type=click.IntRange(1),
    default=96,
    help="Rows that are stored; a small cache's repeat.",
)
@click.option("--batch-size", type=click.IntRange(1), default=4)
@click.option("--rounds", type=click.IntRange(1), default=3, help="Medians are of so many.")
@click.option(
    "--throttle",
    type=click.FloatRange(0, min_open=True),
    metavar="MB/S",
    help="Storage of this speed.",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="File for the numbers.")
def main(
    cache: Path,
    count: int,
    batch_size: int,
    rounds: int,
    throttle: float | None,
    json_path: Path | None,
) -> None:
    """Print a Markdown table for docs/log.md."""
    if count % batch_size:
        raise click.UsageError(f"--rows {count} is no multiple of --batch-size {batch_size}")
    if throttle and "THROTTLE_MB_S" not in os.environ:
        sys.exit(throttled_again(throttle))
    found = compare(cache, count, batch_size, rounds, throttle)
    storage = f", storage of {throttle:g} MB/s" if throttle else ""
    click.echo(f"{count} rows, batches of {batch_size}{storage}; rows/s\n")
    click.echo(table(found, count))
    if json_path is not None:
        json_path.write_text(json.dumps(machine() | {"rows/s": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
