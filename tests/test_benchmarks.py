"""Every benchmark runs as its first lines say, at a size that takes seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def run(*arguments):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_starts(path):
    assert "--help" in run(path, "--help")


def test_online_and_cached_are_timed(tmp_path):
    table = run(
        FOLDER / "online_vs_cached.py",
        *["--size", "64", "--images", "2", "--batch-size", "1", "--steps", "2", "--json"],
        tmp_path / "found.json",
    )
    assert "| student step |" in table
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["online_over_cached"] > 0
    assert found["detector_flops"] > 1e9
