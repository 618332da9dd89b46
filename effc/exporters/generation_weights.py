"""Saving a graph beside another one so that weights which both hold lie on disk once."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir import external_data

# Below this a tensor stays in the graph's own file: naming a place in another one takes about as much.
_LEAST_BYTES = 256

_Content = tuple[ir.DataType, tuple[int, ...], bytes]


def save_sharing_weights(model: ir.Model, path: Path, other: Path) -> int:
    """Write ``path``, its weights taken from the data file of ``other`` where that holds equal ones.

    Weights are compared by content, not by name: fusion and quantization name them anew. What ``other`` does not hold
    goes into ``<name>.data`` beside ``path``, which must be in the directory of ``other``.

    Returns:
        bytes that are shared.
    """
    places: dict[_Content, ir.ExternalTensor] = {}
    for graph in ir.load(str(other)).graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                places.setdefault(_content(value.const_value), value.const_value)
    own: list[ir.Value] = []
    shared = 0
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < _LEAST_BYTES:
                continue
            place = places.get(_content(tensor))
            if place is None:
                own.append(value)
                continue
            value.const_value = ir.ExternalTensor(
                place.location,
                place.offset,
                place.length,
                place.dtype,
                shape=ir.Shape(place.shape),
                name=value.name or "",
                base_dir=path.parent,
            )
            shared += tensor.nbytes
    tensors = [value.const_value for value in own if value.const_value is not None]
    moved = external_data.convert_tensors_to_external(tensors, path.parent, f"{path.name}.data") if tensors else []
    for value, tensor in zip(own, moved, strict=True):
        value.const_value = tensor
    ir.save(model, str(path))
    return shared


def _content(tensor: ir.TensorProtocol) -> _Content:
    array = np.ascontiguousarray(tensor.numpy())
    # Hashed in place: the largest weights are gigabytes.
    content: Any = array.reshape(-1).view(np.uint8)
    return tensor.dtype, tuple(array.shape), hashlib.sha256(content).digest()
