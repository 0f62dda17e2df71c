"""Where a cache or a folder of photos lies: a local folder, or a URL that fsspec knows.

A local place is a `pathlib.Path` and is used as before; a `Url` has the part of pathlib that both
are asked for, and what object stores do better. The functions below take either.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from urllib.parse import urlsplit

from kdcache.errors import ConfigError, StorageError

log = logging.getLogger(__name__)

T = TypeVar("T")

# About 16 s of waiting in all, doubled each time: an overloaded store recovers, a dead one is told.
_ATTEMPTS, _FIRST_WAIT_S = 7, 0.25

# Asking again would change neither what is there nor a mistake.
_ANSWERS = (FileExistsError, IsADirectoryError, NotADirectoryError, NotImplementedError)
_MISTAKES = (PermissionError, ValueError, TypeError)  # a wrong address is a ValueError

# One layer retries, ours: with the client's own below it a dead server would take minutes to tell.
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {
        "config_kwargs": {
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": 64,
            "connect_timeout": 5,
            "read_timeout": 10,  # without a byte
        },
        # more than one would ask for the size of each object before it is read
        "max_concurrency": 1,
    }
}
# Reads at once that hide the time each waits for its answer.
THREADS_AT_URL = 16

_EXTRAS = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


@dataclass(frozen=True)
class Url:
    """A folder or an object at a URL. Each call is retried, with growing waits.

    Raises FileNotFoundError where nothing is there, StorageError (no OSError: it is not about one
    file) where the store refuses or cannot be reached. Holds no connection, so it may be pickled,
    forked and shared between threads.
    """

    text: str

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, name: object) -> Url:
        return Url(f"{self.text.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.text.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> Url:
        """The folder it is in."""
        return Url(self.text.rstrip("/").rpartition("/")[0])

    def is_file(self) -> bool:
        """Whether there is an object of this very name."""
        return self._kind() == "file"

    def is_dir(self) -> bool:
        """Whether there is an object below it."""
        return self._kind() == "directory"

    def exists(self) -> bool:
        """Whether there is an object of this name or below it."""
        return self._kind() is not None

    def size_bytes(self) -> int:
        """Size of the object."""
        return int(self._call("looked at", lambda fs, key: fs.info(key))["size"])

    def read_bytes(self) -> bytes:
        """All of the object."""
        return bytes(self._call("read", lambda fs, key: fs.cat_file(key)))

    def read_range(self, offset: int, length: int) -> bytes:
        """So many bytes of the object, or those there are."""
        return bytes(
            self._call("read", lambda fs, key: fs.cat_file(key, start=offset, end=offset + length))
        )

    def write_bytes(self, data: bytes) -> None:
        """Put an object there, whole or not at all, in the place of what was there."""
        self._call("written", lambda fs, key: fs.pipe_file(key, data))

    def write_new(self, data: bytes) -> None:
        """Put an object where none is; raises FileExistsError when there is one."""
        self._call("written", lambda fs, key: fs.pipe_file(key, data, mode="create"))

    def write_file(self, source: Path) -> None:
        """Put a local file there, whole or not at all."""
        self._call("written", lambda fs, key: fs.put_file(str(source), key))

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object."""
        try:
            self._call("removed", lambda fs, key: fs.rm_file(key))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def children(self) -> list[str]:
        """Names of what lies directly in the folder; none where there is no such folder."""
        try:
            found = self._call("listed", lambda fs, key: fs.ls(key, detail=False))
        except FileNotFoundError:
            return []
        return sorted({name.rstrip("/").rpartition("/")[2] for name in found} - {""})

    def files(self) -> dict[str, int]:
        """Every object below the folder, by its path there, with its size in bytes."""

        def find(fs: Any, key: str) -> dict[str, int]:
            found = fs.find(key, detail=True)
            start = len(key.rstrip("/")) + 1
            return {
                name[start:]: int(entry["size"] or 0)
                for name, entry in found.items()
                if len(name) > start and not name.endswith("/")  # consoles make "folder/" objects
            }

        return dict(sorted(self._call("listed", find).items()))

    def remove_all(self) -> None:
        """Remove everything below the folder."""
        # one by one: fsspec takes names it is given several of for patterns
        with ThreadPoolExecutor(THREADS_AT_URL) as pool:
            for _ in pool.map(lambda name: (self / name).unlink(missing_ok=True), self.files()):
                pass

    def read_some(self, names: Sequence[str]) -> list[bytes | FileNotFoundError]:
        """Objects below the folder, asked for at once, or the error where there is none."""
        found: dict[str, bytes | FileNotFoundError] = {}

        def read(fs: Any, key: str) -> None:
            wanted = [name for name in names if name not in found]
            keys = [f"{key}/{name}" for name in wanted]
            answers = fs.cat_ranges(keys, None, None, on_error="return") if keys else []
            failed: Exception | None = None
            for name, answer in zip(wanted, answers, strict=True):
                if isinstance(answer, FileNotFoundError):
                    found[name] = answer
                elif isinstance(answer, Exception):
                    failed = answer  # those that came are not asked for again
                else:
                    found[name] = bytes(answer)
            if failed is not None:
                raise failed

        self._call("read", read)
        return [found[name] for name in names]

    def _kind(self) -> str | None:
        # not fsspec's isfile and exists: those take a dead store for an absent file
        try:
            return str(self._call("looked at", lambda fs, key: fs.info(key))["type"])
        except FileNotFoundError:
            return None

    def _call(self, what: str, function: Callable[[Any, str], T]) -> T:
        """The function's result, of a filesystem and this URL's key there; retried."""
        fs, key = _filesystem(self.text)
        started = time.monotonic()
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return function(fs, key)
            except FileNotFoundError:  # clients word it in ways of their own
                raise FileNotFoundError(
                    errno.ENOENT, os.strerror(errno.ENOENT), str(self)
                ) from None
            except _ANSWERS:
                raise
            except Exception as error:
                # many clients raise errors of their own, of no common base
                reason = f"{type(error).__name__}: {str(error).strip() or 'no more is said'}"
                if isinstance(error, _MISTAKES) or "Credential" in type(error).__name__:
                    raise StorageError(
                        f"{self} cannot be {what}: the store, or its client, refuses ({reason}); "
                        "credentials come from the environment only, as its client documents (for s3:// "
                        "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE, AWS_ENDPOINT_URL …)"
                    ) from error
                if attempt == _ATTEMPTS:
                    seconds = time.monotonic() - started
                    raise StorageError(
                        f"{self} cannot be {what}: {attempt} attempts in {seconds:.0f} s failed, the "
                        f"last with {reason}; check the network, the store and its address in the "
                        "environment (AWS_ENDPOINT_URL), then run the same command again"
                    ) from error
                if attempt == 2:
                    log.warning("%s cannot be %s (%s); trying again", self, what, reason)
            # spread, so that many clients of an overloaded store do not come back at once
            time.sleep(_FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.75, 1.25))
        raise AssertionError("unreachable")


