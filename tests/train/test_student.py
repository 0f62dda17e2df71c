"""Taps, trained levels of the encoder, the projection's target."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kdcache.train.student import Projection, Student


def grid(student: Student) -> torch.Tensor:
    return student(torch.rand(2, 3, 64, 64)).feature


@pytest.mark.parametrize(
    "encoder", ["timm-efficientnet-b0", "tu-tf_efficientnet_lite0", "resnet18"]
)
@pytest.mark.parametrize(("tap", "channels"), [("encoder", 40), ("decoder", 128)])
def test_both_taps_are_at_stride_8(encoder, tap, channels):
    student = Student(encoder, tap)
    channels = 128 if encoder == "resnet18" else channels
    assert student.tap_channels == channels
    assert grid(student).shape == (2, channels, 8, 8)


def test_decoder_tap_is_the_output_of_the_second_block():
    student = Student("timm-efficientnet-b0", "decoder").eval()
    seen = []
    student.unet.decoder.blocks[1].register_forward_hook(lambda *args: seen.append(args[2]))
    pixels = torch.rand(1, 3, 64, 64)
    assert torch.equal(student(pixels).feature, seen[0])
    plain = Student("timm-efficientnet-b0").eval()
    plain.unet.load_state_dict(student.unet.state_dict())
    assert torch.equal(plain(pixels).logits, student(pixels).logits)


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
