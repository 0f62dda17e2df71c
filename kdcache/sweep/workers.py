"""Who trains a sweep's runs: processes here. One dies, the sweep lives; the sweep dies, they stop."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Protocol

import torch

from kdcache.errors import KdcacheError
from kdcache.places import Place
from kdcache.stop import StopRequest
from kdcache.train.prepare import Start

# CUDA and threads do not survive a fork.
_CONTEXT = multiprocessing.get_context("spawn")


@dataclass(frozen=True, kw_only=True)
class Task:
    """Runs for one process: one, or several that train together."""

    cache: Place
    starts: Sequence[Start]
    log: Path  # a file that what is said of them is added to


# What became of a task's runs: None of a finished one, "" of a stopped one, or the error.
Ended = Mapping[Path, str | None]


class Crew(Protocol):
    """Whoever trains a sweep's tasks."""

    @property
    def tasks(self) -> Sequence[Task]:
        """Those that were given and have not ended."""

    @property
    def has_room(self) -> bool:
        """Whether one more can be given now."""

    def give(self, task: Task) -> None:
        """Let somebody who is free train it."""

    def ready(self, timeout_s: float) -> Sequence[Ended]:
        """What has ended within the time; waits for no more than the first."""

    def stop(self) -> None:
        """Ask all to save and stop; `ready` tells when they have."""

    def close(self) -> None:
        """Part with them: who still trains saves and stops."""


class Worker:
    """A process on one device, that takes one task after the other."""

    def __init__(self, device: str, threads: int | None) -> None:
        self.task: Task | None = None
        self._pipe, theirs = _CONTEXT.Pipe()
        self._process: SpawnProcess = _CONTEXT.Process(
            target=_work, args=(theirs, device, threads), daemon=True
        )
        with _interrupts_ignored():  # as the new process does, until it is in a session of its own
            self._process.start()
        theirs.close()

    def give(self, task: Task) -> None:
        """Let it train these runs."""
        self.task = task
        self._pipe.send(task)

    def result(self) -> Ended:
        """What became of the task's runs; to be called when the pipe has it."""
        assert self.task is not None
        outs = [start.out for start in self.task.starts]
        self.task = None
        try:
            found: Ended = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            return dict.fromkeys(outs, _death(self._process.exitcode or 0))
        return found

    @property
    def alive(self) -> bool:
        """Whether it can be given a task."""
        return self._process.is_alive()

    def stop(self) -> None:
        """Ask it to save and stop; asked again it stops at once."""
        self._process.terminate()

    def close(self) -> None:
        """End it when its task is done."""
        with contextlib.suppress(OSError):  # it may be dead
            self._pipe.send(None)
        self._process.join()
        self._pipe.close()


class Processes:
    """A crew of processes on this machine, one for each of the devices named."""

    def __init__(self, devices: Sequence[str], tasks: int) -> None:
        self._devices = devices[: max(1, min(len(devices), tasks))]
        on_cpu = devices[0] == "cpu"
        self._threads = max(1, torch.get_num_threads() // len(self._devices)) if on_cpu else None
        self._workers: list[Worker | None] = [None] * len(self._devices)

    @property
    def _busy(self) -> list[Worker]:
        return [worker for worker in self._workers if worker is not None and worker.task]

    @property
    def tasks(self) -> list[Task]:
        """Those that processes train."""
        return [worker.task for worker in self._busy if worker.task]

    @property
    def has_room(self) -> bool:
        """Whether a process is without a task."""
        return len(self._busy) < len(self._workers)

    def give(self, task: Task) -> None:
        """To a process without a task, started when it is needed."""
        for number, worker in enumerate(self._workers):
            if worker is not None and worker.task:
                continue
            able = worker if worker is not None and worker.alive else None
            self._workers[number] = able = able or Worker(self._devices[number], self._threads)
            able.give(task)
            return

    def ready(self, timeout_s: float) -> list[Ended]:
        """Of those that finished their task, or died, within the time."""
        by_pipe: dict[Connection, Worker] = {worker._pipe: worker for worker in self._busy}
        pipes = wait(list(by_pipe), timeout_s)
        return [by_pipe[pipe].result() for pipe in pipes if isinstance(pipe, Connection)]

    def stop(self) -> None:
        """Each saves, and stops."""
        for worker in self._workers:
            if worker is not None:
                worker.stop()

    def close(self) -> None:
        """End the processes, and wait for that."""
        for worker in self._busy:  # an error of ours: nobody would fetch its result
            worker.stop()
        for one in self._workers:
            if one is not None:
                one.close()


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _death(exitcode: int) -> str:
    if exitcode >= 0:
        return f"its process ended with status {exitcode}; its log tells why"
    name = signal.Signals(-exitcode).name
    hint = ": out of memory? The kernel's log tells" if name == "SIGKILL" else ""
    return f"its process was killed by {name}{hint}"


def _work(pipe: Connection, device: str, threads: int | None) -> None:
    """What the process does: a terminal's Ctrl-C is not for it, the end of the sweep is."""
    os.setsid()
    from kdcache.allocator import keep_freed_memory

    keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    tasks: queue.Queue[Task | None] = queue.Queue()
    threading.Thread(target=_listen, args=(pipe, tasks), daemon=True).start()
    while (task := tasks.get()) is not None:
        result = trained(task, device)
        try:
            pipe.send(result)
        except OSError:  # nobody is there any more
            return


def _listen(pipe: Connection, tasks: queue.Queue[Task | None]) -> None:
    """Pass tasks on; when the sweep is gone, end as if asked to: save, then stop."""
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            tasks.put(None)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        tasks.put(task)
        if task is None:
            return


def trained(task: Task, device: str, stop: StopRequest | None = None) -> Ended:
    """Train a task's runs in this process, each from where it is."""
    from kdcache.train.together import train_together

    outs = [start.out for start in task.starts]
    # asked now: it may have been begun by a worker that was lost
    starts = [replace(start, resume=is_begun(start.out)) for start in task.starts]
    with _logging_to(task.log) as log:
        try:
            found = train_together(task.cache, starts, device=device, stop=stop)
        except KeyboardInterrupt:
            return dict.fromkeys(outs, "")
        except KdcacheError as error:
            return dict.fromkeys(outs, str(error))
        except Exception as error:
            log.exception("%s", ", ".join(map(str, outs)))
            first = (str(error).splitlines() or [""])[0]
            return dict.fromkeys(outs, f"{type(error).__name__}: {first} (all of it in {task.log})")
    return {out: str(r) if isinstance(r, KdcacheError) else None for out, r in found.items()}


def is_begun(run: Path) -> bool:
    """Whether there is something to resume."""
    return (run / "run.json").exists()


@contextlib.contextmanager
def _logging_to(path: Path) -> Iterator[logging.Logger]:
    log = logging.getLogger("kdcache")
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield log
    finally:
        log.removeHandler(handler)
        handler.close()
