"""One writer at a time: a file lock on a folder, a lease beside a URL."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from kdcache.durable import is_locked, lock
from kdcache.errors import CacheError, StorageError
from kdcache.places import Place, Url

log = logging.getLogger(__name__)

# A writer that was cut off from the store for so long may find that another has taken its place.
_RENEWED_EVERY_S, _VALID_S = 20.0, 120.0

# In a container a killed writer and its successor have one process number.
_held_here: set[str] = set()


class FolderLock:
    """The lock of a folder; the system gives it up when the process dies."""

    def __init__(self, path: Path) -> None:
        descriptor = lock(path)
        if descriptor is None:
            raise CacheError(
                f"{path} is being written by another process; wait for it or stop it, then run again"
            )
        self._descriptor = descriptor

    def check(self) -> None:
        """Nobody can have taken it."""

    def close(self) -> None:
        os.close(self._descriptor)


class Lease:
    """An object beside the cache that says who writes it, renewed by a thread until closed.

    Object stores have no locks. What a killed writer leaves is void after two minutes, or at once
    for a process on the same machine.
    """

    def __init__(self, cache: Url) -> None:
        self._url = _lease_of(cache)
        self._token = uuid.uuid4().hex
        _refuse_if_held(cache, self._url)
        try:
            self._url.write_new(self._content())
        except FileNotFoundError:
            bucket = cache.text.split("/")[2]
            raise CacheError(
                f"{cache} cannot be written: there is no {bucket} in that store; make it first, or mend "
                "the name"
            ) from None
        except FileExistsError:  # what `_refuse_if_held` found to be void, or another was faster
            _refuse_if_held(cache, self._url)
            self._url.write_bytes(self._content())
        _held_here.add(self._token)
        self._closing = threading.Event()
        self._lost = False
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self.check()
        self._thread.start()

    def check(self) -> None:
        """Raise CacheError when another writer holds it now."""
        found = _read(self._url)
        if self._lost or found is None or found.get("token") != self._token:
            raise CacheError(
                f"another process has begun to write beside this one ({self._url} is not this "
                "process's any more); what is committed stays: run the same command again when it "
                "has ended"
            )

    def close(self) -> None:
        """Give it up."""
        self._closing.set()
        self._thread.join()
        _held_here.discard(self._token)
        with contextlib.suppress(StorageError):  # it will be void soon
            found = _read(self._url)
            if found is not None and found.get("token") == self._token:
                self._url.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._closing.wait(_RENEWED_EVERY_S):
            try:
                self.check()
                self._url.write_bytes(self._content())
            except CacheError:
                self._lost = True
                return
            except StorageError as error:
                log.warning("%s", error)

    def _content(self) -> bytes:
        record = {"host": socket.gethostname(), "pid": os.getpid(), "token": self._token}
        return json.dumps({**record, "renewed": time.time()}).encode()


def locked(path: Place) -> FolderLock | Lease:
    """The cache's lock, until it is closed; CacheError when another writer has it."""
    return Lease(path) if isinstance(path, Url) else FolderLock(path)


def refuse_unwritable(path: Place) -> None:
    """Raise what a writer would raise of the place, before hours of work are begun for it."""
    if isinstance(path, Url) or path.is_dir():
        locked(path).close()


def is_being_written(path: Place) -> bool:
    """Whether a writer is at work on a cache."""
    if isinstance(path, Path):
        return is_locked(path)
    found = _read(_lease_of(path))
    return found is not None and _is_valid(found)


def _refuse_if_held(cache: Url, lease: Url) -> None:
    found = _read(lease)
    if found is not None and _is_valid(found):
        age = max(0.0, time.time() - found["renewed"])
        raise CacheError(
            f"{cache} is being written by process {found['pid']} on {found['host']} (last sign of "
            f"life {age:.0f} s ago): wait for it or stop it; if it was killed, this command works "
            f"{_VALID_S:.0f} s after that sign"
        )


def _is_valid(found: dict[str, Any]) -> bool:
    if time.time() - found["renewed"] > _VALID_S:
        return False
    if found["host"] != socket.gethostname():
        return True
    return found["token"] in _held_here if found["pid"] == os.getpid() else _runs(found["pid"])


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _read(lease: Url) -> dict[str, Any] | None:
    try:
        found = json.loads(lease.read_bytes())
        return {name: found[name] for name in ("host", "pid", "token", "renewed")}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _lease_of(cache: Url) -> Url:
    if cache.text.count("/") < 3:
        raise CacheError(f"{cache} is a bucket; give a folder in it, such as {cache}/coco.zarr")
    return cache.parent / f"{cache.name}.lock"
