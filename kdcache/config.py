"""Typed settings of both stages, from a named config or TOML file, `--set key=value` and flags.

One flat file may hold the settings of both stages; each stage reads its own. A key that neither
stage knows is refused with the nearest known name.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from kdcache.errors import ConfigError, nearest

DEFAULT_CONFIG = "rgb_unet_yolo_feature_distillation_b0_from_b3"

# A named config holds what differs from the field defaults below, which are the design document's.
NAMED_CONFIGS: dict[str, dict[str, Any]] = {DEFAULT_CONFIG: {}}

# UNets halve the input five times, so a side must be a multiple of 2^5.
SIZE_MULTIPLE_PX = 32

Precision = Literal["float32", "float16", "int8", "int6", "int5", "int4"]
Compression = Literal["zstd", "lz4", "none"]
ResizeMode = Literal["stretch", "letterbox"]
YoloInput = Literal["rgb01", "bgr01", "rgb255", "bgr255"]
StudentTap = Literal["encoder", "decoder"]
Attention = Literal["none", "mask", "teacher_uncertainty", "feature_energy"]

# The table of a config file that says what a sweep varies.
GRID = "grid"

# Each has a weight in TrainConfig.
LOSSES = ("kl", "mse", "bce", "dice", "feature")

# smp's encoders give a feature at each of the strides 2 to 32.
ENCODER_LEVELS = 5


# What a tap counts at least, of all: its logarithm must be a number in float32.
_LEAST_SHARE = 1e-6


class _Settings(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[info.field_name or ""]
        holds = value if isinstance(value, list | tuple) else [value]
        if field.annotation is not bool and any(isinstance(one, bool) for one in holds):
            raise ValueError("true and false are for switches")
        return value


class ExtractConfig(_Settings):
    """What decides the content of a cache. Paths, device, batch and worker counts do not belong here."""

    yolo_onnx_path: Path | None = Field(None, description="the YOLO detector, an ONNX file")
    yolo_target_layer: tuple[str, ...] = Field(
        ("segmentation_model_34_Concat_output_0",),
        min_length=1,
        description="the tensors to tap in its graph: one, or a list",
    )
    yolo_input: YoloInput = Field(
        "rgb01", description="channel order and range the detector expects"
    )
    teacher_checkpoint: Path | None = Field(
        None, description="the teacher: an smp checkpoint (.pth .ckpt .safetensors) or an .onnx"
    )
    teacher_encoder: str = Field(
        "timm-efficientnet-b3", description="smp encoder of a teacher checkpoint"
    )
    teacher_output: str = Field(
        "", description="the tensor of an ONNX teacher that holds its logits, if not its output"
    )
    size: int = Field(640, gt=0, le=8192, description="side of the square model input, px")
    resize: ResizeMode = Field("stretch", description="how an image of another shape is fitted")
    store: Literal["both", "logits", "features"] = Field(
        "both", description="what the cache is to hold: only the models of that are run"
    )
    category: str = Field("person", description="the COCO category that is segmented")
    precision: Precision = Field("int8", description="how features are stored")
    compression: Compression = Field("zstd", description="how all arrays are compressed")
    shard_rows: int = Field(32, ge=1, le=4096, description="rows written and committed together")
    val_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of the images, chosen by hash of their id, for val"
    )
    views: int = Field(
        1, ge=1, le=1000, description="views of each training sample; the first is resized only"
    )
    augment: str = Field(
        "light", description="how the others are made: light, heavy or a TOML file"
    )
    seed: int = Field(0, ge=0, description="seed of the val choice and of the views")

    @field_validator("yolo_target_layer", mode="before")
    @classmethod
    def _one_layer_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("yolo_target_layer")
    @classmethod
    def _layers_are_told_apart(cls, layers: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(layers)) < len(layers):
            raise ValueError("a layer stands there twice")
        return layers

    @field_validator("size")
    @classmethod
    def _size_is_a_multiple(cls, size: int) -> int:
        if size % SIZE_MULTIPLE_PX:
            below = size // SIZE_MULTIPLE_PX * SIZE_MULTIPLE_PX
            offers = " or ".join(str(s) for s in (below, below + SIZE_MULTIPLE_PX) if s)
            raise ValueError(
                f"not a multiple of {SIZE_MULTIPLE_PX}, which the UNets need; use {offers}"
            )
        return size


class TrainConfig(_Settings):
    """What decides the result of a training run, given a cache."""

    student_encoder: str = Field("timm-efficientnet-b0", description="smp encoder of the student")
    encoder_weights: str = Field(
        "imagenet", description="a weights file, `imagenet` (hub) or `random`"
    )
    student_tap: StudentTap | tuple[StudentTap, ...] = Field(
        "encoder",
        description="where projections start: encoder or decoder, at each tap's own stride; or a list, "
        "one for each tap",
    )
    feature_taps: tuple[str, ...] = Field(
        (), description="taps of the cache that the feature loss is of; none named = all"
    )
    tap_weights: tuple[float, ...] = Field(
        (), description="weight of each of these taps, scaled to add up to 1; none given = equal"
    )
    layer_weights: Literal["fixed", "learned"] = Field(
        "fixed", description="tap_weights as they are, or where learning them begins"
    )
    layer_regularisation: float = Field(
        0.1, ge=0, description="what learned weights pay for leaving tap_weights (times KL)"
    )
    layer_lr_factor: float = Field(
        100.0, gt=0, description="learning rate of learned weights, over that of the rest"
    )
    feature_attention: Attention = Field(
        "none", description="which positions of a feature map count more"
    )
    views: int = Field(
        0, ge=0, le=1000, description="views of a sample that are trained on, the first N; 0 = all"
    )
    student_augment: Literal["none", "light", "heavy"] = Field(
        "none", description="change colours of what the student sees, on the device; targets stay"
    )
    flip_targets: bool = Field(
        False,
        description="mirror half of the rows, with their targets: see `kdcache verify --flip`",
    )
    train_encoder: str = Field(
        "none", description="none, last:N (of the encoder's five levels) or all"
    )
    encoder_lr_factor: float = Field(
        0.1, gt=0, description="learning rate of the trained encoder levels, over that of the rest"
    )
    projection_hidden_dim: int = Field(
        768, ge=1, le=65536, description="channels inside the projection"
    )
    standardise_features: bool = Field(
        False, description="bring each channel of the feature target to mean 0 and deviation 1"
    )
    epochs: int = Field(50, ge=1)
    batch_size: int = Field(4, ge=1, description="rows a step")
    optimizer: Literal["AdamW"] = "AdamW"
    learning_rate: float = Field(1e-4, gt=0)
    scheduler: Literal["cosine"] = Field("cosine", description="learning rate, stepped by epoch")
    min_lr: float = Field(1e-6, ge=0, description="learning rate the cosine ends at")
    weight_decay: float = Field(1e-4, ge=0)
    grad_clip: float = Field(
        0.5, ge=0, description="norm limit, student and projection apart; 0 = off"
    )
    gradient_accumulation: int = Field(1, ge=1, description="batches whose gradients make one step")
    warmup_steps: int = Field(
        0, ge=0, description="steps in which the learning rate rises to its own"
    )
    mixed_precision: bool = Field(False, description="autocast the networks; losses stay float32")
    half_precision: Literal["auto", "bfloat16", "float16"] = Field(
        "auto", description="of mixed_precision; auto is bfloat16 where the device has it"
    )
    compile: bool = Field(
        False, description="torch.compile the networks: needs a C++ compiler, on a GPU Triton"
    )
    deterministic: bool = Field(
        False, description="only kernels that give the same bits every time, also on a GPU"
    )
    temperature: float = Field(3.0, ge=0.01, le=1000, description="T, or T at the first epoch")
    temperature_schedule: Literal["none", "linear", "cosine", "exponential"] = "none"
    final_temperature: float = Field(
        1.0, ge=0.01, le=1000, description="T at the last epoch of a schedule"
    )
    kl_scale: Literal["T", "T2", "1"] = Field("T", description="factor of the KL loss")
    kl_weight: float = Field(1.0, ge=0)
    mse_weight: float = Field(0.5, ge=0)
    bce_weight: float = Field(0.5, ge=0)
    dice_weight: float = Field(1.0, ge=0)
    feature_weight: float = Field(0.5, ge=0)
    feature_loss: Literal["mse", "cosine"] = "mse"
    feature_positions: int = Field(
        0, ge=0, description="grid positions of each step that the feature loss is of; 0 = all"
    )
    seed: int = Field(0, ge=0, lt=2**63)

    @field_validator("kl_scale", mode="before")
    @classmethod
    def _kl_scale_is_text(cls, value: Any) -> Any:
        return "1" if value == 1 else value  # TOML and --set make a number of it

    @field_validator("student_tap", mode="before")
    @classmethod
    def _student_tap_is_known(cls, value: Any) -> Any:
        parts = [value] if isinstance(value, str) else value
        known = get_args(StudentTap)
        if not isinstance(parts, list | tuple) or not parts or any(p not in known for p in parts):
            raise ValueError("expected encoder or decoder, or a list of these, one for each tap")
        return value

    @field_validator("feature_taps", "tap_weights", mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | int | float) else value

    @field_validator("feature_taps")
    @classmethod
    def _each_tap_is_named_once(cls, taps: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(taps)) < len(taps) or "" in taps:
            raise ValueError("expected names of taps, each once")
        return taps

    @field_validator("tap_weights", mode="before")
    @classmethod
    def _weights_are_a_list(cls, value: Any) -> Any:
        if isinstance(value, str) and "," in value:
            raise ValueError("expected a list, in brackets: [1,2]")
        return value

    @field_validator("tap_weights")
    @classmethod
    def _every_tap_counts(cls, weights: tuple[float, ...]) -> tuple[float, ...]:
        if any(weight <= 0 or weight / sum(weights) < _LEAST_SHARE for weight in weights):
            raise ValueError(
                f"expected numbers above 0, none of them below {_LEAST_SHARE:g} of their sum; a tap that "
                "is to count nothing is left out of feature_taps"
            )
        return weights

    @model_validator(mode="after")
    def _something_is_learned(self) -> Self:
        if not any(getattr(self, f"{name}_weight") for name in LOSSES):
            raise ValueError("all loss weights are 0: nothing would be learned")
        return self

    @model_validator(mode="after")
    def _each_tap_has_its_own(self) -> Self:
        student = () if isinstance(self.student_tap, str) else self.student_tap
        for name, given in (("tap_weights", self.tap_weights), ("student_tap", student)):
            if given and self.feature_taps and len(given) != len(self.feature_taps):
                raise ValueError(
                    f"{name} holds {len(given)} values, feature_taps {len(self.feature_taps)} names: "
                    "give one for each tap"
                )
        return self

    @field_validator("train_encoder")
    @classmethod
    def _train_encoder_is_known(cls, value: str) -> str:
        if not re.fullmatch(f"none|all|last:[1-{ENCODER_LEVELS}]", value):
            raise ValueError(f"expected none, last:1 to last:{ENCODER_LEVELS}, or all")
        return value

    @property
    def trained_levels(self) -> int:
        """How many of the encoder's last levels are trained."""
        if self.train_encoder in ("none", "all"):
            return ENCODER_LEVELS if self.train_encoder == "all" else 0
        return int(self.train_encoder.removeprefix("last:"))

    @property
    def uses_logits(self) -> bool:
        """Whether anything is made of the teacher's logits; else none are read."""
        attends = bool(self.feature_weight) and self.feature_attention == "teacher_uncertainty"
        return bool(self.kl_weight or self.mse_weight) or attends

    def tap_shares(self, taps: int) -> tuple[float, ...]:
        """`tap_weights` scaled to add up to 1, for so many taps; equal ones where none are given."""
        weights = self.tap_weights or (1.0,) * taps
        return tuple(weight / sum(weights) for weight in weights)

    @property
    def last_temperature(self) -> float:
        """T of the last epoch, which `evaluate` uses."""
        return self.temperature if self.temperature_schedule == "none" else self.final_temperature

    def to_toml(self) -> str:
        """The resolved settings as a TOML file that `--config` reads back."""
        return "".join(
            f"{key} = {json.dumps(value, ensure_ascii=False)}\n"
            for key, value in self.model_dump().items()
        )


