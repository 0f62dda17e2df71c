"""Which runs a sweep has: every combination of the values of its axes, or some drawn at random."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdcache.config import TrainConfig, parse_value, validated
from kdcache.errors import ConfigError, nearest

# Longer names of folders are cut; most file systems take 255 bytes.
_NAME_BYTES = 180

_RANGE = re.compile(r"(?P<low>[^.:]\S*?)\.\.(?P<high>[^:]+?)(?P<log>:log)?")


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers from `low` to `high` to be drawn from, evenly or with even logarithms."""

    low: float
    high: float
    log: bool
    whole: bool  # integers, both ends included

    def draw(self, rng: np.random.Generator) -> float | int:
        """One number."""
        if self.whole and not self.log:
            return int(rng.integers(int(self.low), int(self.high) + 1))
        if not self.log:
            return float(f"{rng.uniform(self.low, self.high):.4g}")
        value = float(f"{np.exp(rng.uniform(np.log(self.low), np.log(self.high))):.4g}")
        return round(value) if self.whole else value

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}" + ":log" * self.log


Axes = Mapping[str, Sequence[Any] | Range]


def parse_axes(
    assignments: Sequence[str], table: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Axes from `key=v1,v2,…` or `key=low..high[:log]`, and from a TOML table of the same.

    Values that are lists themselves are tuples then, and are written as TOML has them: `key=[…],[…]`.

    Raises ConfigError for what cannot be swept: an unknown setting, no value, one twice.
    """
    axes: dict[str, Any] = {}
    given = [(key, value, f"[grid] {key}") for key, value in (table or {}).items()]
    for assignment in assignments:
        key, separator, text = (part.strip() for part in assignment.partition("="))
        if not separator or not text:
            raise ConfigError(f"--grid {assignment}: expected key=value,value,…")
        given.append((key, text, f"--grid {assignment}"))
    for key, value, where in given:
        if key not in TrainConfig.model_fields:
            known = nearest(key, TrainConfig.model_fields)
            raise ConfigError(f"{where}: no setting of training; nearest known: {known}")
        if key in axes:
            raise ConfigError(f"{where}: {key} is an axis already; give all its values at once")
        axes[key] = _parse_axis(value, where)
    return axes


def _parse_axis(value: Any, where: str) -> list[Any] | Range:
    if isinstance(value, str):
        found = _parse_range(value, where)
        if found is not None:
            return found
        if value.startswith("["):
            value = parse_value(f"[{value}]")
        else:
            value = [parse_value(part.strip()) for part in value.split(",") if part.strip()]
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{where}: expected values, or a range such as 1e-5..1e-3:log")
    if len({repr(one) for one in value}) < len(value):
        raise ConfigError(f"{where}: a value stands there twice")
    return [tuple(one) if isinstance(one, list) else one for one in value]


def _parse_range(text: str, where: str) -> Range | None:
    found = _RANGE.fullmatch(text.strip())
    if not found:
        return None
    low, high = (parse_value(found[end]) for end in ("low", "high"))
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high))
    if not numbers or not low < high or (found["log"] and low <= 0):
        raise ConfigError(
            f"{where}: expected low..high with low < high"
            + ", above 0 for :log" * bool(found["log"])
        )
    whole = isinstance(low, int) and isinstance(high, int)
    return Range(low=float(low), high=float(high), log=bool(found["log"]), whole=whole)


def combinations(
    axes: Axes, base: TrainConfig, *, random: int | None = None, seed: int = 0
) -> list[tuple[dict[str, Any], TrainConfig]]:
    """The runs: values of the axes, and all settings with them in place.

    `random` draws so many combinations, seeded, each with every value of a `seed` axis; more of them
    begin with the fewer. Raises ConfigError for a combination that is no valid setting, and for a
    range without `random`.
    """
    ranges = [key for key, values in axes.items() if isinstance(values, Range)]
    if ranges and random is None:
        raise ConfigError(f"{ranges[0]} = {axes[ranges[0]]} is a range: say --random N")
    if not axes:
        raise ConfigError("nothing to sweep: give --grid key=value,value,…")
    chosen = list(_grid(axes)) if random is None else list(_drawn(axes, random, seed))
    settings = base.model_dump()
    found: dict[str, tuple[dict[str, Any], TrainConfig]] = {}
    for values in chosen:
        try:
            config = validated(TrainConfig, settings | values)
        except ConfigError as error:
            told = ", ".join(f"{key}={value}" for key, value in values.items())
            raise ConfigError(f"the combination {told} cannot be trained: {error}") from error
        # as the settings have them: 1 and 1.0 are one value
        own = {key: getattr(config, key) for key in axes}
        found.setdefault(run_name(own), (own, config))
    return list(found.values())


def _grid(axes: Axes) -> Iterator[dict[str, Any]]:
    lists = {key: values for key, values in axes.items() if not isinstance(values, Range)}
    for values in itertools.product(*lists.values()):
        yield dict(zip(lists, values, strict=True))


def _drawn(axes: Axes, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Distinct draws of all axes but the seed, each with all seeds."""
    others = {key: values for key, values in axes.items() if key != "seed"}
    seeds = axes.get("seed", [None])
    if isinstance(seeds, Range):
        raise ConfigError("seed is drawn by nobody: give its values, --grid seed=0,1,2")
    rng, seen = np.random.default_rng(seed), set[str]()
    possible = 1
    for values in others.values():
        possible = 10**9 if isinstance(values, Range) else possible * len(values)
    while len(seen) < min(count, possible):
        drawn = {
            key: values.draw(rng)
            if isinstance(values, Range)
            else values[int(rng.integers(len(values)))]
            for key, values in others.items()
        }
        if repr(drawn) not in seen:
            seen.add(repr(drawn))
            yield from (drawn if one is None else drawn | {"seed": one} for one in seeds)


def run_name(values: Mapping[str, Any]) -> str:
    """The name of a run's folder: its values, so that a larger grid finds the runs of a smaller."""
    told = ",".join(f"{key}={_shown(value)}" for key, value in values.items())
    name = re.sub(r"[^\w.,=:+-]", "-", told, flags=re.ASCII)
    if name == told and len(name) <= _NAME_BYTES:
        return name
    digest = hashlib.sha256(told.encode()).hexdigest()[:8]
    return f"{name[:_NAME_BYTES]}-{digest}"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(map(_shown, value)) or "default"
    return f"{value:.10g}" if isinstance(value, float) else str(value)
