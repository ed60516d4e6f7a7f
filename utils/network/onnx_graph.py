"""Reads an ONNX file into a graph, with ONNX's orders of gates, directions and initial states.

Needs the packages of requirements-onnx.txt, which nothing else does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..graph.graph import Graph
from .symbolic import Builder, Symbol, UnsupportedError, check_scores, constant, join

Value = Symbol | Tensor
Handler = Callable[..., object]
OPERATORS: dict[str, Handler] = {}
# Largest difference, relative to the largest output, between a graph and onnxruntime's float32.
SAME = 1e-3
# Blocks of ONNX's gates, (i, o, f, c) and (z, r, h), in torch's order, (i, f, g, o) and (r, z, n).
GATE_ORDER = {"RNN": (0,), "LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2)}
DEFAULT_ACTIVATIONS = {"RNN": ("tanh",), "LSTM": ("sigmoid", "tanh", "tanh"), "GRU": ("sigmoid", "tanh")}


def import_onnx():
    """The onnx package, or a ValueError that says how to get it."""
    try:
        import onnx
        import onnx.reference
    except ImportError:
        raise ValueError("ONNX files need one more package: pip install -r requirements-onnx.txt") from None
    return onnx


@dataclass
class OnnxNetwork:
    """A network from an ONNX file.

    Attributes:
        graph: float64; its frames are the time steps of an input of rank 3, else one frame of all values.
        input_shape, output_shape: as in the file, with a batch of one.
        softmax: "softmax" or "log_softmax" if the file ends with one, which the graph leaves out; else "".
    """

    path: Path
    graph: Graph
    input_name: str
    input_shape: tuple[int, ...]
    output_name: str
    output_shape: tuple[int, ...]
    softmax: str

    @property
    def num_inputs(self) -> int:
        return math.prod(self.input_shape)

    def frames(self, values: Tensor) -> Tensor:
        """Inputs (batch, values), in the order of the file, as the graph takes them: (batch, T, n)."""
        return values.reshape(len(values), len(self.graph.frames), -1)

    def outputs(self, values: Tensor) -> Tensor:
        """The file's outputs, (batch, num_outputs), at inputs (batch, values), in float64."""
        scores = self.graph.evaluate(self.frames(values.double()))
        return getattr(torch, self.softmax)(scores, dim=-1) if self.softmax else scores

    def session(self):
        """An onnxruntime session of the file; None where onnxruntime is not installed."""
        try:
            import onnxruntime
        except ImportError:
            return None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])

    def runtime_outputs(self, values: Tensor, session=None) -> Tensor | None:
        """What onnxruntime computes in float32 at inputs (batch, values); None where it is not installed."""
        session = session or self.session()
        if session is None:
            return None
        rows = []
        for row in values:
            fed = row.reshape(self.input_shape).to(torch.float32).numpy()
            if session.get_inputs()[0].type == "tensor(double)":
                fed = row.reshape(self.input_shape).numpy()
            rows.append(
                torch.from_numpy(session.run([self.output_name], {self.input_name: fed})[0]).double().reshape(-1)
            )
        return torch.stack(rows)


def read_onnx(
    path: str | Path, shape: Sequence[int] | None = None, relaxation: str = "plane", check: bool = True
) -> OnnxNetwork:
    """The network of an ONNX file.

    Args:
        shape: of the input, where the file leaves axes open; an open first axis (or second, if the first is fixed
            and there are three) is the batch, which is one sample.
        relaxation: how gate products are relaxed, a key of ``utils.choices.RELAXATIONS``.
        check: compare with onnxruntime, where it is installed, at random inputs.

    Raises:
        ValueError: the file cannot be read, or (UnsupportedError) holds what has no bound here.
    """
    onnx, path = import_onnx(), Path(path)
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
    except OSError:
        raise
    except Exception as error:  # protobuf and the checker have errors of their own
        raise ValueError(f"{path} is no valid ONNX file: {' '.join(str(error).split())[:200]}") from error
    reader = _Reader(onnx, model, relaxation)
    network = reader.read(path, shape)
    if check:
        _compare(network)
    return network


def _compare(network: OnnxNetwork) -> None:
    session = network.session()
    if session is None:
        return
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(3, network.num_inputs, generator=generator, dtype=torch.float64)
    values[1:] = torch.randn(2, network.num_inputs, generator=generator, dtype=torch.float64)
    expected, found = network.runtime_outputs(values, session), network.outputs(values)
    room = SAME * (1.0 + expected.abs().amax())
    if expected.shape != found.shape or not bool(((expected - found).abs() <= room).all()):
        raise UnsupportedError(f"{network.path}: onnxruntime computes something else than what was read of the file")


