"""Views: image and mask stay together, and the same bytes come out on any machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from numpy._core import _multiarray_umath as numpy_core
from policies import TRANSFORMS, always

from kdcache.errors import ConfigError
from kdcache.imaging import (
    IGNORE,
    LETTERBOX_GREY,
    PADDING,
    PERSON,
    place,
    resize_image,
    resize_mask,
)
from kdcache.precompute.degrade import PHOTOMETRIC
from kdcache.precompute.policy import Policy, draw, read_policy
from kdcache.precompute.views import Box, View, apply, window_of

HEIGHT, WIDTH, SIZE = 180, 240, 320
MODES = ("stretch", "letterbox")
GEOMETRIC = [name for name in TRANSFORMS if name not in PHOTOMETRIC]


def mask_at(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A mask that is a function of the source coordinates: stripes, of which some are ignored."""
    person = (x // 16 + y // 24) % 2 == 1
    return np.where(x + y < 60, IGNORE, np.where(person, PERSON, 0)).astype(np.uint8)


def ramp() -> tuple[np.ndarray, np.ndarray]:
    """A photo whose red is x and whose green is y, and its mask."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    blue = 251 * x * y % 256  # grain, for blurs to show
    photo = np.stack([x, y, blue], axis=-1).astype(np.uint8)
    return photo, mask_at(x, y)


def grainy(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Patches of random colours, and random people."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 7 + 1, width // 7 + 1, 3), np.uint8)
    photo = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_NEAREST)
    return photo, rng.integers(0, 2, (height, width), np.uint8)


def same(one: View, other: View) -> bool:
    return (
        one.image.tobytes() == other.image.tobytes()
        and one.mask.tobytes() == other.mask.tobytes()
        and one.placement == other.placement
    )


def source_of(placement: dict) -> tuple[np.ndarray, np.ndarray]:
    """Source coordinates (x of each column, y of each row) as the module's docstring says; NaN outside."""
    top, left, height, width = placement["placed_px"]
    window = Box(*placement["window_px"])
    at = np.arange(SIZE) + 0.5
    u = (at - left) / width * window.width
    if placement["flipped"]:
        u = window.width - u
    x, y = window.left + u - 0.5, window.top + (at - top) / height * window.height - 0.5
    x[(at < left) | (at > left + width)] = np.nan
    y[(at < top) | (at > top + height)] = np.nan
    return x, y


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("names", [*((name,) for name in TRANSFORMS), tuple(GEOMETRIC)])
def test_the_mask_is_what_the_image_shows(names, mode):
    photo, mask = ramp()
    changed = []
    for n in range(6):
        drawn = draw(always(*names), 0, f"{n}.jpg", 1)
        view = apply(drawn, photo, mask, SIZE, mode)
        # colours change after the geometry, which is read without them
        plain = apply({k: drawn[k] for k in GEOMETRIC if k in drawn}, photo, mask, SIZE, mode)
        np.testing.assert_array_equal(view.mask, plain.mask)
        assert view.placement == plain.placement
        inside = plain.mask != PADDING
        changed.append((view.image != plain.image)[inside].mean())

        expected_x, expected_y = source_of(plain.placement)
        seen = (expected_x > 1) & (expected_x < WIDTH - 2)
        seen = seen & ((expected_y > 1) & (expected_y < HEIGHT - 2))[:, None]
        assert seen.mean() > 0.1
        assert inside[seen].all()
        x, y = (plain.image[..., channel].astype(int) for channel in (0, 1))
        assert np.abs(x - expected_x)[seen].max() <= 1
        assert np.abs(y - expected_y[:, None])[seen].max() <= 1
        around = [mask_at(x + dx, y + dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)]
        clear = seen & (np.ptp(around, axis=0) == 0)
        assert clear.mean() > 0.05
        np.testing.assert_array_equal(view.mask[clear], around[4][clear])
    if set(names) <= PHOTOMETRIC.keys():
        assert np.mean(changed) > 0.02
    else:
        assert changed == [0] * 6


@pytest.mark.parametrize("mode", MODES)
def test_without_parameters_it_is_view_0(mode):
    nothing = Policy.model_validate({name: {"probability": 0.0} for name in TRANSFORMS})
    photo, mask = ramp()
    drawn = draw(nothing, 0, "a.jpg", 1)
    assert drawn == {}
    view = apply(drawn, photo, mask, SIZE, mode)
    where = place(HEIGHT, WIDTH, SIZE, mode)
    np.testing.assert_array_equal(view.image, resize_image(photo, where))
    np.testing.assert_array_equal(view.mask, resize_mask(mask, where))
    placed = [where.top_px, where.left_px, where.height_px, where.width_px]
    assert view.placement == {
        "window_px": [0, 0, HEIGHT, WIDTH],
        "placed_px": placed,
        "flipped": False,
    }


@pytest.mark.parametrize("mode", MODES)
def test_a_flip_is_view_0_of_the_mirrored_photo_and_twice_is_none(mode):
    photo, mask = ramp()
    plain = apply({}, photo, mask, SIZE, mode)
    mirrored = apply({"flip": {}}, photo, mask, SIZE, mode)
    np.testing.assert_array_equal(
        mirrored.image, apply({}, photo[:, ::-1], mask[:, ::-1], SIZE, mode).image
    )
    again = apply({"flip": {}}, photo[:, ::-1], mask[:, ::-1], SIZE, mode)
    np.testing.assert_array_equal(again.image, plain.image)
    np.testing.assert_array_equal(again.mask, plain.mask)
    assert mirrored.placement == plain.placement | {"flipped": True}


def test_a_window_is_the_resized_crop_of_whole_pixels():
    photo, mask = ramp()
    drawn = {"window": {"scale": 1.5, "ratio": 1.21, "x": 1.0, "y": 0.25}}
    view = apply(drawn, photo, mask, SIZE, "stretch")
    # 180 / 1.5 / 1.1, 240 / 1.5 × 1.1, at the right, a quarter down
    assert view.placement["window_px"] == [18, 64, 109, 176]
    part = np.s_[18 : 18 + 109, 64 : 64 + 176]
    where = place(109, 176, SIZE, "stretch")
    np.testing.assert_array_equal(view.image, resize_image(photo[part], where))
    np.testing.assert_array_equal(view.mask, resize_mask(mask[part], where))


@pytest.mark.parametrize("flip", [{}, {"flip": {}}])
@pytest.mark.parametrize("mode", MODES)
def test_outside_the_photo_it_is_grey_and_padding_whatever_the_weather(mode, flip):
    window = {"window": {"scale": 0.5, "ratio": 1.0, "x": 0.5, "y": 0.0}}
    photo, mask = grainy(HEIGHT, WIDTH)
    weather = {k: v for k, v in draw(always(), 0, "a", 1).items() if k in PHOTOMETRIC}
    for drawn in (window | flip, window | flip | weather):
        view = apply(drawn, photo, mask, SIZE, mode)
        assert view.placement["window_px"] == [0, -120, 2 * HEIGHT, 2 * WIDTH]
        x, y = source_of(view.placement)
        outside = ~((x > -0.5) & (x < WIDTH - 0.5) & ((y > -0.5) & (y < HEIGHT - 0.5))[:, None])
        np.testing.assert_array_equal(view.mask == PADDING, outside)
        assert (view.image[outside] == LETTERBOX_GREY).all()


def test_resized_without_a_change_of_size_the_border_is_grey_to_its_last_pixel():
    drawn = {"window": {"scale": 0.5, "ratio": 1.0, "x": 0.5, "y": 0.5}}
    photo, mask = grainy(SIZE // 2, SIZE // 2)
    view = apply(drawn, photo, mask, SIZE, "stretch")
    inner = np.s_[SIZE // 4 : 3 * SIZE // 4, SIZE // 4 : 3 * SIZE // 4]
    np.testing.assert_array_equal(view.image[inner], photo)
    np.testing.assert_array_equal(view.mask[inner], mask)
    assert (view.mask == PADDING).sum() == SIZE * SIZE - mask.size
    assert (view.image[view.mask == PADDING] == LETTERBOX_GREY).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 5000), (5000, 3), (7, 7)])
