"""A store at a URL: whether it answers, may be written to, and how fast it gives and takes."""

from __future__ import annotations

import os
import time
import uuid

from kdcache.doctor.finding import Finding, note, ok, problem
from kdcache.doctor.storage import speed
from kdcache.errors import KdcacheError
from kdcache.places import Url

_TRIAL_BYTES = 16 * 2**20


def check_store(url: Url, gpu: bool) -> list[Finding]:
    """Write an object beside the URL, read it, remove it; a cache may be read without being written."""
    is_cache = False
    folder = url.parent if url.text.count("/") > 2 else url  # a bucket has none above it
    try:
        is_cache = (url / "zarr.json").is_file()
        trial = folder / f"{url.name}.{uuid.uuid4().hex[:8]}.kdcache-doctor"
        written_bytes_per_s, read_bytes_per_s = _speeds(trial)
    except (KdcacheError, OSError) as error:
        if not is_cache:
            fix = "mend what the message names; other commands at this URL would say the same"
            return [problem("store", str(error), fix)]
        return [
            note(
                "store",
                f"{error}; train, evaluate, verify and bench work, extract cannot append",
                "ask for leave to write there, or `kdcache copy` it to a place of your own",
            )
        ]
    answered = ok("store", f"{folder} answers, and can be written to")
    return [answered, speed(written_bytes_per_s, read_bytes_per_s, gpu)]


def _speeds(trial: Url) -> tuple[float, float]:
    """Bytes a second of writing and reading one object."""
    data = os.urandom(_TRIAL_BYTES)
    started = time.perf_counter()
    trial.write_bytes(data)
    written = time.perf_counter()
    try:
        if trial.read_bytes() != data:
            raise KdcacheError(f"{trial}: what was written is not what is read")
    finally:
        read = time.perf_counter()
        trial.unlink(missing_ok=True)
    return _TRIAL_BYTES / (written - started), _TRIAL_BYTES / (read - written)
