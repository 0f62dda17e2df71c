"""How views are made: which transforms, how often and how strongly; and what one view drew from that.

A policy is the table below, or a TOML file with a table for each transform it wants, such as

    [window]
    probability = 0.8
    scale = [0.75, 1.8]

A transform that the file leaves out is off; a range that it leaves out is the heavy policy's.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    Strict,
    ValidationError,
)

from kdcache.errors import ConfigError, nearest

# Lists in a dump, so that it equals what JSON makes of it; strict, for `true` is no number.
_Pair = PlainSerializer(list)
Range = Annotated[tuple[Annotated[float, Strict()], Annotated[float, Strict()]], _Pair]
IntRange = Annotated[tuple[Annotated[int, Strict()], Annotated[int, Strict()]], _Pair]
Parameters = dict[str, dict[str, float | int]]

# Drawn numbers are multiples of 10^-3: short in JSON, and few enough for a test to try every one.
_DECIMALS = 3


def _within(lowest: float, highest: float) -> AfterValidator:
    def check(pair: tuple[float, float]) -> tuple[float, float]:
        low, high = pair
        if not lowest <= low <= high <= highest:
            raise ValueError(f"expected [low, high], from {lowest:g} to {highest:g}")
        return pair

    return AfterValidator(check)


class _Transform(BaseModel):
    """One transform: how often, its ranges, and what else a view draws for it."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    also: ClassVar[dict[str, tuple[float, float] | tuple[int, int]]] = {}

    probability: Annotated[float, Strict()] = Field(0.0, ge=0, le=1)


_SEED = (0, 2**32 - 1)
_DIRECTION: dict[str, tuple[float, float]] = {"dx": (-1.0, 1.0), "dy": (-1.0, 1.0)}


class Flip(_Transform):
    """Left and right exchanged."""


class Window(_Transform):
    """What part of the photo is seen: `scale` above 1 zooms in, below 1 shows border around it."""

    also = {"x": (0.0, 1.0), "y": (0.0, 1.0)}
    scale: Annotated[Range, _within(0.25, 8)] = (0.75, 1.8)
    ratio: Annotated[Range, _within(0.25, 4)] = (0.8, 1.25)  # of width to height, times the photo's


class Colour(_Transform):
    """Brightness, contrast and saturation as factors, hue in degrees."""

    brightness: Annotated[Range, _within(0.1, 2)] = (0.75, 1.25)
    contrast: Annotated[Range, _within(0.1, 2)] = (0.75, 1.25)
    saturation: Annotated[Range, _within(0, 2)] = (0.6, 1.4)
    hue: Annotated[Range, _within(-180, 180)] = (-12.0, 12.0)


class Gamma(_Transform):
    """Exponent of the tone curve; above 1 darkens the middle."""

    gamma: Annotated[Range, _within(0.2, 5)] = (0.7, 1.4)


class Shadow(_Transform):
    """A shadow on one side of a line through the picture; `edge` is how soft, in sides."""

    also = {"x": (0.2, 0.8), "y": (0.2, 0.8)} | _DIRECTION
    darkness: Annotated[Range, _within(0, 1)] = (0.25, 0.6)
    edge: Annotated[Range, _within(0.01, 2)] = (0.03, 0.5)


class Fog(_Transform):
    """Patches of bright grey; `density` 1 hides everything."""

    also = {"level": (190, 235), "seed": _SEED}
    density: Annotated[Range, _within(0, 1)] = (0.2, 0.55)


class Rain(_Transform):
    """Bright streaks; `length` in thousandths of the side."""

    also = {"slant": (-0.35, 0.35), "seed": _SEED}
    streaks: Annotated[IntRange, _within(1, 2000)] = (100, 350)
    length: Annotated[Range, _within(1, 500)] = (20.0, 60.0)


class Blur(_Transform):
    """A Gaussian blur; `sigma` in thousandths of the side."""

    sigma: Annotated[Range, _within(0.1, 20)] = (0.8, 3.0)


class Motion(_Transform):
    """A blur along a line; `length` in thousandths of the side."""

    also = _DIRECTION
    length: Annotated[Range, _within(1, 40)] = (5.0, 16.0)


class Noise(_Transform):
    """Noise of each value by itself; `sigma` in grey levels."""

    also = {"seed": _SEED}
    sigma: Annotated[Range, _within(0, 18)] = (2.0, 10.0)


class Compression(_Transform):
    """JPEG, at this quality."""

    quality: Annotated[IntRange, _within(1, 100)] = (35, 85)


