"""Stopping long work where its state is whole, instead of in the middle of something."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # Python 3.11's; an older one shall reach `kdcache doctor`, which names it
    from typing import Self

log = logging.getLogger(__name__)

# A terminal's Ctrl-C, and what job schedulers and container runtimes send before they kill.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether somebody asked this process to stop."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[Self]:
        """Inside the block the first SIGINT or SIGTERM only sets `asked`; a second one interrupts.

        Outside the main thread, where Python delivers no signals, nothing is set.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._ask) for number in _SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        log.warning("stopping as soon as what is being computed is saved (again: at once)")


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Inside the block SIGTERM raises KeyboardInterrupt, so that temporary files are taken away.

    Python's default ends the process where it is. Blocks within that listen for themselves go first.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
