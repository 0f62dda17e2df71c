"""docs/walkthrough.md does what it says: its commands are run as they stand, in a folder as it asks for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

# of the program that deploys a student
CHECK = """
assert person.shape == photo.shape[:2]
assert set(np.unique(person)) <= {0, 1}
"""
DOCUMENT = Path(__file__).parents[1] / "docs/walkthrough.md"


def blocks():
    """Commands and Python programs in the order in which they stand."""
    found = re.findall(r"^```(bash|python)\n(.*?)^```", DOCUMENT.read_text(), re.M | re.S)
    for kind, text in found:
        if kind == "python":
            yield "python", text
            continue
        for line in text.splitlines():
            yield ("download" if line.startswith("curl ") else "command"), line


def test_every_line_is_a_command_of_ours_or_a_download():
    kinds = [kind for kind, _ in blocks()]
    assert kinds.count("download") == 2
    assert kinds.count("python") == 2
    assert all(line.startswith("kdcache ") for kind, line in blocks() if kind == "command")
    used = {line.split()[1] for kind, line in blocks() if kind == "command"}
    assert used == {
        "plan",
        "extract",
        "info",
        "verify",
        "train",
        "sweep",
        "evaluate",
        "export",
        "bench",
        "predict",
    }


@pytest.fixture(scope="module")
def folder(realdata, standins, tmp_path_factory):
    """Real photos of people, with stand-ins of both models."""
    folder = tmp_path_factory.mktemp("walkthrough")
    (folder / "coco").symlink_to(realdata / "coco_tiny")
    shutil.copy(standins.detector, folder / "yolo.onnx")
    shutil.copy(standins.teacher, folder / "teacher.onnx")
    shutil.copy(next((realdata / "coco_tiny/val2017").glob("*.jpg")), folder / "photo.jpg")
    (folder / "bin").mkdir()
    command = folder / "bin/kdcache"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m kdcache "$@"\n')
    command.chmod(0o755)
    return folder


def size_of(path):
    with Image.open(path) as picture:
        return picture.size


def test_the_walkthrough_can_be_walked(folder):
    environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    environment["PYTHONPATH"] = str(DOCUMENT.parents[1])
    for kind, text in blocks():
        if kind == "download":
            continue
        check = CHECK if "person = " in text else ""
        words = ["bash", "-c", text] if kind == "command" else [sys.executable, "-c", text + check]
        ran = subprocess.run(
            words, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, f"{text}\n{ran.stdout[-2000:]}\n{ran.stderr[-2000:]}"
    for picture in ("plan.png", "rows.png", "worst.png"):
        assert size_of(folder / picture)[0] > 500
    assert len((folder / "images.csv").read_text().splitlines()) == 1 + 5 * 8
    assert "<table" in (folder / "sweeps/weights/sweep.html").read_text()
    photos = sorted((folder / "coco/val2017").glob("*.jpg"))
    for out in ("masks", "masks_int8"):
        for photo in photos:
            assert size_of(folder / out / f"{photo.stem}.png") == size_of(photo)