class _Reader:
    """Walks the nodes of a file; values are symbols, or tensors where they do not depend on the input."""

    def __init__(self, onnx, model, relaxation: str):
        self.onnx, self.model, self.builder = onnx, model, Builder(relaxation)
        self.opsets = {entry.domain or "": entry.version for entry in model.opset_import}
        self.values: dict[str, Value] = {}

    def read(self, path: Path, shape: Sequence[int] | None) -> OnnxNetwork:
        graph = self.model.graph
        for tensor in graph.initializer:
            self.values[tensor.name] = torch.from_numpy(self.onnx.numpy_helper.to_array(tensor).copy())
        inputs = [value for value in graph.input if value.name not in self.values]
        if len(inputs) != 1:
            names = ", ".join(value.name for value in inputs)
            raise UnsupportedError(f"{path}: one input is supported, the file has {len(inputs)}: {names}")
        full = _input_shape(path, inputs[0], shape)
        self.values[inputs[0].name] = self._input(full)
        for node in graph.node:
            try:
                self._run(node)
            except (UnsupportedError, RuntimeError, IndexError, TypeError, ValueError, KeyError) as error:
                where = f"operator {node.op_type}" + (f" ({node.name})" if node.name else "")
                raise UnsupportedError(f"{path}: {where}: {' '.join(str(error).split())}") from error
        name = graph.output[0].name
        output = self.values[name]
        if not isinstance(output, Symbol):
            raise UnsupportedError(f"{path}: the output {name} does not depend on the input")
        result = self.builder.finish(output.view(lambda part: part.reshape(1, -1)))
        return OnnxNetwork(path, result, inputs[0].name, full, name, tuple(output.shape), output.softmax)

    def _input(self, shape: tuple[int, ...]) -> Symbol:
        """Frames are the time steps of an input of rank 3, whichever of the other axes is the batch."""
        if len(shape) == 3 and 1 in shape[:2]:
            steps = shape[0] * shape[1]
            return self.builder.input(1, (steps, shape[2])).view(lambda part: part.reshape(shape))
        return self.builder.input(1, (math.prod(shape),)).view(lambda part: part.reshape(shape))

    def _run(self, node) -> None:
        if node.domain not in ("", "ai.onnx"):
            raise UnsupportedError(f"operators of {node.domain} are not supported")
        given = [self.values[name] if name else None for name in node.input]
        if not any(isinstance(value, Symbol) for value in given):
            results = self._constants(node, given)
        elif node.op_type in OPERATORS:
            options = {entry.name: self._attribute(entry) for entry in node.attribute}
            results = OPERATORS[node.op_type](self, *given, **options)
        else:
            raise UnsupportedError("it is not supported")
        if not isinstance(results, (tuple, list)):
            results = (results,)
        self.values.update((name, value) for name, value in zip(node.output, results, strict=False) if name)

    def _attribute(self, entry):
        value = self.onnx.helper.get_attribute_value(entry)
        if isinstance(value, bytes):
            return value.decode()
        if isinstance(value, list):
            return [part.decode() if isinstance(part, bytes) else part for part in value]
        return value

    def _constants(self, node, given: list[Tensor | None]) -> list[Tensor]:
        """What does not depend on the input is left to the reference implementation of the operator."""
        evaluator = self.onnx.reference.ReferenceEvaluator(node, opsets=self.opsets)
        fed = {name: value.numpy() for name, value in zip(node.input, given, strict=True) if name}
        return [torch.from_numpy(np.array(value)) for value in evaluator.run(None, fed)]


def _input_shape(path: Path, value, shape: Sequence[int] | None) -> tuple[int, ...]:
    axes = [axis.dim_value if axis.HasField("dim_value") else 0 for axis in value.type.tensor_type.shape.dim]
    if shape is not None:
        if len(shape) != len(axes) or any(known not in (0, own) for known, own in zip(axes, shape, strict=True)):
            raise ValueError(f"{path} takes an input of shape {axes} (0: any), not {tuple(shape)}")
        return tuple(int(size) for size in shape)
    open_axes = [number for number, size in enumerate(axes) if size == 0]
    if open_axes:
        axes[open_axes[0]] = 1
    if 0 in axes or not axes:
        raise ValueError(f"{path} leaves axes {open_axes} of its input open: name its shape")
    return tuple(axes)


