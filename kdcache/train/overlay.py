"""Pictures that show what a student does: photo, mask, teacher and student side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from kdcache.cache.reader import Cache
from kdcache.imaging import IGNORE, PERSON
from kdcache.train.loader import read_batches
from kdcache.train.student import Student

U8 = NDArray[np.uint8]

_COLUMNS = ("photo", "mask", "teacher", "student")
_OUTSIDE = 0.3  # brightness of what is not a person, so that any colour of clothes stands out
_IGNORED_TINT = np.array([240, 180, 20], np.float32)
_TITLE_PX = 18
_CELL_PX = 240


@torch.no_grad()
def save_overlay(
    path: Path, student: Student, cache: Cache, rows: list[int], device: str, count: int = 4
) -> None:
    """Write a JPEG of the first `count` rows: background darkened, ignored pixels in yellow."""
    student.eval()
    strips = []
    for batch in read_batches(cache, rows[:count], 1, device, taps=[]):
        index = cache.keys.index(batch.keys[0])
        image, mask = cache[index].image, cache[index].mask
        teacher = batch.logits[0, 0].cpu().numpy() > 0
        predicted = student(batch.image).logits[0, 0].float().cpu().numpy() > 0
        nowhere, everywhere = np.zeros_like(predicted), np.ones_like(predicted)
        cells = [
            _cell(image, everywhere, nowhere),
            _cell(image, mask == PERSON, mask == IGNORE),
            _cell(image, teacher, nowhere),
            _cell(image, predicted, nowhere),
        ]
        strips.append(np.concatenate(cells, axis=1))
    sheet = Image.fromarray(np.concatenate([_titles(strips[0].shape[1]), *strips]))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=90)


def _cell(image: NDArray[np.generic], person: NDArray[np.bool_], ignored: NDArray[np.bool_]) -> U8:
    tinted = image.astype(np.float32)
    tinted[~person] *= _OUTSIDE
    tinted[ignored] = 0.5 * tinted[ignored] + 0.5 * _IGNORED_TINT
    cell = Image.fromarray(tinted.astype(np.uint8)).resize((_CELL_PX, _CELL_PX))
    return np.pad(np.asarray(cell), ((2, 2), (2, 2), (0, 0)), constant_values=255)


def _titles(width: int) -> U8:
    strip = Image.new("RGB", (width, _TITLE_PX), "white")
    for column, title in enumerate(_COLUMNS):
        ImageDraw.Draw(strip).text((column * width // len(_COLUMNS) + 6, 3), title, fill="black")
    return np.asarray(strip)
