"""The plan says what the extraction then takes."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import SCENES, SIZE
from PIL import Image

from kdcache.cache import need
from kdcache.cli import main
from kdcache.errors import CacheError, DatasetError, ModelError
from kdcache.precompute import plan as engine
from kdcache.precompute.dataset import folder_dataset
from kdcache.precompute.plan import plan


def make_plan(standins, tmp_path, **changes):
    dataset = folder_dataset(standins.images, standins.masks)
    options = {"device": "cpu", "picture": tmp_path / "plan.png"}
    return plan(standins.config(**changes), dataset, tmp_path / "c", **options)


@pytest.mark.parametrize("precision", ["float32", "int8", "int5"])
def test_bytes_and_files_are_those_of_the_extraction(standins, tmp_path, precision):
    before = make_plan(standins, tmp_path, precision=precision, val_fraction=0.0)
    report = standins.extract(tmp_path / "c", precision=precision, val_fraction=0.0)
    assert before.rows == report.rows_total == SCENES
    assert before.bytes == pytest.approx(report.bytes_added, rel=1e-3)
    assert before.bytes == before.costs[precision].bytes
    files = sum(1 for _ in (tmp_path / "c").rglob("*"))
    assert files <= before.files <= files + 20
    assert before.costs["float32"].bytes > before.costs["int8"].bytes > before.costs["int4"].bytes


def test_a_plan_leaves_nothing_but_its_picture(standins, tmp_path):
    found = make_plan(standins, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.png"]
    with Image.open(tmp_path / "plan.png") as picture:
        assert picture.size[1] == 18 + found.check.photos * (240 + 18)
    assert 4 <= found.check.photos <= 8 < SCENES
    assert found.teacher_miou > 0.8
    assert found.fits
    assert found.seconds > 0


def test_a_plan_counts_what_is_left_to_do(standins, tmp_path):
    standins.extract(tmp_path / "c", limit=4)
    found = make_plan(standins, tmp_path)
    assert (found.rows, found.rows_found) == (SCENES - 4, 4)
    standins.extract(tmp_path / "c")
    with pytest.raises(DatasetError, match="nothing to plan: .* has all rows"):
        make_plan(standins, tmp_path)


def test_a_plan_for_a_full_disk_is_a_plan_that_does_not_fit(standins, tmp_path, monkeypatch):
    """Nothing is tried on a disk without the space for it."""
    monkeypatch.setattr("kdcache.precompute.plan.free", lambda out: (5000, None))
    beside = []
    speed = engine._write_speed
    monkeypatch.setattr(engine, "_write_speed", lambda at: beside.append(at.parent) or speed(at))
    found = make_plan(standins, tmp_path)
    assert (found.fits, found.free_bytes) == (False, 5000)
    assert beside == [Path(tempfile.gettempdir())]


def test_what_a_plan_says_fits_is_what_the_extraction_takes(standins, tmp_path, monkeypatch):
    """Also within the margin, and where the cache has rows already."""
    space = 10**9
    for module in ("precompute.plan", "cache.need"):
        monkeypatch.setattr(f"kdcache.{module}.free", lambda out: (space, None))
    needed = make_plan(standins, tmp_path).bytes
    space = round(needed * 1.02)
    assert not make_plan(standins, tmp_path).fits
    with pytest.raises(CacheError, match="10 rows will take about"):
        standins.extract(tmp_path / "c")
    space = 10**9
    standins.extract(tmp_path / "c", limit=4)
    space = needed // 2
    with pytest.raises(CacheError, match="6 rows will take about"):
        standins.extract(tmp_path / "c")


def test_a_plan_fails_where_the_extraction_would(standins, tmp_path):
    with pytest.raises(ModelError, match="nowhere"):
        make_plan(standins, tmp_path, yolo_target_layer="nowhere")


def test_the_command_prints_each_precision_and_says_when_it_does_not_fit(
    standins, tmp_path, monkeypatch
):
    def run(*more):
        flags = ["--images", standins.images, "--masks", standins.masks, "--out", tmp_path / "c"]
        flags += ["--yolo", standins.detector, "--teacher", standins.teacher, "--size", SIZE]
        flags += ["--device", "cpu", "--png", tmp_path / "plan.png", *more]
        return CliRunner().invoke(main, ["plan", *map(str, flags)])

    result = run()
    assert result.exit_code == 0, result.output
    for words in ("int8 (asked for)", "float32", "teacher mIoU", "fits: ", "free"):
        assert words in result.stdout
    keys = {"rows", "bytes", "files", "seconds", "free_bytes", "teacher_miou"}
    assert keys <= json.loads(run("--json").stdout).keys()
    monkeypatch.setattr("kdcache.precompute.plan.free", lambda out: (1000, None))
    result = run()
    assert result.exit_code == 1
    assert "DOES NOT FIT: 1.0 kB are free" in result.stdout


def test_free_space_is_that_of_the_nearest_folder_that_exists(tmp_path):
    assert need.free(tmp_path / "not/yet/there")[0] > 0
