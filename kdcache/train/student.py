"""The student UNet, and where in it the projections to the detector's features begin."""

from __future__ import annotations

import functools
import os
import socket
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

import segmentation_models_pytorch as smp
import torch
from torch import nn

from kdcache.cache.layout import TapSpec
from kdcache.config import ENCODER_LEVELS, StudentTap
from kdcache.devices import present
from kdcache.errors import ModelError, ProviderError, RunError, nearest
from kdcache.train.weights import load_encoder_file

# smp's encoders give feature n at stride 2^n, the first being the pixels; a decoder block halves
# the stride of what comes from the last.
LEVELS = {2**level: level for level in range(1, ENCODER_LEVELS + 1)}
_BLOCKS = {2 ** (ENCODER_LEVELS - 1 - block): block for block in range(ENCODER_LEVELS)}
STRIDES: dict[StudentTap, tuple[int, ...]] = {
    "encoder": tuple(sorted(LEVELS)),
    "decoder": tuple(sorted(_BLOCKS)),
}


class TapPoint(NamedTuple):
    """A feature map of the student: of the encoder, or behind a decoder block, at a stride in px."""

    part: StudentTap
    stride: int


def tap_points(
    taps: Sequence[TapSpec], size_px: int, student_tap: StudentTap | Sequence[StudentTap]
) -> tuple[TapPoint, ...]:
    """Where the student has the grid of each of the detector's taps, in a cache of this input size.

    `student_tap` is the part for all taps, or one part for each. Raises RunError where that part
    has no such stride.
    """
    names = ", ".join(tap.name for tap in taps)
    parts = [student_tap] * len(taps) if isinstance(student_tap, str) else list(student_tap)
    if taps and len(parts) != len(taps):
        raise RunError(
            f"student_tap names {len(parts)} parts, the feature loss is of {len(taps)} taps ({names}): "
            "give one part for each of them, or a single one for all"
        )
    return tuple(_tap_point(tap, size_px, part) for tap, part in zip(taps, parts, strict=True))


def _tap_point(tap: TapSpec, size_px: int, part: StudentTap) -> TapPoint:
    channels, height, width = tap.shape
    stride = size_px / height
    if height == width and stride in STRIDES[part]:
        return TapPoint(part, int(stride))
    other: StudentTap = "decoder" if part == "encoder" else "encoder"
    way_out = "leave it out with --set feature_taps=…, or train with --feature-weight 0"
    if height == width and stride in STRIDES[other]:
        way_out = f"set student_tap of this tap to {other}, or {way_out}"
    raise RunError(
        f"tap {tap.name} is {channels}×{height}×{width} in this cache, stride {stride:g} of {size_px} "
        f"px; the student's {part} has square maps at the strides "
        f"{', '.join(map(str, STRIDES[part]))}: {way_out}"
    )


class StudentOutput(NamedTuple):
    """logits (N, 1, H, W), and for each tap the feature map (N, C, h, w) of the student there."""

    logits: torch.Tensor
    features: tuple[torch.Tensor, ...]


class Student(nn.Module):
    """An `smp.Unet` that also gives its features at some `points`.

    Its encoder is frozen but for its last `trained_levels` levels.

    What is frozen has no gradients, and its BatchNorm statistics never move. A level is what
    computes one of the encoder's five features from the one before.
    """

    unet: Any  # smp is untyped

    def __init__(
        self, encoder: str, points: Sequence[TapPoint] = (), trained_levels: int = 0
    ) -> None:
        super().__init__()
        self.unet = _unet(encoder)
        self.points = tuple(points)
        self._behind_blocks: dict[int, torch.Tensor] = {}  # of one pass, by the stride
        for stride in sorted({point.stride for point in points if point.part == "decoder"}):
            block = self.unet.decoder.blocks[_BLOCKS[stride]]
            block.register_forward_hook(functools.partial(self._keep, stride))
        trained = _parameters_of_last_levels(self.unet.encoder, trained_levels)
        self.unet.encoder.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        self._encoder_is_trained = bool(trained)
        self.train()

    @property
    def tap_channels(self) -> tuple[int, ...]:
        """Channels of the feature map at each point; raises RunError where the encoder has none."""
        return tuple(self._channels(point) for point in self.points)

    def _channels(self, point: TapPoint) -> int:
        if point.part == "decoder":
            return int(self.unet.decoder.blocks[_BLOCKS[point.stride]].conv2[0].out_channels)
        of_levels = self.unet.encoder.out_channels
        if not of_levels[LEVELS[point.stride]]:  # as smp says that there is nothing at stride 2
            strides = [str(stride) for stride, level in LEVELS.items() if of_levels[level]]
            raise RunError(
                f"this student_encoder has no feature at stride {point.stride}, only at "
                f"{', '.join(strides)}: set student_tap of that tap to decoder, or leave the tap out "
                "with --set feature_taps=…"
            )
        return int(of_levels[LEVELS[point.stride]])

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
        """ImageNet-normalised pixels (N, 3, H, W) to logits and the feature map at each point.

        `encoded` is what a frozen encoder has made of them already.
        """
        features = encoded
        if features is None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self._encoder_is_trained):
                features = self.unet.encoder(pixels_NCHW)
        logits = self.unet.segmentation_head(self.unet.decoder(features))
        behind_blocks, self._behind_blocks = self._behind_blocks, {}
        tapped = (
            features[LEVELS[stride]] if part == "encoder" else behind_blocks[stride]
            for part, stride in self.points
        )
        return StudentOutput(logits, tuple(tapped))

    def _keep(self, stride: int, block: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self._behind_blocks[stride] = output


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


def build_student(
    encoder: str, weights: str, points: Sequence[TapPoint] = (), trained_levels: int = 0
) -> Student:
    """A student whose encoder holds `weights`: a file, `imagenet` (hub cache or hub) or `random`.

    Decoder and head are initialised from torch's global generator. Raises ModelError when the
    weights cannot be had or do not fit.
    """
    student = Student(encoder, points, trained_levels)
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
