"""What the tests of the bound engine share: random nets, perturbed points, an attack, and the soundness checks.

The checks are functions so that the tests can also turn them on bounds that are broken on purpose.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import mpmath
import torch
from torch import Tensor, nn

from utils.graph.graph import Graph
from utils.graph.nodes import Frame, Linear
from utils.network.models import SequenceClassifier
from utils.perturbation.lp_ball import INF
from utils.perturbation.sets import Perturbation
from utils.relaxation.lines import Relaxation

mpmath.mp.dps = 60

# Room for the rounding of sums in float64, relative to the size of the numbers: the bounds are about reals.
ROUNDING = 1e-12


# --- nets -----------------------------------------------------------------------------------------------------------


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def classifier(
    *,
    inputs=3,
    hidden=4,
    classes=3,
    layers=1,
    bidirectional=False,
    activation="tanh",
    bias=True,
    gain=1.0,
    seed=0,
    dtype=torch.float64,
    **options,
) -> SequenceClassifier:
    """A small random classifier; ``options`` (pooling, mean, std, state) go to SequenceClassifier."""
    rnn = nn.RNN(
        inputs, hidden, layers, nonlinearity=activation, bias=bias, batch_first=True, bidirectional=bidirectional
    )
    head = nn.Linear(hidden * (2 if bidirectional else 1), classes, bias=bias)
    for number, parameter in enumerate((*rnn.parameters(), *head.parameters())):
        scale = gain * (0.8 if parameter.dim() == 2 else 0.3)
        parameter.data = scale * normal(*parameter.shape, seed=1000 * seed + number)
    return SequenceClassifier(rnn, head, **options).to(dtype).requires_grad_(False)


def node_values(graph: Graph, x: Tensor) -> list[Tensor]:
    """Value of every node at the sequences x."""
    values: list[Tensor] = []
    for node in graph.nodes:
        parents = (values[parent.index] for parent in node.parents)
        values.append(x[:, node.frame] if isinstance(node, Frame) else node.value(*parents))
    return values


def margins_of(graph: Graph, x: Tensor, rows: Tensor) -> Tensor:
    return (rows @ graph.evaluate(x)[..., None]).squeeze(-1)


def framed(graph: Graph, frames: int, size: int = 3) -> list[Frame]:
    """Add the input frames."""
    return [graph.add(Frame(size, t)) for t in range(frames)]


def dense(graph: Graph, size: int, *parents, seed: int) -> Linear:
    """Add a random Linear node."""
    weights = tuple(normal(size, p.size, seed=seed + i) / p.size**0.5 for i, p in enumerate(parents))
    return graph.add(Linear(parents, weights, 0.3 * normal(size, seed=seed + 99)))


# --- threat models and points inside them ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Threat:
    norm: float
    ball: str = "frame"
    clip: tuple[float, float] | None = None

    def __str__(self):
        return f"l{self.norm:g}-{self.ball}{'-clip' if self.clip else ''}"

    def around(self, x: Tensor, eps: Tensor) -> Perturbation:
        return Perturbation(x, eps, norm=self.norm, ball=self.ball, clip=self.clip)


THREATS = [
    *(Threat(norm, ball) for norm in (1.0, 2.0, INF) for ball in ("frame", "sequence")),
    Threat(INF, clip=(-1.0, 1.0)),
]


def project_ball(delta: Tensor, eps: Tensor, norm: float) -> Tensor:
    """Points of the l_p balls of radius eps (...,) near delta (..., n): the nearest ones."""
    eps = eps[..., None]
    if norm == INF:
        return torch.minimum(torch.maximum(delta, -eps), eps)
    if norm == 2.0:
        length = delta.norm(dim=-1, keepdim=True)
        return delta * torch.where(length > eps, eps / length.clamp(min=1e-300), 1.0)
    size = delta.abs()
    ordered = size.sort(dim=-1, descending=True).values
    count = torch.arange(1, delta.shape[-1] + 1, dtype=delta.dtype)
    excess = (ordered.cumsum(dim=-1) - eps) / count
    last = (ordered > excess).to(delta.dtype).mul(count).argmax(dim=-1, keepdim=True)
    shrunk = delta.sign() * (size - excess.gather(-1, last)).clamp(min=0.0)
    return torch.where(size.sum(dim=-1, keepdim=True) > eps, shrunk, delta)


def project(points: Tensor, x: Tensor, eps: Tensor, threat: Threat) -> Tensor:
    """Nearest points to ``points`` of the perturbation set around x; all (batch, T, n), eps (batch, T)."""
    delta = (points - x) * (eps > 0)[..., None]
    if threat.ball == "sequence":
        delta = project_ball(delta.flatten(1), eps.amax(dim=1), threat.norm).view_as(x)
    else:
        delta = project_ball(delta, eps, threat.norm)
    return x + delta if threat.clip is None else (x + delta).clamp(*threat.clip)


def steepest(gradient: Tensor, eps: Tensor, threat: Threat) -> Tensor:
    """The delta of the perturbation set along which a linear function falls most."""
    masked = gradient * (eps > 0)[..., None]
    flat, radius = (masked.flatten(1), eps.amax(dim=1)) if threat.ball == "sequence" else (masked, eps)
    if threat.norm == INF:
        direction = flat.sign()
    elif threat.norm == 2.0:
        direction = flat / flat.norm(dim=-1, keepdim=True).clamp(min=1e-300)
    else:
        largest = flat.abs().argmax(dim=-1, keepdim=True)
        direction = torch.zeros_like(flat).scatter(-1, largest, flat.gather(-1, largest).sign())
    return -(radius[..., None] * direction).view_as(gradient)


def random_points(x: Tensor, eps: Tensor, threat: Threat, count: int, seed: int) -> Tensor:
    """(count, batch, T, n) points: some inside, most on the boundary or at corners of the perturbation set."""
    directions = normal(count, *x.shape, seed=seed, dtype=x.dtype)
    points = []
    for number, direction in enumerate(directions):
        if number % 4 == 0:  # anywhere
            points.append(project(x + direction * eps[..., None], x, eps, threat) * 0.5 + 0.5 * x)
        elif number % 4 == 1:  # boundary
            points.append(project(x + 100 * direction * eps[..., None], x, eps, threat))
        else:  # corners: extreme points
            corner = x + steepest(direction, eps, threat)
            points.append(corner if threat.clip is None else corner.clamp(*threat.clip))
    return torch.stack(points)


def attack(value_of, x: Tensor, eps: Tensor, threat: Threat, steps=8, starts=3, seed=0) -> Tensor:
    """Points (batch, T, n) of the perturbation set where ``value_of`` (batch,) is small, found by descent from x,
    random starts and towards the points at which the linearisation is least."""
    points = torch.cat((x[None], random_points(x, eps, threat, starts - 1, seed)))
    best_value, best = torch.full_like(x[:, 0, 0], INF), x.clone()
    for current in points:
        for step in range(steps):
            current = current.detach().requires_grad_()
            with torch.enable_grad():
                value = value_of(current)
                (gradient,) = torch.autograd.grad(value.sum(), current)
            current, value = current.detach(), value.detach()
            better = value < best_value
            best_value, best = torch.where(better, value, best_value), torch.where(better[:, None, None], current, best)
            towards = x + steepest(gradient, eps, threat)
            share = 2.0 / (step + 2.0)  # of a Frank-Wolfe step: convex combinations stay in the set
            current = project((1 - share) * current + share * towards, x, eps, threat)
        value = value_of(current)
        better = value < best_value
        best_value, best = torch.where(better, value, best_value), torch.where(better[:, None, None], current, best)
    return best


def lowest_margins(graph: Graph, x: Tensor, eps: Tensor, rows: Tensor, threat: Threat, seed=0) -> Tensor:
    """The least margins, (batch, n_rows), that random points, corners and the attack find."""
    points = random_points(x, eps, threat, 24, seed)
    found = margins_of(graph, x, rows)
    for point in points:
        found = torch.minimum(found, margins_of(graph, point, rows))
    rows = rows.expand(len(x), -1, -1)
    for row in rows.unbind(dim=1):
        at = attack(lambda y, row=row: (row * graph.evaluate(y)).sum(-1), x, eps, threat, seed=seed)
        found = torch.minimum(found, margins_of(graph, at, rows))
    return found


# --- checks ---------------------------------------------------------------------------------------------------------


def check_below(bound: Tensor, value: Tensor, message: str = "") -> None:
    """Fail unless bound <= value, but for the rounding of numbers as large as the largest; NaN fails."""
    room = ROUNDING * (1.0 + value.abs().amax() + bound.abs().amax())
    wrong = ~(bound <= value + room)
    assert not wrong.any(), f"{message}: bound {bound[wrong][0]:.9g} above value {value.expand_as(bound)[wrong][0]:.9g}"


def check_intervals(bounds, points: Tensor) -> None:
    """Fail unless the interval of every node holds the node's values at the points, (count, batch, T, n)."""
    for point in points:
        for node, value in zip(bounds.graph.nodes, node_values(bounds.graph, point), strict=True):
            if isinstance(node, Frame):
                continue
            low, high = bounds.interval(node)
            check_below(low, value, f"lower bound of node {node.index}, {type(node).__name__}")
            check_below(-high, -value, f"upper bound of node {node.index}, {type(node).__name__}")


