"""Rows of a cache as a picture: photo, mask, teacher, and features as colours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdcache.cache.layout import TapSpec
from kdcache.cache.reader import Cache
from kdcache.drawing import U8, lit, masked, save, sheet
from kdcache.errors import CacheError

# Colours span these percentiles of each component; the tails saturate.
_PERCENTILES = (1, 99)


def save_rows(path: Path, cache: Cache, count: int = 6) -> None:
    """Write a PNG of `count` rows, evenly spread over the cache.

    The teacher's person probability is brightness. A tap's colours are the first three principal
    components of its channels over all drawn rows, so equal colours are alike in every row.
    """
    if not len(cache):
        raise CacheError(f"{cache.path} has no rows to draw yet")
    rows = np.unique(np.linspace(0, len(cache) - 1, count).astype(int)).tolist()
    columns = [_photos(cache, rows), _masks(cache, rows)]
    columns += [_teacher(cache, rows)] if cache.has_logits else []
    columns += [_principal_colours(cache, rows, tap) for tap in cache.manifest.taps]
    keys = [cache.keys[index] for index in rows]
    captions = [
        f"row {index}: {key.split} {key.sample_id}" + f" view {key.view}" * (key.view > 0)
        for index, key in zip(rows, keys, strict=True)
    ]
    titles = ["photo", "mask (yellow: not labelled)", *(["teacher"] * cache.has_logits)]
    titles += [f"{tap.name} (PCA)" for tap in cache.manifest.taps]
    save(path, sheet(titles, list(zip(*columns, strict=True)), captions), "PNG")


def _photos(cache: Cache, rows: Sequence[int]) -> list[U8]:
    return [_uint8(cache[index].image) for index in rows]


def _masks(cache: Cache, rows: Sequence[int]) -> list[U8]:
    return [masked(_uint8(cache[index].image), _uint8(cache[index].mask)) for index in rows]


def _teacher(cache: Cache, rows: Sequence[int]) -> list[U8]:
    pictures = []
    for row in (cache[index] for index in rows):
        # half of tanh: a logistic function that cannot overflow
        probability = 0.5 + 0.5 * np.tanh(0.5 * row.teacher_logits.astype(np.float32))
        pictures.append(lit(_uint8(row.image), probability))
    return pictures


def _principal_colours(cache: Cache, rows: Sequence[int], tap: TapSpec) -> list[U8]:
    """(h, w, 3) of each row; features are decoded twice rather than all held at once."""
    channels = tap.shape[0]
    total, products, positions = np.zeros(channels), np.zeros((channels, channels)), 0
    for index in rows:
        feature = cache.decode_features(index, tap).reshape(channels, -1)
        total += feature.sum(axis=1, dtype=np.float64)
        products += feature @ feature.T
        positions += feature.shape[1]
    mean = total / positions
    _, vectors = np.linalg.eigh(products / positions - np.outer(mean, mean))
    axes = vectors[:, ::-1][:, :3]
    axes *= np.sign(axes[np.abs(axes).argmax(axis=0), range(axes.shape[1])])  # else arbitrary
    colours = []
    for index in rows:
        feature = cache.decode_features(index, tap)
        colours.append(np.einsum("chw,ck->hwk", feature - mean[:, None, None], axes))
    low, high = np.percentile(np.stack(colours), _PERCENTILES, axis=(0, 1, 2))
    scaled = [(c - low) / np.where(high > low, high - low, 1) * 255 for c in colours]
    pictures = [s.clip(0, 255).astype(np.uint8) for s in scaled]
    # a tap of one or two channels leaves the others dark
    return [np.pad(p, ((0, 0), (0, 0), (0, 3 - p.shape[2]))) for p in pictures]


def _uint8(array: NDArray[np.generic]) -> U8:
    return array.astype(np.uint8, copy=False)
