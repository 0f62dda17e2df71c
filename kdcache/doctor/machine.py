"""The machine and its limits: cores, memory, /dev/shm, temporary files, output, compiler, hub."""

from __future__ import annotations

import codecs
import errno
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kdcache.doctor.children import Outcome
from kdcache.doctor.finding import Finding, note, ok, one_line, problem
from kdcache.tables import megabytes

# extract peaks at 2.5 GB, train at 5.3 GB (640 px, batch 4, on the CPU: docs/log.md).
_TOO_LITTLE_MEMORY, _LITTLE_MEMORY = 2e9, 6e9
# Docker gives 64 MB; NCCL takes some tens of megabytes a GPU.
_SMALL_SHM = 1e9
_SMALL_TEMPORARY = 100e6
_SHOWN = "·×→…│画"  # of what our tables, messages and file names have
_CONTROL_GROUPS = Path("sys/fs/cgroup")


def check_cores(root: Path = Path("/"), usable: int | None = None, total: int = 0) -> Finding:
    """How many cores this process may use, by its affinity and its control group."""
    total = total or os.cpu_count() or 1
    if usable is None:
        has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
        usable = len(os.sched_getaffinity(0)) if has_affinity else total
    quota = _cpu_quota(root)
    cores = min(usable, quota or total)
    values = {"cores": cores, "machine_cores": total}
    if cores >= total:
        threads_set = os.environ.get("OMP_NUM_THREADS")
        text = f"{total}, OMP_NUM_THREADS is {threads_set}" if threads_set else f"{total}"
        return ok("cores", text, **values)
    threads = max(1, math.floor(cores))
    limit = "the container's quota" if quota and quota < usable else "the affinity"
    return note(
        "cores",
        f"{cores:g} of the machine's {total} may be used ({limit}), threads are started for all",
        f"export OMP_NUM_THREADS={threads}, and --workers {threads} for extract",
        **values,
    )


def check_memory(root: Path = Path("/")) -> Finding:
    """How much memory this process may take."""
    has = _memory_info(root)
    if has is None:
        return ok("memory", "not known on this system")
    total, available = has
    limit = _memory_limit(root)
    most = min(total, limit or total)
    values = {"limit_bytes": most, "machine_bytes": total, "available_bytes": available}
    text = f"{megabytes(min(available, most))} available of {megabytes(most)}"
    if most < total:
        text += f", the container's limit ({megabytes(total)} in the machine)"
    more = "give the container more (docker run --memory 8g …)" if most < total else "add memory"
    if most < _TOO_LITTLE_MEMORY:
        return problem(
            "memory", f"{text}: torch and one model at 640 px do not fit", f"{more}", **values
        )
    if min(available, most) < _LITTLE_MEMORY:
        fix = f"--batch-size 1, or end what else runs (top -o %MEM), or {more}"
        return note("memory", f"{text}; training at 640 px, batch 4, takes 5.3 GB", fix, **values)
    return ok("memory", text, **values)


def _memory_info(root: Path) -> tuple[int, int] | None:
    """Bytes there are, and bytes that could be had now."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        fields = {name: int(rest.split()[0]) * 1024 for name, rest in (s.split(":") for s in lines)}
        return fields["MemTotal"], fields.get("MemAvailable", fields["MemFree"])
    except (OSError, ValueError, KeyError, IndexError):
        return None


def _memory_limit(root: Path) -> int | None:
    """The smallest limit of this process's control group and those above it."""
    found = [
        int(text)
        for version, name in ((2, "memory.max"), (1, "memory.limit_in_bytes"))
        for text in _control_group(root, version, "memory", name)
        if text.isdigit()
    ]
    return min(found, default=None)


def _cpu_quota(root: Path) -> float | None:
    """Cores by the control groups' quota, version 2 or 1."""
    shares = []
    for text in _control_group(root, 2, "cpu", "cpu.max"):
        quota, period = text.split()
        if quota != "max":
            shares.append(int(quota) / int(period))
    quotas = _control_group(root, 1, "cpu", "cpu.cfs_quota_us")
    periods = _control_group(root, 1, "cpu", "cpu.cfs_period_us")
    for quota, period in zip(quotas, periods, strict=False):
        if int(quota) > 0:
            shares.append(int(quota) / int(period))
    return min(shares, default=None)


