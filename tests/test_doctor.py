"""Broken environments: the fault that was planted is named, with what to type against it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, load_model_from_string

from kdcache.cli import main
from kdcache.doctor import checkup as checkups
from kdcache.doctor import children, gpu, machine, packages, providers, storage
from kdcache.doctor.checkup import Checkup
from kdcache.doctor.finding import isolated, note, ok, problem
from kdcache.doctor.probe import GRAPH
from kdcache.doctor.report import checkup_text

ROOT = Path(__file__).parents[1]
NO_GPU = gpu.Gpu(present=False)
GPU = gpu.Gpu(present=True, driver="580.95.05", cuda="13.0")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def program(path, text):
    write(path, f"#!/bin/sh\n{text}\n").chmod(0o755)


def distribution(folder, name, version):
    """What pip leaves of an installed distribution for others to read."""
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    write(folder / f"{name.replace('-', '_')}-{version}.dist-info/METADATA", text)


def smi(driver, cuda):
    """The head of nvidia-smi's table."""
    return f"| NVIDIA-SMI {driver}    Driver Version: {driver}     CUDA Version: {cuda}     |"


def without_cuda_library(folder):
    """The installed onnxruntime but for one file, as links."""
    (original,) = __import__("onnxruntime").__path__
    for path in Path(original).rglob("*"):
        link = folder / "onnxruntime" / path.relative_to(original)
        if path.is_dir() or path.name == "libonnxruntime_providers_cuda.so":
            continue
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)


def outcome(facts=None, modules=None, ended="", began="", stderr=""):
    return children.Outcome(
        facts=facts or {}, modules=modules or {}, ended=ended, began=began, stderr=stderr
    )


def probed(name, *arguments, patience_s=None):
    with children.Children(patience_s) as started:
        return started.outcome(started.start(name, *arguments))


def only(findings, level):
    """The one finding of a level."""
    (found,) = [finding for finding in findings if finding.level == level]
    return found


def disk(monkeypatch, **changes):
    """A file system of 1 TB in which `changes` is not as it should be."""
    found = {"f_frsize": 4096, "f_blocks": 250e6, "f_bavail": 200e6}
    found |= {"f_files": 10**8, "f_favail": 9 * 10**7} | changes
    found = {name: int(value) for name, value in found.items()}
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(**found))


