"""Pace over the last minute, and the line a minute that a log gets."""

from __future__ import annotations

import logging

import pytest

from kdcache import progress
from kdcache.progress import Pace, Progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_pace_is_that_of_the_last_minute():
    clock = Clock()
    pace = Pace(clock)
    assert pace.per_s == 0
    done = 0
    for _ in range(600):  # ten minutes at 5/s
        clock.now += 0.2
        pace.mark(done := done + 1)
    assert pace.per_s == pytest.approx(5, rel=0.05)
    for _ in range(70):  # then one a second
        clock.now += 1
        pace.mark(done := done + 1)
    assert pace.per_s == pytest.approx(1, rel=0.05)


def test_pace_falls_while_nothing_is_done():
    clock = Clock()
    pace = Pace(clock)
    clock.now += 10
    pace.mark(10)
    assert pace.per_s == pytest.approx(1)
    clock.now += 10
    assert pace.per_s == pytest.approx(0.5)


def test_a_log_gets_a_line_a_minute_with_rate_and_eta(monkeypatch, caplog):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    caplog.set_level(logging.INFO, "kdcache")
    with Progress("extract", 1000, "image", shown=True, facts=lambda: ["3 skipped"]) as bar:
        bar._pace = Pace(clock)
        for done in range(1, 91):
            clock.now += 2
            bar.reach(done)
    assert [record.message for record in caplog.records] == [
        "extract: 30 of 1000, 0.50 image/s, ETA 32:20, 3 skipped",
        "extract: 60 of 1000, 0.50 image/s, ETA 31:20, 3 skipped",
        "extract: 90 of 1000, 0.50 image/s, ETA 30:20, 3 skipped",
    ]


def test_nothing_is_said_where_it_is_not_wanted(monkeypatch, caplog, capsys):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    caplog.set_level(logging.INFO, "kdcache")
    with Progress("extract", 10, "image", shown=False) as bar:
        clock.now += 600
        bar.reach(5)
    assert caplog.records == []
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    with Progress("extract", 4, "image", shown=True, facts=lambda: ["1.00 MB"]) as bar:
        bar.reach(4)
    shown = capsys.readouterr().err
    assert "extract: 100%" in shown
    assert "4/4" in shown
    assert "1.00 MB" in shown
