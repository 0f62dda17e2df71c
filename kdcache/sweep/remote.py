"""Workers of a dask cluster that train runs for a sweep, one task at a time each.

A task is bound to a worker that was looked at: dask would give two at once to a worker of two
threads, and any to one that does not see the sweep's folder. So a lost worker's task is not left
to dask either: the sweep gives its runs out again, and they go on from what they saved.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distributed import Client, Future, KilledWorker, wait

from kdcache.cache.reader import Cache
from kdcache.cluster import (
    WorkerDevice,
    answer,
    asked,
    check_distinct,
    check_versions,
    connected,
    devices,
    sealed,
    still_wanted,
    threads_here,
    told_plainly,
    unsealed,
)
from kdcache.errors import CacheError, ClusterError
from kdcache.places import Place, absolute
from kdcache.stop import StopRequest

if TYPE_CHECKING:
    from kdcache.sweep.workers import Ended, Task

log = logging.getLogger(__name__)

_WATCH_S = 0.5
_FETCH_S = 20.0
_PATIENCE_S = 600.0  # for another worker, once all are lost
_LOSSES = 3  # of workers at the same epoch: then it is the run that kills them

_LOST = "the connection to the scheduler is lost; what trains saves and stops, and the same command goes on"

# In a worker: the crews that were asked to stop, and the lock of the task that trains.
_stopped: set[str] = set()
_training = threading.Lock()


@contextlib.contextmanager
def cluster_crew(
    address: str,
    cache: Cache,
    out: Path,
    *,
    device: str,
    jobs: int | None,
    files: Sequence[str] = (),
) -> Iterator[Workers]:
    """The workers of a cluster, those that come later too, as the crew of the sweep in `out`.

    Each was found to have its own device and to see the cache, the folder and the files as they
    are here; raises ClusterError for those that are there now.
    """
    for stale in out.glob(".visible-*"):
        stale.unlink(missing_ok=True)
    mark = out.absolute() / f".visible-{uuid.uuid4().hex}"
    mark.touch()
    sight = (absolute(cache.path), [c.shard for c in cache.commits], _digest(cache), mark, files)
    try:
        with connected(address) as client:
            yield Workers(client, device, jobs, sight)
    finally:
        mark.unlink(missing_ok=True)


class Workers:
    """A crew of dask workers."""

    def __init__(
        self,
        client: Client,
        device: str,
        jobs: int | None,
        sight: tuple[Place, list[int], str, Path, Sequence[str]],
    ) -> None:
        self._client, self._device, self._jobs, self._sight = client, device, jobs, sight
        self._token = uuid.uuid4().hex
        self._admitted: dict[str, WorkerDevice] = {}
        self._refused: set[str] = set()
        self._given: dict[Future[Ended], tuple[Task, str]] = {}
        self._losses: Counter[tuple[Path, int]] = Counter()  # by a run and its finished epochs
        self._alone_since: float | None = None
        self._admit(self._present())

    @property
    def tasks(self) -> list[Task]:
        """Those that workers have."""
        return [task for task, _ in self._given.values()]

    @property
    def has_room(self) -> bool:
        """Whether a worker is without a task, and another may train."""
        return bool(self._idle()) and (self._jobs is None or len(self._given) < self._jobs)

    def give(self, task: Task) -> None:
        """To a worker without one."""
        address = self._idle()[0]
        with told_plainly():
            future = self._client.submit(
                unsealed,
                sealed(train, task, self._device, self._token),
                key=f"kdcache-{task.starts[0].out.name}-{uuid.uuid4().hex}",
                workers=[address],
            )
        log.info("%s: on %s", task.starts[0].out.name, address)
        self._given[future] = task, address

    def ready(self, timeout_s: float) -> list[Ended]:
        """Of those that finished, or whose worker is lost, within the time; looks for new workers."""
        with told_plainly():
            if self._given:
                with contextlib.suppress(TimeoutError):
                    wait(list(self._given), timeout_s, "FIRST_COMPLETED")
            else:
                time.sleep(timeout_s)
            present = self._present()
            self._renew(present)
            over = [
                future
                for future, (_, address) in self._given.items()
                if future.status != "pending" or address not in present
            ]
            return [self._ended(future) for future in over]

    def stop(self) -> None:
        """Each saves, and stops, a task that has not begun yet as well."""
        with told_plainly():
            call = sealed(ask_to_stop, self._token)
            self._client.run(answer, call, workers=self._present(), on_error="ignore")

    def close(self) -> None:
        """Whoever still trains sees that nobody wants it, saves and stops."""
        with contextlib.suppress(OSError):
            self._client.cancel(list(self._given), reason="the sweep is over")
        self._given.clear()

    def _present(self) -> list[str]:
        if self._client.status == "running":
            with contextlib.suppress(OSError):
                return list(self._client.nthreads())  # asks; scheduler_info() may be without any
        raise ClusterError(_LOST)

    def _idle(self) -> list[str]:
        busy = {address for _, address in self._given.values()}
        return [address for address in self._admitted if address not in busy]

    def _renew(self, present: Sequence[str]) -> None:
        """Forget lost workers, and take in new ones; those that cannot be used are said once."""
        for address in self._admitted.keys() - set(present):
            log.warning("worker %s is gone", address)
            del self._admitted[address]
        for address in set(present) - self._admitted.keys() - self._refused:
            try:
                self._admit([address])
            except ClusterError as error:
                log.warning("not used: %s", error)
                self._refused.add(address)
        if self._admitted:
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = time.monotonic()
            log.warning("no worker is left; waiting for one, up to %d s", _PATIENCE_S)
        elif time.monotonic() - self._alone_since > _PATIENCE_S:
            raise ClusterError(
                f"no worker is left, and none came within {_PATIENCE_S:.0f} s; start some, and the same "
                "command goes on"
            )

    def _admit(self, addresses: list[str]) -> None:
        """Take in workers, or raise ClusterError."""
        with told_plainly():
            check_versions(self._client, addresses)
        found = {one.address: one for one in devices(self._client, self._device, addresses)}
        check_distinct([*self._admitted.values(), *found.values()])
        look = sealed(unseen, *self._sight)
        for address, problem in asked(self._client, answer, look, workers=addresses).items():
            if problem:
                raise ClusterError(
                    f"worker {found[address]}: {problem}: cache, --out and files need to lie where "
                    "all see them under the same path"
                )
        self._admitted |= found

    def _ended(self, future: Future[Ended]) -> Ended:
        """What became of a task's runs; to be done again ("") when the worker was lost."""
        task, address = self._given.pop(future)
        outs = [start.out for start in task.starts]
        if future.status == "finished":
            # the result lies on the worker, which may be lost by now
            with contextlib.suppress(OSError, TimeoutError, KilledWorker):
                found: Ended = future.result(timeout=_FETCH_S)
                return found
        if future.status in ("cancelled", "lost"):  # all are, when the connection breaks
            raise ClusterError(_LOST)
        if future.status == "error":
            error = future.exception()
            if not isinstance(error, KilledWorker):
                return dict.fromkeys(outs, f"{type(error).__name__}: {error}")
        future.cancel(reason="its worker is lost")
        places = [(out, _epochs(out)) for out in outs]
        self._losses.update(places)
        losses = max(self._losses[place] for place in places)
        if losses < _LOSSES:
            log.warning("%s: worker %s was lost; its runs go on elsewhere", outs[0].name, address)
            return dict.fromkeys(outs, "")
        return dict.fromkeys(
            outs,
            f"{losses} workers were lost in the same epoch of it, the last was {address}: out of memory? "
            "Its kernel's log, or the batch system's, tells",
        )


