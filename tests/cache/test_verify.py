"""Faults: each is found by `verify`, and no read of a faulty cache gives a wrong number."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import MANIFEST, TAP, make_row

from kdcache.cache.format import Remarks
from kdcache.cache.reader import Cache
from kdcache.cache.verify import verify
from kdcache.cache.writer import CacheWriter
from kdcache.cli import main
from kdcache.errors import CacheError

ROWS = 14
FAULTS = 200


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Fourteen rows in five shards, and an older state of the same cache with other rows."""
    folder = tmp_path_factory.mktemp("verify")
    for name, first in (("now", 0), ("before", 100)):
        with CacheWriter(folder / name, MANIFEST) as writer:
            for number in range(first, first + ROWS):
                writer.append(writer.encoded(*make_row(number)))
            writer.remark("photos", Remarks(skipped={"broken.jpg": "cannot be decoded"}))
    return folder


def files_of(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file())


def swap(first: Path, second: Path) -> None:
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def edit_number(rng: np.random.Generator, path: Path) -> None:
    """Change one value somewhere in a JSON document and write it back as kdcache writes."""
    document = json.loads(path.read_bytes())
    node, place = document, None
    while isinstance(node, dict | list) and node:
        place = (
            node,
            rng.choice(list(node)) if isinstance(node, dict) else rng.integers(len(node)),
        )
        node = place[0][place[1]]
    holder, key = place
    value = holder[key]
    holder[key] = value + 1 if isinstance(value, int) else f"{value}x"
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False))


def plant(rng: np.random.Generator, cache: Path, before: Path) -> str:
    """One random fault; returns what it was."""
    files = files_of(cache)
    path = files[rng.integers(len(files))]
    shards = [file for file in files if file.name.startswith("c.")]
    kind = rng.choice(["flip", "truncate", "delete", "swap", "stale", "edit", "stranger"])
    if kind == "flip":
        data = bytearray(path.read_bytes())
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(data)
    elif kind == "truncate":
        path.write_bytes(path.read_bytes()[: rng.integers(path.stat().st_size)])
    elif kind == "delete":
        path.unlink()
    elif kind == "swap":
        path = shards[rng.integers(len(shards))]
        others = [file for file in shards if file.parent == path.parent and file != path]
        swap(path, others[rng.integers(len(others))])
    elif kind == "stale":
        path = files[rng.integers(len(files))]
        old = (before / path.relative_to(cache)).read_bytes()
        path = path if old != path.read_bytes() else shards[0]
        shutil.copy(before / path.relative_to(cache), path)
    elif kind == "edit":
        documents = [file for file in files if file.name == "zarr.json"]
        path = documents[rng.integers(len(documents))]
        edit_number(rng, path)
    else:
        path = path.with_name("c.9.0.0.0" if rng.integers(2) else path.name + ".old")
        path.write_bytes(b"left over")
    return f"{kind} {path.relative_to(cache)}"


def assert_reads_are_right_or_raise(path: Path) -> None:
    try:
        cache = Cache(path)
    except CacheError:
        return
    for index, key in enumerate(cache.keys):
        _, expected = make_row(int(Path(key.sample_id).stem))
        for array, values in expected.items():
            try:
                found = cache.read(index, array)
            except CacheError:
                continue
            assert np.array_equal(found, values)


def test_a_sound_cache_is_ok(pristine):
    report = verify(pristine / "now")
    assert (report.ok, report.rows, report.bad, report.being_written) == (True, ROWS, [], False)
    on_disk = sum(f.stat().st_size for f in files_of(pristine / "now") if f.name.startswith("c."))
    assert sum(part.size_bytes for part in report.parts.values()) == on_disk
    assert {part.files for part in report.parts.values()} == {5}


