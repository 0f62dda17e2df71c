"""Dask clusters for both stages: connecting, workers on this machine, a GPU for each.

What schedules, sends and watches is dask.distributed; here is what it cannot know: which GPU and
how many threads a process is for, that its code is ours, and what to tell when something is not so.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pickle
import signal
import socket
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
from dask.system import CPU_COUNT
from distributed import Client, KilledWorker, Nanny, Scheduler, SpecCluster, Worker, get_worker
from distributed.comm.core import CommClosedError
from distributed.core import Status
from distributed.utils import silence_logging_cmgr

import kdcache
from kdcache.errors import ClusterError
from kdcache.gpus import gpu_of, visible_gpus

log = logging.getLogger(__name__)

_CONNECT_S = 10
_SOON_S = 3  # in which workers that are there have told the scheduler
_PATIENCE_S = 300  # for workers that a batch system is about to start
_CLOSE_S = 10

_THREADS = "KDCACHE_THREADS"
_POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # read by libraries

_HOW_TO_START = (
    "start one with `dask scheduler`, and on each machine `dask worker ADDRESS --nworkers 1` "
    "in an environment with this kdcache"
)


@dataclass(frozen=True, kw_only=True)
class WorkerDevice:
    """What a worker computes on."""

    address: str
    host: str
    pid: int
    gpu: str | None  # its UUID; None on the CPU
    visible: str | None  # the worker's CUDA_VISIBLE_DEVICES
    threads: int

    def __str__(self) -> str:
        on = f"GPU {self.gpu}" if self.gpu else f"CPU, {self.threads} threads"
        return f"{self.address} ({self.host}, process {self.pid}): {on}"


@contextmanager
def connected(address: str) -> Iterator[Client]:
    """A client of the cluster at a scheduler's address, or in its scheduler file (.json).

    There is at least one worker, and all have this kdcache and this Python. Raises ClusterError
    within about 10 s where there is no scheduler.
    """
    with _client(_scheduler(address)) as client:
        _await_workers(client)
        check_versions(client)
        yield client


@contextmanager
def local_workers(count: int, *, device: str = "auto", nthreads: int = 1) -> Iterator[Client]:
    """A client of `count` worker processes on this machine, that share its cores.

    Where there are GPUs, and `device` is not "cpu", each has one for itself and sees no other; no
    process touches CUDA for that. Raises ClusterError for more workers than GPUs.
    """
    gpus = [] if device == "cpu" else visible_gpus()
    if gpus and count > len(gpus):
        raise ClusterError(
            f"{count} workers for {len(gpus)} GPUs ({', '.join(gpus)}): each needs one for itself; "
            f"ask for {len(gpus)} or fewer, or for --device cpu"
        )
    threads = str(max(1, int(os.environ.get("OMP_NUM_THREADS", CPU_COUNT)) // count))
    # numpy's and torch's libraries read these once, while dask's worker process is still starting
    pools = dict.fromkeys((*_POOLS, _THREADS), threads)
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        stack.enter_context(_environment(pools))
        stack.enter_context(dask.config.set({"distributed.nanny.pre-spawn-environ": pools}))
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="kdcache-workers-"))
        options = {
            "host": "127.0.0.1",
            "nthreads": nthreads,
            # dask pauses and kills workers by their resident memory, and frozen models, cuDNN's
            # workspaces and pages of mapped files are that: it would stop what works
            "memory_limit": 0,
            "local_directory": scratch,
            "preload": [__name__],  # see dask_setup
            "silence_logs": logging.CRITICAL,
        }
        workers = {
            number: {
                "cls": Nanny,
                "options": options | {"env": {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}},
            }
            for number, gpu in enumerate((gpus or [""] * count)[:count])
        }
        own = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
        try:
            cluster = SpecCluster(
                workers=workers,
                scheduler={"cls": Scheduler, "options": own},
                silence_logs=logging.CRITICAL,
            )
        except (RuntimeError, OSError, TimeoutError) as error:
            raise ClusterError(f"the worker processes did not start: {error}") from error
        stack.callback(cluster.close, timeout=_CLOSE_S)
        yield stack.enter_context(_client(cluster.scheduler_address))


def dask_setup(worker: Worker) -> None:
    """What dask does in each of `local_workers`: a terminal's Ctrl-C is for the client alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def devices(
    client: Client, device: str = "auto", workers: list[str] | None = None
) -> list[WorkerDevice]:
    """What each worker (of those named) computes on; each one's GPU is its own.

    Raises ClusterError for a worker without the device, and where two have the same GPU.
    """
    found = asked(client, describe, device, workers=workers)
    described: list[WorkerDevice] = list(found.values())
    for one in described:
        log.info("worker %s", one)
    check_distinct(described)
    return described