Place: TypeAlias = Path | Url


def place_of(text: str | Place) -> Place:
    """A path or URL as typed. Raises ConfigError for a URL with credentials or of an unknown kind."""
    if isinstance(text, Url | Path):
        return text
    scheme, separator, rest = text.partition("://")
    if not separator:
        if re.match(r"(s3|gs|gcs|az|abfs|memory|file|https?):/", text) and not Path(text).exists():
            raise ConfigError(f"{text}: did you mean {text.replace(':/', '://', 1)}?")
        return Path(text)
    if scheme in ("file", "local"):
        return Path(rest)
    if "@" in urlsplit(text).netloc:
        shown = text.replace(urlsplit(text).netloc.rpartition("@")[0], "…")
        raise ConfigError(
            f"{shown}: credentials do not belong into a URL, which is stored and printed; they come "
            "from the environment"
        )
    path = "/".join(part for part in rest.split("/") if part)
    if not path:
        raise ConfigError(
            f"{text}: expected a place in the store, such as {scheme}://bucket/coco.zarr"
        )
    _filesystem(text)
    return Url(f"{scheme}://{path}")


def children(folder: Place) -> list[str]:
    """Names of what lies directly in a folder, sorted; none where there is no such folder."""
    if isinstance(folder, Url):
        return folder.children()
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def files_below(folder: Place) -> list[str]:
    """Paths of all files below a folder, with `/`."""
    if isinstance(folder, Url):
        return list(folder.files())
    return [
        Path(parent, name).relative_to(folder).as_posix()
        for parent, _, names in os.walk(folder)
        for name in names
    ]