def test_every_random_fault_is_found_and_no_read_is_wrong(pristine, tmp_path):
    missed = []
    for number in range(FAULTS):
        cache = tmp_path / "c"
        shutil.copytree(pristine / "now", cache)
        fault = plant(np.random.default_rng(number), cache, pristine / "before")
        try:
            ok = verify(cache, workers=1).ok
        except CacheError:
            ok = False
        if ok:
            missed.append(fault)
        assert_reads_are_right_or_raise(cache)
        shutil.rmtree(cache)
    assert missed == []


def test_spoilt_rows_are_named_and_others_are_not(pristine, tmp_path):
    shutil.copytree(pristine / "now", tmp_path / "c")
    path = tmp_path / "c/image/c.1.0.0.0"
    data = bytearray(path.read_bytes())
    data[5] ^= 4
    path.write_bytes(data)
    (problem,) = verify(tmp_path / "c").bad
    assert (problem.path, problem.rows) == ("image/c.1.0.0.0", ["photos/3.jpg"])
    assert "SHA-256 differs" in problem.problem


@pytest.mark.parametrize(
    ("array", "value", "message"),
    [
        ("teacher_logits", np.nan, "1 values are not finite"),
        ("mask", 7, "mask values other than"),
        (f"{TAP.folder}/affine", np.inf, "1 values are not finite"),
        ("rows", 0xFF, "no JSON of a row"),
    ],
)
def test_values_that_should_never_have_been_written_are_found(tmp_path, array, value, message):
    key, arrays = make_row(0)
    arrays[array] = arrays[array].copy()
    arrays[array].flat[0] = value
    with CacheWriter(tmp_path / "c", MANIFEST) as writer:
        writer.append(writer.encoded(key, arrays))
    (problem,) = verify(tmp_path / "c").bad
    assert message in problem.problem
    assert problem.rows == ["photos/0.jpg"]


def test_a_row_that_describes_another_sample_is_found(tmp_path):
    key, arrays = make_row(0)
    arrays["rows"] = make_row(1)[1]["rows"]
    with CacheWriter(tmp_path / "c", MANIFEST) as writer:
        writer.append(writer.encoded(key, arrays))
    (problem,) = verify(tmp_path / "c").bad
    assert "photos/1.jpg" in problem.problem


def test_a_cache_that_is_being_written_is_ok_so_far(tmp_path):
    with CacheWriter(tmp_path / "c", MANIFEST) as writer:
        writer.expect(3)
        for number in range(4):
            writer.append(writer.encoded(*make_row(number)))
        report = verify(tmp_path / "c")
    assert (report.ok, report.rows, report.being_written) == (True, 3, True)
    assert verify(tmp_path / "c").rows == 4


def test_commits_lost_with_their_files_are_found_and_made_good(pristine, tmp_path, caplog):
    for lost in ([1], [4], [0, 1, 2, 3, 4]):
        path = tmp_path / str(lost)
        shutil.copytree(pristine / "now", path)
        for shard in lost:
            shutil.rmtree(path / f"commits/{shard:06d}")
            for file in path.rglob(f"c.{shard}.*"):
                file.unlink()
        problems = verify(path).bad
        assert [p.path for p in problems] == [f"commits/{n:06d}/zarr.json" for n in lost]
        caplog.clear()
        kept = Cache(path)
        assert f"has lost the commit records of shards {lost}" in caplog.text
        assert_reads_are_right_or_raise(path)
        with CacheWriter(path, MANIFEST) as writer:
            for number in range(ROWS):
                key, arrays = make_row(number)
                if key not in kept.keys:
                    writer.append(writer.encoded(key, arrays))
        assert verify(path).ok
        assert sorted(Cache(path).keys) == sorted(Cache(pristine / "now").keys)


