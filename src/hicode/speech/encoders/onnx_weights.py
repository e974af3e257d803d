"""Weights of an ONNX file, read from the protobuf wire format, which saves a dependency on the `onnx` package.

Field numbers are those of onnx.proto.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_DTYPES = {1: np.float32, 2: np.uint8, 3: np.int8, 6: np.int32, 7: np.int64}


def onnx_weights(path: Path) -> dict[str, Tensor]:
    """Float weights of a graph by name. Quantised ones are dequantised and lose their `_quantized` suffix."""
    model = memoryview(path.read_bytes())
    graph = next(value for number, value in _fields(model) if number == 7)  # ModelProto.graph
    raw: dict[str, np.ndarray] = {}
    axes: dict[str, int] = {}
    for number, value in _fields(graph):
        if number == 5:  # GraphProto.initializer: TensorProto
            name, array = _tensor(value)
            raw[name] = array
        elif number == 1:  # GraphProto.node: NodeProto
            fields = list(_fields(value))
            if bytes(next(v for n, v in fields if n == 4)) == b"DequantizeLinear":
                first_input = bytes(next(v for n, v in fields if n == 1)).decode()
                for attribute in (dict(_fields(v)) for n, v in fields if n == 5):
                    if bytes(attribute[1]) == b"axis":
                        axes[first_input] = attribute[3]
    weights = {}
    for name, array in raw.items():
        if array.dtype == np.float32:
            weights.setdefault(name, torch.from_numpy(array.copy()))
        elif name.endswith("_quantized"):
            weights[name.removesuffix("_quantized")] = _dequantised(name, raw, axes.get(name, 1))
    return weights


def _dequantised(name: str, raw: dict[str, np.ndarray], axis: int) -> Tensor:
    # "conv1.weight_quantized" has its scale under "conv1.weight_scale", others under "NAME_quantized_scale".
    array, stem = raw[name].astype(np.float32), name.removesuffix("_quantized")
    scale = raw[f"{stem}_scale"] if f"{stem}_scale" in raw else raw[f"{name}_scale"]
    zero = raw.get(f"{stem}_zero_point", raw.get(f"{name}_zero_point", np.zeros(1))).astype(np.float32)
    shape = [1] * array.ndim
    if scale.size > 1:
        shape[axis] = scale.size
    value = (array - zero.reshape(shape if zero.size > 1 else -1)) * scale.reshape(shape)
    return torch.from_numpy(value.astype(np.float32))


def _tensor(message: memoryview) -> tuple[str, np.ndarray]:
    shape, kind, name, data, numbers = [], 0, "", b"", []
    for number, field in _fields(message):
        if number == 1:  # dims, one by one or packed
            shape += [field] if isinstance(field, int) else list(_varints(field))
        elif number == 2:
            kind = field
        elif number == 8:
            name = bytes(field).decode()
        elif number == 5:  # int32_data, for small integers
            numbers += [field] if isinstance(field, int) else list(_varints(field))
        elif number in (4, 9):  # float_data and raw_data are laid out alike
            data += bytes(field)
    assert kind in _DTYPES, f"tensor {name} has ONNX type {kind}"
    array = np.frombuffer(data, _DTYPES[kind]) if data else np.array(numbers).astype(_DTYPES[kind])
    return name, array.reshape(shape)


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """(field number, value) pairs; nested messages and strings stay bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(message, at)
        elif wire == 2:
            size, at = _varint(message, at)
            value, at = message[at : at + size], at + size
        else:
            size = {1: 8, 5: 4}[wire]
            value, at = message[at : at + size], at + size
        yield key >> 3, value


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def _varints(message: memoryview) -> Iterator[int]:
    at = 0
    while at < len(message):
        value, at = _varint(message, at)
        yield value
