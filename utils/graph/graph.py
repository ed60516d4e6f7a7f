"""A classifier as a list of nodes in topological order."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .convolution import Convolution
from .nodes import Frame, Linear, Node


class Graph:
    """Nodes in topological order; the last one is the output (logits)."""

    def __init__(self):
        self.nodes: list[Node] = []
        self.samples: int | None = None  # of the nodes that are added next
        self.recurrent = False  # unrolled from cells
        self.kept: dict[tuple, tuple] = {}

    def add(self, node: Node) -> Node:
        """Append a node whose parents are in the graph already, and return it."""
        for parent in node.parents:
            if not 0 <= parent.index < len(self.nodes) or self.nodes[parent.index] is not parent:
                raise ValueError("a node's parents must be added to the graph before it")
            if isinstance(parent, Frame) and not node.meets_frames:
                raise ValueError("an input frame must enter through a Linear node (the identity, if nothing else)")
        for number, parent in enumerate(node.parents):
            if isinstance(parent, Frame) and isinstance(node, Linear):
                parent.child_weights.append(node.weights[number])
            elif isinstance(parent, Frame):
                parent.whole = True
        node.samples = self.samples
        node.index = len(self.nodes)
        self.nodes.append(node)
        return node

    @property
    def output(self) -> Node:
        return self.nodes[-1]

    def detach(self) -> Graph:
        """Let the graph's own tensors carry no gradients to the model, which stays as it is; returns the graph."""
        for node in self.nodes:
            node.detach()
        return self

    def dense(self) -> Graph:
        """The same graph with the matrices of its convolutions, for what asks for these; itself if it has none.

        Raises ValueError where a matrix is too large.
        """
        if not any(isinstance(node, Convolution) for node in self.nodes):
            return self
        return self.rebuilt(lambda node: node.as_linear() if isinstance(node, Convolution) else copy.copy(node))

    def rebuilt(self, twin_of: Callable[[Node], Node]) -> Graph:
        """The same graph of other nodes: ``twin_of`` gives a new one for each but the frames, whose parents are set."""
        other = Graph()
        other.recurrent = self.recurrent
        for node in self.nodes:
            twin = Frame(node.size, node.frame) if isinstance(node, Frame) else twin_of(node)
            twin.parents = tuple(other.nodes[parent.index] for parent in node.parents)
            other.samples = node.samples
            other.add(twin)
        return other

    def beside_inputs(self, outputs: Tensor, inputs: Tensor) -> Graph:
        """A graph that ends with ``outputs @ output + inputs @ x``, (k,), for x all frames one after the other, (T n,).

        Matrices (k, size) and (k, T n).
        """
        other = self.rebuilt(copy.copy)
        other.samples = None
        frames = sorted(other.frames, key=lambda frame: frame.frame)
        weights = inputs.split([frame.size for frame in frames], dim=1)
        other.add(Linear((other.output, *frames), (outputs, *weights), outputs.new_zeros(len(outputs))))
        return other

    def reduced_weight(self, frame: Frame, weight: Tensor) -> Tensor:
        """``weight`` times an orthonormal basis of the space spanned by the rows of all weights that meet the frame."""
        children = frame.child_weights
        if frame.whole or sum(child.shape[0] for child in children) >= frame.size:
            return weight

        def reduced() -> Tensor:
            basis, _ = torch.linalg.qr(torch.cat(children).detach().T)
            return weight.detach() @ basis

        # Frames share weights, of which each holds views of its own.
        return self.once(("reduced",), tuple(part.detach() for part in (weight, *children)), reduced)

    def once(self, what: tuple, made_of: tuple[Tensor, ...], make: Callable[[], Tensor]) -> Tensor:
        """What passes make of weights alone, such as their norms, kept for other passes over the graph.

        ``what`` says what it is, ``made_of`` of which tensors. These are kept as well: a tensor is known by its place
        in memory, which another one may take when it is gone.
        """
        if torch.is_grad_enabled() and any(part.requires_grad for part in made_of):
            return make()
        key = (*what, *((p.data_ptr(), p.shape, p.stride(), p.dtype) for p in made_of))
        if key not in self.kept:
            self.kept[key] = (make(), made_of)
        return self.kept[key][0]

    @property
    def frames(self) -> list[Frame]:
        return [node for node in self.nodes if isinstance(node, Frame)]

    def evaluate(self, x: Tensor) -> Tensor:
        """The output at the sequences x, (batch, T, n): the forward pass."""
        return self._values(x, (self.output,))[-1]

    def term_sizes(self, x: Tensor, rows: Tensor) -> Tensor:
        """Sums of the absolute values of the terms that make ``rows @ output`` at x, (batch, n_rows).

        Rounding is in proportion to these, not to what is left when terms cancel. Rows are (batch or 1, n_rows, size).
        """
        output = self.output
        values = self._values(x, (output, *output.parents))
        pairs = [(values[-1], rows)]
        if isinstance(output, Linear):
            pairs = [(values[p.index], rows @ weight) for p, weight in zip(output.parents, output.weights, strict=True)]
            pairs.append((output.bias[None], rows))
        return sum((factors.abs() @ part.abs().unsqueeze(-1)).squeeze(-1) for part, factors in pairs)

    def _values(self, x: Tensor, wanted: Sequence[Node] | None = None) -> list[Tensor | None]:
        """Every node's value; of all but the wanted ones None, if these are given, once no other node needs them."""
        last = {} if wanted is None else {p.index: node.index for node in self.nodes for p in node.parents}
        kept = {node.index for node in wanted or ()}
        values: list[Tensor | None] = []
        for node in self.nodes:
            if isinstance(node, Frame):
                values.append(x[:, node.frame])
            else:
                values.append(node.value(*(values[parent.index] for parent in node.parents)))
            for index in {parent.index for parent in node.parents} - kept:
                if last.get(index) == node.index:
                    values[index] = None
        return values
