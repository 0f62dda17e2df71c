"""Extractions killed, interrupted, out of disk space or doubled, as processes, then run again.

Each ends equal to the extraction that nobody disturbed, and computes no committed row twice.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SIZE, Standins, rows_equal
from tqdm import tqdm

from kdcache.cache import need
from kdcache.cache.format import commit_answers, commit_name
from kdcache.cache.reader import Cache
from kdcache.cache.verify import verify
from kdcache.cli import main
from kdcache.standins import save_detector, save_scenes, save_teacher

IMAGES = 48
SHARD_ROWS = 2

# Forks of a process that has imported the heavy libraries start in milliseconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["kdcache.cli", "kdcache.precompute.extract", "segmentation_models_pytorch", "test_crash"]
)


class Extraction:
    """`kdcache extract` in a process of its own, its standard error in a file.

    `blind` to how little space is left, as it is where others fill the disk meanwhile.
    """

    def __init__(self, data: Standins, out: Path, log: Path, blind: bool = False) -> None:
        arguments = ["extract", "--images", data.images, "--masks", data.masks]
        arguments += ["--yolo", data.detector, "--teacher", data.teacher, "--out", out]
        arguments += ["--size", SIZE, "--device", "cpu", "--val-fraction", 0.3]
        arguments += ["--set", f"shard_rows={SHARD_ROWS}"]
        self._log = log
        self.process = PROCESSES.Process(target=_command, args=([*map(str, arguments)], log, blind))
        self.process.start()

    def wait(self) -> int:
        self.process.join(timeout=120)
        assert self.process.exitcode is not None, "it hangs"
        return self.process.exitcode

    def stop(self, number: int) -> int:
        """Send a signal; the exit status, 0 when it had ended well before."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)
        return self.wait()

    @property
    def said(self) -> str:
        return self._log.read_text()


def _command(arguments: list[str], log: Path, blind: bool) -> None:
    if blind:
        need.free = lambda out: (2**60, None)
    with log.open("w") as file:
        os.dup2(file.fileno(), 2)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore that a killed process would leave
    main(arguments)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Standins:
    folder = tmp_path_factory.mktemp("data")
    save_detector(folder / "detector.onnx", channels=8)
    save_teacher(folder / "teacher.onnx")
    save_scenes(folder, IMAGES, 90, 120)
    return Standins(folder)


@pytest.fixture(scope="module")
def undisturbed(data: Standins, tmp_path_factory: pytest.TempPathFactory) -> tuple[Cache, float]:
    """The cache of an extraction that ran through, and the seconds from its first commit to its end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    extraction = Extraction(data, folder / "c", folder / "log")
    wait_for_commit(extraction, folder / "c")
    started = time.monotonic()
    assert extraction.wait() == 0, extraction.said
    cache = Cache(folder / "c")
    assert len(cache) == IMAGES
    return cache, time.monotonic() - started


def wait_for_commit(extraction: Extraction, out: Path) -> None:
    while extraction.process.is_alive() and not commits(out):
        time.sleep(0.002)


def commits(out: Path) -> int:
    return len(commit_answers(out, "commits")) if (out / "commits").is_dir() else 0


def committed_files(out: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each file of committed shards: a row computed again would change them."""
    cache = Cache(out)
    files = [s.shard_path(c.shard) for c in cache.commits for s in cache.manifest.arrays()]
    files += [commit_name("commits", shard) for shard in commit_answers(out, "commits")]
    return {name: ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) for name in files}


def assert_resumes(data: Standins, out: Path, log: Path, whole: Cache) -> None:
    """What is committed is right; running again adds the rest and touches nothing else."""
    kept = Cache(out)
    assert_same_rows(kept, whole)
    before = committed_files(out)
    extraction = Extraction(data, out, log)
    assert extraction.wait() == 0, extraction.said
    assert before.items() <= committed_files(out).items()
    assert rows_equal(Cache(out), whole)
    report = verify(out)
    assert report.ok, report.bad


def assert_same_rows(part: Cache, whole: Cache) -> None:
    for index, key in enumerate(part.keys):
        for spec in part.manifest.arrays():
            theirs = whole.read(whole.keys.index(key), spec.path)
            assert np.array_equal(part.read(index, spec.path), theirs)


