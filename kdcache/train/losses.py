"""The five losses: plain functions from logits, always in float32, padding and ignored pixels left out.

Shapes: logits and masks (N, 1, H, W) or (N, H, W), any one of them throughout; feature maps
(N, C, h, w). Definitions: docs/losses.md.

A loss is a sum over what it counts, divided by how much that is. Where one step is made of several
batches, each divides by `per`, the count of all of them: their losses then add up to the loss of
all their images at once, whatever each batch holds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kdcache.imaging import IGNORE, PADDING, PERSON


def seen(mask: Tensor) -> Tensor:
    """float32 1 where the pixel belongs to the photo: the distillation losses use it."""
    return (mask != PADDING).float()


def labelled(mask: Tensor) -> Tensor:
    """float32 1 where the mask says person or background: BCE, Dice and the metrics use it."""
    return ((mask != PADDING) & (mask != IGNORE)).float()


class Counts(NamedTuple):
    """How much each kind of loss averages over, as scalars: float32 tensors."""

    images: Tensor
    labelled_images: Tensor
    seen_pixels: Tensor
    labelled_pixels: Tensor


def counts(mask: Tensor) -> Counts:
    """What a batch holds, by its masks (N, 1, H, W) or (N, H, W)."""
    valid = labelled(mask)
    return Counts(
        images=torch.full((), float(len(mask)), device=mask.device),
        labelled_images=(valid.flatten(1).sum(1) > 0).float().sum(),
        seen_pixels=seen(mask).sum(),
        labelled_pixels=valid.sum(),
    )


def kl(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    temperature: float,
    scale: str,
    per: Counts | None = None,
) -> Tensor:
    """Binary Kullback–Leibler divergence of the softened teacher from the softened student.

    Mean over seen pixels of p·(logσ(z_t/T) − logσ(z_s/T)) + (1−p)·(logσ(−z_t/T) − logσ(−z_s/T)),
    p = σ(z_t/T), times T (`scale` "T"), T² ("T2", Hinton et al. 2015) or 1 ("1").
    """
    z_s, z_t = student.float() / temperature, teacher.float() / temperature
    p = torch.sigmoid(z_t)
    person = p * (F.logsigmoid(z_t) - F.logsigmoid(z_s))
    background = (1 - p) * (F.logsigmoid(-z_t) - F.logsigmoid(-z_s))
    factor = {"T": temperature, "T2": temperature**2, "1": 1.0}[scale]
    per = per or counts(mask)
    return factor * _mean(person + background, seen(mask), per.seen_pixels)


def mse(student: Tensor, teacher: Tensor, mask: Tensor, per: Counts | None = None) -> Tensor:
    """Mean over seen pixels of the squared difference of the logits."""
    per = per or counts(mask)
    return _mean((student.float() - teacher.float()) ** 2, seen(mask), per.seen_pixels)


def bce(student: Tensor, mask: Tensor, per: Counts | None = None) -> Tensor:
    """Binary cross-entropy with the mask, mean over labelled pixels; 0 when there is none."""
    target = (mask == PERSON).float()
    losses = F.binary_cross_entropy_with_logits(student.float(), target, reduction="none")
    return _mean(losses, labelled(mask), (per or counts(mask)).labelled_pixels)


def dice(student: Tensor, mask: Tensor, per: Counts | None = None) -> Tensor:
    """1 − mean over images of (2Σσ(z)y + 1)/(Σσ(z) + Σy + 1), over labelled pixels.

    Images without a labelled pixel are left out; 0 when no image has one.
    """
    valid = labelled(mask).flatten(1)
    probability = torch.sigmoid(student.float()).flatten(1) * valid
    target = (mask == PERSON).float().flatten(1)
    overlap = (probability * target).sum(1)
    score = (2 * overlap + 1) / (probability.sum(1) + target.sum(1) + 1)
    has_label = (valid.sum(1) > 0).float()
    return _mean(1 - score, has_label, (per or counts(mask)).labelled_images)


def feature_mse(
    projected: Tensor,
    target: Tensor,
    mask: Tensor,
    per: Counts | None = None,
    positions: Tensor | None = None,
    attention: Tensor | None = None,
) -> Tensor:
    """Mean over channels and seen positions of (P(f_s) − f_yolo)².

    With `positions`, some of the target's h·w, `projected` is (N, C, P, 1) at those alone; drawn
    evenly, the loss is that of all positions in the mean. `attention` (N, 1, h, w) multiplies what
    each position counts; its mean over an image is to be 1.
    """
    squares = ((projected.float() - at(target, positions).float()) ** 2).mean(1)
    return _mean_over_positions(squares, mask, per, target, positions, attention)


def feature_cosine(
    projected: Tensor,
    target: Tensor,
    mask: Tensor,
    per: Counts | None = None,
    positions: Tensor | None = None,
    attention: Tensor | None = None,
) -> Tensor:
    """1 − mean over seen positions of the cosine along the channels; the rest as above."""
    cosine = F.cosine_similarity(projected.float(), at(target, positions).float(), dim=1)
    return _mean_over_positions(1 - cosine, mask, per, target, positions, attention)


def at(maps: Tensor, positions: Tensor | None) -> Tensor:
    """(N, C, h, w) at some of its h·w positions, (N, C, P, 1); all of it for None."""
    return maps if positions is None else maps.flatten(2)[:, :, positions, None]


FEATURE_LOSSES = {"mse": feature_mse, "cosine": feature_cosine}


def _mean(values: Tensor, weight: Tensor, count: Tensor) -> Tensor:
    """Sum of `values` times `weight`, over `count`; 0 (with a zero gradient) where that is 0."""
    return (values * weight).sum() / torch.where(count > 0, count, 1)


def _mean_over_positions(
    values: Tensor,
    mask: Tensor,
    per: Counts | None,
    target: Tensor,
    positions: Tensor | None,
    attention: Tensor | None,
) -> Tensor:
    """Mean over the target's grid, or some of it, each position weighted by what is seen of it."""
    grid = (target.shape[-2], target.shape[-1])
    pixels = seen(mask).reshape(len(mask), 1, *mask.shape[-2:])
    weight = F.adaptive_avg_pool2d(pixels, grid)
    if attention is not None:
        weight = weight * attention
    weight = at(weight, positions)[:, 0]
    # the weights of all positions add up to the seen pixels, in units of positions
    count = (per or counts(mask)).seen_pixels * (values[0].numel() / pixels[0].numel())
    return _mean(values, weight, count)
