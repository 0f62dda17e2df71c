"""Where a cache is or will be: room, files, speed, whether it can be written; and the cache itself."""

from __future__ import annotations

import contextlib
import errno
import getpass
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kdcache.doctor.children import Outcome
from kdcache.doctor.finding import Finding, note, ok, one_line, problem
from kdcache.durable import TEMPORARY_SUFFIX
from kdcache.places import Url
from kdcache.tables import megabytes

# A row at 640 px of a 1024×80×80 tap, int8, with the reserve that a plan needs.
ROW_BYTES = 5.3e6
_FULL_BYTES, _LITTLE_BYTES = 1e9, 20e9
# A shard of 32 rows is eight files and folders, so 64,000 rows are 16,000.
_NO_FILES, _FEW_FILES = 100, 20_000
_TRIAL_BYTES, _BLOCK_BYTES, _TRIAL_S = 64 * 2**20, 8 * 2**20, 3.0
# A training step on two CPU cores takes 0.8 s a row (docs/log.md); a GPU is taken to need 20 rows/s.
_NEEDED_ROWS_PER_S = {False: 3.0, True: 20.0}


@dataclass(frozen=True, kw_only=True)
class Place:
    """A path, and the folder that is there already."""

    path: Path
    folder: Path  # `path`, or the nearest of its parents that exists
    is_cache: bool


def place(path: Path) -> Place:
    """Find out what is at a path."""
    parents = (path.absolute(), *path.absolute().parents)
    folder = next(parent for parent in parents if parent.is_dir())
    return Place(path=path, folder=folder, is_cache=_looks_like_a_cache(path))


def _looks_like_a_cache(path: Path) -> bool:
    """Also where its root record is lost."""
    return path.is_dir() and ((path / "zarr.json").exists() or (path / "commits").is_dir())


def check_place(found: Place) -> Finding | None:
    """That the path is a folder, or can become one."""
    path, folder = found.path, found.folder
    if path.is_dir():
        return None
    if path.exists() or path.is_symlink():
        kind = "a link that leads nowhere" if path.is_symlink() and not path.exists() else "a file"
        return problem("path", f"{path} is {kind}; a cache is a folder", "kdcache doctor FOLDER")
    if folder != path.absolute().parent:
        return note(
            "path",
            f"{path} does not exist, nor does the folder that it is to be in; looked at {folder}",
            f"mkdir -p {path.absolute().parent}   (or mend the path, or mount the disk)",
        )
    return ok("path", f"{path} does not exist yet; looked at {folder}, where it would be")


def check_space(found: Place) -> list[Finding]:
    """That there are bytes and files left."""
    disk = os.statvfs(found.folder)
    free_bytes, files = disk.f_bavail * disk.f_frsize, disk.f_favail
    findings = [_space(found, free_bytes)]
    if disk.f_files:  # btrfs and network disks do not count
        findings.append(_files(found, files))
    return findings


def _space(found: Place, free_bytes: int) -> Finding:
    rows = float(f"{free_bytes / ROW_BYTES:.2g}")  # it is no more exact than that
    text = f"{megabytes(free_bytes)} free at {found.folder}: about {rows:,.0f} rows at 640 px"
    fix = f"make room, or give another disk (--out DIR); what takes it: du -xsh {found.folder}/*"
    if free_bytes < _FULL_BYTES:
        level = note if found.is_cache else problem  # a cache is read from full disks as well
        return level("disk", "full: " + text, fix, free_bytes=free_bytes)
    if free_bytes < _LITTLE_BYTES and not found.is_cache:
        fix += "; `kdcache plan` says what a dataset takes"
        return note("disk", text, fix, free_bytes=free_bytes)
    return ok("disk", text, free_bytes=free_bytes)


def _files(found: Place, files: int) -> Finding:
    text = f"{files:,} more files fit (inodes) at {found.folder}"
    fix = (
        "delete files that are not needed (find where they are: du --inodes -xS DIR | sort -n), or "
        "use another disk"
    )
    if files < _NO_FILES:
        level = note if found.is_cache else problem
        return level("inodes", text, fix, free_files=files)
    if files < _FEW_FILES and not found.is_cache:
        fix = f"extract with --set shard_rows=512: a 16th of the files; or {fix}"
        return note("inodes", text, fix, free_files=files)
    return ok("inodes", text, free_files=files)


def check_disk(found: Place, gpu: bool) -> list[Finding]:
    """That a file can be written where the cache is, and how fast it is written and read.

    The file has no name, or loses it at once: nothing is left, however this process ends.
    """
    try:
        with tempfile.TemporaryFile(dir=found.folder, suffix=TEMPORARY_SUFFIX) as file:
            written_bytes, write_s = _write(file.fileno())
            rate = _read_rate(file.fileno(), written_bytes)
    except OSError as error:
        unwritable = _unwritable(found, error)
        return [unwritable, *_of_the_cache(found, gpu)]
    found_speed = speed(written_bytes / write_s, rate, gpu)
    return [ok("writing", f"{found.folder} can be written to"), found_speed]


