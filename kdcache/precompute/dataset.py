"""Which images and masks a dataset holds: a folder with or without masks, or COCO instances JSON."""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from kdcache.errors import DatasetError, SampleError
from kdcache.imaging import IGNORE, U8, decode_mask, exif_orientation
from kdcache.listing import by_stem, listed, read_file
from kdcache.places import Place, Url, is_file
from kdcache.precompute.coco import PERSON_CATEGORY, is_crowd, rasterise, read_coco

_LOOKED_AT = 20


class Source(NamedTuple):
    """What a sample is made of, as read: `label` is its mask file, or its COCO annotations as JSON."""

    image: bytes
    label: bytes


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image and where its mask comes from: a file, COCO annotations, or nowhere."""

    sample_id: str
    image_path: Place
    mask_path: Place | None = None
    annotations: tuple[Mapping[str, Any], ...] = ()
    # (height, width) that COCO states for the image; polygons live in that frame
    annotated_size_px: tuple[int, int] | None = None
    labelled: bool = True

    def read(self) -> Source:
        """Read the source files, once; raises SampleError when one cannot be read."""
        image = read_file(self.image_path, "the image")
        if self.mask_path is not None:
            return Source(image, read_file(self.mask_path, "the mask"))
        if not self.labelled:
            return Source(image, b"")
        # what the mask is drawn from, and no more: other fields may change
        drawn = [[a.get("segmentation"), is_crowd(a)] for a in self.annotations]
        return Source(image, json.dumps(drawn).encode())

    def mask(self, label: bytes, height: int, width: int, orientation: int = 1) -> U8:
        """The (height, width) mask of the decoded image: 0, 1 (person), 255 (crowd, or no label).

        `label` is what `read` gave, `orientation` the EXIF one that the image was decoded with.
        Raises SampleError when the mask is for an image of another size: scaling it in silence
        would hide a wrong pairing or an EXIF rotation that the mask does not know of.
        """
        if not self.labelled:
            return np.full((height, width), IGNORE, np.uint8)
        mask = None if self.mask_path is None else decode_mask(label)
        size = self.annotated_size_px if mask is None else mask.shape
        if size != (height, width):
            turned = size == (width, height) and orientation > 4
            found = "not stated" if size is None else f"{size[0]}×{size[1]}"
            raise SampleError(
                f"mask is {found}, the image {height}×{width}"
                + (" once its EXIF rotation is applied; rotate the mask" if turned else "")
                + " (height×width); they must be equal"
            )
        return rasterise(self.annotations, height, width) if mask is None else mask

    def may_be_turned(self, label: bytes, height: int, width: int, orientation: int) -> str:
        """Why the mask may lie otherwise than the image, which its size does not tell; or nothing."""
        if not self.labelled or orientation == 1 or (orientation > 4 and height != width):
            return ""
        if self.mask_path is not None and exif_orientation(label) == orientation:
            return ""  # it says itself how it lies
        return (
            f"EXIF turns or mirrors the photo (orientation {orientation}), and the size of the mask "
            "does not tell whether it was drawn on the turned photo"
        )


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The samples to extract, in order, and what became of everything else."""

    images: Place  # the folder they are below
    samples: Sequence[Sample]
    # name to reason, of files that were meant as samples and can be none: reported as skipped
    refused: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)  # reason to number


def folder_dataset(images: Place, masks: Place) -> Dataset:
    """Pair every image with the mask of exactly its stem and subfolder.

    An image without a mask, or with two, and two images of one stem are refused by name; masks
    without an image are counted. Raises DatasetError when nothing pairs, before any model is
    loaded.
    """
    found = listed(images, "--images", but=masks)
    found_masks = listed(masks, "--masks", but=images)
    stems, masks_by_stem = by_stem(found.files), by_stem(found_masks.files)
    samples: list[Sample] = []
    refused = found.refused | {f"mask {name}": why for name, why in found_masks.refused.items()}
    for stem, names in stems.items():
        its_masks = masks_by_stem.get(stem, [])
        if len(names) == len(its_masks) == 1:
            samples.append(
                Sample(
                    sample_id=names[0],
                    image_path=images / names[0],
                    mask_path=masks / its_masks[0],
                )
            )
            continue
        if not its_masks:
            why = f"no mask of the same name in {masks}"
        else:
            why = (
                f"{', '.join(names)} and {', '.join(f'mask {m}' for m in its_masks)} share one stem"
            )
            why += ": which belong together? Rename or remove the others"
        refused |= dict.fromkeys(names, why)
    without_image = sum(len(m) for stem, m in masks_by_stem.items() if stem not in stems)
    if not samples:
        raise DatasetError(
            f"no image in {images} has a mask of the same name in {masks}: {_some(stems)} "
            f"and {_some(masks_by_stem)}; an image a/b.jpg needs the mask a/b.png"
        )
    left_out = Counter(found.left_out)
    left_out[f"masks without an image in {images}"] = without_image
    return Dataset(images=images, samples=samples, refused=refused, left_out=dict(left_out))