def moments(in_ci: int) -> Any:
    """How many random moments to try: a few in every run, fifty where there is time."""
    return pytest.mark.parametrize("count", [in_ci, pytest.param(50, marks=pytest.mark.slow)])


@moments(5)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_extraction_stopped_at_random_moments_resumes_to_the_same_cache(
    data, undisturbed, tmp_path, number, count
):
    whole, seconds = undisturbed
    rng = np.random.default_rng(number)
    found = []
    for trial in range(10 * count):
        out, log = tmp_path / f"{trial}.zarr", tmp_path / f"{trial}.log"
        extraction = Extraction(data, out, log)
        wait_for_commit(extraction, out)
        time.sleep(rng.uniform(0, seconds))
        if extraction.stop(number) == 0:
            continue
        # SIGTERM ends it as it ends any process before and after it has the cache open
        ended = {signal.SIGKILL: {-9}, signal.SIGINT: {1}, signal.SIGTERM: {1, -15}}[number]
        assert extraction.wait() in ended
        assert "Traceback" not in extraction.said, extraction.said
        found.append(commits(out))
        assert_resumes(data, out, log, whole)
        if len(found) == count:
            break
    assert len(found) == count
    assert min(found) >= 1
    print(f"{signal.Signals(number).name}: commits before it {found}")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_extraction_stopped_before_its_first_commit(data, undisturbed, tmp_path, number):
    """Creation of the cache included."""
    rng = np.random.default_rng(number)
    out, log = tmp_path / "c", tmp_path / "log"
    for _ in range(3):
        extraction = Extraction(data, out, log)
        while extraction.process.is_alive() and not list(tmp_path.glob("c[!-]*")):
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.03))
        extraction.stop(number)
    extraction = Extraction(data, out, log)
    assert extraction.wait() == 0, extraction.said
    assert rows_equal(Cache(out), undisturbed[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "c-check.png", "log"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory, to be resized by `resize`; only root may have one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "kdcache", folder], check=False
    )
    if made.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def resize(disk: Path, size_kib: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size_kib}k", disk], check=True)


@moments(4)
def test_extraction_that_fills_the_disk_resumes_to_the_same_cache(
    data, undisturbed, tmp_path, small_disk, count
):
    whole, _ = undisturbed
    used_kib = sum(p.stat().st_blocks for p in whole.path.rglob("*")) // 2
    found = []
    for size_kib in np.linspace(40, used_kib, count, dtype=int):
        out, log = small_disk / "c", tmp_path / "log"
        resize(small_disk, size_kib)
        extraction = Extraction(data, out, log, blind=True)
        if extraction.wait() == 0:
            assert size_kib > 0.9 * used_kib
        else:
            assert extraction.wait() == 1
            assert "No space left on device" in extraction.said
            assert "Traceback" not in extraction.said
            assert not list(small_disk.rglob("*.kdtmp"))
        resize(small_disk, 4 * used_kib)
        found.append(commits(out))
        if found[-1]:
            assert_resumes(data, out, log, whole)
        for path in sorted(small_disk.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    print(f"disk full: commits before it {found}")


@pytest.mark.parametrize("there", [True, False])
def test_two_extractions_into_one_cache(data, undisturbed, tmp_path, there):
    """One writes it all; the other is refused, or comes after and finds everything done."""
    whole, _ = undisturbed
    for attempt in range(3):
        out = tmp_path / f"{attempt}.zarr"
        if there:
            first = Extraction(data, out, tmp_path / "first")
            wait_for_commit(first, out)
            first.stop(signal.SIGKILL)
        pair = [Extraction(data, out, tmp_path / f"log{n}") for n in range(2)]
        codes = [extraction.wait() for extraction in pair]
        assert 0 in codes
        for code, extraction in zip(codes, pair, strict=True):
            assert code == 0 or "another process" in extraction.said, extraction.said
        assert rows_equal(Cache(out), whole)
        assert verify(out).ok
    leftovers = [path for path in tmp_path.iterdir() if path.name.endswith(".kdtmp")]
    assert not leftovers