SettingsT = TypeVar("SettingsT", ExtractConfig, TrainConfig)


def load(
    stage: type[SettingsT],
    config: str | None = None,
    assignments: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    base: str = DEFAULT_CONFIG,
    grid: dict[str, Any] | None = None,
) -> SettingsT:
    """The settings of one stage; later sources win: defaults, base, config, `key=value`s, flags.

    `base` and `config` are named configs or paths of TOML files; flags that are None were not
    given. A sweep passes `grid`, which takes the file's table of that name. Raises ConfigError for
    an unknown key, a wrong type or a value out of range.
    """
    given = _read_config(config) if config else {}
    table = given.pop(GRID, None)
    if table is not None:
        if grid is None or not isinstance(table, dict):
            raise ConfigError(f"--config {config}: [{GRID}] is a table of `kdcache sweep`'s axes")
        grid.update(table)
    values = _read_config(base) | given
    for assignment in assignments:
        key, separator, text = (part.strip() for part in assignment.partition("="))
        if not separator:
            raise ConfigError(f"--set {assignment}: expected key=value")
        values[key] = parse_value(text)
        if key in _known() and key not in _known(stage):
            raise ConfigError(f"--set {key}: a setting of the other stage, it would change nothing")
    values |= {key: value for key, value in (flags or {}).items() if value is not None}
    try:
        return validated(stage, values)
    except ConfigError as error:
        if any(f"{key!r}" in str(error) or f"{key} =" in str(error) for key in given):
            raise ConfigError(f"--config {config}: {error}") from error
        raise


