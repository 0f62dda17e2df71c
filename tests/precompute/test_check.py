"""The first look: planted faults of the models' inputs are named, sound models are left alone."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from conftest import SIZE, Standins
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from kdcache.cache import need
from kdcache.errors import CacheError, ModelError
from kdcache.imaging import IGNORE
from kdcache.precompute.check import Check, _better, first_look
from kdcache.precompute.dataset import Dataset, folder_dataset
from kdcache.precompute.extract import extract
from kdcache.precompute.job import open_job
from kdcache.precompute.sources import Prepared, Tally, prepare
from kdcache.standins import TEACHER_BIAS, TEACHER_RGB_WEIGHT


def with_input(path, target, *nodes, constants=()):
    """The model with nodes before it that make its input of another; the last one gives `seen`."""
    model = onnx.load(path)
    for node in model.graph.node:  # a name of its own, where this was done before
        node.input[:] = [f"{i}_" if i in ("seen", "moved") else i for i in node.input]
        node.output[:] = [f"{o}_" if o in ("seen", "moved") else o for o in node.output]
    name = model.graph.input[0].name
    for node in model.graph.node:
        node.input[:] = ["seen" if i == name else i for i in node.input]
    kept = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *kept])
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), key) for key, value in constants
    )
    onnx.save(model, target)
    return target


def swapped(path, target):
    """The model of somebody who trained on BGR."""
    name = onnx.load(path).graph.input[0].name
    gather = helper.make_node("Gather", [name, "order"], ["seen"], axis=1)
    return with_input(path, target, gather, constants=[("order", [2, 1, 0])])


def scaled(path, target, factor, offset=0.0):
    """The model of somebody who trained on pixels of another scale: it undoes `x · factor + offset`."""
    name = onnx.load(path).graph.input[0].name
    shape = (1, 3, 1, 1)
    constants = [
        ("offset", np.broadcast_to(np.float32(offset), shape).copy()),
        ("factor", np.broadcast_to(np.float32(factor), shape).copy()),
    ]
    nodes = [
        helper.make_node("Sub", [name, "offset"], ["moved"]),
        helper.make_node("Div", ["moved", "factor"], ["seen"]),
    ]
    return with_input(path, target, *nodes, constants=constants)


def rows(standins: Standins, count: int = 6) -> list[Prepared]:
    dataset = folder_dataset(standins.images, standins.masks)
    config = standins.config(val_fraction=0.0)
    job = open_job(config, dataset, standins.folder / "none", split="train", device="cpu",
                   limit=count, tally=Tally(False))  # fmt: skip
    return list(prepare(job.todo, job.how, 1, Tally(False)))


def looked(standins: Standins, tmp_path, photos=None, **changes) -> Check:
    dataset = folder_dataset(standins.images, standins.masks)
    config = standins.config(val_fraction=0.0, **changes)
    job = open_job(config, dataset, tmp_path / "c", split="train", device="cpu", limit=6,
                   tally=Tally(False))  # fmt: skip
    photos = rows(standins) if photos is None else photos
    return first_look(photos, job.yolo, job.teacher, tmp_path / "p.png")[0]


@pytest.fixture
def detector(standins, tmp_path):
    """A detector that knows people by their colour, and only in the range it was made for."""
    path = tmp_path / "knows.onnx"
    names = ["images", "features"]
    shapes = (["N", 3, SIZE, SIZE], ["N", 2, SIZE // 8, SIZE // 8])
    tensors = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in zip(names, shapes, strict=True)
    ]
    scaled_up = np.float32(4 * np.array([TEACHER_RGB_WEIGHT, np.zeros(3)]).reshape(2, 3, 1, 1))
    weights = {"w": scaled_up, "b": np.float32([4 * TEACHER_BIAS, 0])}
    nodes = [
        helper.make_node("Conv", ["images", "w", "b"], ["logit"]),
        helper.make_node("Sigmoid", ["logit"], ["soft"]),
        helper.make_node(
            "AveragePool", ["soft"], ["features"], kernel_shape=[8, 8], strides=[8, 8]
        ),
    ]
    constants = [numpy_helper.from_array(value, key) for key, value in weights.items()]
    graph = helper.make_graph(nodes, "knows", tensors[:1], tensors[1:], constants)
    onnx.save(
        helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)]), path
    )
    return path


def test_sound_models_are_left_alone(standins, tmp_path, detector):
    found = looked(standins, tmp_path, yolo_onnx_path=detector, yolo_target_layer="features")
    assert (found.warnings, found.notes) == ([], [])
    assert found.teacher_miou > 0.8
    assert max(found.detector, key=found.detector.get) == "rgb01"
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.size[0] == 3 * 242


STD = np.array([0.229, 0.224, 0.225], np.float32).reshape(1, 3, 1, 1)
MEAN = np.array([0.485, 0.456, 0.406], np.float32).reshape(1, 3, 1, 1)


@pytest.mark.parametrize(
    ("plant", "name"),
    [
        (swapped, "ImageNet-normalised BGR"),
        # the stand-in knows opponent colours: of all scales only one this far off shows
        (lambda a, b: scaled(a, b, 255 * STD, 255 * (MEAN + 2 * STD)), "RGB in 0 to 255"),
    ],
)
def test_teacher_of_another_input_is_named(standins, tmp_path, plant, name):
    found = looked(
        standins, tmp_path, teacher_checkpoint=plant(standins.teacher, tmp_path / "t.onnx")
    )
    (text,) = (w for w in found.warnings if "than on the ImageNet" in w)
    assert f"better on {name}" in text


@pytest.mark.parametrize("form", ["bgr01", "rgb255", "bgr255"])
def test_detector_of_another_input_is_named(standins, tmp_path, detector, form):
    path = swapped(detector, tmp_path / "1.onnx") if form.startswith("bgr") else detector
    path = scaled(path, tmp_path / "2.onnx", 255) if form.endswith("255") else path
    taps = {"yolo_onnx_path": path, "yolo_target_layer": "features"}
    (text,) = looked(standins, tmp_path, **taps).warnings
    assert f"clearly better with --yolo-input {form}" in text
    assert looked(standins, tmp_path, **taps, yolo_input=form).warnings == []


def test_a_difference_that_may_be_chance_is_a_note():
    scores = {"a": np.array([0.5, 0.6, 0.7, 0.6]), "b": np.array([0.6, 0.4, 0.9, 0.6])}
    assert _better(scores, "a") == ("b", False, "better, by what may be chance on 4 photos,")
    assert _better(scores, "b") == ("", False, "")
    assert _better({}, "a") == ("", False, "")


def test_two_photos_tell_a_scale_but_no_shade():
    """They differed by 0.017 on two real photos, both in the same direction, by chance."""
    near = {"a": np.array([0.60, 0.70]), "b": np.array([0.62, 0.72])}
    assert _better(near, "a")[:2] == ("", False)
    far = {"a": np.array([0.2, 0.4]), "b": np.array([0.7, 0.6])}
    assert _better(far, "a") == ("b", True, "clearly better")


def test_bad_teacher_is_said_and_unlabelled_photos_are_no_reason(standins, tmp_path):
    photos = rows(standins)
    wrong = [row._replace(mask=(1 - row.mask.astype(np.uint8))) for row in photos]
    assert "with its mask inverted" in looked(standins, tmp_path, wrong).warnings[0]
    moved = [row._replace(mask=np.roll(row.mask, SIZE // 2, axis=0)) for row in photos]
    assert "is it a teacher of this task" in looked(standins, tmp_path, moved).warnings[0]
    empty = [row._replace(mask=np.zeros_like(row.mask)) for row in photos]
    assert "has a person in its mask" in looked(standins, tmp_path, empty).warnings[0]
    blank = [row._replace(mask=np.full_like(row.mask, IGNORE)) for row in photos]
    found = looked(standins, tmp_path, blank)
    assert (found.teacher_miou, found.teacher) == (None, {})
    assert found.detector


def test_probabilities_in_disguise_are_refused(standins, tmp_path):
    """A graph whose end does not tell."""
    model = onnx.load(standins.teacher)
    nodes = [
        helper.make_node("Sigmoid", ["logits"], ["p"]),
        helper.make_node("Max", ["p", "p"], ["end"]),
    ]
    model.graph.node.extend(nodes)
    model.graph.output[0].name = "end"
    onnx.save(model, tmp_path / "t.onnx")
    with pytest.raises(ModelError, match="these are probabilities"):
        standins.extract(tmp_path / "c", teacher_checkpoint=tmp_path / "t.onnx")
    assert not (tmp_path / "c").exists()


def test_extraction_looks_before_it_writes(standins, tmp_path, caplog, monkeypatch):
    path = swapped(standins.teacher, tmp_path / "t.onnx")
    monkeypatch.setattr(need, "free", lambda out: (10_000, None))
    with pytest.raises(CacheError, match="10 rows will take about .* has 10.0 kB left"):
        standins.extract(tmp_path / "c", teacher_checkpoint=path)
    assert "clearly better on ImageNet-normalised BGR" in caplog.text
    assert not (tmp_path / "c").exists()
    monkeypatch.setattr(need, "free", lambda out: (10**12, 3))
    with pytest.raises(CacheError, match="has room for 3 more: --set shard_rows=10"):
        standins.extract(tmp_path / "c")


def test_source_files_are_read_once(standins, tmp_path, monkeypatch):
    """The photos that are looked at first are rows afterwards, without another read."""
    dataset = folder_dataset(standins.images, standins.masks)
    reads: list[str] = []
    sample = type(dataset.samples[0])
    read = sample.read
    monkeypatch.setattr(sample, "read", lambda self: reads.append(self.sample_id) or read(self))
    report = extract(standins.config(), dataset, tmp_path / "c", device="cpu")
    assert report.rows_total == len(reads) == len(set(reads)) == len(dataset.samples)
    assert isinstance(dataset, Dataset)
