"""Policies of views: what a file may say, and that a draw is a function of its arguments alone."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from policies import TRANSFORMS, always
from pydantic import ValidationError

from kdcache.errors import ConfigError
from kdcache.precompute.policy import Policy, draw, in_use, name_of, read_policy


def test_a_view_is_the_same_in_any_order_and_thread_and_leaves_global_generators_alone():
    policy = read_policy("heavy")
    wanted = [(seed, f"{n}.jpg", view) for seed in (0, 1) for n in range(20) for view in (1, 2)]
    first = [draw(policy, *key) for key in wanted]
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())
    with ThreadPoolExecutor(4) as pool:
        backwards = list(pool.map(lambda key: draw(policy, *key), reversed(wanted)))
    assert backwards[::-1] == first
    after = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())
    assert before == after
    assert len({json.dumps(one) for one in first}) == len(first)


def test_the_stream_is_what_it_was_when_caches_were_made():
    """Should this fail, rows extracted before and after it differ: never change the expected values."""
    assert draw(always("flip", "window", "compression"), 0, "train/000000000785.jpg", 1) == EXPECTED


EXPECTED = {
    "flip": {},
    "window": {"scale": 1.397, "ratio": 1.21, "x": 0.399, "y": 0.982},
    "compression": {"quality": 58},
}


def test_ids_that_look_alike_draw_apart():
    policy = always("window")
    keys = [(1, "1", 1), (11, "", 1), (1, "", 11), (1, '1", 1', 1), (1, "\udcff", 1), (1, "ÿ", 1)]
    assert len({json.dumps(draw(policy, *key)) for key in keys}) == len(keys)


def test_a_transform_that_comes_or_goes_moves_no_other():
    whole = draw(always(), 3, "a.jpg", 2)
    assert list(whole) == TRANSFORMS
    for name in TRANSFORMS:
        assert draw(always(name), 3, "a.jpg", 2) == {name: whole[name]}


def test_json_gives_back_what_was_drawn_and_is_short():
    policy = always()
    for n in range(200):
        drawn = draw(policy, n, "b.jpg", 1)
        text = json.dumps(drawn)
        assert json.loads(text) == drawn
        assert len(text) <= 700


@pytest.mark.parametrize("name", TRANSFORMS)
def test_numbers_lie_in_their_ranges_and_fill_them(name):
    policy = always(name)
    drawn = [draw(policy, 0, f"{n}.jpg", 1)[name] for n in range(300)]
    transform = getattr(policy, name)
    ranges = transform.model_dump(exclude={"probability"}) | transform.also
    assert all(one.keys() == ranges.keys() for one in drawn)
    for key, (low, high) in ranges.items():
        values = [one[key] for one in drawn]
        assert low <= min(values) <= max(values) <= high
        assert max(values) - min(values) > 0.95 * (high - low)
        assert type(values[0]) is type(low)
        assert all(value == round(value, 3) for value in values)


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_a_transform_is_in_as_many_views_as_its_probability_says(probability):
    policy = Policy.model_validate({"fog": {"probability": probability}})
    share = sum("fog" in draw(policy, 0, f"{n}", 1) for n in range(2000)) / 2000
    assert share == pytest.approx(probability, abs=0.03 * (0 < probability < 1))


@pytest.mark.parametrize("augment", ["light", "heavy"])
def test_a_dump_is_json_and_the_file_of_it_is_the_same_policy(augment, tmp_path):
    policy = read_policy(augment)
    tables = policy.model_dump()
    assert json.loads(json.dumps(tables)) == tables
    lines = [
        f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in table.items())
        for name, table in tables.items()
    ]
    path = tmp_path / "mine.toml"
    path.write_text("\n".join(lines))
    assert read_policy(str(path)) == policy


def test_what_a_file_leaves_out_is_off_and_has_the_ranges_of_heavy(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[noise]\nprobability = 1\n")
    policy = read_policy(str(path))
    assert list(draw(policy, 0, "a", 1)) == ["noise"]
    assert policy.noise.sigma == read_policy("heavy").noise.sigma


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[fogg]", r"mine\.toml: unknown key 'fogg'; nearest known: fog"),
        ("[fog]\ndensty = [0, 1]", r"unknown key 'fog\.densty'; nearest known: density"),
        ("[fog]\nprobability = 2", r"fog\.probability = 2: .* less than or equal to 1"),
        ("[fog]\nprobability = nan", r"fog\.probability = nan: "),
        ("[fog]\nprobability = true", r"fog\.probability = True: .* valid number"),
        ("[fog]\ndensity = [0.6, 0.2]", r"fog\.density = .*: expected \[low, high\], from 0 to 1"),
        ("[fog]\ndensity = [0.6, nan]", r"fog\.density = .*: expected \[low, high\]"),
        ("[fog]\ndensity = [0.6]", r"fog\.density"),
        ("[fog]\ndensity = 0.6", r"fog\.density = 0\.6: expected \[low, high\]"),
        ("[fog]\ndensity = [0.2, 0.3, 0.6]", r"fog\.density = .*: expected \[low, high\]$"),
        ("[window]\nscale = [1, 2]", r"\[window\] says no probability, from 0 to 1"),
        ("", "no transform has a probability above 0, .* there can be: flip, window, colour"),
        ("[flip]\nprobability = 0", "no transform has a probability above 0"),
        ("[window]\nscale = [0.1, 2]", r"window\.scale = .*: .* from 0\.25 to 8"),
        ("[rain]\nstreaks = [1.5, 2]", r"rain\.streaks\.0 = 1\.5: .* valid integer"),
        ("flip = 0.5", r"flip = 0\.5: expected a table, \[flip\]"),
        ("[fog", "not valid TOML"),
        ("[fog]\nx = 1\n[rains]", r"'fog\.x'.*; unknown key 'rains'; nearest known: rain"),
    ],
)
def test_a_wrong_file_is_refused_with_the_key_and_what_was_expected(text, message, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_policy(str(path))


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"strong: no such file.*named policies: light, heavy"):
        read_policy("strong")
    with pytest.raises(ConfigError, match="a folder, and no policy of that name"):
        read_policy(str(tmp_path))
    (tmp_path / "a.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_policy(str(tmp_path / "a.toml"))


def test_a_policy_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        read_policy("heavy").fog.probability = 1.0


def test_a_file_of_windows_editor_is_read(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbf[flip]\r\nprobability = 0.5\r\n")
    assert read_policy(str(tmp_path / "a.toml")).flip.probability == 0.5


def test_what_is_on_is_named_as_it_was_asked_for():
    for name in ("light", "heavy"):
        assert name_of(in_use(read_policy(name))) == name
    assert name_of({"flip": {}, "fog": {}}) == "a policy of flip, fog"
