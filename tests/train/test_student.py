"""Taps, trained levels of the encoder, the projection's target."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kdcache.cache.layout import TapSpec, whole
from kdcache.errors import RunError
from kdcache.train.projection import Projection
from kdcache.train.student import STRIDES, Student, TapPoint, tap_points

ENCODERS = ["timm-efficientnet-b0", "tu-tf_efficientnet_lite0", "resnet18"]
DECODER_CHANNELS = {16: 256, 8: 128, 4: 64, 2: 32, 1: 16}


def tap(stride: float, name: str = "tap", size: int = 64, width: int | None = None) -> TapSpec:
    side = round(size / stride)
    shape = (6, side, width or side)
    return TapSpec(name=name, precision="float32", shape=shape, groups=whole(6))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_stride_has_a_map_of_that_grid_in_both_parts(encoder):
    points = [TapPoint(part, stride) for part, strides in STRIDES.items() for stride in strides]
    assert [point.stride for point in points] == [2, 4, 8, 16, 32, 1, 2, 4, 8, 16]
    student = Student(encoder, points)
    logits, features = student(torch.rand(2, 3, 64, 64))
    assert logits.shape == (2, 1, 64, 64)
    for point, channels, feature in zip(points, student.tap_channels, features, strict=True):
        assert feature.shape == (2, channels, 64 // point.stride, 64 // point.stride), point
        if point.part == "decoder":
            assert channels == DECODER_CHANNELS[point.stride]


def test_maps_are_those_of_the_encoder_and_behind_the_decoders_blocks():
    """In the order of the points, one asked for twice too; and the logits are those without."""
    places = (("decoder", 8), ("encoder", 8), ("decoder", 1), ("encoder", 32), ("decoder", 8))
    points = [TapPoint(*place) for place in places]
    student = Student("timm-efficientnet-b0", points).eval()
    behind = {}
    for number in (1, 4):
        student.unet.decoder.blocks[number].register_forward_hook(
            lambda block, given, made, number=number: behind.update({number: made})
        )
    pixels = torch.rand(1, 3, 64, 64)
    encoded = student.unet.encoder(pixels)
    expected = [behind, 1], [encoded, 3], [behind, 4], [encoded, 5], [behind, 1]
    for given in (None, encoded):
        found = student(pixels, given).features
        for feature, (maps, key) in zip(found, expected, strict=True):
            assert torch.equal(feature, maps[key])
    plain = Student("timm-efficientnet-b0").eval()
    plain.unet.load_state_dict(student.unet.state_dict())
    assert torch.equal(plain(pixels).logits, student(pixels).logits)
    assert plain(pixels).features == ()


def test_a_tap_is_found_at_its_own_stride():
    taps = [tap(8, "p3"), tap(16, "p4"), tap(32, "p5")]
    assert tap_points(taps, 64, "encoder") == tuple(TapPoint("encoder", s) for s in (8, 16, 32))
    parts = ("decoder", "decoder", "encoder")
    expected = zip(parts, (8, 16, 32), strict=True)
    assert tap_points(taps, 64, parts) == tuple(TapPoint(*point) for point in expected)
    assert tap_points([tap(8, size=96)], 96, ("decoder",)) == (TapPoint("decoder", 8),)


@pytest.mark.parametrize(
    ("spec", "part", "message"),
    [
        (tap(1), "encoder", "strides 2, 4, 8, 16, 32: set student_tap of this tap to decoder"),
        (tap(32), "decoder", "strides 1, 2, 4, 8, 16: set student_tap of this tap to encoder"),
        (tap(64), "encoder", "tap tap is 6×1×1 .* stride 64 of 64 px.*32: leave it out"),
        (
            tap(64 / 10),
            "decoder",
            r"stride 6\.4 of .*feature_taps=…, or train with --feature-weight 0",
        ),
        (tap(8, width=4), "encoder", "6×8×4 in this cache.*square maps"),
        (tap(8), ("encoder", "decoder"), r"names 2 parts, .* of 1 taps \(tap\): give one part for"),
    ],
    ids=["stride 1", "stride 32", "stride 64", "no power of two", "not square", "two parts"],
)
def test_a_grid_that_the_student_does_not_have_is_refused(spec, part, message):
    with pytest.raises(RunError, match=message):
        tap_points([spec], 64, part)


@pytest.mark.filterwarnings("ignore")
def test_an_encoder_without_a_feature_at_stride_2_says_which_it_has():
    student = Student("mit_b0", [TapPoint("encoder", 4), TapPoint("encoder", 2)])
    with pytest.raises(RunError, match="no feature at stride 2, only at 4, 8, 16, 32: set student"):
        tuple(student.tap_channels)


def first_use(encoder: nn.Module) -> dict[str, int]:
    """Parameter to the first feature that it changes; those that change none are left out."""
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        plain, found = encoder(pixels), {}
        for name, parameter in encoder.named_parameters():
            kept = parameter.clone()
            parameter.add_(1.0)
            changed = [not torch.equal(a, b) for a, b in zip(plain, encoder(pixels), strict=True)]
            parameter.copy_(kept)
            if any(changed):
                found[name] = changed.index(True)
    return found


@pytest.mark.parametrize("encoder", ["timm-efficientnet-b0", "mobilenet_v2"])
def test_trained_levels_are_the_parameters_that_change_the_last_features_first(encoder):
    use = first_use(Student(encoder).unet.encoder.eval())
    assert set(use.values()) == {1, 2, 3, 4, 5}
    for levels in (0, 1, 3, 5):
        student = Student(encoder, trained_levels=levels)
        trained = {n for n, p in student.unet.encoder.named_parameters() if p.requires_grad}
        assert trained == {name for name, level in use.items() if level > 5 - levels}


@pytest.mark.parametrize("levels", [0, 2, 5])
def test_batch_norm_learns_where_parameters_are_trained_and_nowhere_else(levels):
    student = Student("timm-efficientnet-b0", trained_levels=levels)
    before = {k: v.clone() for k, v in student.unet.encoder.state_dict().items()}
    student.train()
    student(torch.rand(2, 3, 64, 64))
    trained = {
        n.rsplit(".", 1)[0] for n, p in student.unet.encoder.named_parameters() if p.requires_grad
    }
    for name, value in student.unet.encoder.state_dict().items():
        if name.endswith("running_mean"):
            moved = not torch.equal(before[name], value)
            assert moved == (name.removesuffix(".running_mean") in trained), name
    student.eval()
    assert not any(module.training for module in student.modules())


def test_gradient_reaches_trained_levels_only_through_a_graph():
    student = Student("timm-efficientnet-b0", trained_levels=1)
    student(torch.rand(1, 3, 64, 64)).logits.mean().backward()
    gradients = {n: p.grad for n, p in student.unet.encoder.named_parameters()}
    assert all(
        (g is not None) == n.startswith(("blocks.5", "blocks.6")) for n, g in gradients.items()
    )
    with torch.no_grad():
        assert not student(torch.rand(1, 3, 64, 64)).logits.requires_grad


def test_standardised_target_has_mean_0_and_deviation_1_a_channel():
    rng = np.random.default_rng(0)
    features = [rng.normal([[[5.0]], [[-3.0]], [[2.0]]], [[[2.0]], [[0.01]], [[0.0]]], (3, 8, 8))
                .astype(np.float32) for _ in range(4)]  # fmt: skip
    projection = Projection(4, 8, 3)
    target = torch.from_numpy(np.stack(features))
    assert torch.equal(projection.standardised(target), target)  # as it is, unless asked for
    projection.standardise(features)
    standard = projection.standardised(target)
    assert torch.allclose(standard.mean((0, 2, 3)), torch.zeros(3), atol=1e-3)
    assert torch.allclose(standard.std((0, 2, 3)), torch.tensor([1.0, 1.0, 0.0]), atol=1e-2)
    again = Projection(4, 8, 3)
    again.load_state_dict(projection.state_dict())
    assert torch.equal(again.standardised(target), standard)


def test_projection_is_the_documented_one():
    kinds = [type(layer) for layer in Projection(4, 8, 3)]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d]
