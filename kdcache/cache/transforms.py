"""Exact rearrangements of a row's array before it is compressed, and back.

They make bytes that zstd packs better, and are undone in a few numpy lines (`recipe`, which is
stored in the array's attributes). Measured in docs/log.md; each is lossless for every bit pattern.

`forward` takes one numpy row. `inverse` takes numpy arrays or torch tensors, of one row or with
further axes before it, so that a batch can be undone where it will be used.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import array_api_compat
import cv2
import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
Array = NDArray[np.generic]
AnyArray = Any  # numpy.ndarray or torch.Tensor

# Codes that are unpacked at a time in numpy: what is at hand then stays in the processor's cache.
_BLOCK = 2**16


class Form(NamedTuple):
    """What one row of an array is: dtype, shape and the names of its dimensions."""

    dtype: str
    shape: tuple[int, ...]
    dimensions: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


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

    def inverse(self, stored: AnyArray, row: Form) -> AnyArray:
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

    def inverse(self, stored: AnyArray, row: Form) -> AnyArray:
        packed = stored.reshape((-1, stored.shape[-1]))
        if isinstance(stored, np.ndarray):
            codes: AnyArray = np.stack([self._looked_up(one) for one in packed])
        else:
            codes = self._shifted(packed)
        return codes[:, : math.prod(row.shape)].reshape((*stored.shape[:-1], *row.shape))

    def _looked_up(self, packed: NDArray[Any]) -> U8:
        """The codes of one row, each stored byte's from a table: in numpy twice as fast as shifts."""
        low, count = self.bits - 4, packed.size * 8 // self.bits
        half, (upper, lower) = count // 2, _tables(self.bits)
        codes = np.empty(count, np.uint8)
        for start in range(0, count, _BLOCK):
            stop = min(start + _BLOCK, count)
            block = codes[start:stop]
            pairs = packed[start // 2 : stop // 2]
            # mode: a uint8 is within the table, which numpy need not check
            upper.take(pairs, out=block.view(upper.dtype), mode="clip")
            if low:
                rest = packed[half + start * low // 8 : half + stop * low // 8]
                wide: NDArray[Any] = block.view(lower.dtype)
                wide |= lower.take(rest, mode="clip")
        return codes

    def _shifted(self, packed: AnyArray) -> AnyArray:
        xp = array_api_compat.array_namespace(packed)
        low, count = self.bits - 4, packed.shape[1] * 8 // self.bits
        pairs, rest = packed[:, : count // 2], packed[:, count // 2 :]
        codes = xp.stack([pairs >> 4, pairs & 15], axis=-1).reshape((-1, count))
        if not low:
            return codes
        fields = [rest >> shift & (2**low - 1) for shift in range(8 - low, -1, -low)]
        return codes << low | xp.stack(fields, axis=-1).reshape((-1, count))


@functools.cache
def _tables(bits: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """What a byte of two upper parts, and one of lower parts, adds to its codes, as one wide word."""
    low, byte = bits - 4, np.arange(256)
    upper = np.stack([byte >> 4, byte & 15], axis=-1) << low
    shifts = range(8 - low, -1, -low) if low else [0]
    lower = np.stack([byte >> shift & (2**low - 1) for shift in shifts], axis=-1)
    both = []
    for table in (upper, lower):
        codes = np.ascontiguousarray(table, np.uint8)
        both.append(codes.view(f"uint{8 * codes.shape[1]}")[:, 0])
    return both[0], both[1]


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

    def inverse(self, stored: AnyArray, row: Form) -> AnyArray:
        return _as_floats(_join(stored, row), row)


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

    def inverse(self, stored: AnyArray, row: Form) -> AnyArray:
        if not isinstance(stored, np.ndarray):
            return _as_floats(_summed(_join(stored, row) - 128), row)
        # sums of the planes, put together, are the sum of the values
        summed = _sums(stored[..., 0, :, :])
        for plane in range(1, stored.shape[-3]):
            summed <<= 8
            summed += _sums(stored[..., plane, :, :])
        summed -= 128 * _positions(*row.shape)
        return _as_floats(summed.astype(_integers(row), copy=False), row)


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

    def inverse(self, stored: AnyArray, row: Form) -> AnyArray:
        xp = array_api_compat.array_namespace(stored)
        on_host = isinstance(stored, np.ndarray)
        planes = _sums(stored).astype(np.uint8) if on_host else _summed(stored)
        green, red, blue = (planes[..., n, :, :] for n in range(3))
        return xp.stack([red + green, green, blue + green], axis=-1)


Transform = Plain | Nibbles | BytePlanes | FloatGradient | RgbGradient


def _padded(shape: tuple[int, ...]) -> int:
    count = math.prod(shape)
    return count + -count % 8


def _residuals(plane: NDArray[Any]) -> NDArray[Any]:
    """Value − left − above + above-left, modulo the dtype's range; outside the map all is 0."""
    rows = np.diff(plane, axis=0, prepend=np.zeros_like(plane[:1]))
    return np.diff(rows, axis=1, prepend=np.zeros_like(rows[:, :1]))


def _summed(residuals: AnyArray) -> AnyArray:
    """The inverse of `_residuals`, over the last two axes of a torch tensor."""
    dtype = residuals.dtype
    return residuals.cumsum(-2, dtype=dtype).cumsum(-1, dtype=dtype)


def _sums(residuals: NDArray[Any]) -> NDArray[np.int32]:
    """The same of uint8 in numpy, modulo 2^32. OpenCV's integral is ten times as fast as cumsum."""
    *before, height, width = residuals.shape
    summed = np.empty((*before, height, width), np.int32)
    for place in np.ndindex(*before):
        summed[place] = cv2.integral(residuals[place])[1:, 1:]
    return summed


@functools.cache
def _positions(height: int, width: int) -> NDArray[np.int32]:
    """(y + 1)·(x + 1): how many values a sum is over."""
    y, x = (np.arange(1, side + 1, dtype=np.int32) for side in (height, width))
    return y[:, None] * x


def _bits(array: Array) -> NDArray[np.unsignedinteger[Any]]:
    return np.ascontiguousarray(array).view(f"uint{8 * array.dtype.itemsize}")


def _split(bits: NDArray[np.unsignedinteger[Any]]) -> U8:
    width = 8 * bits.dtype.itemsize
    return np.stack([(bits >> shift).astype(np.uint8) for shift in range(width - 8, -1, -8)])


def _integers(row: Form) -> str:
    """The integers that hold the bits of the row's floats."""
    return f"int{8 * np.dtype(row.dtype).itemsize}"


def _join(planes: AnyArray, row: Form) -> AnyArray:
    """The bits of floats, from planes of their bytes, the upper first."""
    xp, axes = array_api_compat.array_namespace(planes), [slice(None)] * len(row.shape)
    integer = getattr(xp, _integers(row))
    bits = xp.astype(planes[(..., 0, *axes)], integer)
    for plane in range(1, np.dtype(row.dtype).itemsize):
        bits <<= 8
        bits |= planes[(..., plane, *axes)]
    return bits


def _as_floats(bits: AnyArray, row: Form) -> AnyArray:
    return bits.view(getattr(array_api_compat.array_namespace(bits), row.dtype))


def _joined(dtype: str) -> str:
    """The recipe of `_join`."""
    unsigned, width = f"uint{8 * np.dtype(dtype).itemsize}", np.dtype(dtype).itemsize
    terms = [f"stored[{i}].astype({unsigned!r}) << {8 * (width - 1 - i)}" for i in range(width - 1)]
    return f"bits = {' | '.join([*terms, f'stored[{width - 1}]'])}"
