"""Weight files in and out: encoder weights by their timm keys, student weights as safetensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from kdcache.durable import write_atomic
from kdcache.errors import ModelError, RunError

# What an ImageNet classifier has after its last feature map; a segmentation encoder may lack it.
_CLASSIFIER = ("classifier.", "conv_head.", "bn2.", "fc.", "head.")


def load_encoder_file(encoder: nn.Module, path: Path) -> None:
    """Load a classifier's weights file into an encoder, strictly.

    Keys may lack or carry a prefix (`model.`, `encoder.`) against the encoder's own. Every tensor
    of the encoder must be in the file with its shape; only a classifier's head may be left over.
    """
    tensors = _read(path)
    expected = encoder.state_dict()
    found = _renamed(tensors, expected)
    missing = [key for key in expected if key not in found]
    wrong = [
        f"{key} is {tuple(found[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in expected
        if key in found and found[key].shape != expected[key].shape
    ]
    extra = [
        key
        for key in found
        if key not in expected and not key.removeprefix("model.").startswith(_CLASSIFIER)
    ]
    if missing or wrong or extra:
        problems = [f"{key} is missing" for key in missing] + wrong
        problems += [f"{key} is left over" for key in extra]
        raise ModelError(
            f"--encoder-weights {path} does not fit the student's encoder: {'; '.join(problems[:4])}"
            + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
            + "; give the weights of that very encoder, or name theirs with --set student_encoder=…"
        )
    encoder.load_state_dict({key: found[key] for key in expected})


def save_student(path: Path, unet: nn.Module, metadata: Mapping[str, Any]) -> None:
    """Write a UNet's weights as safetensors, with how to build and feed it as JSON metadata."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in unet.state_dict().items()}
    # safetensors has no checksum of its own
    record = {**metadata, "tensors_sha256": _digest(tensors)}
    write_atomic(path, save(tensors, metadata={"kdcache": json.dumps(record)}))


def read_student(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and metadata that `save_student` wrote."""
    if not path.is_file():
        raise RunError(f"{path}: no such student; train one with `kdcache train`")
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {})["kdcache"])
        tensors, digest = load_file(path), metadata.pop("tensors_sha256")
    except (SafetensorError, KeyError, ValueError) as error:
        raise RunError(f"{path} is not a student of kdcache: {error}") from error
    if _digest(tensors) != digest:
        raise RunError(f"{path} is damaged: its weights are not those that were written")
    return tensors, metadata


def is_whole_student(path: Path) -> bool:
    """Whether the file is there, of the length that its header states; its bytes are not read."""
    try:
        with safe_open(path, "pt") as file:
            return "kdcache" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of the names and bytes of all tensors, by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ModelError(f"--encoder-weights {path}: no such file (nor `imagenet` or `random`)")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many kinds
        # torch's own text advises weights_only=False, which would run code in the file
        raise ModelError(
            f"--encoder-weights {path}: no weights can be read from it ({type(error).__name__}); "
            "expected a .safetensors file, or a state dict that torch.save wrote"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    return {str(key): value for key, value in state.items() if isinstance(value, torch.Tensor)}


def _renamed(
    tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The file's tensors under the encoder's own names: prefixes change at the front only.

    smp's `tu-` encoders put `model.` before timm's names; files may have any prefix, or none.
    """
    probe = next(iter(expected))
    timm_name = probe.removeprefix("model.")
    own_prefix = probe.removesuffix(timm_name)
    prefix = next(
        (k.removesuffix(timm_name) for k in tensors if ("." + k).endswith("." + timm_name)), ""
    )
    return {
        own_prefix + key.removeprefix(prefix): value
        for key, value in tensors.items()
        if key.startswith(prefix)
    }
