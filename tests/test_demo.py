"""The demo as a stranger runs it: the student visibly learns, and everything is where it is said."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from PIL import Image

import kdcache
from kdcache import demo as demo_module
from kdcache.cli import main
from kdcache.demo import demo
from kdcache.errors import KdcacheError
from kdcache.report import demo_text


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return demo(tmp_path_factory.mktemp("demo") / "demo")


def test_the_student_visibly_learns(report):
    assert report.trained["student_miou"] > report.untrained["student_miou"] + 0.25
    assert report.trained["student_miou"] > 0.75
    assert report.trained["agreement"] > 0.95 > report.untrained["agreement"]


def test_text_shows_untrained_and_trained_side_by_side_and_says_stand_ins(report):
    text = demo_text(report)
    untrained, trained = (
        f"{scores['student_miou']:.3f}" for scores in (report.untrained, report.trained)
    )
    (line,) = (line for line in text.splitlines() if line.startswith("mIoU"))
    assert untrained in line
    assert trained in line
    assert "stand-ins" in text
    assert "kdcache extract --images" in text


def test_everything_is_where_the_text_says(report):
    cache = kdcache.open(report.folder / "cache.zarr")
    assert len(cache) == demo_module.SCENES
    assert cache.taps == ["segmentation_model_34_Concat_output_0"]
    assert cache[0].features[cache.taps[0]].shape == (1024, 16, 16)
    assert report.exported.path.stat().st_size > 2e7
    with Image.open(report.overlay) as picture:
        assert picture.width > 900


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("draft")
    with pytest.raises(KdcacheError, match="no earlier demo's"):
        demo(tmp_path)
    result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
