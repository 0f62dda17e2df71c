"""The trainer that kdcache replaces, written apart from it: both frozen networks run in every step.

    .venv/bin/python benchmarks/reference_trainer.py --images DIR --masks DIR --yolo FILE.onnx \\
        --tap NAME --teacher FILE.onnx [--size 64 --epochs 2]

On the CPU, from a random student; prints the losses of each step. It shares no code with kdcache:
the losses are written out as in docs/losses.md, for images that are labelled in full.
tests/test_online_equals_cached.py holds it and a float32 cache equal bit for bit.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
import onnx
import onnxruntime
import segmentation_models_pytorch as smp
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
TAP_LEVEL, HIDDEN = 3, 768
LEARNING_RATE, MIN_LEARNING_RATE, WEIGHT_DECAY, CLIP = 1e-4, 1e-6, 1e-4, 0.5
WEIGHTS = {"kl": 1.0, "mse": 0.5, "bce": 0.5, "dice": 1.0, "feature": 0.5}


@dataclass(kw_only=True)
class Online:
    """What an online run needs; every image has a mask of 0 and 255."""

    images: Sequence[Path]
    masks: Sequence[Path]
    detector: Path
    tap: str
    teacher: Path
    encoder: str = "timm-efficientnet-b0"
    encoder_weights: dict[str, torch.Tensor] | None = None
    size: int = 640
    batch_size: int = 4
    epochs: int = 1
    temperature: float = 3.0
    seed: int = 0
    losses: list[dict[str, float]] = field(default_factory=list)  # of each step

    def batches(self, epoch: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """Pixels, mask, teacher logits and features of each batch, the frozen networks run here."""
        detector, teacher = tapped(self.detector, self.tap), session(self.teacher.read_bytes())
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.images))
        for start in range(0, len(order), self.batch_size):
            parts = [
                self.frozen(detector, teacher, n) for n in order[start : start + self.batch_size]
            ]
            yield tuple(torch.stack(column) for column in zip(*parts, strict=True))

    def frozen(
        self, detector: onnxruntime.InferenceSession, teacher: onnxruntime.InferenceSession, n: int
    ) -> tuple[torch.Tensor, ...]:
        """One image through both networks, alone: then no result depends on its neighbours."""
        size = (self.size, self.size)
        image = np.asarray(Image.open(self.images[n]).convert("RGB"))
        image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
        mask = np.asarray(Image.open(self.masks[n]).convert("L"))
        mask = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST_EXACT) > 0
        pixels = (torch.from_numpy(image).float() / 255 - MEAN) / STD
        pixels = pixels.permute(2, 0, 1).contiguous()
        zero_to_one = image.transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255)
        (features,) = detector.run(None, {detector.get_inputs()[0].name: zero_to_one})
        (logits,) = teacher.run(None, {teacher.get_inputs()[0].name: pixels[None].numpy()})
        rest = (torch.from_numpy(array) for array in (mask[None], logits[0], features[0]))
        return pixels, *rest

    def train(self) -> dict[str, torch.Tensor]:
        """All epochs; returns the student's weights."""
        torch.manual_seed(self.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            student = smp.Unet(self.encoder, encoder_weights=None, classes=1)
        if self.encoder_weights is not None:
            student.encoder.load_state_dict(self.encoder_weights)
        student.train().encoder.eval().requires_grad_(False)
        *_, features = next(self.batches(0))
        projection = build_projection(student.encoder.out_channels[TAP_LEVEL], features.shape[1])
        trained = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            [{"params": trained}, {"params": list(projection.parameters())}],
            weight_decay=WEIGHT_DECAY,
        )
        for epoch in range(self.epochs):
            for pixels, mask, teacher, features in self.batches(epoch):
                fall = (1 + math.cos(math.pi * epoch / self.epochs)) / 2
                for group in optimizer.param_groups:
                    group["lr"] = MIN_LEARNING_RATE + (LEARNING_RATE - MIN_LEARNING_RATE) * fall
                encoded = student.encoder(pixels)
                logits = student.segmentation_head(student.decoder(encoded))
                values = distillation(logits, teacher, mask.float(), self.temperature)
                values["feature"] = (
                    ((projection(encoded[TAP_LEVEL]) - features) ** 2).mean(1).mean()
                )
                total = torch.zeros(())
                for name, value in values.items():
                    total = total + WEIGHTS[name] * value
                optimizer.zero_grad()
                total.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(trained, CLIP)
                nn.utils.clip_grad_norm_(projection.parameters(), CLIP)
                optimizer.step()
                values["total"] = total
                self.losses.append({name: value.item() for name, value in values.items()})
        state: dict[str, torch.Tensor] = student.state_dict()
        return state