def test_photos_of_any_shape_have_views(shape, mode):
    photo, mask = grainy(*shape)
    policies = [always(), read_policy("light"), Policy(window=always("window").window)]
    for policy in policies:
        for n in range(10):
            view = apply(draw(policy, n, "a", 1), photo, mask, 64, mode)
            assert view.image.shape == (64, 64, 3)
            assert view.mask.shape == (64, 64)
            assert set(np.unique(view.mask)) <= {0, 1, PADDING}
            assert (view.mask != PADDING).any()


def test_every_window_has_a_pixel_of_the_photo():
    for height, width in [(1, 1), (1, 5000), (3, 2), (480, 640)]:
        for scale in (0.25, 0.999, 1.0, 8.0):
            for ratio in (0.25, 1.0, 4.0):
                for at in (0.0, 0.5, 1.0):
                    box = window_of(height, width, scale, ratio, at, 1 - at)
                    assert min(box.height, box.width) >= 1
                    assert box.top < height
                    assert box.left < width
                    assert box.top + box.height > 0
                    assert box.left + box.width > 0


def test_what_json_gives_back_makes_the_same_view_and_arguments_stay_as_they_are():
    photo, mask = grainy(97, 131)
    photo.flags.writeable = mask.flags.writeable = False  # as Pillow's arrays are
    for n in range(5):
        drawn = draw(always(), n, "a.jpg", 1)
        read = json.loads(json.dumps(drawn))
        first, again = (apply(one, photo, mask, 96, "stretch") for one in (drawn, read))
        assert same(first, again)
        assert json.loads(json.dumps(first.placement)) == first.placement
        assert first.image.flags.c_contiguous
    writable = photo.copy(), mask.copy()
    apply(draw(always(), 0, "a.jpg", 1), *writable, 96, "stretch")
    np.testing.assert_array_equal(writable[0], photo)
    np.testing.assert_array_equal(writable[1], mask)


