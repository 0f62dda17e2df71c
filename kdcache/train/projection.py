"""The projections from the student's feature maps to the detector's, and the feature loss of each.

Trained beside the student and never exported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdcache.cache.layout import plain
from kdcache.config import TrainConfig
from kdcache.train import losses
from kdcache.train.attention import attention
from kdcache.train.loader import Batch


class Projection(nn.Sequential):
    """The student's channels to the detector's at one tap, 1×1."""

    target_mean: Tensor
    target_std: Tensor

    def __init__(self, channels: int, hidden: int, target_channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, target_channels, 1),
        )
        # of the detector's channels, when the target is standardised; in the state for `evaluate`
        self.register_buffer("target_mean", torch.zeros(target_channels, 1, 1))
        self.register_buffer("target_std", torch.ones(target_channels, 1, 1))

    def standardise(self, features: Iterable[NDArray[np.float32]]) -> None:
        """Aim at mean 0 and deviation 1 of each channel, over the given (C, h, w) feature maps."""
        sums, squares, count = np.zeros(0), np.zeros(0), 0
        for feature in features:
            values = feature.reshape(len(feature), -1).astype(np.float64)
            sums = values.sum(1) + (sums if count else 0)
            squares = (values**2).sum(1) + (squares if count else 0)
            count += values.shape[1]
        mean = sums / count
        deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
        # a channel that never varies has nothing to be scaled by
        deviation[deviation <= 1e-6 * np.abs(mean)] = 1
        for buffer, of in ((self.target_mean, mean), (self.target_std, deviation)):
            buffer.copy_(torch.from_numpy(of)[:, None, None])

    def standardised(self, target_NCHW: Tensor) -> Tensor:
        """The detector's features as this projection is to give them."""
        return (target_NCHW - self.target_mean) / self.target_std


class Projections(nn.Module):
    """A projection for each tap, and how much the loss of each counts.

    `shares` (add up to 1) weight the taps in their order; where they are `learned`, they are where
    that begins.
    """

    shares: Tensor
    each: Any  # a ModuleList does not say of what

    def __init__(
        self, of_taps: Mapping[str, Projection], shares: Sequence[float], learned: bool = False
    ) -> None:
        super().__init__()
        self.taps = tuple(of_taps)
        self.each = nn.ModuleList(of_taps.values())
        self.register_buffer("shares", torch.tensor(shares))
        # What is learned is the way from the shares, in logits: weight decay then pulls to them, and
        # not to equal weights. A single tap has nothing to be weighed against.
        moving = learned and len(self.taps) > 1
        self.departure = nn.Parameter(torch.zeros(len(self.taps))) if moving else None

    def forward(
        self, features: Sequence[Tensor], positions: Sequence[Tensor | None] | None = None
    ) -> tuple[Tensor, ...]:
        """The student's feature map of each tap to the detector's channels, (N, C, h, w).

        Of some `positions` of each map only, (N, C, P, 1), where those are given.
        """
        at = positions or [None] * len(self.each)
        return tuple(
            projection(losses.at(feature, some))
            for projection, feature, some in zip(self.each, features, at, strict=True)
        )

    @property
    def by_tap(self) -> dict[str, Projection]:
        """The projection to each tap."""
        return dict(zip(self.taps, self.each, strict=True))

    @property
    def weights(self) -> Tensor:
        """(taps,) float32 that add up to 1: what each tap's loss counts now."""
        if self.departure is None:
            return self.shares
        return torch.softmax(self.shares.log() + self.departure, 0)

    def total(self, of_taps: Mapping[str, Tensor]) -> Tensor:
        """The feature loss: the sum of the taps' own losses, weighted."""
        return (self.weights * torch.stack(list(of_taps.values()))).sum()

    def divergence(self) -> Tensor:
        """KL of the weights from the shares, a float32 scalar: 0 for fixed ones."""
        if self.departure is None:
            return self.shares.new_zeros(())
        log_shares = self.shares.log()
        log_weights = torch.log_softmax(log_shares + self.departure, 0)
        return (log_weights.exp() * (log_weights - log_shares)).sum()

    def measured(self) -> dict[str, float]:
        """The learned weights by the names of their metrics; none for fixed ones."""
        if self.departure is None:
            return {}
        names = (f"train_layer_weight_{plain(tap)}" for tap in self.taps)
        return dict(zip(names, self.weights.tolist(), strict=True))


def feature_losses(
    projected: Sequence[Tensor],
    projections: Projections,
    batch: Batch,
    config: TrainConfig,
    per: losses.Counts | None = None,
    positions: Sequence[Tensor | None] | None = None,
) -> dict[str, Tensor]:
    """The loss of each tap's `projected` features by the tap's name, each a float32 scalar.

    `positions` are those that were projected; `per` as in `losses`.
    """
    loss = losses.FEATURE_LOSSES[config.feature_loss]
    found = {}
    for n, (tap, projection) in enumerate(projections.by_tap.items()):
        target = projection.standardised(batch.features[tap])
        weight = attention(config.feature_attention, batch, target)
        some = None if positions is None else positions[n]
        found[tap] = loss(projected[n], target, batch.mask, per, some, weight)
    return found
