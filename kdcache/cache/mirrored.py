"""What was measured of mirroring stored targets, and whether it is of the models that made them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from kdcache.cache.format import Mirrored, read_remarks
from kdcache.cache.layout import LOGITS, Manifest
from kdcache.cache.lock import locked
from kdcache.durable import write_atomic
from kdcache.errors import CacheError
from kdcache.places import Place

# What decides a model's output beside the pixels, as the fingerprint names it.
_DETECTOR = ("yolo_sha256", "yolo_input")
_TEACHER = ("teacher_sha256", "teacher_network")


def made_by(manifest: Manifest, part: str) -> dict[str, str]:
    """What the fingerprint says of the model that made a part: LOGITS, or the tap of that name."""
    fields = _TEACHER if part == LOGITS else _DETECTOR
    return {name: manifest.fingerprint[name] for name in fields if name in manifest.fingerprint}


def of_another_model(manifest: Manifest, part: str, measured: Mirrored) -> bool:
    """Whether the part has been made anew, by another model, since it was measured."""
    return dict(measured.made_by) != made_by(manifest, part)


def mirrored_words(part: str, measured: Mirrored) -> str:
    """What was measured of a part, in a line."""
    figures = [] if measured.relative_mse is None else [f"relative MSE {measured.relative_mse:.2g}"]
    if measured.cosine is not None:
        figures.append(f"cosine {measured.cosine:.4f}")
    if measured.equal_pixels is not None:
        figures.append(f"{measured.equal_pixels:.2%} of mask pixels equal")
    return f"{part}, mirrored: {', '.join(figures)} (against the model on {measured.rows} mirrored rows)"


def keep(path: Place, measured: Mapping[str, Mirrored]) -> None:
    """Store measurements, by part, in the cache; those of other parts stay.

    Raises CacheError where the cache cannot be written, or another process writes it.
    """
    try:
        held = locked(path)
        try:
            remarks = read_remarks(path)
            remarks = dataclasses.replace(remarks, mirrored={**remarks.mirrored, **measured})
            held.check()
            write_atomic(path / "skipped" / "zarr.json", remarks.document())
        finally:
            held.close()
    except OSError as error:
        raise CacheError(f"{path} cannot be written: {error.strerror or error}") from error
