"""Several taps of one detector in one cache: one pass, each at its own grid, each refreshed alone."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import CHANNELS, SIZE

from kdcache.cache.copy import copy_cache
from kdcache.cache.info import describe
from kdcache.cache.picture import save_rows
from kdcache.cache.reader import Cache
from kdcache.cache.thin import Thinning
from kdcache.cache.verify import verify
from kdcache.errors import ConfigError, FingerprintError, ModelError
from kdcache.precompute.dataset import folder_dataset
from kdcache.precompute.plan import plan
from kdcache.precompute.recheck import verify_with_models
from kdcache.precompute.refresh import refresh
from kdcache.precompute.yolo import Yolo
from kdcache.standins import TAP, save_detector

COARSE, FINE = "relu_3", "relu_1"
TAPS = (TAP, COARSE, FINE)
GRIDS = {TAP: (2 * CHANNELS, 8, 8), COARSE: (CHANNELS, 4, 4), FINE: (32, 16, 16)}


@pytest.fixture(scope="module")
def several(standins, tmp_path_factory):
    """A cache of three taps, never to be written to."""
    path = tmp_path_factory.mktemp("taps") / "c"
    standins.extract(path, yolo_target_layer=TAPS)
    return Cache(path)


def test_each_tap_is_what_the_detector_gives_for_it_alone(standins, tmp_path, several):
    standins.extract(tmp_path / "c", yolo_target_layer=TAPS, precision="float32", limit=4)
    for name in TAPS:
        yolo = Yolo(standins.detector, taps=[name], expects="rgb01", device="cpu", size_px=SIZE)
        for row in Cache(tmp_path / "c"):
            (alone,) = yolo.features(row.image[None]).values()
            assert row.features[name].shape == GRIDS[name]
            assert np.allclose(row.features[name], alone[0], rtol=1e-5, atol=1e-6)
    assert several.taps == list(TAPS)


def test_one_pass_of_the_detector_gives_all_taps(standins, tmp_path, monkeypatch):
    seen, features = [], Yolo.features

    def counted(self, images, *form):
        seen.append(len(images))
        return features(self, images, *form)

    monkeypatch.setattr(Yolo, "features", counted)
    standins.extract(tmp_path / "c", limit=4)
    standins.extract(tmp_path / "c")
    alone = len(seen)
    seen.clear()
    standins.extract(tmp_path / "d", yolo_target_layer=TAPS, limit=4)
    standins.extract(tmp_path / "d", yolo_target_layer=TAPS)
    assert len(seen) == alone


def test_repeated_channels_are_stored_once_where_a_tap_has_some(several):
    factors = {tap.name: [group.factor for group in tap.groups] for tap in several.manifest.taps}
    assert factors == {TAP: [1, 2], COARSE: [1], FINE: [1]}


def test_bytes_are_those_of_each_tap_and_as_planned(standins, several, tmp_path):
    dataset = folder_dataset(standins.images, standins.masks)
    config = standins.config(yolo_target_layer=TAPS)
    found = plan(config, dataset, tmp_path / "p", device="cpu", picture=tmp_path / "p.png")
    facts = describe(several)
    assert abs(found.bytes / facts["bytes"]["total"] - 1) < 0.05
    for name in TAPS:
        standins.extract(tmp_path / name, yolo_target_layer=name)
        (alone,) = describe(Cache(tmp_path / name))["bytes"]["features"].values()
        assert facts["bytes"]["features"][name] == alone


def test_models_agree_with_every_tap(standins, several):
    report = verify_with_models(several.path, yolo=standins.detector, rows=3, device="cpu")
    assert report.ok
    assert set(report.models) == {tap.folder for tap in several.manifest.taps}


def test_a_copy_of_one_tap_is_an_extraction_of_it(standins, several, tmp_path):
    copy_cache(several.path, tmp_path / "copy", Thinning(taps=[COARSE]))
    standins.extract(tmp_path / "alone", yolo_target_layer=COARSE)
    ours, alone = (Cache(tmp_path / name) for name in ("copy", "alone"))
    assert ours.manifest == alone.manifest
    assert [c.objects for c in ours.commits] == [c.objects for c in alone.commits]


def test_other_taps_are_refused_by_name(standins, tmp_path):
    standins.extract(tmp_path / "c", limit=2, yolo_target_layer=TAPS)
    with pytest.raises(FingerprintError, match=f"yolo_target_layer = {TAP}, {COARSE}, {FINE}, now"):
        standins.extract(tmp_path / "c", yolo_target_layer=TAPS[:2])


def test_a_tap_that_is_not_there_is_named_among_several(standins, tmp_path):
    with pytest.raises(ModelError, match="no tensor 'relu_9'.*nearest: relu_"):
        standins.extract(tmp_path / "c", yolo_target_layer=(TAP, "relu_9"))


def test_taps_of_one_folder_are_refused_before_anything_is_written(standins, tmp_path, monkeypatch):
    monkeypatch.setattr("kdcache.cache.layout.TapSpec.folder", "features/same")
    with pytest.raises(ConfigError, match=f"--tap {TAP} and --tap {COARSE} would be stored in one"):
        standins.extract(tmp_path / "c", yolo_target_layer=(TAP, COARSE))
    assert not (tmp_path / "c").exists()


def test_one_tap_is_refreshed_and_the_others_keep_their_files(standins, tmp_path):
    standins.extract(tmp_path / "c", yolo_target_layer=TAPS)
    before = [dict(row.features) for row in Cache(tmp_path / "c")]
    refresh(standins.config(), tmp_path / "c", COARSE, device="cpu")
    after = Cache(tmp_path / "c")
    assert verify(tmp_path / "c").ok
    generations = {tap.name: tap.generation for tap in after.manifest.taps}
    assert generations == {TAP: 0, COARSE: 1, FINE: 0}
    for row, old in zip(after, before, strict=True):
        for name in TAPS:
            assert np.array_equal(row.features[name], old[name])


def test_taps_of_two_detectors_are_refused_and_all_are_refreshed_together(standins, tmp_path):
    standins.extract(tmp_path / "c", yolo_target_layer=TAPS)
    save_detector(tmp_path / "other.onnx", channels=CHANNELS, seed=1)
    config = standins.config(yolo_onnx_path=tmp_path / "other.onnx")
    with pytest.raises(
        FingerprintError, match="other taps were made with yolo_sha256.*--refresh d"
    ):
        refresh(config, tmp_path / "c", COARSE, device="cpu")
    report = refresh(config, tmp_path / "c", "detector", device="cpu")
    assert report.rows == 10
    checked = verify_with_models(tmp_path / "c", yolo=tmp_path / "other.onnx", rows=3, device="cpu")
    assert checked.ok
    standins.extract(tmp_path / "d", yolo_target_layer=TAPS, yolo_onnx_path=tmp_path / "other.onnx")
    for ours, theirs in zip(Cache(tmp_path / "c"), Cache(tmp_path / "d"), strict=True):
        assert all(np.array_equal(ours.features[t], theirs.features[t]) for t in TAPS)


def test_the_picture_shows_every_tap(several, tmp_path):
    save_rows(tmp_path / "rows.png", several, 2)
    assert (tmp_path / "rows.png").stat().st_size > 1000