def test_two_caches_copied_into_one_folder(pristine, tmp_path):
    """As `rsync` does without --delete: the root of one, shards of both."""
    other = dataclasses.replace(MANIFEST, fingerprint={**MANIFEST.fingerprint, "size": "64"})
    with CacheWriter(tmp_path / "other", other) as writer:
        writer.expect(-(-ROWS // MANIFEST.shard_rows))
        for number in range(4):
            writer.append(writer.encoded(*make_row(number)))
    shutil.copytree(pristine / "now", tmp_path / "c")
    shutil.copytree(tmp_path / "other", tmp_path / "c", dirs_exist_ok=True)
    report = verify(tmp_path / "c")
    assert {p.path for p in report.bad if "made with other models or settings" in p.problem} == {
        f"commits/{n:06d}/zarr.json" for n in (2, 3, 4)
    }
    with pytest.raises(CacheError, match="two caches were copied into one folder"):
        Cache(tmp_path / "c")
    with pytest.raises(CacheError, match="two caches were copied into one folder"):
        CacheWriter(tmp_path / "c", other)


@pytest.mark.parametrize("content", ["{}", "xx{", "[1]", "[" * 100_000, '{"shape": []}', None])
@pytest.mark.parametrize("node", ["mask", "commits", "features", ".", "skipped", "commits/000001"])
def test_unreadable_node_is_a_problem_and_one_clear_error(pristine, tmp_path, node, content):
    shutil.copytree(pristine / "now", tmp_path / "c")
    path = tmp_path / "c" / node / "zarr.json"
    path.unlink() if content is None else path.write_text(content)
    if (node, content) != (".", None):
        assert not verify(tmp_path / "c", workers=1).ok
    if node in ("mask", ".") or (node == "commits/000001" and content):
        with pytest.raises(CacheError, match="zarr.json"):
            CacheWriter(tmp_path / "c", MANIFEST)


@pytest.mark.parametrize(
    ("plant", "path"),
    [
        (lambda c: (c / "mask/d").symlink_to("/tmp"), "mask/d"),
        (lambda c: (c / "commits/00000²").mkdir(), "commits/00000²"),
        (lambda c: (c / "mask/zarr.json").write_text(
            (c / "mask/zarr.json").read_text().replace("  15,", "  15.0,", 1)), "mask/zarr.json"),
        (lambda c: (c / "mask").rename(c.parent / "m") and (c / "mask").symlink_to(c.parent / "m"),
         "mask"),
    ],
)  # fmt: skip
def test_strangers_and_links_are_found(pristine, tmp_path, plant, path):
    shutil.copytree(pristine / "now", tmp_path / "c")
    plant(tmp_path / "c")
    assert path in {problem.path for problem in verify(tmp_path / "c").bad}


def test_growth_that_was_cut_short_is_told_and_mended(pristine, tmp_path):
    shutil.copytree(pristine / "now", tmp_path / "c")
    path = tmp_path / "c/mask/zarr.json"
    path.write_text(path.read_text().replace("15,", "12,", 1))
    (problem,) = verify(tmp_path / "c").bad
    assert "its length is 12, the root record says 15" in problem.problem
    with CacheWriter(tmp_path / "c", MANIFEST):
        pass
    assert verify(tmp_path / "c").ok


@pytest.mark.parametrize("compression", ["lz4", "none"])
def test_other_compressions_are_verified_too(tmp_path, compression):
    manifest = dataclasses.replace(MANIFEST, compression=compression)
    with CacheWriter(tmp_path / "c", manifest) as writer:
        writer.append(writer.encoded(*make_row(0)))
    assert verify(tmp_path / "c").ok
    path = tmp_path / "c" / TAP.folder / "codes_x1" / "c.0.0.0.0"
    path = path if path.exists() else path.with_name("c.0.0")
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    assert not verify(tmp_path / "c").ok


def test_command_prints_a_table_and_exits_1_when_something_is_wrong(pristine, tmp_path):
    result = CliRunner().invoke(main, ["verify", str(pristine / "now")])
    assert result.exit_code == 0
    assert "14 rows, every byte is as committed" in result.output
    shutil.copytree(pristine / "now", tmp_path / "c")
    (tmp_path / "c/mask/c.0.0.0").unlink()
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "c"), "--json"])
    assert result.exit_code == 1
    report = json.loads(result.output)
    assert (report["ok"], report["rows"]) == (False, ROWS)
    assert report["bad"][0]["path"] == "mask/c.0.0.0"
