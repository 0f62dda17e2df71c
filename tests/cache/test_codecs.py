"""Feature codecs: round trips within their bounds, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kdcache.cache import codecs
from kdcache.errors import SampleError

FINITE = st.floats(-(2.0**100), 2.0**100, width=32)
MAPS = arrays(np.float32, (3, 4, 5), elements=FINITE)


@given(MAPS)
def test_float32_is_exact(feature):
    assert (
        codecs.decode(codecs.encode(feature, "float32"), "float32").tobytes() == feature.tobytes()
    )


@given(arrays(np.float32, (3, 4, 5), elements=st.floats(-65504, 65504, width=16)))
def test_float16_is_exact_for_float16_values(feature):
    assert np.array_equal(codecs.decode(codecs.encode(feature, "float16"), "float16"), feature)


@given(MAPS)
def test_int8_error_is_at_most_half_a_step(feature):
    stored = codecs.encode(feature, "int8")
    step = stored["affine"][1][:, None, None].astype(np.float64)
    error = np.abs(codecs.decode(stored, "int8").astype(np.float64) - feature)
    rounding = 4 * np.finfo(np.float32).eps * np.abs(feature).max(axis=(1, 2), keepdims=True)
    # a channel that spans less than 255 smallest normal numbers is stored as its minimum
    tiny = 255 * np.finfo(np.float32).tiny
    assert (error <= step / 2 + rounding + tiny).all()


@given(FINITE)
def test_constant_channel_is_exact_at_int8(value):
    feature = np.full((2, 3, 3), value, np.float32)
    assert np.array_equal(codecs.decode(codecs.encode(feature, "int8"), "int8"), feature)


def test_int8_uses_all_codes_of_each_channel():
    feature = np.linspace([0, -5], [1, 1000], 256, dtype=np.float32).T.reshape(2, 16, 16)
    codes = codecs.encode(feature, "int8")["codes"]
    assert all(np.array_equal(np.unique(channel), np.arange(256)) for channel in codes)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_refused_by_channel(precision, bad):
    feature = np.zeros((4, 2, 2), np.float32)
    feature[2, 1, 0] = bad
    with pytest.raises(SampleError, match="channel 2 .* not finite"):
        codecs.encode(feature, precision)


def test_float16_overflow_is_refused():
    feature = np.zeros((2, 2, 2), np.float32)
    feature[1] = 7e4
    with pytest.raises(SampleError, match="channel 1 .*65504"):
        codecs.encode(feature, "float16")


def test_int8_refuses_a_spread_that_float32_cannot_subtract():
    feature = np.zeros((1, 1, 2), np.float32)
    feature[0, 0] = [-3e38, 3e38]
    with pytest.raises(SampleError, match="channel 0"):
        codecs.encode(feature, "int8")


def test_logits_beyond_float16_are_refused_but_stored_at_float32():
    logits = np.full((2, 2), 1e5, np.float32)
    with pytest.raises(SampleError, match="--precision float32"):
        codecs.teacher_logits(logits, "int8")
    assert codecs.teacher_logits(logits, "float32").dtype == np.float32
