"""How far long work is: a bar on a terminal, a line a minute in a log; pace and ETA of the last minute."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from tqdm import tqdm

log = logging.getLogger(__name__)

# The mean since the start would hide that a disk's write cache is full or a GPU got slow.
WINDOW_S = 60.0
HEARTBEAT_S = 60.0


class Pace:
    """Units a second over the last minute, from how many were done when."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._marks = deque([(clock(), 0)])  # (time, done), one a second at most

    def mark(self, done: int) -> None:
        """Note how many are done by now."""
        now = self._clock()
        if len(self._marks) > 1 and now - self._marks[-2][0] < 1:
            self._marks[-1] = (now, done)
        else:
            self._marks.append((now, done))
        while len(self._marks) > 2 and now - self._marks[1][0] >= WINDOW_S:
            self._marks.popleft()

    @property
    def per_s(self) -> float:
        """Units a second; 0 before the first is done."""
        (start, before), done = self._marks[0], self._marks[-1][1]
        # until now, not until the last mark: a pace falls while nothing gets done
        elapsed = self._clock() - start
        return (done - before) / elapsed if elapsed > 0 else 0.0


class Progress:
    """Shows `done` of `total` while the block lasts, on stderr.

    `facts` gives further words for the line, such as what was written. A terminal gets a bar, a
    log file a line a minute.
    """

    def __init__(
        self,
        what: str,
        total: int,
        unit: str,
        *,
        shown: bool,
        facts: Callable[[], list[str]] = list,
    ) -> None:
        self._what, self._total, self._unit, self._facts = what, total, unit, facts
        self._shown = shown
        self._done = 0
        self._pace = Pace()
        self._spoke = time.monotonic()
        self._bar = tqdm(
            total=total,
            desc=what,
            bar_format="{desc}: {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
            disable=not (shown and sys.stderr.isatty()),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def reach(self, done: int) -> None:
        """So many are done by now; says so where it is time."""
        self._pace.mark(done)
        self._bar.set_postfix_str(", ".join(self._words(done)), refresh=False)
        self._bar.update(done - self._done)
        self._done = done
        now = time.monotonic()
        if self._shown and self._bar.disable and now - self._spoke >= HEARTBEAT_S:
            self._spoke = now
            words = ", ".join(self._words(done))
            log.info("%s: %d of %d, %s", self._what, done, self._total, words)

    def _words(self, done: int) -> list[str]:
        rate = self._pace.per_s
        eta = tqdm.format_interval((self._total - done) / rate) if rate else "?"
        return [f"{rate:.2f} {self._unit}/s", f"ETA {eta}", *self._facts()]
