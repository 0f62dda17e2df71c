"""Python and what is installed in it: versions, pairs that must match, libraries that do not load."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata

from kdcache.doctor.children import Outcome
from kdcache.doctor.finding import Finding, note, ok, one_line, problem

Installed = Mapping[str, str]  # distribution, in lower case and with hyphens, to version

_OLDEST_PYTHON = (3, 11)
# Each puts its files into one folder `onnxruntime`: the last that was installed wins, in part.
_RUNTIMES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-rocm",
    "onnxruntime-training",
    "ort-nightly",
    "ort-nightly-gpu",
)
# Import names of what kdcache needs beside torch, of which the last two are for many machines.
MODULES = (
    "numpy",
    "numcodecs",
    "zarr",
    "zstandard",
    "google_crc32c",
    "array_api_compat",
    "cv2",
    "PIL.Image",
    "pycocotools.mask",
    "onnx",
    "onnxscript",
    "pydantic",
    "safetensors",
    "tensorboard",
    "matplotlib",
    "jinja2",
    "dask",
    "distributed",
)
TORCH_MODULES = ("torch", "torchvision", "timm", "segmentation_models_pytorch")
_DISTRIBUTIONS = {
    "cv2": "opencv-python-headless",
    "PIL.Image": "pillow",
    "pycocotools.mask": "pycocotools",
    "google_crc32c": "google-crc32c",
    "array_api_compat": "array-api-compat",
    "segmentation_models_pytorch": "segmentation-models-pytorch",
}


def installed() -> dict[str, str]:
    """Every distribution that this Python finds; of doubles the one that is imported."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name:  # a removal that was interrupted leaves folders without one
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version)
    return found


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> Finding:
    """That Python is new enough."""
    text = ".".join(map(str, version))
    if version[:2] < _OLDEST_PYTHON:
        return problem(
            "python",
            f"Python {text}; kdcache needs 3.11 or newer",
            "python3.11 -m venv .venv && .venv/bin/pip install -e .   (or: uv run kdcache doctor)",
            version=text,
        )
    return ok(
        "python", f"{text} on {platform.system()} {platform.machine()}, {sys.prefix}", version=text
    )


def check_runtimes(packages: Installed) -> Finding:
    """That there is one distribution of ONNX Runtime."""
    found = {name: packages[name] for name in _RUNTIMES if name in packages}
    named = " and ".join(f"{name} {version}" for name, version in found.items())
    wanted = "onnxruntime-gpu" if "onnxruntime-gpu" in found else "onnxruntime"
    if len(found) > 1:
        return problem(
            "onnxruntime",
            f"{named} are installed at once, in one folder: which providers there are is chance",
            f"pip uninstall -y {' '.join(found)} && pip install {wanted}",
            installed=found,
        )
    if not found:
        return problem(
            "onnxruntime",
            "no ONNX Runtime is installed",
            "pip install onnxruntime-gpu   (macOS, Arm: onnxruntime)",
            installed=found,
        )
    return ok("onnxruntime", f"{named}, no other beside it", installed=found)


def check_torch_pair(packages: Installed) -> Finding | None:
    """That torch and torchvision were released together: 2.N goes with 0.(N + 15)."""
    torch, vision = packages.get("torch"), packages.get("torchvision")
    if torch is None or vision is None or release(torch)[0] != 2:
        return None
    fits = (0, release(torch)[1] + 15)
    if release(vision)[:2] == fits:
        return ok("torchvision", f"torchvision {vision} is the one for torch {torch}")
    return problem(
        "torchvision",
        f"torchvision {vision} is not the one for torch {torch}, which is {fits[0]}.{fits[1]}",
        f'pip install "torchvision=={fits[0]}.{fits[1]}.*"',
        torch=torch,
        torchvision=vision,
    )


def check_zfpy(packages: Installed) -> Finding | None:
    """That no `zfpy` is there which keeps numcodecs from being imported."""
    if packages.get("zfpy") != "1.0.1.post0":
        return None
    return problem(
        "numcodecs",
        "zfpy 1.0.1.post0 is installed: with it numcodecs fails to import, and no cache opens",
        "pip uninstall -y zfpy   (kdcache does not use it)",
        zfpy="1.0.1.post0",
    )


