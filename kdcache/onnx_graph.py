"""ONNX graphs as files: reading them, their digest, cutting them at a tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    load,
)

from kdcache.errors import ModelError, nearest

# Operators that only move values about: what is before them has the same values.
_MOVING = {
    "Cast",
    "Flatten",
    "Identity",
    "Reshape",
    "Slice",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}


def read_model(path: Path) -> ModelProto:
    """Load an ONNX file with its external data; raises ModelError when it is not one."""
    if not path.is_file():
        raise ModelError(f"{path}: no such model file")
    try:
        model = load(path)
    except Exception as error:  # protobuf's DecodeError has no public home
        raise ModelError(f"{path}: not an ONNX model: {error}") from error
    if not model.graph.node:
        raise ModelError(f"{path}: not an ONNX model, or one without nodes")
    return model


def model_sha256(path: Path) -> str:
    """SHA-256 of a model file; of an ONNX file with external data, over the digests of all files."""
    if not path.is_file():
        raise ModelError(f"{path}: no such model file")
    names = _external_files(path) if path.suffix == ".onnx" else []
    digests = [_sha256_file(path), *(_sha256_file(path.parent / name) for name in names)]
    if not names:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _external_files(path: Path) -> list[str]:
    """Names of the files beside a model that hold its weights."""
    try:
        model = load(path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError has no public home
        raise ModelError(f"{path}: not an ONNX model: {error}") from error
    names = {
        entry.value
        for tensor in _tensors(model.graph)
        if tensor.data_location == TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    if lost := sorted(name for name in names if not (path.parent / name).is_file()):
        raise ModelError(
            f"{path}: its weights are in {', '.join(lost)}, which is not beside it; copy that file "
            f"to {path.parent}"
        )
    return sorted(names)


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """All constants of a graph and of the bodies of its nodes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
            elif attribute.type == AttributeProto.GRAPH:
                yield from _tensors(attribute.g)


def _sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def last_activation(model: ModelProto) -> tuple[str, str]:
    """The operator that computes the values of the first output, and the tensor it takes."""
    producers = {name: node for node in model.graph.node for name in node.output if name}
    node = producers.get(model.graph.output[0].name)
    while node is not None and node.op_type in _MOVING:
        node = producers.get(node.input[0])
    return (node.op_type, node.input[0]) if node is not None and node.input else ("", "")


def pruned(
    model: ModelProto, outputs: Sequence[str], path: Path, option: str = "--tap"
) -> ModelProto:
    """The model with these tensors as its only outputs and without the nodes that they do not need.

    `option` is what a person chooses them with.
    """
    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output if name}
    for name in outputs:
        if name not in producers:
            raise ModelError(
                f"{path}: no tensor {name!r} in the graph; nearest: {nearest(name, producers)}; "
                f"choose one with {option}"
            )
    needed, waiting = set(), list(outputs)
    while waiting:
        node = producers.get(waiting.pop())
        if node is not None and id(node) not in needed:
            needed.add(id(node))
            waiting.extend(_names_used(node))
    kept = [node for node in graph.node if id(node) in needed]
    used = {name for node in kept for name in _names_used(node)}
    cut = ModelProto()
    cut.CopyFrom(model)
    del cut.graph.node[:], cut.graph.output[:], cut.graph.initializer[:], cut.graph.input[:]
    cut.graph.node.extend(kept)
    cut.graph.initializer.extend(i for i in graph.initializer if i.name in used)
    # Exports of IR version 3 list their weights as inputs too; those are no inputs to feed.
    weights = {i.name for i in graph.initializer}
    cut.graph.input.extend(i for i in graph.input if i.name in used - weights)
    # ONNX Runtime infers the type of an output that is only named.
    known = {info.name: info for info in [*graph.output, *graph.value_info]}
    cut.graph.output.extend(known.get(name, ValueInfoProto(name=name)) for name in outputs)
    return cut


def _names_used(node: NodeProto) -> Iterator[str]:
    """Tensors a node reads, also those its If and Loop bodies take from outside."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            for inner in attribute.g.node:
                yield from _names_used(inner)
