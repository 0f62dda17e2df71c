"""The five losses: plain functions from logits, always in float32, padding and ignored pixels left out.

Shapes: logits and masks (N, 1, H, W) or (N, H, W), any one of them throughout; feature maps
(N, C, h, w). Definitions: docs/losses.md.
"""

from __future__ import annotations

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


def kl(student: Tensor, teacher: Tensor, mask: Tensor, *, temperature: float, scale: str) -> Tensor:
    """Binary Kullback–Leibler divergence of the softened teacher from the softened student.

    Mean over seen pixels of p·(logσ(z_t/T) − logσ(z_s/T)) + (1−p)·(logσ(−z_t/T) − logσ(−z_s/T)),
    p = σ(z_t/T), times T (`scale` "T"), T² ("T2", Hinton et al. 2015) or 1 ("1").
    """
    z_s, z_t = student.float() / temperature, teacher.float() / temperature
    p = torch.sigmoid(z_t)
    person = p * (F.logsigmoid(z_t) - F.logsigmoid(z_s))
    background = (1 - p) * (F.logsigmoid(-z_t) - F.logsigmoid(-z_s))
    factor = {"T": temperature, "T2": temperature**2, "1": 1.0}[scale]
    return factor * _mean(person + background, seen(mask))


def mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean over seen pixels of the squared difference of the logits."""
    return _mean((student.float() - teacher.float()) ** 2, seen(mask))


def bce(student: Tensor, mask: Tensor) -> Tensor:
    """Binary cross-entropy with the mask, mean over labelled pixels; 0 when there is none."""
    target = (mask == PERSON).float()
    losses = F.binary_cross_entropy_with_logits(student.float(), target, reduction="none")
    return _mean(losses, labelled(mask))


def dice(student: Tensor, mask: Tensor) -> Tensor:
    """1 − mean over images of (2Σσ(z)y + 1)/(Σσ(z) + Σy + 1), over labelled pixels.

    Images without a labelled pixel are left out; 0 when no image has one.
    """
    valid = labelled(mask).flatten(1)
    probability = torch.sigmoid(student.float()).flatten(1) * valid
    target = (mask == PERSON).float().flatten(1)
    overlap = (probability * target).sum(1)
    score = (2 * overlap + 1) / (probability.sum(1) + target.sum(1) + 1)
    has_label = (valid.sum(1) > 0).float()
    return _mean(1 - score, has_label)


def feature_mse(projected: Tensor, target: Tensor) -> Tensor:
    """Mean over all elements of (P(f_s) − f_yolo)²."""
    return F.mse_loss(projected.float(), target.float())


def feature_cosine(projected: Tensor, target: Tensor) -> Tensor:
    """1 − mean over positions of the cosine along the channels."""
    return 1 - F.cosine_similarity(projected.float(), target.float(), dim=1).mean()


FEATURE_LOSSES = {"mse": feature_mse, "cosine": feature_cosine}


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    """Mean of `values` where `weight` is 1; 0 (with a zero gradient) when it is 1 nowhere."""
    return (values * weight).sum() / weight.sum().clamp(min=1)
