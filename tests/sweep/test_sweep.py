"""A sweep ends with the same table whatever happened on the way, and needs nothing but the cache."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from browser import dumped
from click.testing import CliRunner

from kdcache.cache.reader import Cache
from kdcache.cli import main
from kdcache.config import TrainConfig
from kdcache.durable import lock
from kdcache.errors import ConfigError, KdcacheError, ModelError, RunError
from kdcache.options import EXIT_SKIPPED
from kdcache.sweep import workers
from kdcache.sweep.grid import parse_axes
from kdcache.sweep.sweep import sweep
from kdcache.train.loop import train

FAST = ("--encoder-weights", "random", "--batch-size", "3", "--device", "cpu", "--epochs", "2")
BASE = TrainConfig(encoder_weights="random", epochs=1, batch_size=3, learning_rate=3e-3)


def command(cache, out, *arguments):
    words = [sys.executable, "-m", "kdcache", "sweep", cache, "--out", out, *FAST, *arguments]
    return [str(word) for word in words]


def finished(cache, out, *arguments, environment=None):
    ran = subprocess.run(
        command(cache, out, *arguments),
        capture_output=True,
        text=True,
        timeout=400,
        env=environment,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran


def lines_written(out):
    return sum(len(path.read_text().splitlines()) for path in out.glob("runs/*/metrics.jsonl"))


def table(out):
    with (out / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def arrays_of(cache):
    """Those of the features."""
    return list(cache.arrays_of(cache.tap(cache.taps[0])))


def children(process):
    """The processes that it started, and theirs."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            _, parent, *_ = stat.read_text().rpartition(")")[2].split()
            parents[int(stat.parent.name)] = int(parent)
    family = {process.pid}
    for _ in range(3):
        family |= {pid for pid, parent in parents.items() if parent in family}
    return family - {process.pid}