# ---- one machine on which everything is broken, seen through the command


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """The report on a Python and a machine with eight faults."""
    folder = tmp_path_factory.mktemp("broken")
    site = folder / "site"
    distribution(site, "onnxruntime-gpu", "1.31.1")
    distribution(site, "onnxruntime", "1.30.0")
    distribution(site, "torch", "2.14.1")
    distribution(site, "torchvision", "0.28.0")
    distribution(site, "zfpy", "1.0.1.post0")
    distribution(site, "zarr", "2.18.3")
    loading = "libcudart.so.13: cannot open shared object file: No such file or directory"
    write(site / "torch/__init__.py", f"raise OSError({loading!r})")
    without_cuda_library(site)
    program(folder / "bin/nvidia-smi", f"echo '{smi('535.104.05', '12.2')}'")
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": f"{site}:{ROOT}",
        "PYTHONIOENCODING": "ascii",
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_OFFLINE": "0",
    }
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    done = subprocess.run(
        [sys.executable, "-m", "kdcache", "doctor", folder, "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("fault", "fix"),
    [
        (
            "onnxruntime 1.30.0 and onnxruntime-gpu 1.31.1 are installed at once",
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu",
        ),
        (
            "torch cannot be imported: OSError: libcudart.so.13: cannot open",
            "pip install --force-reinstall torch   (its wheel brings the CUDA libraries)",
        ),
        (
            "torchvision 0.28.0 is not the one for torch 2.14.1, which is 0.29",
            'pip install "torchvision==0.29.*"',
        ),
        ("zfpy 1.0.1.post0 is installed: with it numcodecs fails", "pip uninstall -y zfpy"),
        ("zarr 2.18.3 is installed; kdcache needs zarr>=3.0.8", 'pip install "zarr>=3.0.8"'),
        (
            "driver 535.104.05, for CUDA up to 12.2, is too old: onnxruntime-gpu was built for",
            "install NVIDIA's driver 580 or newer (on the host, for a container)",
        ),
        (
            "CUDAExecutionProvider does not start: libonnxruntime_providers_cuda.so does not load "
            "(libonnxruntime_providers_cuda.so is missing)",
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu",
        ),
        ("stdout is ascii", "export PYTHONIOENCODING=utf-8"),
    ],
)
def test_each_fault_of_a_machine_full_of_them_is_named_with_its_fix(broken, fault, fix):
    found = [one for one in broken["findings"] if one["found"].startswith(fault)]
    assert len(found) == 1, broken["findings"]
    assert found[0]["level"] == "problem"
    assert found[0]["fix"].startswith(fix)


def test_an_unreachable_hub_is_a_note(broken):
    (hub,) = [one for one in broken["findings"] if one["check"] == "hub"]
    assert hub["level"] == "note"
    assert "127.0.0.1:9 cannot be reached" in hub["found"]
    assert "--encoder-weights FILE" in hub["fix"]


def test_what_is_well_is_said_beside_what_is_broken(broken):
    well = {one["check"] for one in broken["findings"] if one["level"] == "ok"}
    assert {"python", "writing", "temporary files"} <= well
    assert broken["ok"] is False


# ---- this machine


def test_this_machine_is_well_where_gpus_are_hidden(cache):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "kdcache", "doctor", cache.path],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "runs a graph on the CPU" in done.stdout
    assert f"{cache.path} opens: 10 rows" in done.stdout
    assert "GPUs are hidden: CUDA_VISIBLE_DEVICES=''" in done.stdout
    assert "unset CUDA_VISIBLE_DEVICES" in done.stdout


# ---- packages and providers


def test_an_old_python_is_named():
    assert "3.11 or newer" in packages.check_python((3, 10, 13)).found
    assert "python3.11 -m venv" in packages.check_python((3, 10, 13)).fix
    assert packages.check_python((3, 13, 0)).level == "ok"


@pytest.mark.parametrize(
    ("requirement", "version", "level"),
    [
        ("smp<0.7,>=0.5", "0.7.0", "problem"),
        ("smp<0.7,>=0.5", "0.6.9", "ok"),
        ("smp<0.7,>=0.5", "0.4.1", "problem"),
        ("smp[extra]>=2025.1", "2024.12.1", "problem"),
        ("smp[extra]>=2025.1", "2025.1", "ok"),
        ("smp>=1.10", "1.9", "problem"),
        ('smp>=9; sys_platform == "win32"', "1.9", "ok"),
    ],
)
def test_versions_are_held_to_their_bounds(requirement, version, level):
    (found,) = packages.check_versions({"smp": version}, [requirement])
    assert found.level == level
    if level == "problem":
        assert version in found.found
        assert found.fix == f'pip install "{requirement}"'


def test_what_is_not_installed_is_named():
    (found,) = packages.check_versions({}, ["google-crc32c>=1.5"])
    assert found.found == "google-crc32c is not installed; kdcache needs google-crc32c>=1.5"
    assert "no ONNX Runtime" in packages.check_runtimes({}).found


@pytest.mark.parametrize(
    ("source", "fault", "fix"),
    [
        ("raise ImportError('undefined symbol in zfpy')", "zfpy", "pip uninstall -y zfpy"),
        ("import nowhere", "No module named 'nowhere'", "pip install --force-reinstall"),
        (
            "raise RuntimeError('operator torchvision::nms does not exist')",
            "torchvision::nms",
            "pip install --force-reinstall torch torchvision",
        ),
        ("raise ImportError('libGL.so.1: cannot open')", "libGL.so.1", "opencv-python-headless"),
        ("import os; os.kill(os.getpid(), 4)", "SIGILL", "pip install --no-binary"),
        ("import os; os.abort()", "SIGABRT", "pip install --force-reinstall"),
        ("import sys; sys.exit(3)", "SystemExit: 3", "pip install --force-reinstall"),
        ("import os; os._exit(7)", "status 7", "pip install --force-reinstall"),
    ],
)
def test_a_library_that_does_not_load_is_named(tmp_path, monkeypatch, source, fault, fix):
    write(tmp_path / "rotten.py", source)
    monkeypatch.syspath_prepend(tmp_path)
    found = packages.check_imports(probed("modules", "json", "rotten"), ["json", "rotten"])
    one = only(found, "problem")
    assert one.found.startswith("rotten cannot be imported: ")
    assert fault in one.found
    assert one.fix.startswith(fix) or fix in one.fix


