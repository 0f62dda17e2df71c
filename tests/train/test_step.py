"""One step: in parts or in processes it is the step of all images at once; halves, clipping, seeds."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import distributed, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from training import tapped_cache

from kdcache.cache.format import RowKey
from kdcache.cache.reader import Cache
from kdcache.config import Attention, TrainConfig
from kdcache.errors import RunError
from kdcache.imaging import IGNORE, PADDING
from kdcache.standins import TAP
from kdcache.train import loop, losses, prepare, step
from kdcache.train.loader import Batch, read_batches
from kdcache.train.loop import _steps
from kdcache.train.parallel import Processes, joined
from kdcache.train.projection import Projection, Projections
from kdcache.train.run_folder import State
from kdcache.train.step import (
    Trainee,
    all_losses,
    build_optimizer,
    forward,
    read,
    take_step,
    trained_model,
    weighted,
)
from kdcache.train.student import Student, StudentOutput, TapPoint, build_student

CONFIG = TrainConfig(encoder_weights="random", projection_hidden_dim=16, learning_rate=3e-3)


def new_state(channels: int, config: TrainConfig = CONFIG, scale: float = 0.0) -> State:
    torch.manual_seed(0)
    points = [TapPoint(config.student_tap, 8)]
    student = build_student(config.student_encoder, "random", points, config.trained_levels)
    (own,) = student.tap_channels
    projections = Projections({TAP: Projection(own, config.projection_hidden_dim, channels)}, [1.0])
    return State(
        student=student,
        projections=projections,
        optimizer=build_optimizer(student, projections, config),
        scaler=torch.amp.GradScaler("cpu", enabled=scale > 0, init_scale=scale or 1.0),
    )


def some_batches(path: Path) -> list[Batch]:
    """Two batches of two rows; the second has an unlabelled image and a partly ignored one."""
    cache = Cache(path)
    rows = cache.rows_of("train")
    batches = list(read_batches(cache, [rows[:2], rows[2:4]], "cpu", cache.taps))
    batches[1].mask[0] = IGNORE
    batches[1].mask[1, :, :20] = IGNORE
    return batches


def gradients(state: State) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": p.grad.clone()
        for name, module in (("student", state.student), ("projections", state.projections))
        for key, p in module.named_parameters()
        if p.grad is not None
    }


def trained(state: State, batches: list[Batch], config: TrainConfig = CONFIG):
    trainee = Trainee(state.student, state.projections).train()
    (values,) = read([take_step(trainee, state, batches, config, 3.0, Processes())])
    return values


def test_two_batches_in_one_step_divide_by_what_both_hold(cache):
    """Against one graph over both outputs, the losses of the concatenated images."""
    batches = some_batches(cache.path)
    channels = cache.manifest.taps[0].shape[0]
    config = CONFIG.model_copy(update={"grad_clip": 0.0})
    ours, reference = new_state(channels), new_state(channels)
    values = trained(ours, batches, config)
    reference.student.train()
    outputs = [Trainee(reference.student, reference.projections)(b.image) for b in batches]
    joint = Batch(
        image=torch.cat([b.image for b in batches]),
        mask=torch.cat([b.mask for b in batches]),
        logits=torch.cat([b.logits for b in batches]),
        features={t: torch.cat([b.features[t] for b in batches]) for t in cache.taps},
        keys=[key for b in batches for key in b.keys],
    )
    features = zip(*(output.features for output in outputs), strict=True)
    output = StudentOutput(torch.cat([o.logits for o in outputs]), tuple(map(torch.cat, features)))
    expected = all_losses(output, reference.projections, joint, config, 3.0)
    for name, loss in expected.items():
        assert values[name] == pytest.approx(loss.item(), rel=1e-5)
    assert (values["images"], values["labelled_images"]) == (4, 3)
    weighted(expected, config).backward()
    theirs = gradients(reference)
    for key, gradient in gradients(ours).items():
        assert torch.allclose(gradient, theirs[key], rtol=1e-3, atol=1e-6), key


ONE_TAP = CONFIG
LEARNED_TAPS = CONFIG.model_copy(
    update={"layer_weights": "learned", "feature_attention": "feature_energy"}
)


def state_from(path: Path, config: TrainConfig) -> State:
    torch.manual_seed(0)
    cache = Cache(path)
    return prepare.new_state(cache, config, cache.manifest.taps, "random", "cpu")


def _one_of_two(rank: int, port: int, path: Path, out: Path, config: TrainConfig) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    batches = some_batches(path)
    with joined("cpu") as (processes, device):
        assert (processes.count, processes.rank, device) == (2, rank, "cpu")
        state = state_from(path, config)
        model = processes.wrap(Trainee(state.student, state.projections)).train()
        for _ in range(3):
            taken = take_step(model, state, [batches[rank]], config, 3.0, processes)
            (values,) = read([taken])
        assert processes.any(rank == 1, "cpu")
        assert not processes.any(False, "cpu")
        torch.save((values, gradients(state)), out / f"{rank}.pt")
        distributed.barrier()


@pytest.mark.parametrize("config", [ONE_TAP, LEARNED_TAPS], ids=["one tap", "learned taps"])
def test_two_processes_step_as_one_that_adds_up_both_halves(cache, tmp_path, free_port, config):
    """Bit for bit: both divide by the pixels, labelled pixels and images of all four rows."""
    path = cache.path if config is ONE_TAP else tapped_cache(tmp_path / "c", 8, 16).path
    context = multiprocessing.get_context("spawn")
    pair = [
        context.Process(target=_one_of_two, args=(rank, free_port, path, tmp_path, config))
        for rank in range(2)
    ]
    for process in pair:
        process.start()
    for process in pair:
        process.join()
        assert process.exitcode == 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    state = state_from(path, config)
    for _ in range(3):
        expected = trained(state, some_batches(path), config)
    torch.set_num_threads(threads)
    for rank in range(2):
        values, found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert values == pytest.approx(expected, rel=1e-6)
        assert all(torch.equal(found[k], g) for k, g in gradients(state).items())


def test_each_row_is_in_one_process_and_every_process_has_one():
    config = TrainConfig(batch_size=3, gradient_accumulation=2)
    for rows in range(3, 60):
        for count in (1, 2, 3):
            plans = [_steps(range(rows), config, Processes(rank, count)) for rank in range(count)]
            assert len({len(plan) for plan in plans}) == 1
            used = [row for plan in plans for step in plan for batch in step for row in batch]
            assert sorted(used) == list(range(rows))
            assert all(batch for plan in plans for step in plan for batch in step)
            assert max(len(batch) for plan in plans for step in plan for batch in step) <= 3


def test_one_process_takes_the_batches_in_order():
    plan = _steps(range(7), TrainConfig(batch_size=2), Processes())
    assert plan == [[[0, 1]], [[2, 3]], [[4, 5]], [[6]]]


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_half_precision_trains_close_to_float32(cache, half):
    config = CONFIG.model_copy(update={"mixed_precision": True, "half_precision": half})
    channels, batches = cache.manifest.taps[0].shape[0], some_batches(cache.path)[:1]
    whole = [trained(state, batches)["total"] for state in [new_state(channels)] for _ in range(4)]
    state = new_state(channels, scale=64.0 if half == "float16" else 0.0)
    halves = [trained(state, batches, config)["total"] for _ in range(4)]
    assert halves == pytest.approx(whole, rel=0.05)
    assert halves[-1] < halves[0]


def test_float16_skips_a_step_that_overflows_and_lowers_its_scale(cache):
    config = CONFIG.model_copy(update={"mixed_precision": True, "half_precision": "float16"})
    state = new_state(cache.manifest.taps[0].shape[0], scale=2.0**126)
    before = {k: v.clone() for k, v in state.student.unet.decoder.named_parameters()}
    trained(state, some_batches(cache.path)[:1], config)
    assert all(torch.equal(before[k], v) for k, v in state.student.unet.decoder.named_parameters())
    assert state.scaler.get_scale() == 2.0**125


def test_gradient_that_is_not_finite_stops_before_it_is_applied(cache):
    state = new_state(cache.manifest.taps[0].shape[0])
    head = next(state.student.unet.segmentation_head.parameters())
    head.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(RunError, match="gradient of the student is not finite"):
        trained(state, some_batches(cache.path)[:1])
    assert torch.isfinite(head).all()


@pytest.mark.parametrize("attention", get_args(Attention))
def test_a_step_waits_for_no_number_of_its_own(monkeypatch, attention):
    """Tensors without data, as a GPU that has not come to it yet: whoever looks at one fails."""
    monkeypatch.setattr(step, "read", lambda steps: iter([{}]))
    config = LEARNED_TAPS.model_copy(update={"feature_attention": attention})
    with FakeTensorMode():
        student = Student("timm-efficientnet-b0", [TapPoint("encoder", 8), TapPoint("decoder", 16)])
        of_taps = {f"tap {n}": Projection(c, 8, 16) for n, c in enumerate(student.tap_channels)}
        projections = Projections(of_taps, [0.5, 0.5], learned=True)
        modules = nn.ModuleList([student, projections])
        trained = [p for p in modules.parameters() if p.requires_grad]
        state = State(
            student=student,
            projections=projections,
            # AdamW counts its steps on the host, which these tensors cannot tell from a device
            optimizer=torch.optim.SGD(trained, lr=0.1),
            scaler=torch.amp.GradScaler("cpu", enabled=False),
        )
        mask = torch.empty(2, 1, 64, 64, dtype=torch.uint8)
        batch = Batch(
            image=torch.empty(2, 3, 64, 64),
            mask=mask,
            logits=torch.empty(2, 1, 64, 64),
            features={"tap 0": torch.empty(2, 16, 8, 8), "tap 1": torch.empty(2, 16, 4, 4)},
            keys=[RowKey("train", "a", 0)] * 2,
        )
        trainee = Trainee(student, projections).train()
        for _ in range(2):
            taken = take_step(trainee, state, [batch, batch], config, 3.0, Processes())
        with pytest.raises(DataDependentOutputException):
            next(read([taken]))


def test_feature_loss_at_some_positions_is_that_of_all_in_the_mean(cache):
    """And multiplies those alone; each step draws others, from the seed of its place in the run."""
    (batch,) = some_batches(cache.path)[:1]
    (target,) = batch.features.values()
    everywhere = target[0, 0].numel()
    batch.mask[:, :, :16] = PADDING
    state = new_state(target.shape[1])
    (projection,) = state.projections.eval().each  # a batch's statistics depend on its positions
    _, (feature,) = state.student(batch.image)
    for loss in losses.FEATURE_LOSSES.values():
        whole = loss(projection(feature), target, batch.mask)
        parts = torch.randperm(everywhere).split(everywhere // 4)
        some = [loss(projection(losses.at(feature, p)), target, batch.mask, None, p) for p in parts]
        assert torch.stack(some).mean().item() == pytest.approx(whole.item(), rel=1e-5)
    shapes = []
    projection.register_forward_hook(lambda module, given, made: shapes.append(made.shape))
    for number in (10, everywhere, 10**6):
        trained(state, [batch], CONFIG.model_copy(update={"feature_positions": number}))
    assert [shape[2] * shape[3] for shape in shapes] == [10, everywhere, everywhere]


def test_student_and_projection_are_clipped_apart(cache):
    channels, batches = cache.manifest.taps[0].shape[0], some_batches(cache.path)[:1]
    norms = []
    for weight in (0.5, 500.0):
        state = new_state(channels)
        trained(state, batches, CONFIG.model_copy(update={"feature_weight": weight}))
        parts = [[p.grad for p in m.parameters() if p.grad is not None]
                 for m in (state.student, state.projections)]  # fmt: skip
        norms.append([float(torch.nn.utils.get_total_norm(part)) for part in parts])
    assert norms[0][0] == norms[1][0]
    assert max(norms[1]) <= 0.5 * 1.001


def test_float16_that_never_fits_stops_instead_of_training_nothing(cache):
    config = CONFIG.model_copy(
        update={"mixed_precision": True, "half_precision": "float16", "mse_weight": 1e35}
    )
    state = new_state(cache.manifest.taps[0].shape[0], scale=64.0)
    batches, skipped = some_batches(cache.path), []
    with pytest.raises(RunError, match="not finite in float16.*half_precision=bfloat16"):
        for _ in range(10):
            skipped.append(trained(state, batches, config)["skipped"])
    assert skipped == [1.0] * 6
    assert not state.optimizer.state


def test_batch_norm_of_one_value_is_one_clear_error(cache):
    config = CONFIG.model_copy(update={"train_encoder": "all"})
    (batch,) = read_batches(cache, [[0]], "cpu", taps=[])
    tiny = dataclasses.replace(batch, image=batch.image[..., :32, :32])
    trainee = Trainee(Student("timm-efficientnet-b0", trained_levels=5), None).train()
    with pytest.raises(RunError, match="one value a channel on a batch of 1"):
        forward(trainee, tiny, config)


def test_compiled_step_is_the_same_step(cache, monkeypatch):
    """Traced and differentiated ahead of time as for the real compiler, also for a smaller batch."""
    monkeypatch.setattr(step, "_COMPILER", "aot_eager")
    channels = cache.manifest.taps[0].shape[0]
    config = CONFIG.model_copy(update={"compile": True, "student_tap": "decoder"})
    rows = cache.rows_of("train")
    batches = list(read_batches(cache, [rows[:2], rows[2:3]], "cpu", cache.taps))
    plain, compiled = new_state(channels, config), new_state(channels, config)
    model = trained_model(compiled, config, Processes()).train()
    for batch in batches:
        expected = trained(plain, [batch], config)
        (values,) = read([take_step(model, compiled, [batch], config, 3.0, Processes())])
        assert values == pytest.approx(expected, rel=1e-4)
        theirs, ours = gradients(plain), gradients(compiled)
        assert ours.keys() == theirs.keys()
        for key, gradient in ours.items():
            assert torch.allclose(gradient, theirs[key], rtol=1e-2, atol=1e-4), key


def test_without_a_compiler_the_run_does_not_begin(cache, tmp_path, monkeypatch):
    def no_compiler(graph, inputs):
        raise RuntimeError("g++ is not there")

    monkeypatch.setattr(step, "_COMPILER", no_compiler)
    with pytest.raises(RunError, match=r"compile = true: .*g\+\+ is not there.* a C\+\+ compiler"):
        loop.train(cache.path, tmp_path / "run", CONFIG.model_copy(update={"compile": True}))
    assert not (tmp_path / "run").exists()


def test_too_few_positions_for_the_projections_batchnorm_are_named(cache):
    rows = cache.rows_of("train")
    (batch,) = read_batches(cache, [rows[:1]], "cpu", cache.taps)
    state = new_state(cache.manifest.taps[0].shape[0])
    with pytest.raises(RunError, match="1 positions of 1 image .*raise feature_positions"):
        trained(state, [batch], CONFIG.model_copy(update={"feature_positions": 1}))
