"""Several views of each training sample in one cache: order, resume, raising K, what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from conftest import rows_equal

from kdcache.cache.copy import copy_cache
from kdcache.cache.format import augmentation_digest, read_remarks, read_root
from kdcache.cache.info import describe
from kdcache.cache.reader import Cache
from kdcache.cache.thin import Thinning
from kdcache.cache.verify import verify
from kdcache.cache.writer import CacheWriter
from kdcache.cluster import local_workers
from kdcache.errors import CacheError, FingerprintError
from kdcache.imaging import decode_image, decode_mask
from kdcache.precompute.dataset import folder_dataset
from kdcache.precompute.distributed import extract_on
from kdcache.precompute.extract import extract
from kdcache.precompute.plan import plan
from kdcache.precompute.views import apply
from kdcache.report import extract_text

VIEWS = {"views": 3, "augment": "heavy"}


@pytest.fixture(scope="module")
def several(standins, tmp_path_factory):
    """A cache of three views, never to be written to."""
    path = tmp_path_factory.mktemp("views") / "c"
    standins.extract(path, **VIEWS)
    return Cache(path)


def files(cache):
    """Content of every file but the root's record, which states when it was written."""
    return {
        path.relative_to(cache).as_posix(): path.read_bytes()
        for path in cache.rglob("*")
        if path.is_file()
    }


def test_every_training_sample_has_all_views_and_validation_the_first(several, cache):
    views = {}
    for key in several.keys:
        views.setdefault(key[:2], []).append(key.view)
    assert {tuple(found) for (split, _), found in views.items() if split == "train"} == {(0, 1, 2)}
    assert {tuple(found) for (split, _), found in views.items() if split == "val"} == {(0,)}
    assert {key for key in several.keys if not key.view} == set(cache.keys)


def test_a_shard_holds_one_split_and_one_view(several):
    kinds = [{(key.split, key.view) for key in commit.keys} for commit in several.commits]
    assert all(len(kind) == 1 for kind in kinds)


def test_the_first_view_is_what_a_cache_without_others_holds(several, cache):
    ours = {key: number for number, key in enumerate(several.keys)}
    for number, key in enumerate(cache.keys):
        for spec in cache.manifest.arrays():
            theirs = cache.read(number, spec.path)
            assert np.array_equal(several.read(ours[key], spec.path), theirs)


def test_a_view_can_be_made_again_from_what_its_row_says(several, standins):
    """The parameters are applied as they are stored, and the frozen models saw these pixels."""
    augmented = [row for row in several if row.view]
    assert augmented
    for row in augmented:
        image = decode_image((standins.images / row.sample_id).read_bytes())
        mask = (standins.masks / row.sample_id).with_suffix(".png").read_bytes()
        view = apply(row.details["drawn"], image, decode_mask(mask), 64, "stretch")
        assert np.array_equal(view.image, row.image)
        assert np.array_equal(view.mask, row.mask)
        assert row.details["augmentation"] == augmentation_digest(several.manifest.augmentation)


def test_views_differ_from_the_first_and_from_one_another(several):
    seen = {}
    for row in several:
        if row.split == "train":
            seen.setdefault(row.sample_id, set()).add(row.image.tobytes())
    assert all(len(images) == 3 for images in seen.values())


@pytest.mark.parametrize("stages", [(1, 3), (2, 3), (1, 2, 3), (3, 1, 3)])
def test_raised_later_it_is_the_same_cache_file_by_file(standins, several, tmp_path, stages):
    for views in stages:
        standins.extract(tmp_path / "c", views=views, augment="heavy")
    assert files(tmp_path / "c") == files(several.path)
    assert verify(tmp_path / "c").ok


def test_a_lower_number_leaves_the_further_views_and_calls_nothing_gone(standins, tmp_path):
    standins.extract(tmp_path / "c", **VIEWS)
    report = standins.extract(tmp_path / "c", views=2, augment="heavy")
    assert (report.rows_added, list(report.gone)) == (0, [])
    report = standins.extract(tmp_path / "c")
    assert (report.rows_added, list(report.gone), report.rows_found) == (0, [], 10)
    more = report.rows_total - 10
    assert more > 0
    assert f"{more} more stay in it: other photos or views" in extract_text(report)


def test_killed_in_the_middle_of_the_views_it_ends_equal(standins, several, tmp_path, monkeypatch):
    append = CacheWriter.append
    calls = iter(range(100))

    def killed(self, row):
        if next(calls) == 14:
            raise RuntimeError("killed")
        append(self, row)

    monkeypatch.setattr(CacheWriter, "append", killed)
    with pytest.raises(RuntimeError):
        standins.extract(tmp_path / "c", **VIEWS)
    assert 0 < len(Cache(tmp_path / "c")) < len(several)
    monkeypatch.undo()
    standins.extract(tmp_path / "c", **VIEWS)
    assert rows_equal(Cache(tmp_path / "c"), several)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("limit", [4, None])
