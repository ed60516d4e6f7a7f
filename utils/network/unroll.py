"""From a trained classifier to its graph: cells that read like their equations, in torch's parameter order."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..graph.graph import Graph
from ..graph.mix import weighted_sum
from ..graph.nodes import Constant, Frame, Linear, Node, WeightedSum
from ..graph.nonlinear import Activation, Product
from ..graph.picks import LastState, Negative, Slice
from .models import SequenceClassifier


class Cell:
    """Weights of one layer and direction, and its step. ``inputs`` are the parts of a time step's input vector."""

    def __init__(self, graph: Graph, rnn: nn.RNNBase, layer: int, suffix: str, dtype: torch.dtype, relaxation: str):
        def weight(name: str) -> Tensor:
            return getattr(rnn, f"{name}_l{layer}{suffix}").to(dtype)

        self.graph, self.hidden, self.relaxation = graph, rnn.hidden_size, relaxation
        self.w_ih, self.w_hh = weight("weight_ih"), weight("weight_hh")
        zero = self.w_ih.new_zeros(self.w_ih.shape[0])
        self.b_ih, self.b_hh = (weight("bias_ih"), weight("bias_hh")) if rnn.bias else (zero, zero)
        self._parts: tuple[Tensor, ...] | None = None
        self._gates: tuple[tuple[Tensor, ...], ...] | None = None
        self.absorbed = zero  # sizes of the terms that normalisation adds to b_ih

    def absorb_normalisation(self, mean: Tensor, std: Tensor) -> None:
        """Let the cell take raw inputs x in place of (x - mean) / std."""
        center = (mean / std).expand(self.w_ih.shape[1])
        self.absorbed = self.b_ih.abs() + self.w_ih.abs() @ center.abs()
        self.b_ih = self.b_ih - self.w_ih @ center
        self.w_ih = self.w_ih / std

    def bias_size(self) -> Tensor:
        """Of ``Linear``: what both biases are made of."""
        return torch.maximum(self.absorbed, self.b_ih.abs()) + self.b_hh.abs()

    def input_weights(self, inputs: tuple[Node, ...]) -> tuple[Tensor, ...]:
        """The parts of W_ih, the same tensors at every step."""
        if self._parts is None:
            self._parts = self.w_ih.split([part.size for part in inputs], dim=1)
        return self._parts


class RNNCell(Cell):
    """z_t = W_ih x_t + W_hh h_{t-1} + b_ih + b_hh,  h_t = tanh(z_t) or relu(z_t)."""

    def __init__(self, graph: Graph, rnn: nn.RNN, layer: int, suffix: str, dtype: torch.dtype, relaxation: str):
        super().__init__(graph, rnn, layer, suffix, dtype, relaxation)
        self.activation = rnn.nonlinearity

    def step(self, inputs: tuple[Node, ...], state: tuple[Node, ...]) -> tuple[Node, ...]:
        (h,) = state
        weights = (*self.input_weights(inputs), self.w_hh)
        z = self.graph.add(Linear((*inputs, h), weights, self.b_ih + self.b_hh, self.bias_size()))
        return (self.graph.add(Activation(z, self.activation)),)


class LSTMCell(Cell):
    """i, f, g, o = W_ih x_t + W_hh h_{t-1} + b_ih + b_hh (stacked in this order),

    c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g),  h_t = sigmoid(o) tanh(c_t).
    """

    def step(self, inputs: tuple[Node, ...], state: tuple[Node, ...]) -> tuple[Node, ...]:
        h, c = state
        weights = (*self.input_weights(inputs), self.w_hh)
        gates = self.graph.add(Linear((*inputs, h), weights, self.b_ih + self.b_hh, self.bias_size()))
        i, f, g, o = (self.graph.add(Slice(gates, k * self.hidden, self.hidden)) for k in range(4))
        kept = self.graph.add(Product(c, f, "x*sigmoid(y)", self.relaxation))
        written = self.graph.add(Product(g, i, "tanh(x)*sigmoid(y)", self.relaxation))
        c = self.graph.add(WeightedSum((kept, written)))
        h = self.graph.add(Product(c, o, "tanh(x)*sigmoid(y)", self.relaxation))
        return h, c


