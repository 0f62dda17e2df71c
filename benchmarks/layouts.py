"""Bytes, write time and read time of a cached row: the format as it is, and what was tried for it.

    python benchmarks/layouts.py --images DIR --coco FILE --yolo FILE.onnx --tap NAME --teacher FILE

Prints Markdown tables. Times are medians of one thread; run it alone. "layer 34" scales the bytes
of a native and of a ×2 channel to YOLOv9-E's tap (512 of each) and adds the rest of a row.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import zstandard
from numcodecs.blosc import Blosc
from numcodecs.zstd import Zstd

from kdcache.cache import codecs
from kdcache.cache.format import RowKey, describe_row
from kdcache.cache.layout import IMAGE, LOGITS, MASK, ROWS, Manifest, TapSpec, logits_dtype, whole
from kdcache.cache.reader import Cache
from kdcache.cache.shard import encode_chunk
from kdcache.cache.transforms import BytePlanes, FloatGradient, Form, Nibbles, RgbGradient
from kdcache.cache.writer import CacheWriter
from kdcache.config import Compression, ExtractConfig, Precision
from kdcache.precompute.dataset import coco_dataset
from kdcache.precompute.sources import Preparation, Tally, prepare
from kdcache.precompute.teacher import Teacher
from kdcache.precompute.yolo import Yolo

Compress = Callable[[np.ndarray], bytes]
Decompress = Callable[[bytes], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("images", "coco", "yolo", "teacher"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--tap", required=True)
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--limit", type=int, default=16)
    options = parser.parse_args()
    tap, rows = load(options)
    print(f"{len(rows)} rows at {options.size} px, tap {tap.name} {tap.shape}\n")
    show_formats(tap, rows, options.size)
    show_codes(tap, rows)
    show_floats(tap, rows)
    show_pictures(rows, options.size)


def load(options: argparse.Namespace) -> tuple[TapSpec, list[dict[str, np.ndarray]]]:
    """Real rows: image, mask, logits and features in float32."""
    config = ExtractConfig(size=options.size)
    yolo = Yolo(
        options.yolo, taps=[options.tap], expects="rgb01", device="cpu", size_px=options.size
    )
    teacher = Teacher(
        options.teacher, encoder=config.teacher_encoder, device="cpu", size_px=options.size
    )
    tap = TapSpec(name=options.tap, precision="int8", **yolo.taps[options.tap]._asdict())
    samples = coco_dataset(options.images, options.coco).samples[: options.limit]
    todo = [(RowKey("train", sample.sample_id, 0), sample) for sample in samples]
    rows = []
    for prepared in prepare(todo, Preparation.of(config), 2, Tally(strict=True)):
        batch = prepared.image[None]
        rows.append(
            {
                IMAGE: prepared.image,
                MASK: prepared.mask,
                LOGITS: teacher.logits(batch)[0],
                "features": yolo.features(batch)[options.tap][0],
            }
        )
    return tap, rows


def show_formats(tap: TapSpec, rows: list[dict[str, np.ndarray]], size: int) -> None:
    """Whole rows through the project's own writer and reader."""
    heading("precision, compression", "features ×", "rel. MSE", "layer-34 row MB", "write ms",
            "read ms")  # fmt: skip
    for precision in get_args(Precision):
        for compression in get_args(Compression):
            spec = dataclasses.replace(tap, precision=precision)
            manifest = Manifest(
                size_px=size,
                shard_rows=32,
                compression=compression,
                logits_dtype=logits_dtype(precision),
                taps=(spec,),
                fingerprint={},
                versions={},
            )
            with tempfile.TemporaryDirectory() as folder:
                written = list(write(Path(folder) / "c", manifest, rows))
                line = measure(Cache(Path(folder) / "c"), spec, rows)
            print(f"| {precision} {compression} | {' | '.join(line[:3])} | {median_ms(written)} "
                  f"| {line[3]} |")  # fmt: skip
    print()


def write(path: Path, manifest: Manifest, rows: list[dict[str, np.ndarray]]) -> Iterator[float]:
    (tap,) = manifest.taps
    with CacheWriter(path, manifest) as writer:
        for number, row in enumerate(rows):
            key = RowKey("train", str(number), 0)
            started = time.perf_counter()
            encoded = codecs.encode(row["features"], tap)
            arrays = {
                IMAGE: row[IMAGE],
                MASK: row[MASK],
                LOGITS: codecs.teacher_logits(row[LOGITS], manifest.logits_dtype or "float16"),
                ROWS: describe_row(key, {}),
                **{f"{tap.folder}/{name}": array for name, array in encoded.items()},
            }
            writer.append(writer.encoded(key, arrays))
            yield time.perf_counter() - started


