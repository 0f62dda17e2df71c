"""Source files that changed since, photos in both splits, and what an extraction says of them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import Standins
from PIL import Image

from kdcache import durable
from kdcache.cache.format import (
    SKIPPED,
    Remarks,
    describe_row,
    read_remarks,
    signed_document,
)
from kdcache.cache.info import describe
from kdcache.cache.reader import Cache
from kdcache.cli import main
from kdcache.errors import CacheError, DatasetError
from kdcache.precompute.dataset import Dataset, Sample, folder_dataset, unlabelled_dataset
from kdcache.precompute.extract import extract
from kdcache.precompute.sources import Digests, twins


@pytest.fixture
def scenes(standins: Standins, tmp_path: Path) -> Path:
    """A folder of four scenes and their masks, free to be changed."""
    for name in sorted(p.stem for p in standins.images.iterdir())[:4]:
        for source, kind in ((standins.images, "jpg"), (standins.masks, "png")):
            target = tmp_path / source.name / f"{name}.{kind}"
            target.parent.mkdir(exist_ok=True)
            shutil.copy(source / f"{name}.{kind}", target)
    return tmp_path


def dataset(scenes: Path) -> Dataset:
    return folder_dataset(scenes / "images", scenes / "masks")


def run(standins: Standins, scenes: Path, data: Dataset | None = None, **options: object):
    config = standins.config(val_fraction=0.0)
    return extract(config, data or dataset(scenes), scenes / "c", device="cpu", **options)


def test_each_kind_of_change_is_named_and_the_rows_stay(standins, scenes):
    run(standins, scenes)
    before = [row.image.tobytes() for row in Cache(scenes / "c")]
    photo = scenes / "images/scene_000.jpg"
    photo.write_bytes(photo.read_bytes() + b"x")
    photo = scenes / "images/scene_001.jpg"
    times = os.stat(photo)
    data = bytearray(photo.read_bytes())
    data[-3] ^= 1
    photo.write_bytes(data)
    os.utime(photo, ns=(times.st_atime_ns, times.st_mtime_ns))
    Image.new("L", (120, 90), 255).save(scenes / "masks/scene_002.png")
    report = run(standins, scenes)
    assert report.changed.keys() == {f"scene_00{n}.jpg" for n in range(3)}
    assert "bytes, it has" in report.changed["scene_000.jpg"]
    assert "other bytes of the same number" in report.changed["scene_001.jpg"]
    assert "its mask or annotations" in report.changed["scene_002.jpg"]
    assert [row.image.tobytes() for row in Cache(scenes / "c")] == before
    assert read_remarks(scenes / "c").together.changed == report.changed


def test_removed_files_are_named(standins, scenes):
    run(standins, scenes)
    listed_and_lost = dataset(scenes)
    (scenes / "images/scene_000.jpg").unlink()
    assert "No such file" in run(standins, scenes, listed_and_lost).changed["scene_000.jpg"]
    assert run(standins, scenes).gone == ["scene_000.jpg"]
    # with a limit nobody can tell
    assert run(standins, scenes, limit=2).gone == []


def test_labels_that_came_later_are_named(standins, scenes):
    run(standins, scenes, unlabelled_dataset(scenes / "images"))
    assert len(run(standins, scenes).changed) == 4


def test_same_pixels_in_train_and_val_are_reported_whatever_their_encoding(standins, scenes):
    for folder, target in (("images", "val_images"), ("masks", "val_masks")):
        (scenes / target).mkdir()
        for number in (1, 3):
            (source,) = (scenes / folder).glob(f"scene_00{number}.*")
            Image.open(source).save(scenes / target / f"copy_{number}.png")
    assert list(run(standins, scenes).in_train_and_val) == []
    val = folder_dataset(scenes / "val_images", scenes / "val_masks")
    pairs = [("scene_001.jpg", "copy_1.png"), ("scene_003.jpg", "copy_3.png")]
    assert list(run(standins, scenes, val, split="val").in_train_and_val) == pairs
    assert list(run(standins, scenes).in_train_and_val) == pairs


def test_every_copy_in_train_and_val_is_in_a_pair():
    same, other = (Digests(1, "", "", pixels) for pixels in ("same", "other"))
    photos = {("train", f"t{n}"): same for n in range(4)} | {("train", "alone"): other}
    photos |= {("val", f"v{n}"): same for n in range(2)}
    named = {name for pair in twins(photos) for name in pair}
    assert named == {"t0", "t1", "t2", "t3", "v0", "v1"}


def test_appending_keeps_what_was_said_of_the_first_dataset(standins, scenes):
    (scenes / "images/broken.jpg").write_bytes(b"")
    shutil.copy(scenes / "masks/scene_001.png", scenes / "masks/broken.png")
    assert run(standins, scenes).skipped.keys() == {"broken.jpg"}
    (scenes / "val_images").mkdir()
    shutil.copy(scenes / "images/scene_000.jpg", scenes / "val_images/other.jpg")
    run(standins, scenes, unlabelled_dataset(scenes / "val_images"), split="val")
    assert describe(Cache(scenes / "c"))["skipped"].keys() == {"broken.jpg"}
    (scenes / "images/broken.jpg").unlink()
    run(standins, scenes)
    assert describe(Cache(scenes / "c"))["skipped"] == {}


def test_an_unreadable_photo_of_a_known_name_does_not_stop_an_append(standins, scenes):
    run(standins, scenes)
    (scenes / "val_images").mkdir()
    (scenes / "val_images/scene_000.jpg").symlink_to(scenes / "val_images")  # unreadable for root
    shutil.copy(scenes / "images/scene_001.jpg", scenes / "val_images/new.jpg")
    samples = [
        Sample(sample_id=n, image_path=scenes / "val_images" / n, labelled=False)
        for n in ("new.jpg", "scene_000.jpg")
    ]
    val = Dataset(images=scenes / "val_images", samples=samples)
    report = run(standins, scenes, val, split="val")
    assert (report.rows_added, list(report.skipped)) == (1, ["scene_000.jpg"])


def test_annotations_changed_in_what_is_drawn_only(standins, scenes):
    from kdcache.precompute.dataset import coco_dataset

    square = [[1.0, 1, 50, 1, 50, 50, 1, 50]]
    document = {
        "images": [{"id": 1, "file_name": "scene_000.jpg", "height": 90, "width": 120}],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": [{"image_id": 1, "category_id": 1, "segmentation": square, "id": 5}],
    }

    def coco() -> Dataset:
        (scenes / "coco.json").write_text(json.dumps(document))
        return coco_dataset(scenes / "images", scenes / "coco.json")

    run(standins, scenes, coco())
    document["annotations"][0] |= {"id": 6, "area": 3.0}
    assert run(standins, scenes, coco()).changed == {}
    square[0][0] = 2.0
    assert "annotations are others" in run(standins, scenes, coco()).changed["scene_000.jpg"]


def test_strict_stops_at_a_file_that_is_no_sample(standins, scenes):
    (scenes / "masks/scene_001.png").unlink()
    with pytest.raises(DatasetError, match=r"scene_001.jpg: no mask.*--strict"):
        run(standins, scenes, strict=True)
    assert not (scenes / "c").exists()


def test_the_command_tells_all_of_it_and_exits_with_3(standins, scenes):
    def extract_again() -> object:
        flags = ["--images", scenes / "images", "--masks", scenes / "masks", "--out", scenes / "c"]
        flags += ["--yolo", standins.detector, "--teacher", standins.teacher, "--size", 64]
        return CliRunner().invoke(main, ["extract", *map(str, flags), "--device", "cpu"])

    assert extract_again().exit_code == 0
    (scenes / "images/scene_000.jpg").unlink()
    (scenes / "masks/scene_000.png").unlink()
    (scenes / "masks/scene_001.png").unlink()
    (scenes / "images/notes.txt").write_text("x")
    with (scenes / "images/scene_002.jpg").open("ab") as file:
        file.write(b"x")
    result = extract_again()
    assert result.exit_code == 3, result.output
    for words in (
        "2 rows are of images that the dataset does not have: removed since, or of another folder:"
        "\n  scene_000.jpg\n  scene_001.jpg\n",
        "1 left out: files of suffix .txt",
        "1 images skipped:\n  scene_001.jpg: no mask of the same name",
        "1 images are not what they were",
        "\n  scene_002.jpg: the image had",
    ):
        assert words in result.stdout, words
    info = CliRunner().invoke(main, ["info", str(scenes / "c")]).stdout
    assert "scene_002.jpg: the image had" in info
    assert "1 left out: files of suffix .txt" in info
    assert "2 rows are of images that the dataset does not have" in info


def test_a_cache_of_an_earlier_kdcache_is_described_and_not_appended_to(
    standins, scenes, monkeypatch
):
    """Its rows held fewer digests, its remarks those on one dataset."""
    with monkeypatch.context() as earlier:
        earlier.setattr(
            "kdcache.precompute.job.describe_row", lambda key, details: describe_row(key, {})
        )
        run(standins, scenes)
    images = {"a.jpg": "cannot be decoded"}
    later = {"left_out": {"no person": 2}, "changed": {"b.jpg": "other bytes"}}
    (scenes / "c/skipped/zarr.json").write_bytes(
        signed_document(SKIPPED, {"images": images, **later, "in_train_and_val": [["t", "v"]]})
    )
    found = describe(Cache(scenes / "c"))
    assert {name: found[name] for name in later} == later
    assert (found["skipped"], found["in_train_and_val"]) == (images, [("t", "v")])
    replaced = read_remarks(scenes / "c").with_one("photos", Remarks())
    assert replaced.together == Remarks(gone=[])
    old = signed_document(SKIPPED, {"images": images})
    (scenes / "c/skipped/zarr.json").write_bytes(old)
    assert describe(Cache(scenes / "c"))["skipped"] == {"a.jpg": "cannot be decoded"}
    with pytest.raises(CacheError, match="an earlier kdcache made it; nothing can be appended"):
        run(standins, scenes)


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog):
    def unsupported(descriptor, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(durable.fcntl, "flock", unsupported)
    descriptor = durable.lock(tmp_path)
    assert descriptor is not None
    os.close(descriptor)
    assert "let one process write there" in caplog.text
