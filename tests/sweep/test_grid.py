"""Which runs a sweep has, and what they are called."""

from __future__ import annotations

import math

import pytest

from kdcache.config import TrainConfig
from kdcache.errors import ConfigError
from kdcache.sweep.grid import Range, combinations, parse_axes, run_name

BASE = TrainConfig(encoder_weights="random")


def names(axes, **options):
    return [run_name(values) for values, _ in combinations(axes, BASE, **options)]


def test_every_combination_in_order_with_all_other_settings_of_the_base():
    axes = parse_axes(["feature_weight=0,0.5", "student_tap=encoder,decoder"])
    found = combinations(axes, BASE)
    assert [run_name(values) for values, _ in found] == [
        "feature_weight=0,student_tap=encoder",
        "feature_weight=0,student_tap=decoder",
        "feature_weight=0.5,student_tap=encoder",
        "feature_weight=0.5,student_tap=decoder",
    ]
    assert found[1][1] == BASE.model_copy(update={"feature_weight": 0.0, "student_tap": "decoder"})


def test_equal_values_are_one_run():
    assert names({"kl_weight": [1, 1.0]}) == ["kl_weight=1"]


def test_a_toml_table_and_flags_are_the_same_axes():
    table = {"kl_weight": [0.5, 1], "learning_rate": "1e-5..1e-3:log"}
    by_flags = parse_axes(["kl_weight=0.5,1", "learning_rate=1e-5..1e-3:log"])
    assert parse_axes([], table) == by_flags
    assert by_flags["learning_rate"] == Range(low=1e-5, high=1e-3, log=True, whole=False)


def test_values_that_are_lists_are_tuples_with_readable_names():
    axes = parse_axes(['feature_taps=["a"],["a","b"],[]', "tap_weights=[1,3]"])
    assert axes["feature_taps"] == [("a",), ("a", "b"), ()]
    assert (
        parse_axes([], {"feature_taps": [["a"], ["a", "b"], []], "tap_weights": [[1, 3]]}) == axes
    )
    assert names({"feature_taps": axes["feature_taps"]}) == [
        "feature_taps=a",
        "feature_taps=a+b",
        "feature_taps=default",
    ]
    with pytest.raises(ConfigError, match="tap_weights holds 2 values, feature_taps 1 names"):
        names(axes)


def test_more_draws_begin_with_the_fewer_and_each_has_every_seed():
    axes = parse_axes(["learning_rate=1e-5..1e-3:log", "kl_weight=0..2", "seed=0,1"])
    few, many = names(axes, random=3), names(axes, random=8)
    assert many[: len(few)] == few
    assert (len(few), len(many)) == (6, 16)
    assert {name[-1] for name in few} == {"0", "1"}
    assert names(axes, random=3, seed=1) != few


def test_draws_keep_to_their_range():
    axes = parse_axes(["learning_rate=1e-5..1e-3:log", "kl_weight=0.0..2.0", "epochs=2..4"])
    found = [values for values, _ in combinations(axes, BASE, random=200)]
    rates = [values["learning_rate"] for values in found]
    assert min(rates) >= 1e-5
    assert max(rates) <= 1e-3
    # half of them below the geometric mean, not below the arithmetic one
    assert 70 < sum(rate < 1e-4 for rate in rates) < 130
    assert 0.8 < sum(values["kl_weight"] for values in found) / 200 < 1.2
    assert {values["epochs"] for values in found} == {2, 3, 4}
    assert all(not math.isnan(rate) for rate in rates)


def test_draws_from_a_small_grid_end_with_all_of_it():
    axes = parse_axes(["kl_weight=0.5,1", "student_tap=encoder,decoder"])
    assert sorted(names(axes, random=100)) == sorted(names(axes))


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["feature_wieght=0,1"], "nearest known: feature_weight"),
        (["size=64,96"], "no setting of training"),
        (["feature_weight"], "expected key=value"),
        (["feature_weight="], "expected key=value"),
        (["feature_weight=,"], "expected values"),
        (["kl_weight=1,2", "kl_weight=3"], "an axis already"),
        (["kl_weight=1,1"], "twice"),
        (["kl_weight=2..1"], "low < high"),
        (["learning_rate=0..1:log"], "above 0"),
        (["kl_weight=a..b"], "low < high"),
    ],
)
def test_what_cannot_be_swept_is_refused(assignments, message):
    with pytest.raises(ConfigError, match=message):
        parse_axes(assignments)


@pytest.mark.parametrize(
    ("axes", "options", "message"),
    [
        ({"kl_weight": ["many"]}, {}, "kl_weight=many cannot be trained.*kl_weight"),
        ({"epochs": [0, 1]}, {}, "epochs=0 cannot be trained"),
        (parse_axes(["kl_weight=0..1"]), {}, "say --random N"),
        (parse_axes(["seed=0..9"]), {"random": 2}, "seed=0,1,2"),
        ({}, {}, "nothing to sweep"),
    ],
)
def test_combinations_that_cannot_be_trained_are_refused(axes, options, message):
    with pytest.raises(ConfigError, match=message):
        combinations(axes, BASE, **options)


def test_names_are_folders_and_tell_values_apart():
    weird = {"encoder_weights": "/data/lite0 (1).safetensors", "kl_weight": 0.1}
    other = {"encoder_weights": "/data/lite0 [1].safetensors", "kl_weight": 0.1}
    assert "/" not in run_name(weird)
    assert run_name(weird) != run_name(other)
    long = {"encoder_weights": "x" * 500}
    assert len(run_name(long)) < 200
    assert run_name(long) != run_name({"encoder_weights": "x" * 501})
