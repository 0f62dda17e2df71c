"""The student as an ONNX file, compared with PyTorch through ONNX Runtime before it gets its name."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcache.durable import replacing
from kdcache.errors import ModelError
from kdcache.imaging import IMAGENET_MEAN, IMAGENET_STD
from kdcache.train.run_folder import read_best_student

# 18 is the lowest opset torch's exporter writes natively; ONNX Runtime reads it since 1.14.
OPSET = 18
CHECKED_BATCHES = (1, 3)
# Largest difference of a logit that two float32 runtimes may show.
TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """An exported student and how far ONNX Runtime is from PyTorch on it."""

    path: Path
    size_bytes: int
    parameters: int
    max_difference: dict[int, float]  # batch size to the largest difference of a logit


def export(run: Path, out: Path) -> ExportReport:
    """Write a run's best student: `image` (N, 3, S, S) float32, ImageNet-normalised → `logits`.

    The batch is dynamic. Projection and tap are not in the file. Raises ModelError, and leaves no
    file, when ONNX Runtime and PyTorch differ by more than 1e-3 on a logit at batch 1 or 3.
    """
    student, metadata = read_best_student(run)
    size = metadata["size_px"]
    if out.is_dir() or not out.name:
        raise ModelError(f"--out {out} is a folder; name the file to write, such as student.onnx")
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        _write(student.unet, size, temporary, metadata)
        differences = {n: _difference(student.unet, temporary, size, n) for n in CHECKED_BATCHES}
        worst = max(differences.values())
        if not worst <= TOLERANCE:
            raise ModelError(
                f"the exported student differs from PyTorch's by {worst:.2g} on a logit, "
                f"{TOLERANCE:g} is allowed; {out} was not written"
            )
    return ExportReport(
        path=out,
        size_bytes=out.stat().st_size,
        parameters=sum(p.numel() for p in student.unet.parameters()),
        max_difference=differences,
    )


def _write(unet: torch.nn.Module, size: int, path: Path, metadata: dict[str, Any]) -> None:
    # The exporter reports each of its steps on its loggers; a person wants the result.
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    program = torch.onnx.export(
        unet,
        (torch.zeros(2, 3, size, size),),
        dynamo=True,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        opset_version=OPSET,
        verbose=False,
    )
    assert program is not None  # for the type checker: None only when given a path
    program.model.metadata_props["kdcache"] = json.dumps(
        {**metadata, "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "threshold": "logit > 0"}
    )
    program.save(path, external_data=False)


@torch.no_grad()
def _difference(unet: torch.nn.Module, path: Path, size: int, batch: int) -> float:
    import onnxruntime  # here only: training must not need it

    pixels = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    (exported,) = session.run(None, {"image": pixels.numpy()})
    return float(np.abs(exported - unet(pixels).numpy()).max())
