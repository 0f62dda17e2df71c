"""The frozen teacher: an smp UNet checkpoint run by torch, or any ONNX graph from pixels to logits."""

from __future__ import annotations

import logging
import math
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import segmentation_models_pytorch as smp
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from safetensors.torch import load_file
from torch import Tensor

from kdcache.errors import ModelError, device_memory
from kdcache.imaging import U8
from kdcache.onnx_graph import last_activation, model_sha256, pruned, read_model
from kdcache.onnx_session import OnnxNetwork, torch_device
from kdcache.pixels import normalised, on_device

log = logging.getLogger(__name__)
F32 = NDArray[np.float32]
Tensors = dict[str, torch.Tensor]

_SMP_UNET = "smp.Unet({})"
_ONNX, _ONNX_AT = "onnx", "onnx at "
# Operators that make probabilities of logits.
_ACTIVATIONS = {"Sigmoid", "HardSigmoid", "Softmax"}


# In the state dict of every smp.Unet.
_HEAD, _ENCODER = "segmentation_head.0.weight", "encoder."


class Teacher:
    """The teacher on one device: (N, H, W, 3) uint8 RGB to (N, H, W) float32 logits.

    Raises ModelError when the file is no teacher, or its output is not one logit a pixel.
    """

    def __init__(
        self, path: Path, *, encoder: str, device: str, size_px: int, output: str = ""
    ) -> None:
        self.sha256 = model_sha256(path)
        self._network: OnnxNetwork | _TorchNetwork
        if path.suffix == ".onnx":
            self.network = _ONNX_AT + output if output else _ONNX
            graph = _logits_graph(path, output)
            self.parameters = sum(math.prod(w.dims) for w in graph.graph.initializer)
            self._network = OnnxNetwork(graph.SerializeToString(), path, device, size_px)
        elif output:
            raise ModelError(f"{path}: teacher_output = {output!r} is for ONNX teachers")
        else:
            self.network = _SMP_UNET.format(encoder)
            network = load_checkpoint(path, encoder)
            self.parameters = sum(p.numel() for p in network.parameters())
            self._network = _TorchNetwork(network, device)
        black = np.zeros((1, size_px, size_px, 3), np.uint8)
        trial = self._network(normalised(on_device(black, self._network.device)))
        if trial.shape != (1, 1, size_px, size_px):
            raise ModelError(
                f"{path}: the teacher gives {tuple(trial.shape)} for one image; "
                f"expected one logit a pixel, (1, 1, {size_px}, {size_px}): is this file the teacher? "
                "Another tensor of an ONNX graph is chosen with --set teacher_output=NAME"
            )

    def logits(self, images_NHWC: U8) -> F32:
        """One logit a pixel, (N, H, W)."""
        return self.logits_of(images_NHWC, normalised)

    def logits_of(self, images_NHWC: U8, form: Callable[[Tensor], Tensor]) -> F32:
        """The same where the network is given another form of the pixels than it expects."""
        with device_memory("running the teacher", "lower --batch-size or --size"):
            inputs = form(on_device(images_NHWC, self._network.device))
            logits: F32 = self._network(inputs)[:, 0].cpu().numpy()
        return logits


def network_settings(network: str) -> dict[str, str]:
    """The `encoder` and `output` of the Teacher whose `network` this is."""
    if network.startswith(_ONNX):
        return {"encoder": "", "output": network.removeprefix(_ONNX_AT).removeprefix(_ONNX)}
    prefix, suffix = _SMP_UNET.split("{}")
    return {"encoder": network.removeprefix(prefix).removesuffix(suffix), "output": ""}


def _logits_graph(path: Path, output: str) -> ModelProto:
    """The ONNX graph up to its logits; raises ModelError when its output is a probability."""
    model = read_model(path)
    if output:
        model = pruned(model, [output], path, "--set teacher_output=NAME")
    operator, before = last_activation(model)
    if operator in _ACTIVATIONS:
        raise ModelError(
            f"{path}: its output {model.graph.output[0].name} is a probability (the graph ends in "
            f"{operator}); distillation needs the logits before it: --set teacher_output={before}"
        )
    return model


class _TorchNetwork:
    def __init__(self, network: torch.nn.Module, device: str) -> None:
        self.device = torch_device(device)
        with device_memory("loading the teacher", "use --device cpu"):
            self._network = network.eval().requires_grad_(False).to(self.device)

    @torch.inference_mode()
    def __call__(self, inputs_NCHW: Tensor) -> Tensor:
        with _float32_convolutions():
            outputs: Tensor = self._network(inputs_NCHW)
            return outputs.float()