# --- operators --------------------------------------------------------------------------------------------------------


def operator(*names: str):
    """Register a handler: called with the reader, the node's inputs and its attributes."""

    def register(handler: Handler) -> Handler:
        OPERATORS.update(dict.fromkeys(names, handler))
        return handler

    return register


def _symbol(value: Value) -> Symbol:
    return value if isinstance(value, Symbol) else constant(value)


def _numbers(value) -> list[int]:
    """Whole numbers that must be known beforehand: axes, indices, sizes."""
    if isinstance(value, Symbol):
        raise UnsupportedError("a shape or index must not depend on the input")
    return value.reshape(-1).tolist() if isinstance(value, Tensor) else list(value)


@operator("Add", "Sum")
def _add(reader, *terms):
    return reader.builder.add(*(_symbol(term) for term in terms))


@operator("Sub")
def _sub(reader, x, y):
    return reader.builder.add(_symbol(x), reader.builder.scaled(_symbol(y), constant(-1.0)))


@operator("Neg")
def _negative(reader, x):
    return reader.builder.scaled(x, constant(-1.0))


@operator("Mul")
def _multiply(reader, x, y):
    return reader.builder.multiply(_symbol(x), _symbol(y))


@operator("Div")
def _divide(reader, x, y):
    if isinstance(y, Symbol):
        raise UnsupportedError("only a division by constants is supported")
    return reader.builder.scaled(x, constant(1.0 / y.double()))


@operator("Relu")
def _relu(reader, x):
    return reader.builder.activation(x, "relu")


@operator("Tanh")
def _tanh(reader, x):
    return reader.builder.activation(x, "tanh")


@operator("Sigmoid")
def _sigmoid(reader, x):
    return reader.builder.activation(x, "sigmoid")


@operator("LeakyRelu")
def _leaky_relu(reader, x, alpha=0.01):
    return reader.builder.activation(x, f"leaky_relu({alpha!r})")


@operator("Clip")
def _clip(reader, x, lowest=None, highest=None, min=None, max=None):
    ends = [(lowest, min, -math.inf), (highest, max, math.inf)]
    low, high = (
        float(given if given is not None else other if other is not None else end) for given, other, end in ends
    )
    return reader.builder.activation(x, f"hardtanh({low!r},{high!r})")


@operator("HardSigmoid")
def _hard_sigmoid(reader, x, alpha=0.2, beta=0.5):
    y = reader.builder.add(reader.builder.scaled(x, constant(alpha)), constant(beta))
    return reader.builder.activation(y, "hardtanh(0,1)")


def _final_softmax(reader, x, axis=None, name="softmax"):
    check_scores(x)
    axis = (-1 if reader.opsets[""] >= 13 else 1) if axis is None else axis
    if x.shape.numel() != x.shape[axis]:
        raise UnsupportedError("a softmax is supported at the end of the network only, over all its outputs")
    return Symbol(x.ids, x.scale, x.shift, name)


OPERATORS["Softmax"] = _final_softmax
OPERATORS["LogSoftmax"] = lambda reader, x, axis=None: _final_softmax(reader, x, axis, "log_softmax")


# --- shapes ---


@operator("Identity")
def _identity(reader, x):
    return x


@operator("Dropout")
def _dropout(reader, x, ratio=None, training=None, **attributes):
    if training is not None and bool(_numbers(training)[0]):
        raise UnsupportedError("dropout is random in training mode: export the model in evaluation mode")
    return x, torch.ones(x.shape, dtype=torch.bool)


@operator("Cast")
def _cast(reader, x, to, **attributes):
    types = reader.onnx.TensorProto
    if to not in (types.FLOAT, types.DOUBLE):
        raise UnsupportedError(f"numbers are rounded to {types.DataType.Name(to)}")
    return x


@operator("Shape")
def _shape(reader, x, start=0, end=None):
    return torch.tensor(tuple(x.shape)[start:end], dtype=torch.int64)


@operator("Size")
def _size(reader, x):
    return torch.tensor(x.shape.numel())


@operator("Reshape")
def _reshape(reader, x, shape, allowzero=0):
    sizes = _numbers(shape)
    if not allowzero:
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return x.view(lambda part: part.reshape(sizes))


