"""Sheets of pictures: photos with what a mask or a network says of them, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from kdcache.imaging import IGNORE, PERSON

U8 = NDArray[np.uint8]

_OUTSIDE = 0.3  # brightness of what is not a person, so that any colour of clothes stands out
_IGNORED_TINT = np.array([240, 180, 20], np.float32)
_ONLY_OURS, _ONLY_THEIRS = (230, 60, 40), (60, 130, 250)
_CELL_PX = 240
_GAP_PX = 2
_LINE_PX = 18  # height of a line of text
_LETTER_PX = 6  # of the built-in font, about


def lit(image: U8, person: NDArray[np.bool_ | np.floating]) -> U8:
    """The (H, W, 3) photo, darkened where `person` (H, W), 0 to 1, says no."""
    brightness = _OUTSIDE + (1 - _OUTSIDE) * person.astype(np.float32)
    return (image * brightness[..., None]).astype(np.uint8)


def masked(image: U8, mask: U8) -> U8:
    """The photo with all but the person darkened, and what is ignored in yellow."""
    picture = lit(image, mask == PERSON).astype(np.float32)
    ignored = mask == IGNORE
    picture[ignored] = 0.5 * picture[ignored] + 0.5 * _IGNORED_TINT
    return picture.astype(np.uint8)


def compared(image: U8, ours: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> U8:
    """The dark photo, red where only `ours` (H, W) says person, blue where only `theirs` does."""
    picture = lit(image, np.zeros(ours.shape))
    picture[ours & ~theirs] = _ONLY_OURS
    picture[theirs & ~ours] = _ONLY_THEIRS
    return picture


def sheet(titles: Sequence[str], rows: Sequence[Sequence[U8]], captions: Sequence[str]) -> U8:
    """Rows of square pictures, (S, S, 3) uint8 of any S, under titles; each with its caption."""
    width = len(titles) * (_CELL_PX + _GAP_PX)
    strips = [_text([(n * width // len(titles), title) for n, title in enumerate(titles)], width)]
    for cells, caption in zip(rows, captions, strict=True):
        strips.append(_text([(0, caption)], width))
        strips.append(np.concatenate([_cell(cell) for cell in cells], axis=1))
    return np.concatenate(strips)


def save(path: Path, picture: U8, form: str) -> None:
    """Write a picture as 'JPEG' or 'PNG', whatever the file's name ends with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, format=form, quality=90)


def _cell(picture: U8) -> U8:
    # a grid of features keeps its squares, a photo is averaged
    small = len(picture) < _CELL_PX
    method = Image.Resampling.NEAREST if small else Image.Resampling.BOX
    cell = Image.fromarray(picture).resize((_CELL_PX, _CELL_PX), method)
    return np.pad(np.asarray(cell), ((0, 0), (0, _GAP_PX), (0, 0)), constant_values=255)


def _text(pieces: Sequence[tuple[int, str]], width: int) -> U8:
    strip = Image.new("RGB", (width, _LINE_PX), "white")
    room = width // len(pieces) // _LETTER_PX
    for x, words in pieces:
        # the built-in font has no other letters
        text = "".join(c if c.isascii() else f"\\u{ord(c):04x}" for c in words)
        # the end of a tensor's name or a path tells more than its beginning
        shown = text if len(text) <= room else "…" + text[-room + 1 :]
        ImageDraw.Draw(strip).text((x + 4, 3), shown, fill="black")
    return np.asarray(strip)
