"""Copies: whole or thinned, each the cache that an extraction with those settings would have made."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from conftest import MANIFEST, TAP, Standins, repeating, rows_equal

from kdcache.cache import codecs
from kdcache.cache import copy as copying
from kdcache.cache.copy import copy_cache
from kdcache.cache.format import Remarks, RowKey, describe_row, read_remarks, read_root
from kdcache.cache.layout import IMAGE, MASK, PRECISIONS, ROWS, Manifest, TapSpec, stored_as, whole
from kdcache.cache.reader import Cache
from kdcache.cache.thin import Thinning
from kdcache.cache.verify import verify
from kdcache.cache.writer import CacheWriter
from kdcache.cli import main
from kdcache.config import Precision, TrainConfig
from kdcache.errors import CacheError, ConfigError, FingerprintError, StorageError
from kdcache.places import Place, Url, files_below
from kdcache.precompute.recheck import verify_with_models
from kdcache.precompute.refresh import refresh
from kdcache.train import loop

SECOND = TapSpec(name="/neck/Add", precision="int8", shape=(4, 8, 8), groups=whole(4))
FINGERPRINT = {
    "size": "32",
    "precision": "int8",
    "yolo_sha256": "aaaa",
    "yolo_target_layer": f"{TAP.name}, {SECOND.name}",
    "yolo_input": "rgb01",
    "teacher_sha256": "bbbb",
    "teacher_network": "unet",
}
TWO_TAPS = dataclasses.replace(MANIFEST, taps=(TAP, SECOND), fingerprint=FINGERPRINT)
REMARKS = Remarks(
    skipped={"broken.jpg": "cannot be decoded"},
    doubtful={"photos/1.jpg": "turned", "photos/9.jpg": "turned"},
    gone=["photos/2.jpg", "photos/10.jpg"],
)
# Rows 0 to 7 are in train, 8 to 11 in val: shards of 3, 3, 2 and 3, 1.
TRAIN, ROW_COUNT = 8, 12


def at(precision: Precision, rounded: str | None = None, **changes: object) -> Manifest:
    """The two taps at a precision, as an extraction at it states it."""
    manifest = dataclasses.replace(stored_as(TWO_TAPS, precision), **changes)
    named = {"precision": rounded or precision}
    return dataclasses.replace(manifest, fingerprint={**manifest.fingerprint, **named})


def row(number: int, manifest: Manifest) -> tuple[RowKey, dict[str, np.ndarray]]:
    """What an extraction would store of float32 outputs that depend on the number alone."""
    rng = np.random.default_rng(number)
    key = RowKey("train" if number < TRAIN else "val", f"photos/{number}.jpg", 0)
    arrays = {
        IMAGE: rng.integers(0, 256, (32, 32, 3), np.uint8),
        MASK: rng.integers(0, 2, (32, 32), np.uint8),
        ROWS: describe_row(key, {"source_bytes": number}),
    }
    logits = rng.normal(size=(32, 32)).astype(np.float32)
    if manifest.logits_dtype:
        arrays[manifest.logits_path] = codecs.teacher_logits(logits, manifest.logits_dtype)
    for tap in (TAP, SECOND):
        feature = repeating(rng.normal(size=tap.shape).astype(np.float32), tap)
        for stored in manifest.taps:
            if stored.name == tap.name:
                encoded = codecs.encode(feature, stored)
                arrays |= {f"{stored.folder}/{name}": array for name, array in encoded.items()}
    return key, arrays


def extracted(path: Place, manifest: Manifest, numbers=range(ROW_COUNT)) -> Cache:
    with CacheWriter(path, manifest) as writer:
        writer.remark("photos", REMARKS, [("photos/1.jpg", "photos/9.jpg")])
        for number in numbers:
            writer.append(writer.encoded(*row(number, manifest)))
    return Cache(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Cache:
    """A cache that is never written to."""
    return extracted(tmp_path_factory.mktemp("source") / "c", TWO_TAPS)


@pytest.fixture(scope="module")
def exact(tmp_path_factory) -> Cache:
    """The same at float32."""
    return extracted(tmp_path_factory.mktemp("exact") / "c", at("float32"))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Cache:
    """Shards of three rows in train, one, and one in val."""
    manifest = dataclasses.replace(TWO_TAPS, taps=(TAP,))
    return extracted(tmp_path_factory.mktemp("small") / "c", manifest, (0, 1, 2, 3, 8))


def contents(path: Place) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in files_below(path)}


def assert_copied(copy: Path, expected: Path) -> None:
    """Every file is the one that an extraction with these settings would have written."""
    assert verify(copy).ok
    found, wanted = contents(copy), contents(expected)
    assert found.keys() == wanted.keys()
    assert [name for name in found if found[name] != wanted[name]] == []


def test_a_plain_copy_has_the_same_files(source, tmp_path):
    report = copy_cache(source.path, tmp_path / "c")
    assert_copied(tmp_path / "c", source.path)
    shard_bytes = sum(o.size_bytes for commit in source.commits for o in commit.objects.values())
    assert (report.rows, report.rows_copied, report.shards_copied) == (12, 12, 5)
    assert (report.bytes_read, report.bytes_written) == (shard_bytes, shard_bytes)
    assert (report.changes, report.added_relative_mse) == ([], {})


def test_a_finished_copy_is_left_as_it_is(source, tmp_path):
    copy_cache(source.path, tmp_path / "c")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "c").rglob("*")}
    report = copy_cache(source.path, tmp_path / "c")
    assert (report.rows, report.rows_copied, report.bytes_read) == (12, 0, 0)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "c").rglob("*")} == times


def test_what_the_source_got_since_is_added(tmp_path):
    extracted(tmp_path / "s", TWO_TAPS, range(4))
    copy_cache(tmp_path / "s", tmp_path / "c")
    with CacheWriter(tmp_path / "s", TWO_TAPS) as writer:
        for number in range(4, 9):
            writer.append(writer.encoded(*row(number, TWO_TAPS)))
    assert copy_cache(tmp_path / "s", tmp_path / "c").rows_copied == 5
    assert_copied(tmp_path / "c", tmp_path / "s")


def test_a_source_that_is_being_written_is_copied_as_far_as_it_is_committed(tmp_path):
    with CacheWriter(tmp_path / "s", TWO_TAPS) as writer:
        for number in range(5):
            writer.append(writer.encoded(*row(number, TWO_TAPS)))
        assert copy_cache(tmp_path / "s", tmp_path / "c").rows_copied == 3
    assert copy_cache(tmp_path / "s", tmp_path / "c").rows_copied == 2
    assert rows_equal(Cache(tmp_path / "c"), Cache(tmp_path / "s"))


def test_one_split_is_a_cache_without_gaps_and_with_what_is_said_of_its_rows(source, tmp_path):
    copy_cache(source.path, tmp_path / "c", Thinning(split="val"))
    extracted(tmp_path / "expected", TWO_TAPS, range(TRAIN, ROW_COUNT))
    copy = Cache(tmp_path / "c")
    assert [commit.shard for commit in copy.commits] == [0, 1]
    assert rows_equal(copy, Cache(tmp_path / "expected"))
    assert verify(tmp_path / "c").ok
    remarks = read_remarks(tmp_path / "c")
    assert remarks.together.skipped == REMARKS.skipped
    assert remarks.together.doubtful == {"photos/9.jpg": "turned"}
    assert (remarks.together.gone, remarks.in_train_and_val) == (["photos/10.jpg"], [])
    with pytest.raises(CacheError, match=r"no rows of split train, but val"):
        copy_cache(tmp_path / "c", tmp_path / "d", Thinning(split="train"))


def test_one_tap_of_two_is_what_an_extraction_of_it_gives(source, tmp_path):
    report = copy_cache(source.path, tmp_path / "c", Thinning(taps=[SECOND.name]))
    named = {**FINGERPRINT, "yolo_target_layer": SECOND.name}
    extracted(
        tmp_path / "expected", dataclasses.replace(TWO_TAPS, taps=(SECOND,), fingerprint=named)
    )
    assert_copied(tmp_path / "c", tmp_path / "expected")
    assert report.changes == [f"without the features of {TAP.name}"]
    assert list(zarr.open_group(tmp_path / "c", mode="r")["features"].group_keys()) == ["neck_Add"]
    with pytest.raises(CacheError, match="no tap 'nowhere'.*/neck/Add"):
        copy_cache(source.path, tmp_path / "d", Thinning(taps=["nowhere"]))


@pytest.mark.parametrize("store", ["logits", "features"])
def test_one_half_is_what_an_extraction_of_it_gives(store, source, tmp_path):
    copy_cache(source.path, tmp_path / "c", Thinning(store=store))
    dropped = "yolo_" if store == "logits" else "teacher_"
    rest = {name: value for name, value in FINGERPRINT.items() if not name.startswith(dropped)}
    without = {"taps": ()} if store == "logits" else {"logits_dtype": None}
    extracted(tmp_path / "expected", dataclasses.replace(TWO_TAPS, fingerprint=rest, **without))
    assert_copied(tmp_path / "c", tmp_path / "expected")
    other = "features" if store == "logits" else "logits"
    with pytest.raises(CacheError, match=f"has no .*--{other}-only leaves nothing"):
        copy_cache(tmp_path / "c", tmp_path / "d", Thinning(store=other))


def test_the_precisions_are_those_of_the_settings():
    assert get_args(Precision) == PRECISIONS


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_lower_than_float32_is_bit_for_bit_what_an_extraction_gives(precision, exact, tmp_path):
    report = copy_cache(exact.path, tmp_path / "c", Thinning(precision=precision))
    expected = extracted(tmp_path / "expected", at(precision))
    assert_copied(tmp_path / "c", tmp_path / "expected")
    measured = [0, 3, 6, 8, 11]  # of each shard every fourth
    for tap in (TAP.name, SECOND.name):
        before, after = (
            np.stack([cache[n].features[tap] for n in measured]).astype(float)
            for cache in (exact, expected)
        )
        mse = ((after - before) ** 2).sum() / ((before - before.mean()) ** 2).sum()
        assert report.added_relative_mse[tap] == pytest.approx(mse, rel=1e-4)
    assert "teacher's logits: float32 → float16" in report.changes


def test_lower_than_anything_else_is_rounded_twice_and_says_so(source, tmp_path):
    copy_cache(source.path, tmp_path / "c", Thinning(precision="int5"))
    copy_cache(tmp_path / "c", tmp_path / "d", Thinning(precision="int4"))
    for name, precision, rounded, before in (
        ("c", "int5", "int5 of int8", source),
        ("d", "int4", "int4 of int5 of int8", Cache(tmp_path / "c")),
    ):
        copy = Cache(tmp_path / name)
        assert verify(copy.path).ok
        assert copy.manifest == at(precision, rounded)
        for index, found in enumerate(copy):
            for tap in copy.manifest.taps:
                expected = codecs.encode(before[index].features[tap.name], tap)
                feature = codecs.decode(expected, tap)
                np.testing.assert_array_equal(found.features[tap.name], feature)
        with pytest.raises(FingerprintError, match=f"precision = {rounded}, now {precision} was"):
            CacheWriter(copy.path, at(precision))
    assert copy_cache(tmp_path / "d", tmp_path / "e", Thinning(precision="int4")).changes == []
    assert_copied(tmp_path / "e", tmp_path / "d")


@pytest.mark.parametrize("path", [("int6", "int4"), ("float16", "int8"), ("int8", "int5", "int4")])
def test_the_stated_error_covers_every_rounding(path):
    """And that of the last alone does not, so the sum is needed."""
    rng = np.random.default_rng(0)
    exact = repeating((rng.normal(size=TAP.shape) * 1e3).astype(np.float32), TAP)
    feature = exact
    for precision in path:
        tap = dataclasses.replace(TAP, precision=precision)
        stored = codecs.encode(feature, tap)
        feature = codecs.decode(stored, tap)
    error = np.abs(feature.astype(float) - exact)
    assert (error <= codecs.max_error(stored, tap, path[-2::-1])).all()
    if path[0] != "float16":  # which is far below the step
        assert (error > codecs.max_error(stored, tap)).any()


def test_without_features_nothing_is_rounded_twice(source, tmp_path):
    copy_cache(source.path, tmp_path / "c", Thinning(precision="int5"))
    copy_cache(tmp_path / "c", tmp_path / "d", Thinning(store="logits", precision="int4"))
    assert Cache(tmp_path / "d").manifest.fingerprint["precision"] == "int4"
    copy_cache(tmp_path / "c", tmp_path / "e", Thinning(store="logits"))
    assert Cache(tmp_path / "e").manifest.fingerprint["precision"] == "int5"


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_higher_precision_is_refused_with_the_reason(precision, source, tmp_path):
    with pytest.raises(ConfigError, match=f"{precision}.*holds int8.*rounded away does not"):
        copy_cache(source.path, tmp_path / "c", Thinning(precision=precision))
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("compression", ["lz4", "none"])
def test_compression_changes_there_and_back(compression, source, tmp_path):
    report = copy_cache(source.path, tmp_path / "c", Thinning(compression=compression))
    extracted(tmp_path / "expected", dataclasses.replace(TWO_TAPS, compression=compression))
    assert_copied(tmp_path / "c", tmp_path / "expected")
    assert report.changes == [f"compression: zstd → {compression}"]
    copy_cache(tmp_path / "c", tmp_path / "back", Thinning(compression="zstd"))
    assert_copied(tmp_path / "back", source.path)


def test_zarr_reads_a_thinned_copy(source, tmp_path):
    thinning = Thinning(split="train", precision="int5", compression="none")
    copy_cache(source.path, tmp_path / "c", thinning)
    group = zarr.open_group(tmp_path / "c", mode="r")
    copy = Cache(tmp_path / "c")
    for index in range(len(copy)):
        number = index // 3 * 3 + index % 3
        np.testing.assert_array_equal(group["image"][number], copy[index].image)
        stored = group[f"{SECOND.folder}/affine"][number]
        np.testing.assert_array_equal(stored, copy.read(index, f"{SECOND.folder}/affine"))


def test_a_refreshed_source_is_copied_as_its_first_generation(standins: Standins, tmp_path):
    standins.extract(tmp_path / "s", limit=4)
    refresh(standins.config(), tmp_path / "s", "teacher", device="cpu")
    copy_cache(tmp_path / "s", tmp_path / "c")
    copy, source = Cache(tmp_path / "c"), Cache(tmp_path / "s")
    assert (source.manifest.logits_path, copy.manifest.logits_path) == (
        "teacher_logits.1",
        "teacher_logits",
    )
    assert verify(tmp_path / "c").ok
    for ours, theirs in zip(copy, source, strict=True):
        np.testing.assert_array_equal(ours.teacher_logits, theirs.teacher_logits)


def test_a_shard_that_the_copy_lost_is_made_good_in_its_place(source, tmp_path):
    copy_cache(source.path, tmp_path / "c")
    shutil.rmtree(tmp_path / "c/commits/000001")
    assert copy_cache(source.path, tmp_path / "c").rows_copied == 3
    assert_copied(tmp_path / "c", source.path)


def test_values_that_a_lower_precision_cannot_hold_are_refused_by_row(tmp_path):
    with CacheWriter(tmp_path / "s", at("float32")) as writer:
        for number in range(2):
            key, arrays = row(number, at("float32"))
            arrays["teacher_logits"][3, 3] = 1e5 * number
            writer.append(writer.encoded(key, arrays))
    with pytest.raises(CacheError, match=r"row 1 \(photos/1.jpg\).*reach 1e\+05, beyond float16's"):
        copy_cache(tmp_path / "s", tmp_path / "c", Thinning(precision="int8"))


def test_another_cache_and_strangers_are_refused_and_left_alone(source, tmp_path):
    other = dataclasses.replace(TWO_TAPS, fingerprint={**FINGERPRINT, "teacher_sha256": "cccc"})
    extracted(tmp_path / "other", other, range(2))
    before = contents(tmp_path / "other")
    with pytest.raises(FingerprintError, match="teacher_sha256 = cccc, now bbbb"):
        copy_cache(source.path, tmp_path / "other")
    with pytest.raises(FingerprintError, match="with features, now it is to be without"):
        copy_cache(source.path, tmp_path / "other", Thinning(store="logits"))
    with pytest.raises(FingerprintError, match="precision = int8, now int5 of int8"):
        copy_cache(source.path, tmp_path / "other", Thinning(precision="int5"))
    assert contents(tmp_path / "other") == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/todo.txt").write_text("mine")
    with pytest.raises(CacheError, match="not a kdcache cache"):
        copy_cache(source.path, tmp_path / "notes")
    with pytest.raises(CacheError, match="nowhere is not a kdcache cache"):
        copy_cache(tmp_path / "nowhere", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_cache_is_not_copied_into_itself_by_any_name(source, tmp_path):
    own = shutil.copytree(source.path, tmp_path / "own")
    (tmp_path / "link").symlink_to(own)
    before = contents(own)
    for name, how in {
        "own": "are one folder",
        "link": "are one folder",
        "x/../own/": "are one folder",
        "own/inner": "lie in each other",
        "link/inner": "lie in each other",
    }.items():
        with pytest.raises(CacheError, match=how):
            copy_cache(own, tmp_path / name)
    assert contents(own) == before


def test_who_would_add_to_a_copy_that_was_rounded_twice_is_told_what_to_do(source, tmp_path):
    copy_cache(source.path, tmp_path / "c", Thinning(precision="int5"))
    with pytest.raises(FingerprintError, match="int5 of int8.*rounded twice: add the rows to what"):
        CacheWriter(tmp_path / "c", at("int5"))


def test_rows_of_the_same_keys_that_are_not_copies_are_refused(source, tmp_path):
    with CacheWriter(tmp_path / "c", TWO_TAPS) as writer:
        for number in range(3):
            key, arrays = row(number, TWO_TAPS)
            arrays["mask"] = 1 - arrays["mask"]
            writer.append(writer.encoded(key, arrays))
    with pytest.raises(CacheError, match="shard 0 of .* with other content in mask"):
        copy_cache(source.path, tmp_path / "c")
    extracted(tmp_path / "d", TWO_TAPS, range(2))
    with pytest.raises(CacheError, match="has 2 of the 3 rows of shard 0"):
        copy_cache(source.path, tmp_path / "d")


@pytest.mark.parametrize("inside", [".", "inner", ".."])
def test_a_copy_into_itself_is_refused(inside, source, monkeypatch):
    monkeypatch.chdir(source.path)
    with pytest.raises(CacheError, match="one folder|in each other"):
        copy_cache(source.path, Path(inside))
    with pytest.raises(CacheError, match="one folder|in each other"):
        copy_cache(Url("memory://b/c"), Url(f"memory://b/c/{inside}".removesuffix("/.")))


@pytest.mark.parametrize(
    ("kind", "precision"),
    [*((k, None) for k in ("flip", "truncate", "lengthen", "delete")), ("flip", "int4")],
)
def test_a_damaged_source_is_named_and_nothing_of_its_shard_is_committed(
    kind, precision, source, tmp_path
):
    """Codes are moved or made anew; either way what was there before the damage is copied."""
    shutil.copytree(source.path, tmp_path / "s")
    damaged = tmp_path / "s" / SECOND.folder / "codes_x1/c.1.0"
    data = bytearray(damaged.read_bytes())
    data[40] ^= 1
    kept = {"flip": data, "truncate": data[:-9], "lengthen": source.path.name.encode() + data}
    damaged.unlink() if kind == "delete" else damaged.write_bytes(kept[kind])
    with pytest.raises(CacheError, match=r"codes_x1/c\.1\.0.*photos/3\.jpg.*restore it from"):
        copy_cache(tmp_path / "s", tmp_path / "c", Thinning(precision=precision), workers=3)
    assert [commit.shard for commit in Cache(tmp_path / "c").commits] == [0]
    assert verify(tmp_path / "c").ok
    shutil.copy(source.path / SECOND.folder / "codes_x1/c.1.0", damaged)
    copy_cache(tmp_path / "s", tmp_path / "c", Thinning(precision=precision))
    copy_cache(source.path, tmp_path / "whole", Thinning(precision=precision))
    assert_copied(tmp_path / "c", tmp_path / "whole")


def test_what_does_not_come_back_as_written_is_not_committed(source, tmp_path, monkeypatch):
    def place(file, original=copying.NewFile.place):
        original(file)
        if file._path.parent.name == "mask":
            file._path.write_bytes(b"?" + file._path.read_bytes()[1:])

    monkeypatch.setattr(copying.NewFile, "place", place)
    with pytest.raises(CacheError, match="mask/c.0.0.0 was written, but other bytes come back"):
        copy_cache(source.path, tmp_path / "c")
    assert len(Cache(tmp_path / "c")) == 0


@pytest.mark.parametrize("precision", [None, "int4"])
def test_a_disk_without_room_is_told_before_the_first_byte(
    precision, source, tmp_path, monkeypatch
):
    monkeypatch.setattr("kdcache.cache.need.free", lambda out: (10_000, None))
    estimate = ".*are an estimate, from 3 rows" * (precision is not None)
    with pytest.raises(CacheError, match=f"12 rows will take about .* has 10.0 kB left{estimate}"):
        copy_cache(source.path, tmp_path / "c", Thinning(precision=precision))
    assert not (tmp_path / "c").exists()


def test_a_disk_that_fills_up_is_one_message(source, tmp_path, monkeypatch):
    def full(file, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(copying.NewFile, "write", full)
    with pytest.raises(CacheError, match="cannot write shard 0 of .*No space.*same command"):
        copy_cache(source.path, tmp_path / "c")
    monkeypatch.undo()
    copy_cache(source.path, tmp_path / "c")
    assert_copied(tmp_path / "c", source.path)


KILLED = """
import os, signal, sys
from pathlib import Path
from kdcache import durable
from kdcache.cache.copy import copy_cache
from kdcache.cache.thin import Thinning

