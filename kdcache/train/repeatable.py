"""The same run twice: seeds from the position alone, and deterministic kernels where asked for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch


def seed(run_seed: int, epoch: int, step: int, rank: int) -> None:
    """Randomness inside the networks (stochastic depth) from the position alone: no state to save."""
    (state,) = np.random.SeedSequence([run_seed, epoch, step, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state) >> 1)


class Position(NamedTuple):
    """Where in a run a batch is."""

    epoch: int
    step: int
    rank: int
    batch: int  # of those that this process puts into the step


def drawing(run_seed: int, position: Position) -> np.random.Generator:
    """A generator for what is done to a batch before its step, apart from what `seed` seeds."""
    *place, batch = position
    return np.random.default_rng(np.random.SeedSequence([run_seed, *place], spawn_key=(batch,)))


@contextlib.contextmanager
def only_deterministic(asked: bool) -> Iterator[None]:
    """Inside the block torch uses deterministic kernels only, and refuses what has none."""
    if not asked:
        yield
        return
    # cuBLAS reads it when it is first used
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = benchmark
