"""The table of what each loss can change is what back-propagation does."""

from __future__ import annotations

import pytest
import torch

from kdcache.config import TrainConfig
from kdcache.train.loader import batches
from kdcache.train.projection import Projection, Projections
from kdcache.train.reach import find_reach, reach_text, reaches_student
from kdcache.train.step import Trainee
from kdcache.train.student import TapPoint, build_student


def reach_of(cache, tap="encoder", levels=0):
    config = TrainConfig(projection_hidden_dim=8)
    torch.manual_seed(0)
    student = build_student("timm-efficientnet-b0", "random", [TapPoint(tap, 8)], levels)
    (channels,), (tap,) = student.tap_channels, cache.manifest.taps
    projections = Projections({tap.name: Projection(channels, 8, tap.shape[0])}, [1.0])
    model = Trainee(student, projections)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = find_reach(model, next(batches(cache, 2)), config)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    return found, config


def parts(reach, loss):
    return {part for part, (count, _) in reach[loss].items() if count}


DECODER = {f"decoder {n}" for n in range(5)}


@pytest.mark.parametrize(
    ("tap", "levels", "expected"),
    [
        ("encoder", 0, {"projection"}),
        ("decoder", 0, {"projection", "decoder 0", "decoder 1"}),
        ("encoder", 2, {"projection"}),  # the tap is the third level's: levels 4 and 5 are after it
        ("encoder", 3, {"projection", "encoder"}),
        ("decoder", 1, {"projection", "decoder 0", "decoder 1", "encoder"}),
    ],
)
def test_feature_loss_reaches_what_lies_before_its_tap(cache, tap, levels, expected):
    reach, _ = reach_of(cache, tap, levels)
    assert parts(reach, "feature") == expected
    assert reaches_student(reach, "feature") == (expected != {"projection"})
    for loss in ("kl", "mse", "bce", "dice"):
        assert parts(reach, loss) == DECODER | {"head"} | ({"encoder"} if levels else set())


def test_the_table_names_every_loss_with_its_weight_and_every_part(cache):
    reach, config = reach_of(cache)
    lines = reach_text(reach, config).splitlines()
    assert lines[0].split("  ")[0] == "parameters reached by"
    assert [line.split()[:2] for line in lines[1:]] == [
        ["kl", "1"],
        ["mse", "0.5"],
        ["bce", "0.5"],
        ["dice", "1"],
        ["feature", "0.5"],
    ]
    assert "6 of 6" in lines[1]
