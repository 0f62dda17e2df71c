"""Which arrays a cache has, and what a row of each is and how it is stored.

Shapes: S the side of the model input, C channels and (h, w) the grid of a tap.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kdcache.cache.transforms import (
    BytePlanes,
    FloatGradient,
    Form,
    Nibbles,
    Plain,
    RgbGradient,
    Transform,
)

if TYPE_CHECKING:
    from kdcache.config import Compression, Precision

IMAGE, MASK, LOGITS, ROWS = "image", "mask", "teacher_logits", "rows"

# A row's description as zero-padded UTF-8 JSON: the only text form that zarr-python (without a
# warning) and tensorstore (at all) both read. Zeros compress to nothing.
ROW_DESCRIPTION_BYTES = 2048

# From the most to the least exact.
PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "int8", "int6", "int5", "int4")
BITS: dict[str, int] = {"int8": 8, "int6": 6, "int5": 5, "int4": 4}
_FEATURE_AXES = ("channel", "y", "x")
# An unused slot is told by its empty `rows` text, its mask of 255 and its NaN `affine`. Bytes of
# 255 in every plane of a float are a NaN, too.
_UNUSED_BYTE_PLANE = 255


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array of the cache: its path in the group, what a row of it is, and how that is stored."""

    path: str
    row: Form
    fill_value: float
    transform: Transform = field(default_factory=Plain)

    @property
    def stored(self) -> Form:
        """What a row is on disk, after the transform."""
        return self.transform.stored(self.row)

    def undo(self, stored: Any) -> Any:
        """The row's array of a stored one, or of several: numpy or torch, with axes before it."""
        return self.transform.inverse(stored, self.row)

    def shard_path(self, shard: int) -> str:
        """Path of a shard's file in the group: Zarr's default chunk key with `.` as separator."""
        return f"{self.path}/c.{shard}{self._zeros}"

    @cached_property
    def _zeros(self) -> str:
        return ".0" * len(self.stored.shape)

    def attributes(self) -> dict[str, Any]:
        """What a reader without kdcache needs to undo the transform of one stored row."""
        if isinstance(self.transform, Plain):
            return {}
        return {
            "transform": {"name": self.transform.name, **dataclasses.asdict(self.transform)},
            "row": {"dtype": self.row.dtype, "shape": list(self.row.shape)},
            "decode": self.transform.recipe(self.row).splitlines(),
        }


class Group(NamedTuple):
    """Channels of a tap that are stored at one grid, `factor` times coarser than the tap's.

    Each value of such a channel fills a factor×factor block of the tap, exactly.
    """

    factor: int
    channels: tuple[tuple[int, int], ...]  # half-open ranges, in the tap's numbering


