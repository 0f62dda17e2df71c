"""ONNX Runtime sessions that run where they were asked to, or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np

# torch first: its wheel carries the CUDA libraries that onnxruntime-gpu's providers need.
import torch
from numpy.typing import NDArray
from onnx import load_model_from_string
from torch import Tensor

import onnxruntime  # isort: skip

from kdcache.errors import DeviceMemoryError, ModelError, ProviderError, device_memory

Device = Literal["auto", "cpu", "cuda", "tensorrt"]

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}

_CUDA_OPTIONS = {
    # batches all have one shape, so memory need not grow in powers of two beside torch's own
    "arena_extend_strategy": "kSameAsRequested",
    "use_tf32": "0",
}
_LIBRARIES = {
    "cuda": "check the driver and the CUDA libraries (onnxruntime-gpu uses those of the installed torch, "
    "both must be built for one CUDA version)",
    "tensorrt": "check that TensorRT is installed, of the version that this onnxruntime-gpu was built for "
    "(`pip install tensorrt`, or libnvinfer on the loader's path)",
}
_TF32_VARIABLE = "NVIDIA_TF32_OVERRIDE"


def torch_device(device: str) -> str:
    """Where torch keeps what a model on `device` takes and gives."""
    return "cpu" if device == "cpu" else "cuda"


class OnnxNetwork:
    """An ONNX graph from one image input to its first outputs, on one device.

    Hides whether the graph's batch is dynamic or fixed and its input float32 or float16. `outputs`
    is how many of the graph's are wanted. With
    `photos` the graph takes uint8 pixels, (N, size, size, 3). `spinning` lets idle threads wait
    busily on the CPU, as is onnxruntime's default. Raises ModelError when it does not load
    or does not take (N, 3, size, size), or those, ProviderError when ONNX Runtime fell back to
    another provider than `device` ('cpu', 'cuda', 'tensorrt') needs.
    """

    def __init__(
        self,
        model: bytes,
        path: Path,
        device: str,
        size_px: int,
        *,
        outputs: int = 1,
        photos: bool = False,
        spinning: bool = False,
    ) -> None:
        self._path = path
        self.device = torch_device(device)
        self._session = _open_session(model, path, device, spinning)
        self._outputs = self._session.get_outputs()[:outputs]
        # results of other types, such as float64, are converted there
        self._through_host = self.device == "cpu" or any(
            output.type not in _DTYPES for output in self._outputs
        )
        self._shapes: list[torch.Size] = []  # of an image's outputs, once they were computed
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            names = ", ".join(f"{i.name} {i.shape}" for i in inputs)
            raise ModelError(f"{path}: expected one image input, the graph has {names}")
        (self._input,) = inputs
        shape, kind = self._input.shape, self._input.type
        sizes = (size_px, size_px, 3) if photos else (3, size_px, size_px)
        sizes_fit = len(shape) == 4 and all(
            not isinstance(found, int) or found == wanted
            for found, wanted in zip(shape[1:], sizes, strict=True)
        )
        dtypes = _PHOTO_DTYPES if photos else _DTYPES
        if kind not in dtypes or not sizes_fit:
            raise ModelError(
                f"{path}: expected a {'uint8' if photos else 'float32 or float16'} input "
                f"(N, {', '.join(map(str, sizes))}), "
                f"{self._input.name} is {kind} {shape}; set --size to what the model takes"
            )
        self._dtype = dtypes[kind]
        self._fixed_batch = shape[0] if isinstance(shape[0], int) else None

    def __call__(self, inputs: Tensor) -> Tensor:
        """The first output for inputs on `device`, as float32 there."""
        return self.outputs(inputs)[0]

    def outputs(self, inputs: Tensor) -> list[Tensor]:
        """All wanted outputs for inputs on `device`, as float32 there."""
        parts = [
            [output[:count] for output in self._computed(part)]
            for part, count in self._fixed_batches(inputs)
        ]
        return [
            (of_one[0] if len(parts) == 1 else torch.cat(of_one)).float()
            for of_one in zip(*parts, strict=True)
        ]

    def output_shapes(self, inputs: Tensor) -> list[tuple[int, ...]]:
        """Shapes of all outputs, in the graph's order."""
        part, _ = next(self._fixed_batches(inputs))
        return [output.shape for output in self._run(part)]

    def _computed(self, part: Tensor) -> list[Tensor]:
        """The wanted outputs of what the graph takes at once."""
        if not self._shapes or self._through_host:
            arrays = self._run(part)[: len(self._outputs)]
            outputs = [torch.from_numpy(array).to(self.device) for array in arrays]
            self._shapes = [output.shape[1:] for output in outputs]
            return outputs
        return self._bound(part)

    def _bound(self, part: Tensor) -> list[Tensor]:
        """The wanted outputs, read from and written to torch's memory: no way through the host."""
        results = [
            torch.empty((len(part), *shape), dtype=_DTYPES[output.type], device=self.device)
            for output, shape in zip(self._outputs, self._shapes, strict=True)
        ]
        binding = self._session.io_binding()
        bound = [(binding.bind_input, self._input.name, part)]
        bound += [
            (binding.bind_output, output.name, result)
            for output, result in zip(self._outputs, results, strict=True)
        ]
        for bind, name, tensor in bound:
            element = _NUMPY_DTYPES[tensor.dtype]
            bind(name, self.device, 0, element, tuple(tensor.shape), tensor.data_ptr())
        if part.is_cuda:  # ONNX Runtime has a stream of its own, and must not begin before torch's
            torch.cuda.current_stream().synchronize()
        with self._errors():
            self._session.run_with_iobinding(binding)
        return results

    def _fixed_batches(self, inputs: Tensor) -> Iterator[tuple[Tensor, int]]:
        """The inputs in the batches the graph takes, each with the count of its real images.

        With a fixed batch the last, smaller part is padded with its own last image.
        """
        inputs = inputs.to(self._dtype).contiguous()
        size = self._fixed_batch or len(inputs)
        for start in range(0, len(inputs), size):
            part = inputs[start : start + size]
            missing = size - len(part)
            padding = part[-1:].expand(missing, -1, -1, -1)
            yield (torch.cat([part, padding]) if missing else part), len(part)

    def _run(self, inputs: Tensor) -> list[NDArray[np.generic]]:
        """All outputs, in host memory."""
        with self._errors():
            outputs: list[NDArray[np.generic]] = self._session.run(
                None, {self._input.name: inputs.cpu().numpy()}
            )
        return outputs

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with device_memory(f"running {self._path.name}", "lower --batch-size or --size"):
                yield
        except DeviceMemoryError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions share no base
            raise ModelError(f"{self._path}: ONNX Runtime cannot run it: {error}") from error


_DTYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}
_PHOTO_DTYPES = {"tensor(uint8)": torch.uint8}
_NUMPY_DTYPES = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.uint8: np.uint8,
}


_threads = 0  # of a session on the CPU; 0: one a core


def use_threads(count: int) -> None:
    """Let this process's models, opened from now on, compute in so many threads."""
    global _threads  # noqa: PLW0603 - as torch's own
    _threads = count
    torch.set_num_threads(count)


def _open_session(model: bytes, path: Path, device: str, spinning: bool) -> Any:
    wanted = _PROVIDERS[device]
    if wanted not in onnxruntime.get_available_providers():
        raise ProviderError(
            f"--device {device}: this onnxruntime has no {wanted} (it has "
            f"{', '.join(onnxruntime.get_available_providers())}); install onnxruntime-gpu and make "
            "sure the plain onnxruntime is not installed beside it, or use --device cpu"
        )
    providers = _providers(model, device)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = _threads
    if device == "cpu" and not spinning:
        # its threads would spin on the cores that encode and compress rows beside them, and those of
        # a torch teacher: an extraction took 6 % longer, the model alone no less
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(
            model, options, providers=providers, enable_fallback=0
        )
    except Exception as error:  # ONNX Runtime's exceptions share no base
        why = " ".join(str(error).split())
        raise ModelError(f"{path}: ONNX Runtime cannot load it: {why}; {_told(model)}") from error
    active = session.get_providers()[0]
    if active != wanted:
        raise ProviderError(
            f"--device {device}: {wanted} did not start, ONNX Runtime would run on {active}; "
            f"{_LIBRARIES[device]}, or use --device cpu"
        )
    return session


def _providers(model: bytes, device: str) -> list[tuple[str, dict[str, str]]]:
    """What ONNX Runtime is asked for, the wanted provider first."""
    if device == "cpu":
        return [(_PROVIDERS[device], {})]
    cuda = (_PROVIDERS["cuda"], _CUDA_OPTIONS)
    if device == "cuda":
        return [cuda]
    # ONNX Runtime has no option for TensorRT's TF32, which is on (microsoft/onnxruntime#26029)
    os.environ.setdefault(_TF32_VARIABLE, "0")
    with contextlib.suppress(
        ImportError
    ):  # pip's package loads its libraries, which ONNX Runtime finds
        importlib.import_module("tensorrt")
    folder = engine_folder(model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProviderError(
            f"--device tensorrt: cannot keep engines in {folder}: {error}; point XDG_CACHE_HOME to a "
            "folder that can be written to"
        ) from error
    tensorrt = {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
    }
    # nodes that TensorRT does not know run on CUDA
    return [(_PROVIDERS["tensorrt"], tensorrt), cuda]


def engine_folder(model: bytes) -> Path:
    """Where TensorRT keeps the engines that it builds of a graph, for minutes, on the first run.

    Of this graph, GPU, and versions only: an engine of others is refused by TensorRT, or worse, not.
    """
    made_of = [hashlib.sha256(model).hexdigest(), onnxruntime.__version__]
    made_of += [torch.cuda.get_device_name(), os.environ[_TF32_VARIABLE]]
    made_of += [_version(package) for package in ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")]
    name = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:16]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "kdcache" / "tensorrt" / name


def _version(package: str) -> str:
    """Of TensorRT as a Python package; where it was installed otherwise, nothing.

    Then a newer TensorRT refuses the old engines, and says so.
    """
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _told(model: bytes) -> str:
    """The versions that a runtime may be too old for, and what can be done about that."""
    proto = load_model_from_string(model)
    opsets = ", ".join(f"{o.domain or 'ai.onnx'} {o.version}" for o in proto.opset_import)
    return (
        f"it has IR version {proto.ir_version} and operators of {opsets}: where those are newer than "
        f"ONNX Runtime {onnxruntime.__version__} knows, export the model with an older opset or install a "
        "newer onnxruntime"
    )