@operator("Flatten")
def _flatten(reader, x, axis=1):
    first = math.prod(x.shape[: axis % (len(x.shape) + 1)])
    return x.view(lambda part: part.reshape(first, -1))


@operator("Transpose")
def _transpose(reader, x, perm=None):
    return x.view(lambda part: part.permute(perm or list(reversed(range(part.dim())))))


@operator("Squeeze")
def _squeeze(reader, x, axes_input=None, axes=None):
    axes = _numbers(axes_input) if axes_input is not None else axes
    if axes is None:
        axes = [axis for axis, size in enumerate(x.shape) if size == 1]
    return x.view(lambda part: part.squeeze(tuple(axes)))


@operator("Unsqueeze")
def _unsqueeze(reader, x, axes_input=None, axes=None):
    axes = _numbers(axes_input) if axes_input is not None else axes
    rank = len(x.shape) + len(axes)
    shape = list(x.shape)
    for axis in sorted(axis % rank for axis in axes):
        shape.insert(axis, 1)
    return x.view(lambda part: part.reshape(shape))


@operator("Concat")
def _concat(reader, *parts, axis):
    return join(lambda tensors: torch.cat(tensors, dim=axis), [_symbol(part) for part in parts])


@operator("Split")
def _split(reader, x, sizes=None, axis=0, split=None, num_outputs=None):
    sizes = _numbers(sizes) if sizes is not None else split
    if sizes is None:
        if num_outputs is None:
            raise UnsupportedError("the sizes of the parts are not given")
        sizes = -(-x.shape[axis] // num_outputs)
    pieces = [part.split(sizes, dim=axis) for part in (x.ids, x.scale, x.shift)]
    return [Symbol(*parts, x.softmax) for parts in zip(*pieces, strict=True)]


@operator("Slice")
def _slice(reader, x, *bounds, starts=None, ends=None, axes=None, steps=None):
    given = [None if value is None else _numbers(value) for value in bounds] + [None] * (4 - len(bounds))
    starts, ends, axes, steps = (
        own if own is not None else other for own, other in zip(given, (starts, ends, axes, steps), strict=True)
    )
    axes = axes if axes is not None else list(range(len(starts)))
    steps = steps if steps is not None else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        chosen = torch.tensor(range(x.shape[axis])[slice(*_bounds(start, end, step, x.shape[axis]))], dtype=torch.int64)
        x = x.view(lambda part, axis=axis, chosen=chosen: part.index_select(axis, chosen))
    return x


def _bounds(start: int, end: int, step: int, size: int) -> tuple[int, int | None, int]:
    """ONNX cuts bounds to the axis; an end before its beginning, with a negative step, is Python's None."""
    if step < 0 and end < -size:
        return start, None, step
    return start, end, step


@operator("Gather")
def _gather(reader, x, indices, axis=0):
    if not isinstance(x, Symbol) or isinstance(indices, Symbol):
        raise UnsupportedError("an index must not depend on the input")
    axis %= len(x.shape)
    flat = indices.reshape(-1).to(torch.int64) % x.shape[axis]
    shape = (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    return x.view(lambda part: part.index_select(axis, flat).reshape(shape))


@operator("Expand")
def _expand(reader, x, shape):
    full = torch.broadcast_shapes(tuple(_numbers(shape)), x.shape)
    return x.view(lambda part: part.expand(full))


@operator("Where")
def _where(reader, condition, x, y):
    if isinstance(condition, Symbol):
        raise UnsupportedError("what is chosen must not depend on the input")
    return join(lambda parts: torch.where(condition, *parts), [_symbol(x), _symbol(y)])


@operator("Pad")
def _pad(reader, x, pads_input=None, value=None, axes=None, pads=None, mode="constant", **attributes):
    if mode != "constant" or axes is not None:
        raise UnsupportedError("only padding of all axes by a constant is supported")
    pads = _numbers(pads_input) if pads_input is not None else pads
    filled = float(value) if value is not None else attributes.get("value", 0.0)
    widths = [
        width
        for pair in reversed(list(zip(pads[: len(pads) // 2], pads[len(pads) // 2 :], strict=True)))
        for width in pair
    ]
    parts = zip((x.ids, x.scale, x.shift), (-1, 0.0, filled), strict=True)
    return Symbol(*(F.pad(part, widths, value=fill) for part, fill in parts))


def _reduction(name: str) -> Handler:
    def handler(reader, x, axes_input=None, axes=None, keepdims=1, noop_with_empty_axes=0):
        chosen = _numbers(axes_input) if axes_input is not None else axes
        if not chosen and noop_with_empty_axes:
            return x
        return getattr(reader.builder, name)(x, chosen or (), bool(keepdims))

    return handler


OPERATORS["ReduceMean"], OPERATORS["ReduceSum"] = _reduction("mean"), _reduction("sum")


# --- linear layers ---


def _weights(*values: Value | None) -> None:
    if any(isinstance(value, Symbol) for value in values):
        raise UnsupportedError("a product of two tensors that both depend on the input has no bound here")


@operator("MatMul")
def _matmul(reader, x, y):
    if isinstance(y, Symbol):
        _weights(x)
        if x.dim() != 2 or len(y.shape) < 2:
            raise UnsupportedError("only a matrix is supported as the constant factor")
        return reader.builder.linear(y.view(lambda part: part.mT), x).view(lambda part: part.mT)
    while y.dim() > 2 and y.shape[0] == 1 and len(x.shape) >= y.dim():
        y = y[0]
    if y.dim() == 1:
        return reader.builder.linear(x, y[None]).view(lambda part: part.squeeze(-1))
    if y.dim() != 2:
        raise UnsupportedError("only a matrix is supported as the constant factor")
    return reader.builder.linear(x, y.T)


@operator("Gemm")
def _gemm(reader, a, b, c=None, alpha=1.0, beta=1.0, transA=0, transB=0):
    def turned(value: Value, turn: int) -> Value:
        if not turn:
            return value
        return value.view(lambda part: part.T) if isinstance(value, Symbol) else value.T

    product = reader.builder.scaled(_symbol(_matmul(reader, turned(a, transA), turned(b, transB))), constant(alpha))
    if c is None:
        return product
    return reader.builder.add(product, reader.builder.scaled(_symbol(c), constant(beta)))


def _conv_padding(x: Symbol, kernel, strides, dilations, pads, auto_pad: str) -> list[int]:
    """Widths for ``F.pad``, last axis first."""
    rank = len(kernel)
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        pads = [0] * (2 * rank)
        for axis in range(rank):
            size, reach = x.shape[2 + axis], (kernel[axis] - 1) * dilations[axis] + 1
            total = max((-(-size // strides[axis]) - 1) * strides[axis] + reach - size, 0)
            small = total // 2
            ends = (small, total - small) if auto_pad == "SAME_UPPER" else (total - small, small)
            pads[axis], pads[rank + axis] = ends
    elif auto_pad == "VALID" or pads is None:
        pads = [0] * (2 * rank)
    return [pads[end + axis] for axis in reversed(range(rank)) for end in (0, rank)]


@operator("Conv")
def _conv(
    reader, x, weight, bias=None, auto_pad="NOTSET", dilations=None, group=1, pads=None, strides=None, **attributes
):
    _weights(weight, bias)
    rank = weight.dim() - 2
    if rank not in (1, 2, 3):
        raise UnsupportedError(f"a convolution over {rank} axes is not supported")
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    padding = _conv_padding(x, weight.shape[2:], strides, dilations, pads, auto_pad)
    function, weight = (F.conv1d, F.conv2d, F.conv3d)[rank - 1], weight.double()
    if bias is not None:
        bias = bias.reshape(-1, *[1] * rank)

    def convolve(part: Tensor) -> Tensor:
        return function(F.pad(part, padding), weight, None, tuple(strides), 0, tuple(dilations), group)

    return reader.builder.linear_map(x, convolve, bias)


@operator("AveragePool")
def _average_pool(reader, x, kernel_shape, auto_pad="NOTSET", pads=None, strides=None, **attributes):
    rank, strides = len(kernel_shape), strides or [1] * len(kernel_shape)
    padding = _conv_padding(x, kernel_shape, strides, [1] * rank, pads, auto_pad)
    dilated = any(size != 1 for size in attributes.get("dilations", ()))
    uneven = any(padding) and not attributes.get("count_include_pad", 0)
    if rank not in (1, 2) or dilated or uneven or attributes.get("ceil_mode", 0):
        raise UnsupportedError("this kind of average pooling is not supported")
    function = (F.avg_pool1d, F.avg_pool2d)[rank - 1]
    return reader.builder.linear_map(x, lambda part: function(F.pad(part, padding), kernel_shape, strides))


@operator("GlobalAveragePool")
def _global_average_pool(reader, x):
    return reader.builder.mean(x, range(2, len(x.shape)), keepdim=True)


@operator("BatchNormalization")
def _batch_norm(reader, x, scale, bias, mean, var, epsilon=1e-5, training_mode=0, **attributes):
    if training_mode:
        raise UnsupportedError("it mixes the samples of a batch in training mode: export the model in evaluation mode")
    _weights(scale, bias, mean, var)
    shape = (-1, *[1] * (len(x.shape) - 2))
    factor = scale.double() / (var.double() + epsilon).sqrt()
    shift = bias.double() - mean.double() * factor
    return reader.builder.add(reader.builder.scaled(x, constant(factor.reshape(shape))), constant(shift.reshape(shape)))


# --- recurrent layers ---


def _recurrent(kind: str) -> Handler:
    def handler(reader, x, w, r, b=None, lengths=None, h0=None, c0=None, peepholes=None, **attributes):
        _weights(w, r, b, lengths, peepholes)
        directions = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}
        backwards = directions[attributes.get("direction", "forward")]
        layout = attributes.get("layout", 0)
        size = r.shape[-1]
        nonlinearity = _check_recurrent(kind, attributes, len(backwards), peepholes)
        cell = "gru, reset first" if kind == "GRU" and not attributes.get("linear_before_reset", 0) else kind.lower()
        if layout:
            x = x.view(lambda part: part.transpose(0, 1))
        steps, batch = x.shape[:2]
        count = steps if lengths is None else _common_length(lengths, steps)
        zeros = constant(torch.zeros(len(backwards), batch, size))
        given = (h0, c0) if kind == "LSTM" else (h0,)
        states = [zeros if part is None else _symbol(part) for part in given]
        if layout:
            states = [
                s if part is None else s.view(lambda p: p.transpose(0, 1))
                for s, part in zip(states, given, strict=True)
            ]
        frames = [x.view(lambda part, t=t: part[t]) for t in range(count)]
        order = GATE_ORDER[kind]
        runs, finals = [], []
        for number, backward in enumerate(backwards):
            own = [_gates(part[number], order) for part in (w, r)]
            halves = (None, None) if b is None else (_gates(half, order) for half in b[number].chunk(2))
            start = tuple(state.view(lambda part, k=number: part[k]) for state in states)
            hidden, final = reader.builder.recurrent(
                cell, frames, start, (*own, *halves), nonlinearity[number], backward
            )
            runs.append(hidden + [constant(torch.zeros(batch, size))] * (steps - count))
            finals.append(final)
        y = join(lambda parts: torch.stack(parts, dim=1), [join(torch.stack, run) for run in runs])  # (T, D, batch, H)
        last = [join(torch.stack, parts) for parts in zip(*finals, strict=True)]  # (D, batch, H)
        if layout:
            y = y.view(lambda part: part.permute(2, 0, 1, 3))
            last = [part.view(lambda p: p.transpose(0, 1)) for part in last]
        return [y, *last]

    return handler


for _kind in GATE_ORDER:
    OPERATORS[_kind] = _recurrent(_kind)


def _gates(stacked: Tensor, order: tuple[int, ...]) -> Tensor:
    """Rows of the gates' blocks, in torch's order."""
    blocks = stacked.chunk(len(order))
    return torch.cat([blocks[number] for number in order])


def _common_length(lengths: Tensor, steps: int) -> int:
    counts = set(lengths.tolist())
    if len(counts) != 1 or not 1 <= min(counts) <= steps:
        raise UnsupportedError(f"sequence lengths must be from 1 to {steps}")
    return counts.pop()


def _check_recurrent(kind: str, attributes: dict, directions: int, peepholes) -> list[str]:
    """The nonlinearity of each direction. Raises UnsupportedError for variants that have no cell here."""
    default = DEFAULT_ACTIVATIONS[kind]
    names = [name.lower() for name in attributes.get("activations") or default * directions]
    if kind == "RNN":
        if any(name not in ("tanh", "relu") for name in names):
            raise UnsupportedError(f"activations {names} are not supported")
    elif names != list(default * directions):
        raise UnsupportedError(f"activations {names} are not supported")
    if attributes.get("clip"):
        raise UnsupportedError("clip is not supported")
    if attributes.get("input_forget"):
        raise UnsupportedError("input_forget is not supported")
    if peepholes is not None and bool((peepholes != 0).any()):
        raise UnsupportedError("peepholes are not supported")
    return names if kind == "RNN" else ["tanh"] * directions
