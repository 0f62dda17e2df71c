"""Masks of photos by a trained student, at each photo's own size, on its own pixels."""

from __future__ import annotations

import glob
import io
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image
from torch import Tensor

from kdcache.deploy.trained import TrainedStudent, open_student
from kdcache.drawing import lit
from kdcache.durable import write_atomic
from kdcache.errors import DatasetError, SampleError
from kdcache.imaging import (
    F32,
    IMAGE_SUFFIXES,
    U8,
    Placement,
    at_source,
    decode_image,
    exif_orientation,
    place,
    resize_image,
    turned_back,
)
from kdcache.listing import listed, read_file
from kdcache.pixels import on_device
from kdcache.progress import Progress
from kdcache.stop import StopRequest
from kdcache.train.loader import chunked

# A quality at which JPEG's own errors do not show beside a mask's edge.
_OVERLAY_QUALITY = 90


@dataclass(frozen=True, kw_only=True)
class PredictReport:
    """What was predicted, and what could not be."""

    student: Path
    out: Path
    images: int
    seconds: float
    images_per_s: float
    device: str
    skipped: Mapping[str, str]  # name to reason
    left_out: Mapping[str, int]  # reason to number


class _Photo(NamedTuple):
    name: str
    path: Path
    to: Path  # without suffix


class _Decoded(NamedTuple):
    image: U8  # (H, W, 3), upright
    orientation: int
    placement: Placement
    pixels: U8  # (S, S, 3)


def predict(
    student: Path | TrainedStudent,
    images: Sequence[str],
    out: Path,
    *,
    overlay: bool = False,
    probabilities: bool = False,
    device: str = "auto",
    batch_size: int | None = None,
    workers: int = 2,
    progress: bool = False,
) -> PredictReport:
    """Write `<stem>.png` for every photo: 0 background, 255 person, at the file's own size.

    `images` are files, folders (below which the result keeps their tree) or glob patterns. The
    mask lies on the file's pixels as they are stored, and carries the photo's EXIF orientation,
    so that both are shown alike. `overlay` adds `<stem>_overlay.jpg`, `probabilities`
    `<stem>_probability.png`: 16 bits, 65535 is 1. Photos that cannot be used are skipped with their
    reason. Raises DatasetError when there is none at all.
    """
    started = time.monotonic()
    found = _photos(images, out, [".png"] + ["_overlay.jpg"] * overlay)
    one = student if isinstance(student, TrainedStudent) else open_student(student, device)
    size = batch_size or (8 if one.device.startswith("cuda") else 1)
    skipped, written = dict(found.refused), 0
    with (
        ThreadPoolExecutor(workers, thread_name_prefix="predict") as pool,
        StopRequest().listening() as stop,
        Progress("predict", len(found.photos), "images", shown=progress) as shown,
    ):
        saving: deque[Future[None]] = deque()
        for done, group in _decoded_groups(found.photos, one, size, pool):
            photos = [(photo, decoded) for photo, decoded in group if isinstance(decoded, _Decoded)]
            skipped |= {p.name: str(why) for p, why in group if isinstance(why, SampleError)}
            if photos:
                logits = _logits(one, [decoded.pixels for _, decoded in photos], size)
                for (photo, decoded), map_SS in zip(photos, logits, strict=True):
                    saving.append(
                        pool.submit(_save, photo, decoded, map_SS, overlay, probabilities)
                    )
            written += len(photos)
            while len(saving) > 2 * max(size, workers):
                saving.popleft().result()
            shown.reach(done)
            if stop.asked:
                break
        for future in saving:
            future.result()
    if stop.asked:
        raise KeyboardInterrupt
    seconds = time.monotonic() - started
    return PredictReport(
        student=one.path,
        out=out,
        images=written,
        seconds=seconds,
        images_per_s=written / seconds,
        device=one.device,
        skipped=skipped,
        left_out=found.left_out,
    )


def _decoded_groups(
    photos: Sequence[_Photo], student: TrainedStudent, size: int, pool: ThreadPoolExecutor
) -> Iterator[tuple[int, list[tuple[_Photo, _Decoded | SampleError]]]]:
    """Photos by batches, decoded one batch ahead of the student; with how many there were so far."""
    waiting: deque[list[tuple[_Photo, Future[_Decoded | SampleError]]]] = deque()
    done = 0
    for group in [*chunked(photos, size), None]:
        if group is not None:
            waiting.append([(photo, pool.submit(_decode, photo, student)) for photo in group])
        if len(waiting) > 1 or (group is None and waiting):
            ready = [(photo, future.result()) for photo, future in waiting.popleft()]
            done += len(ready)
            yield done, ready