async def describe(device: str, dask_worker: Worker) -> WorkerDevice:
    """This worker's device: asked for in the worker itself, which is the one to open CUDA."""
    return WorkerDevice(
        address=dask_worker.address,
        host=socket.gethostname(),
        pid=os.getpid(),
        gpu=await asyncio.to_thread(gpu_of, device),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        threads=_threads(dask_worker),
    )


def check_distinct(workers: Sequence[WorkerDevice]) -> None:
    """Raise ClusterError where two workers would share a GPU, with what to do."""
    users = defaultdict(list)
    for worker in workers:
        users[worker.gpu].append(worker)
    for gpu, several in users.items():
        if gpu and len(several) > 1:
            names = " and ".join(f"{w.address} (process {w.pid})" for w in several)
            raise ClusterError(
                f"{names} on {several[0].host} compute on the same GPU {gpu}: start each "
                "`dask worker` with a CUDA_VISIBLE_DEVICES of its own, or start them by "
                "`dask cuda worker` (dask-cuda), or start fewer"
            )


def check_versions(client: Client, workers: list[str] | None = None) -> None:
    """Raise ClusterError for a worker, or scheduler, without this kdcache and this Python's minor."""
    found: dict[str, Any] = client.run(versions, workers=workers, on_error="return")
    try:
        found = {"the scheduler": client.run_on_scheduler(versions), **found}
    except Exception as error:  # it takes tasks apart, and needs their modules for that
        found = {"the scheduler": error, **found}
    ours = versions()
    for address, theirs in found.items():
        if isinstance(theirs, Exception):
            raise ClusterError(
                f"{address} has no kdcache {ours['kdcache']} ({theirs}): install it there, and start "
                "it again"
            )
        for name, version in ours.items():
            if theirs[name] != version:
                raise ClusterError(
                    f"{address} has {name} {theirs[name]}, here it is {version}: install the same "
                    "there, and start it again"
                )


def versions() -> dict[str, str]:
    """What has to be alike on both sides."""
    return {"kdcache": kdcache.__version__, "Python": "{}.{}".format(*sys.version_info)}


def asked(
    client: Client,
    function: Callable[..., Any],
    *arguments: Any,
    workers: list[str] | None = None,
) -> dict[str, Any]:
    """Each worker's answer, by its address; an error becomes a ClusterError.

    The function runs in the worker's event loop, beside its tasks: see `answer`.
    """
    with told_plainly():
        found = client.run(function, *arguments, workers=workers, on_error="return")
    for address, given in found.items():
        if isinstance(given, Exception):
            raise ClusterError(f"worker {address}: {given}") from given
    return dict(found)


def sealed(function: Callable[..., Any], *arguments: Any) -> bytes:
    """A call that only the thread that does it unpacks: the argument of `unsealed`, as a task.

    What is submitted as it is, is unpickled by the scheduler too, and in event loops; importing
    torch there leaves all of a cluster without answers for as long as that takes.
    """
    return pickle.dumps((function, arguments))


def unsealed(call: bytes, *more: Any) -> Any:
    """Do a sealed call: `client.submit(unsealed, sealed(function, …), pure=False)`.

    `more` are arguments that dask is to fetch, such as futures of data it has scattered.
    """
    function, arguments = pickle.loads(call)
    return function(*arguments, *more)


