"""The student UNet with its tap, and the projection from the tap to the detector's channels."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

import numpy as np
import segmentation_models_pytorch as smp
import torch
from numpy.typing import NDArray
from torch import nn

from kdcache.config import ENCODER_LEVELS, StudentTap
from kdcache.devices import present
from kdcache.errors import ModelError, ProviderError, nearest
from kdcache.train.weights import load_encoder_file

# smp gives every encoder a feature n at stride 2^n; the third of EfficientNet-B0 is 40×80×80 at
# 640, the grid of YOLOv9-E's layer 34. The decoder is back at that grid after its second block.
TAP_LEVEL = 3
TAP_STRIDE = 2**TAP_LEVEL
DECODER_TAP_BLOCK = 1


class StudentOutput(NamedTuple):
    """logits (N, 1, H, W) and the tapped feature map (N, C, h, w)."""

    logits: torch.Tensor
    feature: torch.Tensor


class Student(nn.Module):
    """An `smp.Unet` with a tap, whose encoder is frozen but for its last `trained_levels` levels.

    What is frozen has no gradients, and its BatchNorm statistics never move. A level is what
    computes one of the encoder's five features from the one before.
    """

    unet: Any  # smp is untyped

    def __init__(self, encoder: str, tap: StudentTap = "encoder", trained_levels: int = 0) -> None:
        super().__init__()
        self.unet = _unet(encoder)
        self._tap = tap
        self._tapped: torch.Tensor | None = None
        if tap == "decoder":
            self.unet.decoder.blocks[DECODER_TAP_BLOCK].register_forward_hook(self._keep)
        trained = _parameters_of_last_levels(self.unet.encoder, trained_levels)
        self.unet.encoder.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        self._encoder_is_trained = bool(trained)
        self.train()

    @property
    def tap_channels(self) -> int:
        if self._tap == "decoder":
            return int(self.unet.decoder.blocks[DECODER_TAP_BLOCK].conv2[0].out_channels)
        return int(self.unet.encoder.out_channels[TAP_LEVEL])

    def train(self, mode: bool = True) -> Self:
        """Train mode where parameters are trained: BatchNorm in a frozen level must not learn."""
        super().train(mode)
        self.unet.encoder.eval()
        if mode and self._encoder_is_trained:
            _train_where_trained(self.unet.encoder)
        return self

    def forward(
        self, pixels_NCHW: torch.Tensor, encoded: Sequence[torch.Tensor] | None = None
    ) -> StudentOutput:
        """ImageNet-normalised pixels (N, 3, H, W) to logits and the tapped feature map.

        `encoded` is what a frozen encoder has made of them already.
        """
        features = encoded
        if features is None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self._encoder_is_trained):
                features = self.unet.encoder(pixels_NCHW)
        logits = self.unet.segmentation_head(self.unet.decoder(features))
        tapped, self._tapped = self._tapped, None
        return StudentOutput(logits, features[TAP_LEVEL] if tapped is None else tapped)

    def _keep(self, block: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self._tapped = output


def _parameters_of_last_levels(encoder: Any, levels: int) -> list[nn.Parameter]:
    """Parameters that the last features depend on and the ones before do not, by differentiating.

    An encoder may hold parameters that no feature uses (smp keeps EfficientNet's conv_head);
    those are in no level.
    """
    if not levels:
        return []
    parameters = list(encoder.parameters())
    side = 2 * 2**ENCODER_LEVELS
    encoder.eval()  # BatchNorm must not learn from this
    features = encoder(torch.zeros(1, 3, side, side))

    def used_by(wanted: Sequence[torch.Tensor]) -> set[int]:
        total = sum(feature.sum() for feature in wanted if feature.requires_grad)
        if not isinstance(total, torch.Tensor):
            return set()
        gradients = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
        return {n for n, gradient in enumerate(gradients) if gradient is not None}

    frozen = used_by(features[: len(features) - levels])
    return [parameters[n] for n in sorted(used_by(features) - frozen)]


def _train_where_trained(module: nn.Module) -> None:
    """Train mode for the modules all of whose parameters are trained, with all that is in them."""
    parameters = list(module.parameters())
    if parameters and all(parameter.requires_grad for parameter in parameters):
        module.train()
        return
    for child in module.children():
        _train_where_trained(child)


class Projection(nn.Sequential):
    """Tap channels to detector channels, 1×1; trained beside the student and never exported."""

    target_mean: torch.Tensor
    target_std: torch.Tensor

    def __init__(self, channels: int, hidden: int, target_channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, target_channels, 1),
        )
        # of the detector's channels, when the target is standardised; in the state for `evaluate`
        self.register_buffer("target_mean", torch.zeros(target_channels, 1, 1))
        self.register_buffer("target_std", torch.ones(target_channels, 1, 1))

    def standardise(self, features: Iterable[NDArray[np.float32]]) -> None:
        """Aim at mean 0 and deviation 1 of each channel, over the given (C, h, w) feature maps."""
        sums, squares, count = np.zeros(0), np.zeros(0), 0
        for feature in features:
            values = feature.reshape(len(feature), -1).astype(np.float64)
            sums = values.sum(1) + (sums if count else 0)
            squares = (values**2).sum(1) + (squares if count else 0)
            count += values.shape[1]
        mean = sums / count
        deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
        # a channel that never varies has nothing to be scaled by
        deviation[deviation <= 1e-6 * np.abs(mean)] = 1
        for buffer, of in ((self.target_mean, mean), (self.target_std, deviation)):
            buffer.copy_(torch.from_numpy(of)[:, None, None])

    def standardised(self, target_NCHW: torch.Tensor) -> torch.Tensor:
        """The detector's features as this projection is to give them."""
        return (target_NCHW - self.target_mean) / self.target_std


def build_student(
    encoder: str, weights: str, tap: StudentTap = "encoder", trained_levels: int = 0
) -> Student:
    """A student whose encoder holds `weights`: a file, `imagenet` (hub cache or hub) or `random`.

    Decoder and head are initialised from torch's global generator. Raises ModelError when the
    weights cannot be had or do not fit.
    """
    student = Student(encoder, tap, trained_levels)
    if weights == "random":
        return student
    if weights == "imagenet":
        student.unet.encoder.load_state_dict(_hub_encoder(encoder).state_dict())
    else:
        load_encoder_file(student.unet.encoder, Path(weights))
    return student


def resolve_device(device: str) -> str:
    """`cpu` or `cuda…`, which becomes the current one; auto is CUDA when torch sees a GPU.

    Raises ProviderError for an absent one.
    """
    if device.split(":", maxsplit=1)[0] not in ("auto", "cpu", "cuda"):
        raise ProviderError(f"--device {device}: expected auto, cpu, cuda or cuda:N")
    device = present(device)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    return device


def _unet(encoder: str, weights: str | bool | None = None) -> Any:
    with warnings.catch_warnings():
        # smp's note that its `timm-` names will go; pyproject.toml bounds smp for that reason
        warnings.filterwarnings("ignore", message="`timm-` encoders are deprecated")
        try:
            return smp.Unet(encoder, encoder_weights=weights, classes=1)
        except (KeyError, RuntimeError, ValueError, AttributeError, TypeError) as error:
            why = f"nearest: {nearest(encoder, smp.encoders.encoders)}"
            if encoder.startswith("tu-") or encoder in smp.encoders.encoders:
                why = f"{type(error).__name__}: {str(error)[:200]}"
            raise ModelError(
                f"student_encoder = {encoder!r} cannot be built by smp ({why}; timm's own names take "
                "the prefix tu-)"
            ) from error


def _hub_encoder(encoder: str) -> Any:
    """The ImageNet encoder from the local hub cache, else the hub; fails within seconds offline.

    Left alone, huggingface_hub retries an unreachable host for 23 s (and timm twice that).
    """
    from huggingface_hub import constants

    if not _reachable(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = True
    weights: str | bool = True if encoder.startswith("tu-") else "imagenet"
    try:
        return _unet(encoder, weights).encoder
    except ModelError:
        raise
    except Exception as error:  # the hub's errors share no public base
        raise ModelError(
            f"ImageNet weights of {encoder} are not in the local hub cache and the hub cannot be "
            f"reached ({type(error).__name__}); pass --encoder-weights FILE (a .safetensors or "
            ".pth of that encoder), or --encoder-weights random to train without"
        ) from error


def _reachable(endpoint: str) -> bool:
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return True  # only the proxy knows
    address = urlsplit(endpoint)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=3).close()
    except OSError:
        return False
    return True
