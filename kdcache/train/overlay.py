"""Pictures that show what a student does: photo, mask, teacher and student side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from kdcache.cache.reader import Cache
from kdcache.drawing import lit, masked, save, sheet
from kdcache.train.loader import read_batches
from kdcache.train.student import Student

_COLUMNS = ("photo", "mask", "teacher", "student")


@torch.no_grad()
def save_overlay(
    path: Path, student: Student, cache: Cache, rows: list[int], device: str, count: int = 4
) -> None:
    """Write a JPEG of the first `count` rows: background darkened, ignored pixels in yellow."""
    student.eval()
    cells, captions = [], []
    for batch in read_batches(cache, rows[:count], 1, device, taps=[]):
        row = cache[cache.keys.index(batch.keys[0])]
        image, mask = row.image.astype(np.uint8), row.mask.astype(np.uint8)
        teacher = batch.logits[0, 0].cpu().numpy() > 0
        predicted = student(batch.image).logits[0, 0].float().cpu().numpy() > 0
        cells.append([image, masked(image, mask), lit(image, teacher), lit(image, predicted)])
        captions.append(row.sample_id)
    save(path, sheet(_COLUMNS, cells, captions), "JPEG")