def test_neither_order_nor_threads_decide_a_view(standins, several, tmp_path, workers, limit):
    """The samples in another order, in two portions, by another number of threads."""
    dataset = folder_dataset(standins.images, standins.masks)
    turned = dataclasses.replace(dataset, samples=list(reversed(dataset.samples)))
    for portion in (limit, None):
        config = standins.config(**VIEWS)
        extract(config, turned, tmp_path / "c", device="cpu", limit=portion, workers=workers)
    assert rows_equal(Cache(tmp_path / "c"), several)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"augment": "light"}, "views .* with --augment heavy, now light was asked for"),
        ({"seed": 1, "val_fraction": 0.0}, "seed = 0, now 1 was asked for"),
    ],
)
def test_views_of_another_policy_are_refused_by_name(standins, tmp_path, change, words):
    settings = {**VIEWS, "val_fraction": 0.0}
    standins.extract(tmp_path / "c", limit=2, **settings)
    with pytest.raises(FingerprintError, match=words):
        standins.extract(tmp_path / "c", **(settings | change))
    assert len(Cache(tmp_path / "c")) == 6


def test_a_policy_of_ones_own_is_named_by_its_settings(standins, tmp_path):
    policies = [tmp_path / "a.toml", tmp_path / "b.toml"]
    for path, most in zip(policies, (1.5, 1.6), strict=True):
        path.write_text(f"[window]\nprobability = 1.0\nscale = [1.0, {most}]\n")
    standins.extract(tmp_path / "c", limit=2, views=2, augment=str(policies[0]), val_fraction=0.0)
    words = r"policy.window.scale = \[1.0, 1.5\], now \[1.0, 1.6\] was asked for"
    with pytest.raises(FingerprintError, match=words):
        standins.extract(tmp_path / "c", views=2, augment=str(policies[1]), val_fraction=0.0)


def test_what_no_row_was_made_by_may_be_changed(standins, tmp_path, monkeypatch):
    """Stopped before its first view but 0, an extraction may be asked for another policy."""
    append = CacheWriter.append

    def stopped(self, row):
        if row.key.view:
            raise KeyboardInterrupt
        append(self, row)

    monkeypatch.setattr(CacheWriter, "append", stopped)
    with pytest.raises(KeyboardInterrupt):
        standins.extract(tmp_path / "c", **VIEWS)
    assert read_root(tmp_path / "c").manifest.augmentation is None
    monkeypatch.undo()
    standins.extract(tmp_path / "c", views=2, augment="light")
    assert verify(tmp_path / "c").ok


def test_rows_of_validation_alone_have_no_further_views(standins, tmp_path):
    dataset = folder_dataset(standins.images, standins.masks)
    extract(standins.config(**VIEWS), dataset, tmp_path / "c", split="val", device="cpu")
    assert read_root(tmp_path / "c").manifest.augmentation is None
    assert describe(Cache(tmp_path / "c"))["rows_by_view"] == {0: 10}


def test_verify_names_rows_of_another_augmentation(several, tmp_path):
    """As of two caches in one folder, whose manifests differ in that alone."""
    shutil.copytree(several.path, tmp_path / "c")
    root = read_root(tmp_path / "c")
    other = dataclasses.replace(root.manifest, augmentation={"policy": "another"})
    (tmp_path / "c/zarr.json").write_bytes(dataclasses.replace(root, manifest=other).document())
    report = verify(tmp_path / "c")
    assert not report.ok
    assert all("made by another augmentation" in problem.problem for problem in report.bad)


def test_views_are_of_the_photo_that_the_first_was_made_of(standins, tmp_path):
    shutil.copytree(standins.images, tmp_path / "images")
    dataset = folder_dataset(tmp_path / "images", standins.masks)
    settings = {"val_fraction": 0.0}
    extract(standins.config(**settings), dataset, tmp_path / "c", device="cpu")
    shutil.copy(standins.images / "scene_001.jpg", tmp_path / "images/scene_000.jpg")
    config = standins.config(**settings, views=2)
    report = extract(config, dataset, tmp_path / "c", device="cpu")
    assert list(report.skipped) == ["scene_000.jpg"]
    assert "another when an earlier view was made" in report.skipped["scene_000.jpg"]
    assert report.rows_total == 10 + 9


