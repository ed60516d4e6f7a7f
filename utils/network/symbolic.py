"""Symbolic tensors: whatever a network does with its input, written down as nodes of a graph.

A ``Symbol`` has the shape of the tensor it stands for. Each of its elements is ``scale * e + shift``, where e is one
element of one node, known by a number, or is a constant, its shift. So reshaping, transposing, slicing, stacking and
concatenating are those operations on the tensor of numbers; multiplying by constants and adding them change scale and
shift; only what computes something new adds a node. ``utils.network.trace`` reads a module's forward into symbols,
``utils.network.onnx_graph`` an ONNX file.

The batch is an axis like any other, wherever the network puts it: the numbers of sample b are those of sample 0 plus
``b * SAMPLE``. The graph holds the nodes of one sample; equal elements of different samples meet in the same node, and
what would mix samples is refused.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..graph.convolution import MAX_MATRIX, Convolution, Windows
from ..graph.graph import Graph
from ..graph.mix import weighted_sum
from ..graph.mixing import MatMul, Mixing, Shape
from ..graph.narrow import narrowed
from ..graph.nodes import Constant, Frame, Linear, Node, WeightedSum
from ..graph.nonlinear import Activation, Product
from ..graph.picks import Concat, Negative, Slice
from ..graph.pooling import Pick
from ..relaxation.lines import ACTIVATIONS
from .state import usable_tensor
from .unroll import GRUCell, LSTMCell, ProjectedLSTMCell, ResetFirstGRUCell, RNNCell

SAMPLE = 1 << 40  # more elements than any graph has
CONSTANT = -1
LARGE_FRAME = 256  # values of a frame from which on no identity matrix is made of it
LARGE_PICK = 1 << 22  # entries of a matrix that picks elements, from which on none is made
MAX_PIECES = 64  # that are put side by side without a matrix
DTYPE = torch.float64

CELLS = {"rnn": RNNCell, "lstm": LSTMCell, "gru": GRUCell, "gru, reset first": ResetFirstGRUCell}
CELLS["lstm, projected"] = ProjectedLSTMCell


class UnsupportedError(ValueError):
    """The network does something that has no bound here; the message says what."""


@dataclass(frozen=True)
class Symbol:
    """Tensors of one shape: numbers of node elements (``CONSTANT`` if none), and what they are scaled and shifted by.

    ``softmax`` is "" or the name of the function, softmax or log_softmax, that is taken of these class scores. It does
    not change which is larger, so the graph can do without, if nothing else reads the result. ``settle`` gives the
    symbol with a softmax as a node, where elements were moved since; None where it is taken over the last axis.
    """

    ids: Tensor
    scale: Tensor
    shift: Tensor
    softmax: str = ""
    settle: Callable[[], Symbol] | None = None

    @property
    def shape(self) -> torch.Size:
        return self.ids.shape

    def view(self, function: Callable[[Tensor], Tensor]) -> Symbol:
        """An operation that only moves, repeats or drops elements."""
        return Symbol(function(self.ids), function(self.scale), function(self.shift), self.softmax)

    @property
    def is_constant(self) -> bool:
        return bool((self.ids == CONSTANT).all())

    @property
    def is_plain(self) -> bool:
        """Neither scaled nor shifted, nor constant anywhere."""
        with torch.no_grad():
            return bool(((self.ids != CONSTANT) & (self.scale == 1) & (self.shift == 0)).all())


def check_scores(symbol: Symbol) -> None:
    """Refuse to compute with what a softmax gave."""
    if symbol.softmax:
        raise UnsupportedError(f"{symbol.softmax} is supported at the end of the network only")


def constant(value: Tensor | float) -> Symbol:
    value = torch.as_tensor(value, dtype=DTYPE, device="cpu")
    return Symbol(torch.full(value.shape, CONSTANT), torch.zeros_like(value), value)


def join(function: Callable[[list[Tensor]], Tensor], symbols: Sequence[Symbol]) -> Symbol:
    """cat, stack or another operation that only moves the elements of several tensors."""
    for symbol in symbols:
        check_scores(symbol)
    parts = zip(*((symbol.ids, symbol.scale, symbol.shift) for symbol in symbols), strict=True)
    return Symbol(*(function(list(part)) for part in parts))


class Builder:
    """Adds to a graph the nodes of operations on symbols."""

    def __init__(self, relaxation: str = "plane"):
        self.graph, self.relaxation = Graph(), relaxation
        self._starts: list[int] = []  # number of each node's first element
        self._size = 0
        self._made: dict[tuple, Node] = {}
        self._borrowed: list[tuple[Tensor, type, dict]] = []

    def input(self, batch: int, shape: Sequence[int]) -> Symbol:
        """The network's input, (batch, *shape): a frame for every time step of (T, n), else a single one."""
        frames, size = (shape[0], shape[1]) if len(shape) == 2 else (1, torch.Size(shape).numel())
        symbols = [self.symbol(self.graph.add(Frame(size, t)), torch.arange(batch)) for t in range(frames)]
        return join(lambda part: torch.stack(part, dim=1), symbols).view(lambda part: part.reshape(batch, *shape))

    def finish(self, output: Symbol) -> Graph:
        """The graph whose last node is ``output``, (batch, classes)."""
        if len(output.shape) != 2:
            raise UnsupportedError(f"the output must be (batch, classes), not of shape {tuple(output.shape)}")
        samples, (row,) = self._same_row([output])
        if bool((row.ids == CONSTANT).all()):
            raise UnsupportedError("the output does not depend on the input")
        if samples.tolist() != list(range(len(samples))):
            raise UnsupportedError("the output is not in the order of the batch")
        nodes = self._nodes_of(row.ids)
        if bool((row.ids != CONSTANT).all()) and bool((nodes == nodes[0]).all()):
            last = self._vector(row)
        else:
            last = self._node(self._affine(row, torch.eye(len(row.ids), dtype=DTYPE), None))
        return narrowed(pruned(self.graph, last))

    # --- a forward's own tensors that values are written into ---

    def borrow(self, tensor: Tensor, kind: type) -> None:
        """Make a tensor one of another class, until ``lent`` is over."""
        self._borrowed.append((tensor, type(tensor), dict(vars(tensor))))
        tensor.__class__ = kind

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Around a forward: what was borrowed in it is in the end what it was."""
        try:
            yield
        finally:
            for tensor, kind, before in self._borrowed:
                tensor.__class__ = kind
                vars(tensor).clear()
                vars(tensor).update(before)
            self._borrowed.clear()

    # --- numbers ---

    def symbol(self, node: Node, samples: Tensor) -> Symbol:
        """All elements of a node for every one of the samples, (len(samples), size)."""
        self._count()
        ids = self._starts[node.index] + torch.arange(node.size) + samples[:, None] * SAMPLE
        return Symbol(ids, torch.ones(ids.shape, dtype=DTYPE), torch.zeros(ids.shape, dtype=DTYPE))

    def _local(self, node: Node) -> Symbol:
        return self.symbol(node, torch.zeros(1, dtype=torch.int64)).view(lambda part: part[0])

    def _count(self) -> None:
        for node in self.graph.nodes[len(self._starts) :]:
            self._starts.append(self._size)
            self._size += node.size

    def _nodes_of(self, ids: Tensor) -> Tensor:
        """Index of the node that each element belongs to, -1 for constants."""
        self._count()
        starts = torch.tensor(self._starts)
        return torch.where(ids == CONSTANT, -1, torch.searchsorted(starts, ids.contiguous(), right=True) - 1)

    def nodes_of(self, x: Symbol) -> list[Node]:
        """The node of each element, in the order of the elements; none may be a constant."""
        ids = torch.where(x.ids == CONSTANT, CONSTANT, x.ids % SAMPLE).reshape(-1)
        return [self.graph.nodes[index] for index in self._nodes_of(ids).tolist()]

    def start_of(self, node: Node) -> int:
        """Number of the node's first element."""
        return self._starts[node.index]

    def _offsets(self, ids: Tensor, node: Node) -> Tensor:
        return ids - self._starts[node.index]

    def _node(self, local: Symbol) -> Node:
        return self.graph.nodes[int(self._nodes_of(local.ids[:1]))]

    def _once(self, kind: str, parents: tuple[Node, ...], detail, make: Callable[[], Node]) -> Node:
        """A node like one that was made before is that one."""
        key = (kind, tuple(parent.index for parent in parents), detail)
        if key not in self._made:
            self._made[key] = self.graph.add(make())
        return self._made[key]

    # --- vectors of one node's elements ---

    def _vector(self, part: Symbol) -> Node:
        """A node that holds exactly these elements, (k,), of a single node, in this order."""
        node = self._node(part)
        offsets = self._offsets(part.ids, node)
        first, size = int(offsets[0]), len(offsets)
        consecutive = torch.equal(offsets, torch.arange(first, first + size))
        if isinstance(node, Convolution) and consecutive and size == node.size and not part.is_plain:
            folded = self._folded(node, part)
            if folded is not None:
                return folded
        if isinstance(node, Frame) and consecutive and size == node.size > LARGE_FRAME:
            return self._scaled_frame(node, part)
        if isinstance(node, (Frame, Linear)) and not (part.is_plain and consecutive and not isinstance(node, Frame)):
            return self._node(self._sum([node], [part]))
        if not consecutive and size * node.size > LARGE_PICK:
            node, first = self.graph.add(Pick(node, offsets)), 0
        elif not consecutive:
            return self._node(self._affine(part, torch.eye(size, dtype=DTYPE), None))
        if size < node.size:
            node = self._once("slice", (node,), (first, size), lambda: Slice(node, first, size))
        if part.is_plain:
            return node
        if bool((part.scale == -1).all()) and bool((part.shift == 0).all()):
            return self._once("negative", (node,), None, lambda: Negative(node))
        if bool((part.shift == 0).all()):
            return self.graph.add(WeightedSum((node,), (part.scale,)))
        shift = self.graph.add(Constant(part.shift))
        return self.graph.add(WeightedSum((node, shift), (part.scale, 1.0)))

    def _whole(self, x: Symbol) -> tuple[Node | None, Symbol] | None:
        """A node and x's elements, (k,), of the first sample, if x is all of the node, in order, of every sample.

        The node is None if x is constant and alike for all samples; the result is None for all that is less simple.
        """
        if len(x.shape) < 2:
            return None
        x = x.view(lambda part: part.reshape(part.shape[0], -1))
        first = x.view(lambda part: part[0])
        if not bool((x.scale == first.scale).all() and (x.shift == first.shift).all()):
            return None
        if x.is_constant:
            return None, first
        node = self._node(first) if int(first.ids[0]) != CONSTANT else None
        if node is None or node.size != x.shape[1]:
            return None
        return (node, first) if torch.equal(x.ids, self.symbol(node, torch.arange(x.shape[0])).ids) else None

    def _every_sample(self, part: Symbol, shape: torch.Size) -> Symbol:
        """Elements of the first sample, (k,), and those of all others, in a shape (batch, ...)."""
        samples = torch.arange(shape[0])[:, None] * SAMPLE
        ids = torch.where(part.ids == CONSTANT, CONSTANT, part.ids + samples)
        scale, shift = (values.expand(shape[0], -1) for values in (part.scale, part.shift))
        return Symbol(ids, scale, shift).view(lambda values: values.reshape(shape))

    # --- operations on elements ---

    def _elementwise(self, symbols: Sequence[Symbol], make: Callable[[list[Node | None], list[Symbol]], Symbol]):
        """Apply ``make`` to vectors of elements that belong to the same nodes: for each term its node and elements."""
        shapes = {symbol.shape for symbol in symbols}
        # Torch's own function takes seconds when it is called first.
        shape = shapes.pop() if len(shapes) == 1 else torch.broadcast_shapes(*(symbol.shape for symbol in symbols))
        wholes = [self._whole(symbol.view(lambda part: part.expand(shape))) for symbol in symbols]
        if all(whole is not None for whole in wholes):
            return self._every_sample(make(*map(list, zip(*wholes, strict=True))), shape)
        terms = join(
            lambda part: torch.stack(part, dim=-1),
            [symbol.view(lambda part: part.expand(shape).reshape(-1)) for symbol in symbols],
        )
        samples, local = split_samples(terms.ids)
        bits = (part.detach().contiguous().view(torch.int64) for part in (terms.scale, terms.shift))
        unique, inverse = torch.unique(torch.cat((local, *bits), dim=1), dim=0, return_inverse=True)
        chosen = torch.empty(len(unique), dtype=torch.int64)
        chosen[inverse] = torch.arange(len(inverse))
        terms = Symbol(local, terms.scale, terms.shift).view(lambda part: part[chosen])
        owners, group = torch.unique(self._nodes_of(terms.ids), dim=0, return_inverse=True)
        made, places = [], []
        for number, owner in enumerate(owners.tolist()):
            members = (group == number).nonzero().squeeze(-1)
            nodes = [None if index < 0 else self.graph.nodes[index] for index in owner]
            own = terms.view(lambda part, members=members: part[members])
            parts = [own.view(lambda part, k=k: part[:, k]) for k in range(len(nodes))]
            made.append(make(nodes, parts))
            places.append(members)
        back = torch.empty(len(unique), dtype=torch.int64)
        back[torch.cat(places)] = torch.arange(len(unique))
        result = join(torch.cat, made).view(lambda part: part[back][inverse].reshape(shape))
        ids = torch.where(result.ids == CONSTANT, CONSTANT, result.ids + (samples * SAMPLE).reshape(shape))
        return Symbol(ids, result.scale, result.shift)

    def activation(self, x: Symbol, name: str) -> Symbol:
        def make(nodes, parts):
            if nodes[0] is None:
                return constant(ACTIVATIONS[name].function(parts[0].shift))
            operand = self._vector(parts[0])
            return self._local(self._once("activation", (operand,), name, lambda: Activation(operand, name)))

        return self._elementwise([x], make)

    def add(self, *terms: Symbol) -> Symbol:
        return self._elementwise(terms, self._sum)

    def negative(self, x: Symbol) -> Symbol:
        return self.scaled(x, constant(-1.0))

    def sum(self, x: Symbol, axes: Sequence[int], keepdim: bool = False) -> Symbol:
        """Over some axes."""
        axes = sorted({axis % len(x.shape) for axis in axes}) if axes else list(range(len(x.shape)))
        if len(x.shape) == 4 and axes == [2, 3] and self._whole(x) is not None:
            channels = x.shape[1]
            windows = Windows(tuple(x.shape[1:]), (channels, 1, 1), groups=channels)
            total = self.convolution(x, torch.ones(channels, 1, *x.shape[2:], dtype=DTYPE), None, windows)
            return total if keepdim else total.view(lambda part: part.flatten(1))
        kept = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
        moved = x.view(lambda part: part.movedim(axes, list(range(-len(axes), 0))).flatten(-len(axes)))
        terms = [moved.view(lambda part, k=k: part[..., k]) for k in range(moved.shape[-1])]
        total = self.add(*terms)
        return total.view(lambda part: part.reshape(kept)) if keepdim else total

    def mean(self, x: Symbol, axes: Sequence[int], keepdim: bool = False) -> Symbol:
        total = self.sum(x, axes, keepdim)
        return self.scaled(total, constant(total.shape.numel() / x.shape.numel()))

    def scaled(self, x: Symbol, factor: Symbol) -> Symbol:
        """x times constants."""
        check_scores(x)
        shape = torch.broadcast_shapes(x.shape, factor.shape)
        x = x.view(lambda part: part.expand(shape))
        return Symbol(x.ids, x.scale * factor.shift, x.shift * factor.shift)

    def multiply(self, x: Symbol, y: Symbol) -> Symbol:
        """Of a tensor and constants, or of a gate (a sigmoid, or one minus a sigmoid) and anything."""
        if y.is_constant:
            return self.scaled(x, y)
        if x.is_constant:
            return self.scaled(y, x)
        return self._elementwise([x, y], self._product)

    def _sum(self, nodes: list[Node | None], parts: list[Symbol]) -> Symbol:
        if len(parts) > 1 and None not in nodes and any(isinstance(node, Convolution) for node in nodes):
            nodes, parts = self._without_scales(nodes, parts)
        shift = sum(part.shift for part in parts)
        terms = [(node, part) for node, part in zip(nodes, parts, strict=True) if node is not None]
        if not terms:
            return constant(shift)
        if len(terms) == 1 and len(parts) > 1:
            return Symbol(terms[0][1].ids, terms[0][1].scale, shift)
        mixed = self._interpolation(terms) if len(terms) == 2 else None
        if mixed is not None:
            return Symbol(*_parts(mixed, mixed.shift + shift))
        linear = all(isinstance(node, (Linear, Frame)) for node, _ in terms)
        distinct = len({node for node, _ in terms}) == len(terms)
        if not linear and distinct and all(self._is_run(node, part) for node, part in terms):
            parents = [self._vector(_plain(part)) for _, part in terms]
            total = self.graph.add(weighted_sum(tuple(parents), tuple(_factor(part.scale) for _, part in terms)))
            return Symbol(*_parts(self._local(total), shift))
        size = len(shift)
        shift_size = sum(part.shift.detach().abs() for part in parts)
        weights: dict[Node, Tensor] = {}

        def pass_to(parent: Node, weight: Tensor) -> None:
            weights[parent] = weights[parent] + weight if parent in weights else weight

        for node, part in terms:
            offsets = self._offsets(part.ids, node)
            if linear and isinstance(node, Linear):
                for parent, weight in zip(node.parents, node.weights, strict=True):
                    pass_to(parent, part.scale[:, None] * weight[offsets])
                shift = shift + part.scale * node.bias[offsets]
                shift_size = shift_size + (part.scale.detach() * node.bias_size[offsets]).abs()
            else:
                self._check_matrix(size, node.size)
                selection = torch.zeros(size, node.size, dtype=DTYPE)
                pass_to(node, selection.index_put((torch.arange(size), offsets), part.scale))
        return self._local(self.graph.add(Linear(tuple(weights), tuple(weights.values()), shift, shift_size)))

    def _interpolation(self, terms: list[tuple[Node, Symbol]]) -> Symbol | None:
        """b + sigmoid(y) (a - b) as sigmoid(y) a + sigmoid(-y) b, whose bounds are tighter; None for other sums.

        With a = 0, as in the first step of a cell, the product is that of -b, or of b with a scale of -1.
        """
        for (product, part), (owner, other) in (terms, terms[::-1]):
            if not isinstance(product, Product) or not bool((other.scale == 1).all()):
                continue
            x, y = product.parents
            offsets = self._offsets(part.ids, product)
            tanh = product.name == "tanh(x)*sigmoid(y)"
            a = b = None
            if bool((part.scale == -1).all()):
                b = x if not tanh else owner if isinstance(owner, Activation) and owner.name == "tanh" else None
                if tanh and b is not None and b.parents[0] is not x:
                    b = None
            elif bool((part.scale == 1).all()) and not tanh and _is_difference(x):
                a, b = x.parents if x.factors[0] == 1.0 else x.parents[::-1]
            if b is None or not torch.equal(self._local(b).ids[offsets], other.ids):
                continue
            gates = [(b, self._once("negative", (y,), None, lambda y=y: Negative(y))), *([] if a is None else [(a, y)])]
            gated = tuple(self._gated(*pair) for pair in gates)
            total = gated[0] if a is None else self.graph.add(weighted_sum(gated))
            return self._local(total).view(lambda values, offsets=offsets: values[offsets])
        return None

    def _gated(self, x: Node, y: Node) -> Node:
        """x * sigmoid(y)."""
        name = "x*sigmoid(y)"
        if isinstance(x, Activation) and x.name == "tanh":
            x, name = x.parents[0], "tanh(x)*sigmoid(y)"
        return self._once(name, (x, y), None, lambda: Product(x, y, name, self.relaxation))

    def _is_run(self, node: Node, part: Symbol) -> bool:
        first = part.ids[0]
        return not isinstance(node, Frame) and torch.equal(part.ids, first + torch.arange(len(part.ids)))

    def _product(self, nodes: list[Node | None], parts: list[Symbol]) -> Symbol:
        for (node, this), other in zip(zip(nodes, parts, strict=True), reversed(parts), strict=True):
            if node is None:
                return self.scaled(other, this)
        for gate, (node, other) in ((1, (nodes[0], parts[0])), (0, (nodes[1], parts[1]))):
            found = self._gate(nodes[gate], parts[gate])
            if found is None:
                continue
            factor, y = found
            if isinstance(node, Activation) and node.name == "tanh" and bool((other.shift == 0).all()):
                x, factor, name = self._operand(node, other), factor * other.scale, "tanh(x)*sigmoid(y)"
            elif bool((other.shift == 0).all()):
                x, factor, name = self._vector(_plain(other)), factor * other.scale, "x*sigmoid(y)"
            else:
                x, name = self._vector(other), "x*sigmoid(y)"
            product = self._once(name, (x, y), None, lambda x=x, y=y, name=name: Product(x, y, name, self.relaxation))
            return Symbol(self._local(product).ids, factor, torch.zeros_like(factor))
        x, y = (self._vector(part) for part in parts)
        if x is y:
            return self._local(self._once("activation", (x,), "power(2)", lambda: Activation(x, "power(2)")))
        size = len(parts[0].ids)
        return self._local(self._once("x*y", (x, y), None, lambda: MatMul(x, y, Shape(size, 1, 1, 1))))

    def _gate(self, node: Node, part: Symbol) -> tuple[Tensor, Node] | None:
        """(factor, y) if the elements are factor * sigmoid(y)."""
        if not isinstance(node, Activation) or node.name != "sigmoid":
            return None
        if bool((part.shift == 0).all()):
            return part.scale, self._operand(node, part)
        if bool((part.shift == -part.scale).all()):  # 1 - sigmoid(y) = sigmoid(-y)
            y = self._operand(node, part)
            return part.shift, self._once("negative", (y,), None, lambda: Negative(y))
        return None

    def _operand(self, node: Activation, part: Symbol) -> Node:
        """What the activation is taken of, at these of its elements."""
        operand = self._local(node.parents[0])
        return self._vector(operand.view(lambda values: values[self._offsets(part.ids, node)]))

    # --- linear maps ---

    def linear(self, x: Symbol, weight: Tensor, bias: Tensor | None = None) -> Symbol:
        """weight (m, k) times the last axis of x, (..., k), plus bias."""
        check_scores(x)
        weight = weight.to("cpu", DTYPE)
        bias = None if bias is None else bias.to("cpu", DTYPE)
        if weight.shape[1] != x.shape[-1]:
            raise UnsupportedError(f"a matrix of {weight.shape[1]} columns does not fit {x.shape[-1]} values")
        rows = x.view(lambda part: part.reshape(-1, part.shape[-1]))
        samples, local = split_samples(rows.ids)
        made: dict[tuple, Symbol] = {}
        results = []
        for number, sample in enumerate(samples.tolist()):
            row = Symbol(local[number], rows.scale[number], rows.shift[number])
            key = tuple(part.detach().numpy().tobytes() for part in (row.ids, row.scale, row.shift))
            if key not in made:
                made[key] = self._affine(row, weight, bias)
            result = made[key]
            ids = torch.where(result.ids == CONSTANT, CONSTANT, result.ids + sample * SAMPLE)
            results.append(Symbol(ids, result.scale, result.shift))
        shape = (*x.shape[:-1], weight.shape[0])
        return join(torch.stack, results).view(lambda part: part.reshape(shape))

    def linear_map(self, x: Symbol, function: Callable[[Tensor], Tensor], bias: Tensor | None = None) -> Symbol:
        """Any linear function of x's axes but the first, such as a convolution, as the matrix that it is.

        ``function`` takes (N, *x.shape[1:]); ``bias`` broadcasts to what it gives for one of the N.
        """
        shape = x.shape[1:]
        size = shape.numel()
        rows = function(torch.zeros(1, *shape, dtype=DTYPE)).shape[1:]
        self._check_matrix(size, rows.numel())
        matrix = function(torch.eye(size, dtype=DTYPE).reshape(size, *shape))
        bias = None if bias is None else bias.to("cpu", DTYPE).expand(rows).reshape(-1)
        flat = self.linear(x.view(lambda part: part.flatten(1)), matrix.reshape(size, -1).T, bias)
        return flat.view(lambda part: part.reshape(x.shape[0], *rows))

    def _check_matrix(self, rows: int, columns: int) -> None:
        if rows * columns > MAX_MATRIX:
            raise UnsupportedError(f"a layer from {columns} to {rows} values is too large for its matrix to be kept")

    def _affine(self, row: Symbol, weight: Tensor, bias: Tensor | None) -> Symbol:
        """``weight @ row + bias`` of one sample's elements, as a new Linear node, or as constants."""
        total = weight.new_zeros(len(weight)) if bias is None else bias
        total_size = total.detach().abs()
        if bool((row.shift != 0).any()):
            total = total + weight @ row.shift
            total_size = total_size + weight.detach().abs() @ row.shift.detach().abs()
        owners = self._nodes_of(row.ids)
        if bool((owners == -1).all()):
            return constant(total)
        if not bool((row.scale == 1).all()):
            weight = weight * row.scale
        if self._is_folded(row, weight, owners):
            return self._folded_linear(self.graph.nodes[int(owners[0])], weight, total, total_size)
        parents, weights = [], []
        for index in dict.fromkeys(owner for owner in owners.tolist() if owner >= 0):
            node = self.graph.nodes[index]
            columns = (owners == index).nonzero().squeeze(-1)
            offsets = self._offsets(row.ids[columns], node)
            first = int(columns[0])
            together = torch.equal(columns, torch.arange(first, first + len(columns)))
            if isinstance(node, Mixing) and node.size > 2 * len(columns):  # a token's part of attention over all
                detail = offsets.numpy().tobytes()
                node = self._once("pick", (node,), detail, lambda node=node, offsets=offsets: Pick(node, offsets))
                part = weight[:, columns]
            elif together and torch.equal(offsets, torch.arange(node.size)):
                part = weight[:, first : first + len(columns)]
            else:
                self._check_matrix(len(weight), node.size)
                part = weight.new_zeros(len(weight), node.size).index_add(1, offsets, weight[:, columns])
            parents.append(node)
            weights.append(part)
        return self._local(self.graph.add(Linear(tuple(parents), tuple(weights), total, total_size)))

    def _is_folded(self, row: Symbol, weight: Tensor, owners: Tensor) -> bool:
        """Whether a square matrix acts on all of a linear node, such as what takes the mean off: they are one then."""
        node = self.graph.nodes[int(owners[0])] if int(owners[0]) >= 0 else None
        if not isinstance(node, Linear) or not len(weight) == len(row.ids) == node.size:
            return False
        return torch.equal(row.ids, self._local(node).ids)

    def _folded_linear(self, node: Linear, weight: Tensor, total: Tensor, total_size: Tensor) -> Symbol:
        """``weight @ node + total`` by the weights of the node: an interval of it is no interval of an interval."""
        weights = tuple(weight @ own for own in node.weights)
        bias_size = total_size + weight.detach().abs() @ node.bias_size
        return self._local(self.graph.add(Linear(node.parents, weights, total + weight @ node.bias, bias_size)))

    # --- images ---

    def convolution(
        self, x: Symbol, weight: Tensor, bias: Tensor | None, windows: Windows, transposed: bool = False
    ) -> Symbol:
        """A convolution over images (batch, channels, height, width), or its transpose; see ``Convolution``.

        What scales a whole channel of x, and what shifts x, go into the weight and the bias.
        """
        check_scores(x)
        out_shape = windows.large if transposed else windows.small
        through = windows.spread if transposed else windows.correlate
        bias = torch.zeros(out_shape[0], dtype=DTYPE) if bias is None else bias.to("cpu", DTYPE)
        if self._is_of_frames(x) and x.shape[1:].numel() * torch.Size(out_shape).numel() <= MAX_MATRIX:
            return self.linear_map(
                x, lambda part: through(part.flatten(1), weight).unflatten(1, out_shape), bias.reshape(-1, 1, 1)
            )
        node, scale, shift = self._image(x)
        total = bias.reshape(-1, 1, 1).expand(out_shape).reshape(-1)
        total_size = total.detach().abs()
        if bool((shift != 0).any()):
            total = total + through(shift[None], weight)[0]
            total_size = total_size + through(shift.detach().abs()[None], weight.detach().abs())[0]
        shape = torch.Size((x.shape[0], *out_shape))
        if node is None:
            return self._every_sample(constant(total), shape)
        if not bool((scale == 1).all()):
            if transposed:
                weight = weight * scale.reshape(-1, 1, 1, 1)
            else:
                grouped = weight.unflatten(0, (windows.groups, -1))
                weight = (grouped * scale.reshape(windows.groups, 1, -1, 1, 1)).flatten(0, 1)
        made = self.graph.add(Convolution(node, weight, total, windows, transposed, total_size))
        return self._every_sample(self._local(made), shape)

    def alike(self, x: Symbol, function: Callable[[Symbol], Symbol]) -> Symbol:
        """``function`` of images, (batch, ...), a sample may have several of, such as frames: of each in turn.

        Those of all samples that are of one kind, such as first frames, are a batch whose samples are treated alike.
        """
        rows = x.view(lambda part: part.flatten(1))
        _, local = split_samples(rows.ids)
        bits = (part.detach().contiguous().view(torch.int64) for part in (rows.scale, rows.shift))
        marks = torch.cat((local, *bits), dim=1)
        if torch.equal(marks, marks[:1].expand_as(marks)):
            return function(x)
        kinds, number = torch.unique(marks, dim=0, return_inverse=True)
        members = [(number == kind).nonzero().squeeze(-1) for kind in range(len(kinds))]
        made = [function(x.view(lambda part, own=own: part[own])) for own in members]
        order = torch.cat(members).argsort()
        return join(torch.cat, made).view(lambda part: part[order])

    def _is_of_frames(self, x: Symbol) -> bool:
        """Whether elements of input frames are among x, and not just those of one frame, all of them in order."""
        if self._whole(x) is not None:
            return False
        owners = self._nodes_of(split_samples(x.ids.reshape(x.shape[0], -1))[1]).unique().tolist()
        return any(owner >= 0 and isinstance(self.graph.nodes[owner], Frame) for owner in owners)

    def _image(self, x: Symbol) -> tuple[Node | None, Tensor, Tensor]:
        """A node, and a scale per channel, (c,), and a shift, (c * h * w,), that make x of it; None for constants."""
        whole, channels = self._whole(x), x.shape[1]
        if whole is not None:
            node, part = whole
            scale = part.scale.reshape(channels, -1)
            if node is None or bool((scale == scale[:, :1]).all()):
                return node, scale[:, 0], part.shift
        return (
            self.image_node(x),
            torch.ones(channels, dtype=DTYPE),
            torch.zeros(1, dtype=DTYPE).expand(x.shape[1:].numel()),
        )

    def image_node(self, x: Symbol) -> Node:
        """A node, but an input frame, that holds just the elements of x, (batch, ...), in their order."""
        whole = self._whole(x)
        if whole is not None and whole[0] is not None:
            node, part = whole
            return node if part.is_plain and not isinstance(node, Frame) else self._vector(part)
        samples, (row,) = self._same_row([x.view(lambda part: part.reshape(part.shape[0], -1))])
        if samples.tolist() != list(range(len(samples))):
            raise UnsupportedError("the images are not in the order of the batch")
        owners = self._nodes_of(row.ids)
        if len(torch.unique_consecutive(owners)) > MAX_PIECES or self._is_of_frames(x):
            return self._node(self._affine(row, torch.eye(len(owners), dtype=DTYPE), None))
        pieces = self._pieces(row)
        return pieces[0] if len(pieces) == 1 else self._once("concat", pieces, None, lambda: Concat(pieces))

    def _folded(self, node: Convolution, part: Symbol) -> Node | None:
        """A convolution that gives this one scaled and shifted; None if it is not scaled channel by channel."""
        scale = part.scale.reshape(node.out_shape[0], -1)
        if not bool((scale == scale[:, :1]).all()) or (node.transposed and node.windows.groups > 1):
            return None
        weight = node.weight * scale[:, 0].reshape((1, -1, 1, 1) if node.transposed else (-1, 1, 1, 1))
        bias = node.bias * part.scale + part.shift
        size = node.bias_size * part.scale.detach().abs() + part.shift.detach().abs()
        return self.graph.add(Convolution(node.parents[0], weight, bias, node.windows, node.transposed, size))

    def _scaled_frame(self, node: Frame, part: Symbol) -> Node:
        """All elements of a large frame: as channels of one pixel, each of which is convolved by itself."""
        shape = (node.size, 1, 1)
        windows = Windows(shape, shape, groups=node.size)
        return self.graph.add(Convolution(node, part.scale.reshape(-1, 1, 1, 1), part.shift, windows))

    def _without_scales(self, nodes: list[Node | None], parts: list[Symbol]) -> tuple[list, list]:
        """Terms of a sum, those of convolutions and frames as nodes of their own: weights take what scales them."""
        found = []
        for node, part in zip(nodes, parts, strict=True):
            if isinstance(node, Frame) or (isinstance(node, Convolution) and not part.is_plain):
                node = self._vector(part)
                part = self._local(node)
            found.append((node, part))
        return [node for node, _ in found], [part for _, part in found]

    # --- recurrent layers ---

    def recurrent(
        self,
        kind: str,
        inputs: list[Symbol],
        state: tuple[Symbol, ...],
        weights: Sequence[Tensor | None],
        nonlinearity: str = "tanh",
        backwards: bool = False,
    ) -> tuple[list[Symbol], tuple[Symbol, ...]]:
        """One layer and direction: hidden states, (batch, hidden) for every input (batch, n), and the final state.

        ``kind`` is a key of ``CELLS``; weights are W_ih, W_hh, b_ih, b_hh with torch's order of gates, biases or None,
        and for an LSTM with a projection of its states W_hr.
        """
        for symbol in (*inputs, *state):
            check_scores(symbol)
        samples, rows = self._same_row([*inputs, *state])
        state_nodes = tuple(self._pieces(row, single=True)[0] for row in rows[len(inputs) :])
        rows = rows[: len(inputs)]
        cell = self._cell(kind, weights, nonlinearity)
        self.graph.recurrent = True
        first = rows[0]
        normalised = not all(row.is_plain for row in rows) and all(
            bool((row.ids != CONSTANT).all() and (row.scale != 0).all())
            and torch.equal(row.scale, first.scale)
            and torch.equal(row.shift, first.shift)
            for row in rows
        )
        if normalised:
            cell.absorb_normalisation(-first.shift / first.scale, 1.0 / first.scale)
            rows = [_plain(row) for row in rows]
        hidden: list[Symbol] = [None] * len(rows)
        for t in reversed(range(len(rows))) if backwards else range(len(rows)):
            state_nodes = cell.step(self._pieces(rows[t]), state_nodes)
            hidden[t] = self.symbol(state_nodes[0], samples)
        return hidden, tuple(self.symbol(node, samples) for node in state_nodes)

    def _cell(self, kind: str, weights, nonlinearity: str):
        w_ih, w_hh, b_ih, b_hh, *w_hr = (None if part is None else part.to("cpu", DTYPE) for part in weights)
        layer = types.SimpleNamespace(
            hidden_size=w_hh.shape[1] if not w_hr else w_hr[0].shape[1],
            bias=b_ih is not None,
            nonlinearity=nonlinearity,
            weight_ih_l0=w_ih,
        )
        layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0 = w_hh, b_ih, b_hh
        if w_hr:
            (layer.weight_hr_l0,), kind = w_hr, f"{kind}, projected"
        return CELLS[kind](self.graph, layer, 0, "", DTYPE, self.relaxation)

    def _pieces(self, row: Symbol, single: bool = False) -> tuple[Node, ...]:
        """Nodes that hold a row's elements one after the other; one node if it is to be single."""
        owners = self._nodes_of(row.ids)
        runs, lengths = torch.unique_consecutive(owners, return_counts=True)
        if single and len(runs) > 1:
            return (self._node(self._affine(row, torch.eye(len(owners), dtype=DTYPE), None)),)
        pieces, start = [], 0
        for owner, length in zip(runs.tolist(), lengths.tolist(), strict=True):
            part = row.view(lambda values, a=start, b=start + length: values[a:b])
            start += length
            if owner < 0:
                pieces.append(self.graph.add(Constant(part.shift)))
            elif part.is_plain and torch.equal(part.ids, self._local(self.graph.nodes[owner]).ids) and not single:
                pieces.append(self.graph.nodes[owner])
            else:
                pieces.append(self._vector(part))
        return tuple(pieces)

    def _same_row(self, symbols: Sequence[Symbol]) -> tuple[Tensor, list[Symbol]]:
        """Numbers of the samples, (batch,), and each symbol's row, (k,), which must be the same for all samples."""
        batch = symbols[0].shape[0]
        samples = torch.full((batch,), -1)
        rows = []
        for symbol in symbols:
            owner, local = split_samples(symbol.ids)
            same = bool((local == local[0]).all() and (symbol.scale == symbol.scale[0]).all())
            if not same or not bool((symbol.shift == symbol.shift[0]).all()):
                raise UnsupportedError("the samples of a batch are not treated alike")
            if bool(((owner != samples) & (owner >= 0) & (samples >= 0)).any()):
                raise UnsupportedError("samples of a batch are mixed")
            samples = torch.maximum(samples, owner)
            rows.append(Symbol(local[0], symbol.scale[0], symbol.shift[0]))
        return torch.where(samples < 0, torch.arange(batch), samples), rows


