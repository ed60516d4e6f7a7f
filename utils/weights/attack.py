"""Projected gradient descent on weights: moves of a module's parameters, for every sample and margin its own."""

from __future__ import annotations

import torch
from torch import Tensor

from ..graph.graph import Graph
from ..graph.nodes import Frame
from ..perturbation.lp_ball import INF
from .balls import WeightBalls
from .moved import Moved, moved_graph
from .problem import WeightProblem

FIRST_STEP, LAST_STEP = 1.0, 0.03  # step sizes, as shares of eps
MOVES_AT_ONCE = 1 << 24  # numbers of moves
GROWTHS = 40  # of eps, at most, until a sample breaks
VERDICT = torch.float64


def evaluate_moved(graph: Graph, x: Tensor, moves: dict[str, Tensor]) -> Tensor:
    """The output, (N, size), of a ``moved_graph`` at x, (N, T, n), with moves of the parameters, (N, *shape) each."""
    values: list[Tensor] = []
    for node in graph.nodes:
        parents = [values[parent.index].expand(len(x), -1) for parent in node.parents]
        if isinstance(node, Frame):
            values.append(x[:, node.frame])
        elif isinstance(node, Moved):
            values.append(node.value_with(moves, *parents))
        else:
            values.append(node.value(*parents))
    return values[-1]


def inside(balls: WeightBalls, name: str, move: Tensor) -> Tensor:
    """The nearest point of a parameter's ball, (N, *shape); eps of the balls is (N,)."""
    eps = balls.eps.reshape(-1, *[1] * (move.dim() - 1))
    unit = balls.units[name]
    if balls.norm == INF:
        reach = eps * (unit if unit.dim() == 0 else unit.reshape(move.shape[1:]))
        return torch.minimum(torch.maximum(move, -reach), reach)
    length = torch.linalg.vector_norm(move.flatten(1), dim=1).reshape(eps.shape)
    return move * torch.where(length > eps * unit, eps * unit / length.clamp(min=1e-300), 1.0)


def steepest(balls: WeightBalls, name: str, gradient: Tensor) -> Tensor:
    """The move in the ball along which a function of this gradient falls most."""
    eps = balls.eps.reshape(-1, *[1] * (gradient.dim() - 1))
    unit = balls.units[name]
    if balls.norm == INF:
        return -eps * (unit if unit.dim() == 0 else unit.reshape(gradient.shape[1:])) * gradient.sign()
    length = torch.linalg.vector_norm(gradient.flatten(1), dim=1).reshape(eps.shape)
    return -eps * unit * gradient / torch.where(length > 0, length, 1.0)


@torch.no_grad()
def attack_weights(problem: WeightProblem, eps: Tensor, steps: int = 20) -> Tensor:
    """The least margins that descent finds, (batch, n_specs), over moves of the weights of size eps, (batch,).

    Inputs stay as they are. Each margin has its own moves.
    """
    batch, count = problem.rows.shape[:2]
    numbers = sum(problem.moved.model.get_parameter(name).numel() for name in problem.moved.places(VERDICT))
    size = max(1, MOVES_AT_ONCE // numbers)
    every = torch.arange(batch * count, device=problem.x.device)
    found = [_descend(problem, part // count, part % count, eps.to(VERDICT), steps) for part in every.split(size)]
    return torch.cat(found).reshape(batch, count)


def _descend(problem: WeightProblem, samples: Tensor, numbers: Tensor, eps: Tensor, steps: int) -> Tensor:
    x, rows = problem.x[samples].to(VERDICT), problem.rows[samples, numbers].to(VERDICT)
    places, balls = problem.moved.places(VERDICT), problem.moved.balls(eps[samples], VERDICT)
    graph = moved_graph(problem.graph(VERDICT), places, balls)
    shapes = {name: problem.moved.model.get_parameter(name).shape for name in places}
    moves = {name: x.new_zeros(len(x), *shape) for name, shape in shapes.items()}
    least = x.new_full((len(x),), torch.inf)
    for step in range(steps + 1):
        with torch.enable_grad():
            leaves = {name: move.detach().requires_grad_() for name, move in moves.items()}
            margin = (rows * evaluate_moved(graph, x, leaves)).sum(dim=-1)
            gradients = torch.autograd.grad(margin.sum(), tuple(leaves.values()))
        least = torch.minimum(least, margin.detach())
        share = FIRST_STEP * (LAST_STEP / FIRST_STEP) ** (step / max(1, steps - 1))
        for (name, move), gradient in zip(leaves.items(), gradients, strict=True):
            moved = move.detach() + 2.0 * share * steepest(balls, name, gradient)
            moves[name] = inside(balls, name, moved)
    return least


def attacked_radius(problem: WeightProblem, start: Tensor, steps: int = 10, growth: float = 1.15) -> Tensor:
    """The least eps, from ``start``, (batch,), on and in steps of ``growth``, at which descent breaks a sample; or inf.

    No sample can be certified there.
    """
    eps, found = start.clone().to(VERDICT), torch.full_like(start, torch.inf, dtype=VERDICT)
    for _ in range(GROWTHS):
        broken = (attack_weights(problem, eps, steps) <= 0).any(dim=1)
        found = torch.where(broken & found.isinf(), eps, found)
        if bool(found.isfinite().all()):
            break
        eps = torch.where(found.isinf(), growth * eps, eps)
    return found
