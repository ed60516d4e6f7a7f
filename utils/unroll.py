"""From a trained classifier to its graph: cells that read like their equations, in torch's parameter order."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from utils.graph import Activation, Constant, Frame, Graph, Linear, Node, WeightedSum
from utils.models import SequenceClassifier


class Cell:
    """Weights of one layer and direction, and its step. ``inputs`` are the parts of a time step's input vector."""

    def __init__(self, graph: Graph, rnn: nn.RNNBase, layer: int, suffix: str, dtype: torch.dtype):
        def weight(name: str) -> Tensor:
            return getattr(rnn, f"{name}_l{layer}{suffix}").to(dtype)

        self.graph, self.hidden = graph, rnn.hidden_size
        self.w_ih, self.w_hh = weight("weight_ih"), weight("weight_hh")
        zero = self.w_ih.new_zeros(self.w_ih.shape[0])
        self.b_ih, self.b_hh = (weight("bias_ih"), weight("bias_hh")) if rnn.bias else (zero, zero)

    def absorb_normalisation(self, mean: Tensor, std: Tensor) -> None:
        """Let the cell take raw inputs x in place of (x - mean) / std."""
        self.b_ih = self.b_ih - self.w_ih @ (mean / std).expand(self.w_ih.shape[1])
        self.w_ih = self.w_ih / std

    def input_weights(self, inputs: tuple[Node, ...]) -> tuple[Tensor, ...]:
        return self.w_ih.split([part.size for part in inputs], dim=1)


class RNNCell(Cell):
    """z_t = W_ih x_t + W_hh h_{t-1} + b_ih + b_hh,  h_t = tanh(z_t) or relu(z_t)."""

    def __init__(self, graph: Graph, rnn: nn.RNN, layer: int, suffix: str, dtype: torch.dtype):
        super().__init__(graph, rnn, layer, suffix, dtype)
        self.activation = rnn.nonlinearity

    def step(self, inputs: tuple[Node, ...], state: tuple[Node, ...]) -> tuple[Node, ...]:
        (h,) = state
        weights = (*self.input_weights(inputs), self.w_hh)
        z = self.graph.add(Linear((*inputs, h), weights, self.b_ih + self.b_hh))
        return (self.graph.add(Activation(z, self.activation)),)


CELLS = {nn.RNN: RNNCell}


def unroll(model: SequenceClassifier, num_frames: int, dtype: torch.dtype | None = None) -> Graph:
    """The graph of a classifier over ``num_frames`` frames, with weights (shared, never changed) in ``dtype``."""
    rnn, head = model.rnn, model.head
    dtype = dtype or head.weight.dtype
    graph = Graph()
    outputs = [(graph.add(Frame(rnn.input_size, t)),) for t in range(num_frames)]
    directions = 2 if rnn.bidirectional else 1
    for layer in range(rnn.num_layers):
        runs = []
        for direction in range(directions):
            cell = CELLS[type(rnn)](graph, rnn, layer, "_reverse" if direction else "", dtype)
            if layer == 0:
                cell.absorb_normalisation(model.mean.to(dtype), model.std.to(dtype))
            state = _initial_state(graph, model, layer * directions + direction, dtype)
            runs.append(_run(cell, outputs, state, backwards=bool(direction)))
        outputs = list(zip(*runs, strict=True))
    weights = head.weight.to(dtype)
    bias = head.bias.to(dtype) if head.bias is not None else weights.new_zeros(weights.shape[0])
    pooled = _pool(graph, outputs, model.pooling)
    graph.add(Linear(pooled, weights.split([part.size for part in pooled], dim=1), bias))
    return graph


def _initial_state(graph: Graph, model: SequenceClassifier, row: int, dtype: torch.dtype) -> tuple[Node, ...]:
    zeros = model.head.weight.new_zeros(model.rnn.hidden_size)
    h0 = zeros if model.h0 is None else model.h0[row]
    state = [graph.add(Constant(h0.to(dtype)))]
    if isinstance(model.rnn, nn.LSTM):
        c0 = zeros if model.c0 is None else model.c0[row]
        state.append(graph.add(Constant(c0.to(dtype))))
    return tuple(state)


def _run(cell: Cell, inputs: list[tuple[Node, ...]], state: tuple[Node, ...], backwards: bool) -> list[Node]:
    """Hidden states of one layer and direction, in the order of the frames."""
    order = range(len(inputs))
    hidden: list[Node] = [None] * len(inputs)
    for t in reversed(order) if backwards else order:
        state = cell.step(inputs[t], state)
        hidden[t] = state[0]
    return hidden


def _pool(graph: Graph, outputs: list[tuple[Node, ...]], pooling: str) -> tuple[Node, ...]:
    """What the head reads, a node per direction: the last state (frame 0's if it runs backwards) or the mean."""
    if pooling == "last":
        return tuple(outputs[-1 if direction == 0 else 0][direction] for direction in range(len(outputs[0])))
    factor = (1.0 / len(outputs),) * len(outputs)
    return tuple(graph.add(WeightedSum(run, factor)) for run in zip(*outputs, strict=True))
