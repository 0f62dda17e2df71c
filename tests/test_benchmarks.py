"""Every benchmark runs as its first lines say, at a size that takes seconds."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdcache.standins import TAP

FOLDER = Path(__file__).parents[1] / "benchmarks"


def run(*arguments):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


COMMANDS = sorted(path for path in FOLDER.glob("*.py") if "__main__" in path.read_text())


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_starts(path):
    assert "--help" in run(path, "--help")


def test_all_comparisons_come_out_of_one_run(tmp_path):
    sizes = ["--size", 64, "--images", 2, "--batch-size", 1, "--steps", 2, "--runs", 2]
    tables = run(FOLDER / "suite.py", *sizes, "--rows", 4, "--json", tmp_path / "found.json")
    for part in (
        "| student step |",
        "2 runs of 1 epochs",
        "loader",
        "| memory map, uncompressed |",
    ):
        assert part in tables
    found = json.loads((tmp_path / "found.json").read_text())
    assert torch.__version__.startswith(found["machine"]["torch"])
    assert found["epochs"]["detector_flops"] > 1e9
    assert found["epochs"]["runs_online_over_cached"] > 0
    assert found["loader"]["loader_of_floor"] > 0
    assert found["formats"]["kdcache, zstd"]["at random"] > 0


def test_scale_measures_each_number_of_rows(tmp_path):
    sizes = ["--rows", 5, "--rows", 40, "--rounds", 1, "--folder", tmp_path]
    table = run(FOLDER / "scale.py", *sizes, "--json", tmp_path / "found.json")
    assert "| open s |" in table
    few, more = json.loads((tmp_path / "found.json").read_text())["figures"]
    assert more["files"] - few["files"] == 8  # a second shard of seven arrays and its record
    for one in (few, more):
        assert one["planned"] == one["files"] + one["folders"] + 2
        assert min(one["verify s"], one["known rows s"], one["first batch s, cold"]) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_a_basis_of_the_features_is_set_against_their_precisions(standins, tmp_path):
    names = sorted(path.name for path in standins.images.iterdir())
    person = {"category_id": 1, "iscrowd": 0, "segmentation": [[10, 10, 60, 10, 60, 60]]}
    coco = {
        "images": [
            {"id": n, "file_name": name, "height": 90, "width": 120} for n, name in enumerate(names)
        ],
        "annotations": [person | {"id": n, "image_id": n} for n in range(len(names))],
        "categories": [{"id": 1, "name": "person"}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    data = ["--images", standins.images, "--coco", tmp_path / "coco.json"]
    data += ["--fit-images", standins.images, "--fit-coco", tmp_path / "coco.json"]
    detector = ["--yolo", standins.detector, "--tap", TAP, "--size", 64, "--limit", 4]
    table = run(FOLDER / "feature_basis.py", *detector, *data)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    errors = {row[0]: float(row[2]) for row in rows[-22:]}
    assert list(errors)[:6] == ["int8", "int6", "int5", "int4", "int3*", "int2*"]
    int8 = [error for name, error in errors.items() if re.match(r"pca.* int8", name)]
    assert int8 == sorted(int8, reverse=True)  # of 8, 12, 14 and all 16 components
    assert int8[-1] < 1e-3


@pytest.mark.skipif(shutil.which("cc") is None, reason="throttle.c needs a C compiler")
def test_throttled_reads_take_the_time_they_should(tmp_path):
    """A reader through preadv, as kdcache's, and one through read, as Python's files."""
    library, data = tmp_path / "throttle.so", tmp_path / "data"
    data.write_bytes(bytes(2**20))
    source = FOLDER / "throttle.c"
    compiler = ["cc", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source, "-ldl"]
    subprocess.run(compiler, check=True)
    timed = (
        "import os, sys, time\n"
        "started = time.perf_counter()\n"
        "open(sys.argv[1], 'rb', buffering=0).read()\n"
        "read = time.perf_counter()\n"
        "os.preadv(os.open(sys.argv[1], os.O_RDONLY), [bytearray(2**20)], 0)\n"
        "print(read - started, time.perf_counter() - read)\n"
    )
    environment = os.environ | {"LD_PRELOAD": str(library), "THROTTLE_MB_S": "5"}
    done = subprocess.run(
        [sys.executable, "-c", timed, data],
        env=environment | {"THROTTLE_FOLDER": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(float(seconds) >= 2**20 / 5e6 for seconds in done.stdout.split())
