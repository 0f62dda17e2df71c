"""Feature maps to stored arrays and back: pure functions, one implementation for numpy and torch.

Shapes: C channels, h and w the tap's grid. Features are float32 on whatever device they are; the
results are arrays of the same library on the same device, and equal bit for bit between the two.
`encode` refuses what a precision cannot represent (non-finite values, overflow) instead of
clipping it in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import array_api_compat
import numpy as np
from numpy.typing import NDArray

from kdcache.cache.layout import BITS, Group, TapSpec
from kdcache.errors import SampleError

F32 = NDArray[np.float32]
Array = Any  # numpy.ndarray or torch.Tensor

_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)
_LARGEST_F16 = float(np.finfo(np.float16).max)


def encode(feature_CHW: Array, tap: TapSpec) -> dict[str, Array]:
    """Store a (C, h, w) float32 feature map as the tap's arrays, by their name in its folder.

    Channels that the tap keeps at a coarser grid are checked to repeat each value, bit for bit.
    float32 is exact. float16 is rounded to nearest: |error| ≤ 2^-11·|x|, or 2^-25 below 2^-14.
    int8, int6, int5, int4 are affine per channel: |error| ≤ step/2 plus float32 rounding, with
    step = (max − min)/(2^bits − 1). Raises SampleError naming the channel for values that are not
    finite, not representable, or do not repeat as the tap says.
    """
    encoded, affine = {}, []
    for group in tap.groups:
        values = _compact(feature_CHW, group)
        low, high = _range(values, group)
        if tap.bits is None:
            encoded[f"values_x{group.factor}"] = _floats(values, tap.precision, low, high, group)
        else:
            codes, step = _quantise(values, tap.bits, low, high, group)
            encoded[f"codes_x{group.factor}"] = codes
            affine.append((group, low, step))
    if affine:
        xp = array_api_compat.array_namespace(feature_CHW)
        both = xp.empty((2, tap.shape[0]), dtype=xp.float32, device=feature_CHW.device)
        for group, low, step in affine:
            for part, (start, stop) in zip(_parts(group), group.channels, strict=True):
                both[0, start:stop], both[1, start:stop] = low[part], step[part]
        encoded["affine"] = both
    return encoded


def decode(arrays: Mapping[str, Array], tap: TapSpec, out: Array | None = None) -> Array:
    """The (C, h, w) float32 feature map that `encode` stored, or (N, C, h, w) of N of them.

    It is written to `out` where one is given.
    """
    first = next(iter(arrays.values()))
    xp = array_api_compat.array_namespace(first)
    if out is None:
        shape = (*first.shape[: first.ndim - 3], *tap.shape)
        out = xp.empty(shape, dtype=xp.float32, device=first.device)
    kind = "values" if tap.bits is None else "codes"
    for group in tap.groups:
        stored = arrays[f"{kind}_x{group.factor}"]
        for part, (start, stop) in zip(_parts(group), group.channels, strict=True):
            channels, values = out[..., start:stop, :, :], stored[..., part, :, :]
            if tap.bits is not None:
                low, step = (arrays["affine"][..., i, start:stop, None, None] for i in (0, 1))
                values = xp.multiply(values, step, out=channels if group.factor == 1 else None)
                values += low
            if values is not channels:
                _repeat(values, group.factor, channels)
    return out


def _repeat(values: Array, factor: int, out: Array) -> None:
    """Each value (…, h/f, w/f) into its f×f block of `out`, row by row: far faster than by blocks."""
    xp = array_api_compat.array_namespace(values)
    *before, height, width = out.shape
    rows = xp.stack([values] * factor, axis=-1).reshape((*before, height // factor, 1, width))
    out.reshape((*before, height // factor, factor, width))[...] = rows


def max_error(
    arrays: Mapping[str, NDArray[np.generic]], tap: TapSpec, before: Sequence[str] = ()
) -> NDArray[np.float64]:
    """The stated bound of |x − decode(encode(x))|, as an array that broadcasts to (C, h, w).

    It needs what is stored only: half a step (or float16's half unit) and the rounding of one
    float32 product and one sum. `before` are the precisions that x had been rounded to earlier, the
    last one first: their bounds are added. A channel's lowest and highest value pass every rounding
    to codes, so its range, and with it each earlier step, is that of what is stored.
    """
    if tap.precision == "float32":
        return np.zeros((1, 1, 1))
    if tap.bits is None:
        return _half_unit(decode(arrays, tap))
    low, step = (np.asarray(row, np.float64)[:, None, None] for row in arrays["affine"])
    spread = (2**tap.bits - 1) * step
    bound = _half_step(low, spread, tap.bits)
    for precision in before:
        if precision in BITS:
            bound = bound + _half_step(low, spread, BITS[precision])
        elif precision == "float16":
            bound = bound + _half_unit(np.abs(decode(arrays, tap)) + bound)
    return bound


def _half_step(
    low: NDArray[np.float64], spread: NDArray[np.float64], bits: int
) -> NDArray[np.float64]:
    """The bound of codes of so many bits, in channels from `low` to `low + spread`."""
    levels = 2**bits - 1
    # a step that float32 cannot hold as a normal number is stored as 0, all values as the minimum
    flat = np.where(spread == 0, levels * _SMALLEST_NORMAL, 0)
    rounding = 4 * np.finfo(np.float32).eps * np.maximum(np.abs(low), np.abs(low + spread))
    bound: NDArray[np.float64] = spread / levels / 2 + rounding + flat
    return bound


def max_logit_error(stored: NDArray[np.generic]) -> NDArray[np.float64]:
    """The stated bound of |logit − stored|, for logits stored as float16 or float32."""
    return _half_unit(stored) if stored.dtype == np.float16 else np.zeros(1)


def _half_unit(rounded: NDArray[np.generic]) -> NDArray[np.float64]:
    """How far a value may have been from the float16 it was rounded to."""
    # 2^-11 of the value before rounding, which may be that much larger than the one stored
    magnitude = np.abs(rounded.astype(np.float64))
    return np.maximum(magnitude * (2**-11 * (1 + 2**-10)), 2**-25)


def on_host(array: Array) -> NDArray[Any]:
    """A numpy array or torch tensor as a numpy array."""
    return np.asarray(array.cpu() if hasattr(array, "cpu") else array)


def teacher_logits(logits_HW: F32, dtype: str) -> NDArray[np.generic]:
    """Logits as float16, or as they are (float32) in a cache for bit-exact studies."""
    if not np.isfinite(logits_HW).all():
        raise SampleError("the teacher's logits are not finite")
    if dtype == "float32":
        return logits_HW
    with np.errstate(over="ignore"):
        stored = logits_HW.astype(np.float16)
    if not np.isfinite(stored).all():
        raise SampleError(
            f"the teacher's logits reach {np.abs(logits_HW).max():.3g}, beyond float16's 65504; "
            "use --precision float32"
        )
    return stored


def _compact(feature_CHW: Array, group: Group) -> Array:
    """The group's channels at their own resolution; refuses channels that do not repeat."""
    xp = array_api_compat.array_namespace(feature_CHW)
    parts = []
    for start, stop in group.channels:
        channels = feature_CHW[start:stop]
        compact = channels[:, :: group.factor, :: group.factor]
        if group.factor > 1:
            same = _repeats(channels, group.factor)
            if not xp.all(same):
                channel = start + int(np.argmin(on_host(same)))
                raise SampleError(
                    f"feature channel {channel} does not repeat each value in "
                    f"{group.factor}×{group.factor} blocks, as the detector's graph says it does"
                )
        parts.append(compact)
    return parts[0] if len(parts) == 1 else xp.concat(parts, axis=0)


def _repeats(maps_CHW: Array, factor: int) -> Array:
    """Whether each channel repeats each value in blocks of f×f: (C,) bool.

    Whole rows first: that half of the work is on memory in order.
    """
    xp = array_api_compat.array_namespace(maps_CHW)
    channels, height, width = maps_CHW.shape
    # as integers: −0 must not pass for +0, nor a NaN for none
    rows = maps_CHW.view(xp.int32).reshape((channels, height // factor, factor, width))
    cells = rows[:, :, 0].reshape((channels, height // factor, width // factor, factor))
    same_rows = xp.all(rows[:, :, 1:] == rows[:, :, :1], axis=(1, 2, 3))
    return same_rows & xp.all(cells[..., 1:] == cells[..., :1], axis=(1, 2, 3))


def _range(values: Array, group: Group) -> tuple[Array, Array]:
    """Each channel's minimum and maximum; refuses values that are not finite (both carry NaN on)."""
    xp = array_api_compat.array_namespace(values)
    # + 0: of −0 and +0 numpy and torch may pick either
    low, high = xp.min(values, axis=(1, 2)) + 0, xp.max(values, axis=(1, 2)) + 0
    _refuse(~(xp.isfinite(low) & xp.isfinite(high)), group, low, high, "not finite")
    return low, high


def _floats(values: Array, precision: str, low: Array, high: Array, group: Group) -> Array:
    if precision == "float32":
        return values
    xp = array_api_compat.array_namespace(values)
    # float16 rounds to infinity from half a unit above its largest value on
    limit = _LARGEST_F16 + 16
    beyond = (high >= limit) | (low <= -limit)
    _refuse(beyond, group, low, high, "beyond float16's ±65504; use float32 or int8")
    return xp.astype(values, xp.float16)


def _quantise(
    values: Array, bits: int, low: Array, high: Array, group: Group
) -> tuple[Array, Array]:
    """Codes (n, h, w) uint8 and each channel's step: code = round((x − low)/step).

    A constant channel, or one whose step is below the smallest normal float32 (its reciprocal
    would lose the bits that the bound needs), gets step 0 and decodes to its minimum.
    """
    xp = array_api_compat.array_namespace(values)
    levels = 2**bits - 1
    # float64: the difference of two finite float32 values may not be a finite float32
    spread = xp.astype(high, xp.float64) - xp.astype(low, xp.float64)
    step = xp.astype(spread / levels, xp.float32)
    largest = xp.astype(low, xp.float64) + levels * xp.astype(step, xp.float64)
    limit = float(np.finfo(np.float32).max)
    wide = (spread > limit) | (xp.astype(step, xp.float64) * levels > limit) | (largest > limit)
    _refuse(wide, group, low, high, "a spread wider than float32 can hold; use float32")
    step = xp.where(step < _SMALLEST_NORMAL, xp.zeros_like(step), step)
    divisor = xp.where(step > 0, step, xp.full_like(step, float("inf")))
    scaled = values - low[:, None, None]
    scaled /= divisor[:, None, None]
    return xp.astype(xp.clip(xp.round(scaled), 0, levels), xp.uint8), step


def _refuse(bad: Array, group: Group, low: Array, high: Array, why: str) -> None:
    flagged = on_host(bad)
    if not flagged.any():
        return
    index = int(np.argmax(flagged))
    channels = [c for start, stop in group.channels for c in range(start, stop)]
    raise SampleError(
        f"feature channel {channels[index]} has values from {float(low[index])} to "
        f"{float(high[index])}: {why}"
    )


def _parts(group: Group) -> list[slice]:
    """Where each channel range of a group lies in the group's own array."""
    slices, offset = [], 0
    for start, stop in group.channels:
        slices.append(slice(offset, offset + stop - start))
        offset += stop - start
    return slices
