"""What light, weather and cameras do to a picture, with the same bytes on any machine.

Every function takes and returns (S, S, 3) uint8 RGB and leaves its argument as it is. torchvision's
`gaussian_blur` gives other bytes with AVX2 than with AVX-512 (0.29, measured); its colours gave the same
ones, but are computed in float32, which promises that to nobody; its noise follows a global generator.
So here
- integers, where they are enough;
- additions, multiplications, divisions and roots of float64, one NumPy operation each, which IEEE 754
  gives one result;
- powers, sines and cosines, which it does not, only of multiples of 10^-3, rounded to integers: a test
  tries all, and none lies so near a tie that two libraries could round it differently;
- OpenCV for what it does in integers: lookup, lines, 8-bit Gaussian blur;
- Pillow's JPEG, for the slow integer transform of libjpeg-turbo has the same result in every version.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kdcache.imaging import U8

U16 = NDArray[np.uint16]

# Rec. 709's weights as the W3C's "Filter Effects" rounds them; _TURN is its hueRotate at a right angle.
_LUMA = (0.213, 0.715, 0.072)
_TURN = ((-0.213, -0.715, 0.928), (0.143, 0.140, -0.283), (-0.787, 0.715, 0.072))

_PATCHES = 4  # of fog along a side
_RAIN_LEVEL = 215
_NOISE_BYTES = 4  # their sum is bell-shaped, to ±3.4 standard deviations
_NOISE_SIGMA = math.sqrt(_NOISE_BYTES * (256**2 - 1) / 12)


def colour(image: U8, brightness: float, contrast: float, saturation: float, hue: float) -> U8:
    """Hue turned by degrees, then saturation, contrast around the mean luma, and brightness, as factors.

    All four are linear: one matrix, and values are rounded and clipped once.
    """
    cosine, sine = hue_turn(hue)
    rows = []
    # one division of integers: Python's sum of floats rounds otherwise from 3.12 on
    red, green, blue = image.sum(axis=(0, 1), dtype=np.int64).tolist()
    mean = (213 * red + 715 * green + 72 * blue) / (1000 * image.size // 3)
    for i in range(3):
        row = []
        for j in range(3):
            colourful = cosine * ((i == j) - _LUMA[j]) + sine * _TURN[i][j]
            row.append(
                round(512 * brightness * contrast * (_LUMA[j] + saturation * colourful)) / 512
            )
        # Odd multiples of 1/1024: no result is a tie, which OpenCV's integer and float32 code round
        # differently. All sums have fewer than 24 bits, so that both are exact.
        rows.append([*row, (2 * math.floor(512 * brightness * (1 - contrast) * mean) + 1) / 1024])
    return _u8(cv2.transform(image, np.array(rows)))


def hue_turn(degrees: float) -> tuple[float, float]:
    """Cosine and sine, rounded to 5 decimals."""
    angle = math.radians(degrees)
    return round(math.cos(angle) * 1e5) / 1e5, round(math.sin(angle) * 1e5) / 1e5


def gamma(image: U8, gamma: float) -> U8:
    """255 (x / 255)^gamma."""
    return _u8(cv2.LUT(image, np.rint(tone_curve(gamma)).astype(np.uint8)))


def tone_curve(gamma: float) -> NDArray[np.float64]:
    """The curve before it is rounded, for x from 0 to 255."""
    return 255 * (np.arange(256) / 255) ** gamma


def shadow(image: U8, darkness: float, edge: float, x: float, y: float, dx: float, dy: float) -> U8:
    """Darker by `darkness` on the side of (x, y) to which (dx, dy) points; `edge` is how soft, in sides."""
    size = len(image)
    norm = math.sqrt(dx * dx + dy * dy) or 1.0
    along = (np.arange(size) + 0.5) / size
    columns, rows = (along - x) * (dx / norm / edge), (along - y) * (dy / norm / edge)
    inside = np.clip(rows[:, None] + columns + 0.5, 0, 1)
    kept = np.rint(256 - 256 * darkness * inside).astype(np.uint16)
    product = image * kept[..., None]
    product += 128
    product >>= 8
    return product.astype(np.uint8)


def fog(image: U8, density: float, level: int, seed: int) -> U8:
    """Towards grey `level`, where it is thickest by `density`, where it is thinnest by half of that."""
    patches = _raw_bytes(seed, (_PATCHES + 1) ** 2).reshape(_PATCHES + 1, _PATCHES + 1)
    weights = _smooth(len(image), _PATCHES)
    thickness = (weights @ patches @ weights.T) / 2**16 / 255  # 0 to 1; integers until here
    return _towards(
        image, np.rint(256 * density * (0.5 + 0.5 * thickness)).astype(np.uint16), level
    )


def _smooth(size: int, cells: int) -> NDArray[np.int64]:
    """(size, cells + 1) weights, each row adding up to 256: smoothstep between the ends of each cell."""
    at = (2 * np.arange(size) + 1) * cells * 128 // size  # in 1/256 of a cell
    cell, t = at // 256, at % 256
    upper = t * t * (768 - 2 * t) // 2**16
    weights = np.zeros((size, cells + 1), np.int64)
    weights[np.arange(size), cell] = 256 - upper
    weights[np.arange(size), cell + 1] = upper
    return weights


def rain(image: U8, streaks: int, length: float, slant: float, seed: int) -> U8:
    """Slanted bright streaks of up to `length` thousandths of the side, near ones longer and brighter."""
    size = len(image)
    cover = np.zeros((size, size), np.uint8)
    for x, y, near, _ in _raw_bytes(seed, streaks * 8).view("<u2").reshape(-1, 4).tolist():
        left, top = x * (size + 1) >> 16, (y * 3 * size >> 17) - size // 4
        down = round(length * size * (0.4 + near / 2**16 * 0.6) / 1000)
        end = (left + round(slant * down), top + down)
        cv2.line(cover, (left, top), end, 60 + (near >> 9), max(1, size // 500), cv2.LINE_AA)
    return _towards(image, cv2.GaussianBlur(cover, (3, 3), 0).astype(np.uint16), _RAIN_LEVEL)


def _towards(image: U8, share: U16, level: int) -> U8:
    """Blend with grey `level`; `share` (S, S) in 1/256, at most 256."""
    mixed = image * (256 - share)[..., None]
    mixed += (share * np.uint16(level) + np.uint16(128))[..., None]
    mixed >>= 8
    return mixed.astype(np.uint8)


def blur(image: U8, sigma: float) -> U8:
    """A Gaussian blur of `sigma` thousandths of the side; OpenCV's for 8 bits is in fixed point."""
    return _u8(cv2.GaussianBlur(image, (0, 0), sigma * len(image) / 1000))


