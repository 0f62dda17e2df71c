"""Rows are mirrored with their targets only where it was measured how far that is from the models."""

from __future__ import annotations

import logging
import shutil

import pytest
from training import assert_resumes_bit_for_bit, state_digest, train

from kdcache.cache.format import Mirrored
from kdcache.cache.layout import LOGITS
from kdcache.cache.mirrored import keep, made_by
from kdcache.cache.reader import Cache
from kdcache.errors import RunError

FLIP = {"flip_targets": True, "epochs": 2}


def measured(cache, path, parts, **changes):
    """A copy of the cache that was measured."""
    shutil.copytree(cache.path, path)
    for part in parts:
        figures = {"equal_pixels": 0.98} if part == LOGITS else {"cosine": 0.75}
        model = made_by(cache.manifest, part) | changes
        one = Mirrored(rows=4, relative_mse=0.5, **figures, made_by=model)
        keep(path, {part: one})
    return Cache(path)


@pytest.fixture(scope="module")
def flippable(cache, tmp_path_factory):
    return measured(cache, tmp_path_factory.mktemp("flip") / "c", [*cache.taps, LOGITS])


def test_without_a_measurement_the_command_is_named(cache, tmp_path):
    command = f"run `kdcache verify {cache.path} --flip --yolo FILE --teacher FILE`"
    with pytest.raises(RunError, match=command):
        train(cache, tmp_path / "run", **FLIP)
    assert not (tmp_path / "run").exists()
    with pytest.raises(
        RunError, match=r"teacher_logits was not measured: .* --flip --teacher FILE`"
    ):
        train(cache, tmp_path / "run", feature_weight=0.0, **FLIP)


def test_only_what_the_run_uses_must_be_measured(cache, tmp_path):
    logits_only = measured(cache, tmp_path / "c", [LOGITS])
    with pytest.raises(RunError, match=r"Concat_output_0 was not measured: .* --flip --yolo FILE`"):
        train(logits_only, tmp_path / "run", **FLIP)
    train(logits_only, tmp_path / "run", feature_weight=0.0, **FLIP)
    labels = {"feature_weight": 0.0, "kl_weight": 0.0, "mse_weight": 0.0}
    train(cache, tmp_path / "labels", **labels, **FLIP)  # a mask may always be mirrored


@pytest.mark.parametrize("field", ["teacher_sha256", "teacher_network"])
def test_a_measurement_of_another_model_does_not_count(cache, tmp_path, field):
    stale = measured(cache, tmp_path / "c", [LOGITS], **{field: "other"})
    now = cache.manifest.fingerprint[field]
    words = f"teacher_logits was measured with {field} = other, the cache has {now} now"
    with pytest.raises(RunError, match=words):
        train(stale, tmp_path / "run", feature_weight=0.0, **FLIP)


def test_a_run_shows_what_was_measured_and_resumes_in_mid_epoch(
    flippable, tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.INFO, "kdcache")
    settings = {"student_augment": "light", **FLIP}
    assert_resumes_bit_for_bit(flippable, tmp_path, 1, **settings)
    (tap,) = flippable.taps
    assert (
        f"{tap}, mirrored: relative MSE 0.5, cosine 0.7500 (against the model on 4" in caplog.text
    )
    assert "teacher_logits, mirrored: relative MSE 0.5, 98.00% of mask pixels equal" in caplog.text
    train(flippable, tmp_path / "plain", epochs=2, student_augment="light")
    assert state_digest(tmp_path / "plain") != state_digest(tmp_path / "whole")
