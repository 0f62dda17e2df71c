"""How far a sweep is: a table in place on a terminal, a line a run and a minute in a log."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections import Counter
from collections.abc import Collection, Sequence
from types import TracebackType
from typing import Self

from tqdm import tqdm

from kdcache.progress import HEARTBEAT_S
from kdcache.sweep.runs import SweepRun, ranking
from kdcache.tables import table

log = logging.getLogger(__name__)

_BEST_SHOWN = 5
_LEAST_COLUMNS = 20  # of a terminal that tells nonsense


class Live:
    """Shows the runs while the block lasts, on stderr; rate and ETA are of this process's epochs."""

    def __init__(self, runs: Sequence[SweepRun], *, shown: bool) -> None:
        self._shown = shown
        self._in_place = shown and sys.stderr.isatty()
        self._before, self._started = _epochs(runs), time.monotonic()
        self._told = {run.name for run in runs if run.state == "done"}
        self._spoke = time.monotonic()
        self._lines = 0  # of the table that stands on the terminal

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._wipe()

    def show(self, runs: Sequence[SweepRun], training: Collection[str]) -> None:
        """What there is by now; `training` are the names of those that a process works on."""
        if not self._shown:
            return
        for run in runs:
            if run.state == "done" and run.name not in self._told:
                self._told.add(run.name)
                self._wipe()
                log.info("%s: %s", run.name, _result(run))
        if self._in_place:
            text = self._text(runs, training)
            self._wipe()
            sys.stderr.write(text + "\n")
            sys.stderr.flush()
            self._lines = text.count("\n") + 1
        elif time.monotonic() - self._spoke >= HEARTBEAT_S:
            self._spoke = time.monotonic()
            log.info("%s", self._summary(runs))

    def _wipe(self) -> None:
        if self._lines:
            sys.stderr.write(f"\x1b[{self._lines}F\x1b[J")  # up, and clear to the end
            self._lines = 0

    def _text(self, runs: Sequence[SweepRun], training: Collection[str]) -> str:
        now = [run for run in runs if run.name in training]
        best = [run for run in sorted(runs, key=ranking) if run.state == "done"][:_BEST_SHOWN]
        # names last: they are what may be cut
        rows = [("", "epoch", "val mIoU", "loss", "run")]
        rows += [("training", *_cells(run), run.name) for run in now]
        rows += [(f"{place}.", *_cells(run), run.name) for place, run in enumerate(best, 1)]
        terminal = shutil.get_terminal_size()
        columns = max(terminal.columns - 1, _LEAST_COLUMNS)
        lines = [self._summary(runs), *_named(rows)]
        # a table higher than the terminal could not be taken back
        return "\n".join(line[:columns] for line in lines[: max(terminal.lines - 2, 1)])

    def _summary(self, runs: Sequence[SweepRun]) -> str:
        states = Counter(run.state for run in runs)
        done, total = _epochs(runs), sum(int(run.config["epochs"]) for run in runs)
        left = total - done - sum(_left(run) for run in runs if run.state == "failed")
        pace = (done - self._before) / (time.monotonic() - self._started)
        eta = tqdm.format_interval(left / pace) if pace > 0 else "?"
        parts = [f"{states['done']} of {len(runs)} runs done"]
        parts += [f"{states['failed']} failed"] * bool(states["failed"])
        parts += [f"epoch {done} of {total}", f"{60 * pace:.1f} epochs/min", f"ETA {eta}"]
        return "sweep: " + ", ".join(parts)


def _named(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns, and the names flush left behind them."""
    lines = table([row[:-1] for row in rows]).splitlines()
    width = max(map(len, lines))
    return [f"{line.ljust(width)}  {row[-1]}" for line, row in zip(lines, rows, strict=True)]


def _epochs(runs: Sequence[SweepRun]) -> int:
    return sum(len(run.history) for run in runs)


def _left(run: SweepRun) -> int:
    return int(run.config["epochs"]) - len(run.history)


def _cells(run: SweepRun) -> tuple[str, str, str]:
    """Epoch, and the best epoch's scores."""
    miou, loss = run.metrics.get("val_student_miou"), run.metrics.get("train_total")
    return (
        f"{len(run.history)}/{run.config['epochs']}",
        "" if miou is None else f"{miou:.4f}",
        "" if loss is None else f"{loss:.4f}",
    )


def _result(run: SweepRun) -> str:
    miou, loss = run.metrics.get("val_student_miou"), run.metrics.get("train_total")
    score = f"val mIoU {miou:.4f}" if miou is not None else f"training loss {loss:.4f}"
    return f"{score}, best is epoch {run.best_epoch} of {len(run.history)}"