def test_a_library_that_is_absent_is_to_be_installed():
    names = ["json", "cv3"]
    (found,) = packages.check_imports(probed("modules", *names), names)
    assert (found.found, found.fix) == ("not installed: cv3", "pip install cv3")


def test_a_provider_that_hangs_is_given_up(tmp_path, monkeypatch):
    write(tmp_path / "onnxruntime.py", "import time; time.sleep(600)")
    monkeypatch.syspath_prepend(tmp_path)
    started = time.monotonic()
    found = probed("provider", providers.CPU, patience_s=2)
    assert time.monotonic() - started < 20
    (one,) = providers.check_providers(dict.fromkeys(PROVIDERS, found), NO_GPU, outcome())
    assert one.level == "problem"
    assert "no answer in 2 s" in one.found
    assert one.fix.startswith("run `kdcache doctor` once more")


def test_no_probe_outlives_the_block(tmp_path, monkeypatch):
    write(tmp_path / "slow.py", "import time; time.sleep(600)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KeyboardInterrupt), children.Children() as started:
        process = started.start("modules", "slow")
        raise KeyboardInterrupt
    assert process.returncode == -signal.SIGKILL


PROVIDERS = (providers.CPU, providers.CUDA, providers.TENSORRT)
STUB = """
__version__ = "1.20.0"
class InferenceSession:
    def __init__(self, *_, providers, **__): self.providers = providers
    def get_providers(self): return [{active!r}]
    def run(self, *_): {run}
def get_available_providers(): return ["CUDAExecutionProvider", "CPUExecutionProvider"]
"""


@pytest.mark.parametrize(
    ("active", "run", "fault"),
    [
        (providers.CUDA, "import os; os.abort()", "its process was killed by SIGABRT"),
        (providers.CUDA, "raise RuntimeError('CUDNN_STATUS_9')", "RuntimeError: CUDNN_STATUS_9"),
        (providers.CPU, "import numpy; return [numpy.array(9)]", "it runs on CPUExecutionProvider"),
        (providers.CUDA, "import numpy; return [numpy.array(8)]", "it computes 8.0 where 9.0"),
    ],
)
def test_a_provider_that_breaks_is_named(tmp_path, monkeypatch, active, run, fault):
    write(tmp_path / "torch.py", "")
    write(tmp_path / "onnxruntime/__init__.py", STUB.format(active=active, run=run))
    write(tmp_path / "onnxruntime/capi/build_and_package_info.py", "cuda_version = '13.0'")
    monkeypatch.syspath_prepend(tmp_path)
    outcomes = {providers.CPU: RUNS, providers.CUDA: probed("provider", providers.CUDA)}
    found = only(providers.check_providers(outcomes, GPU, outcome()), "problem")
    assert found.found.startswith(f"CUDAExecutionProvider does not start: {fault}")
    assert "pip install onnxruntime-gpu" in found.fix


RUNS = outcome(
    {"version": "1.31.1", "listed": list(PROVIDERS), "active": [providers.CPU]}
    | {"result": 9.0, "cudnn": {}, "cuda": "13.0"},
    began=providers.CPU,
)


def test_the_plain_runtime_on_a_gpu_machine_is_named():
    plain = outcome({"version": "1.31.1", "listed": [providers.CPU], "cuda": None})
    outcomes = {providers.CPU: RUNS, providers.CUDA: plain}
    found = only(providers.check_providers(outcomes, GPU, outcome()), "problem")
    assert "this onnxruntime has CPUExecutionProvider" in found.found
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in found.fix
    assert [f.level for f in providers.check_providers(outcomes, NO_GPU, outcome())] == ["ok"]


def test_two_cuda_majors_and_two_cudnn_are_named():
    theirs = outcome({"cuda": "12.8"})
    mixed = outcome(RUNS.facts | {"active": list(PROVIDERS)}, began=providers.CUDA)
    mixed.facts["cudnn"].update({"/usr/lib/libcudnn.so.9": "90100", "/v/libcudnn.so.9": "91500"})
    outcomes = {providers.CPU: RUNS, providers.CUDA: mixed}
    found = [f for f in providers.check_providers(outcomes, GPU, theirs) if f.level == "problem"]
    assert [one.check for one in found] == ["cuda", "cudnn"]
    assert "torch was built for CUDA 12.8, onnxruntime-gpu for CUDA 13.0" in found[0].found
    assert "install a torch for CUDA 13" in found[0].fix
    assert "9.1.0 (/usr/lib/libcudnn.so.9), 9.15.0 (/v/libcudnn.so.9)" in found[1].found
    assert "unset LD_LIBRARY_PATH" in found[1].fix


TORCH = {"torch": "2.14.1", "cuda": "13.0", "rocm": None, "cudnn": 92400}
CARD = {"name": "H100", "free_bytes": 70e9, "total_bytes": 80e9}


@pytest.mark.parametrize(
    ("facts", "fault", "fix"),
    [
        (TORCH, "it cannot use the GPU that is here", "driver"),
        (TORCH | {"cuda": None}, "built for CPUs: it cannot use", "pip install torch torchvision"),
        (
            TORCH | {"gpus": [CARD | {"error": "CUDA error: no kernel image is available"}]},
            "H100: torch cannot compute on it",
            "install a build of torch for this GPU",
        ),
        (TORCH | {"gpus": [CARD | {"free_bytes": 1e9}]}, "1.00 GB of 80.00 GB free", "nvidia-smi"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_named(facts, fault, fix):
    found = [one for one in providers.check_torch(outcome(facts), GPU) if one.level != "ok"]
    assert len(found) == 1
    assert fault in found[0].found
    assert fix in found[0].fix


def test_without_a_gpu_torch_is_well_on_the_cpu():
    assert [one.level for one in providers.check_torch(outcome(TORCH), NO_GPU)] == ["ok"]
    working = outcome(TORCH | {"gpus": [CARD]})
    assert [one.level for one in providers.check_torch(working, GPU)] == ["ok", "ok"]


def test_the_graph_is_one_convolution():
    shapes = {"x": [1, 1, 3, 3], "y": [1, 1, 1, 1]}
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items())
    nines = helper.make_tensor("w", TensorProto.FLOAT, [1, 1, 3, 3], [1.0] * 9)
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"])], "g", [x], [y], [nines])
    opset = [helper.make_opsetid("", 13)]
    assert load_model_from_string(GRAPH) == helper.make_model(
        graph, opset_imports=opset, ir_version=7
    )


# ---- the driver


@pytest.mark.parametrize(
    ("said", "fault", "fix"),
    [
        (
            "Failed to initialize NVML: Driver/library version mismatch",
            "nvidia-smi fails: Failed to initialize NVML: Driver/library version mismatch",
            "sudo reboot",
        ),
        (
            "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.",
            "couldn't communicate",
            "sudo modprobe nvidia",
        ),
        ("Failed to initialize NVML: Unknown Error", "Unknown Error", "restart the container"),
    ],
)
def test_a_failing_nvidia_smi_is_named(tmp_path, monkeypatch, said, fault, fix):
    program(tmp_path / "bin/nvidia-smi", f'echo "{said}"; exit 9')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    write(tmp_path / "dev/nvidia0", "")
    found = gpu.check_driver(gpu.look_for_gpu(tmp_path), "13.0", "13.0")
    assert found.level == "problem"
    assert fault in found.found
    assert found.fix.startswith(fix)
    (tmp_path / "dev/nvidia0").unlink()
    assert gpu.check_driver(gpu.look_for_gpu(tmp_path), "13.0", "13.0").level == "note"


def test_a_hanging_nvidia_smi_is_given_up(tmp_path, monkeypatch):
    program(tmp_path / "bin/nvidia-smi", "exec sleep 60")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(gpu, "_SMI_TIMEOUT_S", 1)
    assert gpu.look_for_gpu(tmp_path).error == "no answer in 1 s"


def test_a_gpu_without_a_driver_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    card = tmp_path / "sys/bus/pci/devices/0000:00:1e.0"
    write(card / "vendor", "0x10de\n")
    write(card / "class", "0x040300\n")  # its sound
    assert gpu.check_driver(gpu.look_for_gpu(tmp_path), "13.0", "13.0").level == "note"
    write(card / "class", "0x030200\n")
    found = gpu.check_driver(gpu.look_for_gpu(tmp_path), "13.0", "13.0")
    assert (found.level, found.check) == ("problem", "driver")
    assert "no driver of it" in found.found
    assert "docker run --gpus all" in found.fix
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.check_driver(gpu.look_for_gpu(tmp_path), "13.0", "13.0").level == "note"


@pytest.mark.parametrize(
    ("driver", "driver_cuda", "torch", "runtime", "level"),
    [
        ("580.65.06", "13.0", "13.0", "13.0", "ok"),
        ("570.124.06", "12.8", "13.0", "12.8", "problem"),
        ("570.124.06", "12.8", "12.8", "13.0", "problem"),
        ("570.124.06", "12.8", "12.6", "12.8", "ok"),
        ("535.104.05", "13.0", "13.0", "13.0", "ok"),  # forward compatibility
        ("470.57.02", None, "12.6", None, "problem"),
        ("470.57.02", "11.4", None, None, "ok"),
    ],
)
def test_the_driver_is_held_to_the_newest_cuda_of_both(driver, driver_cuda, torch, runtime, level):
    card = gpu.Gpu(present=True, driver=driver, cuda=driver_cuda)
    found = gpu.check_driver(card, torch, runtime)
    assert found.level == level
    assert driver in found.found


# ---- the machine


@pytest.mark.parametrize(
    ("changes", "gpus", "level", "fix"),
    [
        ({"f_blocks": 16384, "f_bavail": 16384}, 1, "note", "docker run --shm-size=8g"),
        ({"f_blocks": 16384, "f_bavail": 16384}, 4, "problem", "docker run --shm-size=8g"),
        ({"f_bavail": 0}, 0, "note", "delete what is left over"),
        ({}, 4, "ok", ""),
    ],
)
def test_little_shared_memory_is_named(monkeypatch, changes, gpus, level, fix):
    disk(monkeypatch, **changes)
    found = machine.check_shared_memory(gpus=gpus)
    assert found.level == level
    assert "/dev/shm has " in found.found
    assert found.fix.startswith(fix)


def test_no_shared_memory_at_all_is_named(monkeypatch, tmp_path):
    assert machine.check_shared_memory(tmp_path / "absent").level == "ok"  # as on macOS

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", full)
    found = machine.check_shared_memory()
    assert found.level == "problem"
    assert "no lock between processes can be made in /dev/shm" in found.found
    assert found.fix.startswith("ls -la /dev/shm, and delete")
    assert "--shm-size=8g" in found.fix


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limits_are_named(tmp_path, version):
    """As Docker shows them: the group's own folder is not to be seen, its limits are at the top."""
    write(
        tmp_path / "proc/meminfo",
        "MemTotal: 64000000 kB\nMemFree: 1 kB\nMemAvailable: 60000000 kB\n",
    )
    groups = tmp_path / "sys/fs/cgroup"
    if version == 2:
        write(tmp_path / "proc/self/cgroup", "0::/docker/abc\n")
        write(groups / "memory.max", "1500000000\n")
        write(groups / "cpu.max", "150000 100000\n")
    else:
        write(
            tmp_path / "proc/self/cgroup", "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n"
        )
        write(groups / "memory/memory.limit_in_bytes", "1500000000\n")
        write(groups / "cpu/cpu.cfs_quota_us", "150000\n")
        write(groups / "cpu/cpu.cfs_period_us", "100000\n")
    memory = machine.check_memory(tmp_path)
    assert memory.level == "problem"
    assert "1.50 GB, the container's limit (65.54 GB in the machine)" in memory.found
    assert "docker run --memory" in memory.fix
    cores = machine.check_cores(tmp_path, usable=8, total=8)
    assert "1.5 of the machine's 8 may be used (the container's quota)" in cores.found
    assert cores.fix.startswith("export OMP_NUM_THREADS=1")
    pinned = machine.check_cores(tmp_path / "none", usable=2, total=8)
    assert "2 of the machine's 8 may be used (the affinity)" in pinned.found


def test_a_group_without_limits_limits_nothing(tmp_path):
    write(
        tmp_path / "proc/meminfo",
        "MemTotal: 64000000 kB\nMemFree: 1 kB\nMemAvailable: 60000000 kB\n",
    )
    write(tmp_path / "proc/self/cgroup", "4:memory:/a\n3:cpu:/a\n")
    write(tmp_path / "sys/fs/cgroup/memory/a/memory.limit_in_bytes", "9223372036854771712\n")
    write(tmp_path / "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "-1\n")
    write(tmp_path / "sys/fs/cgroup/cpu/a/cpu.cfs_period_us", "100000\n")
    assert machine.check_memory(tmp_path).level == "ok"
    assert machine.check_cores(tmp_path, usable=4, total=4).level == "ok"
    assert machine.check_memory(tmp_path / "none").level == "ok"


def test_no_place_for_temporary_files_is_named(monkeypatch):
    def none():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    found = machine.check_temporary()
    assert found.level == "problem"
    assert "export TMPDIR" in found.fix


def test_no_compiler_is_a_note():
    found = machine.check_compiler(["no-such-compiler"])
    assert (found.level, "apt install g++" in found.fix) == ("note", True)


@pytest.mark.parametrize(
    ("facts", "ended", "fault", "fix"),
    [
        ({"endpoint": "E", "offline": True}, "", "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"),
        (
            {"endpoint": "E", "error": "[SSL: CERTIFICATE_VERIFY_FAILED]"},
            "",
            "E cannot be reached",
            "export SSL_CERT_FILE",
        ),
        ({}, "no answer in 30 s", "(no answer in 30 s)", "--encoder-weights FILE"),
    ],
)
def test_a_hub_that_does_not_answer_is_a_note(facts, ended, fault, fix):
    found = machine.check_hub(outcome(facts, ended=ended))
    assert found.level == "note"
    assert fault in found.found
    assert fix in found.fix


def test_a_hub_that_answers_with_an_error_is_reachable(tmp_path, monkeypatch):
    code = "import http.server as h; s = h.HTTPServer(('127.0.0.1', 0), h.BaseHTTPRequestHandler)"
    code += "; print(s.server_port, flush=True); s.handle_request()"  # 501: it knows no HEAD
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.stdout.readline().strip()}")
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        found = machine.check_hub(probed("hub"))
        server.kill()
    assert found.level == "ok", found


# ---- where the cache is


@pytest.mark.parametrize(
    ("changes", "check", "fault", "fix"),
    [
        ({"f_bavail": 100}, "disk", "full: 409.6 kB free", "make room"),
        ({"f_bavail": 2.5e6}, "disk", "10.24 GB free", "make room"),
        ({"f_favail": 3}, "inodes", "3 more files fit", "delete files"),
        ({"f_favail": 5000}, "inodes", "5,000 more files fit", "extract with --set shard_rows"),
    ],
)
def test_a_full_disk_is_named(monkeypatch, tmp_path, changes, check, fault, fix):
    found = storage.place(tmp_path)
    disk(monkeypatch, **changes)
    (one,) = [finding for finding in storage.check_space(found) if finding.level != "ok"]
    assert one.check == check
    assert one.found.startswith(fault)
    assert one.fix.startswith(fix)
    assert one.level == ("problem" if min(changes.values()) < 1000 else "note")


def test_a_disk_that_counts_no_files_is_no_full_one(monkeypatch, tmp_path):
    disk(monkeypatch, f_files=0, f_favail=0)
    assert [one.check for one in storage.check_space(storage.place(tmp_path))] == ["disk"]


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.EROFS, "sudo mount -o remount,rw "),
        (errno.EACCES, "choose a folder that is yours, or: sudo chown"),
        (errno.ENOSPC, "make room: df -h"),
        (errno.EDQUOT, "make room: df -h"),
        (errno.EIO, "the disk fails"),
    ],
)
def test_a_place_that_cannot_be_written_is_named(tmp_path, monkeypatch, cache, number, fix):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    (folder,) = storage.check_disk(storage.place(tmp_path), gpu=False)
    assert folder.level == "problem"
    assert f"{tmp_path} cannot be written to: {os.strerror(number)}" in folder.found
    assert folder.fix.startswith(fix)
    read_only, *_ = storage.check_disk(storage.place(cache.path), gpu=False)
    assert read_only.level == "note"
    assert "extract cannot append" in read_only.found
    assert read_only.fix.startswith(fix)


