"""The exception tree: every error a user can cause or meet, caught once in the CLI group.

A message says what was expected, what came, where, and what to do. Anything that is not a
`KdcacheError` is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class KdcacheError(Exception):
    """Base of all errors kdcache raises on purpose."""


class ConfigError(KdcacheError):
    """A setting is unknown, of the wrong type or out of range."""


class DatasetError(KdcacheError):
    """The dataset as a whole cannot be used: empty, unpaired, not COCO."""


class SampleError(KdcacheError):
    """One image or mask cannot be used; extraction skips it and records the reason."""


class ModelError(KdcacheError):
    """A frozen model or checkpoint cannot be used, or is not what was asked for."""


class ProviderError(KdcacheError):
    """The execution provider or device that was asked for is not active."""


class CacheError(KdcacheError):
    """A cache is missing, damaged, locked or of another format version."""


class FingerprintError(CacheError):
    """A cache was made by other models, preprocessing or precision than those asked for now."""


class StorageError(KdcacheError):
    """A store at a URL refuses, or cannot be reached, after retries."""


class RunError(KdcacheError):
    """A run folder is missing, incomplete, or disagrees with what was asked for."""


class ClusterError(KdcacheError):
    """A dask cluster cannot be reached, or its workers cannot be used."""


class DeviceMemoryError(KdcacheError):
    """The device ran out of memory."""


@contextmanager
def device_memory(what: str, remedy: str) -> Iterator[None]:
    """Turn an out-of-memory failure of torch or ONNX Runtime inside the block into one clear error.

    Neither runtime is imported: torch raises `OutOfMemoryError` on CUDA but a bare RuntimeError
    on the CPU, ONNX Runtime a RuntimeException or Fail; only their texts tell them apart.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, KdcacheError) or not _is_out_of_memory(error):
            raise
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DeviceMemoryError(f"out of memory while {what} ({first_line}); {remedy}") from error


_OUT_OF_MEMORY_TEXTS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "failed to allocate memory",
    "not enough memory",
    "alloc_failed",
    "bad_alloc",
)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return any(phrase in text for phrase in _OUT_OF_MEMORY_TEXTS)


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The known names nearest to `name`, as text for a message."""
    known = list(known)
    matches = difflib.get_close_matches(name, known, n=count, cutoff=0.3) or known[:count]
    return ", ".join(matches) if matches else "none"
