"""Processes that look at what may crash or hang: a broken library ends its own process only."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

# Both torch and a provider take 3 s; the first time, from a network disk, ten times that.
PATIENCE_S = 30.0

# The child has the modules of this process, not those that lie in its working folder.
_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from kdcache.doctor.probe import main; main(*sys.argv[2:])"
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a probe told, and how it ended where that was not well."""

    facts: Mapping[str, Any]
    modules: Mapping[str, Mapping[str, str]]  # by name: version, or error
    ended: str  # empty when the probe came to its end
    began: str  # what it was at, when it ended before
    stderr: str

    def module_error(self, name: str) -> str:
        """Why a module could not be imported; empty when it could, or was not tried."""
        if self.ended and self.began == name:
            return self.ended
        return self.modules.get(name, {}).get("error", "")


class Children:
    """Starts probes, which run side by side; none outlives the block."""

    def __init__(self, patience_s: float | None = None) -> None:
        self._deadline = time.monotonic() + (PATIENCE_S if patience_s is None else patience_s)
        self._patience_s = self._deadline - time.monotonic()
        self._started: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Children:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._started:
            process.kill()
            process.communicate()

    def start(self, probe: str, *arguments: str) -> subprocess.Popen[str]:
        """Begin a probe of `kdcache.doctor.probe`."""
        process = subprocess.Popen(
            [sys.executable, "-c", _CODE, json.dumps(sys.path), probe, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        self._started.append(process)
        return process

    def outcome(self, process: subprocess.Popen[str]) -> Outcome:
        """What it found, once it has ended or the time is up."""
        try:
            stdout, stderr = process.communicate(timeout=max(0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            stdout, stderr = process.communicate()
            return _outcome(stdout, stderr, f"no answer in {self._patience_s:.0f} s")
        return _outcome(stdout, stderr, _ended(process.returncode, stderr))


def _outcome(stdout: str, stderr: str, ended: str) -> Outcome:
    facts: dict[str, Any] = {}
    modules: dict[str, dict[str, str]] = {}
    for line in stdout.splitlines():
        try:
            told = json.loads(line)
        except ValueError:  # cut short
            continue
        if "module" in told:
            modules[told.pop("module")] = told
        else:
            facts |= told
    done = facts.pop("done", False)
    return Outcome(
        facts=facts,
        modules=modules,
        ended="" if done else ended,
        began=facts.pop("begin", ""),
        stderr=stderr,
    )


def _ended(status: int, stderr: str) -> str:
    if status < 0:
        return f"its process was killed by {signal.Signals(-status).name}"
    last = (stderr.strip().splitlines() or ["it said nothing"])[-1]
    return f"its process ended with status {status} ({last})"
