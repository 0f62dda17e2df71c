"""Which positions of a feature map count more in its loss: plain functions to weights (N, 1, h, w).

Shapes: mask (N, 1, H, W) uint8, logits (N, 1, H, W), the detector's features (N, C, h, w); the
grid (h, w) is the features'. Weights are float32, have no gradient, and their mean over an image's
positions is 1, each position counted by the share of it that is not padding: an image counts as
much as without them. Definitions: docs/losses.md.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kdcache.config import Attention
from kdcache.imaging import PERSON
from kdcache.train.loader import Batch
from kdcache.train.losses import seen

# What a position counts at least, before the mean is brought to 1. The other part is between 0 and
# 1, for `feature_energy` 1 in the mean: where nothing is to be attended to, some is still learned.
FLOOR = 0.1


def attention(kind: Attention, batch: Batch, target: Tensor) -> Tensor | None:
    """The weights for one tap, whose features `target` are as the projection is to give them.

    None, for `none`, is all positions alike. `teacher_uncertainty` needs the batch's logits.
    """
    if kind == "none":
        return None
    grid = (target.shape[-2], target.shape[-1])
    if kind == "mask":
        return normalised(FLOOR + person_share(batch.mask, grid), batch.mask)
    if kind == "feature_energy":
        return normalised(FLOOR + energy(target, batch.mask), batch.mask)
    assert batch.logits is not None  # a cache without them was refused
    return normalised(FLOOR + uncertainty(batch.logits, batch.mask, grid), batch.mask)


def person_share(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Share of the photo's pixels in each cell that are a person's; unlabelled ones are not."""
    return _mean_of_seen((mask == PERSON).float(), mask, grid)


def uncertainty(logits: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean over the photo's pixels in each cell of 4p(1 − p), p = σ(logit): 1 where p is a half."""
    z = logits.float()
    return _mean_of_seen(4 * torch.sigmoid(z) * torch.sigmoid(-z), mask, grid)


def energy(target: Tensor, mask: Tensor) -> Tensor:
    """Mean over channels of the squared features, over its mean on the image; 1 where all are 0.

    The attention map of activations of Zagoruyko & Komodakis, "Paying More Attention to Attention"
    (ICLR 2017), F²_sum there, brought to mean 1.
    """
    squares = target.float().square().mean(1, keepdim=True)
    share = _seen_share(mask, (target.shape[-2], target.shape[-1]))
    mean = _image_mean(squares, share)
    return torch.where(mean > 0, squares / torch.where(mean > 0, mean, 1), 1)


def normalised(weights: Tensor, mask: Tensor) -> Tensor:
    """The weights with a mean of 1 over each image, positions counted by their share of the photo."""
    mean = _image_mean(weights, _seen_share(mask, (weights.shape[-2], weights.shape[-1])))
    return weights / torch.where(mean > 0, mean, 1)  # 0 where an image is padding throughout


def _image_mean(values: Tensor, share: Tensor) -> Tensor:
    """(N, 1, 1, 1) mean over each image's positions, weighted by `share`; 0 where that is 0."""
    size = share.sum((1, 2, 3), keepdim=True)
    return (values * share).sum((1, 2, 3), keepdim=True) / torch.where(size > 0, size, 1)


def _mean_of_seen(values: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean over the photo's pixels in each cell; 0 in a cell of padding."""
    share = _seen_share(mask, grid)
    found = F.adaptive_avg_pool2d(values * seen(mask), grid)
    return found / torch.where(share > 0, share, 1)


def _seen_share(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """(N, 1, h, w) share of each cell that is the photo's."""
    return F.adaptive_avg_pool2d(seen(mask), grid)
