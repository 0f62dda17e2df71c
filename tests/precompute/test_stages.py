"""The table at the end of an extraction: how busy each stage was, and which set the pace."""

from __future__ import annotations

import time

from click.testing import CliRunner

from kdcache.cli import main
from kdcache.precompute.stages import (
    COMPRESS,
    DECODE,
    DETECTOR,
    FOR_PHOTOS,
    WRITE,
    Stages,
    StageTimes,
)


def test_stages_add_up_over_their_threads_and_waits_are_told_apart():
    stages = Stages(workers=3)
    with stages.busy(DETECTOR):
        time.sleep(0.02)

    def slow():
        for item in range(3):
            time.sleep(0.02)
            yield item

    assert list(stages.waited_for(slow(), FOR_PHOTOS)) == [0, 1, 2]
    times = stages.times()
    assert 0.02 <= times.busy_s[DETECTOR] < times.busy_s[FOR_PHOTOS] < times.seconds
    threads = [times.threads[stage] for stage in (DECODE, DETECTOR, COMPRESS, WRITE)]
    assert threads == [3, 1, 3, 1]
    stages.clear()
    assert set(stages.times().busy_s.values()) == {0.0}


def test_the_bottleneck_is_the_busiest_thread():
    def bottleneck(**busy: float) -> str:
        names = {"decode": DECODE, "detector": DETECTOR, "compress": COMPRESS, "write": WRITE}
        stages = Stages(workers=4)
        busy_s = stages.times().busy_s | {names[name]: value for name, value in busy.items()}
        threads = stages.times().threads
        return StageTimes(busy_s=busy_s, threads=threads, seconds=10.0).bottleneck

    assert bottleneck(decode=12, detector=4, write=2) == "the models"
    assert bottleneck(decode=20, detector=4, write=2) == "decoding photos"
    assert bottleneck(decode=4, detector=4, write=5) == "writing"
    assert bottleneck(compress=12, detector=4, write=2) == "the models"
    assert bottleneck(compress=20, detector=4, write=2) == "encoding and compressing"


def test_the_command_shows_the_table(standins, tmp_path):
    flags = ["--images", standins.images, "--masks", standins.masks, "--out", tmp_path / "c"]
    flags += ["--yolo", standins.detector, "--teacher", standins.teacher, "--size", 64]
    result = CliRunner().invoke(main, ["extract", *map(str, flags), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "what set the pace:" in result.stdout
    for stage in ("decode photos", "detector", "compress", "write", "waiting for storing"):
        assert stage in result.stdout
    assert "stage" not in CliRunner().invoke(main, ["extract", *map(str, flags)]).stdout