def _write(descriptor: int) -> tuple[int, float]:
    """Bytes written and seconds taken, until all of the trial is on the disk or time is up."""
    block = os.urandom(_BLOCK_BYTES)  # a disk that compresses gains nothing
    started = time.perf_counter()
    written = seconds = 0.0
    while written < _TRIAL_BYTES and seconds < _TRIAL_S:
        part = os.write(descriptor, block)
        os.fsync(descriptor)
        written += part
        seconds = time.perf_counter() - started
    return int(written), seconds


def _read_rate(descriptor: int, size_bytes: int) -> float:
    """Bytes a second, from the disk where the system lets go of what it holds in memory."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    started, done = time.perf_counter(), 0
    while done < size_bytes and time.perf_counter() - started < _TRIAL_S:
        done += len(os.pread(descriptor, _BLOCK_BYTES, done)) or size_bytes
    return min(done, size_bytes) / max(time.perf_counter() - started, 1e-9)


def speed(write_rate: float | None, read_rate: float, gpu: bool) -> Finding:
    """What these bytes a second are in rows, and whether a training would wait for them."""
    rows = read_rate / ROW_BYTES
    text = f"reads {megabytes(read_rate)}/s, {rows:.0f} rows/s of 5.3 MB"
    values = {"read_bytes_per_s": read_rate, "rows_per_s": rows}
    if write_rate is not None:
        text = f"writes {megabytes(write_rate)}/s, {text}"
        values["write_bytes_per_s"] = write_rate
    if rows < _NEEDED_ROWS_PER_S[gpu]:
        return note(
            "speed",
            f"{text}: training may wait for {'the GPU to be fed' if gpu else 'data'}",
            "copy the cache to a local disk (rsync -a CACHE DIR), or extract with --precision int4; "
            "kdcache bench CACHE measures the real rate",
            **values,
        )
    return ok("speed", text, **values)


def _unwritable(found: Place, error: OSError) -> Finding:
    folder = found.folder
    reason = f"{folder} cannot be written to: {error.strerror or error}"
    fix = f"choose a folder that is yours, or: sudo chown -R {_user()} {folder}"
    if error.errno == errno.EROFS:
        fix = f"sudo mount -o remount,rw {_mount_point(folder)}   (or give another folder)"
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = f"make room: df -h {folder}, quota -s   (or give another disk)"
    elif error.errno == errno.EIO:
        fix = "the disk fails: sudo dmesg | tail; save what is on it"
    if found.is_cache:
        remark = "; train, evaluate, verify and bench work, extract cannot append"
        return note("writing", reason + remark, fix)
    return problem("writing", reason, fix)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return str(os.getuid())


def _mount_point(folder: Path) -> Path:
    """Also of a bind mount, which has the device of what it shows."""
    mounts: set[str] = set()
    with contextlib.suppress(OSError):  # Linux
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        mounts = {line.split()[4].replace("\\040", " ") for line in lines}
    resolved = folder.resolve()
    parents = (resolved, *resolved.parents)
    return next(path for path in parents if str(path) in mounts or os.path.ismount(path))


def _of_the_cache(found: Place, gpu: bool) -> Iterator[Finding]:
    """How fast a cache is read that cannot be written beside."""
    if not found.is_cache:
        return
    largest = max(_shards(found.folder), key=lambda path: path.stat().st_size, default=None)
    if largest is not None:
        with largest.open("rb") as file:
            size_bytes = min(largest.stat().st_size, _TRIAL_BYTES)
            yield speed(None, _read_rate(file.fileno(), size_bytes), gpu)


def _shards(folder: Path) -> Iterator[Path]:
    """Files large enough to time, the first few that are met."""
    count = 0
    for path in folder.rglob("c.*"):
        if path.is_file() and path.stat().st_size > _BLOCK_BYTES:
            yield path
            count += 1
        if count == 8:
            return


def check_cache(outcome: Outcome, path: Path | Url) -> list[Finding]:
    """That the cache opens, and whether a writer has it open; `outcome` is of the probe."""
    facts, findings = outcome.facts, []
    if facts.get("locked"):
        findings.append(
            note(
                "lock",
                f"a writer has {path} open: reading works, a second extract is refused",
                f"wait for it, or see who it is: fuser -v {path}",
                locked=True,
            )
        )
    if damage := facts.get("damage"):
        fix = f"kdcache verify {path}   (lists all damage; restore from a backup, or extract again)"
        findings.append(problem("cache", one_line(damage), fix))
    elif "rows" in facts:
        size = megabytes(facts["size_bytes"])
        findings.append(
            ok(
                "cache",
                f"{path} opens: {facts['rows']} rows, {size}; kdcache verify reads all of it",
                **facts,
            )
        )
    else:
        reason = one_line(facts.get("error") or outcome.ended)
        fix = "mend the libraries that are named here first, then run kdcache doctor again"
        findings.append(problem("cache", f"{path} cannot be opened: {reason}", fix))
    return findings
