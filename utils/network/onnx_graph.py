"""Reads an ONNX file into a graph, with ONNX's orders of gates, directions and initial states.

Needs the packages of requirements-onnx.txt, which nothing else does.
"""

from __future__ import annotations

import contextlib
import math
from collections import ChainMap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..clock import now
from ..graph.graph import Graph
from ..runs.unpack import unpacked
from .symbolic import MAX_MATRIX, Builder, Symbol, UnsupportedError, check_scores, constant, join

Value = Symbol | Tensor
Handler = Callable[..., object]
OPERATORS: dict[str, Handler] = {}
# Largest difference, relative to the largest output, between a graph and onnxruntime's float32.
SAME = 1e-3
# Blocks of ONNX's gates, (i, o, f, c) and (z, r, h), in torch's order, (i, f, g, o) and (r, z, n).
GATE_ORDER = {"RNN": (0,), "LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2)}
DEFAULT_ACTIVATIONS = {"RNN": ("tanh",), "LSTM": ("sigmoid", "tanh", "tanh"), "GRU": ("sigmoid", "tanh")}
OLDEST_OPSET = 7  # before, Add and others broadcast in another way
AXIS_OPSET = 13  # before, a softmax was over all axes from the given one on
MAX_TRIPS = 10_000  # of a loop
# Of constants: no two implementations agree on them.
UNSURE = {"LRN", "Resize"}
MAXIMUM = "a maximum of perturbed values has no bound here: pool by the mean or the last state"
NORMALISED = "it divides by a standard deviation of perturbed values, which has no bound here"
REASONS = (
    dict.fromkeys(("MaxPool", "GlobalMaxPool", "LpPool", "ReduceMax", "ReduceMin", "Max", "Min", "TopK"), MAXIMUM)
    | dict.fromkeys(("LayerNormalization", "InstanceNormalization", "GroupNormalization"), NORMALISED)
    | dict.fromkeys(("ArgMax", "ArgMin", "Hardmax"), "it gives the place of a maximum: export the scores themselves")
    | dict.fromkeys(("Attention", "MultiHeadAttention"), "attention multiplies perturbed values with each other")
)
EMBEDDING = "bounds are about vectors: export the network from the embedded vectors on, and give those as its input"


def import_onnx():
    """The onnx package, or a ValueError that says how to get it. Onnxruntime is loaded too where it is installed."""
    try:
        import onnx
        import onnx.inliner
        import onnx.reference

        with contextlib.suppress(ImportError):
            import onnxruntime  # noqa: F401
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
        packed: the file unpacked, if gzip has packed it.
        note: what its user should know, in words; else "".
    """

    path: Path
    graph: Graph
    input_name: str
    input_shape: tuple[int, ...]
    output_name: str
    output_shape: tuple[int, ...]
    softmax: str
    packed: bytes | None = None
    note: str = ""
    runs: bool = True  # in onnxruntime, as far as is known

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
        """An onnxruntime session of the file; None where onnxruntime is not installed or cannot run it."""
        try:
            import onnxruntime
        except ImportError:
            return None
        if not self.runs:
            return None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        file = str(self.path) if self.packed is None else self.packed
        try:
            return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has errors of its own, for operators and types that it lacks
            self.cannot_run(error)
            return None

    def cannot_run(self, error: Exception) -> None:
        """From now on there is no second opinion."""
        self.runs = False
        reason = f"onnxruntime cannot run it, so nothing was compared: {' '.join(str(error).split())[:120]}"
        self.note = "; ".join(filter(None, (self.note, reason)))

    def runtime_outputs(self, values: Tensor, session=None) -> Tensor | None:
        """What onnxruntime computes at inputs (batch, values); None where it is not installed or cannot run the file.

        In float32, unless the file's own numbers are float64.
        """
        session = session or self.session()
        if session is None:
            return None
        double = session.get_inputs()[0].type == "tensor(double)"
        rows = []
        for row in values:
            fed = row.reshape(self.input_shape).to(torch.float64 if double else torch.float32).numpy()
            (found,) = session.run([self.output_name], {self.input_name: fed})
            rows.append(torch.from_numpy(found).double().reshape(-1))
        return torch.stack(rows)


def read_onnx(
    path: str | Path,
    shape: Sequence[int] | None = None,
    relaxation: str = "plane",
    check: bool = True,
    num_inputs: int | None = None,
    deadline: float = math.inf,
) -> OnnxNetwork:
    """The network of an ONNX file, which gzip may have packed.

    Args:
        shape: of the input, where the file leaves axes open; an open first axis (or second, if the first is a fixed
            number of frames and there are three) is the batch, which is one sample.
        relaxation: how gate products are relaxed, a key of ``utils.choices.RELAXATIONS``.
        check: compare with onnxruntime, where it is installed, at random inputs.
        num_inputs: how many values the input has, if that is known: the size of one open axis follows.
        deadline: of ``utils.clock``, after which TimeoutError is raised.

    Raises:
        ValueError: the file cannot be read, or (UnsupportedError) holds what has no bound here.
    """
    onnx, path = import_onnx(), Path(path)
    data = unpacked(path)
    packed = None if data == path.read_bytes() else data
    try:
        model = onnx.load(str(path)) if packed is None else onnx.load_from_string(data)
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        _sort_nodes(model.graph)
        onnx.checker.check_model(model)
    except OSError:
        raise
    except Exception as error:  # protobuf and the checker have errors of their own
        raise ValueError(f"{path} is no valid ONNX file: {' '.join(str(error).split())[:200]}") from error
    network = _Reader(onnx, model, relaxation, deadline).read(path, shape, num_inputs)
    network.packed = packed
    if check:
        _compare(network)
    return network


def _sort_nodes(graph) -> None:
    """Put nodes behind those whose outputs they read; files need not have them in order, the checker wants it."""
    left, placed = list(range(len(graph.node))), []
    coming = {name for node in graph.node for name in node.output if name}
    while left:
        later = []
        for number in left:
            node = graph.node[number]
            if coming.isdisjoint(_reads(node)):
                placed.append(number)
                coming.difference_update(node.output)
            else:
                later.append(number)
        if len(later) == len(left):
            return  # a circle, which the checker names
        left = later
    if placed != sorted(placed):
        ordered = type(graph)(node=[graph.node[number] for number in placed])
        del graph.node[:]
        graph.node.extend(ordered.node)


def _reads(node):
    """All names that a node reads, those in the graphs of its attributes too."""
    yield from node.input
    for entry in node.attribute:
        if entry.HasField("g"):
            for inner in entry.g.node:
                yield from _reads(inner)
            yield from (value.name for value in entry.g.output)


def _compare(network: OnnxNetwork) -> None:
    session = network.session()
    if session is None:
        return
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(3, network.num_inputs, generator=generator, dtype=torch.float64)
    values[1:] = torch.randn(2, network.num_inputs, generator=generator, dtype=torch.float64)
    found = network.outputs(values)
    try:
        expected = network.runtime_outputs(values, session)
    except Exception as error:  # as above
        network.cannot_run(error)
        return
    room = SAME * (1.0 + expected.abs().amax())
    if expected.shape != found.shape or not bool(((expected - found).abs() <= room).all()):
        raise UnsupportedError(f"{network.path}: onnxruntime computes something else than what was read of the file")


class _Reader:
    """Walks the nodes of a file; values are symbols, or tensors where they do not depend on the input."""

    def __init__(self, onnx, model, relaxation: str, deadline: float):
        self.onnx, self.model, self.builder, self.deadline = onnx, model, Builder(relaxation), deadline
        self.opsets: dict[str, int] = {}
        self.values: ChainMap[str, Value] = ChainMap()  # of a graph inside of a node: its own first
        self.node = None  # the one at work

    def read(self, path: Path, shape: Sequence[int] | None, num_inputs: int | None) -> OnnxNetwork:
        graph = self.model.graph
        for entry in self.model.opset_import:
            domain = "" if entry.domain == "ai.onnx" else entry.domain
            if self.opsets.setdefault(domain, entry.version) != entry.version:
                raise UnsupportedError(f"{path} names two opsets of one domain")
        if self.opsets.get("", 0) < OLDEST_OPSET:
            raise UnsupportedError(f"{path} has opset {self.opsets.get('', 0)}: {OLDEST_OPSET} or newer is supported")
        try:
            self._enter_constants(graph)
        except (UnsupportedError, TypeError, ValueError) as error:
            raise UnsupportedError(f"{path}: {' '.join(str(error).split())}") from error
        inputs = [value for value in graph.input if value.name not in self.values]
        if len(inputs) != 1:
            names = ", ".join(value.name for value in inputs)
            fixed = "make the others constants of the file (initializers)"
            raise UnsupportedError(f"{path}: one input is supported, the file has {len(inputs)}: {names}; {fixed}")
        self._check_type(path, inputs[0])
        full = _input_shape(path, inputs[0], shape, num_inputs)
        self.values[inputs[0].name] = self._input(full)
        self._run_all(graph.node, f"{path}: ")
        name = graph.output[0].name
        output = self.values[name]
        if not isinstance(output, Symbol):
            raise UnsupportedError(f"{path}: the output {name} does not depend on the input")
        result = self.builder.finish(output.view(lambda part: part.reshape(1, -1)))
        network = OnnxNetwork(path, result, inputs[0].name, full, name, tuple(output.shape), output.softmax)
        if len(graph.output) > 1:
            network.note = f"of {len(graph.output)} outputs, the first is read: {name}"
        return network

    def _check_type(self, path: Path, value) -> None:
        types = self.onnx.TensorProto
        kind = types.DataType.Name(value.type.tensor_type.elem_type)
        if kind in ("FLOAT", "DOUBLE"):
            return
        whole = kind.startswith(("INT", "UINT", "STRING"))
        reason = f"token numbers, perhaps: {EMBEDDING}" if whole else "float32 and float64 are supported"
        raise UnsupportedError(f"{path}: the input {value.name} is of type {kind}: {reason}")

    def _enter_constants(self, graph) -> None:
        if graph.sparse_initializer:
            raise UnsupportedError("sparse initializers are not supported")
        for tensor in graph.initializer:
            self._enter(tensor.name, torch.from_numpy(self.onnx.numpy_helper.to_array(tensor).copy()))

    def _enter(self, name: str, value: Value) -> None:
        if name in self.values.maps[0]:
            raise UnsupportedError(f"{name} is defined twice")
        self.values[name] = value

    def _run_all(self, nodes, where: str) -> None:
        for node in nodes:
            if now() > self.deadline:
                raise TimeoutError("the time limit is reached")
            try:
                self._run(node)
            except TimeoutError:
                raise
            except (UnsupportedError, RuntimeError, IndexError, TypeError, ValueError, KeyError) as error:
                where += f"operator {node.op_type}" + (f" ({node.name})" if node.name else "")
                raise UnsupportedError(f"{where}: {' '.join(str(error).split())}") from error

    def subgraph(self, graph, given: Sequence[Value]) -> list[Value]:
        """What a graph inside of a node gives; it sees the names outside of it."""
        outside, self.values = self.values, self.values.new_child()
        try:
            self._enter_constants(graph)
            for value, own in zip(graph.input, given, strict=True):
                self._enter(value.name, own)
            self._run_all(graph.node, "")
            return [self.values[value.name] for value in graph.output]
        finally:
            self.values = outside

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
        options = {entry.name: self._attribute(entry) for entry in node.attribute}
        if len(options) < len(node.attribute):
            raise UnsupportedError("an attribute is given twice")
        self.node = node
        if not any(isinstance(value, Symbol) for value in given) and node.op_type not in CONTROL:
            results = self._constants(node, given)
        elif node.op_type in OPERATORS:
            self._check_numbers(node, given)
            results = OPERATORS[node.op_type](self, *given, **options)
        else:
            raise UnsupportedError(REASONS.get(node.op_type, "it is not supported"))
        if not isinstance(results, (tuple, list)):
            results = (results,)
        for name, value in zip(node.output, results, strict=False):
            if name:
                self._enter(name, value)

    def _check_numbers(self, node, given: list[Value | None]) -> None:
        for name, value in zip(node.input, given, strict=True):
            if not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            if value.dtype in (torch.float16, torch.bfloat16):
                raise UnsupportedError("it computes in 16 bits, whose rounding is not bounded: export it in float32")
            if node.op_type not in ("Clip", *CONTROL) and not bool(value.isfinite().all()):
                raise UnsupportedError(f"{name} holds NaN or infinite numbers")

    def _attribute(self, entry):
        value = self.onnx.helper.get_attribute_value(entry)
        if isinstance(value, bytes):
            return value.decode()
        if isinstance(value, list):
            return [part.decode() if isinstance(part, bytes) else part for part in value]
        return value

    def _constants(self, node, given: list[Tensor | None]) -> list[Tensor]:
        """What does not depend on the input is left to the reference implementation, in the file's own opset.

        It has the newest softmax and batch normalisation only: older ones are put in terms of those.
        """
        opset, kind, shape = self.opsets[""], node.op_type, None
        if kind in UNSURE:
            raise UnsupportedError("it is not supported, of constants neither")
        if kind in ("Softmax", "LogSoftmax", "Hardmax") and opset < AXIS_OPSET:
            shape = given[0].shape
            axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 1) % len(shape)
            given = [given[0].reshape(math.prod(shape[:axis]), -1)]
            node = self.onnx.helper.make_node(kind, node.input, node.output, axis=1)
        if kind == "BatchNormalization":
            values = {entry.name: self._attribute(entry) for entry in node.attribute}
            if values.get("training_mode", 0) or not values.get("spatial", 1) or len(node.output) > 1:
                raise UnsupportedError("this kind of batch normalisation is not supported")
            opset, epsilon = max(opset, 15), values.get("epsilon", 1e-5)
            node = self.onnx.helper.make_node(kind, node.input, node.output, epsilon=epsilon)
        helper = self.onnx.helper
        fed = {name: value.numpy() for name, value in zip(node.input, given, strict=True) if name}
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in fed.items()
        ]
        outputs = [helper.make_empty_tensor_value_info(name) for name in node.output if name]
        imports = [helper.make_opsetid(domain, version) for domain, version in (self.opsets | {"": opset}).items()]
        graph = helper.make_graph([node], "constants", inputs, outputs)
        evaluator = self.onnx.reference.ReferenceEvaluator(helper.make_model(graph, opset_imports=imports))
        found = dict(zip((value.name for value in outputs), evaluator.run(None, fed), strict=True))
        results = [torch.from_numpy(np.array(found[name])) if name else None for name in node.output]
        return results if shape is None else [results[0].reshape(shape)]


def _input_shape(path: Path, value, shape: Sequence[int] | None, num_inputs: int | None) -> tuple[int, ...]:
    dims = value.type.tensor_type.shape.dim
    axes = [axis.dim_value if axis.HasField("dim_value") else 0 for axis in dims]
    shown = ", ".join(str(size or axis.dim_param or "?") for size, axis in zip(axes, dims, strict=True))
    if shape is not None:
        if len(shape) != len(axes) or any(known not in (0, own) for known, own in zip(axes, shape, strict=True)):
            raise ValueError(f"{path} takes an input of shape ({shown}), not {tuple(shape)}")
        return tuple(int(size) for size in shape)
    open_axes = [number for number, size in enumerate(axes) if size == 0]
    # The batch is the first axis, or the second after a number of frames; (T, 1, n) and (batch, 1, n) look the same.
    first = open_axes[:1] == [0] and len(axes) > 1 and not (len(axes) == 3 and axes[1] == 1)
    second = open_axes[:1] == [1] and len(axes) == 3 and axes[0] > 1
    if first or second:
        axes[open_axes.pop(0)] = 1
    if len(open_axes) == 1 and num_inputs is not None:
        known = math.prod(size for size in axes if size)
        if num_inputs % known:
            raise ValueError(f"{path} takes an input of shape ({shown}), which {num_inputs} values do not fill")
        axes[open_axes.pop()] = num_inputs // known
    if open_axes or not axes:
        example = tuple(size or 10 for size in axes)
        raise ValueError(f"{path} takes an input of shape ({shown}), of open size: name its shape, such as {example}")
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
    if not bool((y != 0).all()):
        raise UnsupportedError("it divides by zero")
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
    if math.isnan(low) or math.isnan(high):
        raise UnsupportedError("an end of its range is NaN")
    if low >= high:  # the upper end is applied last
        return constant(torch.full(x.shape, high))
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
        lookup = f" (for an embedding, {EMBEDDING})" if to in (types.INT32, types.INT64) else ""
        raise UnsupportedError(f"numbers are rounded to {types.DataType.Name(to)}{lookup}")
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
    sizes, count = _numbers(sizes) if sizes is not None else split, len(reader.node.output)
    if sizes is None:  # equal parts; from opset 18 on, the last may be smaller
        if num_outputs is None and x.shape[axis] % count:
            raise UnsupportedError(f"{x.shape[axis]} values do not split into {count} equal parts")
        sizes = -(-x.shape[axis] // (num_outputs or count))
    pieces = [part.split(sizes, dim=axis) for part in (x.ids, x.scale, x.shift)]
    if num_outputs is not None and len(pieces[0]) != num_outputs:
        raise UnsupportedError(f"{x.shape[axis]} values do not split into {num_outputs} parts")
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
        raise UnsupportedError(f"a row is chosen by the input, as an embedding does: {EMBEDDING}")
    size, axis = x.shape[axis], axis % len(x.shape)
    if not bool(((indices >= -size) & (indices < size)).all()):
        raise UnsupportedError(f"an index is not among {size}")
    flat = indices.reshape(-1).to(torch.int64) % size
    shape = (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    return x.view(lambda part: part.index_select(axis, flat).reshape(shape))


@operator("ReverseSequence")
def _reverse_sequence(reader, x, lengths, batch_axis=1, time_axis=0):
    order = torch.arange(x.shape[time_axis]).expand(x.shape[batch_axis], -1).clone()
    for row, length in zip(order, _numbers(lengths), strict=True):
        row[:length] = row[:length].flip(0)

    def reverse(part: Tensor) -> Tensor:
        moved = part.movedim((batch_axis, time_axis), (0, 1))
        return moved[torch.arange(len(order))[:, None], order].movedim((0, 1), (batch_axis, time_axis))

    return x.view(reverse)


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
    if isinstance(x, Symbol):
        _weights(y)
        if y.dim() < 3:
            weight = y[None] if y.dim() == 1 else y.mT
            return reader.builder.linear(x, weight).view(lambda part: part.squeeze(-1) if y.dim() == 1 else part)
        row = len(x.shape) == 1
        product = _matrix_product(reader, y.mT, x.view(lambda part: (part[None] if row else part).mT))
        return product.view(lambda part: part.squeeze(-1) if row else part.mT)
    matrix = x[None] if x.dim() == 1 else x
    column = len(y.shape) == 1
    product = _matrix_product(reader, matrix, y.view(lambda part: part[:, None] if column else part))
    product = product.view(lambda part: part.squeeze(-1) if column else part)
    return product.view(lambda part: part.squeeze(-1 if column else -2) if x.dim() == 1 else part)


def _matrix_product(reader, weight: Tensor, x: Symbol) -> Symbol:
    """weight (..., m, k) times x (..., k, n); the stacks of both broadcast."""
    stack = torch.broadcast_shapes(weight.shape[:-2], x.shape[:-2])
    if weight.shape[:-2].numel() == 1:
        factor = weight.reshape(weight.shape[-2:])
        wide = x.view(lambda part: part.expand(*stack, *part.shape[-2:]).mT)
        return reader.builder.linear(wide, factor).view(lambda part: part.mT)
    weight = weight.expand(*stack, *weight.shape[-2:]).reshape(-1, *weight.shape[-2:])
    rows = x.view(lambda part: part.expand(*stack, *part.shape[-2:]).reshape(-1, *part.shape[-2:]).mT)
    parts = [reader.builder.linear(rows.view(lambda p, k=k: p[k]), factor) for k, factor in enumerate(weight)]
    return join(torch.stack, parts).view(lambda part: part.mT.reshape(*stack, *part.mT.shape[-2:]))


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
    matrix = _conv_matrix(x.shape[1:], weight.double(), padding, strides, dilations, group)
    if bias is not None:
        bias = bias.repeat_interleave(matrix[0, ..., 0].numel())
    y = reader.builder.linear(x.view(lambda part: part.flatten(1)), matrix.flatten(0, -2), bias)
    return y.view(lambda part: part.reshape(-1, *matrix.shape[:-1]))


def _conv_matrix(shape: torch.Size, weight: Tensor, padding, strides, dilations, group: int) -> Tensor:
    """The matrix, (*outputs, inputs), of a convolution over inputs of a shape (channels, ...)."""
    taps = F.pad(torch.arange(shape.numel()).reshape(shape), padding, value=-1)  # numbers of the inputs
    for axis, (size, stride, dilation) in enumerate(zip(weight.shape[2:], strides, dilations, strict=True), start=1):
        taps = taps.unfold(axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    places = taps.shape[1 : len(shape)]  # (channels, *places, *kernel)
    if len(weight) * places.numel() * shape.numel() > MAX_MATRIX:
        raise UnsupportedError(f"a convolution of {shape.numel()} values is too large for its matrix to be kept")
    taps = taps.unflatten(0, (group, -1)).movedim(1, len(shape)).reshape(group, 1, places.numel(), -1)
    factors = weight.reshape(group, len(weight) // group, 1, -1)
    matrix = torch.zeros(group, len(weight) // group, places.numel(), shape.numel(), dtype=weight.dtype)
    full = torch.broadcast_shapes(taps.shape, factors.shape)
    factors = torch.where(taps < 0, 0.0, factors.expand(full))  # of padding, which is 0
    matrix.scatter_add_(3, taps.clamp(min=0).expand(full), factors)
    return matrix.reshape(len(weight), *places, shape.numel())


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
    if training_mode or not attributes.get("spatial", 1):
        raise UnsupportedError("it mixes the samples of a batch in training mode: export the model in evaluation mode")
    _weights(scale, bias, mean, var)
    shape = (-1, *[1] * (len(x.shape) - 2))
    factor = scale.double() / (var.double() + epsilon).sqrt()
    if not bool(factor.isfinite().all()):
        raise UnsupportedError("it divides by a variance that is not above 0")
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
        if batch != 1:
            raise UnsupportedError(f"the file fixes a batch of {batch} sequences: export it with a batch of one")
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


# --- control flow ---


@operator("If")
def _if(reader, condition, then_branch, else_branch):
    return reader.subgraph(then_branch if bool(_numbers(condition)[0]) else else_branch, [])


@operator("Loop")
def _loop(reader, trips=None, going=None, *carried, body):
    """A loop whose trips and conditions do not depend on the input, step by step."""
    trips = MAX_TRIPS + 1 if trips is None else _numbers(trips)[0]
    going = going is None or bool(_numbers(going)[0])
    states, rows = list(carried), []
    while going and len(rows) < trips:
        if len(rows) == MAX_TRIPS:
            raise UnsupportedError(f"the loop goes on after {MAX_TRIPS} steps")
        condition, *found = reader.subgraph(body, [torch.tensor(len(rows)), torch.tensor(True), *states])
        going = bool(_numbers(condition)[0])
        states, scanned = found[: len(states)], found[len(states) :]
        rows.append(scanned)
    if not rows and len(body.output) > 1 + len(states):
        raise UnsupportedError("the loop has no steps, but its steps are collected")
    return [*states, *(_stacked(parts) for parts in zip(*rows, strict=True))]


def _stacked(parts: Sequence[Value]) -> Value:
    if any(isinstance(part, Symbol) for part in parts):
        return join(torch.stack, [_symbol(part) for part in parts])
    return torch.stack(parts)


CONTROL = ("If", "Loop")
