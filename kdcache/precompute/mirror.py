"""How far mirrored targets are from what the models give on mirrored photos.

A network is not symmetric: mirroring what it gave is not what it would give. How much that is
depends on the model alone, so it is measured on some rows of a cache before any are mirrored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from kdcache.cache import codecs
from kdcache.cache.format import Mirrored
from kdcache.cache.layout import LOGITS
from kdcache.cache.mirrored import made_by
from kdcache.cache.reader import Cache
from kdcache.errors import ModelError
from kdcache.imaging import PADDING, U8

F64 = NDArray[np.float64]

# (N, H, W, 3) uint8 RGB to what a model gives of each part, by tap or as LOGITS: (N, C, h, w).
Model = Callable[[U8], Mapping[str, codecs.Array]]


def measure_mirrored(
    cache: Cache, rows: Sequence[int], models: Sequence[Model], *, progress: bool = False
) -> dict[str, Mirrored]:
    """Each part that the models give, against the mirrored stored one, over the photos of `rows`.

    Padding is left out, as in the losses. Raises ModelError where a model gives no numbers.
    """
    sums: dict[str, _Sums] = {}
    bar = tqdm(rows, desc="mirrored", unit="row", disable=None if progress else True)
    for index in bar:
        row = cache[index]
        pixels = np.ascontiguousarray(row.image[None, :, ::-1].astype(np.uint8, copy=False))
        photo_HW = row.mask[:, ::-1] != PADDING
        for model in models:
            for part, now in model(pixels).items():
                stored = row.teacher_logits[None] if part == LOGITS else row.features[part]
                now_CHW = codecs.on_host(now[0]).astype(np.float64)
                if not np.isfinite(now_CHW).all():
                    raise ModelError(
                        f"{part}: the model gives values that are not finite on the mirrored pixels "
                        f"of row {index} ({row.sample_id})"
                    )
                total = sums.setdefault(part, _Sums())
                total.add(stored[..., ::-1].astype(np.float64), now_CHW, photo_HW)
    return {
        part: total.measured(part, made_by(cache.manifest, part)) for part, total in sums.items()
    }


@dataclass
class _Sums:
    """Over the rows of one part; positions count by the share of them that is photo."""

    rows: int = 0
    positions: float = 0.0
    squared: float = 0.0
    spread: float = 0.0
    cosine: float = 0.0
    equal: float = 0.0

    def add(self, stored_CHW: F64, now_CHW: F64, photo_HW: NDArray[np.bool_]) -> None:
        _, height, width = now_CHW.shape
        blocks = photo_HW.reshape(height, -1, width, photo_HW.shape[1] // width)
        weight_HW = blocks.mean(axis=(1, 3))
        mean = (now_CHW * weight_HW).sum() / max(weight_HW.sum() * len(now_CHW), 1)
        self.rows += 1
        self.positions += float(weight_HW.sum())
        self.squared += float(((stored_CHW - now_CHW) ** 2 * weight_HW).sum())
        self.spread += float(((now_CHW - mean) ** 2 * weight_HW).sum())
        self.cosine += float((_cosine(stored_CHW, now_CHW) * weight_HW).sum())
        self.equal += float((((stored_CHW > 0) == (now_CHW > 0)).all(axis=0) * weight_HW).sum())

    def measured(self, part: str, model: Mapping[str, str]) -> Mirrored:
        over = self.positions or 1.0
        return Mirrored(
            rows=self.rows,
            relative_mse=self.squared / self.spread if self.spread else None,
            cosine=None if part == LOGITS else self.cosine / over,
            equal_pixels=self.equal / over if part == LOGITS else None,
            made_by=model,
        )


def _cosine(a_CHW: F64, b_CHW: F64) -> F64:
    """(H, W), along the channels; where both are zero they are alike."""
    length_a, length_b = np.sqrt((a_CHW**2).sum(0)), np.sqrt((b_CHW**2).sum(0))
    product = length_a * length_b
    found: F64 = (a_CHW * b_CHW).sum(0) / np.where(product > 0, product, 1)
    return np.where((length_a == 0) & (length_b == 0), 1.0, found)
