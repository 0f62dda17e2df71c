"""What each of several taps counts: shares that are given, and shares that are learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from training import config, tapped_cache

from kdcache.errors import RunError
from kdcache.train import losses
from kdcache.train.loader import read_batches
from kdcache.train.parallel import Processes
from kdcache.train.prepare import new_state
from kdcache.train.projection import Projection, Projections, feature_losses
from kdcache.train.step import _positions, all_losses, forward, read, take_step, trained_model

P8, P16 = "/neck/p8", "/neck/p16"


@pytest.fixture(scope="module")
def tapped(tmp_path_factory):
    """A cache with taps at the strides 8 and 16, never to be written to."""
    return tapped_cache(tmp_path_factory.mktemp("tapped") / "c", 8, 16)


def state_of(cache, settings):
    torch.manual_seed(0)
    return new_state(cache, settings, cache.manifest.taps, "random", "cpu")


def batches_of(cache, *groups):
    return list(read_batches(cache, groups, "cpu", cache.taps))


def projections(shares, learned=True):
    of_taps = {f"tap {n}": Projection(1, 1, 1) for n in range(len(shares))}
    return Projections(of_taps, shares, learned)


def test_shares_are_the_weights_scaled_and_equal_ones_by_default():
    assert config().tap_shares(3) == (1 / 3, 1 / 3, 1 / 3)
    assert config(tap_weights=[1, 3]).tap_shares(2) == (0.25, 0.75)
    assert config(tap_weights=[0.1]).tap_shares(1) == (1.0,)


@pytest.mark.parametrize("learned", [False, True])
def test_total_is_the_weighted_sum(learned):
    some = projections([0.2, 0.3, 0.5], learned)
    values = [1.5, 0.25, 4.0]
    expected = np.dot([0.2, 0.3, 0.5], values)
    of_taps = {tap: torch.tensor(value) for tap, value in zip(some.taps, values, strict=True)}
    assert some.total(of_taps).item() == pytest.approx(expected, rel=1e-6)
    assert some.divergence().item() == pytest.approx(0, abs=1e-7)
    assert (some.departure is None) == (not learned)


def test_divergence_is_kl_from_the_shares():
    shares, departure = np.array([0.2, 0.3, 0.5]), np.array([1.0, -0.5, 0.25])
    some = projections(shares.tolist())
    some.departure.data = torch.from_numpy(departure).float()
    weights = shares * np.exp(departure)
    weights /= weights.sum()
    assert some.weights.tolist() == pytest.approx(weights.tolist(), rel=1e-5)
    expected = (weights * np.log(weights / shares)).sum()
    assert some.divergence().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("strength", [0.1, 1.0])
def test_learned_weights_come_to_the_closed_form(strength):
    """Of losses that stay what they are: w ∝ w0·exp(−L/λ)."""
    shares, values = np.array([0.2, 0.3, 0.5]), np.array([0.9, 0.7, 0.8])
    some = projections(shares.tolist())
    optimizer = torch.optim.AdamW([some.departure], lr=0.02, weight_decay=0.0)
    of_taps = {tap: torch.tensor(v).float() for tap, v in zip(some.taps, values, strict=True)}
    for _ in range(1000):
        optimizer.zero_grad()
        (some.total(of_taps) + strength * some.divergence()).backward()
        optimizer.step()
    expected = shares * np.exp(-values / strength)
    expected /= expected.sum()
    assert some.weights.tolist() == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("learned", [False, True])
def test_a_single_tap_weighs_exactly_1_and_learns_nothing_of_it(learned):
    single = projections(config(tap_weights=[0.3]).tap_shares(1), learned)
    assert single.weights.tolist() == [1.0]
    assert [name for name, _ in single.named_parameters()] == [
        f"each.0.{n}.{kind}" for n in (0, 1, 3) for kind in ("weight", "bias")
    ]
    loss = torch.tensor(0.1234567, requires_grad=True)
    single.total({"tap": loss}).backward()
    assert single.total({"tap": loss}).item() == loss.item()
    assert loss.grad.item() == 1.0


def test_losses_of_taps_are_those_of_each_projection_alone(tapped):
    settings = config(tap_weights=[1, 3], student_tap="decoder", feature_weight=2.0)
    state, (batch,) = state_of(tapped, settings), batches_of(tapped, [0, 1, 2])
    output = forward(trained_model(state, settings, Processes()), batch, settings)
    values = all_losses(output, state.projections, batch, settings, 3.0)
    alone = [
        losses.feature_mse(feature, batch.features[tap], batch.mask).item()
        for tap, feature in zip((P8, P16), output.features, strict=True)
    ]
    assert [values[f"feature_neck_{p}"].item() for p in ("p8", "p16")] == alone
    assert values["feature"].item() == pytest.approx(np.dot([0.25, 0.75], alone), rel=1e-6)
    assert output.features[0].shape == (3, 6, 8, 8)
    assert output.features[1].shape == (3, 8, 4, 4)


def test_the_cost_of_leaving_the_shares_is_that_of_the_step_however_it_is_cut(tapped):
    settings = config(layer_weights="learned", layer_regularisation=0.5)
    state = state_of(tapped, settings)
    state.projections.departure.data = torch.tensor([1.0, -1.0])
    state.projections.eval()  # a batch's statistics would depend on its size
    parts = batches_of(tapped, [0], [1, 2, 3])
    masks = torch.cat([batch.mask for batch in parts])
    (whole,) = batches_of(tapped, [0, 1, 2, 3])

    def feature(batch, per):
        output = state.student.eval()(batch.image)
        projected = output._replace(features=state.projections(output.features))
        return all_losses(projected, state.projections, batch, settings, 3.0, per)["feature"].item()

    added = sum(feature(batch, losses.counts(masks)) for batch in parts)
    assert added == pytest.approx(feature(whole, None), rel=1e-5)
    of_taps = state.projections.total(
        feature_losses(
            state.projections(state.student(whole.image).features),
            state.projections,
            whole,
            settings,
        )
    ).item()
    cost = 0.5 * state.projections.divergence().item()
    assert feature(whole, None) == pytest.approx(of_taps + cost, rel=1e-5)


def test_learned_weights_take_part_in_a_step_and_in_its_clipping(tapped):
    settings = config(layer_weights="learned", grad_clip=1e-3)
    state, (batch,) = state_of(tapped, settings), batches_of(tapped, [0, 1, 2])
    model = trained_model(state, settings, Processes()).train()
    list(read([take_step(model, state, [batch], settings, 3.0, Processes())]))
    assert state.projections.departure.abs().min() > 0
    assert state.projections.weights.sum().item() == pytest.approx(1)
    norm = torch.nn.utils.get_total_norm([p.grad for p in state.projections.parameters()])
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)
    *_, projections, learned = state.optimizer.param_groups
    assert (projections["lr_factor"], learned["lr_factor"]) == (1, settings.layer_lr_factor)
    assert len(learned["params"]) == 1


def test_positions_are_drawn_for_each_tap_and_of_one_tap_as_ever(tapped):
    (batch,) = batches_of(tapped, [0])

    def drawn(taps, number):
        torch.manual_seed(5)
        return _positions(batch, taps, config(feature_positions=number))

    torch.manual_seed(5)
    first, second = torch.randperm(64)[:10], torch.randperm(16)[:10]
    (alone,) = drawn([P8], 10)
    assert torch.equal(alone, first)
    found = drawn([P8, P16], 10)
    assert torch.equal(found[0], first)
    assert torch.equal(found[1], second)
    assert drawn([P8, P16], 20)[1] is None  # the smaller grid has 16
    assert drawn([P8, P16], 0) is None


def test_drawn_positions_of_every_tap_are_projected_and_attended(tapped):
    settings = config(feature_positions=12, feature_attention="feature_energy")
    state, (batch,) = state_of(tapped, settings), batches_of(tapped, [0, 1])
    shapes = []
    for projection in state.projections.each:
        projection.register_forward_hook(lambda module, given, made: shapes.append(made.shape[2:]))
    model = trained_model(state, settings, Processes()).train()
    (values,) = read([take_step(model, state, [batch], settings, 3.0, Processes())])
    assert shapes == [(12, 1), (12, 1)]
    assert values["feature_neck_p8"] > 0


def test_too_few_positions_name_the_setting(tapped):
    settings = config(feature_positions=1)
    state, (batch,) = state_of(tapped, settings), batches_of(tapped, [0])
    model = trained_model(state, settings, Processes()).train()
    with pytest.raises(RunError, match="1 positions of 1 image .*raise feature_positions"):
        take_step(model, state, [batch], settings, 3.0, Processes())


def test_a_compiled_step_of_several_taps_is_the_same_step(tapped, monkeypatch):
    monkeypatch.setattr("kdcache.train.step._COMPILER", "aot_eager")
    plain = config(student_tap="decoder", layer_weights="learned", feature_positions=20)
    compiled = plain.model_copy(update={"compile": True})
    found = []
    for settings in (plain, compiled):
        state, (batch,) = state_of(tapped, settings), batches_of(tapped, [0, 1, 2])
        model = trained_model(state, settings, Processes()).train()
        torch.manual_seed(1)
        (values,) = read([take_step(model, state, [batch], settings, 3.0, Processes())])
        found.append(values)
    assert found[1] == pytest.approx(found[0], rel=1e-4)