def _decode(photo: _Photo, student: TrainedStudent) -> _Decoded | SampleError:
    try:
        data = read_file(photo.path, "the image")
        image = decode_image(data)
    except SampleError as error:
        return error
    height, width = image.shape[:2]
    placement = place(height, width, student.size_px, student.metadata["resize"])
    return _Decoded(image, exif_orientation(data), placement, resize_image(image, placement))


def _logits(student: TrainedStudent, pixels: Sequence[U8], size: int) -> F32:
    """(N, S, S); batches are filled up to one shape, for which a GPU keeps its kernels and memory."""
    filled = [*pixels, *[pixels[-1]] * (size - len(pixels))]
    maps: Tensor = student.logits(on_device(np.stack(filled), student.device))
    logits: F32 = maps[: len(pixels), 0].cpu().numpy()
    return logits


def _save(
    photo: _Photo, decoded: _Decoded, logits_SS: F32, overlay: bool, probabilities: bool
) -> None:
    logits = at_source(logits_SS, decoded.placement)
    person = logits > 0
    photo.to.parent.mkdir(parents=True, exist_ok=True)
    mask = np.where(person, np.uint8(255), np.uint8(0))
    _write_png(_named(photo.to, ".png"), mask, decoded.orientation)
    if probabilities:
        # half of tanh: a logistic function that cannot overflow
        levels = np.rint((0.5 + 0.5 * np.tanh(0.5 * logits)) * 65535).astype(np.uint16)
        _write_png(_named(photo.to, "_probability.png"), levels, decoded.orientation)
    if overlay:
        buffer = io.BytesIO()
        picture = Image.fromarray(lit(decoded.image, person))
        picture.save(buffer, "JPEG", quality=_OVERLAY_QUALITY)
        write_atomic(_named(photo.to, "_overlay.jpg"), buffer.getvalue())


def _write_png(path: Path, upright_HW: np.ndarray, orientation: int) -> None:
    """As the photo's pixels are stored, with its orientation for those who show it."""
    buffer, exif = io.BytesIO(), Image.Exif()
    if orientation > 1:
        exif[ExifTags.Base.Orientation] = orientation
    picture = Image.fromarray(turned_back(upright_HW, orientation))
    picture.save(buffer, "PNG", exif=exif if orientation > 1 else None)
    write_atomic(path, buffer.getvalue())


def _named(stem: Path, ending: str) -> Path:
    return stem.with_name(stem.name + ending)


class _Found(NamedTuple):
    photos: list[_Photo]
    refused: dict[str, str]
    left_out: dict[str, int]


def _photos(images: Sequence[str], out: Path, endings: Sequence[str]) -> _Found:
    """Every photo that was named, with where its mask goes; two of one place are refused."""
    found: list[_Photo] = []
    refused: dict[str, str] = {}
    left_out: Counter[str] = Counter()
    for given in images:
        path = Path(given)
        if path.is_dir():
            listing = listed(path, "IMAGES", but=out if out.is_dir() else None)
            refused |= listing.refused
            left_out += listing.left_out
            for name in listing.files:
                shown = name if len(images) == 1 else str(path / name)
                found.append(_Photo(shown, path / name, (out / name).with_suffix("")))
        else:
            found += [
                _Photo(str(p), p, out / p.stem)
                for p in ([path] if path.exists() else _matches(given))
            ]
    places = Counter(photo.to for photo in found)
    for photo in found:
        if places[photo.to] > 1:
            others = [p.name for p in found if p.to == photo.to and p is not photo]
            refused[photo.name] = (
                f"its mask and that of {', '.join(others)} would both be {photo.to}.png: give them "
                "apart, with another --out"
            )
        elif any(_is_same(_named(photo.to, ending), photo.path) for ending in endings):
            refused[photo.name] = "its mask would overwrite it: choose another --out"
    photos = [photo for photo in found if photo.name not in refused]
    if not photos:
        why = "".join(f"; {name}: {reason}" for name, reason in list(refused.items())[:3])
        raise DatasetError(f"no photo to predict in {', '.join(images)}{why}")
    return _Found(photos, refused, {why: n for why, n in left_out.items() if n})


def _matches(pattern: str) -> list[Path]:
    """Files of a glob pattern; raises DatasetError when it is none, or matches nothing."""
    paths = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    files = [path for path in paths if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        kinds = " ".join(sorted(IMAGE_SUFFIXES))
        raise DatasetError(f"{pattern}: no such photo or folder, and no pattern of any ({kinds})")
    return files


def _is_same(path: Path, other: Path) -> bool:
    return path.exists() and path.samefile(other)
