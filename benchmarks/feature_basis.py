"""Does a PCA basis of the cached channels beat a lower precision at equal bytes?

    R=../shared/realdata
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/feature_basis.py --yolo $R/yolov9n_neck.onnx \\
        --tap /model.14/Concat_output_0 --fit-images $R/coco_tiny/train2017 \\
        --fit-coco $R/coco_tiny/annotations/instances_train2017.json \\
        --images $R/coco_tiny/val2017 --coco $R/coco_tiny/annotations/instances_val2017.json

`pca:K` stores K components for the tap's C channels, by kdcache's own codecs, and turns them back
when read. Each group of channels has a basis of its own, at its own grid, fitted on the first photos
of one dataset and judged on those of another; the K are those of most variance per byte. The basis,
up to C² floats once a cache, is not counted.

Shapes: N photos, C channels of one group, (h, w) the group's grid, K of its components.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdcache.cache import codecs
from kdcache.cache.codecs import F32
from kdcache.cache.format import RowKey
from kdcache.cache.layout import Group, TapSpec
from kdcache.cache.need import stored_bytes
from kdcache.config import ExtractConfig, Precision
from kdcache.precompute.dataset import coco_dataset
from kdcache.precompute.sources import Preparation, Tally, prepare
from kdcache.precompute.yolo import Yolo

PRECISIONS: tuple[Precision, ...] = ("int8", "int6", "int5", "int4")
# int3* and int2* are not kdcache's: so many codes of int6 become one, stored as int4's are, to have
# something direct at fewer bytes than int4's. The factors are odd and divide int6's 63 steps, so
# that is what rounding to 7 or to 3 steps would give.
DIRECT: dict[str, tuple[Precision, int]] = {
    **{precision: (precision, 1) for precision in PRECISIONS},
    "int3*": ("int6", 9),
    "int2*": ("int6", 21),
}
KEPT = (1 / 2, 3 / 4, 7 / 8, 1)  # K/C


class Point(NamedTuple):
    """What a way of storing costs and loses."""

    row_bytes: float
    error: float  # squared, over the variance about each channel's mean


class Basis(NamedTuple):
    """Orthogonal components of a group's channels, those of most variance first."""

    mean: F32  # (C, 1, 1)
    components: F32  # (C of them, C)
    variances: NDArray[np.float64]

    @classmethod
    def of(cls, maps_NCHW: F32) -> Basis:
        values = maps_NCHW.swapaxes(0, 1).reshape(maps_NCHW.shape[1], -1).astype(np.float64)
        variances, vectors = np.linalg.eigh(np.cov(values, bias=True))  # in ascending order
        mean, components = values.mean(1).astype(np.float32), vectors.T[::-1].astype(np.float32)
        return cls(mean[:, None, None], components, variances[::-1])

    def forward(self, maps_NCHW: F32, kept: int) -> F32:
        return times(self.components[:kept], maps_NCHW - self.mean)

    def back(self, maps_NKHW: F32) -> F32:
        return times(self.components[: maps_NKHW.shape[1]].T, maps_NKHW) + self.mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("yolo", "fit-images", "fit-coco", "images", "coco"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--tap", required=True)
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--limit", type=int, default=16, help="photos to fit and to judge on")
    options = parser.parse_args()
    yolo = Yolo(
        options.yolo, taps=[options.tap], expects="rgb01", device="cpu", size_px=options.size
    )
    tap = TapSpec(name=options.tap, precision="float32", **yolo.taps[options.tap]._asdict())
    fit = own_grids(yolo, tap, options.fit_images, options.fit_coco, options)
    judged = own_grids(yolo, tap, options.images, options.coco, options)
    factors = [group.factor for group in tap.groups]
    groups = ", ".join(f"{m.shape[1]} at ×{f}" for m, f in zip(judged, factors, strict=True))
    print(f"{tap.name} {tap.shape} at {options.size} px, channels {groups}; fitted on "
          f"{len(fit[0])} photos, judged on {len(judged[0])}\n")  # fmt: skip
    show(judged, factors, [Basis.of(maps) for maps in fit])


def own_grids(
    yolo: Yolo, tap: TapSpec, images: Path, coco: Path, options: argparse.Namespace
) -> list[F32]:
    """The features of a dataset's first photos, (N, C, h, w) for each group of the tap."""
    samples = coco_dataset(images, coco).samples[: options.limit]
    todo = [(RowKey("train", sample.sample_id, 0), sample) for sample in samples]
    how, rows = Preparation.of(ExtractConfig(size=options.size)), []
    for prepared in prepare(todo, how, 2, Tally(strict=True)):
        feature_CHW = codecs.on_host(yolo.features(prepared.image[None])[tap.name][0])
        encoded = codecs.encode(feature_CHW, tap)
        rows.append([encoded[f"values_x{group.factor}"] for group in tap.groups])
    return [np.stack(of_group) for of_group in zip(*rows, strict=True)]


def show(maps: Sequence[F32], factors: Sequence[int], bases: Sequence[Basis]) -> None:
    print("| stored as | kB a row | rel. MSE | of direct's at equal bytes |")
    print("| --- | ---: | ---: | ---: |")
    direct = []
    for name, (precision, merged) in DIRECT.items():
        row_bytes, read = stored(maps, factors, precision, merged)
        direct.append(Point(row_bytes, relative_mse(maps, read, factors)))
        print(f"| {name} | {row_bytes / 1e3:.1f} | {direct[-1].error:.2e} | 1 |")
    for share in KEPT:
        counts = split(bases, factors, round(share * sum(len(b.variances) for b in bases)))
        name = f"pca:{sum(counts)} ({' + '.join(map(str, counts))})"
        parts = [b.forward(m, k) for b, m, k in zip(bases, maps, counts, strict=True)]
        for precision in PRECISIONS:
            row_bytes, read = stored(parts, factors, precision)
            back = [b.back(components) for b, components in zip(bases, read, strict=True)]
            point = Point(row_bytes, relative_mse(maps, back, factors))
            print(f"| {name} {precision} | {row_bytes / 1e3:.1f} | {point.error:.2e} "
                  f"| {against(point, direct)} |")  # fmt: skip


def split(bases: Sequence[Basis], factors: Sequence[int], kept: int) -> list[int]:
    """How many of each group's components are among the `kept` of most variance per byte.

    A value of a group f times coarser than the tap stands for f² of the tap's.
    """
    worth = [b.variances * f**2 for b, f in zip(bases, factors, strict=True)]
    owners = np.repeat(np.arange(len(worth)), [len(of_group) for of_group in worth])
    best = owners[np.argsort(-np.concatenate(worth))[:kept]]
    return [int((best == group).sum()) for group in range(len(worth))]


def stored(
    maps: Sequence[F32], factors: Sequence[int], precision: Precision, merged: int = 1
) -> tuple[float, list[F32]]:
    """Bytes a row of these groups' maps as one tap, and the maps that are read back."""
    stops = np.cumsum([0, *(of_group.shape[1] for of_group in maps)]).tolist()
    groups = tuple(Group(f, (ends,)) for f, ends in zip(factors, pairwise(stops), strict=True))
    height, width = (side * factors[0] for side in maps[0].shape[2:])
    tap = TapSpec(name="tap", precision=precision, shape=(stops[-1], height, width), groups=groups)
    packed = tap if merged == 1 else dataclasses.replace(tap, precision="int4")
    specs, row_bytes, rows = packed.arrays("zstd"), 0, []
    for row in zip(*maps, strict=True):
        blocks = [part.repeat(f, 1).repeat(f, 2) for part, f in zip(row, factors, strict=True)]
        arrays = merge(codecs.encode(np.concatenate(blocks), tap), merged)
        by_path = {f"{tap.folder}/{name}": array for name, array in arrays.items()}
        row_bytes += stored_bytes(by_path, specs, "zstd")
        read = codecs.decode(arrays, packed)
        rows.append([read[start:stop, ::f, ::f] for f, ((start, stop),) in groups])
    return row_bytes / len(rows), [np.stack(of_group) for of_group in zip(*rows, strict=True)]


def merge(encoded: Mapping[str, codecs.Array], factor: int) -> dict[str, codecs.Array]:
    """The codes of steps so many times as wide, an odd number."""
    lo_step = np.array([[1], [factor]], np.float32)
    return {
        name: array * lo_step if name == "affine" else (array + factor // 2) // factor
        for name, array in encoded.items()
    }


def relative_mse(maps: Sequence[F32], read: Sequence[F32], factors: Sequence[int]) -> float:
    """Over the tap's whole grid."""
    squared = spread = 0.0
    for true, found, factor in zip(maps, read, factors, strict=True):
        about = true - true.mean((0, 2, 3), np.float64, keepdims=True)
        squared += factor**2 * float((np.subtract(found, true, dtype=np.float64) ** 2).sum())
        spread += factor**2 * float((about**2).sum())
    return squared / spread


def against(point: Point, direct: Sequence[Point]) -> str:
    """Its error over that of direct storage in as many bytes, interpolated between logarithms.

    For more bytes than any of `direct` it is against the largest of them, so a lower bound.
    """
    sizes, errors = np.log(sorted(direct)).T
    size = np.log(point.row_bytes)
    if size < sizes[0]:
        return ""
    bound = "> " if size > sizes[-1] else ""
    return f"{bound}{point.error / np.exp(np.interp(size, sizes, errors)):.2f}"


def times(matrix: F32, maps_NCHW: F32) -> F32:
    """The matrix applied to the channels."""
    number, channels, height, width = maps_NCHW.shape
    product: F32 = matrix @ maps_NCHW.reshape(number, channels, -1)
    return product.reshape(number, -1, height, width)


if __name__ == "__main__":
    main()
