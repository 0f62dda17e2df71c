"""NVIDIA's driver: what it says, and whether it is new enough for what is installed."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from kdcache.doctor.finding import Finding, note, ok, one_line, problem
from kdcache.doctor.packages import release

# The oldest driver for any minor version of a CUDA major (CUDA compatibility, Linux).
_OLDEST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
_SMI_TIMEOUT_S = 10


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What the machine itself says of NVIDIA GPUs, before any library is asked."""

    present: bool
    hidden: bool = False  # by CUDA_VISIBLE_DEVICES, so the CPU is meant
    driver: str | None = None
    cuda: str | None = None  # the newest that the driver runs, forward compatibility included
    error: str = ""  # nvidia-smi's

    @property
    def wanted(self) -> bool:
        """Whether there is one that should work."""
        return self.present and not self.hidden


def look_for_gpu(root: Path = Path("/")) -> Gpu:
    """Ask nvidia-smi, the kernel and the PCI bus; where there is nothing that takes no time."""
    said, error = _nvidia_smi()
    driver = _first(r"(?:Driver|KMD) Version\s*:\s*(\d[\d.]*)", said)
    if driver is None:
        driver = _first(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", _text(root / _KERNEL_MODULE))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return Gpu(
        present=(bool(said) and not error) or _devices(root),
        hidden=visible is not None and visible.strip() in ("", "-1", "NoDevFiles"),
        driver=driver,
        cuda=_first(r"CUDA (?:UMD )?Version\s*:\s*(\d[\d.]*)", said),
        error=error,
    )


_KERNEL_MODULE = "proc/driver/nvidia/version"


def _nvidia_smi() -> tuple[str, str]:
    """What it prints and what it complains of; both are empty where there is none."""
    try:
        done = subprocess.run(
            ["nvidia-smi"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SMI_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        return "", ""
    except subprocess.TimeoutExpired:
        return "", f"no answer in {_SMI_TIMEOUT_S} s"
    except OSError as error:
        return "", str(error)
    if done.returncode:
        return "", one_line(done.stdout + " " + done.stderr) or f"status {done.returncode}"
    return done.stdout, ""


def _devices(root: Path) -> bool:
    """Whether there is a device file, or a display or 3D controller of NVIDIA on the PCI bus."""
    if any((root / "dev").glob("nvidia[0-9]*")):
        return True
    return any(
        _text(card / "vendor").strip() == "0x10de" and _text(card / "class").startswith("0x03")
        for card in (root / "sys/bus/pci/devices").glob("*")
    )


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text()
    return ""


def _first(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return found[1] if found else None


def check_driver(gpu: Gpu, torch_cuda: str | None, runtime_cuda: str | None) -> Finding:
    """That there is a GPU, and a driver for the CUDA that torch and ONNX Runtime were built for."""
    if gpu.hidden:
        return note(
            "gpu",
            f"GPUs are hidden: CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '')!r}; "
            "all of kdcache runs on the CPU",
            "unset CUDA_VISIBLE_DEVICES   (or leave it, where the CPU is meant)",
        )
    if not gpu.present:
        if gpu.error:
            return _unanswered(gpu)
        return note(
            "gpu",
            "no NVIDIA GPU is seen here: all of kdcache runs on the CPU",
            "nothing, where there is none; in a container: docker run --gpus all …",
        )
    if gpu.error:
        return _unanswered(gpu)
    if gpu.driver is None:
        return problem(
            "driver",
            "there is an NVIDIA GPU, but no driver of it is seen here",
            "install NVIDIA's driver, 580 or newer; in a container: docker run --gpus all …; "
            "where the CPU is meant: export CUDA_VISIBLE_DEVICES=",
        )
    return _new_enough(gpu, gpu.driver, torch_cuda, runtime_cuda)


def _new_enough(gpu: Gpu, driver: str, torch_cuda: str | None, runtime_cuda: str | None) -> Finding:
    needs = {
        name: release(cuda)[0]
        for name, cuda in (("torch", torch_cuda), ("onnxruntime-gpu", runtime_cuda))
        if cuda
    }
    newest = max(needs.values(), default=0)
    oldest = _OLDEST_DRIVER.get(newest, "0")
    runs = release(gpu.cuda)[0] if gpu.cuda else 0
    values = {"driver": driver, "driver_cuda": gpu.cuda, "needs_cuda": needs}
    shown = f"driver {driver}" + (f", for CUDA up to {gpu.cuda}" if gpu.cuda else "")
    by_number = newest in _OLDEST_DRIVER and release(driver) >= release(oldest)
    if not needs or runs >= newest or by_number:
        return ok("driver", shown, **values)
    who = " and ".join(name for name, major in needs.items() if major == newest)
    return problem(
        "driver",
        f"{shown}, is too old: {who} were built for CUDA {newest}"
        if " and " in who
        else f"{shown}, is too old: {who} was built for CUDA {newest}",
        f"install NVIDIA's driver {oldest.split('.')[0]} or newer (on the host, for a container); "
        f"or install builds of torch and onnxruntime-gpu for CUDA {runs or newest - 1}",
        **values,
    )


def _unanswered(gpu: Gpu) -> Finding:
    """nvidia-smi is there and fails."""
    fix = "reboot; should it stay, install NVIDIA's driver anew, 580 or newer"
    for pattern, better in _SMI_FIXES.items():
        if re.search(pattern, gpu.error):
            fix = better
            break
    found = f"nvidia-smi fails: {one_line(gpu.error)}"
    if gpu.present:
        return problem("driver", found, fix)
    return note("driver", found + "; no GPU is seen, all of kdcache runs on the CPU", fix)


_SMI_FIXES = {
    "version mismatch": "sudo reboot   (the driver was updated while the old one was loaded; in a "
    "container: restart it)",
    "communicate with the NVIDIA driver": "sudo modprobe nvidia; should that fail, install the driver "
    "anew: the kernel was updated without it",
    "Unknown Error": "restart the container: it lost its access to the GPU",
    "No devices were found": "sudo dmesg | grep -i nvrm   (the GPU does not answer: power, riser, or "
    "reboot)",
}
