"""Whether the rows of a cache may be mirrored with their targets: only where it was measured."""

from __future__ import annotations

from collections.abc import Sequence

from kdcache.cache.format import read_remarks
from kdcache.cache.layout import LOGITS
from kdcache.cache.mirrored import made_by, mirrored_words, of_another_model
from kdcache.cache.reader import Cache
from kdcache.errors import RunError


def check_flip(cache: Cache, parts: Sequence[str]) -> list[str]:
    """How far each of these parts, taps and LOGITS, is from what the models give of mirrored photos.

    Raises RunError for a part that was not measured, or was made anew by another model since.
    """
    found, lacking = read_remarks(cache.path).mirrored, dict[str, str]()
    for part in parts:
        if part not in found:
            lacking[part] = f"{part} was not measured"
        elif of_another_model(cache.manifest, part, found[part]):
            before, now = found[part].made_by, made_by(cache.manifest, part)
            field = next(f for f in {**now, **before} if now.get(f) != before.get(f))
            lacking[part] = (
                f"{part} was measured with {field} = {before.get(field)}, the cache has "
                f"{now.get(field)} now"
            )
    if lacking:
        models = " --yolo FILE" * bool(lacking.keys() - {LOGITS})
        models += " --teacher FILE" * (LOGITS in lacking)
        raise RunError(
            "flip_targets: a mirrored target is not what its model gives of the mirrored photo, and how "
            f"far it is from that must be known first; in {cache.path} {'; '.join(lacking.values())}: run "
            f"`kdcache verify {cache.path} --flip{models}`, or train with --set flip_targets=false"
        )
    return [mirrored_words(part, found[part]) for part in parts]
