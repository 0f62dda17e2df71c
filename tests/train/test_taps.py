"""Training on several taps, from their cache to the evaluation of the student."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import assert_resumes_bit_for_bit, config, metrics, state_digest, tapped_cache, train

from kdcache.bench import bench
from kdcache.cache.reader import Cache
from kdcache.cli import main
from kdcache.config import TrainConfig, load
from kdcache.errors import CacheError, RunError
from kdcache.train import loop
from kdcache.train.prepare import Start
from kdcache.train.run_folder import read_checkpoint
from kdcache.train.together import train_together

P8, P16 = "/neck/p8", "/neck/p16"


@pytest.fixture(scope="module")
def tapped(tmp_path_factory):
    """A cache with taps at the strides 8 and 16, never to be written to."""
    return tapped_cache(tmp_path_factory.mktemp("tapped") / "c", 8, 16)


@pytest.fixture(scope="module")
def run(tapped, tmp_path_factory):
    """A finished run of both taps, one in each part of the student, never to be written to."""
    path = tmp_path_factory.mktemp("runs") / "run"
    train(tapped, path, epochs=2, student_tap=["encoder", "decoder"], tap_weights=[1, 3])
    return path


def test_every_tap_is_measured_and_the_total_is_their_weighted_sum(run):
    for line in metrics(run):
        of_taps = [line[f"train_feature_neck_{p}"] for p in ("p8", "p16")]
        expected = 0.25 * of_taps[0] + 0.75 * of_taps[1]
        assert line["train_feature"] == pytest.approx(expected, rel=1e-5)
        settings = config()
        names = ("kl", "mse", "bce", "dice", "feature")
        total = sum(getattr(settings, f"{name}_weight") * line[f"train_{name}"] for name in names)
        assert line["train_total"] == pytest.approx(total, rel=1e-5)
        of_taps = [line[f"val_feature_loss_neck_{p}"] for p in ("p8", "p16")]
        expected = 0.25 * of_taps[0] + 0.75 * of_taps[1]
        assert line["val_feature_loss"] == pytest.approx(expected, rel=1e-5)
        assert not any("layer_weight" in name for name in line)  # they are as they were given
    events = EventAccumulator(str(run / "logs"))
    events.Reload()
    assert "train/train_feature_neck_p16" in events.Tags()["scalars"]


def test_the_record_says_where_each_projection_begins(run):
    assert json.loads((run / "run.json").read_text())["taps"] == [
        {"name": P8, "student_tap": "encoder", "stride": 8},
        {"name": P16, "student_tap": "decoder", "stride": 16},
    ]
    weights = read_checkpoint(run / "checkpoints/best.pt")["projections"]
    channels = [tuple(weights[f"each.{n}.{k}.weight"].shape[:2]) for n in (0, 1) for k in (0, 3)]
    assert channels == [(768, 40), (6, 768), (768, 256), (8, 768)]


def test_evaluate_gives_each_taps_loss_and_the_epochs_own(tapped, run, tmp_path):
    arguments = ["evaluate", run, tapped.path, "--json", "--csv", tmp_path / "i.csv"]
    result = CliRunner().invoke(main, [*map(str, arguments), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    lines = metrics(run)
    best = max(lines, key=lambda line: line["val_student_miou"])
    for key in ("feature_loss", "feature_loss_neck_p8", "feature_loss_neck_p16", "dice"):
        assert found[key] == pytest.approx(best[f"val_{key}"], rel=1e-5), key
    with (tmp_path / "i.csv").open() as file:
        images = list(csv.DictReader(file))
    assert all(float(image["feature_loss_neck_p16"]) > 0 for image in images)
    text = CliRunner().invoke(main, ["evaluate", str(run), str(tapped.path), "--device", "cpu"])
    assert "feature loss" in text.stdout


def test_bench_times_steps_of_all_taps_of_a_run(tapped, run, monkeypatch):
    monkeypatch.setattr("kdcache.bench.costs", lambda *arguments: [])
    both = bench(tapped, run=run, steps=1, device="cpu")
    assert both.images_per_s > 0
    (run_of_one := run.parent / "one").mkdir()
    (run_of_one / "config.toml").write_text(config(feature_taps=[P8]).to_toml())
    assert bench(tapped, run=run_of_one, steps=0, device="cpu").row_bytes < both.row_bytes


def test_only_the_named_taps_are_read(tapped, tmp_path, monkeypatch):
    read, original = set(), Cache.read_stored

    def noted(self, row, array, out):
        read.add(array)
        return original(self, row, array, out)

    monkeypatch.setattr(Cache, "read_stored", noted)
    train(tapped, tmp_path / "run", epochs=1, feature_taps=[P16])
    assert {array for array in read if array.startswith("features/")} == set(
        tapped.arrays_of(tapped.tap(P16))
    )
    (line,) = metrics(tmp_path / "run")
    assert [name for name in line if name.startswith("train_feature")] == ["train_feature"]


def test_the_order_of_the_names_is_the_order_of_the_settings(tapped, run, tmp_path):
    """The other way round is the same training but for which projection is drawn first."""
    train(tapped, tmp_path / "run", epochs=1, feature_taps=[P16, P8], tap_weights=[3, 1],
          student_tap=["decoder", "encoder"])  # fmt: skip
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert [tap["name"] for tap in record["taps"]] == [P16, P8]
    line = metrics(tmp_path / "run")[0]
    expected = 0.75 * line["train_feature_neck_p16"] + 0.25 * line["train_feature_neck_p8"]
    assert line["train_feature"] == pytest.approx(expected, rel=1e-5)


def test_one_tap_trains_the_same_whether_its_weight_is_fixed_or_learned(tapped, tmp_path):
    one = {"epochs": 1, "feature_taps": [P8], "student_tap": "decoder"}
    for name, changes in {
        "plain": {},
        "learned": {"layer_weights": "learned", "tap_weights": [0.3], "student_tap": ["decoder"]},
    }.items():
        train(tapped, tmp_path / name, **(one | changes))
    assert state_digest(tmp_path / "plain") == state_digest(tmp_path / "learned")
    assert metrics(tmp_path / "plain") == metrics(tmp_path / "learned")


LEARNED = {"layer_weights": "learned", "tap_weights": [1, 3], "epochs": 2, "batch_size": 1,
           "feature_attention": "feature_energy", "student_tap": "decoder"}  # fmt: skip


def test_learned_weights_move_stay_shares_and_resume_bit_for_bit(tapped, tmp_path):
    assert_resumes_bit_for_bit(tapped, tmp_path, 5, **LEARNED)
    for line in metrics(tmp_path / "whole"):
        weights = [line[f"train_layer_weight_neck_{p}"] for p in ("p8", "p16")]
        assert sum(weights) == pytest.approx(1, abs=1e-6)
        assert weights[0] != 0.25
        assert 0 < weights[0] < 1


def test_runs_of_other_taps_train_together_as_apart(tapped, tmp_path):
    settings = [
        config(epochs=1, feature_taps=[P16], feature_positions=10),
        config(epochs=1, student_tap=["decoder", "encoder"], layer_weights="learned"),
        config(epochs=1, feature_taps=[P8], feature_attention="teacher_uncertainty",
               kl_weight=0.0, mse_weight=0.0),
        config(epochs=1, feature_weight=0.0),
    ]  # fmt: skip
    starts = [Start(out=tmp_path / f"t{n}", config=one) for n, one in enumerate(settings)]
    train_together(tapped.path, starts, device="cpu")
    for n, one in enumerate(settings):
        loop.train(tapped.path, tmp_path / f"a{n}", one, device="cpu")
        assert metrics(tmp_path / f"t{n}") == metrics(tmp_path / f"a{n}")
        assert state_digest(tmp_path / f"t{n}") == state_digest(tmp_path / f"a{n}")


@pytest.mark.parametrize("kind", ["mask", "teacher_uncertainty", "feature_energy"])
def test_attention_changes_the_feature_loss_and_nothing_else(tapped, tmp_path, kind):
    """With the projections apart from the student, as in the design document."""
    one = {"epochs": 1, "feature_taps": [P8]}
    train(tapped, tmp_path / "plain", **one)
    train(tapped, tmp_path / "run", feature_attention=kind, **one)
    (plain,), (attended,) = metrics(tmp_path / "plain"), metrics(tmp_path / "run")
    assert attended["train_feature"] != plain["train_feature"]
    assert attended["train_feature"] == pytest.approx(plain["train_feature"], rel=0.5)
    names = {n for n in plain if "feature" not in n and n != "train_total"}
    assert {n: plain[n] for n in names} == {n: attended[n] for n in names}


def test_init_from_takes_over_the_projections_to_the_same_taps(tapped, run, tmp_path, caplog):
    best = read_checkpoint(run / "checkpoints/best.pt")["projections"]

    def begin(name, **changes):
        settings = config(epochs=1, learning_rate=1e-30, **changes)
        loop.train(tapped.path, tmp_path / name, settings, device="cpu", init_from=run)
        return read_checkpoint(tmp_path / name / "checkpoints/last.pt")["projections"]

    found = begin("swapped", feature_taps=[P16, P8], student_tap=["decoder", "encoder"])
    for ours, theirs in ((0, 1), (1, 0)):
        assert torch.equal(found[f"each.{ours}.0.weight"], best[f"each.{theirs}.0.weight"])
    assert found["shares"].tolist() == [0.5, 0.5]
    assert "afresh" not in caplog.text
    found = begin("elsewhere")  # both in the encoder
    assert torch.equal(found["each.0.0.weight"], best["each.0.0.weight"])
    assert f"its projection to {P16} has another shape" in caplog.text
    one = tmp_path / "one"
    train(tapped, one, epochs=1, feature_taps=[P8])
    loop.train(tapped.path, tmp_path / "two", config(epochs=1), device="cpu", init_from=one)
    assert f"it has no projection to {P16}; ours starts afresh" in caplog.text


def test_the_reach_of_each_tap_is_told(tapped, tmp_path, caplog):
    caplog.set_level("INFO", "kdcache")
    train(tapped, tmp_path / "run", epochs=1, student_tap=["encoder", "decoder"],
          tap_weights=[1, 3], layer_weights="learned")  # fmt: skip
    table = next(r.message for r in caplog.records if "parameters reached by" in r.message)
    rows = {line.split()[0]: line for line in table.splitlines()[1:]}
    assert list(rows) == [
        "kl",
        "mse",
        "bce",
        "dice",
        "feature",
        "feature_neck_p8",
        "feature_neck_p16",
    ]
    assert rows["feature"].endswith("13 of 13")
    assert rows["feature_neck_p8"].split()[1] == "0.125"
    assert rows["feature_neck_p16"].split()[1] == "0.375"
    assert rows["feature_neck_p8"].count("none") == 7
    assert f"the feature loss of {P8} trains only the projection" in caplog.text
    assert "--set student_tap=decoder or --set train_encoder=last:3 let it" in caplog.text


@pytest.mark.parametrize(
    ("stride", "ways"),
    [
        (16, "student_tap=decoder or --set train_encoder=last:2 let it"),
        (32, "of the student: --set train_encoder=last:1 let it"),
        (2, "student_tap=decoder or --set train_encoder=last:5 let it"),
    ],
)
def test_the_way_to_reach_the_student_is_that_of_the_taps_stride(tmp_path, caplog, stride, ways):
    cache = tapped_cache(tmp_path / "c", stride, rows=3, val=0)
    train(cache, tmp_path / "run", epochs=1)
    assert ways in caplog.text


def test_the_way_leaves_taps_where_they_are_that_reach_it_already(tmp_path, caplog):
    cache = tapped_cache(tmp_path / "c", 8, 32, rows=3, val=0)
    train(cache, tmp_path / "run", epochs=1, train_encoder="last:1")
    assert "of /neck/p8 trains only the projection" in caplog.text
    way = '["decoder","encoder"]'
    assert f"--set 'student_tap={way}' or --set train_encoder=last:3 let it" in caplog.text
    caplog.clear()
    found = load(TrainConfig, assignments=[f"student_tap={way}"]).student_tap
    train(cache, tmp_path / "other", epochs=1, train_encoder="last:1", student_tap=found)
    assert "trains only the projection" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"feature_taps": ["/neck/p9"]},
            CacheError,
            "no tap '/neck/p9'; it has /neck/p8, /neck/p16",
        ),
        ({"tap_weights": [1, 1, 1]}, RunError, r"3 values, .* of 2 taps \(/neck/p8, /neck/p16\)"),
        ({"student_tap": ["encoder"]}, RunError, "names 1 parts, the feature loss is of 2 taps"),
    ],
)
def test_settings_that_do_not_fit_the_caches_taps_are_refused(
    tapped, tmp_path, changes, error, message
):
    with pytest.raises(error, match=message):
        train(tapped, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_grid_that_the_student_lacks_is_refused_before_anything_is_written(tmp_path):
    cache = tapped_cache(tmp_path / "c", 8, 1, rows=3, val=0)
    with pytest.raises(RunError, match=r"/neck/p1 is 8×64×64 .* stride 1 of 64 px.*to decoder"):
        train(cache, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train(cache, tmp_path / "run", epochs=1, student_tap="decoder")
    assert metrics(tmp_path / "run")[0]["train_feature_neck_p1"] > 0


def test_uncertainty_needs_the_teachers_logits(tmp_path):
    cache = tapped_cache(tmp_path / "c", 8, logits=False)
    without = {"kl_weight": 0.0, "mse_weight": 0.0, "epochs": 1}
    with pytest.raises(RunError, match="no teacher logits; .*--set feature_attention=none"):
        train(cache, tmp_path / "run", feature_attention="teacher_uncertainty", **without)
    train(cache, tmp_path / "run", feature_attention="mask", **without)
    assert load_file(tmp_path / "run/student_last.safetensors")
    (line,) = metrics(tmp_path / "run")
    assert line["val_feature_loss"] > 0
