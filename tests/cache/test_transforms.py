"""Transforms are exact for every bit pattern, and their recipes undo them with numpy alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kdcache.cache.transforms import (
    BytePlanes,
    FloatGradient,
    Form,
    Nibbles,
    Plain,
    RgbGradient,
)

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 7))


def by_recipe(transform, stored, row):
    """What a reader does with the attributes of an array and one stored row."""
    names = {"np": np, "math": math, "stored": stored, "shape": row.shape}
    exec(transform.recipe(row), names)
    return names["array"]


def assert_round_trip(transform, array, row):
    stored = transform.forward(array)
    form = transform.stored(row)
    assert (stored.shape, stored.dtype) == (form.shape, np.dtype(form.dtype))
    assert len(form.dimensions) == stored.ndim
    several = np.stack([stored, stored])
    found = [transform.inverse(stored, row), by_recipe(transform, stored, row)]
    found += list(transform.inverse(several, row))
    found += [one.numpy() for one in transform.inverse(torch.from_numpy(several), row)]
    found.append(transform.inverse(torch.from_numpy(stored.copy()), row).numpy())
    for undone in found:
        assert (undone.shape, undone.dtype) == (array.shape, array.dtype)
        assert np.ascontiguousarray(undone).tobytes() == np.ascontiguousarray(array).tobytes()


@pytest.mark.parametrize("bits", [8, 6, 5, 4])
@given(data=st.data(), shape=SHAPES)
def test_nibbles(bits, data, shape):
    codes = data.draw(arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1)))
    assert_round_trip(Nibbles(bits), codes, Form("uint8", shape, ("channel", "y", "x")))


@pytest.mark.parametrize(("bits", "stored_bytes"), [(8, 6400), (6, 4800), (5, 4000), (4, 3200)])
def test_nibbles_take_no_more_than_their_bits(bits, stored_bytes):
    row = Form("uint8", (1, 80, 80), ("channel", "y", "x"))
    assert Nibbles(bits).stored(row).shape == (stored_bytes,)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@given(data=st.data(), shape=SHAPES)
def test_byte_planes(dtype, data, shape):
    bits = data.draw(arrays(f"uint{8 * np.dtype(dtype).itemsize}", shape))
    row = Form(dtype, shape, ("channel", "y", "x"))
    assert_round_trip(BytePlanes(), bits.view(dtype), row)
    assert BytePlanes().forward(np.full(shape, -1.5, dtype))[0, 0, 0, 0] >= 0xBE  # sign first


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@given(data=st.data(), height=st.integers(1, 6), width=st.integers(1, 6))
def test_float_gradient(dtype, data, height, width):
    bits = data.draw(arrays(f"uint{8 * np.dtype(dtype).itemsize}", (height, width)))
    row = Form(dtype, (height, width), ("y", "x"))
    assert_round_trip(FloatGradient(), bits.view(dtype), row)


@given(data=st.data(), height=st.integers(1, 6), width=st.integers(1, 6))
def test_rgb_gradient(data, height, width):
    image = data.draw(arrays(np.uint8, (height, width, 3)))
    assert_round_trip(RgbGradient(), image, Form("uint8", image.shape, ("y", "x", "rgb")))


@pytest.mark.parametrize("side", [257, 3001])
def test_sums_beyond_a_32_bit_integer_wrap(side):
    """Photos of 255 in every residual add up to more than 2^31 from 2,902 pixels a side on."""
    stored = np.full((3, side, side), 255, np.uint8)
    expected = stored.cumsum(1, "uint8").cumsum(2, "uint8")
    image = RgbGradient().inverse(stored, Form("uint8", (side, side, 3), ("y", "x", "rgb")))
    assert np.array_equal(image[..., 1], expected[0])
    row = Form("float16", (side, side), ("y", "x"))
    names = {"np": np, "math": math, "stored": stored[:2], "shape": row.shape}
    exec(FloatGradient().recipe(row), names)
    undone = FloatGradient().inverse(stored[:2], row)
    assert undone.tobytes() == names["array"].tobytes()


def test_a_ramp_leaves_nothing_but_its_corner():
    ramp = np.add.outer(np.arange(9), 2 * np.arange(9)).astype(np.uint8)
    stored = RgbGradient().forward(np.stack([ramp] * 3, axis=-1))
    assert np.count_nonzero(stored) <= 2 * 9
    assert not stored[1:].any()


def test_plain_is_the_array_itself():
    array = np.arange(6).reshape(2, 3)
    assert_round_trip(Plain(), array, Form("int64", (2, 3), ("a", "b")))