FUNCTIONS = {
    "tanh": mpmath.tanh,
    "sigmoid": lambda y: 1 / (1 + mpmath.exp(-y)),
    "relu": lambda y: max(y, mpmath.mpf(0)),
    "leaky_relu": lambda y: max(y, mpmath.mpf(0.01) * y),
    "hardtanh": lambda y: max(mpmath.mpf(-1), min(mpmath.mpf(1), y)),
    "arctan": mpmath.atan,
    "softplus": lambda y: max(y, mpmath.mpf(0)) + mpmath.log1p(mpmath.exp(-abs(y))),
    "elu": lambda y: y if y > 0 else mpmath.expm1(y),
    "log1p": lambda y: mpmath.log1p(max(y, mpmath.mpf(0))),
    "square": lambda y: y * y,
}
KNOTS = {"relu": [0], "leaky_relu": [0], "hardtanh": [-1, 1]}


def stationary_points(name: str, slope) -> list:
    """All real y with f'(y) = slope, in high precision, and the knots of piecewise-linear functions."""
    if name in KNOTS:
        return [mpmath.mpf(knot) for knot in KNOTS[name]]
    if name == "square":
        return [slope / 2]
    if name == "log1p":
        return [mpmath.mpf(0), *([1 / slope - 1] if 0 < slope < 1 else [])]
    slope = 4 * slope if name == "sigmoid" else slope
    if not 0 < slope < 1:
        return []
    if name in ("softplus", "elu"):
        return [mpmath.log(slope / (1 - slope)) if name == "softplus" else mpmath.log(slope)]
    if name == "arctan":
        return [sign * mpmath.sqrt(1 / slope - 1) for sign in (1, -1)]
    y = mpmath.atanh(mpmath.sqrt(1 - slope)) * (2 if name == "sigmoid" else 1)
    return [y, -y]


