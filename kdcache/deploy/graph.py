"""A network as an ONNX file, and the same file with 8-bit weights and activations."""

from __future__ import annotations

import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, load, save
from torch import nn

from kdcache.deploy.trained import METADATA_KEY
from kdcache.errors import ModelError

# 18 is the lowest opset torch's exporter writes natively; ONNX Runtime reads it since 1.14.
OPSET = 18

# Tensors of fewer elements are shapes and other constants of the graph, not weights.
_SMALLEST_WEIGHT = 16


def write_onnx(
    network: nn.Module,
    example: torch.Tensor,
    outputs: Sequence[str],
    path: Path,
    *,
    fixed_batch: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write `network` as ONNX: input `image` of the example's form, any batch or the example's."""
    # The exporter reports each of its steps on its loggers; a person wants the result.
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    program = torch.onnx.export(
        network,
        (example,),
        dynamo=True,
        input_names=["image"],
        output_names=list(outputs),
        dynamic_shapes=None if fixed_batch else ({0: torch.export.Dim("batch")},),
        opset_version=OPSET,
        verbose=False,
    )
    assert program is not None  # for the type checker: None only when given a path
    program.model.metadata_props[METADATA_KEY] = json.dumps(metadata or {})
    program.save(path, external_data=False)


def check_only_weights_of(model: ModelProto, network: nn.Module) -> int:
    """How many weights the graph holds; raises ModelError for one that `network` has not.

    A weight is told by its shape: those of the projection, 1×1 convolutions to the detector's
    channels, are none of a student's. Biases may be added where BatchNorm was folded away.
    """
    own = Counter(tuple(tensor.shape) for tensor in network.state_dict().values())
    lengths = {shape[0] for shape in own if len(shape) > 1}
    found = [tuple(weight.dims) for weight in model.graph.initializer]
    weights = [shape for shape in found if np.prod(shape) >= _SMALLEST_WEIGHT]
    foreign = Counter(shape for shape in weights if len(shape) > 1) - own
    foreign += Counter(s for s in weights if len(s) == 1 and s not in own and s[0] not in lengths)
    if foreign:
        raise ModelError(f"the graph holds weights that are not the student's: {list(foreign)}")
    return sum(int(np.prod(shape)) for shape in weights)


def quantise(source: Path, out: Path, inputs: Iterable[NDArray[Any]]) -> None:
    """Write `source` with 8-bit weights and activations, their ranges taken from the given inputs.

    onnxruntime's static quantiser: weights by output channel, activations by tensor. All operators
    it knows, not the convolutions alone: on real photos that moved 1.7 % of the pixels instead of
    9 %, in three quarters of the time (docs/log.md).
    """
    from onnxruntime.quantization import (  # here only: it takes a second
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._inputs: Iterator[NDArray[Any]] = iter(inputs)

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            image = next(self._inputs, None)
            return None if image is None else {"image": image}

    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own code, on numpy and deprecated arguments
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            out,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
    _drop_unused_opsets(out)


def _drop_unused_opsets(path: Path) -> None:
    """The quantiser names domains that no node of the graph is of; other runtimes stumble over them."""
    model = load(path)
    used = {node.domain for node in model.graph.node}
    kept = [opset for opset in model.opset_import if opset.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    save(model, path)
