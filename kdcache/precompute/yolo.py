"""The frozen detector: an ONNX graph cut at its taps, which need not be among its outputs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from kdcache.cache import codecs
from kdcache.cache.layout import Group, TapSpec, whole
from kdcache.config import YoloInput
from kdcache.errors import ModelError, SampleError, device_memory
from kdcache.imaging import U8
from kdcache.onnx_graph import model_sha256, pruned, read_model
from kdcache.onnx_session import OnnxNetwork
from kdcache.pixels import on_device, yolo_input
from kdcache.precompute.replication import channel_groups, channel_parts

log = logging.getLogger(__name__)
F32 = NDArray[np.float32]
# of one image or a batch, by tap: (C, h, w) or (N, C, h, w) each, where they were computed
Features = Mapping[str, codecs.Array]


def of_image(features: Features, n: int) -> dict[str, codecs.Array]:
    """The features of one image of a batch."""
    return {tap: of_batch[n] for tap, of_batch in features.items()}


class Tap(NamedTuple):
    """What the graph says of one tap's feature maps."""

    shape: tuple[int, int, int]  # (C, h, w)
    groups: tuple[Group, ...]  # which channels repeat each value in blocks


class Yolo:
    """The detector on one device. Features are (N, C, h, w) float32 of (N, H, W, 3) uint8 RGB.

    `taps` are the tapped tensors, by name. Raises ModelError when there is no such tensor (naming
    the nearest) or it is not a grid that divides the input.
    """

    def __init__(
        self, path: Path, *, taps: Sequence[str], expects: YoloInput, device: str, size_px: int
    ) -> None:
        self.sha256 = model_sha256(path)
        self.expects = expects
        self._names = taps
        model = read_model(path)
        cut = pruned(model, taps, path).SerializeToString()
        self._network = OnnxNetwork(cut, path, device, size_px, outputs=len(taps))
        # Noise: features of a plain colour would repeat whatever the graph does.
        pixels = np.random.default_rng(0).integers(0, 256, (1, size_px, size_px, 3), np.uint8)
        self.taps: dict[str, Tap] = {}
        for name, feature in self.features(pixels).items():
            feature_NCHW = codecs.on_host(feature)
            shape = _checked_shape(feature_NCHW.shape, path, name, size_px)
            groups = self._groups(model, path, name, pixels, feature_NCHW[0])
            self.taps[name] = Tap(shape, groups)

    def features(self, images_NHWC: U8, given_as: YoloInput | None = None) -> Features:
        """Each tap's feature maps where they were computed: numpy on the CPU, torch on a GPU.

        `given_as` gives the detector another form of the pixels than it expects.
        """
        with device_memory("running the detector", "lower --batch-size or --size"):
            pixels = on_device(images_NHWC, self._network.device)
            outputs = self._network.outputs(yolo_input(pixels, given_as or self.expects))
        found: Sequence[codecs.Array] = (
            outputs if outputs[0].is_cuda else [output.numpy() for output in outputs]
        )
        return dict(zip(self._names, found, strict=True))

    def _groups(
        self, model: ModelProto, path: Path, tap: str, pixels: U8, feature_CHW: F32
    ) -> tuple[Group, ...]:
        """The channels that the graph says repeat, if the features of the noise agree."""
        channels, shape = len(feature_CHW), feature_CHW.shape
        parts = channel_parts(model, tap)
        names = list(dict.fromkeys(part.tensor for part in parts))
        made = {name for node in model.graph.node for name in node.output}
        if all(part.factor == 1 for part in parts) or not made.issuperset(names):
            return whole(channels)
        # On the CPU, once: few graphs state how many channels each part has.
        cut = pruned(model, names, path).SerializeToString()
        network = OnnxNetwork(cut, path, "cpu", pixels.shape[1])
        shapes = network.output_shapes(yolo_input(on_device(pixels, "cpu"), self.expects))
        groups = channel_groups(parts, dict(zip(names, shapes, strict=True)), shape)
        spec = TapSpec(name=tap, precision="float32", shape=shape, groups=groups)
        try:
            codecs.encode(feature_CHW, spec)
        except SampleError as error:
            log.warning("%s: %s; all channels of %s are stored in full", path.name, error, tap)
            return whole(channels)
        return groups


def _checked_shape(
    shape: tuple[int, ...], path: Path, tap: str, size_px: int
) -> tuple[int, int, int]:
    if len(shape) != 4 or shape[0] != 1:
        raise ModelError(f"{path}: tap {tap} gives {shape}; expected (1, C, h, w)")
    _, channels, height, width = shape
    if size_px % height or size_px % width or height != width:
        raise ModelError(
            f"{path}: tap {tap} gives {channels}×{height}×{width} for a {size_px}×{size_px} "
            f"input; expected a square grid that divides it (80×80 at 640 for the design's "
            "tap): choose another --tap or --size"
        )
    return channels, height, width
