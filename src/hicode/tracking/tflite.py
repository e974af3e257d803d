"""A TensorFlow Lite graph as a torch module, differentiable and batched.

It serves MediaPipe's face, detection and segmentation networks. Weights may be float32 or float16, dense or sparse;
they are widened and densified on loading. Tensors of rank 4 are `b c h w` here and `1 h w c` in the file; the others
keep the file's order, with a batch in front. Only the operators of those graphs are known; any other is refused by
name.

The file's tables are read with `flatbuffers`. The field numbers below are those of TFLite's published schema
(schema.fbs, version 3). The `tflite` package would add 120 generated modules for the same tables.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from flatbuffers import flexbuffers, number_types
from flatbuffers.table import Table
from jaxtyping import Float
from torch import Tensor, nn

from hicode.errors import AssetError

_DTYPES = {0: np.float32, 1: np.float16, 2: np.int32, 3: np.uint8, 4: np.int64, 9: np.int8}
_OPERATORS = {
    0: "ADD", 1: "AVERAGE_POOL_2D", 2: "CONCATENATION", 3: "CONV_2D", 4: "DEPTHWISE_CONV_2D", 5: "DEPTH_TO_SPACE",
    6: "DEQUANTIZE", 14: "LOGISTIC", 17: "MAX_POOL_2D", 18: "MUL", 19: "RELU", 22: "RESHAPE", 23: "RESIZE_BILINEAR",
    34: "PAD", 45: "STRIDED_SLICE", 54: "PRELU", 117: "HARD_SWISH", 124: "DENSIFY",
}  # fmt: skip
_CUSTOM = 32
Padding = tuple[int, int, int, int]  # left, right, top, bottom
_ACTIVATIONS: dict[int, Callable[[Tensor], Tensor] | None] = {0: None, 1: F.relu, 3: F.relu6}


class TfliteGraph(nn.Module):
    """The graph of one `.tflite` file; call it with its input, get its outputs by name.

    `input_size` is (height, width). `custom_options` lists (operator name, options) of the custom operators in order:
    MediaPipe keeps facts there that its callers need. Weights are buffers, not parameters: the graphs are not trained.
    Raises AssetError for a file that is no TFLite graph, or has an operator that is not known here.
    """

    def __init__(self, path: Path | str):
        super().__init__()
        try:
            tensors, operators, inputs, outputs = _read(Path(path).read_bytes())
        except (struct.error, IndexError, TypeError, ValueError) as error:
            raise AssetError(
                f"{path} is not a readable TFLite graph ({error}). Delete it and run `hicode assets pull`."
            ) from error
        self.input_size = tuple(tensors[inputs[0]].shape[1:3])
        self.custom_options = [(o.name, o.custom) for o in operators if o.custom is not None]
        self._input = inputs[0]
        self._outputs = {tensors[i].name: i for i in outputs}
        self._steps: list[tuple[Callable[..., Tensor], tuple[int, ...], int]] = []
        self._last_use: list[tuple[int, ...]] = []
        self._build(tensors, operators, outputs)

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        """Outputs by name, `b c h w` or `b n c`. The input has the graph's size and the range it was trained on."""
        assert tuple(x.shape[2:]) == self.input_size, (tuple(x.shape), self.input_size)
        values = {self._input: x.contiguous(memory_format=torch.channels_last)}
        for (step, inputs, output), dead in zip(self._steps, self._last_use, strict=True):
            values[output] = step(*(values[i] for i in inputs))
            for i in dead:
                del values[i]
        return {name: values[i] for name, i in self._outputs.items()}

    def _build(self, tensors: list["_Tensor"], operators: list["_Operator"], outputs: list[int]) -> None:
        constants = {i: t.data for i, t in enumerate(tensors) if t.data is not None}
        pads: dict[int, tuple[int, Padding]] = {}  # output of a spatial PAD that its convolution takes over
        for o in operators:
            if o.name in ("DEQUANTIZE", "DENSIFY") and o.inputs[0] in constants:
                constants[o.outputs[0]] = constants[o.inputs[0]]
                continue
            padding = _absorbed_padding(o, operators, constants)
            if padding is not None:
                pads[o.outputs[0]] = (o.inputs[0], padding)
                continue
            source, padding = pads.get(o.inputs[0], (o.inputs[0], (0, 0, 0, 0)))
            variables = tuple(i for i in (source, *o.inputs[1:]) if i not in constants)
            if o.name not in _BUILDERS:
                raise AssetError(
                    f"The graph has the operator {o.name}, which is not known here. "
                    "Use the pinned asset (`hicode assets pull`)."
                )
            step = _BUILDERS[o.name](o, _Context(self, tensors, constants, padding))
            self._steps.append((step, variables, o.outputs[0]))
        seen = set(outputs)
        for _, inputs, _ in reversed(self._steps):
            self._last_use.append(tuple({i for i in inputs if i not in seen}))
            seen.update(inputs)
        self._last_use.reverse()

    def weight(self, index: int, value: np.ndarray) -> Callable[[], Tensor]:
        """A buffer named by the file's tensor, read at call time so that `.to(device)` reaches it."""
        name = f"tensor{index}"
        if name not in self._buffers:
            t = torch.from_numpy(np.ascontiguousarray(value, np.float32))
            self.register_buffer(name, t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t)
        return lambda: self.get_buffer(name)