def _epochs(out: Path) -> int:
    with contextlib.suppress(OSError):
        return (out / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


def train(task: Task, device: str, token: str) -> Ended:
    """What a worker does: a task's runs, until they end, it is asked to stop, or nobody wants them."""
    import torch  # here: before its first task a worker is looked at, which need not take long

    from kdcache.allocator import keep_freed_memory
    from kdcache.sweep.workers import trained

    stop, over, wanted = StopRequest(), threading.Event(), still_wanted()

    def watch() -> None:
        while not over.wait(_WATCH_S) and not stop.asked:
            stop.asked = token in _stopped or not wanted()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        with _training:
            if stop.asked or token in _stopped:
                return dict.fromkeys((start.out for start in task.starts), "")
            keep_freed_memory()
            torch.set_num_threads(threads_here())
            return trained(task, device, stop)
    finally:
        over.set()
        watcher.join()


def ask_to_stop(token: str) -> None:
    """Beside a worker's tasks: those of this crew are to save and stop."""
    _stopped.add(token)


def unseen(cache: Path, shards: list[int], digest: str, mark: Path, files: Sequence[str]) -> str:
    """What of a sweep this worker does not see as the sweep does; empty when it sees all."""
    if not mark.exists():
        return f"it does not see {mark.parent} (or another folder is there)"
    if not os.access(mark.parent, os.W_OK):
        return f"it cannot write to {mark.parent}"
    try:
        if _digest(Cache(cache, shards=shards)) != digest:
            return f"another cache is at {cache}"
    except CacheError as error:
        return f"it cannot read the cache ({error})"
    absent = [file for file in files if not os.path.exists(file)]
    return f"it does not see {absent[0]} (in {os.getcwd()})" if absent else ""


def _digest(cache: Cache) -> str:
    """Of the manifest and the commit records, which have the digests of all that was written."""
    return hashlib.sha256(repr((cache.manifest, cache.commits)).encode()).hexdigest()
