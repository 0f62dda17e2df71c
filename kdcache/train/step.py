"""One optimiser step: forward, five losses, backward, clipping, update; in parts where asked to."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdcache.cache.layout import plain
from kdcache.config import LOSSES, TrainConfig
from kdcache.errors import RunError
from kdcache.train import losses
from kdcache.train.loader import Batch
from kdcache.train.parallel import Processes
from kdcache.train.projection import Projections, feature_losses
from kdcache.train.run_folder import State
from kdcache.train.student import Student, StudentOutput

_COMPILER = "inductor"


class Trainee(nn.Module):
    """Student and projections as one module: pixels to logits and the projected feature maps."""

    def __init__(self, student: Student, projections: Projections | None) -> None:
        super().__init__()
        self.student, self.projections = student, projections

    def forward(
        self,
        pixels_NCHW: Tensor,
        positions: Sequence[Tensor | None] | None = None,
        encoded: Sequence[Tensor] | None = None,
    ) -> StudentOutput:
        """The projections are of some `positions` of their maps only, where those are given;
        `encoded` are the encoder's features of the pixels, where they were computed before."""
        logits, features = self.student(pixels_NCHW, encoded)
        if self.projections is not None:
            features = self.projections(features, positions)
        return StudentOutput(logits, features)


def trained_model(state: State, config: TrainConfig, processes: Processes) -> nn.Module:
    """The Trainee of a state as `take_step` runs it: compiled where asked to, joined to the other
    processes'."""
    trainee = Trainee(state.student, state.projections)
    if config.compile:
        # dynamic=False: else a resumed run, which meets other shapes first, would run other kernels
        trainee.compile(backend=_COMPILER, dynamic=False)
    return processes.wrap(trainee)


def check_compiler(device: str) -> None:
    """Raise RunError where `torch.compile` has no compiler to work with."""
    try:
        torch.compile(lambda x: x + x, backend=_COMPILER)(torch.ones(2, device=device))
    except Exception as error:  # torch's exceptions of this share no public base
        cause = getattr(error, "inner_exception", error)
        first_line = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        needs = "Triton" if torch.device(device).type == "cuda" else "a C++ compiler such as g++"
        raise RunError(
            f"compile = true: torch.compile does not work here ({first_line}); it needs {needs}: "
            "install that, or train without it"
        ) from error


def build_optimizer(
    student: Student, projections: Projections | None, config: TrainConfig
) -> torch.optim.AdamW:
    """AdamW over the decoder and head, the trained part of the encoder, projections, layer weights."""
    encoder = [p for p in student.unet.encoder.parameters() if p.requires_grad]
    rest = [*student.unet.decoder.parameters(), *student.unet.segmentation_head.parameters()]
    groups = [(rest, 1.0), (encoder, config.encoder_lr_factor)]
    if projections is not None:
        groups.append((list(projections.each.parameters()), 1.0))
        learned = [] if projections.departure is None else [projections.departure]
        groups.append((learned, config.layer_lr_factor))
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr_factor": factor}
            for parameters, factor in groups
            if parameters
        ],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
    )


