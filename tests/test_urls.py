"""Caches and photos in an object store, also one that fails: a local S3-compatible server."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import MANIFEST, Standins, make_row, rows_equal
from stores import Store

import kdcache
from kdcache import places
from kdcache.cache import lock
from kdcache.cache.format import read_root
from kdcache.cache.info import describe
from kdcache.cache.reader import Cache
from kdcache.cache.verify import verify
from kdcache.cache.writer import CacheWriter
from kdcache.config import TrainConfig
from kdcache.doctor.store import check_store
from kdcache.errors import CacheError, ConfigError, DatasetError, StorageError
from kdcache.places import Url, children, files_below, place_of, read_some
from kdcache.precompute import job
from kdcache.precompute.dataset import folder_dataset, unlabelled_dataset
from kdcache.precompute.extract import extract
from kdcache.precompute.plan import plan
from kdcache.precompute.refresh import refresh
from kdcache.standins import save_teacher
from kdcache.train.loader import batches
from kdcache.train.loop import train


def uploaded(folder: Path, to: Url) -> Url:
    for name in files_below(folder):
        (to / name).write_bytes((folder / name).read_bytes())
    return to


def written(path: Url, rows: range) -> None:
    with CacheWriter(path, MANIFEST) as writer:
        for number in rows:
            writer.append(writer.encoded(*make_row(number)))


@pytest.mark.parametrize("scheme", ["memory", "s3"])
def test_a_url_does_what_a_folder_does(scheme, bucket):
    url = bucket if scheme == "s3" else Url("memory://bucket/data")
    assert (url.exists(), url.is_dir(), children(url), files_below(url)) == (False, False, [], [])
    (url / "a" / "zarr.json").write_bytes(b"hello")
    (url / "odd [1]*? ü").write_bytes(b"x")
    assert (url.exists(), url.is_dir(), url.is_file()) == (True, True, False)
    assert (url / "a" / "zarr.json").is_file()
    assert children(url) == ["a", "odd [1]*? ü"]
    assert url.files() == {"a/zarr.json": 5, "odd [1]*? ü": 1}
    assert (url / "a/zarr.json").read_range(1, 3) == b"ell"
    assert (url / "a/zarr.json").read_range(4, 9) == b"o"
    first, absent, last = read_some(url, ["a/zarr.json", "absent", "odd [1]*? ü"])
    assert (first, last) == (b"hello", b"x")
    assert isinstance(absent, FileNotFoundError)
    with pytest.raises(FileNotFoundError, match="No such file or directory.*data/absent"):
        (url / "absent").read_bytes()
    with pytest.raises(FileExistsError):
        (url / "a/zarr.json").write_new(b"other")
    (url / "absent").unlink(missing_ok=True)
    (url / "a/zarr.json").unlink()
    assert not (url / "a").exists()
    url.remove_all()
    (url / "odd [1]*? ü").unlink(missing_ok=True)
    assert not url.exists()


def test_urls_are_told_from_paths_and_credentials_in_them_are_refused(tmp_path):
    assert place_of("a/b.zarr") == Path("a/b.zarr")
    assert place_of(f"file://{tmp_path}/c") == tmp_path / "c"
    assert place_of("memory://b/c/") == Url("memory://b/c")
    assert (Url("s3://b/c/d.zarr").name, str(Url("s3://b/c/d").parent)) == ("d.zarr", "s3://b/c")
    with pytest.raises(ConfigError, match="…@bucket.*environment") as caught:
        place_of("s3://key:secret@bucket/c")
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match="pip install gcsfs"):
        place_of("gs://bucket/c")
    assert place_of("memory://b//c//d.zarr") == Url("memory://b/c/d.zarr")
    with pytest.raises(ConfigError, match="did you mean s3://bucket/c.zarr"):
        place_of("s3:/bucket/c.zarr")
    with pytest.raises(ConfigError, match="expected a place in the store, such as s3://bucket/"):
        place_of("s3://")
    with pytest.raises(ConfigError, match="nothing://"):
        place_of("nothing://bucket/c")


@pytest.mark.parametrize("failing_share", [0.0, 0.2])
def test_extract_verify_info_and_train_give_the_same_as_on_a_disk(
    failing_share, bucket, store, standins: Standins, cache: Cache, tmp_path
):
    store.failing_share = failing_share
    images = uploaded(standins.images, bucket / "photos")
    masks = uploaded(standins.masks, bucket / "masks")
    out = bucket / "scenes.zarr"
    extract(standins.config(), folder_dataset(images, masks), out, device="cpu", limit=4)
    report = extract(standins.config(), folder_dataset(images, masks), out, device="cpu")
    assert (report.rows_found, report.skipped, report.changed) == (4, {}, {})
    opened = kdcache.open(str(out))
    assert rows_equal(opened, cache)
    found = verify(out)
    assert (found.ok, found.rows, found.being_written) == (True, len(cache), False)
    told = describe(opened)
    assert (told["rows"], told["path"]) == (len(cache), str(out))
    assert not (bucket / "scenes.zarr.lock").exists()
    config = TrainConfig(encoder_weights="random", epochs=1, batch_size=3, feature_weight=0)
    here = train(cache.path, tmp_path / "here", config, device="cpu")
    there = train(out, tmp_path / "there", config, device="cpu")
    assert losses(there.run) == losses(here.run)
    assert failing_share == 0 or store.failed > 20


def losses(run: Path) -> list[dict[str, float]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.endswith(("_s", "_ms", "fraction"))}
        for line in lines
    ]


def test_a_store_that_dies_is_told_and_what_was_committed_is_gone_on_with(
    bucket, store, standins: Standins, cache: Cache
):
    out = bucket / "scenes.zarr"
    dataset = folder_dataset(standins.images, standins.masks)
    extract(standins.config(), dataset, out, device="cpu", limit=3)
    store.dies_after = 12
    with pytest.raises(StorageError, match=r"s3://.*7 attempts.*run the same command again"):
        extract(standins.config(), dataset, out, device="cpu")
    with pytest.raises(StorageError, match=r"s3://.*cannot be"):
        Cache(out)
    store.heal()
    assert 3 <= len(Cache(out)) < len(cache)
    report = extract(standins.config(), dataset, out, device="cpu")
    assert report.rows_found >= 3
    assert rows_equal(Cache(out), cache)
    assert verify(out).ok


def test_photos_in_a_store_that_dies_stop_the_run_and_are_not_skipped(
    bucket, store, standins: Standins, tmp_path
):
    images = uploaded(standins.images, bucket / "photos")
    dataset = unlabelled_dataset(images)
    store.failing_share = 1.0
    with pytest.raises(StorageError, match="photos/"):
        extract(standins.config(), dataset, tmp_path / "c.zarr", device="cpu")
    assert not (tmp_path / "c.zarr").exists()


def test_a_photo_that_was_deleted_meanwhile_is_skipped_by_name(
    bucket, standins: Standins, tmp_path
):
    images = uploaded(standins.images, bucket / "photos")
    dataset = unlabelled_dataset(images)
    gone = dataset.samples[2].sample_id
    (images / gone).unlink()
    report = extract(standins.config(), dataset, tmp_path / "c.zarr", device="cpu")
    assert list(report.skipped) == [gone]


def test_plan_at_a_url_times_the_store_and_leaves_nothing(bucket, standins: Standins, tmp_path):
    dataset = folder_dataset(standins.images, standins.masks)
    out = bucket / "scenes.zarr"
    found = plan(standins.config(), dataset, out, device="cpu", picture=tmp_path / "plan.png")
    assert (found.free_bytes, found.free_files, found.fits) == (None, None, True)
    assert found.write_bytes_per_s > 0
    assert files_below(bucket) == []


def test_every_damage_to_an_object_is_found(bucket):
    written(bucket / "c", range(7))
    path = bucket / "c" / "image" / "c.1.0.0.0"
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(bytes(data))
    (bucket / "c" / "mask" / "c.0.0.0").unlink()
    (bucket / "c" / "stranger").write_bytes(b"")
    (bucket / "c" / "commits" / "000002" / "zarr.json").unlink()
    found = {problem.path for problem in verify(bucket / "c").bad}
    assert {"image/c.1.0.0.0", "mask/c.0.0.0", "stranger", "commits/000002/zarr.json"} <= found
    with pytest.raises(CacheError, match="image/c.1.0.0.0: cannot read row 3"):
        _ = Cache(bucket / "c")[3].image
    with pytest.raises(CacheError, match="mask/c.0.0.0: cannot read row 0"):
        _ = Cache(bucket / "c")[0].mask


def test_half_made_caches_are_completed_and_strangers_are_left_alone(bucket, standins: Standins):
    written(bucket / "c", range(2))
    (bucket / "c" / "zarr.json").unlink()  # a writer that was killed before it wrote the root
    for name in files_below(bucket / "c"):
        if "c." in name or name.startswith("commits/0"):
            (bucket / "c" / name).unlink()
    written(bucket / "c", range(2))
    assert len(Cache(bucket / "c")) == 2
    (bucket / "notes" / "todo.txt").write_bytes(b"mine")
    dataset = folder_dataset(standins.images, standins.masks)
    with pytest.raises(CacheError, match="is not a kdcache cache"):
        extract(standins.config(), dataset, bucket / "notes", device="cpu")


def test_one_writer_at_a_time_and_a_killed_one_does_not_block_for_long(bucket, monkeypatch):
    written(bucket / "c", range(2))
    lease = bucket / "c.lock"
    with CacheWriter(bucket / "c", MANIFEST) as first:
        with pytest.raises(CacheError, match=r"is being written by process \d+ on .* sign of life"):
            CacheWriter(bucket / "c", MANIFEST)
        assert verify(bucket / "c").being_written
        record = json.loads(lease.read_bytes())
        elsewhere = {**record, "token": "other", "host": "elsewhere"}
        lease.write_bytes(json.dumps(elsewhere).encode())
        first.append(first.encoded(*make_row(5)))
        with pytest.raises(CacheError, match="another process has begun to write"):
            first.commit()
        lease.unlink()
    # one of another machine, that went silent
    lease.write_bytes(json.dumps({**elsewhere, "renewed": record["renewed"] - 60}).encode())
    with pytest.raises(CacheError, match="elsewhere"):
        CacheWriter(bucket / "c", MANIFEST)
    monkeypatch.setattr(lock, "_VALID_S", 30.0)
    written(bucket / "c", range(2, 4))
    monkeypatch.undo()
    # one of this machine, that is dead: at once
    script = "import os; print(os.getpid())"
    dead = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    lease.write_bytes(json.dumps({**record, "pid": int(dead.stdout), "token": "dead"}).encode())
    written(bucket / "c", range(4, 6))
    # its successor in a container has its number
    lease.write_bytes(json.dumps({**record, "token": "before"}).encode())
    written(bucket / "c", range(6, 7))
    assert len(Cache(bucket / "c")) == 7
    assert not lease.exists()


def test_a_lease_is_renewed_while_its_writer_lives(bucket, monkeypatch):
    monkeypatch.setattr(lock, "_RENEWED_EVERY_S", 0.02)
    held = lock.locked(bucket / "c")
    first = json.loads((bucket / "c.lock").read_bytes())["renewed"]
    for _ in range(500):
        if json.loads((bucket / "c.lock").read_bytes())["renewed"] > first:
            break
    else:
        pytest.fail("it was not renewed")
    held.close()
    assert not (bucket / "c.lock").exists()


def test_a_bucket_is_no_place_for_a_cache_by_itself(bucket):
    with pytest.raises(CacheError, match="give a folder in it"):
        written(Url(bucket.text.removesuffix("/data")), range(1))


def test_what_a_killed_writer_uploaded_is_swept(bucket):
    written(bucket / "c", range(4))
    (bucket / "c" / "image" / "c.2.0.0.0").write_bytes(b"half a shard")
    written(bucket / "c", range(4, 5))
    assert len(Cache(bucket / "c")) == 5
    assert verify(bucket / "c").ok
    assert read_root(bucket / "c").shards == 3


def test_batches_from_a_url_equal_those_from_a_disk(bucket, cache: Cache):
    copy = Cache(uploaded(Path(str(cache.path)), bucket / "copy.zarr"))
    for here, there in zip(batches(cache, 3), batches(copy, 3), strict=True):
        assert here.keys == there.keys
        for name, map_NCHW in here.features.items():
            np.testing.assert_array_equal(map_NCHW, there.features[name])
        np.testing.assert_array_equal(here.image, there.image)


def test_what_the_writer_would_refuse_is_told_before_models_are_loaded(
    bucket, standins: Standins, monkeypatch
):
    monkeypatch.setattr(job, "open_models", None)
    dataset = folder_dataset(standins.images, standins.masks)
    with pytest.raises(CacheError, match="there is no absent-bucket in that store"):
        extract(standins.config(), dataset, Url("s3://absent-bucket/c.zarr"), device="cpu")
    written(bucket / "c", range(2))
    held = lock.locked(bucket / "c")
    with pytest.raises(CacheError, match="is being written by process"):
        extract(standins.config(), dataset, bucket / "c", device="cpu")
    held.close()


def test_a_wrong_address_is_told_at_once(bucket, monkeypatch):
    attempts = []

    class Mistaken:
        def info(self, key: str) -> None:
            attempts.append(key)
            raise ValueError("Invalid endpoint: 127.0.0.1:9")

    monkeypatch.setattr(places, "_filesystem", lambda url: (Mistaken(), url))
    with pytest.raises(StorageError, match="Invalid endpoint.*AWS_ENDPOINT_URL"):
        (bucket / "c").exists()
    assert len(attempts) == 1


def test_what_is_opened_anew_is_at_the_address_of_now(bucket, monkeypatch):
    (bucket / "a").write_bytes(b"before")
    try:
        for _ in range(2):
            with contextlib.closing(Store()) as other:
                for name, value in other.environment.items():
                    monkeypatch.setenv(name, value)
                places._filesystem_of.cache_clear()
                (place_of(f"s3://{other.new_bucket()}") / "a").write_bytes(b"after")
                assert other.requests > 1
    finally:
        places._filesystem_of.cache_clear()


def test_refused_credentials_are_told_at_once(store, bucket, monkeypatch):
    class Refusing:
        def info(self, key: str) -> None:
            raise PermissionError("Forbidden")

    monkeypatch.setattr(places, "_filesystem", lambda url: (Refusing(), url))
    with pytest.raises(StorageError, match="refuses.*Forbidden.*AWS_ACCESS_KEY_ID"):
        (bucket / "c").exists()


def test_commands_take_urls_and_local_paths_refuse_them(bucket, store, standins, tmp_path):
    out = bucket / "cli.zarr"
    arguments = ["--images", standins.images, "--masks", standins.masks, "--out", out]
    arguments += ["--yolo", standins.detector, "--teacher", standins.teacher, "--size", 64]
    arguments += ["--device", "cpu", "--val-fraction", 0.3]
    made = kdcache_command("extract", *arguments, folder=tmp_path)
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "cli.zarr-check.png").is_file()
    told = kdcache_command("info", out, "--json", folder=tmp_path)
    assert json.loads(told.stdout)["rows"] == 10
    refused = kdcache_command("train", out, "--out", f"{bucket}/run", folder=tmp_path)
    assert refused.returncode == 2
    assert "this has to be a local path" in refused.stderr


def kdcache_command(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kdcache", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder)


def test_an_empty_folder_of_photos_at_a_url_is_told(bucket):
    with pytest.raises(DatasetError, match="no such folder"):
        unlabelled_dataset(bucket / "nothing")


def test_doctor_times_a_store_and_names_one_that_refuses(bucket, store):
    written(bucket / "c", range(2))
    answered, rate = check_store(bucket / "c", gpu=False)
    assert (answered.level, rate.check) == ("ok", "speed")
    assert rate.values["rows_per_s"] > 0
    assert files_below(bucket) == [f"c/{name}" for name in files_below(bucket / "c")]
    absent = Url(f"s3://absent-{store.new_bucket()}")
    for place in (absent, absent / "c"):  # looking makes no bucket
        (told,) = check_store(place, gpu=False)
        assert (told.level, "No such file" in told.found) == ("problem", True)
    assert check_store(Url(bucket.text.removesuffix("/data")), gpu=False)[0].level == "ok"
    store.dies_after = 0  # it may be read, not written to
    (told,) = check_store(bucket / "c", gpu=False)
    assert (told.level, "extract cannot append" in told.found) == ("note", True)
    (told,) = check_store(bucket / "new", gpu=False)
    assert (told.level, "7 attempts" in told.found) == ("problem", True)


def test_a_part_is_refreshed_at_a_url_and_rows_are_added_after_it(
    bucket, store, standins: Standins, tmp_path
):
    out = bucket / "c.zarr"
    standins.extract(out, limit=6)
    save_teacher(tmp_path / "other.onnx", bias=1.5)
    config = standins.config(teacher_checkpoint=tmp_path / "other.onnx")
    store.dies_after = 4
    with pytest.raises(StorageError):
        refresh(config, out, "teacher", device="cpu")
    store.heal()
    assert rows_equal(Cache(out), Cache(standins.extract(tmp_path / "old", limit=6).cache))
    refresh(config, out, "teacher", device="cpu")
    standins.extract(out, teacher_checkpoint=config.teacher_checkpoint)
    here = Cache(
        standins.extract(tmp_path / "c", teacher_checkpoint=config.teacher_checkpoint).cache
    )
    there = Cache(out)
    ours_by_key = {row.key: row for row in there}
    assert ours_by_key.keys() == set(here.keys)
    for theirs in here:
        ours = ours_by_key[theirs.key]
        np.testing.assert_array_equal(ours.teacher_logits, theirs.teacher_logits)
        np.testing.assert_array_equal(ours.image, theirs.image)
    assert verify(out).ok
    assert not any(name.startswith("teacher_logits/") for name in files_below(out))
