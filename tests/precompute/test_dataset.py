"""Pairing, COCO selection and rasterising, the split."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from kdcache.errors import DatasetError, SampleError
from kdcache.imaging import IGNORE
from kdcache.precompute.coco import rasterise
from kdcache.precompute.dataset import (
    coco_dataset,
    folder_dataset,
    split_of,
    unlabelled_dataset,
)


def save(path, value=0, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)


def test_images_pair_with_masks_of_exactly_their_stem_and_folder(tmp_path):
    for name in ("1", "10", "11", "sub/1"):
        save(tmp_path / "images" / f"{name}.jpg")
        save(tmp_path / "masks" / f"{name}.png")
    (tmp_path / "images/notes.txt").write_text("not an image")
    samples = folder_dataset(tmp_path / "images", tmp_path / "masks").samples
    pairs = {s.sample_id: s.mask_path.relative_to(tmp_path / "masks").as_posix() for s in samples}
    assert pairs == {f"{n}.jpg": f"{n}.png" for n in ("1", "10", "11", "sub/1")}


def test_unpaired_images_are_refused_by_name_and_unpaired_masks_counted(tmp_path):
    save(tmp_path / "images/a.jpg")
    save(tmp_path / "images/b.jpg")
    save(tmp_path / "masks/b.png")
    save(tmp_path / "masks/c.png")
    dataset = folder_dataset(tmp_path / "images", tmp_path / "masks")
    assert [sample.sample_id for sample in dataset.samples] == ["b.jpg"]
    assert dataset.refused.keys() == {"a.jpg"}
    assert "no mask of the same name" in dataset.refused["a.jpg"]
    assert [n for why, n in dataset.left_out.items() if "masks without an image" in why] == [1]


def test_folders_that_do_not_pair_at_all_are_an_error(tmp_path):
    save(tmp_path / "images/a.jpg")
    save(tmp_path / "masks/a_mask.png")
    with pytest.raises(DatasetError, match=r"1 stems \(a\) and 1 stems \(a_mask\)"):
        folder_dataset(tmp_path / "images", tmp_path / "masks")


@pytest.mark.parametrize("names", [("images/a.png",), ("masks/a.bmp",)])
def test_files_of_one_stem_are_refused_by_name(tmp_path, names):
    for name in ("images/a.jpg", "masks/a.png", "images/b.jpg", "masks/b.png", *names):
        save(tmp_path / name)
    dataset = folder_dataset(tmp_path / "images", tmp_path / "masks")
    assert [sample.sample_id for sample in dataset.samples] == ["b.jpg"]
    assert all("share one stem" in why for why in dataset.refused.values())
    assert "a.jpg" in dataset.refused
    # without masks there is nothing to mix up
    assert {s.sample_id for s in unlabelled_dataset(tmp_path / "images").samples} >= {"a.jpg"}


def test_links_are_followed_but_not_in_circles(tmp_path):
    save(tmp_path / "elsewhere/deep/a.jpg")
    images = tmp_path / "images"
    save(images / "b.jpg")
    (images / "linked").symlink_to(tmp_path / "elsewhere")
    (images / "again").symlink_to(images)
    (tmp_path / "elsewhere/up").symlink_to(tmp_path / "elsewhere/deep/..")
    (images / "lost.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (images / "self.jpg").symlink_to(images / "self.jpg")
    dataset = unlabelled_dataset(images)
    assert [s.sample_id for s in dataset.samples] == ["b.jpg", "linked/deep/a.jpg"]
    assert "in itself" in dataset.refused["again"]
    assert "in itself" in dataset.refused["linked/up"]
    assert "leads nowhere" in dataset.refused["lost.jpg"]
    assert "leads nowhere" in dataset.refused["self.jpg"]


def test_pipes_are_refused_instead_of_waited_for(tmp_path):
    save(tmp_path / "images/b.jpg")
    os.mkfifo(tmp_path / "images/pipe.jpg")
    assert "regular" in unlabelled_dataset(tmp_path / "images").refused["pipe.jpg"]
    images, file = coco(tmp_path, [person(0, SQUARE), person(1, SQUARE)])
    (images / "1.jpg").unlink()
    os.mkfifo(images / "1.jpg")
    with pytest.raises(SampleError, match="not a regular file"):
        coco_dataset(images, file).samples[1].read()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read_is_named(tmp_path):
    save(tmp_path / "images/b.jpg")
    save(tmp_path / "images/locked/a.jpg")
    save(tmp_path / "images/secret.jpg")
    for name in ("locked", "secret.jpg"):
        (tmp_path / "images" / name).chmod(0)
    dataset = unlabelled_dataset(tmp_path / "images")
    assert "Permission denied" in dataset.refused["locked"]
    (secret,) = (s for s in dataset.samples if s.sample_id == "secret.jpg")
    with pytest.raises(SampleError, match="Permission denied"):
        secret.read()
    (tmp_path / "images/locked").chmod(0o700)


def test_other_files_are_counted_by_suffix(tmp_path):
    save(tmp_path / "images/b.jpg")
    for name in ("a.svg", "c.SVG", "README", ".DS_Store"):
        (tmp_path / "images" / name).write_bytes(b"x")
    left_out = unlabelled_dataset(tmp_path / "images").left_out
    assert {why.split(",")[0]: n for why, n in left_out.items()} == {
        "files of suffix .svg": 2,
        "files of suffix (none)": 2,
    }


def test_empty_and_missing_folders_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="no image in it"):
        folder_dataset(tmp_path / "empty", tmp_path / "empty")
    with pytest.raises(DatasetError, match="no such folder"):
        folder_dataset(tmp_path / "absent", tmp_path / "empty")


@pytest.mark.parametrize(
    ("size", "hint"), [((4, 4), "4×4"), ((4, 6), "mask is 6×4, the image 4×6")]
)
def test_mask_of_another_size_is_refused(tmp_path, size, hint):
    save(tmp_path / "images/a.jpg")
    save(tmp_path / "masks/a.png", size=size)
    (sample,) = folder_dataset(tmp_path / "images", tmp_path / "masks").samples
    with pytest.raises(SampleError, match=hint):
        sample.mask(sample.read().label, 4, 6)


SQUARE = [[1.0, 1.0, 5.0, 1.0, 5.0, 4.0, 1.0, 4.0]]


def coco(tmp_path, annotations, images=2, categories=("person", "dog")):
    document = {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "height": 8, "width": 10} for i in range(images)
        ],
        "categories": [{"id": n + 1, "name": name} for n, name in enumerate(categories)],
        "annotations": annotations,
    }
    for number in range(images):
        save(tmp_path / f"images/{number}.jpg", size=(10, 8))
    (tmp_path / "coco.json").write_text(json.dumps(document))
    return tmp_path / "images", tmp_path / "coco.json"


def person(image_id, segmentation, **fields):
    return {"image_id": image_id, "category_id": 1, "segmentation": segmentation} | fields


def test_coco_takes_images_with_a_person_and_counts_the_rest(tmp_path):
    paths = coco(tmp_path, [person(0, SQUARE), person(1, SQUARE, category_id=2)])
    dataset = coco_dataset(*paths)
    assert [s.sample_id for s in dataset.samples] == ["0.jpg"]
    assert dataset.left_out["no person in it"] == 1
    assert len(coco_dataset(*paths, all_images=True).samples) == 2


def test_other_categories_do_not_become_people(tmp_path):
    paths = coco(tmp_path, [person(0, SQUARE), person(0, [[6, 5, 9, 5, 9, 7]], category_id=2)])
    mask = coco_dataset(*paths).samples[0].mask(b"", 8, 10)
    assert mask[2, 2] == 1
    assert not mask[5:, 6:].any()


def test_another_category_is_taken_on_request(tmp_path):
    paths = coco(tmp_path, [person(0, SQUARE), person(1, SQUARE, category_id="2")])
    assert [s.sample_id for s in coco_dataset(*paths, category="dog").samples] == ["1.jpg"]
    with pytest.raises(DatasetError, match="no category 'cat'; it has dog, person"):
        coco_dataset(*paths, category="cat")


def test_images_listed_twice_are_refused_and_strange_annotations_counted(tmp_path):
    annotations = [person(n, SQUARE) for n in range(4)] + [person(99, SQUARE)] * 3
    images, file = coco(tmp_path, annotations, images=4)
    document = json.loads(file.read_text())
    document["images"][1]["id"] = 0  # 0.jpg and 1.jpg have one id
    document["images"].append(document["images"][2] | {"id": 7})  # 2.jpg has two ids
    document["annotations"].append(person(7, SQUARE))
    file.write_text(json.dumps(document))
    dataset = coco_dataset(images, file)
    assert [sample.sample_id for sample in dataset.samples] == ["3.jpg"]
    assert dataset.refused.keys() == {"0.jpg", "1.jpg", "2.jpg"}
    assert [n for why, n in dataset.left_out.items() if "does not list" in why] == [3 + 1]


def test_image_with_only_a_crowd_is_left_out(tmp_path):
    crowd = {"size": [8, 10], "counts": [0, 80]}
    paths = coco(tmp_path, [person(0, SQUARE), person(1, crowd, iscrowd=1)])
    assert [s.sample_id for s in coco_dataset(*paths).samples] == ["0.jpg"]


def test_polygons_and_both_run_lengths_give_one_mask():
    reference = np.zeros((8, 10), np.uint8)
    reference[1:4, 1:5] = 1
    compressed = coco_mask.encode(np.asfortranarray(reference))
    counts = [9, 3, 5, 3, 5, 3, 5, 3, 44]
    for segmentation in (SQUARE, compressed, {"size": [8, 10], "counts": counts}):
        assert np.array_equal(rasterise([{"segmentation": segmentation}], 8, 10), reference)


def test_crowd_becomes_ignore_but_people_in_it_stay():
    everywhere = {"size": [8, 10], "counts": [0, 80]}
    mask = rasterise([{"segmentation": SQUARE}, {"segmentation": everywhere, "iscrowd": 1}], 8, 10)
    assert mask[2, 2] == 1
    assert mask[7, 9] == IGNORE


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1]", "not a JSON object"), ("{}", "images or annotations or categories"), ("{", "JSON")],
)
def test_files_that_are_not_coco_are_refused(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DatasetError, match=message):
        coco_dataset(tmp_path, tmp_path / "x.json")


def test_coco_without_person_category_or_files_is_refused(tmp_path):
    images, file = coco(tmp_path, [person(0, SQUARE)], categories=("cat", "dog"))
    with pytest.raises(DatasetError, match="no category 'person'; it has cat, dog"):
        coco_dataset(images, file)
    images, file = coco(tmp_path, [person(0, SQUARE)])
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(DatasetError, match="point --images"):
        coco_dataset(tmp_path / "elsewhere", file)


def test_split_depends_on_the_id_alone_and_keeps_the_share():
    ids = [f"{n}.jpg" for n in range(2000)]
    first = [split_of(name, 0.2, 0) for name in ids]
    assert first == [split_of(name, 0.2, 0) for name in ids]
    assert first != [split_of(name, 0.2, 1) for name in ids]
    assert 0.17 < first.count("val") / len(ids) < 0.23
    assert {split_of(name, 0.0, 0) for name in ids} == {"train"}
    # a larger share only moves images into val, never out
    larger = [split_of(name, 0.4, 0) for name in ids]
    assert all(new == "val" for old, new in zip(first, larger, strict=True) if old == "val")


def bad_fields():
    yield "annotations", "image_id", None
    yield "annotations", "category_id", {}
    yield "categories", "name", None


@pytest.mark.parametrize(("kind", "name", "value"), list(bad_fields()))
def test_odd_entries_of_a_coco_file_are_refused_by_place(tmp_path, kind, name, value):
    images, file = coco(tmp_path, [person(0, SQUARE)])
    document = json.loads(file.read_text())
    document[kind][0][name] = value
    file.write_text(json.dumps(document))
    with pytest.raises(DatasetError, match=rf"{kind}\[0\].*{name}"):
        coco_dataset(images, file)


@pytest.mark.parametrize("kind", ["annotations", "categories"])
def test_entry_that_is_no_object_is_refused(tmp_path, kind):
    images, file = coco(tmp_path, [person(0, SQUARE)])
    document = json.loads(file.read_text())
    document[kind][0] = 3
    file.write_text(json.dumps(document))
    with pytest.raises(DatasetError, match=rf"{kind}\[0\]"):
        coco_dataset(images, file)


@pytest.mark.parametrize(
    "segmentation",
    [
        None,
        [],
        [[1.0, 1, 5, 1, 5]],
        [[1.0, 1]],
        [[float("nan"), 1, 5, 1, 5, 4]],
        [[1e9, 1, -1e9, 1, 5, 4]],
        [["a", "b", "c", "d", "e", "f"]],
        {"size": [8, 10]},
        {"size": [10, 8], "counts": [0, 80]},
        {"size": [8, 10], "counts": [9, 3]},
        {"size": [8, 10], "counts": [0, 81]},
        {"size": [8, 10], "counts": [100, -20]},
        {"size": [10**6, 10**6], "counts": [0, 10**12]},
        {"size": [10**6, 10**6], "counts": "0"},
        {"size": [8, 10], "counts": ""},
        {"size": [8, 10], "counts": "zzzzzz"},
    ],
)
def test_odd_segmentations_are_refused_neither_crashing_nor_guessed(segmentation):
    with pytest.raises(SampleError, match="segmentation of its COCO annotation .* cannot be used"):
        rasterise([{"segmentation": segmentation}], 8, 10)


def test_ids_as_strings_and_crowd_as_text_mean_the_same(tmp_path):
    everywhere = {"size": [8, 10], "counts": [0, 80]}
    annotations = [person("0", SQUARE, iscrowd="0"), person("1", everywhere, iscrowd="1")]
    assert [s.sample_id for s in coco_dataset(*coco(tmp_path, annotations)).samples] == ["0.jpg"]


def test_file_name_that_is_not_utf8_is_refused(tmp_path):
    coco(tmp_path, [person(0, SQUARE)])
    (tmp_path / "images/0.jpg").rename(tmp_path / "images" / os.fsdecode(b"\xff.jpg"))
    dataset = unlabelled_dataset(tmp_path / "images")
    assert list(dataset.refused) == ["\\xff.jpg"]


def test_mask_of_a_size_that_coco_misstates_is_refused_before_it_is_drawn(tmp_path):
    images, file = coco(tmp_path, [person(0, SQUARE)])
    document = json.loads(file.read_text())
    document["images"][0] |= {"height": 99_999, "width": 99_999}  # 10 GB as a mask
    file.write_text(json.dumps(document))
    with pytest.raises(SampleError, match="mask is 99999×99999, the image 8×10"):
        coco_dataset(images, file).samples[0].mask(b"", 8, 10)