MOUNTS = """
mount -t tmpfs -o size=16m tmpfs {folder} && cp -r {cache} {folder}/c.zarr || exit 99
mount -o remount,ro {folder} && mount -t tmpfs -o size=64k tmpfs /dev/shm || exit 99
dd if=/dev/zero of=/dev/shm/full bs=1k 2>/dev/null
echo mounted
exec {python} -c '
from pathlib import Path
from kdcache.doctor import machine, storage
found = storage.place(Path("{folder}/c.zarr"))
for one in [machine.check_shared_memory(), *storage.check_space(found), *storage.check_disk(found, False)]:
    print(one.level, one.check, one.found, one.fix, sep="|")'
"""


def test_a_really_read_only_cache_and_a_really_full_shared_memory_are_named(cache, tmp_path):
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare here")
    script = MOUNTS.format(folder=tmp_path, cache=cache.path, python=sys.executable)
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if "mounted" not in done.stdout:
        pytest.skip(f"no mounts can be made here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    found = {one[1]: one for one in (line.split("|") for line in done.stdout.splitlines()[1:])}
    assert found["shared memory"][0] == "problem"
    assert "No space left on device" in found["shared memory"][2]
    assert found["shared memory"][3].startswith("ls -la /dev/shm, and delete what is left over")
    assert found["disk"][0] == "note"  # what is there can be read
    assert found["writing"][0] == "note"
    assert "c.zarr cannot be written to: Read-only file system" in found["writing"][2]
    assert found["writing"][3].startswith(f"sudo mount -o remount,rw {tmp_path} ")


def test_a_read_only_cache_is_timed_by_its_own_shards(tmp_path, monkeypatch):
    write(tmp_path / "zarr.json", "{}")
    shard = write(tmp_path / "features/tap/codes_x1/c.0.0.0.0", "")
    shard.write_bytes(os.urandom(20 * 2**20))

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    _, speed = storage.check_disk(storage.place(tmp_path), gpu=False)
    assert speed.check == "speed"
    assert speed.values["read_bytes_per_s"] > 0
    assert "write_bytes_per_s" not in speed.values


def test_a_slow_disk_is_named_with_its_rows(monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "_read_rate", lambda *_: 53e6)
    speeds = [storage.check_disk(storage.place(tmp_path), gpu=gpu)[-1] for gpu in (False, True)]
    assert [one.level for one in speeds] == ["ok", "note"]
    assert "reads 53.00 MB/s, 10 rows/s" in speeds[1].found
    assert "copy the cache to a local disk" in speeds[1].fix


def test_timing_a_disk_leaves_nothing_even_when_killed(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from kdcache.doctor import storage
storage._read_rate = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
storage.check_disk(storage.place(Path({str(tmp_path)!r})), gpu=False)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_is_not_there_is_looked_at_where_it_would_be(tmp_path):
    near, far = storage.place(tmp_path / "new.zarr"), storage.place(tmp_path / "disk2/new.zarr")
    assert near.folder == far.folder == tmp_path
    assert storage.check_place(near).level == "ok"
    assert "nor does the folder" in storage.check_place(far).found
    assert storage.check_place(far).fix.startswith(f"mkdir -p {tmp_path}/disk2")
    assert storage.check_place(storage.place(tmp_path)) is None


def test_a_path_that_is_no_folder_is_named(tmp_path):
    write(tmp_path / "photo.jpg", "")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name, kind in (("photo.jpg", "a file"), ("link", "a link that leads nowhere")):
        found = storage.check_place(storage.place(tmp_path / name))
        assert (found.level, kind in found.found) == ("problem", True)


def test_a_damaged_cache_is_named(cache, tmp_path):
    path = tmp_path / "c.zarr"
    shutil.copytree(cache.path, path)
    root = path / "zarr.json"
    root.write_text(root.read_text().replace('"size_px": 64', '"size_px": 65'))
    assert storage.place(path).is_cache
    (found,) = storage.check_cache(probed("cache", str(path)), path)
    assert found.level == "problem"
    assert f"{path}/zarr.json" in found.found
    assert found.fix.startswith(f"kdcache verify {path}")


def test_a_cache_that_a_writer_has_open_is_told(cache, tmp_path):
    path = tmp_path / "c.zarr"
    shutil.copytree(cache.path, path)
    descriptor = os.open(path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        found = storage.check_cache(probed("cache", str(path)), path)
    finally:
        os.close(descriptor)
    assert [one.level for one in found] == ["note", "ok"]
    assert "a writer has" in found[0].found
    assert found[0].fix.endswith(f"fuser -v {path}")


def test_a_cache_whose_libraries_are_broken_says_so(cache, tmp_path, monkeypatch):
    write(tmp_path / "numcodecs.py", "raise ImportError('zfpy')")
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = storage.check_cache(probed("cache", str(cache.path)), cache.path)
    assert found.level == "problem"
    assert "cannot be opened: ImportError: zfpy" in found.found


# ---- the report


def test_a_check_that_fails_itself_hides_no_other():
    def buggy():
        raise ZeroDivisionError("of bytes\nby nothing")

    (found,) = isolated("disk", buggy)
    assert (found.check, found.level) == ("disk", "problem")
    assert "failed itself, with ZeroDivisionError: of bytes by nothing" in found.found
    assert found.fix


def checkup_of(*findings):
    well = all(one.level != "problem" for one in findings)
    return Checkup(ok=well, kdcache="0", path=".", findings=list(findings), seconds=1.0)


def test_problems_stand_last_with_their_fix_below():
    report = checkup_of(
        problem("disk", "full", "make room"), ok("python", "3.12"), note("gpu", "none", "nothing")
    )
    text = checkup_text(report)
    places = [text.index(part) for part in ("3.12", "none", "full", "fix: make room", "NOT OK: 1")]
    assert places == sorted(places)
    assert "1 problem, 1 note" in text
    assert checkup_text(checkup_of(ok("a", "b"))).endswith("works here: no problem")


@pytest.mark.parametrize(("found", "status"), [(note, 0), (problem, 1)])
def test_only_a_problem_is_exit_status_1(monkeypatch, found, status):
    monkeypatch.setattr(
        checkups, "checkup", lambda _: checkup_of(found("disk", "full", "make room"))
    )
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == status
    assert "fix: make room" in result.stdout
    as_json = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)
    assert as_json["ok"] is (status == 0)
    assert as_json["findings"][0]["fix"] == "make room"


def test_urls_of_an_unknown_kind_are_refused():
    result = CliRunner().invoke(main, ["doctor", "nothing://bucket/coco.zarr"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: nothing://: ")