def validated(stage: type[SettingsT], values: Mapping[str, Any]) -> SettingsT:
    """Check flat settings that may hold the other stage's keys too."""
    known = _known()
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown setting {key!r}; nearest known: {nearest(key, known)}")
    own = {key: value for key, value in values.items() if key in _known(stage)}
    try:
        return stage(**own)
    except ValidationError as error:
        problems = "; ".join(_describe(problem) for problem in error.errors())
        raise ConfigError(problems) from error


def _known(*stages: type[ExtractConfig] | type[TrainConfig]) -> set[str]:
    """Names of the settings of these stages, or of both."""
    return {name for stage in stages or (ExtractConfig, TrainConfig) for name in stage.model_fields}


def _describe(problem: Any) -> str:
    message = str(problem["msg"].removeprefix("Value error, "))
    if not problem["loc"]:
        return message
    where = ".".join(str(part) for part in problem["loc"])
    given = list(problem["input"]) if isinstance(problem["input"], tuple) else problem["input"]
    return f"{where} = {given!r}: {message}"


def _read_config(config: str) -> dict[str, Any]:
    if config in NAMED_CONFIGS:
        return dict(NAMED_CONFIGS[config])
    path = Path(config)
    if not path.is_file():
        raise ConfigError(
            f"--config {config}: no such file, and no config of that name; "
            f"named configs: {', '.join(NAMED_CONFIGS)}"
        )
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {config}: not valid TOML: {error}") from error


def parse_value(text: str) -> Any:
    """A TOML value; text that is not one (a bare word or path) is a string, ConfigError for half a list."""
    try:
        found = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError as error:
        if text.startswith(("[", "{")):
            raise ConfigError(
                f"{text}: not a TOML value ({error}); texts in a list stand in quotes, which the shell "
                'must leave there: \'key=["a", "b"]\''
            ) from error
        return text
    return found["value"] if len(found) == 1 else text
