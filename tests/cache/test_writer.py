"""Writing: whole shards, commit records, resume, and refusals."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import MANIFEST, make_row

from kdcache.cache.format import Remarks, read_remarks
from kdcache.cache.lock import FolderLock
from kdcache.cache.reader import Cache
from kdcache.cache.verify import verify
from kdcache.cache.writer import CacheWriter
from kdcache.errors import CacheError, FingerprintError


def write(path: Path, numbers: range, split: str = "train") -> None:
    with CacheWriter(path, MANIFEST) as writer:
        for number in numbers:
            writer.append(writer.encoded(*make_row(number, split)))


def assert_holds(path: Path, numbers: range) -> None:
    cache = Cache(path)
    assert cache.samples == [f"photos/{n}.jpg" for n in numbers]
    for index, number in enumerate(numbers):
        for array, values in make_row(number)[1].items():
            assert np.array_equal(cache.read(index, array), values)


def test_rows_come_back_as_written_also_from_a_partial_shard(tmp_path):
    write(tmp_path / "c", range(7))
    assert_holds(tmp_path / "c", range(7))
    assert [len(commit.keys) for commit in Cache(tmp_path / "c").commits] == [3, 3, 1]


def test_append_starts_a_new_shard_and_keeps_old_files(tmp_path):
    write(tmp_path / "c", range(4))
    before = {p: p.read_bytes() for p in (tmp_path / "c").rglob("c.*")}
    write(tmp_path / "c", range(4, 8))
    assert_holds(tmp_path / "c", range(8))
    assert all(path.read_bytes() == content for path, content in before.items())


def test_another_split_starts_a_new_shard(tmp_path):
    with CacheWriter(tmp_path / "c", MANIFEST) as writer:
        writer.append(writer.encoded(*make_row(0, "train")))
        writer.append(writer.encoded(*make_row(1, "val")))
    commits = Cache(tmp_path / "c").commits
    assert [{key.split for key in commit.keys} for commit in commits] == [{"train"}, {"val"}]


def test_row_without_commit_record_does_not_exist_and_is_swept(tmp_path):
    write(tmp_path / "c", range(6))
    (tmp_path / "c/commits/000001/zarr.json").unlink()
    assert len(Cache(tmp_path / "c")) == 3
    write(tmp_path / "c", range(3, 6))
    assert_holds(tmp_path / "c", range(6))


def test_failure_inside_the_block_drops_the_open_shard_only(tmp_path):
    with pytest.raises(ZeroDivisionError), CacheWriter(tmp_path / "c", MANIFEST) as writer:
        for number in range(5):
            writer.append(writer.encoded(*make_row(number)))
        raise ZeroDivisionError
    assert_holds(tmp_path / "c", range(3))
    assert not list((tmp_path / "c").rglob("*.kdtmp"))


def test_keyboard_interrupt_commits_the_open_shard(tmp_path):
    with pytest.raises(KeyboardInterrupt), CacheWriter(tmp_path / "c", MANIFEST) as writer:
        for number in range(5):
            writer.append(writer.encoded(*make_row(number)))
        raise KeyboardInterrupt
    assert_holds(tmp_path / "c", range(5))


def test_row_that_reached_some_arrays_only_is_never_committed(tmp_path, monkeypatch):
    write(tmp_path / "c", range(3))
    with CacheWriter(tmp_path / "c", MANIFEST) as writer:
        writer.append(writer.encoded(*make_row(3)))
        files = list(writer._open._files.values())

        def full_disk(array: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(files[2], "append", full_disk)
        with pytest.raises(OSError, match="No space"):
            writer.append(writer.encoded(*make_row(4)))
        monkeypatch.undo()
        with pytest.raises(CacheError, match="earlier write failed"):
            writer.append(writer.encoded(*make_row(5)))
    assert_holds(tmp_path / "c", range(3))


def test_killed_writer_leaves_files_that_the_next_one_sweeps(tmp_path):
    write(tmp_path / "c", range(3))
    process = multiprocessing.get_context("spawn").Process(
        target=_write_and_die, args=(tmp_path / "c",)
    )
    process.start()
    process.join()
    assert process.exitcode == 9
    assert list((tmp_path / "c").rglob("*.kdtmp"))
    assert_holds(tmp_path / "c", range(3))
    write(tmp_path / "c", range(3, 8))
    assert_holds(tmp_path / "c", range(8))
    assert not list((tmp_path / "c").rglob("*.kdtmp"))


def _write_and_die(path: Path) -> None:
    import os

    with CacheWriter(path, MANIFEST) as writer:
        writer.append(writer.encoded(*make_row(3)))
        writer.append(writer.encoded(*make_row(4)))
        os._exit(9)


@pytest.mark.parametrize("field", ["yolo_sha256", "size"])
def test_other_fingerprint_is_refused_with_field_and_both_values(tmp_path, field):
    write(tmp_path / "c", range(2))
    other = dataclasses.replace(MANIFEST, fingerprint={**MANIFEST.fingerprint, field: "zzzz"})
    old = MANIFEST.fingerprint[field]
    with pytest.raises(FingerprintError, match=f"{field} = {old}.*zzzz"):
        CacheWriter(tmp_path / "c", other)
    assert_holds(tmp_path / "c", range(2))


def test_other_library_version_is_only_a_warning(tmp_path, caplog):
    write(tmp_path / "c", range(2))
    other = dataclasses.replace(MANIFEST, versions={"numpy": "0.1"})
    with caplog.at_level(logging.WARNING), CacheWriter(tmp_path / "c", other):
        pass
    assert "made with numpy" in caplog.text


def test_second_writer_is_refused(tmp_path):
    with CacheWriter(tmp_path / "c", MANIFEST) as writer:
        writer.append(writer.encoded(*make_row(0)))
        with pytest.raises(CacheError, match="another process"):
            CacheWriter(tmp_path / "c", MANIFEST)
    write(tmp_path / "c", range(1, 3))
    assert_holds(tmp_path / "c", range(3))


def test_of_two_that_create_a_cache_at_once_one_is_told_of_the_other(tmp_path, monkeypatch):
    """The other takes what this one has begun for what a killed process left, and removes it."""

    def swept(folder):
        shutil.rmtree(folder)
        return FolderLock(folder)

    monkeypatch.setattr("kdcache.cache.create.FolderLock", swept)
    with pytest.raises(CacheError, match="was just made by another process; run again"):
        CacheWriter(tmp_path / "c", MANIFEST)
    monkeypatch.undo()
    write(tmp_path / "c", range(2))


def test_same_row_twice_is_refused(tmp_path):
    write(tmp_path / "c", range(2))
    with pytest.raises(CacheError, match="already"):
        write(tmp_path / "c", range(1, 2))


def test_row_of_another_shape_is_refused_by_name(tmp_path):
    key, arrays = make_row(0)
    arrays["image"] = arrays["image"][:-1]
    with (
        CacheWriter(tmp_path / "c", MANIFEST) as writer,
        pytest.raises(CacheError, match=r"photos/0.jpg: image is uint8 \(31, 32, 3\)"),
    ):
        writer.append(writer.encoded(key, arrays))


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"{}")])
def test_lost_list_of_skipped_images_is_written_again(tmp_path, damage):
    write(tmp_path / "c", range(2))
    damage(tmp_path / "c/skipped/zarr.json")
    with pytest.raises(CacheError, match="skipped"):
        read_remarks(tmp_path / "c")
    with CacheWriter(tmp_path / "c", MANIFEST) as writer:
        writer.remark("photos", Remarks(skipped={"a.jpg": "empty"}))
    assert read_remarks(tmp_path / "c").together == Remarks(skipped={"a.jpg": "empty"}, gone=[])


def test_remarks_on_one_dataset_leave_those_on_another(tmp_path):
    write(tmp_path / "c", range(2))
    first = Remarks(skipped={"a.jpg": "empty", "b.jpg": "empty"}, left_out={"no person": 2})
    second = Remarks(skipped={"c.jpg": "truncated"}, left_out={"no person": 1}, gone=["d.jpg"])
    with CacheWriter(tmp_path / "c", MANIFEST) as writer:
        writer.remark("train", first)
        writer.remark("val", second, [("e.jpg", "f.jpg")])
        # a run that was stopped half way
        writer.remark("train", Remarks(), [("e.jpg", "f.jpg")], replace=False)
    found = read_remarks(tmp_path / "c")
    assert found.together.skipped == first.skipped | second.skipped
    assert found.together.left_out == {"no person": 3}
    assert (found.together.gone, found.in_train_and_val) == (["d.jpg"], [("e.jpg", "f.jpg")])
    with CacheWriter(tmp_path / "c", MANIFEST) as writer:
        writer.remark("train", Remarks())
    assert read_remarks(tmp_path / "c").together.skipped == second.skipped


@pytest.mark.parametrize("lose", ["folder", "records"])
def test_lost_commit_records_do_not_cost_the_shards(tmp_path, lose):
    write(tmp_path / "c", range(7))
    commits = tmp_path / "c/commits"
    commits.rename(tmp_path / "saved")
    if lose == "records":
        commits.mkdir()
        shutil.copy(tmp_path / "saved/zarr.json", commits)
    for _ in range(2):
        with pytest.raises(CacheError, match=r"\[0, 1, 2\] without a commit record.*from a backup"):
            CacheWriter(tmp_path / "c", MANIFEST)
    shutil.rmtree(commits, ignore_errors=True)
    (tmp_path / "saved").rename(commits)
    write(tmp_path / "c", range(7, 8))
    assert_holds(tmp_path / "c", range(8))


@pytest.mark.parametrize("place", [".", "skipped", "commits", "features", "commits/000001", "mask"])
def test_temporary_files_anywhere_are_swept(tmp_path, place):
    write(tmp_path / "c", range(6))
    (tmp_path / "c" / place / "zarr.json.kdtmp").write_text("x")
    assert not verify(tmp_path / "c").ok
    write(tmp_path / "c", range(6, 7))
    assert verify(tmp_path / "c").ok


def test_folder_that_is_no_cache_is_left_alone(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/todo.txt").write_text("buy milk")
    with pytest.raises(CacheError, match="not a kdcache cache"):
        CacheWriter(tmp_path / "notes", MANIFEST)
    assert [p.name for p in (tmp_path / "notes").iterdir()] == ["todo.txt"]


def test_a_row_that_comes_after_the_block_ended_is_refused(tmp_path):
    """A second Ctrl-C can end the block while the writing thread still has rows."""
    writer = CacheWriter(tmp_path / "c", MANIFEST)
    with pytest.raises(KeyboardInterrupt), writer:
        writer.append(writer.encoded(*make_row(0)))
        raise KeyboardInterrupt
    with pytest.raises(CacheError, match="earlier write failed"):
        writer.append(writer.encoded(*make_row(1)))
    assert_holds(tmp_path / "c", range(1))