class ProjectedLSTMCell(LSTMCell):
    """The LSTM with ``proj_size``: h_t = W_hr (sigmoid(o) tanh(c_t))."""

    def __init__(self, graph: Graph, rnn: nn.LSTM, layer: int, suffix: str, dtype: torch.dtype, relaxation: str):
        super().__init__(graph, rnn, layer, suffix, dtype, relaxation)
        self.w_hr = getattr(rnn, f"weight_hr_l{layer}{suffix}").to(dtype)

    def step(self, inputs: tuple[Node, ...], state: tuple[Node, ...]) -> tuple[Node, ...]:
        h, c = super().step(inputs, state)
        return self.graph.add(Linear((h,), (self.w_hr,), self.w_hr.new_zeros(len(self.w_hr)))), c


class GRUCell(Cell):
    """r, z = W_ir x_t + W_hr h_{t-1} + b_ir + b_hr and likewise z (stacked in this order, then n);

    n = W_in x_t + b_in + sigmoid(r) (W_hn h_{t-1} + b_hn),  h_t = sigmoid(-z) tanh(n) + sigmoid(z) h_{t-1}.
    """

    def step(self, inputs: tuple[Node, ...], state: tuple[Node, ...]) -> tuple[Node, ...]:
        (h,) = state
        size, weights = self.hidden, self.input_weights(inputs)
        gate, new = slice(0, 2 * size), slice(2 * size, None)
        if self._gates is None:  # the same tensors at every step
            self._gates = tuple(w[gate] for w in weights), tuple(w[new] for w in weights), self.w_hh.split(2 * size)
        gates_of_inputs, new_of_inputs, (gates_of_state, new_of_state) = self._gates
        bias, sizes = self.b_ih[gate] + self.b_hh[gate], self.bias_size()[gate]
        gates = self.graph.add(Linear((*inputs, h), (*gates_of_inputs, gates_of_state), bias, sizes))
        r, z = (self.graph.add(Slice(gates, k * size, size)) for k in range(2))
        n = self.new_state(inputs, new_of_inputs, new_of_state, h, r)
        n = self.graph.add(Product(n, self.graph.add(Negative(z)), "tanh(x)*sigmoid(y)", self.relaxation))
        kept = self.graph.add(Product(h, z, "x*sigmoid(y)", self.relaxation))
        return (self.graph.add(weighted_sum((n, kept))),)

    def new_state(
        self, inputs: tuple[Node, ...], weights: tuple[Tensor, ...], state_weight: Tensor, h: Node, r: Node
    ) -> Node:
        """What n is the tanh of."""
        new = slice(2 * self.hidden, None)
        memory = self.graph.add(Linear((h,), (state_weight,), self.b_hh[new]))
        reset = self.graph.add(Product(memory, r, "x*sigmoid(y)", self.relaxation))
        written = self.graph.add(Linear(inputs, weights, self.b_ih[new], self.bias_size()[new]))
        return self.graph.add(WeightedSum((written, reset)))


class ResetFirstGRUCell(GRUCell):
    """The GRU whose reset gate acts before the matrix: n = W_in x_t + b_in + W_hn (sigmoid(r) h_{t-1}) + b_hn."""

    def new_state(
        self, inputs: tuple[Node, ...], weights: tuple[Tensor, ...], state_weight: Tensor, h: Node, r: Node
    ) -> Node:
        new = slice(2 * self.hidden, None)
        reset = self.graph.add(Product(h, r, "x*sigmoid(y)", self.relaxation))
        bias, sizes = self.b_ih[new] + self.b_hh[new], self.bias_size()[new]
        return self.graph.add(Linear((*inputs, reset), (*weights, state_weight), bias, sizes))


CELLS = {nn.RNN: RNNCell, nn.LSTM: LSTMCell, nn.GRU: GRUCell}