# ---- operators ----


@dataclass(frozen=True, eq=False)
class _Context:
    """What an operator is built from: the graph that keeps its weights, the file's tensors, and padding taken over."""

    graph: TfliteGraph
    tensors: list["_Tensor"]
    constants: dict[int, np.ndarray]
    padding: Padding

    def weight(self, index: int, axes: tuple[int, ...] | None = None) -> Callable[[], Tensor]:
        """A constant as a weight, its axes permuted."""
        value = self.constants[index]
        return self.graph.weight(index, value if axes is None else value.transpose(axes))

    def shapes(self, o: "_Operator") -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(of the first input, of the output), as in the file."""
        return self.tensors[o.inputs[0]].shape, self.tensors[o.outputs[0]].shape


def _convolution(o: "_Operator", context: _Context) -> Callable[..., Tensor]:
    kernel = context.constants[o.inputs[1]]
    depthwise = o.name == "DEPTHWISE_CONV_2D"
    weight = context.weight(o.inputs[1], (3, 0, 1, 2) if depthwise else (0, 3, 1, 2))
    bias = context.weight(o.inputs[2])
    stride = (o.option(2, "int32"), o.option(1, "int32"))
    activation = _activation(o.option(4 if depthwise else 3, "int8"), o)
    groups = kernel.shape[3] if depthwise else 1
    padding = context.padding
    if o.same_padding:
        padding = _same(context.shapes(o)[0][1:3], kernel.shape[1:3], stride)
    left, right, top, bottom = padding
    symmetric = left == right and top == bottom

    def convolve(x: Tensor) -> Tensor:
        if not symmetric:
            x = F.pad(x, padding)
        x = F.conv2d(x, weight(), bias(), stride, (top, left) if symmetric else 0, groups=groups)
        return _activate(x, activation)

    return convolve


def _arithmetic(o: "_Operator", context: _Context) -> Callable[..., Tensor]:
    fixed = next((i for i in o.inputs if i in context.constants), None)
    activation = _activation(o.option(0, "int8"), o)
    apply = torch.add if o.name == "ADD" else torch.mul
    if fixed is None:
        return lambda x, y: _activate(apply(x, y), activation)
    weight = context.weight(fixed, (0, 3, 1, 2) if context.constants[fixed].ndim == 4 else None)
    return lambda x: _activate(apply(x, weight()), activation)


def _prelu(o: "_Operator", context: _Context) -> Callable[..., Tensor]:
    slope = context.graph.weight(o.inputs[1], context.constants[o.inputs[1]].reshape(-1))
    return lambda x: F.prelu(x, slope())


def _pool(o: "_Operator", context: _Context) -> Callable[..., Tensor]:
    size_in = context.shapes(o)[0][1:3]
    stride = (o.option(2, "int32"), o.option(1, "int32"))
    size = (o.option(4, "int32"), o.option(3, "int32"))
    if o.name == "AVERAGE_POOL_2D":
        assert size == tuple(size_in), "only global averages occur"
        return lambda x: x.mean((2, 3), keepdim=True)
    edges = _same(size_in, size, stride) if o.same_padding else (0, 0, 0, 0)
    if not any(edges):
        return lambda x: F.max_pool2d(x, size, stride)
    return lambda x: F.max_pool2d(F.pad(x, edges, value=-torch.inf), size, stride)


def _pad(o: "_Operator", context: _Context) -> Callable[..., Tensor]:
    (_, _), (top, bottom), (left, right), (first, last) = context.constants[o.inputs[1]].tolist()
    return lambda x: F.pad(x, (left, right, top, bottom, first, last))


def _reshape(o: "_Operator", context: _Context) -> Callable[..., Tensor]:
    shape = context.shapes(o)[1][1:]
    return lambda x: _from_file_order(_to_file_order(x).reshape(x.shape[0], *shape))


def _concatenation(o: "_Operator", context: _Context) -> Callable[..., Tensor]:
    rank = len(context.shapes(o)[1])
    axis = o.option(0, "int32") % rank
    axis = (0, 2, 3, 1)[axis] if rank == 4 else axis
    return lambda *x: torch.cat(x, axis)


def _depth_to_space_of(o: "_Operator", context: _Context) -> Callable[..., Tensor]:
    block = o.option(0, "int32")
    return lambda x: _depth_to_space(x, block)


def _resize(o: "_Operator", context: _Context) -> Callable[..., Tensor]:
    size = [int(n) for n in context.constants[o.inputs[1]]]
    align, half = o.option(2, "bool"), o.option(3, "bool")
    assert align or half or context.shapes(o)[0][1:3] == (1, 1), f"corner-based resizing occurs nowhere: {o.name}"
    return lambda x: F.interpolate(x, size, mode="bilinear", align_corners=bool(align))


def _strided_slice(o: "_Operator", context: _Context) -> Callable[..., Tensor]:
    begin, end, stride = (context.constants[i].tolist() for i in o.inputs[1:])
    no_begin, no_end = o.option(0, "int32"), o.option(1, "int32")
    cut = [slice(None)] + [
        slice(None if no_begin >> d & 1 else begin[d], None if no_end >> d & 1 else end[d], stride[d])
        for d in range(1, len(context.shapes(o)[0]))
    ]
    return lambda x: _from_file_order(_to_file_order(x)[tuple(cut)])


def _transposed_convolution(o: "_Operator", context: _Context) -> Callable[..., Tensor]:
    weight, bias = context.weight(o.inputs[1], (3, 0, 1, 2)), context.weight(o.inputs[2])
    before, after = context.shapes(o)
    stride = (after[1] // before[1], after[2] // before[2])
    return lambda x: F.conv_transpose2d(x, weight(), bias(), stride)


def _landmarks_to_transform(o: "_Operator", context: _Context) -> Callable[..., Tensor]:
    return lambda x: _crop_transform(x, o.custom or {})


def _transform_tensor(o: "_Operator", context: _Context) -> Callable[..., Tensor]:
    options = o.custom or {}
    size = (options["output_height"], options["output_width"])
    return lambda x, T: _crop_bilinear(x, T, size)


_BUILDERS: dict[str, Callable[["_Operator", _Context], Callable[..., Tensor]]] = {
    "CONV_2D": _convolution,
    "DEPTHWISE_CONV_2D": _convolution,
    "ADD": _arithmetic,
    "MUL": _arithmetic,
    "PRELU": _prelu,
    "RELU": lambda o, context: F.relu,
    "HARD_SWISH": lambda o, context: F.hardswish,
    "LOGISTIC": lambda o, context: torch.sigmoid,
    "MAX_POOL_2D": _pool,
    "AVERAGE_POOL_2D": _pool,
    "PAD": _pad,
    "RESHAPE": _reshape,
    "CONCATENATION": _concatenation,
    "DEPTH_TO_SPACE": _depth_to_space_of,
    "RESIZE_BILINEAR": _resize,
    "STRIDED_SLICE": _strided_slice,
    "Landmarks2TransformMatrix": _landmarks_to_transform,
    "TransformTensorBilinear": _transform_tensor,
    "TransformLandmarks": lambda o, context: lambda x, T: x @ T[:, :2, :2].transpose(1, 2) + T[:, None, :2, 3],
    "Convolution2DTransposeBias": _transposed_convolution,
}


def _absorbed_padding(o: "_Operator", operators: list["_Operator"], constants: dict[int, np.ndarray]) -> Padding | None:
    """The padding of a spatial PAD that feeds nothing but one convolution without padding; None for any other."""
    consumers = [c for c in operators for i in c.inputs if i == o.outputs[0]]
    if o.name != "PAD" or len(consumers) != 1:
        return None
    (_, _), (top, bottom), (left, right), channels = constants[o.inputs[1]].tolist()
    if any(channels) or not consumers[0].name.endswith("CONV_2D") or consumers[0].same_padding:
        return None
    return left, right, top, bottom


def _activation(code: int, o: "_Operator") -> Callable[[Tensor], Tensor] | None:
    if code not in _ACTIVATIONS:
        raise AssetError(f"The graph's {o.name} has activation {code}, which is not known here. Use the pinned asset.")
    return _ACTIVATIONS[code]


def _activate(x: Tensor, activation: Callable[[Tensor], Tensor] | None) -> Tensor:
    return x if activation is None else activation(x)


def _same(size: Sequence[int], kernel: Sequence[int], stride: Sequence[int]) -> Padding:
    """TensorFlow's SAME padding: the odd pixel goes to the right and the bottom."""
    edges = []
    for n, k, s in zip(size, kernel, stride, strict=True):
        total = max((-(-n // s) - 1) * s + k - n, 0)
        edges.append((total // 2, total - total // 2))
    return (*edges[1], *edges[0])


def _to_file_order(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1) if x.ndim == 4 else x


def _from_file_order(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2) if x.ndim == 4 else x


def _depth_to_space(x: Tensor, n: int) -> Tensor:
    """Channels to n x n blocks, in TensorFlow's order (row, column, channel); pixel_shuffle's has the channel first."""
    b, c, h, w = x.shape
    x = x.reshape(b, n, n, c // (n * n), h, w)
    return x.permute(0, 3, 4, 1, 5, 2).reshape(b, c // (n * n), h * n, w * n)


def _crop_transform(points: Float[Tensor, "b n 3"], options: dict) -> Float[Tensor, "b 4 4"]:
    """Crop pixels to feature pixels, for a crop around a subset of the landmarks, level with the line between two.

    The subset is rotated so that the line from the left to the right index has the target angle. Its bounding box is
    taken there and scaled, and the crop's grid is laid over the box: T = rotate back · scale · shift to the centre.
    """
    left, right = points[:, options["left_rotation_idx"]], points[:, options["right_rotation_idx"]]
    angle = options["target_rotation_radians"] - torch.atan2(right[:, 1] - left[:, 1], right[:, 0] - left[:, 0])
    cos, sin = angle.cos(), angle.sin()
    turn = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    rotated = points[:, options["subset_idxs"], :2] @ turn.transpose(1, 2)
    low, high = rotated.amin(1), rotated.amax(1)
    crop = points.new_tensor([options["output_width"], options["output_height"]])
    scale = (high - low) * points.new_tensor([options["scale_x"], options["scale_y"]]) / crop
    linear = turn.transpose(1, 2) * scale[:, None, :]
    origin = (((low + high) / 2)[:, None] @ turn)[:, 0] - linear @ (crop / 2)
    T = torch.zeros(points.shape[0], 4, 4, dtype=points.dtype, device=points.device)
    T[:, :2, :2], T[:, :2, 3] = linear, origin
    T[:, 2, 2] = T[:, 3, 3] = 1
    return T


def _crop_bilinear(
    x: Float[Tensor, "b c h w"], T: Float[Tensor, "b 4 4"], size: tuple[int, int]
) -> Float[Tensor, "b c i j"]:
    """Features sampled at the crop's pixel centres; zero outside the outermost pixel centres."""
    h, w = x.shape[2:]
    rows = torch.arange(size[0], dtype=x.dtype, device=x.device) + 0.5
    columns = torch.arange(size[1], dtype=x.dtype, device=x.device) + 0.5
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).reshape(1, -1, 2)
    at = grid @ T[:, :2, :2].transpose(1, 2) + T[:, None, :2, 3] - 0.5
    last = x.new_tensor([w - 1, h - 1])
    inside = ((at >= 0) & (at <= last)).all(-1).reshape(-1, 1, *size)
    sampled = F.grid_sample(x, (at / last * 2 - 1).reshape(-1, *size, 2), align_corners=True, padding_mode="border")
    return sampled * inside


@dataclass(frozen=True, eq=False)
class _Tensor:
    name: str
    shape: tuple[int, ...]  # as in the file, batch included
    data: np.ndarray | None  # constants only


@dataclass(frozen=True, eq=False)
class _Operator:
    name: str
    inputs: list[int]
    outputs: list[int]
    options: Table | None
    custom: dict | None  # a custom operator's options

    def option(self, field: int, kind: str) -> int:
        return 0 if self.options is None else _scalar(self.options, field, kind)

    @property
    def same_padding(self) -> bool:
        """The first option of convolutions and poolings: 0 is SAME, 1 is VALID."""
        return self.option(0, "int8") == 0


_FLAGS = {
    "bool": number_types.BoolFlags, "int8": number_types.Int8Flags, "uint8": number_types.Uint8Flags,
    "uint16": number_types.Uint16Flags, "int32": number_types.Int32Flags, "uint32": number_types.Uint32Flags,
}  # fmt: skip


def _scalar(table: Table, field: int, kind: str) -> int:
    at = table.Offset(4 + 2 * field)
    return table.Get(_FLAGS[kind], at + table.Pos) if at else 0


def _text(table: Table, field: int) -> str:
    at = table.Offset(4 + 2 * field)
    return table.String(at + table.Pos).decode() if at else ""


def _table(table: Table, field: int) -> Table | None:
    at = table.Offset(4 + 2 * field)
    return Table(table.Bytes, table.Indirect(at + table.Pos)) if at else None


def _tables(table: Table, field: int) -> list[Table]:
    at = table.Offset(4 + 2 * field)
    if not at:
        return []
    first = table.Vector(at)
    return [Table(table.Bytes, table.Indirect(first + 4 * i)) for i in range(table.VectorLen(at))]


def _vector(table: Table, field: int, kind: str) -> np.ndarray:
    at = table.Offset(4 + 2 * field)
    return np.asarray(table.GetVectorAsNumpy(_FLAGS[kind], at)) if at else np.zeros(0, np.uint8)


def _read(data: bytes) -> tuple[list[_Tensor], list[_Operator], list[int], list[int]]:
    """Model { operator_codes 1, subgraphs 2, buffers 4 }; SubGraph { tensors 0, inputs 1, outputs 2, operators 3 }."""
    if data[4:8] != b"TFL3":
        raise ValueError("no TFL3 mark")
    model = Table(bytearray(data), struct.unpack_from("<I", data)[0])
    # OperatorCode { deprecated_builtin_code 0, custom_code 1, builtin_code 3 }: codes below 127 may be in either field.
    codes = [(max(_scalar(c, 0, "int8"), _scalar(c, 3, "int32")), _text(c, 1)) for c in _tables(model, 1)]
    buffers = _tables(model, 4)
    graph = _tables(model, 2)[0]
    tensors = []
    for t in _tables(graph, 0):  # Tensor { shape 0, type 1, buffer 2, name 3, sparsity 6 }
        shape = tuple(int(n) for n in _vector(t, 0, "int32"))
        raw = _vector(buffers[_scalar(t, 2, "uint32")], 0, "uint8")
        value = None
        if raw.size:
            values = np.frombuffer(raw.tobytes(), _DTYPES[_scalar(t, 1, "int8")])
            sparsity = _table(t, 6)
            value = values.reshape(shape) if sparsity is None else _densify(values, shape, sparsity)
        tensors.append(_Tensor(_text(t, 3), shape, value))
    operators = []
    for o in _tables(graph, 3):  # Operator { opcode_index 0, inputs 1, outputs 2, builtin_options 4, custom_options 5 }
        code, custom = codes[_scalar(o, 0, "uint32")]
        name = custom if code == _CUSTOM else _OPERATORS.get(code, f"number {code}")
        options = None
        if code == _CUSTOM:
            packed = _vector(o, 5, "uint8").tobytes()
            loaded = flexbuffers.Loads(packed) if packed else None
            options = loaded if isinstance(loaded, dict) else {}
        inputs, outputs = ([int(i) for i in _vector(o, field, "int32")] for field in (1, 2))
        operators.append(_Operator(name, inputs, outputs, _table(o, 4), options))
    return (
        tensors,
        operators,
        [int(i) for i in _vector(graph, 1, "int32")],
        [int(i) for i in _vector(graph, 2, "int32")],
    )


def _densify(values: np.ndarray, shape: tuple[int, ...], sparsity: Table) -> np.ndarray:
    """A sparse constant written out, for any order of dimensions, dense or CSR, with or without blocks.

    SparsityParameters { traversal_order 0, block_map 1, dim_metadata 2 };
    DimensionMetadata { format 0, dense_size 1, array_segments_type 2, array_segments 3, array_indices_type 4,
    array_indices 5 }.
    """
    order, blocks = _vector(sparsity, 0, "int32").tolist(), _vector(sparsity, 1, "int32").tolist()
    levels = _tables(sparsity, 2)
    at = np.zeros((1, 0), np.int64)  # coordinates so far, one row for each stored subtree, in the order of storage
    for level in levels:
        if _scalar(level, 0, "int8") == 0:  # dense
            size = _scalar(level, 1, "int32")
            at = np.concatenate([np.repeat(at, size, 0), np.tile(np.arange(size), len(at))[:, None]], 1)
        else:
            segments, indices = _index_vector(level, 2), _index_vector(level, 4)
            at = np.concatenate([np.repeat(at, np.diff(segments), 0), indices[:, None]], 1)
    place = np.zeros((len(at), len(shape)), np.int64)
    block_size = {d: _scalar(levels[order.index(len(shape) + k)], 1, "int32") for k, d in enumerate(blocks)}
    for column, dimension in enumerate(order):
        if dimension < len(shape):
            place[:, dimension] += at[:, column] * block_size.get(dimension, 1)
        else:
            place[:, blocks[dimension - len(shape)]] += at[:, column]
    dense = np.zeros(shape, values.dtype)
    dense[tuple(place.T)] = values[: len(place)]
    return dense


def _index_vector(level: Table, field: int) -> np.ndarray:
    """A union of int32, uint16 and uint8 vectors: the type stands in `field`, the table in the next."""
    kind = {1: "int32", 2: "uint16", 3: "uint8"}[_scalar(level, field, "uint8")]
    table = _table(level, field + 1)
    assert table is not None, field
    return _vector(table, 0, kind).astype(np.int64)
