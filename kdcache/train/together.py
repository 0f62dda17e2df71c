"""Several runs in one process, that read, decode and encode each batch once for all of them."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from kdcache.config import TrainConfig
from kdcache.errors import KdcacheError, RunError
from kdcache.places import Place
from kdcache.stop import StopRequest
from kdcache.train.loop import TrainReport, report_of, train_epochs
from kdcache.train.parallel import Processes
from kdcache.train.prepare import Member, Start, prepared
from kdcache.train.repeatable import only_deterministic
from kdcache.train.student import resolve_device

# What must be alike for runs to see the same batches and encode them with the same encoder.
SHARED = (
    "student_encoder",
    "encoder_weights",
    "train_encoder",
    "epochs",
    "batch_size",
    "gradient_accumulation",
    "mixed_precision",
    "half_precision",
    "compile",
    "deterministic",
    "views",
    "student_augment",
    "flip_targets",
    "seed",
)


def shared_settings(config: TrainConfig) -> tuple[object, ...]:
    """Runs for which these are equal can train together."""
    return tuple(getattr(config, name) for name in SHARED)


def train_together(
    cache_path: Place,
    starts: Sequence[Start],
    *,
    device: str = "auto",
    stop: StopRequest | None = None,
) -> dict[Path, TrainReport | KdcacheError]:
    """Train several runs on the same batches: each ends bit for bit as it would by itself.

    Gives each run's report, or the error that ended it while the others went on. Runs that were
    stopped at different steps train one after the other. Raises RunError for runs whose
    `shared_settings` differ, KeyboardInterrupt as `train` does, or once it is asked for in `stop`.
    """
    if len({shared_settings(start.config) for start in starts}) > 1:
        raise RunError(f"runs that train together need the same {', '.join(SHARED)}")
    on, started, stop = resolve_device(device), time.monotonic(), stop or StopRequest()
    found: dict[Path, TrainReport | KdcacheError] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(only_deterministic(starts[0].config.deterministic))
        places: dict[tuple[int, int, int], list[Member]] = defaultdict(list)
        for start in starts:
            try:
                member = prepared(
                    cache_path, start, stack, device=on, processes=Processes(), stop=stop
                )
            except KdcacheError as error:
                found[start.out] = error
                continue
            rows = len(member.run.cache)  # of a resumed run: those that it began with
            state = member.state
            places[len(state.history), state.steps, rows].append(member)
        with stop.listening():
            for members in places.values():
                found |= _trained(members, started)
    return found


def _trained(members: list[Member], started: float) -> dict[Path, TrainReport | KdcacheError]:
    found: dict[Path, TrainReport | KdcacheError] = {}

    def failed(member: Member, error: KdcacheError) -> None:
        found[member.run.out] = error

    try:
        train_epochs(members, failed)
    except KdcacheError as error:
        return found | {member.run.out: error for member in members}
    return found | {m.run.out: report_of(m, time.monotonic() - started) for m in members}