def unroll(
    model: SequenceClassifier,
    num_frames: int,
    dtype: torch.dtype | None = None,
    relaxation: str = "plane",
    lengths: Tensor | None = None,
    falling: bool = False,
) -> Graph:
    """The graph of a classifier over ``num_frames`` frames.

    Args:
        dtype: of the graph's weights, which are the model's (shared, never changed) where it has that dtype.
        relaxation: how the gate products of an LSTM or GRU are relaxed, a key of ``utils.choices.RELAXATIONS``.
        lengths: (batch,) number of frames that count in each sample. Frames after the end leave the state as it was.
        falling: the lengths do not rise from sample to sample. Then steps after a sample's end are not bounded for it,
            which saves work; for models that read forwards and classify by their last state.
    """
    rnn, head = model.rnn, model.head
    dtype = dtype or head.weight.dtype
    graph = Graph()
    graph.recurrent = True
    counts = [int((lengths > t).sum()) for t in range(num_frames)] if falling else None
    outputs = []
    for t in range(num_frames):
        graph.samples = counts[t] if counts else None
        outputs.append((graph.add(Frame(model.input_size, t)),))
    graph.samples = None
    outputs, lengths = model.enter(graph, outputs, lengths, dtype)
    valid = _valid_frames(None if falling else lengths, len(outputs), dtype)
    directions = 2 if rnn.bidirectional else 1
    for layer in range(rnn.num_layers):
        runs = []
        for direction in range(directions):
            suffix = "_reverse" if direction else ""
            cell = CELLS[type(rnn)](graph, rnn, layer, suffix, dtype, relaxation)
            if layer == 0:
                cell.absorb_normalisation(model.mean.to(dtype), model.std.to(dtype))
            state = _initial_state(graph, model, layer * directions + direction, dtype)
            runs.append(_run(cell, outputs, state, valid, counts, backwards=bool(direction)))
        outputs = list(zip(*runs, strict=True))
    weights = head.weight.to(dtype)
    bias = head.bias.to(dtype) if head.bias is not None else weights.new_zeros(weights.shape[0])
    pooled = _last_states(graph, outputs, counts) if falling else _pool(graph, outputs, model.pooling, valid)
    graph.add(Linear(pooled, weights.split([part.size for part in pooled], dim=1), bias))
    return graph


def _valid_frames(lengths: Tensor | None, num_frames: int, dtype: torch.dtype) -> list[Tensor | None]:
    """Per frame, None if it counts in every sample, else (batch, 1) of ones and zeros."""
    if lengths is None:
        return [None] * num_frames
    counts = [lengths > t for t in range(num_frames)]
    return [None if bool(count.all()) else count.to(dtype)[:, None] for count in counts]


def _initial_state(graph: Graph, model: SequenceClassifier, row: int, dtype: torch.dtype) -> tuple[Node, ...]:
    zeros = model.head.weight.new_zeros(model.rnn.hidden_size)
    h0 = zeros if model.h0 is None else model.h0[row]
    state = [graph.add(Constant(h0.to(dtype)))]
    if isinstance(model.rnn, nn.LSTM):
        c0 = zeros if model.c0 is None else model.c0[row]
        state.append(graph.add(Constant(c0.to(dtype))))
    return tuple(state)


def _run(
    cell: Cell,
    inputs: list[tuple[Node, ...]],
    state: tuple[Node, ...],
    valid: list[Tensor | None],
    counts: list[int] | None,
    backwards: bool,
) -> list[Node]:
    """Hidden states of one layer and direction, in the order of the frames."""
    order = range(len(inputs))
    hidden: list[Node] = [None] * len(inputs)
    for t in reversed(order) if backwards else order:
        cell.graph.samples = counts[t] if counts else None
        new = cell.step(inputs[t], state)
        if valid[t] is not None:
            keep = (valid[t], 1.0 - valid[t])
            new = tuple(cell.graph.add(WeightedSum(pair, keep)) for pair in zip(new, state, strict=True))
        hidden[t], state = new[0], new
    cell.graph.samples = None
    return hidden


def _last_states(graph: Graph, outputs: list[tuple[Node, ...]], counts: list[int]) -> tuple[Node, ...]:
    """Each sample's own last state, with ``counts[t]`` samples that have frame t."""
    ends = [t for t in reversed(range(len(counts))) if counts[t] > (counts[t + 1] if t + 1 < len(counts) else 0)]
    starts = (0, *(counts[t] for t in ends[:-1]))
    return (graph.add(LastState(tuple(outputs[t][0] for t in ends), starts)),)


def _pool(graph: Graph, outputs: list[tuple[Node, ...]], pooling: str, valid: list[Tensor | None]) -> tuple[Node, ...]:
    """What the head reads, a node per direction: the last state (frame 0's if it runs backwards) or the mean.

    The state at the last frame is that at a sample's own last frame, as frames after the end do not change it.
    """
    if pooling == "last":
        return tuple(outputs[-1 if direction == 0 else 0][direction] for direction in range(len(outputs[0])))
    weights = [1.0 if count is None else count for count in valid]
    factors = [weight / sum(weights) for weight in weights]
    return tuple(graph.add(WeightedSum(run, factors)) for run in zip(*outputs, strict=True))
