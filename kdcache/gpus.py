"""Which GPUs there are, without opening CUDA, and which one a process has."""

from __future__ import annotations

import os
import re
import subprocess

from kdcache.errors import ProviderError


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name here, without CUDA: its own entries, or all UUIDs."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        entries = [entry.strip() for entry in given.split(",")]
        # CUDA takes those before the first that is none, which is how -1 hides all
        ends = (n for n, entry in enumerate(entries) if not re.match(r"\d|GPU-|MIG-", entry))
        return entries[: next(ends, len(entries))]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    gpus: list[str] = []
    for uuid in re.findall(r"UUID: ((?:GPU|MIG)-[^)\s]+)", listed.stdout):
        # the slices of a GPU follow it, and are used in its place
        if uuid.startswith("MIG-") and gpus and gpus[-1].startswith("GPU-"):
            gpus.pop()
        gpus.append(uuid)
    return gpus


def gpu_of(device: str) -> str | None:
    """The UUID of the GPU that `device` is in this process, which opens CUDA; None for the CPU."""
    if device == "cpu":
        return None
    import torch

    if not torch.cuda.is_available():
        if device == "auto":
            return None
        raise ProviderError(
            f"torch {torch.__version__} sees no CUDA device there (--device {device})"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if visible.startswith("MIG-"):  # slices may have the UUID of their GPU
        return visible
    number = int(device.partition(":")[2] or 0)
    return str(torch.cuda.get_device_properties(number).uuid)
