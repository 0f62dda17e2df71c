"""COCO instances JSON: reading it, checking it, and drawing its segmentations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from kdcache.errors import DatasetError, SampleError
from kdcache.imaging import IGNORE, PERSON, U8
from kdcache.places import Place

PERSON_CATEGORY = "person"


def rasterise(annotations: Sequence[Mapping[str, Any]], height: int, width: int) -> U8:
    """COCO polygons and run lengths (compressed or not) to a (height, width) mask.

    People win over crowd regions where both cover a pixel.
    """
    mask = np.zeros((height, width), np.uint8)
    for crowd in (True, False):
        for annotation in annotations:
            if is_crowd(annotation) == crowd:
                try:
                    covered = _covered(annotation.get("segmentation"), height, width)
                except _BadSegmentationError as error:
                    raise SampleError(
                        f"the segmentation of its COCO annotation {annotation.get('id', '')!r} cannot "
                        f"be used: {error}; mend or remove that annotation"
                    ) from error
                mask[covered] = IGNORE if crowd else PERSON
    return mask


# Some exporters write it as text.
_CROWD = {
    text: text in ("1", "1.0", "true") for text in ["0", "0.0", "false", "none", "1", "1.0", "true"]
}


def is_crowd(annotation: Mapping[str, Any]) -> bool:
    """Whether an annotation, as `read_coco` let it pass, covers a region of many."""
    return _CROWD[str(annotation.get("iscrowd", 0)).lower()]


class _BadSegmentationError(ValueError):
    """The message is for the person who wrote the file."""


def _covered(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    try:
        if segmentation is None or segmentation == []:
            raise _BadSegmentationError("it is empty")
        if isinstance(segmentation, list):
            _check_polygons(segmentation, height, width)
            encoded = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
        elif not isinstance(segmentation, dict) or not {"counts", "size"} <= segmentation.keys():
            raise _BadSegmentationError("it is neither polygons nor run lengths (counts and size)")
        elif isinstance(segmentation["counts"], list):
            if not all(type(count) is int and count >= 0 for count in segmentation["counts"]):
                raise _BadSegmentationError("its counts are not all whole numbers from 0 on")
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
            raise _BadSegmentationError(f"its run lengths do not cover {height}×{width} pixels")
        return np.asarray(coco_mask.decode(encoded), bool)
    except _BadSegmentationError:
        raise
    except Exception as error:  # pycocotools raises bare Exceptions
        raise _BadSegmentationError(f"pycocotools cannot decode it ({error})") from error


def _check_polygons(polygons: Sequence[Any], height: int, width: int) -> None:
    """pycocotools hangs on NaN, crashes on huge coordinates and drops an odd last number."""
    limit = 10 * (height + width)
    for number, polygon in enumerate(polygons):
        where = f"polygon {number}"
        if not isinstance(polygon, list) or not all(type(x) in (int, float) for x in polygon):
            raise _BadSegmentationError(f"{where} is not a flat list of numbers x, y, x, y, …")
        if len(polygon) < 6 or len(polygon) % 2:
            raise _BadSegmentationError(
                f"{where} has {len(polygon)} numbers, expected x, y of 3 points or more"
            )
        if not (np.abs(np.asarray(polygon, np.float64)) <= limit).all():
            raise _BadSegmentationError(
                f"{where} has coordinates that are not numbers within ±{limit} px"
            )


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


_Kinds = dict[str, tuple[type, ...]]
_ENTRY_FIELDS: dict[str, _Kinds] = {
    "images": {"id": (int, str), "file_name": (str,), "height": (int,), "width": (int,)},
    "annotations": {"image_id": (int, str), "category_id": (int, str)},
    "categories": {"id": (int, str), "name": (str,)},
}
_KINDS = {int: "a whole number", str: "text"}
_LARGEST_SIDE_PX = 100_000


class _BadEntryError(ValueError):
    """The message says what is wrong with an entry of a list."""


def read_coco(path: Place) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """The three lists of a COCO file, each entry checked for the fields that are used of it.

    Beside them the images that cannot be used, by name, with the reason. Raises DatasetError where
    it is no such file, or where an annotation or category is wrong: leaving one out would make a
    person background.
    """
    if not path.is_file():
        raise DatasetError(f"--coco {path}: no such file")
    try:
        document = json.loads(path.read_bytes())
        missing = [key for key in _ENTRY_FIELDS if not isinstance(document.get(key), list)]
    except (ValueError, AttributeError, RecursionError) as error:
        raise DatasetError(f"--coco {path}: not a JSON object: {error}") from error
    if missing:
        raise DatasetError(
            f"--coco {path}: no list {' or '.join(missing)} in it; expected COCO instances JSON"
        )
    kept: dict[str, list[dict[str, Any]]] = {}
    refused: dict[str, str] = {}
    for kind, fields in _ENTRY_FIELDS.items():
        kept[kind] = []
        for number, entry in enumerate(document[kind]):
            where = f"{kind}[{number}]"
            try:
                kept[kind].append(_checked(entry, fields))
            except _BadEntryError as error:
                if kind != "images":
                    raise DatasetError(f"--coco {path}: {where}: {error}") from error
                name = entry.get("file_name") if isinstance(entry, dict) else None
                refused[f"{where} of {path.name}" + (f" ({name!a})" if name else "")] = str(error)
    if refused and not kept["images"]:
        where, why = next(iter(refused.items()))
        raise DatasetError(f"--coco {path}: no entry of images can be used; {where}: {why}")
    return kept, refused


def _checked(entry: Any, fields: _Kinds) -> dict[str, Any]:
    """The entry, 640.0 made the whole number it is; raises _BadEntryError."""
    if not isinstance(entry, dict):
        raise _BadEntryError(f"expected an object, it is {entry!r}")
    for name, kinds in fields.items():
        value: Any = entry.get(name)
        if isinstance(value, float) and value.is_integer():
            entry[name] = value = int(value)
        if type(value) not in kinds or value == "":
            expected = " or ".join(_KINDS[kind] for kind in kinds)
            raise _BadEntryError(f"{name} is {value!r}, expected {expected}")
        if name in ("height", "width") and not 0 < value <= _LARGEST_SIDE_PX:
            raise _BadEntryError(f"{name} is {value}, expected 1 to {_LARGEST_SIDE_PX} px")
    if str(entry.get("iscrowd", 0)).lower() not in _CROWD:
        raise _BadEntryError(f"iscrowd is {entry['iscrowd']!r}, expected 0 or 1")
    if "file_name" in fields:
        _check_name(entry["file_name"])
    return entry


def _check_name(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:  # neither stored as a sample id nor printed
        raise _BadEntryError("its file name is not valid UTF-8; rename it") from error
    if "\0" in name:
        raise _BadEntryError("its file name holds a NUL, which no file can have")
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise _BadEntryError(f"its file name {name!r} leads out of the --images folder")
