"""Image, mask, logits and features of a view show the same thing at the same place.

A photo whose red is its x coordinate goes through a teacher and a detector that are known functions of
the pixels; the person is the right half of the photo.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from kdcache.cache.reader import Cache
from kdcache.config import ExtractConfig
from kdcache.imaging import IMAGENET_MEAN, IMAGENET_STD, PADDING, decode_image, decode_mask
from kdcache.precompute.dataset import folder_dataset
from kdcache.precompute.extract import extract
from kdcache.precompute.policy import Policy
from kdcache.precompute.views import apply

SIZE, CELL = 128, 8
HEIGHT, WIDTH = 90, 256  # a step of red a pixel
TRANSFORMS, GEOMETRIC = tuple(Policy.model_fields), {"flip", "window"}


@pytest.fixture(scope="module")
def ramp(tmp_path_factory):
    """Photo, mask and both models."""
    folder = tmp_path_factory.mktemp("ramp")
    for name in ("images", "masks"):
        (folder / name).mkdir()
    photo = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    photo[..., 0], photo[..., 1] = np.arange(WIDTH), np.arange(HEIGHT)[:, None] * 2
    Image.fromarray(photo).save(folder / "images/ramp.png")
    mask = np.broadcast_to(np.arange(WIDTH) >= WIDTH // 2, (HEIGHT, WIDTH))
    Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks/ramp.png")
    _save_teacher(folder / "teacher.onnx")
    pool = helper.make_node(
        "AveragePool", ["x"], ["pooled"], kernel_shape=[CELL] * 2, strides=[CELL] * 2
    )
    _save(folder / "detector.onnx", [pool], "pooled", 3, [])
    return folder


def _save_teacher(path):
    """One logit a pixel, 20·(red − ½) of red in [0, 1]."""
    kernel = np.zeros((1, 3, 1, 1), np.float32)
    kernel[0, 0] = 20 * IMAGENET_STD[0]
    bias = np.array([20 * (IMAGENET_MEAN[0] - 0.5)], np.float32)
    weights = [numpy_helper.from_array(kernel, "kernel"), numpy_helper.from_array(bias, "bias")]
    _save(
        path, [helper.make_node("Conv", ["x", "kernel", "bias"], ["logits"])], "logits", 1, weights
    )


def _save(path, nodes, output, channels, weights):
    tensor = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [tensor("x", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [tensor(output, TensorProto.FLOAT, ["N", channels, "h", "w"])],
        weights,
    )
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)


def views_of(folder, out, policy, resize):
    """The rows of views 1 to 6 of the photo."""
    (out.parent / "policy.toml").write_text(policy)
    config = ExtractConfig(
        yolo_onnx_path=folder / "detector.onnx",
        yolo_target_layer="pooled",
        teacher_checkpoint=folder / "teacher.onnx",
        size=SIZE,
        resize=resize,
        precision="float32",
        views=7,
        augment=str(out.parent / "policy.toml"),
    )
    extract(config, folder_dataset(folder / "images", folder / "masks"), out, device="cpu")
    return [row for row in Cache(out) if row.view]


@pytest.mark.parametrize("resize", ["stretch", "letterbox"])
@pytest.mark.parametrize("transform", [*TRANSFORMS, "all"])
def test_all_parts_of_a_view_agree(ramp, tmp_path, transform, resize):
    used = set(TRANSFORMS) if transform == "all" else {transform, "flip"}
    policy = "".join(f"[{name}]\nprobability = {0.5 if name == 'flip' else 1.0}\n" for name in used)
    rows = views_of(ramp, tmp_path / "c", policy, resize)
    assert {row.details["flipped"] for row in rows} == {True, False}
    photo, mask = (
        decode((ramp / name).read_bytes())
        for name, decode in (("images/ramp.png", decode_image), ("masks/ramp.png", decode_mask))
    )
    for row in rows:
        assert set(row.details["drawn"]) | {"flip"} == used
        # logits and features are of the pixels that are stored
        red = row.image[..., 0] / 255
        assert np.allclose(row.teacher_logits, 20 * (red - 0.5), atol=1e-4)
        blocks = row.image.reshape(SIZE // CELL, CELL, SIZE // CELL, CELL, 3).mean((1, 3)) / 255
        assert np.allclose(row.features["pooled"], blocks.transpose(2, 0, 1), atol=1e-5)
        # before colours change, red says where the mask is
        moved = {name: of for name, of in row.details["drawn"].items() if name in GEOMETRIC}
        view = apply(moved, photo, mask, SIZE, resize)
        assert np.array_equal(row.mask, view.mask)
        inside, person = row.mask != PADDING, row.mask == 1
        before = view.image[..., 0] / 255
        assert ((before > 0.5) == person)[inside].mean() > 0.97
        # and then every pixel is still at its place: mirrored or moved it is less alike
        own = _alike(red, before, inside)
        assert own > (0.99 if used <= GEOMETRIC else 0.3 if transform != "all" else 0)
        assert own > _alike(red[:, ::-1], before, inside & inside[:, ::-1])


def _alike(a, b, where):
    return np.corrcoef(a[where], b[where])[0, 1]