class Policy(BaseModel):
    """How views are made; transforms are applied in this order, that of light on its way to a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    flip: Flip = Flip()
    window: Window = Window()
    colour: Colour = Colour()
    shadow: Shadow = Shadow()
    fog: Fog = Fog()
    rain: Rain = Rain()
    gamma: Gamma = Gamma()
    blur: Blur = Blur()
    motion: Motion = Motion()
    noise: Noise = Noise()
    compression: Compression = Compression()


NAMED_POLICIES = {
    "light": Policy(
        flip=Flip(probability=0.5),
        window=Window(probability=0.8, scale=(0.9, 1.3), ratio=(0.9, 1.11)),
        colour=Colour(
            probability=0.8,
            brightness=(0.85, 1.15),
            contrast=(0.85, 1.15),
            saturation=(0.8, 1.2),
            hue=(-5.0, 5.0),
        ),
        gamma=Gamma(probability=0.3, gamma=(0.8, 1.25)),
    ),
    "heavy": Policy(
        flip=Flip(probability=0.5),
        window=Window(probability=0.9),
        colour=Colour(probability=0.8),
        shadow=Shadow(probability=0.25),
        fog=Fog(probability=0.1),
        rain=Rain(probability=0.1),
        gamma=Gamma(probability=0.4),
        blur=Blur(probability=0.15),
        motion=Motion(probability=0.1),
        noise=Noise(probability=0.25),
        compression=Compression(probability=0.3),
    ),
}


def read_policy(augment: str) -> Policy:
    """The policy `light` or `heavy`, or that of a TOML file.

    Raises ConfigError that names the file, the key, and what was expected.
    """
    if augment in NAMED_POLICIES:
        return NAMED_POLICIES[augment]
    path = Path(augment)
    if not path.is_file():
        raise ConfigError(
            f"augment {augment}: {'a folder' if path.is_dir() else 'no such file'}, and no policy of "
            f"that name; named policies: {', '.join(NAMED_POLICIES)}"
        )
    try:
        # Windows' editor begins a file with a mark of its encoding
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        policy = Policy.model_validate(tables)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"augment {augment}: not valid TOML: {error}") from error
    except ValidationError as error:
        problems = "; ".join(_describe(problem) for problem in error.errors())
        raise ConfigError(f"augment {augment}: {problems}") from error
    for name, table in tables.items():
        if "probability" not in table:
            raise ConfigError(f"augment {augment}: [{name}] says no probability, from 0 to 1")
    if not in_use(policy):
        raise ConfigError(
            f"augment {augment}: no transform has a probability above 0, so every view would be the photo "
            f"as it is; tables there can be: {', '.join(Policy.model_fields)}"
        )
    return policy


def in_use(policy: Policy) -> dict[str, Any]:
    """The transforms that are on, by name, as JSON has them: those of later versions are off here."""
    transforms = policy.model_dump(mode="json").items()
    return {name: settings for name, settings in transforms if settings["probability"]}


def name_of(transforms: Mapping[str, Any]) -> str:
    """What `--augment` is called whose transforms in use these are."""
    for name, policy in NAMED_POLICIES.items():
        if in_use(policy) == transforms:
            return name
    return f"a policy of {', '.join(transforms)}"


def _describe(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        *table, unknown = problem["loc"]
        known = type(getattr(Policy(), table[0])) if table else Policy
        return f"unknown key {key!r}; nearest known: {nearest(str(unknown), known.model_fields)}"
    if problem["type"] == "model_type":
        return f"{key} = {problem['input']!r}: expected a table, [{key}] with probability = …"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("tuple_type", "too_short", "too_long", "missing"):
        message = "expected [low, high]"
    return f"{key} = {problem['input']!r}: {message}"


def draw(policy: Policy, seed: int, sample_id: str, view: int) -> Parameters:
    """The parameters of one view: the transforms it has, each with what `apply` needs; JSON-able.

    A function of its arguments alone. Every number has a digest of its own, so that neither a
    library's generators nor a transform that is added later can move the others.
    """

    def uniform(name: str) -> float:
        key = json.dumps([seed, sample_id, view, name]).encode()
        return (int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 11) * 2.0**-53

    drawn: Parameters = {}
    for name in Policy.model_fields:
        transform: _Transform = getattr(policy, name)
        if uniform(f"{name}.probability") < transform.probability:
            ranges = transform.model_dump(exclude={"probability"}) | transform.also
            drawn[name] = {
                key: _between(low, high, uniform(f"{name}.{key}"))
                for key, (low, high) in ranges.items()
            }
    return drawn


def _between(low: float, high: float, fraction: float) -> float | int:
    if isinstance(low, int):
        return low + int(fraction * (high - low + 1))
    return round(low + fraction * (high - low), _DECIMALS)
