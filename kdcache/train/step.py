"""One optimiser step: forward, five losses, backward, clipping, update; in parts where asked to."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdcache.config import TrainConfig
from kdcache.errors import RunError
from kdcache.train import losses
from kdcache.train.loader import Batch
from kdcache.train.parallel import Processes
from kdcache.train.run_folder import State
from kdcache.train.student import Projection, Student, StudentOutput


class Trainee(nn.Module):
    """Student and projection as one module: pixels to logits and the projected feature map."""

    def __init__(self, student: Student, projection: Projection | None) -> None:
        super().__init__()
        self.student, self.projection = student, projection

    def forward(self, pixels_NCHW: Tensor) -> StudentOutput:
        logits, feature = self.student(pixels_NCHW)
        return StudentOutput(
            logits, feature if self.projection is None else self.projection(feature)
        )


def build_optimizer(
    student: Student, projection: Projection | None, config: TrainConfig
) -> torch.optim.AdamW:
    """AdamW over the decoder and head, the trained part of the encoder, and the projection."""
    encoder = [p for p in student.unet.encoder.parameters() if p.requires_grad]
    rest = [*student.unet.decoder.parameters(), *student.unet.segmentation_head.parameters()]
    groups = [(rest, 1.0), (encoder, config.encoder_lr_factor)]
    groups += [(list(projection.parameters()), 1.0)] if projection is not None else []
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr_factor": factor}
            for parameters, factor in groups
            if parameters
        ],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every group its share of the scheduled learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_factor"]


def half_dtype(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """What the networks are autocast to; None for float32."""
    if not config.mixed_precision:
        return None
    if config.half_precision == "auto":
        bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported()
        return torch.bfloat16 if bf16 else torch.float16
    return torch.bfloat16 if config.half_precision == "bfloat16" else torch.float16


def all_losses(
    output: StudentOutput,
    projection: Projection | None,
    batch: Batch,
    config: TrainConfig,
    temperature: float,
    per: losses.Counts | None = None,
) -> dict[str, Tensor]:
    """Each loss by the name of its weight: bce, dice, with teacher logits kl and mse before them,
    with a projection feature."""
    logits, teacher, mask = output.logits, batch.logits, batch.mask
    values: dict[str, Tensor] = {}
    if teacher is not None:
        values["kl"] = losses.kl(
            logits, teacher, mask, temperature=temperature, scale=config.kl_scale, per=per
        )
        values["mse"] = losses.mse(logits, teacher, mask, per)
    values["bce"] = losses.bce(logits, mask, per)
    values["dice"] = losses.dice(logits, mask, per)
    if projection is not None:
        (target,) = batch.features.values()
        loss = losses.FEATURE_LOSSES[config.feature_loss]
        values["feature"] = loss(output.feature, projection.standardised(target), mask, per)
    return values


def weighted(values: dict[str, Tensor], config: TrainConfig) -> Tensor:
    """The total that is minimised."""
    total = torch.zeros((), device=next(iter(values.values())).device)
    for name, loss in values.items():
        total = total + getattr(config, f"{name}_weight") * loss
    return total


def take_step(
    model: nn.Module,
    state: State,
    batches: Sequence[Batch],
    config: TrainConfig,
    temperature: float,
    processes: Processes,
) -> dict[str, float]:
    """One update from the images of all `batches` of all processes.

    `model` is the Trainee of `state`, wrapped where there are several processes. Returns, over all
    those images, each loss by name, their weighted `total`, how many `images` and
    `labelled_images` there were, and whether the step was `skipped` (1 or 0) because float16
    overflowed. Raises RunError when a loss or a gradient is not finite.
    """
    per, held = _counts(batches, processes)
    state.optimizer.zero_grad(set_to_none=True)
    found = []
    for number, batch in enumerate(batches, 1):
        with _exchanging(model, number == len(batches)):
            output = forward(model, batch, config)
            values = all_losses(output, state.projection, batch, config, temperature, per)
            total = weighted(values, config)
            state.scaler.scale(total).backward()  # type: ignore[no-untyped-call]
        found.append(torch.stack([*values.values(), total]).detach())
    _refuse_non_finite_losses([*values, "total"], found, batches)
    means = processes.mean(torch.stack(found).sum(0)).tolist()
    skipped = float(not _update(state, config))
    return dict(zip([*values, "total"], means, strict=True)) | held | {"skipped": skipped}


def forward(model: nn.Module, batch: Batch, config: TrainConfig) -> StudentOutput:
    """A Trainee's output for a batch, in half precision where the settings ask for it."""
    with autocast(config, batch.image.device):
        try:
            output: StudentOutput = model(batch.image)
        except ValueError as error:  # torch's BatchNorm, of a 1×1 map of a single image
            if "more than 1 value per channel" not in str(error):
                raise
            raise RunError(
                f"BatchNorm has one value a channel on a batch of {len(batch.keys)} at this input "
                "size: train with train_encoder = none, or on a cache of a larger --size"
            ) from error
    return output


def _update(state: State, config: TrainConfig) -> bool:
    """Clip and apply the gradients; False where float16 overflowed and nothing was applied.

    Student and projection are clipped apart: a joint norm would let the feature weight leak into
    the student's step.
    """
    state.scaler.unscale_(state.optimizer)
    for name, module in (("student", state.student), ("projection", state.projection)):
        if module is None:
            continue
        trained = [p for p in module.parameters() if p.requires_grad]
        norm = nn.utils.clip_grad_norm_(trained, config.grad_clip or math.inf)
        # float16's scaler expects overflows: it skips the step and lowers its scale
        if not state.scaler.is_enabled() and not math.isfinite(norm):
            raise RunError(f"the gradient of the {name} is not finite ({float(norm)})")
    scale = state.scaler.get_scale()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    lowered = state.scaler.get_scale() < scale  # how the scaler tells that it skipped the step
    if lowered and state.scaler.get_scale() < 1:
        raise RunError(
            "the gradients are not finite in float16 at any scale of the loss; use "
            "--set half_precision=bfloat16, or train without --mixed-precision"
        )
    return not lowered


def _counts(
    batches: Sequence[Batch], processes: Processes
) -> tuple[losses.Counts, dict[str, float]]:
    """What the losses of this step divide by, and how many images it holds in all.

    Gradients are averaged over the processes, so each divides by its share of all counts.
    """
    counts = torch.stack([torch.stack(losses.counts(batch.mask)) for batch in batches])
    share = processes.mean(counts.sum(0))
    images, labelled = (share[:2] * processes.count).tolist()
    return losses.Counts(*share), {"images": round(images), "labelled_images": round(labelled)}


def _exchanging(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Gradients go to the other processes once a step, after its last batch."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


def autocast(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Half precision for the networks, where the settings ask for it; losses stay float32."""
    dtype = half_dtype(config, device)
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _refuse_non_finite_losses(
    names: Sequence[str], found: Sequence[Tensor], batches: Sequence[Batch]
) -> None:
    for values, batch in zip(torch.stack(list(found)).tolist(), batches, strict=True):
        bad = [
            (n, value) for n, value in zip(names, values, strict=True) if not math.isfinite(value)
        ]
        if bad:
            samples = ", ".join(key.sample_id for key in batch.keys)
            raise RunError(f"loss {bad[0][0]} is {bad[0][1]} on samples {samples}")
