"""The image files of a folder: links and odd names told, nothing left out in silence."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import NamedTuple

from kdcache.errors import DatasetError, SampleError
from kdcache.imaging import IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES
from kdcache.places import Place, Url


def read_file(path: Place, what: str) -> bytes:
    """A regular file's bytes; a pipe or device would keep the reader waiting for ever."""
    try:
        if isinstance(path, Url):
            return path.read_bytes()
        if not stat.S_ISREG(path.stat().st_mode):
            raise SampleError(f"{what} is not a regular file ({path})")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        why = error.strerror if isinstance(error, OSError) else error
        raise SampleError(f"{what} cannot be read: {why} ({path})") from error


class Listing(NamedTuple):
    """The files of a folder that may be images, and what became of the others."""

    files: list[str]  # paths below the folder, sorted
    refused: dict[str, str]  # name to reason
    left_out: Counter[str]  # reason to number


def listed(folder: Place, option: str, but: Place | None = None) -> Listing:
    """The image files below a folder, but not in `but`; raises DatasetError when there is none."""
    if not folder.is_dir():
        raise DatasetError(f"{option} {folder}: no such folder")
    files: list[str] = []
    refused: dict[str, str] = {}
    left_out: Counter[str] = Counter()
    for name, problem in _below(folder, but):
        why, is_other = (problem, False) if problem else unfit(PurePosixPath(name))
        if is_other:
            left_out[why] += 1
        elif why or printable(name) != name:
            # bytes that are no text can neither be stored as a sample id nor printed
            refused[printable(name)] = why or "its name is not valid UTF-8; rename it"
        else:
            files.append(name)
    if not files:
        kinds = " ".join(sorted(IMAGE_SUFFIXES))
        others = "".join(f"; {name}: {why}" for name, why in list(refused.items())[:3])
        raise DatasetError(
            f"{option} {folder}: no image in it or below it (looked for {kinds}){others}"
        )
    return Listing(sorted(files), refused, left_out)


def unfit(path: PurePath) -> tuple[str, bool]:
    """Why a file is no photo, by its suffix, or nothing; and whether it was never meant as one."""
    suffix = path.suffix.lower()
    if suffix in OTHER_IMAGE_SUFFIXES:
        kind = suffix.removeprefix(".").upper()
        return f"{kind} is not supported: convert it to JPEG or PNG", False
    if suffix not in IMAGE_SUFFIXES:
        return f"files of suffix {printable(suffix) or '(none)'}, not an image's", True
    return "", False


def _below(folder: Place, but: Place | None) -> Iterator[tuple[str, str]]:
    """Every file below a folder by its path there, and what is wrong with it; none of those in `but`."""
    if isinstance(folder, Url):
        inside = f"{but}/".removeprefix(f"{folder}/") if but is not None and but != folder else None
        for name in folder.files():
            if inside is None or not name.startswith(inside):
                yield name, ""
        return
    excluded = but if isinstance(but, Path) else None
    for path, problem in _walk(folder, (), excluded):
        yield path.relative_to(folder).as_posix(), problem


def _walk(
    folder: Path, above: tuple[tuple[int, int], ...], but: Path | None
) -> Iterator[tuple[Path, str]]:
    """Every file below a folder, and what is wrong with it; links are followed, but not in circles."""
    try:
        own = folder.stat()
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        yield folder, f"the folder cannot be read: {error.strerror}"
        return
    above = (*above, (own.st_dev, own.st_ino))
    for entry in entries:
        path = folder / entry.name
        try:
            status = entry.stat()
        except OSError as error:
            yield path, f"a link that leads nowhere: {error.strerror}"
            continue
        if (status.st_dev, status.st_ino) in above:
            yield path, "a link to a folder that it is in itself"
        elif stat.S_ISDIR(status.st_mode):
            if but is None or not os.path.samestat(status, but.stat()):
                yield from _walk(path, above, but)
        else:
            yield path, "" if stat.S_ISREG(status.st_mode) else "not a regular file"


def by_stem(names: Sequence[str]) -> dict[str, list[str]]:
    """Names by their path without suffix; `1` and `10` are two stems."""
    stems: dict[str, list[str]] = {}
    for name in names:
        stems.setdefault(Path(name).with_suffix("").as_posix(), []).append(name)
    return stems


def printable(name: str) -> str:
    """The name, or with \\x escapes where its bytes are no UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