def killed_after(cache, out, epochs, *arguments, whole_family=False, how=signal.SIGKILL):
    """Start a sweep and kill it once so many epochs are on disk."""
    process = subprocess.Popen(command(cache, out, *arguments), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while lines_written(out) < epochs:
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    family = children(process) if whole_family else set()
    process.send_signal(how)
    for pid in family:
        os.kill(pid, signal.SIGKILL)
    return process.wait()


GRID = ("--grid", "feature_weight=0,0.5", "--grid", "kl_weight=0.5,1")


@pytest.fixture(scope="module")
def alone(cache, tmp_path_factory):
    """A sweep of four runs that nobody disturbed, in one go."""
    out = tmp_path_factory.mktemp("sweeps") / "alone"
    finished(cache.path, out, *GRID)
    return out


def test_killed_twice_it_ends_with_the_same_table(cache, alone, tmp_path):
    out = tmp_path / "killed"
    killed_after(cache.path, out, 1, *GRID)
    killed_after(cache.path, out, 4, *GRID, whole_family=True)
    ran = finished(cache.path, out, *GRID)
    assert (out / "sweep.csv").read_text() == (alone / "sweep.csv").read_text()
    assert "4 of 4 runs done" in ran.stdout
    for run in (alone / "runs").iterdir():
        ours = (out / "runs" / run.name / "student_best.safetensors").read_bytes()
        assert ours == (run / "student_best.safetensors").read_bytes()


@pytest.mark.slow
def test_twelve_runs_killed_by_every_means(cache, tmp_path):
    grid = ("--grid", "feature_weight=0,0.5,1", "--grid", "temperature=1,3", "--grid", "seed=0,1")
    whole, out = tmp_path / "whole", tmp_path / "killed"
    finished(cache.path, whole, *grid, "--jobs", 2, "--together", 2)
    kinds = [(signal.SIGKILL, False), (signal.SIGKILL, True), (signal.SIGTERM, False)]
    for number, (how, whole_family) in enumerate(kinds):
        epochs = 5 * number + 2
        killed_after(cache.path, out, epochs, *grid, how=how, whole_family=whole_family)
    finished(cache.path, out, *grid, "--jobs", 2)
    assert (out / "sweep.csv").read_text() == (whole / "sweep.csv").read_text()


def test_jobs_and_together_change_nothing(cache, alone, tmp_path):
    finished(cache.path, tmp_path / "s", *GRID, "--jobs", 2, "--together", 2)
    assert (tmp_path / "s/sweep.csv").read_text() == (alone / "sweep.csv").read_text()


def test_no_frozen_model_is_loaded_and_weight_0_reads_no_feature_byte(cache, tmp_path):
    """Without models, photos, ONNX and, for weight 0, without the features' files."""
    moved = tmp_path / "moved.zarr"
    shutil.copytree(cache.path, moved)
    opened = Cache(moved)
    features = {opened.locate(row, a)[0] for row in range(len(opened)) for a in arrays_of(opened)}
    for path in features:
        os.unlink(path)
    for name in ("onnx", "onnxruntime"):
        (tmp_path / "poison" / name).mkdir(parents=True)
        (tmp_path / "poison" / name / "__init__.py").write_text(f"raise SystemError('{name}')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "poison")}
    grid = ("--grid", "feature_weight=0", "--grid", "kl_weight=0,1", "--together", 2)
    finished(moved, tmp_path / "s", *grid, environment=environment)
    assert [line["state"] for line in table(tmp_path / "s")] == ["done", "done"]
    with pytest.raises(KdcacheError):
        train(moved, tmp_path / "run", BASE, device="cpu")


def test_the_command_tells_ranks_and_writes_a_page_that_a_browser_shows(cache, alone, tmp_path):
    again = finished(cache.path, alone, *GRID)  # nothing is left to do
    assert "4 of 4 runs done" in again.stdout
    ranks = [line.split() for line in again.stdout.splitlines() if line[:1].isdigit()][1:]
    mious = [float(line[3]) for line in ranks]
    assert len(mious) == 4
    assert mious == sorted(mious, reverse=True)
    found = dumped(
        (alone / "sweep.html").read_text(),
        tmp_path,
        """return {
          rows: document.querySelectorAll("#ranking tbody tr").length,
          images: [...document.images].map(image => image.naturalWidth),
          plots: [...document.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect().width),
        };""",
    )
    assert found["rows"] == 4
    assert len(found["images"]) == 2
    assert min(found["images"]) > 900
    assert len(found["plots"]) == 4  # two settings, mIoU and loss by epoch
    assert min(found["plots"]) > 200


def test_a_failure_is_recorded_and_the_rest_goes_on(cache, tmp_path):
    words = command(cache.path, tmp_path / "s", "--json", "--set", "grad_clip=0")[3:]
    words += ["--epochs", "1", "--grid", "learning_rate=1e30,3e-3"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == EXIT_SKIPPED, result.output
    first, second = json.loads(result.stdout)["runs"]
    assert (first["state"], second["state"]) == ("done", "failed")
    assert "step" in second["error"]
    assert "not finite" in second["error"] or "is nan" in second["error"]
    lines = table(tmp_path / "s")
    assert [line["state"] for line in lines] == ["failed", "done"]
    assert lines[0]["error"] == second["error"]
    assert second["error"][:40] in (tmp_path / "s/sweep.html").read_text().replace("&#39;", "'")


def test_a_killed_process_is_one_failed_run(cache, tmp_path, monkeypatch):
    """As the kernel does when memory runs out."""
    ready, killed = workers.Processes.ready, []

    def kill_the_first(crew, timeout_s):
        if not killed and crew.tasks and lines_written(tmp_path / "s"):
            killed.append(crew._busy[0])
            os.kill(killed[0]._process.pid, signal.SIGKILL)
        return ready(crew, 0.05)

    monkeypatch.setattr(workers.Processes, "ready", kill_the_first)
    base = BASE.model_copy(update={"epochs": 4})
    report = sweep(cache.path, tmp_path / "s", {"kl_weight": [0.5, 1]}, base, device="cpu")
    assert [run.state for run in report.runs] == ["failed", "done"]
    assert "killed by SIGKILL: out of memory?" in report.runs[0].error
    monkeypatch.undo()
    report = sweep(cache.path, tmp_path / "s", {}, base, device="cpu")  # the same runs again
    assert [run.state for run in report.runs] == ["done", "done"]
    assert report.failed == []


def test_a_larger_grid_adds_to_a_smaller_and_other_settings_are_refused(cache, tmp_path):
    out = tmp_path / "s"
    first = sweep(cache.path, out, {"kl_weight": [0.5]}, BASE, device="cpu")
    stamp = first.runs[0].path / "student_best.safetensors"
    before = stamp.stat().st_mtime_ns
    with pytest.raises(RunError, match="batch_size = 3, now 2 was asked for"):
        other = BASE.model_copy(update={"batch_size": 2})
        sweep(cache.path, out, {"kl_weight": [0.5, 1]}, other, device="cpu")
    both = sweep(cache.path, out, {"temperature": [1.0, 3.0]}, BASE, device="cpu")
    assert stamp.stat().st_mtime_ns == before
    assert {run.name for run in both.runs} == {"kl_weight=0.5", "temperature=1", "temperature=3"}
    by_name = {run.name: run for run in both.runs}
    assert by_name["kl_weight=0.5"].values == {"temperature": 3.0, "kl_weight": 0.5}
    assert by_name["temperature=1"].values == {"temperature": 1.0, "kl_weight": 1.0}
    assert by_name["temperature=1"].config["kl_weight"] == 1.0


def test_a_run_is_the_same_whichever_of_its_settings_are_axes(cache, tmp_path):
    """In another order, with an axis more, or one fixed: no run is trained or counted twice."""
    out = tmp_path / "s"
    axes = {"feature_weight": [0.0], "kl_weight": [0.5, 1.0]}
    first = sweep(cache.path, out, axes, BASE, device="cpu")
    stamps = {run.name: (run.path / "metrics.jsonl").stat().st_mtime_ns for run in first.runs}
    sweep(cache.path, out, dict(reversed(axes.items())), BASE, device="cpu")
    fixed = BASE.model_copy(update={"feature_weight": 0.0})
    sweep(cache.path, out, {"kl_weight": [0.5, 1.0]}, fixed, device="cpu")
    report = sweep(cache.path, out, axes | {"seed": [0, 1]}, BASE, device="cpu")
    assert len(report.runs) == 4
    settings = [json.dumps(run.config) for run in report.runs]
    assert len(set(settings)) == 4
    for name, stamp in stamps.items():
        assert (out / "runs" / name / "metrics.jsonl").stat().st_mtime_ns == stamp
    assert "mean of 2 seeds" in report.page.read_text()


def test_settings_that_are_lists_are_swept_and_kept(cache, tmp_path):
    (tap,) = cache.taps
    grid = [f'feature_taps=["{tap}"]', 'student_tap=["encoder"],["decoder"]']
    reports = [
        sweep(cache.path, tmp_path / "s", axes, BASE, device="cpu")
        for axes in (parse_axes(grid), parse_axes(grid), parse_axes(["seed=0"]), {})
    ]
    names = [f"feature_taps={tap},student_tap={part}" for part in ("encoder", "decoder")]
    for report in reports[:2]:
        assert [run.name for run in report.runs] == names
    assert [run.values["student_tap"] for run in reports[-1].runs] == [
        ("encoder",),
        ("decoder",),
        "encoder",
    ]
    assert not any(report.failed for report in reports)


def test_two_runs_of_one_name_are_two_folders(cache, tmp_path):
    out = tmp_path / "s"
    sweep(cache.path, out, {"kl_weight": [0.5]}, BASE, device="cpu")
    sweep(cache.path, out, {"kl_weight": [0.5], "temperature": [2.0]}, BASE, device="cpu")
    warm = BASE.model_copy(update={"temperature": 4.0})
    report = sweep(cache.path, out, {"kl_weight": [0.5]}, warm, device="cpu")
    assert sorted(run.config["temperature"] for run in report.runs) == [2.0, 3.0, 4.0]
    assert len({run.name for run in report.runs}) == 3


def test_what_is_damaged_is_told_and_healed_where_it_can_be(cache, tmp_path):
    out = tmp_path / "s"
    axes = {"kl_weight": [0.5, 1.0, 2.0]}
    whole = sweep(cache.path, out, axes, BASE, device="cpu")
    table_before = (out / "sweep.csv").read_text()
    first, second, third = (run.path for run in whole.runs)
    os.truncate(first / "metrics.jsonl", 50)
    (second / "student_best.safetensors").unlink()
    os.truncate(third / "student_best.safetensors", 1000)
    report = sweep(cache.path, out, {}, BASE, device="cpu")
    assert [run.state for run in report.runs] == ["done", "failed", "failed"]
    for run in report.failed:
        assert "missing or damaged; delete" in run.error
        shutil.rmtree(run.path)
    sweep(cache.path, out, {}, BASE, device="cpu")
    assert (out / "sweep.csv").read_text() == table_before


def test_a_folder_that_is_taken_is_waited_for_aloud(cache, tmp_path, caplog):
    out = tmp_path / "s"
    sweep(cache.path, out, {"kl_weight": [1.0]}, BASE, device="cpu")
    (out / "runs/kl_weight=0.5").mkdir()
    descriptor = lock(out / "runs/kl_weight=0.5")
    threading.Timer(4, os.close, [descriptor]).start()
    report = sweep(cache.path, out, {"kl_weight": [0.5]}, BASE, device="cpu")
    assert "kl_weight=0.5: another process is training there; waiting" in caplog.text
    assert [run.state for run in report.runs] == ["done", "done"]


def test_settings_without_a_grid_are_refused(cache, alone):
    for extra in (("--epochs", "7"), ("--set", "learning_rate=0.5"), ("--random", "3")):
        words = ["sweep", str(cache.path), "--out", str(alone), *extra]
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 2
        assert "settings go with --grid" in result.stderr


def test_no_more_processes_than_tasks(monkeypatch):
    made = []
    monkeypatch.setattr(
        workers, "Worker", lambda *a: made.append(a) or pytest.fail("started early")
    )
    crew = workers.Processes(["cpu"] * 6, tasks=2)
    assert crew.has_room
    assert len(crew._workers) == 2
    assert made == []


def test_all_runs_see_the_rows_of_the_beginning(standins, tmp_path, monkeypatch):
    standins.extract(tmp_path / "c", limit=6)
    sweep(tmp_path / "c", tmp_path / "s", {"kl_weight": [0.5]}, BASE, device="cpu")
    standins.extract(tmp_path / "c")
    report = sweep(tmp_path / "c", tmp_path / "s", {"kl_weight": [0.5, 1]}, BASE, device="cpu")
    records = [json.loads((run.path / "run.json").read_text()) for run in report.runs]
    assert records[0]["commits"] == records[1]["commits"]
    assert len(Cache(tmp_path / "c").commits) > len(records[0]["commits"])


def test_what_no_run_could_do_is_refused_before_the_first(cache, standins, tmp_path):
    out = tmp_path / "s"
    absent = BASE.model_copy(update={"encoder_weights": str(tmp_path / "no.safetensors")})
    with pytest.raises(ModelError, match="no such file"):
        sweep(cache.path, out, {"kl_weight": [0.5]}, absent, device="cpu")
    standins.extract(tmp_path / "c", store="logits", yolo_onnx_path=None, limit=3)
    with pytest.raises(RunError, match="holds no features"):
        sweep(tmp_path / "c", out, {"feature_weight": [0.0, 1.0]}, BASE, device="cpu")
    with pytest.raises(ConfigError, match="nothing to sweep"):
        sweep(cache.path, out, {}, BASE, device="cpu")
    with pytest.raises(RunError, match="inside the cache"):
        sweep(cache.path, cache.path / "s", {"kl_weight": [0.5]}, BASE, device="cpu")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").touch()
    with pytest.raises(RunError, match="holds no sweep"):
        sweep(cache.path, tmp_path / "thesis", {"kl_weight": [0.5]}, BASE, device="cpu")
    assert not list(out.glob("runs/*"))


def test_two_sweeps_do_not_share_a_folder(cache, tmp_path):
    (tmp_path / "s").mkdir()
    descriptor = lock(tmp_path / "s")
    try:
        with pytest.raises(RunError, match="another process is sweeping"):
            sweep(cache.path, tmp_path / "s", {"kl_weight": [0.5]}, BASE, device="cpu")
    finally:
        os.close(descriptor)


def test_axes_come_from_a_file_and_train_refuses_its_grid(cache, tmp_path):
    (tmp_path / "s.toml").write_text(
        'encoder_weights = "random"\nepochs = 1\n[grid]\nkl_weight = [0.5, 1]\n'
    )
    words = ["--config", str(tmp_path / "s.toml")]
    refused = CliRunner().invoke(main, ["train", str(cache.path), "--out", "r", *words])
    assert refused.exit_code == 1
    assert "[grid] is a table of `kdcache sweep`" in refused.stderr
    sweep_words = ["sweep", str(cache.path), "--out", str(tmp_path / "s")]
    twice = CliRunner().invoke(main, [*sweep_words, *words, "--grid", "seed=0,1", "--seed", "3"])
    assert twice.exit_code == 2
    assert "seed is swept by --grid and set besides" in twice.stderr
    wrong = tmp_path / "w.toml"
    wrong.write_text("epochs = 0\n[grid]\nkl_weight = [1]\n")
    named = CliRunner().invoke(main, [*sweep_words, "--config", str(wrong)])
    assert f"--config {wrong}: epochs = 0" in named.stderr
    assert parse_axes([], {"kl_weight": [1]}) == {"kl_weight": [1]}
