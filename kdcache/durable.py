"""Files that are either whole or absent, also after a crash or power loss."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import tempfile
import uuid
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


class NewFile:
    """A file being written, digested on its way; `place` gives it its name when it is whole.

    Until then it lies beside that under a temporary name, or for a URL in the system's temporary
    folder, from where it goes there whole.
    """

    def __init__(self, path: Place) -> None:
        self._path = path
        # its own: two processes may write one file when the first is thought to be lost
        name = f"{path.name}.{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}"
        folder = Path(tempfile.gettempdir()) if isinstance(path, Url) else path.parent
        self._temporary = folder / name
        self._digest = hashlib.sha256()
        self.size_bytes = 0
        self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed by place or abandon

    @property
    def sha256(self) -> str:
        """The digest of what was written so far."""
        return self._digest.hexdigest()

    def write(self, data: bytes) -> None:
        """Add to its end."""
        self._file.write(data)
        self._digest.update(data)
        self.size_bytes += len(data)

    def place(self) -> None:
        """Make it durable under its own name."""
        self._file.close()
        if isinstance(self._path, Url):
            self._path.write_file(self._temporary)
            self._temporary.unlink()
        else:
            fsync(self._temporary)
            os.replace(self._temporary, self._path)

    def abandon(self) -> None:
        """Remove what was written, unless it has its name."""
        with contextlib.suppress(OSError):  # a full disk: closing flushes what was not written
            self._file.close()
        self._temporary.unlink(missing_ok=True)


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