async def answer(call: bytes) -> Any:
    """Do a sealed call while the event loop goes on: `asked(client, answer, sealed(function, …))`."""
    return await asyncio.to_thread(unsealed, call)


@contextmanager
def told_plainly() -> Iterator[None]:
    """Turn what dask says of lost workers, schedulers and connections into one ClusterError."""
    try:
        yield
    except KilledWorker as error:
        raise ClusterError(
            f"{error.allowed_failures + 1} workers died one after the other at the same task "
            f"({error.task}), the last was {error.last_worker.address}: out of memory? Their logs tell"
        ) from error
    except (CommClosedError, OSError, CancelledError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # a disk's: what dask says of connections has no number
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ClusterError(
            f"the cluster's scheduler is lost, or does not answer ({first}); what is committed stays: "
            "start it again, and the same command goes on"
        ) from error


def threads_here() -> int:
    """How many threads the models of a task may use, in the worker that asks.

    $KDCACHE_THREADS, or `dask worker --nthreads`: those are for as many small tasks, of ours one
    has the whole worker. (OMP_NUM_THREADS says nothing: dask sets it to 1.)
    """
    return _threads(get_worker())


def _threads(worker: Worker) -> int:
    return max(1, int(os.environ.get(_THREADS) or worker.state.nthreads))


def still_wanted() -> Callable[[], bool]:
    """In a task: a function for any thread, that says whether somebody still waits for its result.

    Not when the client cancelled it or is gone, or the worker is closing: dask does not interrupt
    the thread of a task.
    """
    worker = get_worker()
    key = worker.get_current_task()

    def wanted() -> bool:
        task = worker.state.tasks.get(key)
        return (
            worker.status in (Status.running, Status.paused)
            and task is not None
            and task.state in ("executing", "long-running")
        )

    return wanted


def _scheduler(address: str) -> str:
    """The address, also of a scheduler file."""
    if not address.endswith(".json"):
        return address
    try:
        return str(json.loads(Path(address).read_text())["address"])
    except (OSError, ValueError, KeyError) as error:
        raise ClusterError(
            f"{address} is no scheduler file (`dask scheduler --scheduler-file {address}` writes "
            f"one): {error!r}"
        ) from error


@contextmanager
def _client(address: str) -> Iterator[Client]:
    with _quiet():
        try:
            client = Client(address, timeout=_CONNECT_S, name="kdcache")
        except (OSError, ValueError, ImportError) as error:
            raise ClusterError(
                f"no dask scheduler answers at {address} ({error}); {_HOW_TO_START}"
            ) from error
        try:
            log.info("dask cluster %s%s", address, _dashboard(client))
            yield client
        finally:
            with suppress(OSError, TimeoutError):  # it may be lost
                client.close(timeout=_CLOSE_S)


def _dashboard(client: Client) -> str:
    """Where people look at it: without bokeh, which dask's dashboard needs, at a list of workers."""
    with suppress(KeyError):
        link = str(client.dashboard_link)
        found: Any = client.get_versions(packages=["bokeh"])
        if found["scheduler"]["packages"]["bokeh"] is None:
            return f", its workers {link.removesuffix('status')}info/main/workers.html"
        return f", dashboard {link}"
    return ""  # it was started without


def _await_workers(client: Client) -> None:
    address = client.scheduler_info()["address"]
    try:
        client.wait_for_workers(1, timeout=_SOON_S)
    except TimeoutError:
        log.warning(
            "%s has no workers yet; waiting for one, up to %d s (`dask worker %s`)",
            address,
            _PATIENCE_S,
            address,
        )
        try:
            client.wait_for_workers(1, timeout=_PATIENCE_S)
        except TimeoutError as error:
            raise ClusterError(
                f"{address} still has no workers after {_PATIENCE_S} s; start some: dask worker {address}"
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without dask's own lines on lost connections, late heartbeats and closing: errors are raised."""
    with silence_logging_cmgr(logging.CRITICAL):
        yield


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set for the block: a nanny gives them to its process through its own, here ours."""
    names = {*variables, *dask.config.get("distributed.nanny.pre-spawn-environ"), "PYTHONHASHSEED"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
