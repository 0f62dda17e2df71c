"""What a benchmark ran on: figures of two machines, or of two versions, are not to be compared."""

from __future__ import annotations

import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("kdcache", "torch", "onnxruntime-gpu", "onnxruntime", "zarr", "numcodecs", "numpy")
COMPARED = ("h5py", "hdf5plugin", "litdata", "mosaicml-streaming")


def machine() -> dict[str, str]:
    """Hardware, load, and the versions of what is measured."""
    found = {
        "date": date.today().isoformat(),
        "cpu": _cpu(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "load": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    for package in (*PACKAGES, *COMPARED):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def line(found: dict[str, str]) -> str:
    """All of it as text."""
    return ", ".join(f"{name} {value}" for name, value in found.items())


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [text.split(":", 1)[1].strip() for text in lines if text.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