def _control_group(root: Path, version: int, controller: str, name: str) -> list[str]:
    """What a file of the control group says, and of each group above it that can be seen."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        number, controllers, group = line.split(":", 2)
        if version == 2 and number == "0":
            top = root / _CONTROL_GROUPS
        elif version == 1 and controller in controllers.split(","):
            top = root / _CONTROL_GROUPS / controller
        else:
            continue
        folder = top / group.lstrip("/")
        inside = [folder, *folder.parents]
        folders = inside[: inside.index(top) + 1]
        return [text for one in folders if (text := _content(one / name))]
    return []


def _content(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def check_shared_memory(path: Path = Path("/dev/shm"), gpus: int = 0) -> Finding:
    """That locks between processes can be made, and that NCCL and other people's loaders have room."""
    try:
        multiprocessing.get_context("fork").Lock()  # of spawn it would start a process
    except (OSError, ImportError) as error:
        fix = f"sudo mount -t tmpfs -o rw,nosuid,nodev,mode=1777 tmpfs {path}"
        if getattr(error, "errno", None) == errno.ENOSPC:
            fix = f"ls -la {path}, and delete what is left over"
        return problem(
            "shared memory",
            f"no lock between processes can be made in {path}: {one_line(str(error))}; dask and "
            "torchrun cannot start theirs",
            f"{fix}; in a container: docker run --shm-size=8g …",
        )
    try:
        disk = os.statvfs(path)
    except OSError:
        return ok("shared memory", f"there is no {path} on this system, nothing here needs it")
    size, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
    values = {"size_bytes": size, "free_bytes": free}
    text = f"{path} has {megabytes(free)} free of {megabytes(size)}"
    if free >= _SMALL_SHM:
        return ok("shared memory", text, **values)
    fix = f"docker run --shm-size=8g … (or --ipc=host); else: sudo mount -o remount,size=8G {path}"
    if size >= _SMALL_SHM:
        fix = f"delete what is left over: ls -la {path}; else {fix}"
    if gpus > 1:
        return problem(
            "shared memory", f"{text}: torchrun on {gpus} GPUs needs more", fix, **values
        )
    remark = "kdcache's own loader does not use it, NCCL and a torch DataLoader with workers do"
    return note("shared memory", f"{text}; {remark}", fix, **values)


def check_temporary() -> Finding:
    """That temporary files can be made."""
    try:
        folder = tempfile.gettempdir()
        with tempfile.TemporaryFile() as file:
            file.write(b"kdcache")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return problem(
            "temporary files",
            f"none can be written: {one_line(str(error))}",
            "mkdir -p ~/tmp && export TMPDIR=~/tmp",
        )
    if free < _SMALL_TEMPORARY:
        fix = "make room there, or: mkdir -p ~/tmp && export TMPDIR=~/tmp"
        return note("temporary files", f"{folder} has {megabytes(free)} free", fix, free_bytes=free)
    return ok("temporary files", f"{folder}, {megabytes(free)} free", free_bytes=free)


def check_output(encoding: str | None) -> Finding:
    """That results can be printed: some of their characters are not ASCII."""
    name = codecs.lookup(encoding or "ascii").name
    try:
        _SHOWN.encode(name)
    except UnicodeEncodeError:
        return problem(
            "output",
            f"stdout is {name}: results and file names that it has no letters for cannot be printed",
            "export PYTHONIOENCODING=utf-8   (or PYTHONUTF8=1)",
            encoding=name,
        )
    return ok("output", name, encoding=name)


def check_compiler(candidates: Sequence[str] | None = None) -> Finding:
    """Whether torch.compile finds a C++ compiler."""
    names = candidates or [os.environ.get("CXX") or "g++", "clang++", "c++"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        return note(
            "compiler",
            "no C++ compiler: `--set compile=true` does not work on the CPU, all else does",
            "sudo apt install g++   (only where it is wanted)",
        )
    return ok("compiler", found)


def check_hub(outcome: Outcome) -> Finding:
    """Whether ImageNet weights can be had; `outcome` is of the probe that asked for the hub."""
    facts = outcome.facts
    fix = "kdcache train … --encoder-weights FILE   (a .safetensors or .pth from another machine)"
    if "seconds" in facts:
        return ok("hub", f"{facts['endpoint']} answers in {facts['seconds']:.2g} s", **facts)
    where = f"; weights that are in {facts['cache']} are used" if "cache" in facts else ""
    if facts.get("offline"):
        return note("hub", f"HF_HUB_OFFLINE is set{where}", f"unset HF_HUB_OFFLINE, or {fix}")
    reason = one_line(facts.get("error") or outcome.ended)
    address = facts.get("endpoint", "the hub")
    if "CERTIFICATE" in reason:
        fix = f"export SSL_CERT_FILE=FILE   (your network's certificates), or {fix}"
    return note("hub", f"{address} cannot be reached ({reason}){where}", fix, **facts)


def stdout_encoding() -> str | None:
    """Of this process."""
    return getattr(sys.stdout, "encoding", None)
