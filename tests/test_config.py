"""Settings: sources, types, and helpful refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdcache.config import DEFAULT_CONFIG, LOSSES, ExtractConfig, TrainConfig, load
from kdcache.errors import ConfigError


def test_defaults_are_the_design_documents():
    train, extract = load(TrainConfig, DEFAULT_CONFIG), load(ExtractConfig, DEFAULT_CONFIG)
    weights = (1.0, 0.5, 0.5, 1.0, 0.5)
    names = ("kl", "mse", "bce", "dice", "feature")
    assert tuple(getattr(train, f"{name}_weight") for name in names) == weights
    assert (train.learning_rate, train.batch_size, train.epochs) == (1e-4, 4, 50)
    assert (train.temperature, train.projection_hidden_dim) == (3.0, 768)
    assert train.student_encoder == "timm-efficientnet-b0"
    assert extract.yolo_target_layer == ("segmentation_model_34_Concat_output_0",)
    assert (extract.size, extract.precision, extract.shard_rows) == (640, "int8", 32)


def test_later_sources_win_and_one_file_serves_both_stages(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('epochs = 7\nbatch_size = 2\nyolo_target_layer = "/model.14/Concat_output_0"\n')
    config = load(
        TrainConfig, str(file), ["batch_size=8", "kl_scale=T2"], {"epochs": None, "seed": 3}
    )
    assert (config.epochs, config.batch_size, config.kl_scale, config.seed) == (7, 8, "T2", 3)
    assert load(ExtractConfig, str(file)).yolo_target_layer == ("/model.14/Concat_output_0",)


def test_resolved_settings_read_back(tmp_path):
    config = TrainConfig(min_lr=1e-7, mixed_precision=True, encoder_weights='a "quoted" path')
    (tmp_path / "c.toml").write_text(config.to_toml())
    assert load(TrainConfig, str(tmp_path / "c.toml")) == config


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["feature_wieght=1"], "unknown setting 'feature_wieght'; nearest known: feature_weight"),
        (["epochs=many"], "epochs = 'many'"),
        (["epochs=0"], "epochs = 0.*greater"),
        (["epochs"], "expected key=value"),
        (["optimizer=SGD"], "AdamW"),
        (["temperature=-1"], "temperature = -1"),
        (["temperature=1e300"], r"temperature = 1e\+300"),
        (["epochs=true"], "true and false are for switches"),
        (["learning_rate=true"], "true and false are for switches"),
        (["epochs=1\nbatch_size=7"], "epochs = '1"),
        (["size=64"], "--set size: a setting of the other stage"),
        ([f"{n}_weight=0" for n in LOSSES], "^all loss weights are 0"),
    ],
)
def test_bad_settings_are_refused_by_name(assignments, message):
    with pytest.raises(ConfigError, match=message):
        load(TrainConfig, assignments=assignments)


@pytest.mark.parametrize(("size", "offer"), [(650, "640 or 672"), (20, "use 32")])
def test_size_must_be_a_multiple_of_32(size, offer):
    with pytest.raises(ConfigError, match=f"{size}.*multiple of 32.*{offer}"):
        load(ExtractConfig, flags={"size": size})


def test_missing_and_broken_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=f"no such file.*{DEFAULT_CONFIG}"):
        load(TrainConfig, str(tmp_path / "absent.toml"))
    (tmp_path / "broken.toml").write_text("epochs = = 3")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(TrainConfig, str(tmp_path / "broken.toml"))


def test_a_path_is_a_string_without_quotes():
    config = load(ExtractConfig, assignments=["teacher_checkpoint=ext_extractor/2020-09-23a.pth"])
    assert config.teacher_checkpoint == Path("ext_extractor/2020-09-23a.pth")


@pytest.mark.parametrize("text", ["w😀/weights.safetensors", 'a "b" \\ c', "日本語"])
def test_every_path_survives_the_run_folder(tmp_path, text):
    config = TrainConfig(encoder_weights=text)
    (tmp_path / "c.toml").write_text(config.to_toml(), encoding="utf-8")
    assert load(TrainConfig, str(tmp_path / "c.toml")) == config


@pytest.mark.parametrize(
    "assignment", ["learning_rate=inf", "kl_weight=nan", "seed=99999999999999999999999"]
)
def test_numbers_that_training_cannot_use_are_refused(assignment):
    with pytest.raises(ConfigError, match=assignment.split("=")[0]):
        load(TrainConfig, assignments=[assignment])


@pytest.mark.parametrize(
    ("value", "levels"), [("none", 0), ("last:1", 1), ("last:5", 5), ("all", 5)]
)
def test_trained_levels_of_the_encoder(value, levels):
    assert TrainConfig(train_encoder=value).trained_levels == levels


@pytest.mark.parametrize("value", ["last", "last:0", "last:6", "first:1", ""])
def test_unknown_train_encoder_is_refused(value):
    with pytest.raises(ConfigError, match="last:1 to last:5"):
        load(TrainConfig, assignments=[f"train_encoder={value}"])


@pytest.mark.parametrize("text", ["1", '"1"', "'1'"])
def test_kl_scale_1_is_taken_as_a_number_too(text):
    assert load(TrainConfig, assignments=[f"kl_scale={text}"]).kl_scale == "1"


def test_taps_are_lists_or_a_single_name(tmp_path):
    given = ['feature_taps=["a","b"]', "tap_weights=[1,3]", 'student_tap=["encoder","decoder"]']
    several = load(TrainConfig, assignments=given)
    assert (several.feature_taps, several.tap_weights) == (("a", "b"), (1.0, 3.0))
    assert several.student_tap == ("encoder", "decoder")
    (tmp_path / "c.toml").write_text(several.to_toml())
    assert load(TrainConfig, str(tmp_path / "c.toml")) == several
    one = load(TrainConfig, assignments=["feature_taps=/a/b", "tap_weights=2"])
    assert (one.feature_taps, one.tap_weights, one.student_tap) == (("/a/b",), (2.0,), "encoder")


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["student_tap=middle"], "student_tap = 'middle': expected encoder or decoder, or a list"),
        (['student_tap=["encoder","x"]'], "student_tap = .*expected encoder or decoder"),
        (["student_tap=[]"], r"student_tap = \[\]: expected encoder or decoder"),
        (['feature_taps=["a","a"]'], "feature_taps = .*each once"),
        (["tap_weights=[1,0]"], "tap_weights = .*above 0, .* left out of feature_taps"),
        (["tap_weights=[1e-300,1e300,1]"], "tap_weights = .*none of them below 1e-06 of their sum"),
        (["feature_taps=[a,b]"], "not a TOML value .*stand in quotes, which the shell must leave"),
        (["tap_weights=1,2"], r"tap_weights = '1,2': expected a list, in brackets: \[1,2\]"),
        (["tap_weights=[1,true]"], "true and false are for switches"),
        (["tap_weights=[1,nan]"], "tap_weights.*finite"),
        (
            ["feature_taps=a", "tap_weights=[1,2]"],
            "^tap_weights holds 2 values, feature_taps 1 names",
        ),
        (['feature_taps=["a","b"]', 'student_tap=["encoder"]'], "^student_tap holds 1 values"),
        (["layer_weights=free"], "layer_weights = 'free'.*'fixed' or 'learned'"),
        (["layer_regularisation=-1"], "layer_regularisation = -1"),
        (["feature_attention=people"], "feature_attention = 'people'"),
    ],
)
def test_settings_of_taps_that_cannot_be_are_refused(assignments, message):
    with pytest.raises(ConfigError, match=message):
        load(TrainConfig, assignments=assignments)


def test_logits_are_used_by_their_losses_and_by_attention_to_them():
    without = {"kl_weight": 0.0, "mse_weight": 0.0}
    attending = without | {"feature_attention": "teacher_uncertainty"}
    assert TrainConfig().uses_logits
    assert not TrainConfig(**without).uses_logits
    assert TrainConfig(**attending).uses_logits
    assert not TrainConfig(**attending, feature_weight=0.0).uses_logits


def test_a_base_lies_under_the_config(tmp_path):
    (tmp_path / "stored.toml").write_text("epochs = 7\nseed = 3")
    (tmp_path / "mine.toml").write_text("seed = 4")
    base, config = str(tmp_path / "stored.toml"), str(tmp_path / "mine.toml")
    settings = load(TrainConfig, config, flags={"batch_size": 2}, base=base)
    assert (settings.epochs, settings.seed, settings.batch_size) == (7, 4, 2)