def measure(cache: Cache, tap: TapSpec, rows: list[dict[str, np.ndarray]]) -> list[str]:
    stored: dict[str, float] = {}
    for commit in cache.commits:
        for path, record in commit.objects.items():
            stored[path] = stored.get(path, 0) + record.size_bytes / len(rows)
    features = sum(size for path, size in stored.items() if path.startswith(tap.folder))
    rest = sum(stored.values()) - features
    layer_34 = 0.0
    for group in tap.groups:
        channels = sum(stop - start for start, stop in group.channels)
        (size,) = (v for p, v in stored.items() if p.endswith(f"s_x{group.factor}"))
        layer_34 += 512 * (size / channels + (8 if tap.bits else 0))  # 8: lo and step
    times, error, spread = [], 0.0, 0.0
    for index, row in enumerate(rows):
        started = time.perf_counter()
        for part in (IMAGE, MASK, LOGITS):
            cache.read(index, part)
        decoded = cache.decode_features(index, tap)
        times.append(time.perf_counter() - started)
        true = row["features"].astype(np.float64)
        error += float(((decoded - true) ** 2).sum())
        spread += float(((true - true.mean()) ** 2).sum())
    ratio = rows[0]["features"].nbytes / features
    return [f"{ratio:.2f}", f"{error / spread:.1e}", f"{(layer_34 + rest) / 1e6:.2f}",
            median_ms(times)]  # fmt: skip


def show_codes(tap: TapSpec, rows: list[dict[str, np.ndarray]]) -> None:
    precisions: tuple[tuple[Precision, int], ...] = (("int8", 8), ("int5", 5), ("int4", 4))
    for precision, bits in precisions:
        spec = dataclasses.replace(tap, precision=precision)
        encoded = [codecs.encode(row["features"], spec) for row in rows]
        plain = [[a for name, a in e.items() if name != "affine"] for e in encoded]
        packed = [[Nibbles(bits).forward(a) for a in row] for row in plain]
        in_one = dataclasses.replace(spec, groups=whole(tap.shape[0]))
        in_full = [[codecs.encode(r["features"], in_one)["codes_x1"]] for r in rows]
        heading(f"codes of {precision}", "kB", "write ms", "read ms")
        for level in (1, 3):
            line(f"plain, zstd {level}", plain, *zstd(level))
        line("plain, zstd 1, repeated channels in full", in_full, *zstd(1))
        line("plain, a zstd block a channel", plain, *zstd_blocks())
        line("difference along x, zstd 1", [[delta(a, 2) for a in r] for r in plain], *zstd(1))
        line("difference along y, zstd 1", [[delta(a, 1) for a in r] for r in plain], *zstd(1))
        line("channels last, zstd 1", [[np.moveaxis(a, 0, -1) for a in r] for r in plain], *zstd(1))
        line("plain, zstd 1, window 2^14", plain, *ours())
        line("blosc zstd 1 bitshuffle", plain, *blosc("zstd"))
        line("blosc lz4 bitshuffle", plain, *blosc("lz4"))
        line("nibbles, zstd 1", packed, *zstd(1))
        for log in (12, 16):
            line(f"nibbles, zstd 1, window 2^{log}", packed, *zstd_window(log))
        line("nibbles, zstd 1, window 2^14 (the format)", packed, *ours())
        print()


def show_floats(tap: TapSpec, rows: list[dict[str, np.ndarray]]) -> None:
    spec = dataclasses.replace(tap, precision="float16")
    plain = [list(codecs.encode(row["features"], spec).values()) for row in rows]
    planes = [[BytePlanes().forward(a) for a in row] for row in plain]
    heading("features of float16", "kB", "write ms", "read ms")
    line("plain, zstd 1", plain, *zstd(1))
    line("blosc zstd 1 bitshuffle", plain, *blosc("zstd"))
    line("byte planes, zstd 1", planes, *zstd(1))
    line("byte planes, zstd 1, window 2^14 (the format)", planes, *ours())
    print()


