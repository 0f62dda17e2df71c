"""Files that are either whole or absent, also after a crash or power loss."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kdcache.places import Place, Url

log = logging.getLogger(__name__)

TEMPORARY_SUFFIX = ".kdtmp"


def write_atomic(path: Place, data: bytes) -> None:
    """Write `data` to `path`; readers see the old content or the new, never a part."""
    if isinstance(path, Url):
        path.write_bytes(data)
        return
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it takes the place of `path`.

    The data is on disk before the rename and the rename before the return, so whoever sees the
    new name can rely on the content.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


def lock(folder: Path) -> int | None:
    """An exclusive lock, held until the returned descriptor is closed or we die; None if taken."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        log.warning("%s cannot be locked (%s): let one process write there", folder, error.strerror)
    return descriptor


def is_locked(folder: Path) -> bool:
    """Whether another process holds the folder's lock; False where the file system has none."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def fsync(path: Place) -> None:
    """Flush a file, or a folder's entries, to the disk; what a URL has is there for good."""
    if isinstance(path, Url):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
