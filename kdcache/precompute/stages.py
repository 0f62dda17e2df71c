"""How long each stage of an extraction was at work, and which of them set its pace."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

DECODE, DETECTOR, TEACHER = "decode photos", "detector", "teacher"
ENCODE, COMPRESS, WRITE = "encode", "compress", "write"
FOR_PHOTOS, FOR_WRITER = "waiting for photos", "waiting for storing"


@dataclass(frozen=True, kw_only=True)
class StageTimes:
    """Seconds that each stage was busy, added up over its threads, and of all of it together."""

    busy_s: Mapping[str, float]
    threads: Mapping[str, int]
    seconds: float

    @property
    def bottleneck(self) -> str:
        """Whose threads were busy for the largest share of the time: the photos', the models', the
        encoders' or the writer's."""
        shares = {
            "decoding photos": self.busy_s[DECODE] / self.threads[DECODE],
            "the models": self.busy_s[DETECTOR] + self.busy_s[TEACHER],
            "encoding and compressing": (self.busy_s[ENCODE] + self.busy_s[COMPRESS])
            / self.threads[COMPRESS],
            "writing": self.busy_s[WRITE],
        }
        return max(shares, key=lambda name: shares[name])


class Stages:
    """Clocks of the stages; may be used from many threads."""

    def __init__(self, workers: int) -> None:
        names = (DECODE, DETECTOR, TEACHER, ENCODE, COMPRESS, WRITE, FOR_PHOTOS, FOR_WRITER)
        self._busy_s = dict.fromkeys(names, 0.0)
        self.workers = workers  # threads that decode, and as many that encode and compress
        self._lock = threading.Lock()
        self._started = time.perf_counter()

    def clear(self) -> None:
        """Begin anew."""
        with self._lock:
            self._busy_s = dict.fromkeys(self._busy_s, 0.0)
            self._started = time.perf_counter()

    @contextmanager
    def busy(self, stage: str) -> Iterator[None]:
        """The block is work of that stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            with self._lock:
                self._busy_s[stage] += seconds

    def waited_for(self, items: Iterable[T], stage: str) -> Iterator[T]:
        """The items, the time until each comes being that stage's."""
        iterator = iter(items)
        while True:
            with self.busy(stage):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def add(self, times: StageTimes, processes: int) -> None:
        """Count what one of several processes did: the mean of them is told."""
        with self._lock:
            for stage, seconds in times.busy_s.items():
                self._busy_s[stage] += seconds / processes

    def times(self) -> StageTimes:
        """What was measured since the start."""
        threads = dict.fromkeys(self._busy_s, 1)
        threads |= dict.fromkeys((DECODE, ENCODE, COMPRESS), self.workers)
        seconds = time.perf_counter() - self._started
        return StageTimes(busy_s=dict(self._busy_s), threads=threads, seconds=seconds)
