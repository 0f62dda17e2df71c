"""Is every byte of a cache still what was committed, and is nothing there that should not be."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from kdcache.cache.format import (
    Commit,
    Mirrored,
    Root,
    RowKey,
    Staged,
    augmentation_digest,
    commit_answers,
    commit_name,
    lost_shards,
    manifest_digest,
    next_commits,
    parse_commit,
    parse_row,
    read_node,
    read_remarks,
    read_root,
    read_staged,
)
from kdcache.cache.layout import MASK, ROWS, ArraySpec
from kdcache.cache.lock import is_being_written
from kdcache.cache.shard import (
    DamagedError,
    chunk_of,
    chunk_range,
    decode_chunk,
    decode_index,
    index_bytes,
)
from kdcache.durable import TEMPORARY_SUFFIX
from kdcache.errors import CacheError
from kdcache.imaging import BACKGROUND, IGNORE, PADDING, PERSON
from kdcache.places import Place, Url

_MASK_VALUES = (BACKGROUND, PERSON, PADDING, IGNORE)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is not as it was committed."""

    path: str  # of the file, in the cache's folder
    problem: str
    rows: list[str] = field(default_factory=list)  # sample ids of the rows that it spoils


@dataclass(frozen=True, kw_only=True)
class Part:
    """What was checked of one array."""

    files: int
    size_bytes: int
    bad_files: int


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far some rows of one part are from what its model gives now."""

    rows: int
    bad_rows: int
    largest_error: float
    largest_of_allowed: float  # the largest error, as a fraction of what is allowed there
    relative_mse: float | None  # Σ error² / Σ (x − mean)²; None for constant maps


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """The verdict on a cache. `rows` counts the rows that are committed."""

    path: str
    ok: bool
    rows: int
    bad: list[Problem]
    parts: dict[str, Part]
    being_written: bool  # a writer has the cache open: its unfinished files are not problems
    models: dict[str, Agreement] = field(default_factory=dict)  # by part, where models were given
    mirrored: dict[str, Mirrored] = field(
        default_factory=dict
    )  # by tap, or LOGITS, where asked for
    not_kept: str = ""  # why the cache does not have those now


def verify(path: Place, *, workers: int = 2, progress: bool = False) -> VerifyReport:
    """Read every byte of the cache at a folder and compare it with what was committed.

    Checks the root record, every zarr.json, every commit record, size, SHA-256, index, chunk
    checksums and values of every shard file, and that no other file lies in the folder. Raises
    CacheError only when there is no cache at `path`; all else is in the report.
    """
    try:
        root, being_written = read_root(path), is_being_written(path)
    except CacheError as error:
        if not (path / "zarr.json").is_file():
            raise
        bad = [Problem(path="zarr.json", problem=f"{error}; nothing below it can be checked")]
        return _report(path, [], {}, bad, being_written=False)
    specs = root.manifest.arrays()
    commits, bad = _check_commits(path, root)
    bad += _check_skipped(path)
    jobs = [(commit, spec) for commit in commits for spec in specs if spec.path in commit.objects]
    sizes = Counter[str]()
    files, bad_files = Counter[str](), Counter[str]()
    total = sum(commit.objects[spec.path].size_bytes for commit, spec in jobs)
    bar = tqdm(
        total=total, desc="verify", unit="B", unit_scale=True, disable=None if progress else True
    )
    with bar, ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
        try:
            found = pool.map(lambda job: list(_check_shard(path, root, *job)), jobs)
            for (commit, spec), problems in zip(jobs, found, strict=True):
                size = commit.objects[spec.path].size_bytes
                files[spec.path] += 1
                sizes[spec.path] += size
                bad_files[spec.path] += bool(problems)
                bad += problems
                bar.update(size)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    # After the shards, which takes long: a writer may have come in the meantime.
    root, being_written = read_root(path), being_written or is_being_written(path)
    bad += _check_nodes(path, root, commits, being_written)
    bad += _check_files(path, root, commits, being_written)
    parts = {
        name: Part(files=files[name], size_bytes=sizes[name], bad_files=bad_files[name])
        for name in (spec.path for spec in specs)
    }
    return _report(path, commits, parts, bad, being_written)


def _report(
    path: Place,
    commits: Sequence[Commit],
    parts: dict[str, Part],
    bad: list[Problem],
    being_written: bool,
) -> VerifyReport:
    return VerifyReport(
        path=str(path),
        ok=not bad,
        rows=sum(len(commit.keys) for commit in commits),
        bad=bad,
        parts=parts,
        being_written=being_written,
    )


def _check_commits(path: Place, root: Root) -> tuple[list[Commit], list[Problem]]:
    commits, bad = [], []
    seen: dict[RowKey, int] = {}
    arrays = {spec.path for spec in root.manifest.arrays()}
    digest = manifest_digest(root.manifest)
    answers = commit_answers(path, root.commits)
    for shard, data in answers.items():
        name = commit_name(root.commits, shard)
        try:
            if isinstance(data, OSError):
                raise data
            commit = parse_commit(path, root.commits, shard, data, digest)
        except (CacheError, OSError) as error:
            bad.append(Problem(path=name, problem=str(error)))
            continue
        commits.append(commit)
        if commit.objects.keys() != arrays:
            problem = f"names {sorted(commit.objects)}, the cache has {sorted(arrays)}"
            bad.append(Problem(path=name, problem=problem, rows=_samples(commit)))
        for key in commit.keys:
            if key in seen:
                problem = f"row {tuple(key)} is in shard {seen[key]} too"
                bad.append(Problem(path=name, problem=problem, rows=[key.sample_id]))
            seen[key] = commit.shard
    for shard in lost_shards(root, answers):
        problem = "is gone, and with it the rows of its shard; the next extraction computes them"
        bad.append(Problem(path=commit_name(root.commits, shard), problem=problem))
    return commits, bad


def _check_nodes(
    path: Place, root: Root, commits: Sequence[Commit], being_written: bool
) -> Iterator[Problem]:
    """Every zarr.json below the root that is neither a commit record nor the skipped list."""
    shard_rows = root.manifest.shard_rows
    needed = max((commit.shard + 1 for commit in commits), default=0) * shard_rows
    if root.array_rows < needed:
        problem = f"array_rows is {root.array_rows}, the committed shards reach {needed}"
        yield Problem(path="zarr.json", problem=problem)
    arrays = {spec.path for spec in root.manifest.arrays()}
    for name in root.nodes:
        file = f"{name}/zarr.json"
        try:
            document = read_node(path, root, name)
        except CacheError as error:
            yield Problem(path=file, problem=str(error))
            continue
        if name in arrays and document["shape"][0] != root.array_rows and not being_written:
            yield Problem(
                path=file,
                problem=f"its length is {document['shape'][0]}, the root record says "
                f"{root.array_rows}: it was edited, or a writer was interrupted (the next "
                "`kdcache extract` mends that)",
            )


def _check_skipped(path: Place) -> Iterator[Problem]:
    try:
        read_remarks(path)
    except (CacheError, OSError, KeyError, ValueError) as error:
        yield Problem(path="skipped/zarr.json", problem=str(error))


def _check_files(
    path: Place, root: Root, commits: Sequence[Commit], being_written: bool
) -> Iterator[Problem]:
    """Files and folders that neither the root nor a commit accounts for."""
    specs, staged = root.manifest.arrays(), None
    # damaged records too: they have their own problem
    shards = {*commit_answers(path, root.commits), *(commit.shard for commit in commits)}
    expected = {"zarr.json", "skipped/zarr.json", f"{root.commits}/zarr.json"}
    expected |= {f"{name}/zarr.json" for name in root.nodes}
    expected |= {commit_name(root.commits, shard) for shard in shards}
    expected |= {spec.shard_path(shard) for spec in specs for shard in shards}
    with contextlib.suppress(CacheError):
        staged = read_staged(path, root)
    for file, problem in _entries(path):
        if problem:
            yield Problem(path=file, problem=problem)
        elif not (
            file in expected
            or _of_a_refresh(file, root, staged)
            or (being_written and _may_be_a_writers(file, commits))
        ):
            yield Problem(
                path=file,
                problem="no record accounts for it: a left-over of an interrupted writer (the "
                "next `kdcache extract` removes it), a file whose commit record was lost, or a "
                "stranger",
            )


def _entries(path: Place) -> Iterator[tuple[str, str]]:
    """Every file and empty folder of a cache, and what is wrong with it by itself."""
    if isinstance(path, Url):
        yield from ((file, "") for file in path.files())
        return
    unreadable: list[OSError] = []
    for folder, subfolders, names in os.walk(path, onerror=unreadable.append):
        inside = Path(folder).relative_to(path)
        for name in (*names, *subfolders):
            if (path / inside / name).is_symlink():
                yield (
                    (inside / name).as_posix(),
                    "is a link: a copy of the cache would be without what it leads to",
                )
        empty = not subfolders and not names
        yield from (((inside / name).as_posix(), "") for name in names or ([""] * empty))
    for error in unreadable:
        name = Path(str(error.filename)).relative_to(path).as_posix()
        yield name, f"cannot be read: {error.strerror}"


def _of_a_refresh(file: str, root: Root, staged: Staged | None) -> bool:
    """Whether a refresh that was interrupted before or after its switch left this."""
    folders = list(root.replaced)
    if staged is not None:
        folders += [next_commits(root), *staged.nodes]
    return any(f"{file}/".startswith(f"{folder}/") for folder in folders)  # or it, without a file


def _may_be_a_writers(file: str, commits: Sequence[Commit]) -> bool:
    """Whether a writer at work may have made this file since the commit records were read."""
    committed = {commit.shard for commit in commits}
    shard = re.match(r"(?:commits[.0-9]*/|.*/c\.)([0-9]+)", file)
    return file.endswith(TEMPORARY_SUFFIX) or bool(shard and int(shard[1]) not in committed)


def _check_shard(path: Place, root: Root, commit: Commit, spec: ArraySpec) -> Iterator[Problem]:
    """One shard file: as a whole, and each of its rows."""
    name = spec.shard_path(commit.shard)
    record, slots = commit.objects[spec.path], root.manifest.shard_rows
    made_by = augmentation_digest(root.manifest.augmentation or {})
    try:
        data = (path / name).read_bytes()
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
        yield Problem(path=name, problem=problem, rows=_samples(commit))
        return
    wrong = []
    if len(data) != record.size_bytes:
        wrong.append(f"has {len(data)} bytes, {record.size_bytes} were committed")
    elif hashlib.sha256(data).hexdigest() != record.sha256:
        wrong.append("its SHA-256 differs from the committed one")
    spoilt = {}
    try:
        index = decode_index(data[-index_bytes(slots) :], slots)
        for slot, key in enumerate(commit.keys):
            try:
                offset, length = chunk_range(index, slot, len(data))
                chunk = chunk_of(data[offset : offset + length])
                stored = np.empty(spec.stored.shape, spec.stored.dtype)
                flat = stored.reshape(-1).view(np.uint8)
                decode_chunk(chunk, record.crc(slot), root.manifest.compression, flat)
                _check_values(spec, spec.undo(stored), key, made_by)
            except DamagedError as error:
                spoilt[key.sample_id] = str(error)
    except DamagedError as error:
        spoilt = dict.fromkeys(_samples(commit), str(error))
    wrong += dict.fromkeys(spoilt.values())
    if wrong:
        yield Problem(path=name, problem="; ".join(wrong), rows=list(spoilt))


def _check_values(spec: ArraySpec, array: NDArray[Any], key: RowKey, made_by: str) -> None:
    """What a row may hold; raises DamagedError. `made_by` is the digest of what made the views."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DamagedError(f"{np.count_nonzero(~np.isfinite(array))} values are not finite")
    if spec.path == MASK and not np.isin(array, _MASK_VALUES).all():
        raise DamagedError(f"mask values other than {_MASK_VALUES}")
    if spec.path == ROWS:
        try:
            description = parse_row(array)
            described = RowKey(*(description[name] for name in RowKey._fields))
        except (ValueError, KeyError) as error:
            raise DamagedError(f"its description is no JSON of a row: {error}") from error
        if described != key:
            raise DamagedError(f"describes {tuple(described)}, {tuple(key)} was committed")
        if key.view and description.get("augmentation") != made_by:
            raise DamagedError("its view was made by another augmentation than the cache states")


def _samples(commit: Commit) -> list[str]:
    return [key.sample_id for key in commit.keys]
