"""Do the frozen models still give what a cache holds? Runs them again on its own stored pixels."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from kdcache.cache import codecs
from kdcache.cache.format import Mirrored, read_root
from kdcache.cache.layout import LOGITS
from kdcache.cache.mirrored import keep
from kdcache.cache.reader import Cache
from kdcache.cache.thin import chain
from kdcache.cache.verify import Agreement, Problem, VerifyReport, verify
from kdcache.config import YoloInput
from kdcache.devices import present
from kdcache.errors import CacheError, FingerprintError, StorageError
from kdcache.onnx_graph import model_sha256
from kdcache.onnx_session import Device
from kdcache.places import Place
from kdcache.precompute.mirror import Model, measure_mirrored
from kdcache.precompute.teacher import Teacher, network_settings
from kdcache.precompute.yolo import Yolo, of_image

log = logging.getLogger(__name__)

# Of a channel's largest magnitude plus the map's root mean square: what another execution
# provider, library version or batch size may change by summing in another order.
PROVIDER_TOLERANCE = 1e-3

_SMALLEST_ALLOWED = 1e-60  # a map of zeros allows no error, and nothing is divided by zero


def verify_with_models(
    path: Place,
    *,
    yolo: Path | None = None,
    teacher: Path | None = None,
    rows: int = 16,
    seed: int = 0,
    device: Device = "auto",
    workers: int = 2,
    flip: bool = False,
    progress: bool = False,
) -> VerifyReport:
    """`cache.verify`, then `recheck` with the given models where the cache is sound and has rows.

    A model file that is not the cache's own is refused first: reading every byte takes long.
    """
    try:
        fingerprint = read_root(path).manifest.fingerprint
    except CacheError:
        pass  # it goes into the report
    else:
        _refuse_other_models(fingerprint, {"yolo_sha256": yolo, "teacher_sha256": teacher})
    report = verify(path, workers=workers, progress=progress)
    if not report.ok or not report.rows:
        why = "is empty" if report.ok else "is damaged"
        log.warning("the models were not run: the cache %s", why)
        return report
    return recheck(
        report,
        yolo=yolo,
        teacher=teacher,
        rows=rows,
        seed=seed,
        device=device,
        flip=flip,
        progress=progress,
    )


def _refuse_other_models(fingerprint: Mapping[str, str], files: Mapping[str, Path | None]) -> None:
    """Compare model files, by field (`yolo_sha256`, …), with those that a cache was made with."""
    for field, path in files.items():
        if path is None:
            continue
        if field not in fingerprint:
            raise FingerprintError(f"{path}: the cache was made without such a model")
        now = model_sha256(path)
        if now != fingerprint.get(field):
            raise FingerprintError(
                f"{path} is not the model that the cache was extracted with: its {field} is {now}, "
                f"the cache has {fingerprint.get(field)}"
            )


def recheck(
    report: VerifyReport,
    *,
    yolo: Path | None = None,
    teacher: Path | None = None,
    rows: int = 16,
    seed: int = 0,
    device: Device = "auto",
    flip: bool = False,
    progress: bool = False,
) -> VerifyReport:
    """The report on a sound cache, with what the given models say of `rows` rows chosen by `seed`.

    A stored value may differ from the model's by the bound of its precision (`codecs.max_error`,
    `codecs.max_logit_error`) plus PROVIDER_TOLERANCE. With `flip`, where all do, the models also run
    on the mirrored rows, and the cache keeps how far that is from the mirrored stored parts. Raises
    ModelError when a model cannot be run, FingerprintError when it is not the cache's own.
    """
    cache = Cache(report.path)
    size_px, fingerprint = cache.manifest.size_px, cache.manifest.fingerprint
    _refuse_other_models(fingerprint, {"yolo_sha256": yolo, "teacher_sha256": teacher})
    place_on = present(device)
    compare: list[Callable[[int], dict[str, _Difference]]] = []
    models: list[Model] = []
    if yolo is not None:
        expects = cast(YoloInput, fingerprint["yolo_input"])
        detector = Yolo(yolo, taps=cache.taps, expects=expects, device=place_on, size_px=size_px)
        compare.append(lambda index: _compare_features(cache, detector, index))
        models.append(detector.features)
    if teacher is not None:
        made_as = network_settings(fingerprint["teacher_network"])
        network = Teacher(teacher, **made_as, device=place_on, size_px=size_px)
        compare.append(lambda index: {LOGITS: _compare_logits(cache, network, index)})
        models.append(lambda images: {LOGITS: network.logits(images)[:, None]})
    chosen = np.random.default_rng(seed).permutation(len(cache))[:rows].tolist()
    jobs = [(of_model, index) for of_model in compare for index in chosen]
    found: dict[str, list[_Difference]] = {}
    bad = []
    for of_model, index in tqdm(
        jobs, desc="models", unit="row", disable=None if progress else True
    ):
        for part, difference in of_model(index).items():
            found.setdefault(part, []).append(difference)
            if difference.problem:
                problem = f"row {index}: {difference.problem}"
                bad.append(Problem(path=part, problem=problem, rows=[cache.keys[index].sample_id]))
    agreement = {part: _agreement(differences) for part, differences in found.items()}
    report = dataclasses.replace(report, ok=not bad, bad=bad, models=agreement)
    if not flip:
        return report
    if bad:
        log.warning("mirrored rows were not looked at: the models do not give what is stored")
        return report
    mirrored = measure_mirrored(cache, chosen, models, progress=progress)
    return dataclasses.replace(report, mirrored=mirrored, not_kept=_kept(cache.path, mirrored))


def _kept(path: Place, mirrored: Mapping[str, Mirrored]) -> str:
    """Store what was measured; returns why the cache does not have it, where it has not."""
    try:
        keep(path, mirrored)
    except (CacheError, StorageError) as error:
        return str(error)
    return ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Difference:
    """Of one row of one part, between what is stored and what the model gives now."""

    problem: str | None
    largest: float
    of_allowed: float
    squared: float
    spread: float


def _compare_features(cache: Cache, yolo: Yolo, index: int) -> dict[str, _Difference]:
    """By the folder of each tap."""
    found, now = {}, of_image(yolo.features(_pixels(cache, index)), 0)
    rounded = chain(cache.manifest.fingerprint["precision"])[1:]
    for tap in cache.manifest.taps:
        stored = cache.read_features(index, tap)
        bound = codecs.max_error(stored, tap, rounded)
        decoded = codecs.decode(stored, tap)
        found[tap.folder] = _compare(decoded, codecs.on_host(now[tap.name]), bound)
    return found


def _compare_logits(cache: Cache, teacher: Teacher, index: int) -> _Difference:
    stored = cache[index].teacher_logits[None]
    return _compare(stored, teacher.logits(_pixels(cache, index)), codecs.max_logit_error(stored))


def _pixels(cache: Cache, index: int) -> NDArray[np.uint8]:
    image: NDArray[Any] = cache[index].image
    return image[None]


def _compare(
    stored_CHW: NDArray[np.generic], now_CHW: NDArray[np.generic], bound: NDArray[np.float64]
) -> _Difference:
    stored, now = stored_CHW.astype(np.float64), now_CHW.astype(np.float64)
    if not np.isfinite(now).all():
        nothing = "the model now gives values that are not finite"
        return _Difference(problem=nothing, largest=0, of_allowed=0, squared=0, spread=0)
    scale = np.abs(now).max(axis=(1, 2), keepdims=True) + np.sqrt(np.mean(now**2))
    allowed = np.maximum(bound + PROVIDER_TOLERANCE * scale, _SMALLEST_ALLOWED)
    error = np.abs(stored - now)
    of_allowed = error / allowed
    channel, y, x = np.unravel_index(np.argmax(of_allowed), error.shape)
    problem = None
    if of_allowed.max() > 1:
        problem = (
            f"channel {channel} at ({y}, {x}) is stored as {stored[channel, y, x]:.6g}, the model "
            f"now gives {now[channel, y, x]:.6g}, {of_allowed.max():.3g} times as far as allowed"
        )
    return _Difference(
        problem=problem,
        largest=float(error.max()),
        of_allowed=float(of_allowed.max()),
        squared=float((error**2).sum()),
        spread=float(((now - now.mean()) ** 2).sum()),
    )


def _agreement(differences: list[_Difference]) -> Agreement:
    spread = sum(d.spread for d in differences)
    return Agreement(
        rows=len(differences),
        bad_rows=sum(d.problem is not None for d in differences),
        largest_error=max((d.largest for d in differences), default=0.0),
        largest_of_allowed=max((d.of_allowed for d in differences), default=0.0),
        relative_mse=sum(d.squared for d in differences) / spread if spread else None,
    )
