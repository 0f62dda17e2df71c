"""torch and ONNX Runtime at work: what really starts, and what is in the way where it does not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kdcache.doctor.children import Outcome
from kdcache.doctor.finding import Finding, note, ok, one_line, problem
from kdcache.doctor.gpu import Gpu
from kdcache.doctor.packages import release
from kdcache.tables import megabytes

CPU, CUDA, TENSORRT = (
    "CPUExecutionProvider",
    "CUDAExecutionProvider",
    "TensorrtExecutionProvider",
)
_RIGHT = 9.0  # the probe's graph of ones
# Both frozen models at 640 px, or a student's step of batch 4, with room for the runtime itself.
_LITTLE_GPU_BYTES = 4e9


def check_torch(outcome: Outcome, gpu: Gpu) -> list[Finding]:
    """That torch computes on every GPU there is; nothing where it cannot even be imported."""
    facts = outcome.facts
    if "torch" not in facts:
        return []
    built = f"CUDA {facts['cuda']}, cuDNN {cudnn_text(facts['cudnn'])}" if facts["cuda"] else "CPUs"
    if facts["rocm"]:
        built = f"ROCm {facts['rocm']}"
    built = f"torch {facts['torch']}, built for {built}"
    values = {"torch": facts["torch"], "cuda": facts["cuda"], "cudnn": facts["cudnn"]}
    if outcome.ended and outcome.began == "CUDA":
        return [
            problem(
                "torch",
                f"{built}: using a GPU, {outcome.ended}",
                "see the driver above; with several GPUs try one: CUDA_VISIBLE_DEVICES=0",
                **values,
            )
        ]
    if not facts.get("gpus"):
        if not gpu.wanted:
            return [ok("torch", built, **values)]
        fix = "bring the driver in order (above); in a container: docker run --gpus all …"
        if not facts["cuda"] and not facts["rocm"]:
            fix = "pip uninstall -y torch torchvision && pip install torch torchvision"
        why = " ".join(re.findall(r"CUDA initialization: (.+?)(?:\(Triggered|$)", outcome.stderr))
        found = f"{built}: it cannot use the GPU that is here" + (
            f": {one_line(why)}" if why else ""
        )
        return [problem("torch", found, fix, **values)]
    return [ok("torch", built, **values), *(_gpu(one) for one in facts["gpus"])]


def _gpu(one: Mapping[str, Any]) -> Finding:
    if error := one.get("error"):
        fix = "see the driver above; another process may hold the GPU: nvidia-smi"
        if "no kernel image" in error or "not compatible" in error:
            fix = "install a build of torch for this GPU: the newest ones leave old GPUs out"
        if "out of memory" in error:
            fix = "nvidia-smi   (shows which processes hold its memory)"
        return problem("gpu", f"{one['name']}: torch cannot compute on it: {one_line(error)}", fix)
    found = f"{one['name']}, {megabytes(one['free_bytes'])} of {megabytes(one['total_bytes'])} free"
    if one["free_bytes"] < _LITTLE_GPU_BYTES:
        return note(
            "gpu",
            found,
            "nvidia-smi   (shows who holds the memory); or --batch-size 1 --mixed-precision",
            **one,
        )
    return ok("gpu", found, **one)


def cudnn_text(version: int | str) -> str:
    """92400 as 9.24.0."""
    number = int(version)
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def check_providers(outcomes: Mapping[str, Outcome], gpu: Gpu, torch: Outcome) -> list[Finding]:
    """That every provider which kdcache may use runs a graph, and by itself."""
    basic = outcomes[CPU]
    if error := basic.module_error("onnxruntime"):
        fix = _FIXES[_NO_ANSWER] if _NO_ANSWER in error else _REINSTALL
        return [problem("onnxruntime", f"onnxruntime cannot be imported: {one_line(error)}", fix)]
    if why(basic):
        return [_starts(CPU, basic)]
    if not gpu.wanted:  # that GPUs' providers stay away is as it should be
        broken = [name for name, one in outcomes.items() if re.search(_MISSING_FILE, why(one))]
        findings = [_starts(name, outcomes[name]) for name in broken] or [_without_gpu(outcomes)]
    else:
        findings = [_starts(name, outcome) for name, outcome in outcomes.items()]
    return findings + _together(outcomes[CUDA], gpu, torch)


def _without_gpu(outcomes: Mapping[str, Outcome]) -> Finding:
    facts = outcomes[CPU].facts
    reasons = {name: why(outcome) for name, outcome in outcomes.items() if why(outcome)}
    text = f"ONNX Runtime {facts['version']} runs a graph on the CPU"
    if reasons:
        absent = ", ".join(f"{_short(name)}: {reason}" for name, reason in reasons.items())
        text += f"; not, without a GPU, on {absent}"
    return ok("providers", text, version=facts["version"], did_not_start=reasons)


def _short(provider: str) -> str:
    return {CUDA: "CUDA", TENSORRT: "TensorRT"}.get(provider, "the CPU")


def why(outcome: Outcome) -> str:
    """Why the provider of this probe did not start; empty when it did, and computed rightly."""
    facts = outcome.facts
    if error := outcome.module_error("onnxruntime") or outcome.ended:
        return one_line(error)
    if "active" in facts and outcome.began in facts["active"]:
        right = facts["result"] == _RIGHT
        return "" if right else f"it computes {facts['result']} where {_RIGHT} is right"
    return _refusal(facts, outcome.stderr)


def _refusal(facts: Mapping[str, Any], stderr: str) -> str:
    if "lacks" in facts:
        return f"{facts['lacks']} is missing"
    library = re.search(r"Failed to load library \S*?([^/\s]+) with error: (.+)", stderr)
    if library:
        return f"{library[1]} does not load ({one_line(re.sub(*_MISSING, library[2]))})"
    if "error" in facts:
        return one_line(facts["error"])
    if "active" in facts:
        last = [line for line in stderr.splitlines() if line.strip()][-1:]
        return one_line(last[0]) if last else f"it runs on {', '.join(facts['active'])}"
    return f"this onnxruntime has {', '.join(facts.get('listed', [])) or 'no provider'}"


# the loader's words, of which the path is not always there
_MISSING = (
    r"(?:\S*/)?(\S+): cannot open shared object file: No such file or directory",
    r"\1 is missing",
)


def _starts(name: str, outcome: Outcome) -> Finding:
    reason, facts = why(outcome), outcome.facts
    if not reason:
        cudnn = ", ".join(cudnn_text(version) for version in facts["cudnn"].values())
        with_cudnn = f", with cuDNN {cudnn}" if cudnn and name != CPU else ""
        return ok(
            "providers",
            f"ONNX Runtime {facts['version']} runs a graph on {_short(name)}{with_cudnn}",
            provider=name,
            active=facts["active"],
            cudnn=facts["cudnn"],
        )
    found = f"{name} does not start: {reason}"
    if name == TENSORRT:
        return note(
            "providers",
            found,
            "nothing, unless --device tensorrt is wanted: pip install "
            f"{_tensorrt(reason, facts.get('cuda'))}",
            provider=name,
        )
    return problem("providers", found, _fix(name, reason, facts), provider=name)


def _tensorrt(reason: str, cuda: str | None) -> str:
    """The package that has the libnvinfer which is missing."""
    major = re.search(r"libnvinfer\.so\.(\d+)", reason)
    name = f"tensorrt-cu{release(cuda)[0]}" if cuda else "tensorrt"
    return f'"{name}=={major[1]}.*"' if major else name


def _fix(name: str, reason: str, facts: Mapping[str, Any]) -> str:
    for pattern, fix in _FIXES.items():
        if re.search(pattern, reason):
            return fix.format(cuda=facts.get("cuda") or "its own version")
    if name == CPU:
        return _REINSTALL
    if name not in facts.get("listed", [name]):
        return f"{_ANEW}   (the plain onnxruntime has no CUDA)"
    return f"bring the driver in order (above); else: {_ANEW}; or --device cpu"


_REINSTALL = "pip install --force-reinstall onnxruntime-gpu   (macOS, Arm: onnxruntime)"
_ANEW = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
_MISSING_FILE = r"onnxruntime_providers_\w+\.so is missing"
_NO_ANSWER = "no answer in"
_FIXES = {
    _NO_ANSWER: "run `kdcache doctor` once more: the first import reads much from the disk; should it "
    "stay, nvidia-smi shows whether the GPU answers",
    "No module named": "pip install what is not there   (the line `imports` has the names)",
    _MISSING_FILE: f"{_ANEW}   (a file of the package is missing)",
    r"libcuda\.so": "the driver's own library is missing: docker run --gpus all …, or install the "
    "driver",
    r"lib(cudart|cublas|cublasLt|cudnn|cufft|curand|nvrtc)\b": "this onnxruntime-gpu takes the "
    "libraries of CUDA {cuda} from torch: install a torch built for that, and unset LD_LIBRARY_PATH",
}


def _together(cuda: Outcome, gpu: Gpu, torch: Outcome) -> list[Finding]:
    """That torch and ONNX Runtime can share one process: CUDA of one major, and one cuDNN."""
    findings: list[Finding] = []
    theirs, ours = torch.facts.get("cuda"), cuda.facts.get("cuda")
    if theirs and ours and release(theirs)[0] != release(ours)[0]:
        level = problem if gpu.wanted else note
        findings.append(
            level(
                "cuda",
                f"torch was built for CUDA {theirs}, onnxruntime-gpu for CUDA {ours}: ONNX Runtime "
                "finds none of the libraries that it needs",
                f"install a torch for CUDA {release(ours)[0]}, or an onnxruntime-gpu for CUDA "
                f"{release(theirs)[0]}",
                torch_cuda=theirs,
                onnxruntime_cuda=ours,
            )
        )
    elif theirs and ours:
        both = f"torch is built for CUDA {theirs}, onnxruntime-gpu for {ours}: they share libraries"
        findings.append(ok("cuda", both, torch_cuda=theirs, onnxruntime_cuda=ours))
    found = cuda.facts.get("cudnn") or {}
    if len(found) > 1:
        versions = ", ".join(f"{cudnn_text(v)} ({path})" for path, v in found.items())
        findings.append(
            problem(
                "cudnn",
                f"two cuDNN are loaded at once: {versions}",
                "unset LD_LIBRARY_PATH   (torch's wheel brings the cuDNN that both use)",
                cudnn=found,
            )
        )
    return findings