def unlabelled_dataset(images: Place) -> Dataset:
    """Every image of a folder and its subfolders, without masks; DatasetError when there is none."""
    found = listed(images, "--images")
    samples = [
        Sample(sample_id=name, image_path=images / name, labelled=False) for name in found.files
    ]
    return Dataset(
        images=images, samples=samples, refused=found.refused, left_out=dict(found.left_out)
    )


def coco_dataset(
    images: Place, annotations: Place, all_images: bool = False, category: str = PERSON_CATEGORY
) -> Dataset:
    """The images of a COCO instances file, with their annotations of one category.

    Without `all_images` only images with an instance that is not a crowd are taken; the rest are
    counted. Images that are listed twice are refused by name. Raises DatasetError when the file is
    not COCO instances JSON or selects nothing.
    """
    if not images.is_dir():
        raise DatasetError(f"--images {images}: no such folder")
    document, refused = read_coco(annotations)
    wanted = {str(c["id"]) for c in document["categories"] if c["name"] == category}
    if not wanted:
        names = ", ".join(sorted(c["name"] for c in document["categories"])[:10]) or "none"
        raise DatasetError(
            f"{annotations} has no category {category!r}; it has {names} (--set category=NAME)"
        )
    by_image: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for annotation in document["annotations"]:
        if str(annotation["category_id"]) in wanted:
            by_image[str(annotation["image_id"])].append(annotation)
    ids = Counter(str(image["id"]) for image in document["images"])
    named = Counter(posixpath.normpath(image["file_name"]) for image in document["images"])
    left_out = Counter({f"no {category} in it": 0})
    left_out[f"{category} annotations of images that {annotations.name} does not list"] = sum(
        len(entries) for image_id, entries in by_image.items() if image_id not in ids
    )
    samples: list[Sample] = []
    for image in sorted(document["images"], key=lambda image: image["file_name"]):
        name, instances = image["file_name"], by_image[str(image["id"])]
        if not all_images and all(is_crowd(instance) for instance in instances):
            left_out[f"no {category} in it"] += 1
        elif named[posixpath.normpath(name)] > 1 or ids[str(image["id"])] > 1:
            what = "its name" if named[posixpath.normpath(name)] > 1 else f"its id {image['id']!r}"
            refused[name] = f"{annotations.name} lists {what} more than once: whose masks are they?"
        else:
            samples.append(
                Sample(
                    sample_id=name,
                    image_path=images / name,
                    annotations=tuple(instances),
                    annotated_size_px=(image["height"], image["width"]),
                )
            )
    if not samples:
        why = "".join(f"; {name}: {reason}" for name, reason in list(refused.items())[:3])
        raise DatasetError(f"{annotations} lists no image with a {category} that can be used{why}")
    # at a URL each look takes a while; the rest is told photo by photo
    looked_at = samples[:_LOOKED_AT] if isinstance(images, Url) else samples
    if not any(is_file(sample.image_path) for sample in looked_at):
        raise DatasetError(
            f"none of the {len(looked_at)} images that {annotations} lists is in {images} "
            f"(first: {samples[0].sample_id}); point --images at the folder of its files"
        )
    return Dataset(images=images, samples=samples, refused=refused, left_out=dict(left_out))


def split_of(sample_id: str, val_fraction: float, seed: int) -> str:
    """`val` for about `val_fraction` of all ids, else `train`.

    Depends on the id alone, so an image never changes sides when others come or go.
    """
    digest = hashlib.sha256(f"{seed}:{sample_id}".encode()).digest()
    return "val" if int.from_bytes(digest[:8], "big") < val_fraction * 2**64 else "train"


def _some(names: Mapping[str, Any]) -> str:
    shown = ", ".join(list(names)[:5]) + (", …" if len(names) > 5 else "")
    return f"{len(names)} stems ({shown})"