@dataclass(frozen=True, kw_only=True)
class TapSpec:
    """How the feature maps of one tap are stored; every channel belongs to one group."""

    name: str
    precision: Precision
    shape: tuple[int, int, int]  # (C, h, w)
    groups: tuple[Group, ...]
    generation: int = 0  # how often a refresh has computed it anew

    @property
    def folder(self) -> str:
        """A path in the group."""
        return "features/" + generation_of(plain(self.name), self.generation)

    @property
    def bits(self) -> int | None:
        """Bits of a code; None where floats are stored."""
        return BITS.get(self.precision)

    def arrays(self, compression: Compression) -> list[ArraySpec]:
        _, height, width = self.shape
        specs = []
        for factor, ranges in self.groups:
            channels = sum(stop - start for start, stop in ranges)
            shape = (channels, height // factor, width // factor)
            if self.bits is None:
                form = Form(self.precision, shape, _FEATURE_AXES)
                planes = compression == "zstd"
                transform: Transform = BytePlanes() if planes else Plain()
                name, fill = "values", _UNUSED_BYTE_PLANE if planes else np.nan
            else:
                form = Form("uint8", shape, _FEATURE_AXES)
                # uncompressed, packing is all that makes fewer bits fewer bytes; lz4's bitshuffle
                # does as well without it
                packed = compression == "zstd" or (compression == "none" and self.bits < 8)
                transform = Nibbles(self.bits) if packed else Plain()
                name, fill = "codes", 0
            path = f"{self.folder}/{name}_x{factor}"
            specs.append(ArraySpec(path=path, row=form, fill_value=fill, transform=transform))
        if self.bits is not None:
            form = Form("float32", (2, self.shape[0]), ("lo_step", "channel"))
            specs.append(ArraySpec(path=f"{self.folder}/affine", row=form, fill_value=np.nan))
        return specs

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "precision": self.precision,
            "shape": list(self.shape),
            "folder": self.folder,
            "groups": [
                {"factor": factor, "channels": [list(pair) for pair in ranges]}
                for factor, ranges in self.groups
            ],
            **({"generation": self.generation} if self.generation else {}),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> TapSpec:
        groups = tuple(
            Group(group["factor"], tuple((start, stop) for start, stop in group["channels"]))
            for group in record["groups"]
        )
        channels, height, width = record["shape"]
        return cls(
            name=record["name"],
            precision=record["precision"],
            shape=(channels, height, width),
            groups=groups,
            generation=record.get("generation", 0),
        )


def plain(tap: str) -> str:
    """A tap's name in characters that do in paths and metrics; it may hold slashes and colons."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", tap).strip("_.")


def generation_of(name: str, generation: int) -> str:
    """The name that the n-th refresh of something has: a refresh writes beside the old."""
    return f"{name}.{generation}" if generation else name


def whole(channels: int) -> tuple[Group, ...]:
    """The groups of a tap without repeated channels."""
    return (Group(1, ((0, channels),)),)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What holds for every row of a cache."""

    size_px: int
    shard_rows: int
    compression: Compression
    logits_dtype: str | None  # None: the cache holds no teacher logits
    taps: tuple[TapSpec, ...]
    fingerprint: Mapping[str, str]
    versions: Mapping[str, str]
    logits_generation: int = 0
    # what made the views but the first, once there are some: `policy` and `seed`
    augmentation: Mapping[str, Any] | None = None

    @property
    def logits_path(self) -> str:
        """The array of the teacher's logits."""
        return generation_of(LOGITS, self.logits_generation)

    def arrays(self) -> list[ArraySpec]:
        size = self.size_px
        # Undoing a prediction takes longer than zstd itself; lz4 and none are there to be read fast.
        predicted = self.compression == "zstd"
        image_form = Form("uint8", (size, size, 3), ("y", "x", "rgb"))
        return [
            ArraySpec(
                path=IMAGE,
                row=image_form,
                fill_value=0,
                transform=RgbGradient() if predicted else Plain(),
            ),
            ArraySpec(path=MASK, row=Form("uint8", (size, size), ("y", "x")), fill_value=255),
            *self._logits(predicted),
            ArraySpec(
                path=ROWS,
                row=Form("uint8", (ROW_DESCRIPTION_BYTES,), ("utf8_json",)),
                fill_value=0,
            ),
            *(spec for tap in self.taps for spec in tap.arrays(self.compression)),
        ]

    def _logits(self, predicted: bool) -> list[ArraySpec]:
        if self.logits_dtype is None:
            return []
        form = Form(self.logits_dtype, (self.size_px, self.size_px), ("y", "x"))
        transform = FloatGradient() if predicted else Plain()
        fill = _UNUSED_BYTE_PLANE if predicted else np.nan
        return [ArraySpec(path=self.logits_path, row=form, fill_value=fill, transform=transform)]

    def as_json(self) -> dict[str, Any]:
        return {
            "size_px": self.size_px,
            "shard_rows": self.shard_rows,
            "compression": self.compression,
            "logits_dtype": self.logits_dtype,
            "taps": [tap.as_json() for tap in self.taps],
            "fingerprint": dict(self.fingerprint),
            "versions": dict(self.versions),
            **({"logits_generation": self.logits_generation} if self.logits_generation else {}),
            **({"augmentation": self.augmentation} if self.augmentation else {}),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Manifest:
        return cls(
            size_px=record["size_px"],
            shard_rows=record["shard_rows"],
            compression=record["compression"],
            logits_dtype=record["logits_dtype"],
            taps=tuple(TapSpec.from_json(tap) for tap in record["taps"]),
            fingerprint=record["fingerprint"],
            versions=record["versions"],
            logits_generation=record.get("logits_generation", 0),
            augmentation=record.get("augmentation"),
        )


def logits_dtype(precision: str) -> str:
    """How the teacher's logits are stored in a cache of this precision."""
    return "float32" if precision == "float32" else "float16"


def stored_as(manifest: Manifest, precision: Precision) -> Manifest:
    """The same rows at another precision; what the fingerprint says of it is left to the caller."""
    has_logits = manifest.logits_dtype is not None
    return dataclasses.replace(
        manifest,
        logits_dtype=logits_dtype(precision) if has_logits else None,
        taps=tuple(dataclasses.replace(tap, precision=precision) for tap in manifest.taps),
    )
