"""Which images and masks a dataset holds: a folder with or without masks, or COCO instances JSON."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from kdcache.errors import DatasetError, SampleError
from kdcache.imaging import IGNORE, IMAGE_SUFFIXES, PERSON, U8, decode_mask

CATEGORY = "person"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image and where its mask comes from: a file, COCO annotations, or nowhere."""

    sample_id: str
    image_path: Path
    mask_path: Path | None = None
    annotations: tuple[Mapping[str, Any], ...] = ()
    # (height, width) that COCO states for the image; polygons live in that frame
    annotated_size_px: tuple[int, int] | None = None
    labelled: bool = True

    def mask(self, height: int, width: int) -> U8:
        """The (height, width) mask of the decoded image: 0, 1 (person), 255 (crowd, or no label).

        Raises SampleError when the mask is for an image of another size: scaling it in silence
        would hide a wrong pairing or an EXIF rotation that the mask does not know of.
        """
        if not self.labelled:
            return np.full((height, width), IGNORE, np.uint8)
        mask = None if self.mask_path is None else decode_mask(self.mask_path.read_bytes())
        size = self.annotated_size_px if mask is None else mask.shape
        if size != (height, width):
            turned = size == (width, height)
            found = "not stated" if size is None else f"{size[0]}×{size[1]}"
            raise SampleError(
                f"mask is {found}, the image {height}×{width}"
                + (" once its EXIF rotation is applied; rotate the mask" if turned else "")
                + " (height×width); they must be equal"
            )
        return rasterise(self.annotations, height, width) if mask is None else mask


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The samples to extract, in order, and what was left out on purpose."""

    samples: Sequence[Sample]
    left_out: Mapping[str, int] = field(default_factory=dict)  # reason to number of images


def folder_dataset(images: Path, masks: Path) -> Dataset:
    """Pair every image with the mask of exactly its stem and subfolder.

    Raises DatasetError naming the images without a mask, the masks without an image, or a stem
    that two files share, before any model is loaded.
    """
    image_files, mask_files = _by_stem(images, "--images"), _by_stem(masks, "--masks")
    unpaired_images = sorted(image_files.keys() - mask_files.keys())
    unpaired_masks = sorted(mask_files.keys() - image_files.keys())
    if unpaired_images or unpaired_masks:
        raise DatasetError(
            f"{_some(unpaired_images)} in {images} have no mask of the same name in {masks}; "
            f"{_some(unpaired_masks)} in {masks} have no image; add, rename or remove them"
        )
    samples = [
        Sample(
            sample_id=path.relative_to(images).as_posix(),
            image_path=path,
            mask_path=mask_files[stem],
        )
        for stem, path in sorted(image_files.items())
    ]
    return Dataset(samples=samples)


def unlabelled_dataset(images: Path) -> Dataset:
    """Every image of a folder and its subfolders, without masks.

    Raises DatasetError when there is none, or two share a stem.
    """
    return Dataset(
        samples=[
            Sample(sample_id=path.relative_to(images).as_posix(), image_path=path, labelled=False)
            for path in _by_stem(images, "--images").values()
        ]
    )


def coco_dataset(images: Path, annotations: Path, all_images: bool = False) -> Dataset:
    """The images of a COCO instances file, with their person annotations.

    Without `all_images` only images with a person that is not a crowd are taken; the rest are
    counted. Raises DatasetError when the file is not COCO instances JSON or selects nothing.
    """
    if not images.is_dir():
        raise DatasetError(f"--images {images}: no such folder")
    document = _read_coco(annotations)
    categories = [c["id"] for c in document["categories"] if c["name"] == CATEGORY]
    if not categories:
        names = ", ".join(sorted(c["name"] for c in document["categories"])[:10])
        raise DatasetError(f"{annotations} has no category {CATEGORY!r}; it has {names}")
    by_image: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for annotation in document["annotations"]:
        if annotation["category_id"] in categories:
            by_image[str(annotation["image_id"])].append(annotation)
    samples, without_person = [], 0
    for image in sorted(document["images"], key=lambda image: image["file_name"]):
        people = by_image[str(image["id"])]
        if not all_images and all(_is_crowd(person) for person in people):
            without_person += 1
            continue
        samples.append(
            Sample(
                sample_id=image["file_name"],
                image_path=images / image["file_name"],
                annotations=tuple(people),
                annotated_size_px=(image["height"], image["width"]),
            )
        )
    ids = Counter(sample.sample_id for sample in samples)
    if repeated := [name for name, count in ids.items() if count > 1]:
        raise DatasetError(f"{annotations} lists {_some(repeated)} more than once")
    if not samples:
        raise DatasetError(f"{annotations} lists no image with a {CATEGORY}")
    if not any(sample.image_path.is_file() for sample in samples):
        raise DatasetError(
            f"none of the {len(samples)} images that {annotations} lists is in {images} "
            f"(first: {samples[0].sample_id}); point --images at the folder of its files"
        )
    return Dataset(samples=samples, left_out={f"no {CATEGORY} in it": without_person})


def rasterise(annotations: Sequence[Mapping[str, Any]], height: int, width: int) -> U8:
    """COCO polygons and run lengths (compressed or not) to a (height, width) mask.

    People win over crowd regions where both cover a pixel.
    """
    mask = np.zeros((height, width), np.uint8)
    for crowd in (True, False):
        for annotation in annotations:
            if _is_crowd(annotation) == crowd:
                covered = _covered(annotation.get("segmentation"), height, width)
                mask[covered] = IGNORE if crowd else PERSON
    return mask


def split_of(sample_id: str, val_fraction: float, seed: int) -> str:
    """`val` for about `val_fraction` of all ids, else `train`.

    Depends on the id alone, so an image never changes sides when others come or go.
    """
    digest = hashlib.sha256(f"{seed}:{sample_id}".encode()).digest()
    return "val" if int.from_bytes(digest[:8], "big") < val_fraction * 2**64 else "train"


def _is_crowd(annotation: Mapping[str, Any]) -> bool:
    return str(annotation.get("iscrowd", 0)) not in ("0", "0.0", "False", "None")


def _covered(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    try:
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


def _by_stem(folder: Path, option: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise DatasetError(f"{option} {folder}: no such folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in IMAGE_SUFFIXES or not path.is_file():
            continue
        stem = path.relative_to(folder).with_suffix("").as_posix()
        _refuse_unencodable(stem, option)
        if stem in found:
            raise DatasetError(
                f"{found[stem]} and {path} differ only in their suffix; which one is meant? "
                "Move one of them away"
            )
        found[stem] = path
    if not found:
        kinds = " ".join(sorted(IMAGE_SUFFIXES))
        raise DatasetError(f"{option} {folder}: no image in it or below it (looked for {kinds})")
    return found


_ENTRY_FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "images": {"id": (int, str), "file_name": str, "height": int, "width": int},
    "annotations": {"image_id": (int, str), "category_id": (int, str)},
    "categories": {"id": (int, str), "name": str},
}
_LARGEST_SIDE_PX = 100_000


def _read_coco(path: Path) -> dict[str, list[dict[str, Any]]]:
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
    _refuse_unencodable(file_name, where)
    if file_name.startswith("/") or ".." in Path(file_name).parts:
        raise DatasetError(f"{where}: file_name {file_name!r} leads out of the --images folder")


def _refuse_unencodable(name: str, where: str) -> None:
    """A name with bytes that are not UTF-8 can neither be stored as a sample id nor printed."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DatasetError(
            f"{where}: the file name {name!a} is not valid UTF-8; rename it"
        ) from error


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return f"{len(names)} images ({shown})" if names else "0 images"