def test_threads_make_the_views_that_one_makes():
    photo, mask = grainy(97, 131)
    policy = read_policy("heavy")

    def view(n: int) -> View:
        return apply(draw(policy, 0, f"{n}", 1), photo, mask, 128, "letterbox")

    alone = [view(n) for n in range(24)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(view, reversed(range(24))))[::-1]
    assert all(same(*pair) for pair in zip(alone, together, strict=True))


def test_a_transform_of_another_kdcache_is_refused():
    with pytest.raises(ConfigError, match="unknown transform 'snow'; nearest known: .*"):
        apply({"snow": {}}, *ramp(), SIZE, "stretch")


def digest(views: int) -> str:
    """SHA-256 of many views with half of all transforms, and of one with all, at 640 px."""
    tables = always().model_dump()
    half = Policy.model_validate({name: t | {"probability": 0.5} for name, t in tables.items()})
    found = hashlib.sha256()
    for n in range(views):
        photo, mask = grainy(30 + 37 * n % 400, 20 + 53 * n % 500, n)
        policy, size_px = (always(), 640) if n == 0 else (half, (64, 96, 160)[n % 3])
        drawn = draw(policy, 5, f"{n}.jpg", n)
        view = apply(drawn, photo, mask, size_px, MODES[n % 2])
        found.update(json.dumps([drawn, view.placement]).encode())
        found.update(view.image.tobytes() + view.mask.tobytes())
    return found.hexdigest()


VIEWS = 120
# What NumPy was built for beyond its baseline, and this processor has.
DISPATCHED = [n for n in numpy_core.__cpu_dispatch__ if numpy_core.__cpu_features__[n]]
OLD = {
    "OMP_NUM_THREADS": "2",
    "PYTHONHASHSEED": "1",
    "ATEN_CPU_CAPABILITY": "default",
    "OPENCV_CPU_DISABLE": "SSE4.1,SSE4.2,AVX,FP16,AVX2,FMA3,AVX512-SKX,AVX512-ICL,NEON_DOTPROD",
    "OPENCV_IPP": "disabled",
    "NPY_DISABLE_CPU_FEATURES": " ".join(DISPATCHED),
    "OPENBLAS_CORETYPE": "Nehalem",
    "JSIMD_FORCENONE": "1",  # libjpeg-turbo
}
AVX2 = {
    "OMP_NUM_THREADS": "1",
    "PYTHONHASHSEED": "2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "OPENCV_CPU_DISABLE": "AVX512-SKX,AVX512-ICL",
    "OPENCV_FOR_THREADS_NUM": "1",
    "NPY_DISABLE_CPU_FEATURES": " ".join(DISPATCHED[1:]),
    "JSIMD_FORCESSE2": "1",
}


@pytest.mark.parametrize("machine", [OLD, AVX2], ids=["no vector units", "AVX2"])
def test_other_instruction_sets_and_thread_counts_give_the_same_bytes(machine):
    child = subprocess.run(
        [sys.executable, "-W", "ignore", __file__],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | machine,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert child.stdout.split() == [digest(VIEWS)]


if __name__ == "__main__":
    print(digest(VIEWS))
