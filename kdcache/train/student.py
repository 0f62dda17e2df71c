"""The student UNet with its tap, and the projection from the tap to the detector's channels."""

from __future__ import annotations

import os
import socket
import warnings
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

import segmentation_models_pytorch as smp
import torch
from torch import nn

from kdcache.errors import ModelError, ProviderError
from kdcache.imaging import IMAGENET_MEAN, IMAGENET_STD
from kdcache.train.weights import load_encoder_file

# smp gives every encoder a feature n at stride 2^n; the third of EfficientNet-B0 is 40×80×80 at
# 640, the grid of YOLOv9-E's layer 34.
TAP_LEVEL = 3
TAP_STRIDE = 2**TAP_LEVEL


class StudentOutput(NamedTuple):
    """logits (N, 1, H, W) and the tapped feature map (N, C, h, w)."""

    logits: torch.Tensor
    feature: torch.Tensor


class Student(nn.Module):
    """An `smp.Unet` whose encoder is frozen: eval mode, no gradients, statistics that never move."""

    unet: Any  # smp is untyped

    def __init__(self, encoder: str) -> None:
        super().__init__()
        self.unet = _unet(encoder)
        self.unet.encoder.requires_grad_(False).eval()

    @property
    def tap_channels(self) -> int:
        return int(self.unet.encoder.out_channels[TAP_LEVEL])

    def train(self, mode: bool = True) -> Self:
        """Train mode for decoder and head only: BatchNorm in a frozen encoder must not learn."""
        super().train(mode)
        self.unet.encoder.eval()
        return self

    def forward(self, pixels_NCHW: torch.Tensor) -> StudentOutput:
        """ImageNet-normalised pixels (N, 3, H, W) to logits and the tapped feature map."""
        with torch.no_grad():
            features = self.unet.encoder(pixels_NCHW)
        decoded = self.unet.decoder(features)
        return StudentOutput(self.unet.segmentation_head(decoded), features[TAP_LEVEL])


class Projection(nn.Sequential):
    """Tap channels to detector channels, 1×1; trained beside the student and never exported."""

    def __init__(self, channels: int, hidden: int, target_channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, target_channels, 1),
        )


def build_student(encoder: str, weights: str) -> Student:
    """A student whose encoder holds `weights`: a file, `imagenet` (hub cache or hub) or `random`.

    Decoder and head are initialised from torch's global generator. Raises ModelError when the
    weights cannot be had or do not fit.
    """
    student = Student(encoder)
    if weights == "random":
        return student
    if weights == "imagenet":
        student.unet.encoder.load_state_dict(_hub_encoder(encoder).state_dict())
    else:
        load_encoder_file(student.unet.encoder, Path(weights))
    return student


def resolve_device(device: str) -> str:
    """`cpu` or `cuda…`; auto is CUDA when torch sees a GPU. Raises ProviderError for an absent one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.split(":", maxsplit=1)[0] not in ("cpu", "cuda"):
        raise ProviderError(f"--device {device}: expected auto, cpu, cuda or cuda:N")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ProviderError(
            f"--device {device}: torch {torch.__version__} sees no CUDA device; check the driver "
            "(`nvidia-smi`), or use --device cpu"
        )
    return device


def normalised(images_NHWC: torch.Tensor) -> torch.Tensor:
    """uint8 RGB pixels on any device to the ImageNet-normalised (N, 3, H, W) float32 input."""
    mean = torch.tensor(IMAGENET_MEAN, device=images_NHWC.device)
    std = torch.tensor(IMAGENET_STD, device=images_NHWC.device)
    scaled = (images_NHWC.float() / 255 - mean) / std
    return scaled.permute(0, 3, 1, 2).contiguous()


def _unet(encoder: str, weights: str | bool | None = None) -> Any:
    with warnings.catch_warnings():
        # smp's note that its `timm-` names will go; pyproject.toml bounds smp for that reason
        warnings.filterwarnings("ignore", message="`timm-` encoders are deprecated")
        try:
            return smp.Unet(encoder, encoder_weights=weights, classes=1)
        except (KeyError, RuntimeError, ValueError, AttributeError, TypeError) as error:
            raise ModelError(
                f"student_encoder = {encoder!r} cannot be built by smp ({type(error).__name__}: "
                f"{str(error)[:200]})"
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
