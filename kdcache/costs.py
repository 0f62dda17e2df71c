"""What a student and its teacher cost where they are deployed: each measured in a process of its own."""

from __future__ import annotations

import dataclasses
import logging
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import torch

from kdcache.cache.reader import Cache
from kdcache.config import ExtractConfig
from kdcache.deploy.graph import write_onnx
from kdcache.deploy.trained import open_student
from kdcache.errors import DeviceMemoryError, ModelError, RunError
from kdcache.onnx_graph import read_model
from kdcache.onnx_session import OnnxNetwork
from kdcache.precompute.teacher import load_checkpoint, network_settings
from kdcache.train.student import resolve_device

log = logging.getLogger(__name__)

Runtime = Literal["PyTorch", "ONNX Runtime"]

# One image after the other, after some that warm up; fewer where they take long.
_WARM_UPS, _RUNS, _LEAST_RUNS, _SECONDS = 2, 50, 10, 20.0

# The design document's section on expected results.
EXPECTED_SPEEDUP, EXPECTED_REDUCTION = 2.5, 0.5


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one network in one runtime on one device, an image at a time."""

    network: Literal["student", "teacher"]
    runtime: Runtime
    device: str
    parameters: int
    size_bytes: int  # of its weights as float32
    latency_ms: float  # median
    latency_p95_ms: float
    runs: int
    memory_bytes: int  # what the process, or the GPU, needs beyond the runtime itself


@dataclass(frozen=True)
class _Network:
    """How a process makes the network that it measures."""

    name: Literal["student", "teacher"]
    runtime: Runtime
    device: str
    path: Path
    encoder: str  # of a teacher's checkpoint
    size_px: int
    parameters: int


def costs(
    cache: Cache,
    student: Path | None,
    teacher: Path | None,
    device: str = "auto",
    teacher_encoder: str | None = None,
) -> list[Cost]:
    """Student and teacher, as far as given, in PyTorch and ONNX Runtime.

    `auto` measures on the CPU and, where there is one, on the GPU. A teacher that is an ONNX file
    is measured in ONNX Runtime alone; a checkpoint is of `teacher_encoder`, else of the encoder that
    made the cache. Raises KdcacheError for files that are not what they should
    be, or when the memory does not suffice.
    """
    on = resolve_device(device)
    devices = list(dict.fromkeys(["cpu", on])) if device == "auto" else [on]
    with TemporaryDirectory() as folder:
        made = [] if student is None else _student_networks(student, cache, Path(folder))
        if teacher is not None:
            made += _teacher_networks(teacher, cache, Path(folder), teacher_encoder)
        return [
            _measured_apart(dataclasses.replace(network, device=on))
            for on in devices
            for network in made
        ]


def _student_networks(student: Path, cache: Cache, folder: Path) -> list[_Network]:
    one = open_student(student, "cpu")
    if one.unet is None:
        raise ModelError(f"--run {student}: give the run folder or .safetensors of the student")
    if one.size_px != cache.manifest.size_px:
        raise RunError(
            f"--run {student}: its student takes {one.size_px} px, {cache.path} holds "
            f"{cache.manifest.size_px}: give a cache of its size, for the teacher is measured at that"
        )
    graph = folder / "student.onnx"
    write_onnx(one.unet.eval(), _pixels(2, one.size_px), ["logits"], graph)
    own = _Network("student", "PyTorch", "cpu", student, "", one.size_px, _parameters(one.unet))
    return [own, dataclasses.replace(own, runtime="ONNX Runtime", path=graph)]


def _teacher_networks(
    teacher: Path, cache: Cache, folder: Path, encoder: str | None
) -> list[_Network]:
    size_px = cache.manifest.size_px
    if teacher.suffix == ".onnx":
        initializers = read_model(teacher).graph.initializer
        weights = sum(math.prod(weight.dims) for weight in initializers)
        return [_Network("teacher", "ONNX Runtime", "cpu", teacher, "", size_px, weights)]
    network = cache.manifest.fingerprint.get("teacher_network")
    of_cache = network_settings(network)["encoder"] if network else ""
    encoder = encoder or of_cache or ExtractConfig().teacher_encoder
    module = load_checkpoint(teacher, encoder).eval()
    graph = folder / "teacher.onnx"
    write_onnx(module, _pixels(2, size_px), ["logits"], graph)
    own = _Network("teacher", "PyTorch", "cpu", teacher, encoder, size_px, _parameters(module))
    return [own, dataclasses.replace(own, runtime="ONNX Runtime", path=graph)]


def _pixels(count: int, size_px: int) -> torch.Tensor:
    return torch.zeros(count, 3, size_px, size_px)


def _parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _measured_apart(network: _Network) -> Cost:
    """In a process of its own, whose memory nothing else has used."""
    log.info("measuring the %s in %s on %s", network.name, network.runtime, network.device)
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(_measured, network, torch.get_num_threads()).result()
    except BrokenProcessPool as error:
        raise DeviceMemoryError(
            f"the process that ran the {network.name} in {network.runtime} on {network.device} died: out "
            "of memory?"
        ) from error


def _measured(network: _Network, threads: int) -> Cost:
    torch.set_num_threads(threads)
    on_gpu = network.device != "cpu"
    if on_gpu:
        torch.zeros(1, device=network.device)  # what CUDA itself needs is not the network's
    before = _gpu_bytes() if on_gpu else _resident_bytes()
    infer = _torch_network(network) if network.runtime == "PyTorch" else _onnx_network(network)
    times = _latencies(infer)
    memory = (_gpu_bytes() if on_gpu else _peak_bytes()) - before
    return Cost(
        network=network.name,
        runtime=network.runtime,
        device=network.device,
        parameters=network.parameters,
        size_bytes=4 * network.parameters,
        latency_ms=1000 * statistics.median(times),
        latency_p95_ms=1000 * float(np.percentile(times, 95)),
        runs=len(times),
        memory_bytes=max(0, memory),
    )


def _torch_network(network: _Network) -> Callable[[], object]:
    if network.name == "student":
        module = open_student(network.path, "cpu").unet
    else:
        module = load_checkpoint(network.path, network.encoder)
    assert module is not None  # `costs` has looked
    module = module.eval().to(network.device)
    pixels = _pixels(1, network.size_px)

    def infer() -> object:
        with torch.inference_mode():
            return module(pixels.to(network.device)).cpu()

    return infer


def _onnx_network(network: _Network) -> Callable[[], object]:
    """As it is deployed: onnxruntime's own defaults, which spin while they wait."""
    device = network.device.split(":", maxsplit=1)[0]
    session = OnnxNetwork(
        network.path.read_bytes(), network.path, device, network.size_px, spinning=True
    )
    pixels = _pixels(1, network.size_px)
    return lambda: session(pixels.to(network.device)).cpu()


