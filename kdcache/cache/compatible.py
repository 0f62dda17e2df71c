"""Whether rows that are asked for may join those of a cache: made in one way, or refused by name."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from kdcache.cache.layout import Manifest
from kdcache.errors import FingerprintError
from kdcache.places import Place

log = logging.getLogger(__name__)


def as_found(asked: Manifest, found: Manifest) -> Manifest:
    """What was asked for, with parts that were refreshed under the names they have since.

    Who asks for no further views leaves those that there are.
    """
    generations = {tap.name: tap.generation for tap in found.taps}
    return dataclasses.replace(
        asked,
        augmentation=asked.augmentation or found.augmentation,
        logits_generation=found.logits_generation,
        taps=tuple(
            dataclasses.replace(tap, generation=generations.get(tap.name, 0)) for tap in asked.taps
        ),
    )


def refuse_other(path: Place, found: Manifest, asked: Manifest) -> None:
    """Raise FingerprintError rather than mix rows made in two ways, with what differs.

    A change of library versions is only worth a warning.
    """
    for what, here, wanted in (
        ("features", bool(found.taps), bool(asked.taps)),
        ("teacher logits", found.logits_dtype is not None, asked.logits_dtype is not None),
    ):
        if here != wanted:
            addable = wanted and what == "teacher logits"
            raise FingerprintError(
                f"{path} was extracted {'with' if here else 'without'} {what}, now it is to be "
                f"{'with' if wanted else 'without'}: write to another place, or use the options it "
                "was made with" + (", or --refresh teacher, which adds them" if addable else "")
            )
    for field in sorted(found.fingerprint.keys() | asked.fingerprint.keys()):
        old, new = found.fingerprint.get(field), asked.fingerprint.get(field)
        if old != new:
            raise FingerprintError(
                f"{path} was made with {field} = {old}, now {new} was asked for; "
                + (
                    "it is a copy that was rounded twice: add the rows to what it was copied from, and "
                    "run that `kdcache copy` again"
                    if " of " in f"{old}"
                    else "write to another place, or use the settings and files the cache was made with"
                )
            )
    if found.augmentation and asked.augmentation != found.augmentation:
        raise FingerprintError(
            f"{path} has views that were made with "
            f"{_difference(found.augmentation, asked.augmentation or {})}; make further ones as those "
            "were made, or write to another place"
        )
    for field in ("shard_rows", "compression", "size_px", "logits_dtype", "taps"):
        old, new = getattr(found, field), getattr(asked, field)
        if old != new:
            raise FingerprintError(
                f"{path} was written with {field} = {old}, now {new} was asked for; "
                "write to another place, or use the settings the cache was made with"
            )
    for library in sorted(found.versions.keys() & asked.versions.keys()):
        old, new = found.versions[library], asked.versions[library]
        if old != new:
            log.warning("the cache was made with %s %s, this is %s", library, old, new)


def _difference(found: Mapping[str, Any], asked: Mapping[str, Any], within: str = "") -> str:
    """The first setting in which two nested mappings differ, in words."""
    for name in sorted(found.keys() | asked.keys()):
        old, new = found.get(name), asked.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping) and old != new:
            return _difference(old, new, f"{within}{name}.")
        if old != new:
            return f"{within}{name} = {old}, now {new} was asked for"
    raise AssertionError(f"{found} and {asked} are equal")
