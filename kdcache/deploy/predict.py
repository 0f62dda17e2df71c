"""Masks of photos by a trained student, at each photo's own size, on its own pixels."""

from __future__ import annotations

import errno
import glob
import io
import time
from collections import Counter, defaultdict, deque
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
    U8,
    Placement,
    at_source,
    decode_image,
    exif_orientation,
    place,
    resize_image,
    turned_back,
)
from kdcache.listing import listed, printable, read_file, unfit
from kdcache.pixels import on_device
from kdcache.progress import Progress
from kdcache.stop import StopRequest
from kdcache.train.loader import chunked

_MASK, _OVERLAY, _PROBABILITY = ".png", "_overlay.jpg", "_probability.png"

# What no other photo would fare better with.
_FATAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)

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
    endings = [_MASK] + [_OVERLAY] * overlay + [_PROBABILITY] * probabilities
    found = _photos(images, out, endings)
    one = student if isinstance(student, TrainedStudent) else open_student(student, device)
    size = batch_size or (8 if one.device.startswith("cuda") else 1)
    skipped, written = dict(found.refused), 0
    with (
        ThreadPoolExecutor(workers, thread_name_prefix="predict") as pool,
        StopRequest().listening() as stop,
        Progress("predict", len(found.photos), "images", shown=progress) as shown,
    ):
        saving: deque[tuple[str, Future[str]]] = deque()

        def saved() -> None:
            """The oldest that is being saved, or why it cannot be."""
            nonlocal written
            name, future = saving.popleft()
            if why := future.result():
                skipped[name] = why
            else:
                written += 1

        for done, group in _decoded_groups(found.photos, one, size, pool):
            photos = [(photo, decoded) for photo, decoded in group if isinstance(decoded, _Decoded)]
            skipped |= {p.name: str(why) for p, why in group if isinstance(why, SampleError)}
            if photos:
                logits = _logits(one, [decoded.pixels for _, decoded in photos], size)
                for (photo, decoded), map_SS in zip(photos, logits, strict=True):
                    future = pool.submit(_save, photo, decoded, map_SS, overlay, probabilities)
                    saving.append((photo.name, future))
            while len(saving) > 2 * max(size, workers):
                saved()
            shown.reach(done)
            if stop.asked:
                break
        while saving:
            saved()
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
) -> str:
    """Write a photo's files; returns why that cannot be done, where the fault is its own."""
    try:
        _write_files(photo, decoded, logits_SS, overlay, probabilities)
    except (
        OSError
    ) as error:  # Pillow raises it too, without a number, for what a format cannot hold
        if error.errno in _FATAL:
            raise
        return f"its mask cannot be written: {error}"
    return ""


def _write_files(
    photo: _Photo, decoded: _Decoded, logits_SS: F32, overlay: bool, probabilities: bool
) -> None:
    logits = at_source(logits_SS, decoded.placement)
    person = logits > 0
    photo.to.parent.mkdir(parents=True, exist_ok=True)
    mask = np.where(person, np.uint8(255), np.uint8(0))
    _write_png(_named(photo.to, _MASK), mask, decoded.orientation)
    if probabilities:
        # half of tanh: a logistic function that cannot overflow
        levels = np.rint((0.5 + 0.5 * np.tanh(0.5 * logits)) * 65535).astype(np.uint16)
        _write_png(_named(photo.to, _PROBABILITY), levels, decoded.orientation)
    if overlay:
        buffer = io.BytesIO()
        picture = Image.fromarray(lit(decoded.image, person))
        picture.save(buffer, "JPEG", quality=_OVERLAY_QUALITY)
        write_atomic(_named(photo.to, _OVERLAY), buffer.getvalue())


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
    """Every photo that was named, once, with where its files go.

    Refused by name: photos two of which would write one file, and those whose files would overwrite
    a photo.
    """
    found: dict[tuple[Path, Path], _Photo] = {}
    refused: dict[str, str] = {}
    left_out: Counter[str] = Counter()
    for given in images:
        path = Path(given)
        if path.is_dir():
            if out.is_dir() and path.samefile(out):
                raise DatasetError(
                    f"--out {out} is the folder of the photos: the masks would be photos the next time; "
                    "choose another"
                )
            listing = listed(path, "IMAGES", but=out if out.is_dir() else None)
            named = [(path / name, (out / name).with_suffix("")) for name in listing.files]
            refused |= {_shown(path / name): why for name, why in listing.refused.items()}
            left_out += listing.left_out
        elif path.exists():
            named = [(path, out / path.stem)]
        else:
            files, others = _matches(given)
            named = [(file, out / file.stem) for file in files]
            for file, (why, is_other) in others.items():
                left_out.update([why] if is_other else [])
                refused |= {} if is_other else {_shown(file): why}
        for source, to in named:
            found.setdefault((source.resolve(), to), _Photo(_shown(source), source, to))
    refused |= _clashes(list(found.values()), endings)
    photos = [photo for photo in found.values() if photo.name not in refused]
    if not photos:
        why = "".join(f"; {name}: {reason}" for name, reason in list(refused.items())[:3])
        raise DatasetError(f"no photo to predict in {', '.join(images)}{why}")
    return _Found(photos, refused, {why: n for why, n in left_out.items() if n})


def _clashes(photos: Sequence[_Photo], endings: Sequence[str]) -> dict[str, str]:
    """Photos that cannot all have their files, with the reason."""
    writers: dict[Path, list[_Photo]] = defaultdict(list)
    for photo in photos:
        for ending in endings:
            writers[_named(photo.to, ending)].append(photo)
    sources = {photo.path.resolve(): photo for photo in photos}
    refused = {}
    for output, its in writers.items():
        overwritten = sources.get(output.resolve())
        if len(its) > 1:
            for photo in its:
                others = ", ".join(other.name for other in its if other is not photo)
                refused[photo.name] = (
                    f"its file and that of {others} would both be {output}: give them apart, with another "
                    "--out"
                )
        elif overwritten is not None:
            whose = "it" if overwritten is its[0] else f"the photo {overwritten.name}"
            refused[its[0].name] = (
                f"its {output.name} would overwrite {whose}: choose another --out"
            )
    return refused


def _matches(pattern: str) -> tuple[list[Path], dict[Path, tuple[str, bool]]]:
    """Photos of a glob pattern, and its other files; raises DatasetError when it matches nothing."""
    paths = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    files = [path for path in paths if not path.is_dir()]
    if not files:
        raise DatasetError(f"{pattern}: no such photo or folder, and no pattern of any")
    fit = {path: unfit(path) for path in files}
    return [path for path, (why, _) in fit.items() if not why], {
        path: found for path, found in fit.items() if found[0]
    }


def _shown(path: Path) -> str:
    return printable(str(path))