def _latencies(infer: Callable[[], object]) -> list[float]:
    for _ in range(_WARM_UPS):
        infer()
    times: list[float] = []
    while len(times) < _RUNS and (len(times) < _LEAST_RUNS or sum(times) < _SECONDS):
        started = time.perf_counter()
        infer()
        times.append(time.perf_counter() - started)
    return times


def _gpu_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def _resident_bytes() -> int:
    """What the process occupies now; from here on its peak is counted anew."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # no Linux, or a kernel without it: the peak is that of the whole process
        return 0
    return _status("VmRSS")


def _peak_bytes() -> int:
    if Path("/proc/self/status").exists():
        return _status("VmHWM")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024


def ratios(found: Sequence[Cost]) -> list[tuple[str, float, float]]:
    """Student against teacher where both were measured alike: what, measured, expected."""
    rows = []
    by_place = {(cost.network, cost.runtime, cost.device): cost for cost in found}
    students = [cost for cost in found if cost.network == "student"]
    for student in students:
        teacher = by_place.get(("teacher", student.runtime, student.device))
        if teacher is not None:
            faster = teacher.latency_ms / student.latency_ms
            rows.append(
                (f"faster, {student.runtime} on {student.device}", faster, EXPECTED_SPEEDUP)
            )
    teachers = [cost for cost in found if cost.network == "teacher"]
    if students and teachers:
        smaller = 1 - students[0].size_bytes / teachers[0].size_bytes
        rows.append(("smaller", smaller, EXPECTED_REDUCTION))
    return rows
