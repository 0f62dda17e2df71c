"""Real models and photos, where they lie beside the project; skipped elsewhere."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pycocotools.coco import COCO

import kdcache
from kdcache.cache.info import describe
from kdcache.config import ExtractConfig, TrainConfig
from kdcache.deploy.evaluate import evaluate
from kdcache.errors import ModelError
from kdcache.imaging import IGNORE, decode_image
from kdcache.precompute.dataset import coco_dataset
from kdcache.precompute.extract import extract
from kdcache.precompute.yolo import Yolo
from kdcache.train.loop import train
from kdcache.train.student import TapPoint, build_student

TAP_P3 = "/model.14/Concat_output_0"


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_masks_equal_pycocotools_and_crowds_are_ignored(realdata, split):
    file = realdata / f"coco_tiny/annotations/instances_{split}.json"
    dataset = coco_dataset(realdata / f"coco_tiny/{split}", file, all_images=True)
    coco = COCO(file)
    people = coco.getCatIds(["person"])
    ids = {image["file_name"]: image["id"] for image in coco.dataset["images"]}
    assert len(dataset.samples) == 80
    crowds = 0
    for sample in dataset.samples:
        source = sample.read()
        mask = sample.mask(source.label, *decode_image(source.image).shape[:2])
        expected = np.zeros(mask.shape, bool)
        for annotation in coco.loadAnns(coco.getAnnIds(ids[sample.sample_id], people, iscrowd=0)):
            expected |= coco.annToMask(annotation).astype(bool)
        assert np.array_equal(mask == 1, expected)
        crowd = np.zeros(mask.shape, bool)
        for annotation in coco.loadAnns(coco.getAnnIds(ids[sample.sample_id], people, iscrowd=1)):
            crowd |= coco.annToMask(annotation).astype(bool)
            crowds += 1
        assert np.array_equal(mask == IGNORE, crowd & ~expected)
    assert crowds > 0


def test_photos_with_people_are_40_and_49(realdata):
    for split, count in (("train2017", 40), ("val2017", 49)):
        dataset = coco_dataset(
            realdata / f"coco_tiny/{split}",
            realdata / f"coco_tiny/annotations/instances_{split}.json",
        )
        assert len(dataset.samples) == count
        assert dataset.left_out["no person in it"] == 80 - count
        assert sum(dataset.left_out.values()) == 80 - count


def test_pipeline_on_real_photos_and_models(realdata, tmp_path):
    """A real detector, teacher and encoder at a small size: extract, train, evaluate."""
    config = ExtractConfig(
        yolo_onnx_path=realdata / "yolov9n_neck.onnx",
        yolo_target_layer=TAP_P3,
        teacher_checkpoint=realdata / "teacher_isnet.onnx",
        size=96,
        val_fraction=0.4,
        shard_rows=4,
    )
    annotations = realdata / "coco_tiny/annotations/instances_val2017.json"
    dataset = coco_dataset(realdata / "coco_tiny/val2017", annotations)
    extract(config, dataset, tmp_path / "c", device="cpu", limit=8)
    cache = kdcache.open(tmp_path / "c")
    assert cache[0].features[TAP_P3].shape == (80, 12, 12)
    assert describe(cache)["features_ratio_vs_float32"][TAP_P3] > 4
    settings = TrainConfig(
        student_encoder="tu-tf_efficientnet_lite0",
        encoder_weights=str(realdata / "tf_efficientnet_lite0_imagenet.safetensors"),
        epochs=2,
    )
    train(tmp_path / "c", tmp_path / "run", settings, device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[1]["train_total"] < lines[0]["train_total"]
    assert 0 < evaluate(tmp_path / "run", cache, device="cpu").scores["student_miou"] < 1


def test_unfriendly_detector_is_tapped_inside_and_its_odd_grid_refused(realdata):
    """Fixed batch, BGR 0–255, a tap that is no output, 60×80 for a square input."""
    with pytest.raises(ModelError, match="80×60×80 for a 640×640"):
        Yolo(
            realdata / "yolov9_n_wholebody25_post_0100_1x3x480x640.onnx",
            taps=[TAP_P3],
            expects="bgr255",
            device="cpu",
            size_px=640,
        )


def test_real_encoder_weights_fit_the_student(realdata):
    student = build_student(
        "tu-tf_efficientnet_lite0",
        str(realdata / "tf_efficientnet_lite0_imagenet.safetensors"),
        [TapPoint("encoder", 8)],
    )
    assert student.tap_channels == (40,)
