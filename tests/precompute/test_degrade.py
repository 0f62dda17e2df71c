"""What changes colours: against references, and nowhere near where two machines could differ."""

from __future__ import annotations

import hashlib
import math

import cv2
import numpy as np
import pytest
from policies import always

from kdcache.precompute import degrade
from kdcache.precompute.degrade import PHOTOMETRIC
from kdcache.precompute.policy import Gamma, Policy, draw


def photo(size: int = 96) -> np.ndarray:
    """A smooth picture with all values."""
    coarse = np.random.default_rng(0).integers(0, 256, (size // 8, size // 8, 3), np.uint8)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def distance_from_ties(values: np.ndarray) -> float:
    return float(np.abs(values - np.floor(values) - 0.5).min())


def test_no_gamma_curve_has_a_value_that_two_libraries_could_round_differently():
    low, high = Gamma.model_validate({"gamma": [0.2, 5]}).gamma  # the widest range
    for n in range(round(low * 1000), round(high * 1000) + 1):
        # libraries' powers differ by 1e-13 of 255
        assert distance_from_ties(degrade.tone_curve(round(n / 1000, 3))) > 1e-10, n


def test_no_hue_has_a_cosine_that_two_libraries_could_round_differently():
    angles = np.radians(np.round(np.arange(-180_000, 180_001) / 1000, 3))
    assert distance_from_ties(np.cos(angles) * 1e5) > 1e-9
    assert distance_from_ties(np.sin(angles) * 1e5) > 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_colour_is_exact_and_never_a_tie(seed, monkeypatch):
    widest = {"brightness": [0.1, 2], "contrast": [0.1, 2], "saturation": [0, 2]}
    table = widest | {"hue": [-180, 180], "probability": 1}
    parameters = draw(Policy.model_validate({"colour": table}), seed, "a", 1)["colour"]
    used = []
    transform = cv2.transform
    monkeypatch.setattr(cv2, "transform", lambda i, m: used.append(m) or transform(i, m))
    found = degrade.colour(photo(), **parameters)
    in_1024ths = used[0] * 1024
    assert (in_1024ths == np.rint(in_1024ths)).all()
    # float32 has 24 bits
    assert (
        np.abs(in_1024ths[:, :3]).sum(axis=1).max() * 255 + np.abs(in_1024ths[:, 3]).max() < 2**24
    )
    matrix = in_1024ths.astype(np.int64)
    exact = photo().astype(np.int64) @ matrix[:, :3].T + matrix[:, 3]
    assert (exact % 1024 != 512).all()
    np.testing.assert_array_equal(found, np.clip((exact + 512) // 1024, 0, 255))


def test_colour_changes_what_it_says():
    image = photo()
    luma = np.array(degrade._LUMA)
    neutral = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
    np.testing.assert_array_equal(degrade.colour(image, **neutral), image)
    grey = degrade.colour(image, **neutral | {"saturation": 0.0})
    assert np.ptp(grey, axis=2).max() <= 1
    np.testing.assert_allclose(grey[..., 0], image @ luma, atol=1.5)
    half = degrade.colour(image, **neutral | {"brightness": 0.5})
    np.testing.assert_allclose(half, image / 2, atol=0.51)
    flat = degrade.colour(image, **neutral | {"contrast": 0.5})
    np.testing.assert_allclose(flat, (image + (image @ luma).mean()) / 2, atol=1)
    red = np.full((8, 8, 3), (150, 100, 100), np.uint8)
    turned = degrade.colour(red, **neutral | {"hue": 120.0})[0, 0]
    assert turned.argmax() == 1
    assert turned @ luma == pytest.approx(red[0, 0] @ luma, abs=1)


def test_gamma_is_a_power():
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    np.testing.assert_array_equal(degrade.gamma(image, 1.0), image)
    np.testing.assert_allclose(degrade.gamma(image, 2.0), image / 255.0 * image, atol=0.5001)


def test_shadow_falls_on_one_side_and_fog_towards_its_grey():
    white = np.full((64, 64, 3), 255, np.uint8)
    shaded = degrade.shadow(white, darkness=0.5, edge=0.1, x=0.5, y=0.5, dx=1.0, dy=0.0)
    assert (shaded[:, :28] == 255).all()
    assert (shaded[:, 36:] == 128).all()
    black = np.zeros((64, 64, 3), np.uint8)
    fogged = degrade.fog(black, density=0.5, level=200, seed=1)
    assert (fogged >= 50).all()
    assert (fogged <= 100).all()
    assert np.ptp(fogged) > 20
    assert np.abs(np.diff(fogged[..., 0].astype(int), axis=0)).max() <= 6  # no edges
    assert (degrade.fog(photo(), density=1.0, level=200, seed=1).max(axis=(0, 1)) <= 228).all()


def test_rain_only_brightens_what_is_dark():
    black = np.zeros((320, 320, 3), np.uint8)
    wet = degrade.rain(black, streaks=200, length=40.0, slant=0.2, seed=3)
    assert 0.005 < (wet > 20).mean() < 0.2
    halves = [(wet[:160] > 20).mean(), (wet[160:] > 20).mean()]
    assert min(halves) > 0.5 * max(halves)


@pytest.mark.parametrize(("dx", "dy"), [(1.0, 0.0), (0.3, 1.0), (-1.0, 0.5), (0.0, 0.0)])
def test_motion_is_the_mean_along_its_line(dx, dy):
    point = np.zeros((101, 101, 3), np.uint8)
    point[50, 50] = 252
    smeared = degrade.motion(point, length=40.0, dx=dx, dy=dy)[..., 0]
    rows, columns = np.nonzero(smeared)
    if not dx and not dy:
        np.testing.assert_array_equal(smeared, point[..., 0])
        return
    assert len(rows) == 4
    assert (smeared[rows, columns] == 252 // 4).all()
    longest = max(abs(dx), abs(dy))
    assert np.ptp(columns) == pytest.approx(3 * abs(dx) / longest, abs=1)
    assert np.ptp(rows) == pytest.approx(3 * abs(dy) / longest, abs=1)


def test_blur_widens_a_point_by_its_sigma():
    point = np.zeros((201, 201, 3), np.uint8)
    point[100, 100] = 255
    share = degrade.blur(point, sigma=10.0)[100, :, 0].astype(float)
    width = math.sqrt((share * (np.arange(201) - 100) ** 2).sum() / share.sum())
    assert width == pytest.approx(2.0, rel=0.15)


@pytest.mark.parametrize("sigma", [0.0, 2.0, 10.0, 18.0])
def test_noise_has_its_sigma_no_mean_and_no_pattern(sigma):
    grey = np.full((256, 256, 3), 128, np.uint8)
    moved = degrade.noise(grey, sigma, seed=5).astype(np.float64) - 128
    assert moved.std() == pytest.approx(sigma, rel=0.05, abs=0.01)
    assert abs(moved.mean()) < 0.1
    if sigma:
        channels = moved.reshape(-1, 3).T
        assert np.abs(np.corrcoef(channels) - np.eye(3)).max() < 0.02
        assert abs(np.corrcoef(moved[:, 1:].ravel(), moved[:, :-1].ravel())[0, 1]) < 0.02


def test_raw_bytes_are_philox():
    """Should this fail, noise, fog and rain of rows extracted before and after it differ."""
    found = hashlib.sha256(degrade._raw_bytes(2**32 - 1, 1001)).hexdigest()
    assert found == RAW_SHA256


RAW_SHA256 = "7035f5681b443ae24b7b5c2cc95b47f9e76f34dcc9593d5abc699f765371c51c"


@pytest.mark.parametrize("name", PHOTOMETRIC)
@pytest.mark.parametrize("size", [32, 640])
def test_a_picture_is_changed_and_the_argument_is_not(name, size):
    image = photo(size)
    before = image.copy()
    changed = PHOTOMETRIC[name](image, **draw(always(name), 0, "a", 1)[name])
    np.testing.assert_array_equal(image, before)
    assert changed.shape == image.shape
    assert changed.dtype == np.uint8
    assert changed.flags.c_contiguous
    if size > 32 or name not in ("blur", "motion"):  # of less than a pixel there
        assert (changed != image).mean() > 0.01