@contextmanager
def _float32_convolutions() -> Iterator[None]:
    """As ONNX Runtime is told: torch lets convolutions round to TF32 on a GPU, by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def load_checkpoint(path: Path, encoder: str) -> torch.nn.Module:
    """An `smp.Unet(encoder, classes=1)` with the weights of a checkpoint, loaded strictly.

    Raises ModelError naming the first tensors that are missing, left over or of another shape.
    """
    with _timm_names():
        try:
            network: torch.nn.Module = smp.Unet(encoder, encoder_weights=None, classes=1)
        except (KeyError, RuntimeError) as error:
            raise ModelError(f"teacher_encoder = {encoder!r}: smp has no such encoder") from error
    expected = network.state_dict()
    found = strip_prefix(read_tensors(path))
    problems = [f"{key} is missing" for key in expected if key not in found]
    problems += [f"{key} is left over" for key in found if key not in expected]
    problems += [
        f"{key} is {tuple(found[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in expected
        if key in found and found[key].shape != expected[key].shape
    ]
    if problems:
        raise ModelError(
            f"{path} does not fit smp.Unet({encoder!r}, classes=1): {'; '.join(problems[:4])}"
            + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
            + f"; {_advice(found)}"
        )
    network.load_state_dict(found)
    return network


def _advice(found: Tensors) -> str:
    """What to do about a checkpoint that does not fit, by what its shapes say it is."""
    classes = found[_HEAD].shape[0] if _HEAD in found and found[_HEAD].ndim else 1
    if classes != 1:
        return f"it segments {classes} classes: export it to ONNX with the person's logit as its output"
    shapes = _encoder_shapes(found)
    for name in smp.encoders.encoders if shapes else ():
        try:
            with torch.device("meta"), _timm_names():
                candidate = smp.encoders.get_encoder(name, weights=None)
        except RuntimeError:  # some look at their weights while they are made
            continue
        own = {f"{_ENCODER}{key}": value for key, value in candidate.state_dict().items()}
        if _encoder_shapes(own) == shapes:
            return f"its shapes are those of another encoder: --set teacher_encoder={name}"
    return "name its encoder with --set teacher_encoder=…"


@contextmanager
def _timm_names() -> Iterator[None]:
    """Without smp's note that its `timm-` names will go: pyproject.toml bounds smp for that reason."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`timm-` encoders are deprecated")
        yield


def _encoder_shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in tensors.items() if key.startswith(_ENCODER)}


def strip_prefix(tensors: Tensors) -> Tensors:
    """Remove the prefix (`model.`, `module.model.`, …) that wrappers put before every key.

    Only at the front: names such as `encoder.model.conv_stem.weight` keep their inner `model.`.
    """
    prefix = next((key.removesuffix(_HEAD) for key in tensors if key.endswith("." + _HEAD)), "")
    return {key.removeprefix(prefix): value for key, value in tensors.items()}


def read_tensors(path: Path) -> Tensors:
    """The weights of a .safetensors, .pth, .ckpt or .pt file, without running any code in it."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as error:  # SafetensorError has no public home
            raise ModelError(f"{path}: not a safetensors file: {error}") from error
    content = _read_pickle(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if isinstance(state, dict):
        tensors = {str(key): v for key, v in state.items() if isinstance(v, torch.Tensor)}
        if tensors:
            return tensors
    raise ModelError(
        f"{path}: no weights in it; expected a state dict, or a checkpoint with one under "
        "`state_dict` (a whole pickled module cannot be read without running its code)"
    )


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        pass  # it holds more than tensors: read those, with everything else as stubs
    except Exception as error:
        raise ModelError(
            f"{path}: neither a torch checkpoint nor .safetensors or .onnx ({type(error).__name__}: "
            f"{error}; it starts with {path.read_bytes()[:16]!r})"
        ) from error
    dropped: set[str] = set()
    try:
        content = torch.load(
            path, map_location="cpu", weights_only=False, pickle_module=_inert_pickle(dropped)
        )
    except pickle.UnpicklingError as error:
        raise ModelError(f"{path}: not a torch checkpoint: {error}") from error
    except Exception as error:
        raise ModelError(
            f"{path}: its tensors cannot be read without running code it holds ({error}); save "
            "its state_dict alone, as .safetensors, where it was trained"
        ) from error
    log.warning("%s: left out objects of %s (not run)", path.name, ", ".join(sorted(dropped)))
    return content


# All that a state dict of plain tensors refers to; storages are resolved by torch before this.
_HARMLESS = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "Size"),
    ("torch", "device"),
}


def _inert_pickle(dropped: set[str]) -> Any:
    """A stand-in for the pickle module that builds tensors and replaces every other class by a stub."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in _HARMLESS:
                return super().find_class(module, name)
            dropped.add(f"{module}.{name}")
            return type(name.rsplit(".", 1)[-1], (_Stub,), {})

    def load(file: Any, **options: Any) -> Any:
        return Unpickler(file, **options).load()

    return SimpleNamespace(Unpickler=Unpickler, load=load, __name__="kdcache.inert_pickle")


class _Stub:
    """Takes whatever a pickle does to an object, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Stub:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> _Stub:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def add(self, value: Any) -> None:
        pass