def read_some(folder: Place, names: Sequence[str]) -> Iterator[bytes | OSError]:
    """The content of files in a folder, or why a file has none."""
    if isinstance(folder, Url):
        yield from folder.read_some(names)
        return
    for name in names:
        try:
            with open(f"{folder}/{name}", "rb") as file:
                yield file.read()
        except OSError as error:
            yield error


def read_blocks(file: Place, size_bytes: int, block_bytes: int = 2**24) -> Iterator[bytes]:
    """The content of a file in blocks, also what there is beyond the size that it should have."""
    if isinstance(file, Url):
        for offset in range(0, size_bytes, block_bytes):
            # a store may refuse a range that begins at the end: one byte more tells of further ones
            left = size_bytes - offset
            wanted = block_bytes if block_bytes < left else left + 1
            block = file.read_range(offset, wanted)
            yield block
            if len(block) < wanted:
                return
        return
    with open(file, "rb") as opened:
        while block := opened.read(block_bytes):
            yield block


def remove_folder(folder: Place) -> None:
    """Remove a folder and all in it, if it is there."""
    if isinstance(folder, Url):
        folder.remove_all()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def picture_of(cache: Place) -> Path:
    """Where the first look is drawn: beside the cache, or of one at a URL in the current folder."""
    name = f"{cache.name}-check.png"
    return Path(name) if isinstance(cache, Url) else cache.with_name(name)


def absolute(path: Place) -> Place:
    """The same place for a process in another folder."""
    return path if isinstance(path, Url) else path.absolute()


def resolved(path: Place) -> Place:
    """The same place, whichever links and dots it was named by."""
    return path if isinstance(path, Url) else path.resolve()


def is_file(path: Place) -> bool:
    """Whether a file is there; no path has a name of impossible length."""
    return path.is_file() if isinstance(path, Url) else os.path.isfile(path)


def size_bytes(file: Place) -> int:
    """Size of a file."""
    return file.size_bytes() if isinstance(file, Url) else file.stat().st_size


def make_folder(folder: Place) -> None:
    """Make a folder and those above it; a URL needs none."""
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's filesystem of a URL and the key there."""
    from fsspec.core import strip_protocol

    fs = _filesystem_of(url.partition("://")[0], os.getpid())
    return fs, str(strip_protocol(url))


@functools.lru_cache
def _filesystem_of(scheme: str, pid: int) -> Any:
    """One of each process, of the environment at its first use.

    fsspec's own cache has one of each thread in older versions, with connections of its own, and
    in all one that still talks to the store that the environment named before.
    """
    import fsspec

    try:
        fs = fsspec.filesystem(
            scheme,
            use_listings_cache=False,  # others write there too
            skip_instance_cache=True,
            **_OPTIONS.get(scheme, {}),
        )
    except (ValueError, ImportError) as error:
        known = _EXTRAS.get(scheme)
        fix = f"pip install {known}" if known else "S3 is s3://bucket/…; a local path has no ://"
        raise ConfigError(f"{scheme}://: {error}; {fix}") from error
    if hasattr(fs, "retries"):
        fs.retries = 1
    return fs
