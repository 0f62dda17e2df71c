"""Runs that train on the same batches: one read, one decode and one pass of a frozen encoder for all."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch

from kdcache.errors import KdcacheError
from kdcache.train.loader import Batch
from kdcache.train.prepare import Member
from kdcache.train.step import autocast


@contextlib.contextmanager
def leaving(
    members: list[Member], member: Member, failed: Callable[[Member, KdcacheError], None] | None
) -> Iterator[None]:
    """A member that fails in the block leaves the others to go on; the last one's error is raised."""
    try:
        yield
    except KdcacheError as error:
        if failed is None or len(members) == 1:
            raise
        members.remove(member)
        failed(member, error)


def taps_of(members: Sequence[Member]) -> list[str]:
    """The taps that any of them learns from."""
    return list(dict.fromkeys(tap for member in members for tap in member.run.tap_names))


def encoded(members: Sequence[Member], batch: Batch, *, half: bool) -> Batch:
    """The batch with the features of a frozen encoder that several members have alike."""
    if len(members) < 2 or not all(member.shares_encoder for member in members):
        return batch
    config, encoder = members[0].run.config, members[0].state.student.unet.encoder
    context = autocast(config, batch.image.device) if half else contextlib.nullcontext()
    with torch.no_grad(), context:
        return dataclasses.replace(batch, encoded=tuple(encoder(batch.image)))


def own_batch(member: Member, batch: Batch) -> Batch:
    """What the member's run would have read by itself."""
    return dataclasses.replace(
        batch,
        logits=batch.logits if member.run.config.uses_logits else None,
        features={tap: batch.features[tap] for tap in member.run.tap_names},
    )
