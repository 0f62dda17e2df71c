"""The findings as text: what is well, then what to know, then what is in the way."""

from __future__ import annotations

import textwrap

from kdcache.doctor.checkup import Checkup
from kdcache.doctor.finding import Finding, Level

_MARKS: dict[Level, str] = {"ok": "ok", "note": "note", "problem": "PROBLEM"}
_WIDTH = 108


def checkup_text(report: Checkup) -> str:
    """One finding a line, problems last, each with what to type; then the verdict."""
    column = max(len(finding.check) for finding in report.findings)
    blocks = []
    for level in _MARKS:
        lines = [
            line for one in report.findings if one.level == level for line in _lines(one, column)
        ]
        if lines:
            blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, _verdict(report)])


def _lines(finding: Finding, column: int) -> list[str]:
    start = f"{_MARKS[finding.level]:<7}  {finding.check:<{column}}  "
    lines = _wrapped(finding.found, start, " " * len(start))
    if finding.fix:
        fix = " " * (len(start) - 5) + "fix: "
        lines += _wrapped(finding.fix, fix, " " * len(start))
    return lines


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    """Lines broken between words only: paths and commands stay whole, to be pasted."""
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _verdict(report: Checkup) -> str:
    count = dict.fromkeys(_MARKS, 0)
    for finding in report.findings:
        count[finding.level] += 1
    problems, notes = count["problem"], count["note"]
    also = f", {notes} {'note' if notes == 1 else 'notes'}" if notes else ""
    if not problems:
        return f"kdcache {report.kdcache} works here: no problem{also}"
    return f"NOT OK: {problems} {'problem' if problems == 1 else 'problems'}{also}"
