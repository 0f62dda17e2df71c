"""Which parameters each loss can change, found by back-propagating each on real rows."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from kdcache.config import LOSSES, TrainConfig
from kdcache.tables import table
from kdcache.train.loader import Batch
from kdcache.train.step import Trainee, all_losses, forward

# loss → part of the networks → (parameter tensors with a gradient other than zero, all of them)
Reach = Mapping[str, Mapping[str, tuple[int, int]]]

_THROWN_AWAY = "projection"


def find_reach(model: Trainee, batch: Batch, config: TrainConfig) -> Reach:
    """Back-propagate each loss alone on a batch. The model is left as it is, statistics included."""
    model = copy.deepcopy(model).train()
    output = forward(model, batch, config)
    values = all_losses(output, model.projections, batch, config, config.temperature)
    parts = {name: list(part.parameters()) for name, part in _parts(model)}
    trained = [p for parameters in parts.values() for p in parameters if p.requires_grad]
    found = {}
    for name, loss in values.items():
        gradients = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
        reached = {
            id(parameter)
            for parameter, gradient in zip(trained, gradients, strict=True)
            if gradient is not None and bool(gradient.any())
        }
        found[name] = {
            part: (sum(id(p) in reached for p in parameters), len(parameters))
            for part, parameters in parts.items()
        }
    return found


def reaches_student(reach: Reach, loss: str) -> bool:
    """Whether a loss can change anything that is kept: the projections are not."""
    return any(count for part, (count, _) in reach[loss].items() if part != _THROWN_AWAY)


def reach_text(reach: Reach, config: TrainConfig) -> str:
    """The table that training shows at its start."""
    parts = list(next(iter(reach.values())))
    rows = [("parameters reached by", "weight", *parts)]
    of_taps = iter(config.tap_shares(len(reach) - sum(loss in LOSSES for loss in reach)))
    for loss, counts in reach.items():
        cells = [f"{reached} of {of}" if reached else "none" for reached, of in counts.values()]
        if loss in LOSSES:
            weight = getattr(config, f"{loss}_weight")
        else:  # of one of several taps
            weight = config.feature_weight * next(of_taps)
        rows.append((loss, f"{weight:g}", *cells))
    return table(rows)


def _parts(model: Trainee) -> Iterator[tuple[str, nn.Module]]:
    unet = model.student.unet
    yield "encoder", unet.encoder
    for number, block in enumerate(unet.decoder.blocks):
        yield f"decoder {number}", block
    yield "head", unet.segmentation_head
    if model.projections is not None:
        yield _THROWN_AWAY, model.projections
