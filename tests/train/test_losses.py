"""Losses against independent references in float64, value and gradient."""

from __future__ import annotations

import pytest
import segmentation_models_pytorch as smp
import torch
from torch.distributions import Bernoulli, kl_divergence

from kdcache.imaging import IGNORE, PADDING
from kdcache.train import losses


def logits(seed, scale=4.0, shape=(3, 1, 8, 8)):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mask_of(seed, shape=(3, 1, 8, 8)):
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).byte()


def check(ours, reference, student, wide=True):
    """Equal value and equal gradient; the reference is computed in float64.

    For the given values, for `wide` ones of up to ±60, and for both as autocast gives them.
    """
    for values in (student, (20 * student).clamp(-60, 60))[: 1 + wide]:
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2**-8)):
            ours_leaf = values.detach().to(dtype).clone().requires_grad_()
            double = ours_leaf.detach().double().requires_grad_()
            value, expected = ours(ours_leaf), reference(double)
            assert value.dtype == torch.float32
            assert torch.allclose(value.double(), expected, rtol=1e-5, atol=1e-7)
            value.backward()
            expected.backward()
            assert torch.allclose(ours_leaf.grad.double(), double.grad, rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("scale", ["T", "T2", "1"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kl_equals_torch_distributions(scale, temperature):
    teacher, mask = logits(1), mask_of(2)
    factor = {"T": temperature, "T2": temperature**2, "1": 1}[scale]

    def reference(z):
        soft_teacher = Bernoulli(logits=teacher.double() / temperature)
        return factor * kl_divergence(soft_teacher, Bernoulli(logits=z / temperature)).mean()

    check(
        lambda z: losses.kl(z, teacher, mask, temperature=temperature, scale=scale),
        reference,
        logits(0),
        wide=False,
    )


@pytest.mark.parametrize("scale", ["T", "T2", "1"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kl_equals_cross_entropy_minus_entropy_for_logits_up_to_60(temperature, scale):
    """torch.distributions gives inf here: its probabilities saturate."""
    teacher, mask = logits(1, 20).clamp(-60, 60), mask_of(2)
    softened = teacher.double() / temperature
    p = torch.sigmoid(softened)
    factor = {"T": temperature, "T2": temperature**2, "1": 1}[scale]
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    check(
        lambda z: losses.kl(z, teacher, mask, temperature=temperature, scale=scale),
        lambda z: factor * (entropy(z / temperature, p) - entropy(softened, p)),
        logits(0),
    )


def test_kl_of_equal_logits_is_zero_and_stays_finite_at_the_extremes():
    z = torch.tensor([-60.0, -5, 0, 5, 60]).view(1, 1, 1, 5).requires_grad_()
    mask = torch.zeros(1, 1, 1, 5, dtype=torch.uint8)
    same = losses.kl(z, z.detach(), mask, temperature=1.0, scale="T").detach()
    assert float(same) == pytest.approx(0, abs=1e-7)
    opposite = losses.kl(z, -z.detach(), mask, temperature=1.0, scale="T")
    opposite.backward()
    assert torch.isfinite(opposite)
    assert torch.isfinite(z.grad).all()
    assert z.grad[..., 0].abs() > 0.1  # the wrongest pixel keeps its gradient


def test_bce_equals_torch():
    mask = mask_of(3)
    check(
        lambda z: losses.bce(z, mask),
        lambda z: torch.nn.functional.binary_cross_entropy_with_logits(z, mask.double()),
        logits(0),
    )


def test_dice_equals_smp_image_by_image():
    mask = mask_of(4)
    # smp smooths as (I + s)/(C/2 + s), so its 0.5 is our 1
    dice = smp.losses.DiceLoss("binary", smooth=0.5, eps=0.0)
    check(
        lambda z: losses.dice(z, mask),
        lambda z: torch.stack(
            [dice(z[n : n + 1], mask[n : n + 1].double()) for n in range(3)]
        ).mean(),
        logits(0),
    )


def test_mse_equals_torch():
    teacher, mask = logits(1), mask_of(2)
    reference = torch.nn.functional.mse_loss
    check(
        lambda z: losses.mse(z, teacher, mask), lambda z: reference(z, teacher.double()), logits(0)
    )


def test_feature_losses_equal_torch():
    target = logits(1, shape=(2, 5, 4, 4))
    start = logits(0, shape=(2, 5, 4, 4))
    everywhere = torch.full((2, 1, 8, 8), IGNORE, dtype=torch.uint8)
    check(
        lambda f: losses.feature_mse(f, target, everywhere),
        lambda f: ((f - target.double()) ** 2).mean(),
        start,
    )

    def cosine(f):
        t = target.double()
        return 1 - ((f * t).sum(1) / (f.norm(dim=1) * t.norm(dim=1))).mean()

    check(lambda f: losses.feature_cosine(f, target, everywhere), cosine, start)


@pytest.mark.parametrize("loss", [losses.feature_mse, losses.feature_cosine])
def test_padding_is_out_of_the_feature_losses_too(loss):
    """Grid cells of padding count for nothing, cells that are half padding for a half."""
    projected, target = (
        logits(0, shape=(2, 5, 4, 4)).requires_grad_(),
        logits(1, shape=(2, 5, 4, 4)),
    )
    mask = torch.zeros((2, 1, 8, 8), dtype=torch.uint8)
    mask[:, :, :2], mask[:, :, 2:3] = PADDING, PADDING
    value = loss(projected, target, mask)
    value.backward()
    assert not projected.grad[:, :, 0].any()
    assert projected.grad[:, :, 1].any()
    plain = torch.zeros_like(mask)
    ours = projected.detach()
    half, rest = ((ours[:, :, rows], target[:, :, rows]) for rows in ([1], [2, 3]))
    rows = [loss(*half, plain[:, :, :2]), loss(*rest, plain[:, :, :4])]
    expected = (0.5 * rows[0] + 2 * rows[1]) / 2.5
    assert value.item() == pytest.approx(float(expected), rel=1e-5)
    assert float(loss(ours, target, torch.full_like(mask, PADDING))) == 0


def all_losses(student, teacher, mask):
    return {
        "kl": losses.kl(student, teacher, mask, temperature=3.0, scale="T"),
        "mse": losses.mse(student, teacher, mask),
        "bce": losses.bce(student, mask),
        "dice": losses.dice(student, mask),
    }


def test_padding_changes_no_loss_and_gets_no_gradient():
    student, teacher, mask = logits(0), logits(1), mask_of(2)
    padded_mask = torch.cat([mask, torch.full_like(mask, PADDING)], dim=3)
    padded = torch.cat([student, 50 + student], dim=3).requires_grad_()
    padded_teacher = torch.cat([teacher, -teacher], dim=3)
    inside = all_losses(student, teacher, mask)
    for name, value in all_losses(padded, padded_teacher, padded_mask).items():
        assert float(value.detach()) == pytest.approx(float(inside[name]), rel=1e-5), name
        (gradient,) = torch.autograd.grad(value, padded)
        assert not gradient[..., 8:].any(), name


def test_ignored_pixels_count_for_distillation_only():
    student, teacher, mask = logits(0), logits(1), mask_of(2)
    ignored = mask.clone()
    ignored[:, :, :4] = IGNORE
    with_mask, without = all_losses(student, teacher, mask), all_losses(student, teacher, ignored)
    assert with_mask["kl"] == without["kl"]
    assert with_mask["mse"] == without["mse"]
    rest = all_losses(student[:, :, 4:], teacher[:, :, 4:], mask[:, :, 4:])
    assert float(without["bce"]) == pytest.approx(float(rest["bce"]), rel=1e-5)
    assert float(without["dice"]) == pytest.approx(float(rest["dice"]), rel=1e-5)


def test_unlabelled_images_divide_nothing_by_zero():
    student, teacher = logits(0).requires_grad_(), logits(1)
    values = all_losses(student, teacher, torch.full((3, 1, 8, 8), IGNORE, dtype=torch.uint8))
    assert values["bce"] == values["dice"] == 0
    sum(values.values()).backward()
    assert torch.isfinite(student.grad).all()


def test_dice_averages_over_labelled_images_only():
    student, mask = logits(0), mask_of(2)
    mixed = mask.clone()
    mixed[1:] = IGNORE
    alone = losses.dice(student[:1], mask[:1])
    assert float(losses.dice(student, mixed)) == pytest.approx(float(alone), rel=1e-6)


def test_losses_of_parts_add_up_to_the_loss_of_the_whole():
    """Of any parts: other sizes, an unlabelled image, padding, ignored pixels."""
    student, teacher, mask = logits(0), logits(1), mask_of(2)
    mask[0], mask[1, :, 5:], mask[2, :, :3] = IGNORE, PADDING, IGNORE
    projected, target = logits(3, shape=(3, 5, 4, 4)), logits(4, shape=(3, 5, 4, 4))
    parts, per = (slice(0, 1), slice(1, 3)), losses.counts(mask)
    assert [float(count) for count in per] == [3, 2, 3 * 64 - 24, 64 - 24 + 64 - 24]

    def of(loss, *arguments, **options):
        whole = loss(*arguments, **options)
        added = sum(loss(*(a[p] for a in arguments), per=per, **options) for p in parts)
        assert float(added) == pytest.approx(float(whole), rel=1e-5)

    of(losses.kl, student, teacher, mask, temperature=3.0, scale="T")
    of(losses.mse, student, teacher, mask)
    of(losses.bce, student, mask)
    of(losses.dice, student, mask)
    of(losses.feature_mse, projected, target, mask)
    of(losses.feature_cosine, projected, target, mask)