def untrained_state(
    student: Student,
    projections: Projections | None,
    config: TrainConfig,
    device: str,
    processes: int = 1,
) -> State:
    """The state of a run before its first step, of networks that are on `device`."""
    place = torch.device(device)
    # bfloat16 has float32's range and needs no loss scaling
    scaled = half_dtype(config, place) == torch.float16
    return State(
        student=student,
        projections=projections,
        optimizer=build_optimizer(student, projections, config),
        scaler=torch.amp.GradScaler(place.type, enabled=scaled),
        processes=processes,
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
    projections: Projections | None,
    batch: Batch,
    config: TrainConfig,
    temperature: float,
    per: losses.Counts | None = None,
    positions: Sequence[Tensor | None] | None = None,
) -> dict[str, Tensor]:
    """Each loss by the name of its weight: bce, dice, with teacher logits kl and mse before them,
    with projections feature. Where those are several, the feature loss of each is there beside it.
    """
    logits, teacher, mask = output.logits, batch.logits, batch.mask
    values: dict[str, Tensor] = {}
    if teacher is not None:
        values["kl"] = losses.kl(
            logits, teacher, mask, temperature=temperature, scale=config.kl_scale, per=per
        )
        values["mse"] = losses.mse(logits, teacher, mask, per)
    values["bce"] = losses.bce(logits, mask, per)
    values["dice"] = losses.dice(logits, mask, per)
    if projections is not None:
        of_taps = feature_losses(output.features, projections, batch, config, per, positions)
        values["feature"] = projections.total(of_taps)
        if projections.departure is not None:
            # as the losses: the parts of a step add up to what the whole of it costs
            part = 1 if per is None else len(mask) / per.images
            cost = config.layer_regularisation * part * projections.divergence()
            values["feature"] = values["feature"] + cost
        if len(of_taps) > 1:
            values |= {of_tap(tap): loss for tap, loss in of_taps.items()}
    return values


def of_tap(tap: str) -> str:
    """The name of the feature loss of one of several taps."""
    return f"feature_{plain(tap)}"


def weighted(values: dict[str, Tensor], config: TrainConfig) -> Tensor:
    """The total that is minimised; parts of a loss are left out."""
    total = torch.zeros((), device=next(iter(values.values())).device)
    for name, loss in values.items():
        if name in LOSSES:
            total = total + getattr(config, f"{name}_weight") * loss
    return total


class Taken(NamedTuple):
    """A step that was taken. Its numbers are still on the device, so that nobody waited for them."""

    names: tuple[str, ...]  # of the losses, then `total`
    losses: Tensor  # (batches, names) what each batch of this process added to each loss
    means: Tensor  # (names,) each loss over all images of all processes
    counts: Tensor  # (2,) images and labelled images of all processes
    norms: Tensor  # (modules,) of the gradients; none with float16, whose scaler expects overflows
    overflowed: bool  # float16 did, and the step changed nothing
    samples: Sequence[str]  # of each batch, for errors


def take_step(
    model: nn.Module,
    state: State,
    batches: Sequence[Batch],
    config: TrainConfig,
    temperature: float,
    processes: Processes,
) -> Taken:
    """One update from the images of all `batches` of all processes.

    `model` is the Trainee of `state`, wrapped where there are several processes. On a GPU the host
    only queues the work, and `read` tells whether it went well; on the CPU RunError is raised before
    a gradient that is not finite is applied.
    """
    per, counts = _counts(batches, processes)
    state.optimizer.zero_grad(set_to_none=True)
    taps = () if state.projections is None else state.projections.taps
    found = []
    for number, batch in enumerate(batches, 1):
        with _exchanging(model, number == len(batches)):
            positions = _positions(batch, taps, config)
            output = forward(model, batch, config, positions)
            values = all_losses(
                output, state.projections, batch, config, temperature, per, positions
            )
            total = weighted(values, config)
            state.scaler.scale(total).backward()  # type: ignore[no-untyped-call]
        found.append(torch.stack([*values.values(), total]).detach())
    of_batches, norms = torch.stack(found), _clip(state, config)
    taken = Taken(
        names=(*values, "total"),
        losses=of_batches,
        means=processes.mean(of_batches.sum(0)),
        counts=counts,
        norms=norms[:0] if state.scaler.is_enabled() else norms,
        overflowed=False,
        samples=[", ".join(key.sample_id for key in batch.keys) for batch in batches],
    )
    if not of_batches.is_cuda:
        next(read([taken]))
    return taken._replace(overflowed=not _update(state))