def show_pictures(rows: list[dict[str, np.ndarray]], size: int) -> None:
    images = [[row[IMAGE]] for row in rows]
    form = Form("uint8", (size, size, 3), ("y", "x", "rgb"))
    heading("image", "kB", "write ms", "read ms, undoing included")
    line("plain, zstd 1", images, *zstd(1))
    line("plain, zstd 3", images, *zstd(3))
    line("difference along x, zstd 1", [[delta(a, 1) for a in r] for r in images], *zstd(1),
         undo=lambda a: a.cumsum(1, np.uint8))  # fmt: skip
    gradient = [[RgbGradient().forward(a) for a in r] for r in images]
    undo_photo = functools.partial(RgbGradient().inverse, row=form)
    line("rgb_gradient, zstd 3", gradient, *zstd(3), undo=undo_photo)
    line("rgb_gradient, window 2^14 (the format)", gradient, *ours(), undo=undo_photo)
    print()
    logits = [[row[LOGITS].astype(np.float16)] for row in rows]
    form = Form("float16", (size, size), ("y", "x"))
    heading("logits of float16", "kB", "write ms", "read ms, undoing included")
    line("plain, zstd 1", logits, *zstd(1))
    line("blosc zstd 1 shuffle", logits, *blosc("zstd", Blosc.SHUFFLE))
    for transform in (BytePlanes(), FloatGradient()):
        stored = [[transform.forward(a) for a in r] for r in logits]
        undo = functools.partial(transform.inverse, row=form)
        line(f"{transform.name}, window 2^14", stored, *ours(), undo=undo)


def heading(*columns: str) -> None:
    print(f"| {' | '.join(columns)} |\n| --- |{' ---: |' * (len(columns) - 1)}")


def line(
    name: str,
    rows: list[list[np.ndarray]],
    compress: Compress,
    decompress: Decompress,
    undo: Callable[[np.ndarray], Any] = lambda array: array,
) -> None:
    """One table line: kB, write and read ms a row; what is written must come back."""
    written, read, size = [], [], 0
    for arrays in rows:
        started = time.perf_counter()
        chunks = [compress(np.ascontiguousarray(array)) for array in arrays]
        written.append(time.perf_counter() - started)
        started = time.perf_counter()
        for chunk, array in zip(chunks, arrays, strict=True):
            undo(np.frombuffer(decompress(chunk), array.dtype).reshape(array.shape))
        read.append(time.perf_counter() - started)
        for chunk, array in zip(chunks, arrays, strict=True):
            assert bytes(decompress(chunk)) == np.ascontiguousarray(array).tobytes(), name
            size += len(chunk)
    print(f"| {name} | {size / len(rows) / 1e3:.1f} | {median_ms(written)} | {median_ms(read)} |")


def median_ms(seconds: list[float]) -> str:
    return f"{np.median(seconds) * 1e3:.2f}"


def delta(array: np.ndarray, axis: int) -> np.ndarray:
    first = np.zeros_like(array.take([0], axis))
    return np.diff(array, axis=axis, prepend=first)


def zstd(level: int) -> tuple[Compress, Decompress]:
    codec = Zstd(level=level, checksum=True)
    return lambda array: bytes(codec.encode(array)), codec.decode


def ours() -> tuple[Compress, Decompress]:
    """The chunk of the format without its CRC-32C."""
    return lambda array: encode_chunk(array, "zstd")[0][:-4], Zstd().decode


def zstd_window(log: int) -> tuple[Compress, Decompress]:
    parameters = zstandard.ZstdCompressionParameters.from_level(
        1, window_log=log, write_checksum=True, write_content_size=True
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    return lambda array: compressor.compress(array.data.cast("B")), Zstd().decode


def zstd_blocks() -> tuple[Compress, Decompress]:
    """One frame whose blocks end where a channel ends."""

    def compress(array: np.ndarray) -> bytes:
        compressor = zstandard.ZstdCompressor(level=1, write_checksum=True)
        stream = compressor.compressobj(size=array.nbytes)
        parts = []
        for channel in array:
            parts.append(stream.compress(channel.tobytes()))
            parts.append(stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
        return b"".join([*parts, stream.flush()])

    return compress, Zstd().decode


def blosc(name: str, shuffle: int = Blosc.BITSHUFFLE) -> tuple[Compress, Decompress]:
    codec = Blosc(cname=name, clevel=1 if name == "zstd" else 5, shuffle=shuffle)
    return lambda array: bytes(codec.encode(array)), codec.decode


if __name__ == "__main__":
    main()
