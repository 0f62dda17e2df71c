"""Exact rearrangements of a row's array before it is compressed, and back.

They make bytes that zstd packs better, and are undone in a few numpy lines (`recipe`, which is
stored in the array's attributes). Measured in docs/log.md; each is lossless for every bit pattern.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
Array = NDArray[np.generic]


class Form(NamedTuple):
    """What one row of an array is: dtype, shape and the names of its dimensions."""

    dtype: str
    shape: tuple[int, ...]
    dimensions: tuple[str, ...]


@dataclass(frozen=True)
class Plain:
    """Stored as it is."""

    name: ClassVar = "plain"

    def recipe(self, row: Form) -> str:
        """Numpy lines that turn `stored` into `array`, given `shape`, the row's."""
        return "array = stored"

    def stored(self, row: Form) -> Form:
        """The form on disk of a row of form `row`."""
        return row

    def forward(self, array: Array) -> Array:
        """The stored array of a row's array."""
        return array

    def inverse(self, stored: Array, row: Form) -> Array:
        """The row's array of a stored one."""
        return stored


@dataclass(frozen=True)
class Nibbles:
    """Codes of 4, 5, 6 or 8 bits: the upper nibbles of two neighbours in a byte, then the lower bits.

    Neighbours are alike in their upper bits, and a byte of two is a symbol that zstd's entropy
    coder can learn; the lower bits are noise that it stores as they are. Fewer than 8 bits take
    no more room than they have, also uncompressed. The count of codes is padded to a multiple of 8.
    """

    name: ClassVar = "nibbles"

    bits: int

    def recipe(self, row: Form) -> str:
        low = self.bits - 4
        lines = [
            "n = math.prod(shape) + -math.prod(shape) % 8",
            "pairs, rest = stored[: n // 2], stored[n // 2 :]",
            "array = np.stack([pairs >> 4, pairs & 15], axis=1).ravel()",
        ]
        if low:
            shifts = list(range(8 - low, -1, -low))
            lines += [
                f"low = np.stack([rest >> s & {2**low - 1} for s in {shifts}], axis=1).ravel()",
                f"array = array << {low} | low",
            ]
        return "\n".join([*lines, "array = array[: math.prod(shape)].reshape(shape)"])

    def stored(self, row: Form) -> Form:
        return Form("uint8", (_padded(row.shape) * self.bits // 8,), ("packed",))

    def forward(self, array: Array) -> U8:
        count = array.size
        codes = np.zeros(_padded(array.shape), np.uint8)
        codes[:count] = array.reshape(-1)
        low = self.bits - 4
        upper: U8 = codes >> np.uint8(low)
        pairs: U8 = upper[::2] << np.uint8(4) | upper[1::2]
        if not low:
            return pairs
        fields = codes.reshape(-1, 8 // low) & (2**low - 1)
        rest = fields[:, 0]
        for column in range(1, 8 // low):
            rest = rest << low | fields[:, column]
        return np.concatenate([pairs, rest])

    def inverse(self, stored: Array, row: Form) -> U8:
        low, half = self.bits - 4, _padded(row.shape) // 2
        packed = stored.astype(np.uint8, copy=False)
        pairs, rest = packed[:half], packed[half:]
        codes = np.empty((half, 2), np.uint8)
        codes[:, 0] = pairs >> 4
        codes[:, 1] = pairs & 15
        if low:
            codes <<= low
            fields = codes.reshape(-1, 8 // low)
            for column in range(8 // low):
                fields[:, column] |= rest >> (8 - low * (column + 1)) & (2**low - 1)
        return codes.reshape(-1)[: math.prod(row.shape)].reshape(row.shape)


@dataclass(frozen=True)
class BytePlanes:
    """Floats cut into planes of bytes, sign and exponent first: those repeat, the mantissa does not."""

    name: ClassVar = "byte_planes"

    def recipe(self, row: Form) -> str:
        return f"{_joined(row.dtype)}\narray = bits.view({row.dtype!r})"

    def stored(self, row: Form) -> Form:
        planes = np.dtype(row.dtype).itemsize
        return Form("uint8", (planes, *row.shape), ("byte_plane", *row.dimensions))

    def forward(self, array: Array) -> U8:
        return _split(_bits(array))

    def inverse(self, stored: Array, row: Form) -> Array:
        return _join(stored, row.dtype).view(row.dtype)


@dataclass(frozen=True)
class FloatGradient:
    """A smooth float map (H, W): the bits of each value less those that its neighbours predict.

    The prediction is left + above − above-left, on the bits as integers. 128 is added so that
    small differences of either sign leave the upper bytes zero; the bytes go into planes.
    """

    name: ClassVar = "float_gradient"

    def recipe(self, row: Form) -> str:
        lines = [
            _joined(row.dtype),
            "bits = (bits - 128).cumsum(0, bits.dtype).cumsum(1, bits.dtype)",
            f"array = bits.view({row.dtype!r})",
        ]
        return "\n".join(lines)

    def stored(self, row: Form) -> Form:
        return BytePlanes().stored(row)

    def forward(self, array: Array) -> U8:
        bits = _bits(array)
        return _split(_residuals(bits) + bits.dtype.type(128))

    def inverse(self, stored: Array, row: Form) -> Array:
        bits = _join(stored, row.dtype)
        bits -= bits.dtype.type(128)
        return _summed(bits).view(row.dtype)


@dataclass(frozen=True)
class RgbGradient:
    """An (H, W, 3) uint8 photo as planes of G, R − G and B − G, each less what its neighbours predict.

    As in lossless photo formats: colour follows brightness, and a pixel is close to
    left + above − above-left. All modulo 256.
    """

    name: ClassVar = "rgb_gradient"

    def recipe(self, row: Form) -> str:
        lines = [
            "green, red, blue = stored.cumsum(1, 'uint8').cumsum(2, 'uint8')",
            "array = np.stack([red + green, green, blue + green], axis=-1)",
        ]
        return "\n".join(lines)

    def stored(self, row: Form) -> Form:
        height, width, _ = row.shape
        return Form("uint8", (3, height, width), ("g_rg_bg", *row.dimensions[:2]))

    def forward(self, array: Array) -> U8:
        red, green, blue = (array[..., c].astype(np.uint8, copy=False) for c in range(3))
        return np.stack([_residuals(plane) for plane in (green, red - green, blue - green)])

    def inverse(self, stored: Array, row: Form) -> U8:
        green, red, blue = _summed(stored.astype(np.uint8, copy=False))
        image = np.empty(row.shape, np.uint8)
        image[..., 1] = green
        np.add(red, green, out=image[..., 0])
        np.add(blue, green, out=image[..., 2])
        return image


Transform = Plain | Nibbles | BytePlanes | FloatGradient | RgbGradient


def _padded(shape: tuple[int, ...]) -> int:
    count = math.prod(shape)
    return count + -count % 8


def _residuals(plane: NDArray[Any]) -> NDArray[Any]:
    """Value − left − above + above-left, modulo the dtype's range; outside the map all is 0."""
    rows = np.diff(plane, axis=0, prepend=np.zeros_like(plane[:1]))
    return np.diff(rows, axis=1, prepend=np.zeros_like(rows[:, :1]))


def _summed(residuals: NDArray[Any]) -> NDArray[Any]:
    """The inverse of `_residuals`, over the last two axes."""
    dtype = residuals.dtype
    summed: NDArray[Any] = residuals.cumsum(-2, dtype).cumsum(-1, dtype)
    return summed


def _bits(array: Array) -> NDArray[np.unsignedinteger[Any]]:
    return np.ascontiguousarray(array).view(f"uint{8 * array.dtype.itemsize}")


def _split(bits: NDArray[np.unsignedinteger[Any]]) -> U8:
    width = 8 * bits.dtype.itemsize
    return np.stack([(bits >> shift).astype(np.uint8) for shift in range(width - 8, -1, -8)])


def _join(planes: Array, dtype: str) -> NDArray[Any]:
    unsigned = np.dtype(f"uint{8 * np.dtype(dtype).itemsize}")
    bits: NDArray[Any] = planes[0].astype(unsigned)
    for plane in planes[1:]:
        bits <<= unsigned.type(8)
        bits |= plane
    return bits


def _joined(dtype: str) -> str:
    """The recipe of `_join`."""
    unsigned, width = f"uint{8 * np.dtype(dtype).itemsize}", np.dtype(dtype).itemsize
    terms = [f"stored[{i}].astype({unsigned!r}) << {8 * (width - 1 - i)}" for i in range(width - 1)]
    return f"bits = {' | '.join([*terms, f'stored[{width - 1}]'])}"
