"""What one check found: fine, worth knowing, or in the way; the last two with what to type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report; `fix` is empty only where all is well."""

    check: str
    level: Level
    found: str
    fix: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)  # what was measured, for machines


Findings = Finding | list[Finding]


def ok(check: str, found: str, **values: Any) -> Finding:
    """All is well."""
    return Finding(check=check, level="ok", found=found, values=values)


def note(check: str, found: str, fix: str, **values: Any) -> Finding:
    """kdcache works, but slower or not with everything."""
    return Finding(check=check, level="note", found=found, fix=fix, values=values)


def problem(check: str, found: str, fix: str, **values: Any) -> Finding:
    """kdcache, or the GPU that is here, cannot be used as it is."""
    return Finding(check=check, level="problem", found=found, fix=fix, values=values)


def isolated(check: str, look: Callable[[], Findings]) -> list[Finding]:
    """What `look` found; should it fail, that is a finding, and the other checks go on."""
    try:
        found = look()
    except Exception as error:
        return [
            problem(
                check,
                f"this check failed itself, with {type(error).__name__}: {one_line(str(error))}",
                "report this line as a fault of kdcache; what the other checks say still holds",
            )
        ]
    return [found] if isinstance(found, Finding) else found


def one_line(text: str, most: int = 300) -> str:
    """A library's message without its line breaks, cut where it goes on for pages."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"
