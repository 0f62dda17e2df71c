"""Pictures that show what a student does: photo, mask, teacher, student and where the two differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from kdcache.cache.reader import Cache
from kdcache.drawing import U8, compared, lit, masked, sheet
from kdcache.imaging import PADDING
from kdcache.train.loader import read_batches
from kdcache.train.student import StudentOutput

_TITLES = (
    "photo",
    "mask (yellow: not labelled)",
    "teacher",
    "student",
    "red: student only, blue: teacher only",
)
_WITHOUT_TEACHER = (*_TITLES[:2], "student")
_ROWS = 4


def shown_rows(rows: Sequence[int]) -> list[int]:
    """The few rows that every picture of a run shows, evenly spread."""
    chosen = np.unique(np.linspace(0, len(rows) - 1, _ROWS).astype(int))
    return [rows[n] for n in chosen]


@torch.no_grad()
def overlay(
    student: Callable[[Tensor], StudentOutput], cache: Cache, rows: Sequence[int], device: str
) -> U8:
    """A sheet of the given rows: background darkened, ignored pixels in yellow.

    `student` takes normalised pixels, in eval mode.
    """
    cells, captions = [], []
    batches = read_batches(cache, [[row] for row in rows], device, taps=[])
    for index, batch in zip(rows, batches, strict=True):
        row = cache[index]
        image, mask = row.image.astype(np.uint8), row.mask.astype(np.uint8)
        predicted = student(batch.image).logits[0, 0].float().cpu().numpy() > 0
        views = [image, masked(image, mask), lit(image, predicted)]
        if batch.logits is not None:
            teacher, photo = batch.logits[0, 0].cpu().numpy() > 0, mask != PADDING
            views.insert(2, lit(image, teacher))
            views.append(compared(image, predicted & photo, teacher & photo))
        cells.append(views)
        captions.append(f"{row.split}: {row.sample_id}")
    return sheet(_TITLES if cache.has_logits else _WITHOUT_TEACHER, cells, captions)