def distillation(
    z_s: torch.Tensor, z_t: torch.Tensor, y: torch.Tensor, temperature: float
) -> dict[str, torch.Tensor]:
    """KL, MSE, BCE and Dice of (N, 1, H, W) logits, every pixel labelled."""
    # In the order of their names everywhere: autograd adds up the gradients of z_s in the reverse
    # order of the losses, and sums of floats depend on their order.
    soft, target = z_s / temperature, z_t / temperature
    p = torch.sigmoid(target)
    kl = p * (F.logsigmoid(target) - F.logsigmoid(soft))
    kl = kl + (1 - p) * (F.logsigmoid(-target) - F.logsigmoid(-soft))
    mse = (z_s - z_t) ** 2
    bce = F.binary_cross_entropy_with_logits(z_s, y, reduction="none")
    probability = torch.sigmoid(z_s)
    overlap = (probability * y).sum((1, 2, 3))
    dice = (2 * overlap + 1) / (probability.sum((1, 2, 3)) + y.sum((1, 2, 3)) + 1)
    return {
        "kl": temperature * kl.mean(),
        "mse": mse.mean(),
        "bce": bce.mean(),
        "dice": (1 - dice).mean(),
    }


def build_projection(channels: int, target_channels: int) -> nn.Sequential:
    """1×1 convolutions from the student's tap to the detector's channels."""
    return nn.Sequential(
        nn.Conv2d(channels, HIDDEN, 1),
        nn.BatchNorm2d(HIDDEN),
        nn.ReLU(),
        nn.Conv2d(HIDDEN, target_channels, 1),
    )


def tapped(path: Path, tap: str) -> onnxruntime.InferenceSession:
    """The detector with the tap as its only output."""
    model = onnx.load(path)
    del model.graph.output[:]
    model.graph.output.append(onnx.ValueInfoProto(name=tap))
    return session(model.SerializeToString())


def session(model: bytes) -> onnxruntime.InferenceSession:
    """An ONNX graph on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--images", type=click.Path(path_type=Path), required=True, help="Folder of photos.")
@click.option("--masks", type=click.Path(path_type=Path), required=True, help="STEM.png of each.")
@click.option("--yolo", type=click.Path(path_type=Path), required=True)
@click.option("--tap", required=True)
@click.option("--teacher", type=click.Path(path_type=Path), required=True)
@click.option("--size", default=640)
@click.option("--batch-size", default=4)
@click.option("--epochs", default=1)
def main(images: Path, masks: Path, yolo: Path, tap: str, teacher: Path, **settings: Any) -> None:
    """Train online and print the losses of each step."""
    photos = sorted(path for path in images.iterdir() if path.is_file())
    online = Online(
        images=photos,
        masks=[masks / f"{photo.stem}.png" for photo in photos],
        detector=yolo,
        tap=tap,
        teacher=teacher,
        **settings,
    )
    online.train()
    for step, losses in enumerate(online.losses, 1):
        click.echo(f"{step}: " + ", ".join(f"{name} {value:.6g}" for name, value in losses.items()))


if __name__ == "__main__":
    main()