def check_versions(packages: Installed, required: Sequence[str] | None = None) -> list[Finding]:
    """That what kdcache requires is there in a version it works with.

    `required` are requirements as in a distribution's metadata, by default kdcache's own.
    """
    if required is None:
        try:
            required = metadata.requires("kdcache") or []
        except metadata.PackageNotFoundError:
            return [
                note(
                    "packages",
                    "kdcache is not installed in this Python, so versions were not compared",
                    "pip install -e .   (in kdcache's folder)",
                )
            ]
    unfit: list[Finding] = []
    for requirement in required:
        specifier, _, marker = requirement.partition(";")
        name = re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", specifier)[0]).lower()
        if marker.strip() or name in _RUNTIMES:  # which runtime it must be depends on the machine
            continue
        bounds = specifier.strip()[len(name) :].strip()
        version = packages.get(name)
        if version is not None and _within(version, bounds):
            continue
        has = "is not installed" if version is None else f"{version} is installed"
        needs = re.sub(r"^\[.*?\]", "", bounds)
        unfit.append(
            problem(
                name,
                f"{name} {has}; kdcache needs {name}{needs}",
                f'pip install "{name}{bounds}"',
                version=version,
            )
        )
    if unfit:
        return unfit
    shown = [f"{name} {packages[name]}" for name in ("zarr", "numpy", "dask") if name in packages]
    return [ok("packages", f"{len(required)} requirements are met ({', '.join(shown)})")]


def check_imports(outcome: Outcome, names: Sequence[str]) -> list[Finding]:
    """That each library can be imported; `outcome` is of the probe that tried."""
    errors = {name: error for name in names if (error := outcome.module_error(name))}
    absent = [name for name, error in errors.items() if f"No module named '{_top(name)}'" in error]
    findings = [_broken(name, error) for name, error in errors.items() if name not in absent]
    if absent:
        distributions = " ".join(_DISTRIBUTIONS.get(name, name) for name in absent)
        text = f"not installed: {', '.join(absent)}"
        findings.append(problem("imports", text, f"pip install {distributions}"))
    if outcome.ended and not outcome.began:
        findings.append(
            problem(
                "python",
                f"a second Python could not be started: {one_line(outcome.ended)}",
                f"look at what this prints: {sys.executable} -X faulthandler -c 'import kdcache'",
            )
        )
    if findings:
        return findings
    versions = {name: outcome.modules[name]["version"] for name in names if name in outcome.modules}
    first, last = names[0], names[-1]
    found = f"{first} … {last}: {len(versions)} libraries load"
    return [ok("imports", found, versions=versions)] if versions else []


def _broken(name: str, error: str) -> Finding:
    distribution = _DISTRIBUTIONS.get(name, name)
    fix = f"pip install --force-reinstall {distribution}"
    for pattern, better in _FIXES:
        if re.search(pattern, error):
            fix = better.format(name=distribution)
            break
    optional = name in ("dask", "distributed", "tensorboard", "matplotlib", "jinja2")
    found = f"{name} cannot be imported: {one_line(error)}"
    return (note if optional else problem)(distribution, found, fix)


def _top(name: str) -> str:
    return name.split(".", maxsplit=1)[0]


# What a message means, the first that is found in it.
_FIXES = (
    ("zfpy", "pip uninstall -y zfpy   (kdcache does not use it)"),
    (
        r"libGL|libgthread|libSM",
        "pip uninstall -y opencv-python opencv-python-headless && "
        "pip install opencv-python-headless",
    ),
    (
        r"torchvision::nms|different CUDA major versions|_is_tracing",
        "pip install --force-reinstall torch torchvision   (both at once: they must be a pair)",
    ),
    (
        r"lib(cudart|cublas|cublasLt|cudnn|nccl|cusparse\w*|cufft|nvJitLink|cupti|nvrtc)[\w.-]*\.so",
        "pip install --force-reinstall {name}   (its wheel brings the CUDA libraries); an "
        "LD_LIBRARY_PATH to another CUDA must go",
    ),
    (
        r"GLIBC_|GLIBCXX_|CXXABI_",
        "pip install --force-reinstall {name}, and unset LD_LIBRARY_PATH: this system's C library is "
        "older than the wheel asks for",
    ),
    (
        r"SIGILL",
        "pip install --no-binary {name} --force-reinstall {name}: the wheel is for a newer processor",
    ),
    (r"no answer in", "run `kdcache doctor` once more: the first import reads much from the disk"),
    (
        r"numpy\.(core|_core)|numpy\.dtype size|ABI|_ARRAY_API",
        "pip install --force-reinstall {name}: it was built for another numpy",
    ),
)


def _within(version: str, bounds: str) -> bool:
    """Whether a version lies in bounds such as `[extra]>=0.5,<0.7`; others than >= and < hold."""
    found = release(version)
    for comparison, bound in re.findall(r"(>=|<)\s*([\d.]+)", bounds):
        if (found >= release(bound)) != (comparison == ">="):
            return False
    return True


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, at least three: 2.14.1+cu130 is (2, 14, 1)."""
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    parts = [int(part) for part in numbers[0].split(".")] if numbers else []
    return tuple(parts + [0] * (3 - len(parts)))
