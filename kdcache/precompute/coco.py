"""COCO instances JSON: reading it, checking it, and drawing its segmentations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from kdcache.errors import DatasetError, SampleError
from kdcache.imaging import IGNORE, PERSON, U8

PERSON_CATEGORY = "person"


def rasterise(annotations: Sequence[Mapping[str, Any]], height: int, width: int) -> U8:
    """COCO polygons and run lengths (compressed or not) to a (height, width) mask.

    People win over crowd regions where both cover a pixel.
    """
    mask = np.zeros((height, width), np.uint8)
    for crowd in (True, False):
        for annotation in annotations:
            if is_crowd(annotation) == crowd:
                covered = _covered(annotation.get("segmentation"), height, width)
                mask[covered] = IGNORE if crowd else PERSON
    return mask


def is_crowd(annotation: Mapping[str, Any]) -> bool:
    """Whether an annotation covers a region of many; some exporters write it as text."""
    return str(annotation.get("iscrowd", 0)) not in ("0", "0.0", "False", "None")


def _covered(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    try:
        if segmentation is None:
            raise ValueError("there is none")
        if isinstance(segmentation, list):
            _check_polygons(segmentation, height, width)
            encoded = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
        elif isinstance(segmentation["counts"], list):
            encoded = coco_mask.frPyObjects(segmentation, height, width)
        else:
            encoded = segmentation
        # pycocotools trusts these: it would read past the end, or leave the rest 0 in silence
        runs = _run_lengths(encoded["counts"])
        if (
            list(encoded["size"]) != [height, width]
            or min(runs, default=-1) < 0
            or sum(runs) != height * width
        ):
            raise ValueError(f"its run lengths do not cover {height}×{width} pixels")
        return np.asarray(coco_mask.decode(encoded), bool)
    except Exception as error:  # pycocotools raises bare Exceptions
        raise SampleError(f"its COCO segmentation cannot be read: {error}") from error


def _check_polygons(polygons: Sequence[Any], height: int, width: int) -> None:
    """pycocotools hangs on NaN, crashes on huge coordinates and drops an odd last number."""
    if not polygons:
        raise ValueError("it is empty")
    limit = 10 * (height + width)
    for polygon in polygons:
        points = np.asarray(polygon, np.float64)
        if points.ndim != 1 or points.size < 6 or points.size % 2:
            raise ValueError(
                f"a polygon has {points.size} numbers, expected x, y of 3 points or more"
            )
        if not (np.abs(points) <= limit).all():
            raise ValueError(f"a polygon's coordinates are not within ±{limit} px")


def _run_lengths(counts: str | bytes) -> list[int]:
    """The run lengths of a compressed RLE, as the COCO API's maskApi.c encodes them.

    5 bits a character from "0" on, low bits first, 0x20 says that more follow; from the fourth
    run on each is a difference to the last but one.
    """
    data = counts.encode() if isinstance(counts, str) else counts
    runs: list[int] = []
    position = 0
    while position < len(data):
        value, shift, more = 0, 0, True
        while more:
            bits = data[position] - 48
            value |= (bits & 0x1F) << shift
            more = bool(bits & 0x20)
            position, shift = position + 1, shift + 5
            if not more and bits & 0x10:
                value |= -1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    return runs


_ENTRY_FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "images": {"id": (int, str), "file_name": str, "height": int, "width": int},
    "annotations": {"image_id": (int, str), "category_id": (int, str)},
    "categories": {"id": (int, str), "name": str},
}
_LARGEST_SIDE_PX = 100_000


def read_coco(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The three lists of a COCO file, each entry checked for the fields that are used of it."""
    if not path.is_file():
        raise DatasetError(f"--coco {path}: no such file")
    try:
        document = json.loads(path.read_bytes())
        missing = [key for key in _ENTRY_FIELDS if not isinstance(document.get(key), list)]
    except (ValueError, AttributeError) as error:
        raise DatasetError(f"--coco {path}: not a JSON object: {error}") from error
    if missing:
        raise DatasetError(
            f"--coco {path}: no list {' or '.join(missing)} in it; expected COCO instances JSON"
        )
    for kind, fields in _ENTRY_FIELDS.items():
        for number, entry in enumerate(document[kind]):
            _check_entry(f"--coco {path}: {kind}[{number}]", entry, fields)
    return dict(document)


def _check_entry(where: str, entry: Any, fields: Mapping[str, type | tuple[type, ...]]) -> None:
    if not isinstance(entry, dict):
        raise DatasetError(f"{where}: expected an object, it is {entry!r}")
    for name, kind in fields.items():
        if not isinstance(entry.get(name), kind) or entry[name] == "":
            raise DatasetError(f"{where}: {name} is {entry.get(name)!r}; expected COCO's {name}")
        if name in ("height", "width") and not 0 < entry[name] <= _LARGEST_SIDE_PX:
            raise DatasetError(
                f"{where}: {name} is {entry[name]}; expected 1 to {_LARGEST_SIDE_PX} px"
            )
    file_name = entry.get("file_name", "")
    try:
        file_name.encode()
    except UnicodeEncodeError as error:  # neither stored as a sample id nor printed
        raise DatasetError(
            f"{where}: the file name {file_name!a} is not valid UTF-8; rename it"
        ) from error
    if file_name.startswith("/") or ".." in Path(file_name).parts:
        raise DatasetError(f"{where}: file_name {file_name!r} leads out of the --images folder")
