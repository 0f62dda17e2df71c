"""Signs of trouble in a run's own numbers, and what to do about each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdcache.config import TrainConfig

LARGE_KL = 10.0  # the design document expects 0.1 to 1 after training
SILENT_FEATURE_LOSS = 1e-6
SKIPPED_STEPS = 5  # the loss scale starts too high on purpose and costs a few
SLOW_EPOCHS = 5
SLOW_FALL = 0.01


def advice(history: Sequence[Mapping[str, Any]], config: TrainConfig) -> list[str]:
    """What the last finished epoch gives reason to say; each thing once, when it begins."""
    before = _signs(history[:-1], config) if len(history) > 1 else {}
    return [text for sign, text in _signs(history, config).items() if sign not in before]


def _signs(history: Sequence[Mapping[str, Any]], config: TrainConfig) -> dict[str, str]:
    last, found = history[-1], {}
    if last.get("train_kl", 0) > LARGE_KL:
        found["kl"] = (
            f"KL is {last['train_kl']:.3g}, far above the 0.1 to 1 to expect: is the teacher right "
            "for these images (val_teacher_miou)? A higher temperature softens it, kl_scale = 1 "
            "and a smaller kl_weight shrink it"
        )
    if last.get("val_student_miou", 0) is None:
        found["unlabelled"] = (
            "no validation row has a labelled person: there is no val mIoU, and the last epoch "
            "counts as the best"
        )
    if last.get("skipped_steps", 0) > SKIPPED_STEPS:
        found["float16"] = (
            f"float16 overflowed in {last['skipped_steps']:.0f} steps of the epoch, which changed "
            "nothing: --set half_precision=bfloat16 does not overflow"
        )
    feature = last.get("train_feature")
    if feature is not None and feature < SILENT_FEATURE_LOSS:
        found["feature"] = (
            f"the feature loss is {feature:.2g}: the cached features hardly vary; was the detector "
            "fed the right --yolo-input, and is it the right tap? (kdcache info CACHE --png FILE)"
        )
    if len(history) > SLOW_EPOCHS:
        then = history[-1 - SLOW_EPOCHS]["train_total"]
        if then - last["train_total"] < SLOW_FALL * abs(then) and last["epoch"] < config.epochs / 2:
            found["slow"] = (
                f"the loss fell by less than {SLOW_FALL:.0%} in {SLOW_EPOCHS} epochs, before half of "
                "the run: try a larger learning_rate, fewer epochs (the schedule falls faster), or "
                'train_encoder = "last:1"'
            )
    return found
