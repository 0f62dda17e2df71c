"""Feature maps to stored arrays and back: pure numpy functions, one pair a precision.

Shapes: C channels, h and w the tap's grid. `encode` refuses what a precision cannot represent
(non-finite values, overflow) instead of clipping it in silence.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import SampleError

F32 = NDArray[np.float32]
Arrays = dict[str, NDArray[np.generic]]

_LEVELS = 255  # int8: the largest code
_SMALLEST_NORMAL = np.finfo(np.float32).tiny


def encode(feature_CHW: F32, precision: str) -> Arrays:
    """Store a (C, h, w) float32 feature map at `precision`, as named arrays of the cache.

    float32 is exact; float16 is rounded to nearest (relative error ≤ 2^-11); int8 is affine per
    channel with |error| ≤ step/2 plus float32 rounding, step = (max − min)/255. Raises
    SampleError naming the channel for values that are not finite or not representable.
    """
    _refuse(~np.isfinite(feature_CHW), feature_CHW, "not finite")
    if precision == "float32":
        return {"values": feature_CHW}
    if precision == "float16":
        with np.errstate(over="ignore"):
            values = feature_CHW.astype(np.float16)
        _refuse(~np.isfinite(values), feature_CHW, "beyond float16's ±65504; use float32 or int8")
        return {"values": values}
    if precision == "int8":
        codes, affine = quantise(feature_CHW)
        return {"codes": codes, "affine": affine}
    raise ValueError(f"unknown precision {precision!r}")


def decode(arrays: Mapping[str, NDArray[np.generic]], precision: str) -> F32:
    """The (C, h, w) float32 feature map that `encode` stored."""
    if precision == "int8":
        return dequantise(arrays["codes"], arrays["affine"])
    return np.asarray(arrays["values"], np.float32)


def quantise(feature_CHW: F32) -> tuple[NDArray[np.uint8], F32]:
    """Affine codes (C, h, w) uint8 and (2, C) float32 of each channel's lo and step.

    code = round((x − lo)/step). A constant channel, or one whose step is below the smallest
    normal float32 (its reciprocal would lose the bits that the bound needs), gets step 0 and
    decodes to lo.
    """
    low = feature_CHW.min(axis=(1, 2))
    high = feature_CHW.max(axis=(1, 2))
    # float64: the difference of two finite float32 values may not be a finite float32.
    step = ((high.astype(np.float64) - low) / _LEVELS).astype(np.float32)
    _refuse(
        (high.astype(np.float64) - low > np.finfo(np.float32).max)[:, None, None],
        feature_CHW,
        "spread wider than float32 can subtract",
    )
    step[step < _SMALLEST_NORMAL] = 0
    divisor = np.where(step > 0, step, np.float32(1))[:, None, None]
    scaled = (feature_CHW - low[:, None, None]) / divisor
    scaled[step == 0] = 0
    codes = np.minimum(np.rint(scaled), _LEVELS).astype(np.uint8)
    return codes, np.stack([low, step])


def dequantise(codes_CHW: NDArray[np.generic], affine: NDArray[np.generic]) -> F32:
    """x ≈ lo + code · step, in float32."""
    low, step = np.asarray(affine, np.float32)
    decoded: F32 = codes_CHW.astype(np.float32) * step[:, None, None] + low[:, None, None]
    return decoded


def teacher_logits(logits_HW: F32, precision: str) -> NDArray[np.generic]:
    """Logits as float16, or float32 when features are float32 too (a cache for bit-exact studies)."""
    if not np.isfinite(logits_HW).all():
        raise SampleError("the teacher's logits are not finite")
    if precision == "float32":
        return logits_HW
    with np.errstate(over="ignore"):
        stored = logits_HW.astype(np.float16)
    if not np.isfinite(stored).all():
        raise SampleError(
            f"the teacher's logits reach {np.abs(logits_HW).max():.3g}, beyond float16's 65504; "
            "use --precision float32"
        )
    return stored


def _refuse(bad: NDArray[np.bool_], feature_CHW: F32, why: str) -> None:
    if not bad.any():
        return
    channel = int(np.argmax(bad.any(axis=(1, 2))))
    values = feature_CHW[channel]
    raise SampleError(
        f"feature channel {channel} has values from {values.min()} to {values.max()}: {why}"
    )