def split_samples(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The sample of each row of numbers, (rows, k), -1 if all are constants, and the numbers in sample 0."""
    owner = torch.where(ids == CONSTANT, -1, ids // SAMPLE)
    sample = owner.amax(dim=1)
    if bool(((owner != sample[:, None]) & (owner >= 0)).any()):
        raise UnsupportedError("samples of a batch are mixed")
    return sample, torch.where(ids == CONSTANT, CONSTANT, ids % SAMPLE)


def _is_difference(node: Node) -> bool:
    """Whether it is one node minus another."""
    return isinstance(node, WeightedSum) and sorted(map(str, node.factors)) == ["-1.0", "1.0"]


def _plain(part: Symbol) -> Symbol:
    return Symbol(part.ids, torch.ones_like(part.scale), torch.zeros_like(part.shift))


def _parts(symbol: Symbol, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return symbol.ids, symbol.scale, shift


def _factor(scale: Tensor) -> float | Tensor:
    """A single number, if it is one and nothing is to be learnt of it."""
    if scale.requires_grad or not bool((scale == scale[0]).all()):
        return scale
    return scale[0].item()


def pruned(graph: Graph, output: Node) -> Graph:
    """The graph of ``output``: its input frames, all of them, and the nodes that it depends on."""
    needed, open_nodes = {output}, [output]
    while open_nodes:
        for parent in open_nodes.pop().parents:
            if parent not in needed:
                needed.add(parent)
                open_nodes.append(parent)
    smaller = Graph()
    smaller.recurrent = graph.recurrent
    for node in graph.nodes[: output.index + 1]:
        if isinstance(node, Frame):
            node.child_weights = []  # of what is left only: adding a child appends its own
        if node in needed or isinstance(node, Frame):
            smaller.add(node)
    return smaller


def as_graph(graph: Graph, dtype: torch.dtype, device: torch.device | str = "cpu", relaxation: str | None = None):
    """The same graph in another precision, on another device, its gate products relaxed in another way if given."""
    other = Graph()
    other.recurrent = graph.recurrent
    cast: dict[int, Tensor] = {}

    def converted(value):
        if isinstance(value, Tensor):
            kind = dtype if value.is_floating_point() else value.dtype  # which of the others are places and masks
            return cast.setdefault(id(value), usable_tensor(value).to(device, kind))
        if isinstance(value, tuple):
            return tuple(converted(part) for part in value)
        return value

    for node in graph.nodes:
        twin = Frame(node.size, node.frame) if isinstance(node, Frame) else copy.copy(node)
        for name, value in vars(node).items():
            if name not in ("parents", "child_weights"):
                setattr(twin, name, converted(value))
        twin.parents = tuple(other.nodes[parent.index] for parent in node.parents)
        if isinstance(node, Product) and relaxation is not None:
            twin.relaxation = relaxation
        other.add(twin)
    return other
