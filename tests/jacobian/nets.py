"""What the tests of gradients share: small graphs of every kind, their exact gradients, and the check of bounds."""

from __future__ import annotations

from unittest import mock

import torch
from helpers import (
    Threat,
    attack,
    check_below,
    classifier,
    dense,
    framed,
    margins_of,
    normal,
    random_points,
    steepest,
)
from torch import Tensor, nn

from utils.bounds.passes import BoundPass
from utils.graph import Concat, Constant, Graph, Linear, Negative, Slice, WeightedSum
from utils.graph.nonlinear import Activation, Product
from utils.jacobian import JacobianPass
from utils.network.models import SequenceClassifier
from utils.network.unroll import CELLS, ResetFirstGRUCell, unroll

FRAMES, SIZE, CLASSES = 3, 3, 3
ACTIVATIONS = ("tanh", "sigmoid", "relu", "leaky_relu(0.2)", "hardtanh(-0.7, 0.9)", "arctan", "softplus", "elu")


def gated(kind: type[nn.RNNBase], seed: int = 0, **options) -> SequenceClassifier:
    rnn = kind(SIZE, 3, batch_first=True, **options)
    head = nn.Linear(3 * (2 if rnn.bidirectional else 1), CLASSES)
    for number, parameter in enumerate((*rnn.parameters(), *head.parameters())):
        parameter.data = 0.7 * normal(*parameter.shape, seed=1000 * seed + number)
    return SequenceClassifier(rnn, head).double().requires_grad_(False)


def reset_first() -> Graph:
    with mock.patch.dict(CELLS, {nn.GRU: ResetFirstGRUCell}):
        return unroll(gated(nn.GRU), FRAMES)


def perceptron(activation: str, widths=(4, 4), inputs: int = SIZE, seed: int = 1) -> Graph:
    graph = Graph()
    (node,) = framed(graph, 1, inputs)
    for number, width in enumerate(widths):
        node = graph.add(Activation(dense(graph, width, node, seed=100 * seed + 10 * number), activation))
    dense(graph, CLASSES, node, seed=100 * seed + 99)
    return graph


def tangled() -> Graph:
    """Nodes that many others read, slices that overlap, constants and nodes side by side, weights and signs."""
    graph = Graph()
    frames = framed(graph, FRAMES)
    z = dense(graph, 6, *frames[:2], seed=3)
    a = graph.add(Activation(z, "tanh"))
    left, right = graph.add(Slice(a, 0, 4)), graph.add(Slice(a, 2, 4))
    parts = (left, graph.add(Negative(right)), graph.add(Constant(normal(2, seed=4))))
    c = graph.add(Concat(parts))
    x, y = graph.add(Slice(c, 0, 4)), graph.add(Slice(c, 5, 4))
    products = [graph.add(Product(x, y, name, "plane")) for name in ("tanh(x)*sigmoid(y)", "x*sigmoid(y)")]
    masks = normal(4, seed=5), (normal(3, 1, seed=6) > 0).double()
    total = graph.add(WeightedSum((*products, left, left), (masks[0], -0.5, masks[1], 1.0)))
    twice = graph.add(Linear((total, total), (normal(4, 4, seed=7), normal(4, 4, seed=8)), normal(4, seed=9)))
    dense(graph, CLASSES, graph.add(Activation(twice, "relu")), c, frames[1], frames[2], seed=10)
    return graph


NETS = {
    "tanh": lambda: unroll(classifier(), FRAMES),
    "relu": lambda: unroll(classifier(activation="relu"), FRAMES),
    "two layers, mean": lambda: unroll(classifier(layers=2, pooling="mean"), FRAMES),
    "bidirectional": lambda: unroll(classifier(activation="relu", bidirectional=True, mean=0.2, std=0.5), FRAMES),
    "lengths": lambda: unroll(classifier(pooling="mean"), FRAMES, lengths=torch.tensor([3, 1, 2])),
    "lstm": lambda: unroll(gated(nn.LSTM), FRAMES),
    "lstm, both ways, lengths": lambda: unroll(
        gated(nn.LSTM, bidirectional=True), FRAMES, lengths=torch.tensor([2, 3, 1])
    ),
    "gru": lambda: unroll(gated(nn.GRU, num_layers=2), FRAMES),
    "gru, reset first": reset_first,
    "tangled": tangled,
    **{f"perceptron, {name}": lambda name=name: perceptron(name) for name in ACTIVATIONS},
}