def read(steps: Sequence[Taken]) -> Iterator[dict[str, float]]:
    """What each step measured: each loss by name, their weighted `total`, how many `images` and
    `labelled_images` there were, and whether it was `skipped` (1 or 0) for float16 overflowed.

    Waits for the device once. Raises RunError at a step whose loss or gradient is not finite.
    """
    parts = [p for s in steps for p in (s.losses.flatten(), s.means, s.counts, s.norms)]
    numbers = iter(torch.cat(parts).tolist())
    for step in steps:
        for samples in step.samples:
            for name, value in zip(step.names, numbers, strict=False):
                if not math.isfinite(value):
                    raise RunError(f"loss {name} is {value} on samples {samples}")
        means = dict(zip(step.names, numbers, strict=False))
        images, labelled_images = next(numbers), next(numbers)
        for name, norm in zip(("student", "projections")[: len(step.norms)], numbers, strict=False):
            if not math.isfinite(norm):
                raise RunError(f"the gradient of the {name} is not finite ({norm})")
        yield means | {
            "images": round(images),
            "labelled_images": round(labelled_images),
            "skipped": float(step.overflowed),
        }


def _positions(
    batch: Batch, taps: Sequence[str], config: TrainConfig
) -> tuple[Tensor | None, ...] | None:
    """Positions of each tap's grid that are drawn for this batch, from torch's generator."""
    if not config.feature_positions:
        return None
    return tuple(_drawn(batch.features[tap], config.feature_positions) for tap in taps)


def _drawn(target_NCHW: Tensor, positions: int) -> Tensor | None:
    everywhere = target_NCHW.shape[-2] * target_NCHW.shape[-1]
    if positions >= everywhere:
        return None
    return torch.randperm(everywhere)[:positions].to(target_NCHW.device, non_blocking=True)


def forward(
    model: nn.Module,
    batch: Batch,
    config: TrainConfig,
    positions: Sequence[Tensor | None] | None = None,
) -> StudentOutput:
    """A Trainee's output for a batch, in half precision where the settings ask for it."""
    with autocast(config, batch.image.device):
        try:
            output: StudentOutput = model(batch.image, positions, batch.encoded)
        except ValueError as error:  # torch's BatchNorm, of a 1×1 map of a single image
            if "more than 1 value per channel" not in str(error):
                raise
            if any(some is not None for some in positions or ()):
                raise RunError(
                    f"BatchNorm of a projection has {config.feature_positions} positions of "
                    f"{len(batch.keys)} image to learn from: raise feature_positions, or the batch size"
                ) from error
            raise RunError(
                f"BatchNorm has one value a channel on a batch of {len(batch.keys)} at this input "
                "size: train with train_encoder = none and without taps of a 1×1 grid, or on a cache of "
                "a larger --size"
            ) from error
    return output


def _clip(state: State, config: TrainConfig) -> Tensor:
    """Limit the norms of the gradients; returns what they were.

    Student and projections are clipped apart: a joint norm would let the feature weight leak into
    the student's step.
    """
    state.scaler.unscale_(state.optimizer)
    norms = []
    for module in (state.student, state.projections):
        if module is not None:
            trained = [p for p in module.parameters() if p.requires_grad]
            norms.append(nn.utils.clip_grad_norm_(trained, config.grad_clip or math.inf))
    return torch.stack(norms)


def _update(state: State) -> bool:
    """Apply the gradients; False where float16 overflowed and nothing was applied."""
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


def _counts(batches: Sequence[Batch], processes: Processes) -> tuple[losses.Counts, Tensor]:
    """What the losses of this step divide by, and how many images and labelled ones it holds in all.

    Gradients are averaged over the processes, so each divides by its share of all counts.
    """
    counts = torch.stack([torch.stack(losses.counts(batch.mask)) for batch in batches])
    share = processes.mean(counts.sum(0))
    return losses.Counts(*share), share[:2] * processes.count


def _exchanging(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Gradients go to the other processes once a step, after its last batch."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


def autocast(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Half precision for the networks, where the settings ask for it; losses stay float32."""
    dtype = half_dtype(config, device)
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)
