"""The table on a terminal: scores before names, never higher than the terminal."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from kdcache.sweep import live
from kdcache.sweep.live import Live
from kdcache.sweep.runs import SweepRun


def run(name, epochs, state="stopped"):
    history = [{"epoch": n + 1, "val_student_miou": 0.5 + n / 100} for n in range(epochs)]
    return SweepRun(
        name=name,
        path=Path(name),
        values={},
        state=state,
        error="",
        best_epoch=epochs or None,
        metrics=history[-1] if history else {},
        history=history,
        config={"epochs": 4},
        picture=None,
    )


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((60, 8)))


def test_scores_stay_when_names_are_long_and_the_table_is_taken_back(terminal, capsys, monkeypatch):
    monkeypatch.setattr(live.sys.stderr, "isatty", lambda: True)
    runs = [run("x" * 200, 2), *(run(f"run {n}", 4, "done") for n in range(9))]
    with Live(runs, shown=True) as shown:
        for _ in range(2):
            shown.show(runs, ["x" * 200])
    text = capsys.readouterr().err
    frames = re.split(r"\x1b\[\d+F\x1b\[J", text)
    assert len(frames) == 3
    for frame in frames[:2]:
        lines = frame.splitlines()
        assert len(lines) <= 6
        assert max(map(len, lines)) < 60
        assert re.search(r"^training\s+2/4\s+0.5100\s+xxx", frame, re.M)
    assert frames[2] == ""
    heights = [int(n) for n in re.findall(r"\x1b\[(\d+)F", text)]
    assert heights == [frame.count("\n") for frame in frames[:2]]


def test_a_log_gets_a_line_a_run_and_no_codes(caplog, capsys):
    waiting = [run("a", 0, "waiting")]
    caplog.set_level("INFO")
    with Live(waiting, shown=True) as shown:
        shown.show([run("a", 4, "done")], [])
    assert "a: val mIoU 0.5300, best is epoch 4 of 4" in caplog.text
    assert capsys.readouterr().err == ""