def frames_of(graph: Graph) -> int:
    return len(graph.frames)


def gradients_of(graph: Graph, x: Tensor, rows: Tensor, create: bool = False) -> Tensor:
    """Of every row, (batch, n_rows, T, n)."""
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        margins = margins_of(graph, x, rows)
        parts = [torch.autograd.grad(m.sum(), x, retain_graph=True, create_graph=create)[0] for m in margins.unbind(1)]
    return torch.stack(parts, dim=1)


def points_within(graph: Graph, x: Tensor, eps: Tensor, rows: Tensor, threat: Threat, seed: int = 0) -> Tensor:
    """Random points, corners, and where margins are small or gradients large, (count, batch, T, n)."""

    def minus_size(y: Tensor) -> Tensor:
        with torch.enable_grad():
            gradient = gradients_of(graph, y, rows[:, :1], create=True)
            return 0.0 * y.flatten(1).sum(1) - gradient.abs().flatten(1).sum(1)

    found = [*random_points(x, eps, threat, 6, seed)]
    found.append(attack(lambda y: margins_of(graph, y, rows)[:, 0], x, eps, threat, steps=3, starts=2))
    found.append(attack(minus_size, x, eps, threat, steps=3, starts=2))
    return torch.stack(found)


def worst_of(gradients: Tensor, x: Tensor, eps: Tensor, threat: Threat) -> Tensor:
    """Most that -J (x' - x) can be over the set, (batch,), for J (batch, T, n)."""
    if threat.clip is None:
        return -(gradients * steepest(gradients, eps, threat)).flatten(1).sum(1)
    low, high = threat.clip
    down, up = (torch.minimum(eps[..., None], side).clamp(min=0.0) for side in (x - low, high - x))
    return torch.maximum(-gradients * up, gradients * down).flatten(1).sum(1)


def check_gradients(jacobian: JacobianPass, graph: Graph, x, eps, rows, threat: Threat, points: Tensor) -> None:
    """Fail unless gradients and margins at the points are within what the pass says of them."""
    batch, count = len(x), rows.shape[1]
    falls, apart = jacobian.fall().view(batch, count), jacobian.frame_falls().view(batch, count, -1)
    with torch.enable_grad():
        check_below(falls, jacobian.fall().view(batch, count), "fall, by what has no gradient as well")
    bounds = {
        frame: [side.view(batch, count, -1) for side in jacobian.frame_bounds(frame)] for frame in jacobian.frames
    }
    assert falls.isfinite().all() and apart.isfinite().all()
    check_below(torch.zeros_like(falls), falls, "no fall")
    clean, zero = margins_of(graph, x, rows), torch.zeros_like(eps)
    for point in points:
        gradients = gradients_of(graph, point, rows)
        check_below(clean - margins_of(graph, point, rows), falls, "fall of a margin")
        for frame in range(x.shape[1]):
            low, high = bounds.get(frame, (None, None))
            if low is not None:
                check_below(low, gradients[:, :, frame], f"gradient at frame {frame}")
                check_below(-high, -gradients[:, :, frame], f"minus the gradient at frame {frame}")
            alone = torch.where(torch.arange(x.shape[1]) == frame, eps, zero)
            for k, gradient in enumerate(gradients.unbind(1)):
                check_below(worst_of(gradient, x, alone, threat), apart[:, k, frame], f"fall along frame {frame}")
        for k, gradient in enumerate(gradients.unbind(1)):
            check_below(worst_of(gradient, x, eps, threat), falls[:, k], "fall by a gradient")


def jacobian_of(graph: Graph, threat: Threat, x, eps, rows, chain="joint", layers="crown") -> JacobianPass:
    with torch.no_grad():
        return JacobianPass(BoundPass(graph, threat.around(x, eps), layers), rows, chain)
