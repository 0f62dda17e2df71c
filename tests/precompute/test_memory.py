"""Resident memory of an extraction does not grow with the dataset."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SIZE, Standins

ALLOWED_GROWTH_MIB = 16  # what 1,800 more rows hold in arrays is 60


@pytest.mark.slow
def test_memory_is_flat_in_the_number_of_rows(standins, tmp_path):
    few, many = (peak_mib(standins, tmp_path / str(count), count) for count in (200, 2000))
    print(f"peak resident memory: 200 rows {few:.0f} MiB, 2,000 rows {many:.0f} MiB")
    assert many - few < ALLOWED_GROWTH_MIB


def peak_mib(standins: Standins, folder: Path, count: int) -> float:
    """Largest resident memory of `kdcache extract` over `count` images, in a process of its own."""
    scenes = sorted(standins.images.iterdir())
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        scene = scenes[number % len(scenes)]
        os.link(scene, folder / f"images/{number}.jpg")
        os.link(standins.masks / f"{scene.stem}.png", folder / f"masks/{number}.png")
    command = [Path(sys.executable).with_name("kdcache"), "extract"]
    command += ["--images", folder / "images", "--masks", folder / "masks", "--out", folder / "c"]
    command += ["--yolo", standins.detector, "--teacher", standins.teacher]
    command += ["--size", str(SIZE), "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss / 1024
