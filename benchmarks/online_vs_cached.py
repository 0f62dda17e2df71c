"""How much faster is an epoch from the cache than one that runs both frozen networks in every step?

    .venv/bin/python benchmarks/online_vs_cached.py [--size 128 --images 4 --batch-size 2 --steps 2]

Needs no download: the detector has random weights and YOLOv9-E's cost up to the tap, the teacher is
the real EfficientNet-B3 UNet with random weights, the scenes are drawn. float32. Bytes per row of
random weights are not those of real models.

The online loop is a fair one: photos are decoded ahead in threads, and what the frozen networks give
stays on the device. On a GPU a second one takes the features through the host, as a loop does that
runs ONNX Runtime with numpy arrays. To tell its parts apart the GPU is waited for between them.
With --runs N it also times N whole runs with other loss weights, the extraction counted to the
cached ones.

Whole epochs alternate, cached then online, and medians are compared, so that a drifting machine
slows both. Steps must not alternate: the loader's threads would decode the next batches while the
frozen networks run, and the cached step would look free of its own decoding. Each epoch starts with
an empty loader, and these epochs are short, so the ratio is a little lower than in a long run. So
small a cache lies in memory: a slow disk is not part of this.

A busy machine distorts more than it slows: OpenMP's threads spin for one another at the end of every
operator, and one other busy process on 2 cores made the teacher 2 to 24 times slower at 128 px. The
header tells the load at the start; OMP_WAIT_POLICY=passive takes the spinning away.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import click
import numpy as np
import torch
from frozen_models import cost, save_detector, save_teacher
from machine import line, machine

from kdcache.allocator import keep_freed_memory
from kdcache.cache.format import RowKey
from kdcache.cache.info import describe
from kdcache.cache.reader import Cache
from kdcache.config import ExtractConfig, TrainConfig, validated
from kdcache.errors import KdcacheError
from kdcache.onnx_session import Device
from kdcache.pixels import normalised, on_device
from kdcache.precompute.dataset import Dataset, Sample, folder_dataset
from kdcache.precompute.extract import extract
from kdcache.precompute.job import DEFAULT_BATCH, open_teacher, open_yolo
from kdcache.precompute.sources import Preparation, Tally, prepare
from kdcache.precompute.teacher import Teacher
from kdcache.precompute.yolo import Yolo
from kdcache.standins import TAP, save_scenes
from kdcache.train import Batch, batches
from kdcache.train.parallel import Processes
from kdcache.train.prepare import new_state
from kdcache.train.step import take_step, trained_model

DETECTOR, TEACHER = "detector.onnx", "teacher.ckpt"
THROUGH_HOST = "online, features through the host"
SCENE_SIZE_PX = (480, 640)  # (height, width): COCO's usual, unlike the input, so it is resized

_EXTRACTIONS = 3


class _Clock:
    """Seconds spent in each named part."""

    def __init__(self, device: str) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._on_gpu = device == "cuda"

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = self._now()
        yield
        self.seconds[name] += self._now() - started

    def _now(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()


@dataclass(frozen=True, kw_only=True)
class _Online:
    """Both frozen networks and the photos they are run on."""

    yolo: Yolo
    teacher: Teacher
    samples: Sequence[Sample]
    settings: ExtractConfig
    batch_size: int
    device: str

    def batches(self, clock: _Clock, through_host: bool = False) -> Iterator[Batch]:
        """The epoch that `batches` reads from the cache, made from the image files."""
        todo = [(RowKey("train", sample.sample_id, 0), sample) for sample in self.samples]
        photos = prepare(todo, Preparation.of(self.settings), 2, Tally(strict=True))
        for _ in range(0, len(todo), self.batch_size):
            with clock.part("data"):
                rows = list(islice(photos, self.batch_size))
                images_NHWC = np.stack([row.image for row in rows])
                masks_NHW = np.stack([row.mask for row in rows])
                pixels = normalised(on_device(images_NHWC, self.device))
                mask = on_device(masks_NHW, self.device)[:, None]
            with clock.part("detector"):
                features = torch.as_tensor(self.yolo.features(images_NHWC)[TAP])
                if through_host:
                    features = features.cpu().to(self.device)
            with clock.part("teacher"):
                logits = self.teacher._network(pixels)
            yield Batch(
                image=pixels,
                mask=mask,
                logits=logits,
                features={TAP: features},
                keys=[row.key for row in rows],
            )


class _Trained:
    """A student and projection that are trained."""

    def __init__(self, cache: Cache, config: TrainConfig, device: str) -> None:
        torch.manual_seed(config.seed)
        self._config = config
        self._state = new_state(cache, config, [cache.tap(TAP)], "random", device)
        self._model = trained_model(self._state, config, Processes()).train()

    def step(self, batch: Batch) -> None:
        """One update."""
        config = self._config
        take_step(self._model, self._state, [batch], config, config.temperature, Processes())


def measure(
    folder: Path,
    settings: ExtractConfig,
    config: TrainConfig,
    *,
    images: int,
    steps: int,
    runs: int,
    device: str,
) -> dict[str, Any]:
    """What the table shows; times are seconds per image, medians over the epochs."""
    _say("making the models and the scenes")
    save_detector(folder / DETECTOR)
    save_teacher(folder / TEACHER, settings.teacher_encoder)
    save_scenes(folder / "scenes", images, *SCENE_SIZE_PX)
    dataset = folder_dataset(folder / "scenes/images", folder / "scenes/masks")
    yolo = open_yolo(settings, settings.yolo_target_layer, device, settings.size)
    teacher = open_teacher(settings, device, settings.size)
    online = _Online(
        yolo=yolo,
        teacher=teacher,
        samples=dataset.samples,
        settings=settings,
        batch_size=config.batch_size,
        device=device,
    )

    extraction_s, of_models = _extracted(online, dataset, folder / "cache.zarr")
    cache = Cache(folder / "cache.zarr")
    trained = _Trained(cache, config, device)

    def source(kind: str, clock: _Clock) -> Iterator[Batch]:
        if kind == "cached":  # in the online order
            return batches(cache, config.batch_size, device, taps=[TAP], shuffle=False)
        return online.batches(clock, through_host=kind == THROUGH_HOST)

    _say("warming up")
    kinds = ["cached", "online", *([THROUGH_HOST] if device == "cuda" else [])]
    first = [next(source(kind, _Clock(device))) for kind in kinds]
    _refuse_different(*first[:2])
    for batch in first:
        trained.step(batch)
    clocks: dict[str, list[_Clock]] = {kind: [] for kind in kinds}
    epochs = math.ceil(steps / math.ceil(images / config.batch_size))
    for epoch in range(epochs):
        for kind, finished in clocks.items():
            _say(f"epoch {epoch + 1}/{epochs}, {kind}")
            finished.append(clock := _Clock(device))
            with clock.part("total"):
                for batch in source(kind, clock):
                    with clock.part("student"):
                        trained.step(batch)
    seconds = {
        f"{part}_{_key(kind)}_s": median(clock.seconds[part] for clock in finished) / images
        for kind, finished in clocks.items()
        for part in finished[0].seconds
    }
    # The loader keeps no clock: an epoch waits for it whenever it is not in a step.
    seconds["data_cached_s"] = seconds["total_cached_s"] - seconds["student_cached_s"]
    saved_s = seconds["total_online_s"] - seconds["total_cached_s"]
    models_s = seconds["detector_online_s"] + seconds["teacher_online_s"]
    step_s = seconds["student_online_s"]
    ratio = seconds["total_online_s"] / seconds["total_cached_s"]
    bound = (models_s + step_s) / step_s
    parameters, flops = cost(folder / DETECTOR, settings.size)
    return {
        "detector_parameters": parameters,
        "detector_flops": flops,
        "epochs": epochs,
        **seconds,
        "online_over_cached": ratio,
        "bound": bound,
        "of_bound": ratio / bound,
        "extraction_of_models": of_models,
        # without the first look: four to eight photos nine times, of whatever number there is
        "extraction_s": extraction_s,
        "cache_bytes": describe(cache)["bytes_per_row"],
        "break_even_epochs": extraction_s / saved_s if saved_s > 0 else None,
        "runs": runs,
        **_timed_runs(cache, config, runs, epochs, device, source, images * extraction_s),
    }


def _extracted(online: _Online, dataset: Dataset, path: Path) -> tuple[float, float]:
    """Extract; seconds an image, and the rate over that of the models alone on the same inputs.

    Models and extractions in turns, medians. The models are loaded already, as that is paid once
    for a dataset of any size; so is the first look, which is not part of the rate.
    """
    size = DEFAULT_BATCH[online.device]
    todo = [(RowKey("train", sample.sample_id, 0), sample) for sample in online.samples]
    settings = online.settings
    how = Preparation.of(settings)
    photos = [row.image for row in prepare(todo, how, 2, Tally(strict=True))]
    batches_NHWC = [np.stack(photos[n : n + size]) for n in range(0, len(photos), size)]
    pairs = []
    for number in range(_EXTRACTIONS):
        _say(f"extracting {len(photos)} images, {number + 1}/{_EXTRACTIONS}")
        shutil.rmtree(path, ignore_errors=True)
        clock = _Clock(online.device)
        with clock.part("models"):
            for images_NHWC in batches_NHWC:
                online.yolo.features(images_NHWC)
                online.teacher.logits(images_NHWC)
        models = (online.yolo, online.teacher)
        with mock.patch("kdcache.precompute.job._load_models", return_value=models):
            report = extract(settings, dataset, path, device=_frozen(online.device))
        pairs.append((1 / report.images_per_s, clock.seconds["models"] / len(photos)))
    extraction_s = median(seconds for seconds, _ in pairs)
    return extraction_s, median(models_s / seconds for seconds, models_s in pairs)


def _timed_runs(
    cache: Cache,
    config: TrainConfig,
    runs: int,
    epochs: int,
    device: str,
    source: Callable[[str, _Clock], Iterator[Batch]],
    extraction_s: float,
) -> dict[str, float]:
    """Whole runs, each from a fresh student with a feature weight of its own, cached and online."""
    seconds = {"cached": 0.0, "online": 0.0}
    for number in range(runs):
        for kind in seconds:
            _say(f"run {number + 1}/{runs}, {kind}")
            clock = _Clock(device)
            with clock.part("run"):
                trained = _Trained(
                    cache, config.model_copy(update={"feature_weight": 0.25 * (number + 1)}), device
                )
                for _ in range(epochs):
                    for batch in source(kind, clock):
                        trained.step(batch)
            seconds[kind] += clock.seconds["run"]
    if not runs:
        return {}
    cached_s = extraction_s + seconds["cached"]
    return {
        "runs_online_s": seconds["online"],
        "runs_cached_s": cached_s,
        "runs_online_over_cached": seconds["online"] / cached_s,
    }


def _key(kind: str) -> str:
    return kind.replace(",", "").replace(" ", "_")


def _frozen(device: str) -> Device:
    return "cuda" if device == "cuda" else "cpu"


def _refuse_different(cached: Batch, online: Batch) -> None:
    """Times of steps on different data must not be compared."""
    same = torch.equal(cached.image, online.image) and torch.equal(cached.mask, online.mask)
    pairs = ((cached.logits, online.logits), (cached.features[TAP], online.features[TAP]))
    for x, y in pairs:
        same = same and x is not None and y is not None and _close(x, y)
    if not same:
        raise KdcacheError("the first cached and online batches differ")


def _close(x: torch.Tensor, y: torch.Tensor) -> bool:
    return bool((x - y).square().mean() <= 1e-3 * y.var())


def table(found: dict[str, Any]) -> str:
    """Markdown, to be pasted into docs/log.md."""
    kinds = ["online", "cached"]
    if f"total_{_key(THROUGH_HOST)}_s" in found:
        kinds.insert(1, THROUGH_HOST)
    parameters, flops = found["detector_parameters"], found["detector_flops"]
    rows = [f"detector: {parameters / 1e6:.1f} M parameters, {flops / 1e9:.1f} GFLOPs\n"]
    rows += [f"| per image | {' | '.join(kinds)} | online / cached |"]
    rows.append("| --- |" + " ---: |" * (len(kinds) + 1))
    titles = {"data": "data wait", "student": "student step", "total": "step, total"}
    for part in ("data", "detector", "teacher", "student", "total"):
        of_kind = {kind: found.get(f"{part}_{_key(kind)}_s") for kind in kinds}
        shown = [f"{value:.3f} s" if value is not None else "" for value in of_kind.values()]
        online_s, cached_s = of_kind["online"], of_kind["cached"]
        ratio = f"{online_s / cached_s:.2f}" if online_s and cached_s else ""
        rows.append(f"| {' | '.join([titles.get(part, part), *shown, ratio])} |")
    epochs = found["break_even_epochs"]
    facts = {
        "bound of the ratio, (detector + teacher + step) / step": f"{found['bound']:.2f}",
        "online / cached, of that bound": f"{found['of_bound']:.3f}",
        "extraction, once": f"{found['extraction_s']:.3f} s an image",
        "extraction, of the bare models' rate": f"{found['extraction_of_models']:.3f}",
        "bytes in the cache": f"{found['cache_bytes']:,.0f} an image",
        "break-even, epochs": f"{epochs:.2f}" if epochs else "never",
    }
    if found["runs"]:
        ratio = found["runs_online_over_cached"]
        facts[f"{found['runs']} runs of {found['epochs']} epochs, extraction included"] = (
            f"{found['runs_online_s']:.3g} s online, {found['runs_cached_s']:.3g} s cached: {ratio:.2f}"
        )
    return "\n".join([*rows, "", *(f"- {name}: {value}" for name, value in facts.items())])


def _say(text: str) -> None:
    click.echo(f"{text} …", err=True)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--size", default=640, help="Side of the square model input, px.")
@click.option("--images", type=click.IntRange(1), default=8, help="Images of an epoch.")
@click.option("--batch-size", type=click.IntRange(1), default=4, help="Images a step.")
@click.option("--steps", type=click.IntRange(1), default=4, help="Steps of each kind, in epochs.")
@click.option("--runs", type=click.IntRange(0), default=0, help="Whole runs of as many epochs.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@click.option("--keep", type=click.Path(path_type=Path), help="New folder for files to be kept.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="File for the numbers.")
def main(
    size: int,
    images: int,
    batch_size: int,
    steps: int,
    runs: int,
    device: str,
    keep: Path | None,
    json_path: Path | None,
) -> None:
    """Time epochs from a cache against epochs that run both frozen networks in every step.

    Example: python benchmarks/online_vs_cached.py --size 128 --images 4 --batch-size 2 --steps 2
    """
    keep_freed_memory()  # as the command does; both kinds of epochs gain by it
    if keep is not None and keep.exists() and any(keep.iterdir()):
        raise click.UsageError(f"--keep {keep} is not empty; a cache in it would be resumed")
    with contextlib.ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        given = {"size_px": size, "images": images, "batch_size": batch_size, "device": device}
        header = machine() | {name: str(value) for name, value in given.items()}
        try:
            found = compared(
                folder, size, batch_size, images=images, steps=steps, runs=runs, device=device
            )
        except KdcacheError as error:
            raise click.ClickException(str(error)) from error
    click.echo(line(header) + "\n")
    click.echo(table(found))
    if json_path is not None:
        json_path.write_text(json.dumps(header | found, indent=2) + "\n", encoding="utf-8")


def compared(folder: Path, size: int, batch_size: int, **options: Any) -> dict[str, Any]:
    """`measure` at these sizes, files in `folder`; raises KdcacheError."""
    models = {"yolo_onnx_path": folder / DETECTOR, "teacher_checkpoint": folder / TEACHER}
    settings = validated(ExtractConfig, {**models, "size": size})
    config = TrainConfig(encoder_weights="random", batch_size=batch_size)
    return measure(folder, settings, config, **options)


if __name__ == "__main__":
    main()
