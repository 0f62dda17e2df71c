"""ONNX Runtime sessions that run where they were asked to, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

# torch first: its wheel carries the CUDA libraries that onnxruntime-gpu's providers need.
import torch
from numpy.typing import NDArray
from onnx import load_model_from_string

import onnxruntime  # isort: skip

from kdcache.errors import DeviceMemoryError, ModelError, ProviderError, device_memory

F32 = NDArray[np.float32]
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


def resolve_device(device: Device) -> str:
    """`cpu`, `cuda` or `tensorrt`; auto is CUDA when torch sees a GPU."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


class OnnxNetwork:
    """An ONNX graph from one image input to its first output, on one device.

    Hides whether the graph's batch is dynamic or fixed and its input float32 or float16. Raises
    ModelError when the graph does not load or does not take (N, 3, size, size), ProviderError
    when ONNX Runtime fell back to another provider than `device` ('cpu', 'cuda', 'tensorrt') needs.
    """

    def __init__(self, model: bytes, path: Path, device: str, size_px: int) -> None:
        self._path = path
        self._torch_device = "cpu" if device == "cpu" else "cuda"
        self._session = _open_session(model, path, device)
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            names = ", ".join(f"{i.name} {i.shape}" for i in inputs)
            raise ModelError(f"{path}: expected one image input, the graph has {names}")
        (self._input,) = inputs
        shape, kind = self._input.shape, self._input.type
        sizes_fit = len(shape) == 4 and all(
            not isinstance(found, int) or found == wanted
            for found, wanted in zip(shape[1:], (3, size_px, size_px), strict=True)
        )
        if kind not in _INPUT_DTYPES or not sizes_fit:
            raise ModelError(
                f"{path}: expected a float32 or float16 input (N, 3, {size_px}, {size_px}), "
                f"{self._input.name} is {kind} {shape}; set --size to what the model takes"
            )
        self._dtype = _INPUT_DTYPES[kind]
        self._fixed_batch = shape[0] if isinstance(shape[0], int) else None

    def __call__(self, inputs_NCHW: F32) -> F32:
        """The first output for (N, 3, H, W) inputs, as float32 in host memory."""
        parts = [
            np.asarray(self._run(part)[0], np.float32)[:count]
            for part, count in self._fixed_batches(inputs_NCHW)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def output_shapes(self, inputs_NCHW: F32) -> list[tuple[int, ...]]:
        """Shapes of all outputs, in the graph's order."""
        part, _ = next(self._fixed_batches(inputs_NCHW))
        return [output.shape for output in self._run(part)]

    def on_device(self, inputs_NCHW: F32, shape: tuple[int, ...]) -> torch.Tensor:
        """The first output, (N, *shape) float32, where it was computed: no way through the host."""
        (dtype,) = (_OUTPUT_DTYPES[output.type] for output in self._session.get_outputs()[:1])
        parts = []
        for part, count in self._fixed_batches(inputs_NCHW):
            result = torch.empty((len(part), *shape), dtype=dtype, device=self._torch_device)
            binding = self._session.io_binding()
            binding.bind_cpu_input(self._input.name, np.ascontiguousarray(part))
            binding.bind_output(
                self._session.get_outputs()[0].name,
                self._torch_device,
                0,
                _NUMPY_DTYPES[dtype],
                tuple(result.shape),
                result.data_ptr(),
            )
            with self._errors():
                self._session.run_with_iobinding(binding)
            parts.append(result[:count].float())
        return torch.cat(parts)

    def _fixed_batches(self, inputs_NCHW: F32) -> Iterator[tuple[NDArray[np.floating[Any]], int]]:
        """The inputs in the batches the graph takes, each with the count of its real images.

        With a fixed batch the last, smaller part is padded with its own last image.
        """
        inputs = inputs_NCHW.astype(self._dtype, copy=False)
        size = self._fixed_batch or len(inputs)
        for start in range(0, len(inputs), size):
            part = inputs[start : start + size]
            padding = np.repeat(part[-1:], size - len(part), axis=0)
            yield (np.concatenate([part, padding]) if len(padding) else part), len(part)

    def _run(self, inputs: NDArray[np.floating[Any]]) -> list[NDArray[np.generic]]:
        with self._errors():
            outputs: list[NDArray[np.generic]] = self._session.run(None, {self._input.name: inputs})
        return outputs

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with device_memory(f"running {self._path.name}", "lower --batch-size or --size"):
                yield
        except DeviceMemoryError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions share no base
            raise ModelError(f"{self._path}: ONNX Runtime cannot run it: {error}") from error


_INPUT_DTYPES: dict[str, type[np.floating[Any]]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}
_OUTPUT_DTYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}
_NUMPY_DTYPES = {torch.float32: np.float32, torch.float16: np.float16}


def _open_session(model: bytes, path: Path, device: str) -> Any:
    wanted = _PROVIDERS[device]
    if wanted not in onnxruntime.get_available_providers():
        raise ProviderError(
            f"--device {device}: this onnxruntime has no {wanted} (it has "
            f"{', '.join(onnxruntime.get_available_providers())}); install onnxruntime-gpu and make "
            "sure the plain onnxruntime is not installed beside it, or use --device cpu"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    provider = (wanted, _CUDA_OPTIONS) if device == "cuda" else wanted
    try:
        session = onnxruntime.InferenceSession(model, options, providers=[provider])
    except Exception as error:  # ONNX Runtime's exceptions share no base
        why = " ".join(str(error).split())
        raise ModelError(f"{path}: ONNX Runtime cannot load it: {why}; {_told(model)}") from error
    active = session.get_providers()[0]
    if active != wanted:
        raise ProviderError(
            f"--device {device}: {wanted} did not start, ONNX Runtime would run on {active}; "
            "check the driver and the CUDA libraries (onnxruntime-gpu uses those of the installed "
            "torch, both must be built for one CUDA version), or use --device cpu"
        )
    return session


def _told(model: bytes) -> str:
    """The versions that a runtime may be too old for, and what can be done about that."""
    proto = load_model_from_string(model)
    opsets = ", ".join(f"{o.domain or 'ai.onnx'} {o.version}" for o in proto.opset_import)
    return (
        f"it has IR version {proto.ir_version} and operators of {opsets}: where those are newer than "
        f"ONNX Runtime {onnxruntime.__version__} knows, export the model with an older opset or install a "
        "newer onnxruntime"
    )
