"""Feature codecs: round trips within their bounds, refusals, and numpy equal to torch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conftest import TAP, repeating
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kdcache.cache import codecs
from kdcache.cache.layout import Group, whole
from kdcache.errors import SampleError

PRECISIONS = ["float32", "float16", "int8", "int6", "int5", "int4"]
LEVELS = {"int8": 255, "int6": 63, "int5": 31, "int4": 15}
ANY = st.floats(allow_nan=False, allow_infinity=False, width=32)  # denormals, ±0, ±3.4e38
MAPS = arrays(np.float32, (6, 4, 4), elements=ANY)
# mixtures that uniform sampling of floats rarely meets within one channel
KINDS = st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1.2e-38, 1.0, 1e30, 3.4028235e38, -3.4028235e38])
ODD_MAPS = arrays(np.float32, (6, 4, 4), elements=KINDS)


def tap_of(precision):
    return dataclasses.replace(TAP, precision=precision)


def encode_or_refuse(feature, tap):
    try:
        return codecs.encode(feature, tap)
    except SampleError as error:
        return str(error)


@pytest.mark.parametrize("precision", PRECISIONS)
@given(feature=st.one_of(MAPS, ODD_MAPS))
@example(feature=np.full((6, 4, 4), 1e-45, np.float32))
def test_what_is_not_refused_decodes_within_the_stated_bound(precision, feature):
    tap = tap_of(precision)
    feature = repeating(feature, tap)
    stored = encode_or_refuse(feature, tap)
    if isinstance(stored, str):
        return
    decoded = codecs.decode(stored, tap)
    assert (decoded.shape, decoded.dtype) == (feature.shape, np.float32)
    assert np.isfinite(decoded).all()
    error = np.abs(decoded.astype(np.float64) - feature)
    assert (error <= codecs.max_error(stored, tap)).all()
    if precision == "float32":
        assert decoded.tobytes() == feature.tobytes()


@pytest.mark.parametrize("precision", LEVELS)
@given(feature=MAPS)
def test_the_bound_is_half_a_step_of_each_channels_range(precision, feature):
    """The bound computed from the input alone, not from what was stored."""
    tap = tap_of(precision)
    feature = repeating(feature.clip(-1e30, 1e30), tap)
    stored = codecs.encode(feature, tap)
    low, high = (
        f(axis=(1, 2), keepdims=True).astype(np.float64) for f in (feature.min, feature.max)
    )
    half = (high - low) / LEVELS[precision] / 2
    rounding = 4 * np.finfo(np.float32).eps * np.maximum(np.abs(low), np.abs(high))
    # a channel that spans fewer than `levels` smallest normal numbers is stored as its minimum
    tiny = LEVELS[precision] * np.finfo(np.float32).tiny
    error = np.abs(codecs.decode(stored, tap).astype(np.float64) - feature)
    assert (error <= half * (1 + 1e-6) + rounding + tiny).all()


@pytest.mark.parametrize("precision", PRECISIONS)
@given(feature=st.one_of(MAPS, ODD_MAPS), repeats=st.booleans())
def test_torch_gives_what_numpy_gives_bit_for_bit(precision, feature, repeats):
    tap = tap_of(precision)
    feature = repeating(feature, tap) if repeats else feature
    from_numpy = encode_or_refuse(feature, tap)
    from_torch = encode_or_refuse(torch.from_numpy(feature.copy()), tap)
    if isinstance(from_numpy, str):
        assert from_torch == from_numpy
        return
    assert from_torch.keys() == from_numpy.keys()
    for name, array in from_numpy.items():
        assert codecs.on_host(from_torch[name]).tobytes() == array.tobytes()
    assert torch.equal(
        codecs.decode(from_torch, tap), torch.from_numpy(codecs.decode(from_numpy, tap))
    )


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_cuda_gives_what_numpy_gives_bit_for_bit(precision):
    tap = tap_of(precision)
    rng = np.random.default_rng(0)
    for scale in (1e-40, 1e-30, 1, 1e4):
        feature = repeating((rng.normal(size=tap.shape) * scale).astype(np.float32), tap)
        on_gpu = codecs.encode(torch.from_numpy(feature).cuda(), tap)
        for name, array in codecs.encode(feature, tap).items():
            assert codecs.on_host(on_gpu[name]).tobytes() == array.tobytes()


@pytest.mark.parametrize("precision", LEVELS)
@given(value=ANY)
def test_constant_channel_is_exact(precision, value):
    tap = tap_of(precision)
    feature = np.full(tap.shape, value, np.float32)
    assert np.array_equal(codecs.decode(codecs.encode(feature, tap), tap), feature)


@pytest.mark.parametrize("precision", LEVELS)
def test_all_codes_of_a_channel_are_used_whatever_its_range(precision):
    levels = LEVELS[precision]
    tap = dataclasses.replace(tap_of(precision), shape=(2, 16, 16), groups=whole(2))
    ramp = np.linspace([0, -5], [1, 1000], levels + 1, dtype=np.float32).T
    feature = np.stack([np.resize(row, (16, 16)) for row in ramp])
    codes = codecs.encode(feature, tap)["codes_x1"]
    assert all(np.array_equal(np.unique(channel), np.arange(levels + 1)) for channel in codes)


def test_one_outlier_widens_the_step_of_its_channel_only():
    rng = np.random.default_rng(0)
    feature = repeating(rng.normal(size=TAP.shape).astype(np.float32), TAP)
    feature[4, 2, 1] = 1e6
    error = np.abs(codecs.decode(codecs.encode(feature, TAP), TAP) - feature).max(axis=(1, 2))
    assert error[4] > 1
    assert (np.delete(error, 4) < 0.02).all()


def test_coarse_channels_are_stored_once_in_the_taps_order():
    feature = np.arange(6, dtype=np.float32)[:, None, None] * np.ones((6, 4, 4), np.float32)
    stored = codecs.encode(feature, tap_of("float32"))
    assert stored["values_x1"].shape == (2, 4, 4)
    assert stored["values_x2"][:, 0, 0].tolist() == [0, 1, 2, 5]
    assert stored["values_x2"].shape == (4, 2, 2)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("value", [np.nextafter(np.float32(1), np.float32(2)), -0.0])
def test_channel_that_does_not_repeat_is_refused_even_by_a_bit(precision, value):
    feature = np.ones(TAP.shape, np.float32) if value else np.zeros(TAP.shape, np.float32)
    feature[5, 3, 2] = value
    with pytest.raises(SampleError, match="channel 5 does not repeat each value in 2×2 blocks"):
        codecs.encode(feature, tap_of(precision))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("channel", [0, 4])  # a coarse one and a fine one
def test_non_finite_values_are_refused_by_channel(precision, bad, channel):
    feature = np.zeros(TAP.shape, np.float32)
    feature[channel, 2:, :2] = bad
    with pytest.raises(SampleError, match=f"channel {channel} .* not finite"):
        codecs.encode(feature, tap_of(precision))


@pytest.mark.parametrize("value", [65520.0, -7e4])
def test_float16_overflow_is_refused_and_its_largest_values_are_not(value):
    tap = tap_of("float16")
    feature = np.zeros(TAP.shape, np.float32)
    feature[3] = np.nextafter(np.float32(65520), np.float32(0))
    assert codecs.decode(codecs.encode(feature, tap), tap)[3].max() == 65504
    feature[3] = value
    with pytest.raises(SampleError, match="channel 3 .*65504"):
        codecs.encode(feature, tap)


@pytest.mark.parametrize("precision", LEVELS)
@pytest.mark.parametrize("pair", [(-3e38, 3e38), (-1.8e38, 1.8e38)])
def test_range_whose_difference_overflows_is_refused(precision, pair):
    feature = np.zeros(TAP.shape, np.float32)
    feature[4, 0, :2] = pair
    with pytest.raises(SampleError, match="channel 4 .*wider than float32"):
        codecs.encode(feature, tap_of(precision))


def test_a_group_of_several_ranges_keeps_each_channels_affine():
    groups = (Group(2, ((0, 1), (2, 3))), Group(4, ((1, 2),)))
    tap = dataclasses.replace(TAP, shape=(3, 4, 4), groups=groups)
    feature = repeating(np.random.default_rng(1).normal(size=(3, 4, 4)).astype(np.float32), tap)
    stored = codecs.encode(feature, tap)
    assert np.array_equal(stored["affine"][0], feature.min(axis=(1, 2)))
    assert np.abs(codecs.decode(stored, tap) - feature).max() < 0.01


def test_logits_beyond_float16_are_refused_but_stored_at_float32():
    logits = np.full((2, 2), 1e5, np.float32)
    with pytest.raises(SampleError, match="--precision float32"):
        codecs.teacher_logits(logits, "float16")
    assert codecs.teacher_logits(logits, "float32").dtype == np.float32
    with pytest.raises(SampleError, match="not finite"):
        codecs.teacher_logits(logits * np.nan, "float32")