def check_lines(name: str, l: Tensor, u: Tensor, relaxation: Relaxation, points: int = 9) -> None:  # noqa: E741
    """Fail unless the lines are sound on [l, u] over the reals, without tolerance, and tight but for rounding.

    Element-wise for 1-D tensors, in high precision: slopes, intercepts and ends count as the exact reals they are.
    Sound is checked twice, on a grid and at the stationary points; tight only where the terms do not underflow.
    """
    info = torch.finfo(l.dtype)
    function = FUNCTIONS[name]
    for sign, line in ((1, relaxation.lower), (-1, relaxation.upper)):
        (slopes,), intercepts = line
        assert slopes.isfinite().all() and intercepts.isfinite().all(), f"{name}: a line is not finite"
        for values in zip(l.tolist(), u.tolist(), slopes.tolist(), intercepts.tolist(), strict=True):
            low, high, slope, intercept = (mpmath.mpf(value) for value in values)
            where = [low, high, *(low + (high - low) * k / (points - 1) for k in range(1, points - 1))]
            where += [y for y in stationary_points(name, slope) if low < y < high]
            gaps = [sign * (function(y) - slope * y - intercept) for y in where]
            sizes = [abs(function(y)) + abs(slope * y) for y in where]
            side = "lower" if sign > 0 else "upper"
            label = f"{side} line of {name} on [{values[0]!r}, {values[1]!r}] with slope {values[2]!r}"
            assert min(gaps) >= -info.tiny, f"{label} crosses the curve by {mpmath.nstr(-min(gaps))}"
            offset = 1 if name == "sigmoid" else 0  # computed as a half of one plus tanh
            offset = 1e7 if name == "softplus" and high > 20 else offset  # torch's cuts off 2e-9 there
            rooms = [64 * info.eps * (size + offset) + info.tiny**0.5 for size in sizes]
            touches = any(gap <= room for gap, room in zip(gaps, rooms, strict=True))
            assert touches, f"{label} stays {mpmath.nstr(min(gaps))} away from the curve"


def intervals(scales: tuple[float, ...], dtype: torch.dtype, per_scale: int = 12) -> tuple[Tensor, Tensor]:
    """Intervals of many kinds: wide, one-sided, narrow to the last bit, degenerate, saturated, around 0."""
    ends = []
    for number, scale in enumerate(scales):
        draws = (scale * normal(per_scale, 2, seed=17 + number)).tolist()
        ends += draws
        ends += [(0.0, scale), (-scale, 0.0), (scale, scale), (-scale, -scale), (-scale, scale)]
        ends += [(scale, 1.5 * scale), (-1.5 * scale, -scale), (-1e-3 * scale, scale), (-scale, 1e-3 * scale)]
        ends += [(y, y + scale * width) for y in draws[0] for width in (1e-3, 1e-7, 1e-15)]
    ends += list(itertools.pairwise((-40.0, -25.0, -20.0, 20.0, 25.0, 40.0)))
    tiny = torch.finfo(dtype).tiny
    ends += [(0.0, 0.0), (0.0, tiny), (-tiny / 8, tiny), (-tiny, 0.0), (-1.0, tiny), (tiny, 1.0), (tiny / 8, tiny / 8)]
    low, high = torch.tensor(ends, dtype=dtype).unbind(dim=1)
    return torch.minimum(low, high), torch.maximum(low, high)