def motion(image: U8, length: float, dx: float, dy: float) -> U8:
    """The mean along a line of `length` thousandths of the side in direction (dx, dy).

    Sums of shifted pictures: `filter2D` turns to float Fourier transforms from 11 pixels on.
    """
    size = len(image)
    steps = min(max(2, round(length * size / 1000)), 256)  # 256 × 255 fits 16 bits
    longest = max(abs(dx), abs(dy)) or 1.0
    total = np.zeros(image.shape, np.uint16)
    padded = _u8(cv2.copyMakeBorder(image, steps, steps, steps, steps, cv2.BORDER_REFLECT))
    for step in range(steps):
        away = step - steps // 2
        top, left = steps + round(away * dy / longest), steps + round(away * dx / longest)
        total += padded[top : top + size, left : left + size]
    total += steps // 2
    total //= steps
    return total.astype(np.uint8)


def noise(image: U8, sigma: float, seed: int) -> U8:
    """Each value moved by itself, by `sigma` grey levels in the mean square, at most 18."""
    raw = _raw_bytes(seed, _NOISE_BYTES * image.size).reshape(_NOISE_BYTES, *image.shape)
    moved: NDArray[np.int16] = raw[0].astype(np.int16)
    for more in raw[1:]:
        moved += more
    moved -= 510
    moved *= np.int16(round(sigma * 512 / _NOISE_SIGMA))  # at most 62: 62 × 510 fits 16 bits
    moved += 256
    moved >>= 9
    moved += image
    return moved.clip(0, 255).astype(np.uint8)


def compression(image: U8, quality: int) -> U8:
    """JPEG at this quality, chroma at half resolution.

    Pillow, as it decodes the photos: torchvision's `jpeg` warns since 0.29 that it will go.
    """
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    with Image.open(file, formats=("JPEG",)) as picture:
        return np.array(picture, np.uint8)


def _raw_bytes(key: int, count: int) -> U8:
    """Bytes of Philox4x64-10, a published function of its key, whose raw output NEP 19 promises to stay."""
    words: NDArray[np.uint64] = np.random.Philox(key=key).random_raw(-(-count // 8))
    return words.astype("<u8", copy=False).view(np.uint8)[:count]


def _u8(array: NDArray[np.generic]) -> U8:
    return array.astype(np.uint8, copy=False)


# By name in the policy, in the order in which they are applied: scene, sensor, file.
PHOTOMETRIC: dict[str, Callable[..., U8]] = {
    "colour": colour,
    "shadow": shadow,
    "fog": fog,
    "rain": rain,
    "gamma": gamma,
    "blur": blur,
    "motion": motion,
    "noise": noise,
    "compression": compression,
}
