"""Reads an ONNX file into a graph, with ONNX's orders of gates, directions and initial states.

Needs the packages of requirements-onnx.txt, which nothing else does.
"""

from __future__ import annotations

import contextlib
import math
from collections import ChainMap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..clock import now
from ..graph.graph import Graph
from ..runs.unpack import unpacked
from .onnx_operators import CONTROL, OPERATORS, Value
from .onnx_operators.evaluate import attribute, evaluated
from .onnx_operators.refused import EMBEDDING, REASONS
from .onnx_operators.table import MOVES
from .operations.attention import settled
from .symbolic import Builder, Symbol, UnsupportedError

# Largest difference, relative to the largest output, between a graph and onnxruntime's float32.
SAME = 1e-3
OLDEST_OPSET = 7  # before, Add and others broadcast in another way


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
        options = {entry.name: attribute(self.onnx, entry) for entry in node.attribute}
        if len(options) < len(node.attribute):
            raise UnsupportedError("an attribute is given twice")
        self.node = node
        if not any(isinstance(value, Symbol) for value in given) and node.op_type not in CONTROL:
            results = evaluated(self.onnx, node, given, self.opsets)
        elif node.op_type in OPERATORS:
            self._check_numbers(node, given)
            results = self._handled(node.op_type, given, options)
        else:
            raise UnsupportedError(REASONS.get(node.op_type, "it is not supported"))
        if not isinstance(results, (tuple, list)):
            results = (results,)
        if any(node.output[len(results) :]):
            raise UnsupportedError(f"of its outputs, {' and '.join(node.output[len(results) :])} are not supported")
        for name, value in zip(node.output, results, strict=False):
            if name:
                self._enter(name, value)

    def _handled(self, kind: str, given: list[Value | None], options: dict):
        """What an operator gives: a softmax that it reads is made a node, one that it only moves is not yet."""
        if kind not in MOVES:
            return OPERATORS[kind](self, *settled(self.builder, given), **options)
        result = OPERATORS[kind](self, *given, **options)
        first, *rest = result if isinstance(result, tuple) else (result,)
        if not isinstance(first, Symbol) or not first.softmax:
            return result
        return replace(first, settle=lambda: self._moved(kind, settled(self.builder, given), options)), *rest

    def _moved(self, kind: str, given: list[Value | None], options: dict) -> Symbol:
        result = OPERATORS[kind](self, *given, **options)
        return result[0] if isinstance(result, tuple) else result

    def _check_numbers(self, node, given: list[Value | None]) -> None:
        for name, value in zip(node.input, given, strict=True):
            if not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            if value.dtype in (torch.float16, torch.bfloat16):
                raise UnsupportedError("it computes in 16 bits, whose rounding is not bounded: export it in float32")
            masks = node.op_type in ("Add", "Where")  # scores with minus infinity, which softmax leaves out
            bad = ~value.isfinite() & ~(value == -torch.inf) if masks else ~value.isfinite()
            if node.op_type not in ("Clip", *CONTROL) and bool(bad.any()):
                raise UnsupportedError(f"{name} holds NaN or infinite numbers")


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
    if open_axes or not value.type.tensor_type.HasField("shape"):
        example = tuple(size or 10 for size in axes)
        raise ValueError(f"{path} takes an input of shape ({shown}), of open size: name its shape, such as {example}")
    return tuple(axes)