@pytest.mark.parametrize("broken_first", [False, True])
@pytest.mark.parametrize("scheduler", ["here", "workers"])
def test_a_photo_that_changes_between_its_views_in_one_run_has_views_of_one(
    standins, tmp_path, monkeypatch, broken_first, scheduler
):
    """Views are hours apart; replaced when its first view is written, or unreadable until then."""
    shutil.copytree(standins.images, tmp_path / "images")
    photo = tmp_path / "images/scene_009.jpg"
    other = (standins.images / "scene_001.jpg").read_bytes()
    if broken_first:
        photo.write_bytes(b"broken")
    record = CacheWriter._record

    def replaced(self, commit):
        record(self, commit)
        if sum(not key.view for key in self.committed) == (9 if broken_first else 10):
            photo.write_bytes(other)

    monkeypatch.setattr(CacheWriter, "_record", replaced)
    dataset = folder_dataset(tmp_path / "images", standins.masks)
    config = standins.config(views=3, val_fraction=0.0, shard_rows=5)
    if scheduler == "here":
        report = extract(config, dataset, tmp_path / "c", device="cpu", workers=1)
    else:
        with local_workers(2, device="cpu", nthreads=1) as client:
            report = extract_on(client, config, dataset, tmp_path / "c", device="cpu")
    views = [key.view for key in Cache(tmp_path / "c").keys if key.sample_id == "scene_009.jpg"]
    assert list(report.skipped) == ["scene_009.jpg"]
    assert views == ([] if broken_first else [0])
    assert len(Cache(tmp_path / "c")) == 27 + len(views)


def test_a_damaged_photo_is_skipped_once_and_photos_in_both_splits_are_told_once(
    standins, tmp_path
):
    shutil.copytree(standins.images, tmp_path / "images")
    shutil.copytree(standins.masks, tmp_path / "masks")
    (tmp_path / "images/scene_003.jpg").write_bytes(b"broken")
    train = [
        key.sample_id for key in Cache(_plain(standins, tmp_path)).keys if key.split == "train"
    ]
    val = [key.sample_id for key in Cache(tmp_path / "plain").keys if key.split == "val"]
    kept = next(name for name in train if name != "scene_003.jpg")
    shutil.copy(tmp_path / "images" / kept, tmp_path / "images" / val[0])
    dataset = folder_dataset(tmp_path / "images", tmp_path / "masks")
    report = extract(standins.config(**VIEWS), dataset, tmp_path / "c", device="cpu")
    assert list(report.skipped) == ["scene_003.jpg"]
    assert list(report.in_train_and_val) == [(kept, val[0])]
    assert read_remarks(tmp_path / "c").together.skipped == report.skipped


def _plain(standins, tmp_path):
    standins.extract(tmp_path / "plain")
    return tmp_path / "plain"


def test_bytes_and_files_are_as_planned(standins, several, tmp_path):
    dataset = folder_dataset(standins.images, standins.masks)
    picture = tmp_path / "plan.png"
    found = plan(standins.config(**VIEWS), dataset, tmp_path / "c", device="cpu", picture=picture)
    shards = sum(r.size_bytes for c in several.commits for r in c.objects.values())
    written = 1 + len(list(several.path.rglob("*")))
    assert found.rows == len(several)
    assert abs(found.bytes / shards - 1) < 0.05
    assert found.files - 2 == written


@pytest.mark.parametrize(
    ("views", "said"),
    [
        (1, ["the first view only"]),
        (2, ["2 of 3 views"]),
        (3, []),
        (4, ["3 of the 4 views asked for: it has no more"]),
    ],
)
def test_a_copy_of_the_first_views_is_an_extraction_of_them(
    standins, several, tmp_path, views, said
):
    report = copy_cache(several.path, tmp_path / "copy", Thinning(views=views))
    standins.extract(tmp_path / "c", views=min(views, 3), augment="heavy")
    ours, theirs = Cache(tmp_path / "copy"), Cache(tmp_path / "c")
    assert ours.manifest == theirs.manifest
    assert [(c.keys, c.objects) for c in ours.commits] == [
        (c.keys, c.objects) for c in theirs.commits
    ]
    assert report.changes == said
    copy_cache(several.path, tmp_path / "copy")  # what is missing is added
    assert rows_equal(Cache(tmp_path / "copy"), several)
    assert verify(tmp_path / "copy").ok


def test_a_view_that_describes_itself_too_long_is_skipped_not_cut(several):
    longest = max(len(json.dumps(row.details)) for row in several)
    assert longest < 1500  # of 2048: ids and paths need room


def test_an_earlier_view_than_the_caches_is_not_appended_twice(standins, several, tmp_path):
    with (
        pytest.raises(CacheError, match="already"),
        CacheWriter(several.path, several.manifest) as writer,
    ):
        arrays = {spec.path: several.read(0, spec.path) for spec in several.manifest.arrays()}
        writer.append(writer.encoded(several.keys[0], arrays))