def killed_at(step, source, copy, precision, workers):
    count, replace = 0, os.replace
    def counted(*names):
        nonlocal count
        count += 1
        if count == step:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*names)
    durable.os.replace = counted
    copy_cache(Path(source), Path(copy), Thinning(precision=precision), workers=workers)

source, folder, precision, workers = sys.argv[1:]
for step in range(1, 1000, 5):
    child = os.fork()
    if not child:
        killed_at(step, source, f"{folder}/{step}", precision or None, int(workers))
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
print(step)
"""


@pytest.mark.parametrize(("precision", "workers"), [("", "1"), ("int4", "2")])
def test_a_copy_killed_at_any_step_goes_on_to_the_same_end(precision, workers, small, tmp_path):
    thinning = Thinning(precision=precision or None)
    copy_cache(small.path, tmp_path / "whole", thinning)
    (tmp_path / "killed").mkdir()
    arguments = [small.path, tmp_path / "killed", precision, workers]
    command = [sys.executable, "-c", KILLED, *map(str, arguments)]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(ended.stdout) > 40
    resumed = set()
    for step in range(1, int(ended.stdout), 5):
        copy = tmp_path / "killed" / str(step)
        report = copy_cache(small.path, copy, thinning)
        resumed.add(report.rows_copied)
        assert_copied(copy, tmp_path / "whole")
    assert not list((tmp_path / "killed").glob("*.kdtmp"))
    assert 5 in resumed
    if workers == "1":  # of two, when a shard is committed depends on how they run
        assert resumed & {2, 1}


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_stops_after_the_shard_at_hand_and_the_same_command_goes_on(
    times, source, tmp_path, monkeypatch
):
    """Or at once when it comes again."""
    left = [signal.SIGINT] * times

    def commit(*arguments, original=copying._Work._commit):
        original(*arguments)
        if left:
            os.kill(os.getpid(), left.pop())

    monkeypatch.setattr(copying._Work, "_commit", commit)
    command = ["copy", str(source.path), str(tmp_path / "c"), "--workers", "1"]
    stopped = CliRunner().invoke(main, command)
    assert stopped.exit_code == 1
    assert "the same command goes on (train: with --resume" in stopped.stderr
    assert 3 <= len(Cache(tmp_path / "c")) < 12
    if times == 1:
        assert verify(tmp_path / "c").ok
    monkeypatch.undo()
    ended = CliRunner().invoke(main, command)
    assert ended.exit_code == 0, ended.output
    assert "rows were there and not copied again" in ended.stdout
    assert_copied(tmp_path / "c", source.path)
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 0
    assert "12 rows of" in again.stdout
    assert "nothing was copied" in again.stdout


def test_command_thins_and_reports(source, tmp_path):
    command = ["copy", str(source.path), str(tmp_path / "c"), "--split", "train", "--tap", TAP.name]
    options = ["--precision", "int5", "--compression", "none", "--json"]
    result = CliRunner().invoke(main, [*command, *options])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["rows"], report["shards_copied"]) == (8, 3)
    assert report["changes"] == [
        "rows of split train only",
        f"features of {TAP.name}: int8 → int5",
        f"without the features of {SECOND.name}",
        "compression: zstd → none",
    ]
    assert 1e-4 < report["added_relative_mse"][TAP.name] < 1e-2
    told = CliRunner().invoke(main, ["info", str(tmp_path / "c")]).stdout
    assert "precision: int5 of int8" in told
    text = CliRunner().invoke(main, ["copy", str(source.path), str(tmp_path / "d")]).stdout
    assert "12 rows of" in text
    assert "written and read back" in text
    for wrong in (["--features-only"], ["--tap", TAP.name]):
        assert CliRunner().invoke(main, [*command[:3], "--logits-only", *wrong]).exit_code == 2


# In object stores


def test_there_and_back_through_a_store_that_fails_is_the_same(small, bucket, store, tmp_path):
    store.failing_share = 0.2
    copy_cache(small.path, bucket / "c", workers=4)
    assert verify(bucket / "c").ok
    copy_cache(bucket / "c", bucket / "d", Thinning(split="val", precision="int5"))
    copy_cache(bucket / "c", tmp_path / "back")
    assert_copied(tmp_path / "back", small.path)
    copy_cache(small.path, tmp_path / "d", Thinning(split="val", precision="int5"))
    assert rows_equal(Cache(bucket / "d"), Cache(tmp_path / "d"))
    assert not (bucket / "c.lock").exists()
    assert store.failed > 20


def test_a_store_that_dies_is_told_and_what_was_committed_is_gone_on_with(
    small, bucket, store, monkeypatch
):
    def adopt(writer, commit, original=CacheWriter.adopt):
        original(writer, commit)
        store.dies_after = 3

    monkeypatch.setattr(CacheWriter, "adopt", adopt)
    with pytest.raises(StorageError, match="attempts.*run the same command again"):
        copy_cache(small.path, bucket / "c", workers=2)
    store.heal()
    monkeypatch.setattr(CacheWriter, "adopt", adopt.__defaults__[0])
    committed = len(Cache(bucket / "c"))
    assert 3 <= committed < 5
    assert copy_cache(small.path, bucket / "c").rows_copied == 5 - committed
    assert verify(bucket / "c").ok
    assert rows_equal(Cache(bucket / "c"), small)
    (bucket / "notes/todo.txt").write_bytes(b"mine")
    with pytest.raises(CacheError, match="not a kdcache cache"):
        copy_cache(small.path, bucket / "notes")


def test_a_damaged_object_is_named(small, bucket):
    copy_cache(small.path, bucket / "c")
    path = bucket / "c/image/c.1.0.0.0"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CacheError, match=r"image/c\.1\.0\.0\.0 \(rows 3 to 3: photos/3.jpg"):
        copy_cache(bucket / "c", bucket / "d")
    assert len(Cache(bucket / "d")) == 3
    assert verify(bucket / "d").ok


# What the other stages do with a copy


def test_an_extraction_appends_to_a_copy(standins: Standins, cache: Cache, tmp_path):
    standins.extract(tmp_path / "s", limit=5)
    for name, thinning, settings in (
        ("whole", Thinning(), {}),
        ("logits", Thinning(store="logits"), {"store": "logits"}),
        ("features", Thinning(store="features"), {"store": "features"}),
        ("none", Thinning(compression="none"), {"compression": "none"}),
    ):
        copy = tmp_path / name
        copy_cache(tmp_path / "s", copy, thinning)
        report = standins.extract(copy, **settings)
        assert (report.rows_found, report.rows_added) == (5, 5)
        assert verify(copy).ok
    assert rows_equal(Cache(tmp_path / "whole"), cache)


def test_an_extraction_at_the_precision_appends_to_a_copy_of_float32_only(
    standins: Standins, tmp_path
):
    standins.extract(tmp_path / "s", limit=4, precision="float32")
    copy_cache(tmp_path / "s", tmp_path / "c", Thinning(precision="int5"))
    assert standins.extract(tmp_path / "c", precision="int5").rows_found == 4
    copy_cache(tmp_path / "c", tmp_path / "d", Thinning(precision="int4"))
    with pytest.raises(FingerprintError, match="precision = int4 of int5, now int4 was asked for"):
        standins.extract(tmp_path / "d", precision="int4")


def test_models_agree_with_a_copy_rounded_twice_and_a_refresh_ends_that(
    standins: Standins, cache: Cache, tmp_path
):
    copy_cache(cache.path, tmp_path / "c", Thinning(precision="int6"))
    copy_cache(tmp_path / "c", tmp_path / "d", Thinning(precision="int5"))
    models = {"yolo": standins.detector, "teacher": standins.teacher, "device": "cpu"}
    found = verify_with_models(tmp_path / "d", rows=4, **models)
    assert found.ok, found.bad
    (tap,) = Cache(tmp_path / "d").manifest.taps
    refresh(standins.config(), tmp_path / "d", "teacher", device="cpu")
    assert read_root(tmp_path / "d").manifest.fingerprint["precision"] == "int5 of int6 of int8"
    refresh(standins.config(), tmp_path / "d", tap.name, device="cpu")
    assert read_root(tmp_path / "d").manifest.fingerprint["precision"] == "int5"
    assert standins.extract(tmp_path / "d", precision="int5").rows_added == 0
    copy_cache(cache.path, tmp_path / "e", Thinning(store="logits"))
    with pytest.raises(FingerprintError, match="made without such a model"):
        verify_with_models(tmp_path / "e", yolo=standins.detector, device="cpu")


def test_a_student_trains_from_a_thinned_copy(cache: Cache, tmp_path):
    copy_cache(cache.path, tmp_path / "c", Thinning(precision="int4", compression="lz4"))
    config = TrainConfig(encoder_weights="random", epochs=1, batch_size=4)
    report = loop.train(tmp_path / "c", tmp_path / "run", config, device="cpu")
    assert report.metrics["val_student_miou"] >= 0
