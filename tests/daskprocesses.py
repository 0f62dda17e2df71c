"""A dask scheduler and workers as people start them, in processes that end with the block."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def started(*words: object, **environment: str) -> Iterator[subprocess.Popen]:
    """A `dask` command that can import kdcache and the tests; its own lines are dropped."""
    tests = Path(__file__).parent
    paths = [str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [sys.executable, "-m", "dask", *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | environment | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def scheduler(folder: Path) -> Iterator[str]:
    """Its address; the scheduler file is `folder`/scheduler.json."""
    file = folder / "scheduler.json"
    words = ("--host", "127.0.0.1", "--port", 0, "--dashboard-address", "127.0.0.1:0")
    with started("scheduler", *words, "--scheduler-file", file):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError):  # not there, or half written
                yield json.loads(file.read_text())["address"]
                return
            time.sleep(0.05)
        raise TimeoutError("no scheduler")


def worker(
    address: str, folder: Path, *words: object, **environment: str
) -> contextlib.AbstractContextManager:
    """A worker of that scheduler and its nanny; it may take two tasks at once."""
    own = ("--host", "127.0.0.1", "--no-dashboard", "--local-directory", folder)
    return started("worker", address, *own, "--nthreads", 2, *words, **environment)


def dies(*arguments: object) -> None:
    """A task that kills its worker."""
    os.kill(os.getpid(), signal.SIGKILL)


def blind(*arguments: object) -> str:
    """What a worker says that sees nothing."""
    return "it does not see the folder"
