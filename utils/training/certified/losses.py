"""Upper bounds of the worst cross entropy over a ball, from interval and backward bounds; all are differentiable.

With margins m_i = z_y - z_i the cross entropy is log(1 + sum_i exp(-m_i)), so lower bounds of the margins give an upper
bound of it over the whole set.

- ibp: margins by intervals (Gowal et al. 2018).
- crown-ibp: margins ``beta * backward + (1 - beta) * interval``, backward bounds over the intervals' boxes (Zhang et
  al. 2020); crown: backward bounds at every layer.
- loss fusion (Xu et al. 2020): sum_i exp(z_i - z_y) itself is bounded by one row, a chord of every exp.
- sabr: ibp on a small ball around a point that an attack found (Mueller et al. 2023).
- mtl-ibp: (1 - alpha) of the loss at such a point, alpha of ibp's (De Palma et al. 2024).

What is taken off bounds for rounding is left out: a loss is no certificate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ...bounds.passes import BoundPass
from ...graph.graph import Graph
from ...network.reading import graph_of, read_for_step
from ...question.specification import margin_rows
from ...question.threat import Threat
from .margins import difference_intervals, other_classes
from .points import worst_points
from .recipe import Moment, Recipe


@dataclass
class Batch:
    """A batch under a recipe at one moment of the training.

    Attributes:
        model: the classifier; ``x`` its inputs, (batch, T, n) or as it takes them, and ``y`` their labels, (batch,).
        check: whether what is read of the model must be compared with it, as once in a training.
        lengths: (batch,) number of frames that count in each sample; None for all.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    recipe: Recipe
    moment: Moment
    check: bool = True
    lengths: Tensor | None = None

    def __post_init__(self):
        self.network, self.frames = read_for_step(self.model, self.x, self.check)
        clip = (0.0, 1.0) if self.recipe.clip or self.recipe.p == 0.0 else None
        frames = None if self.recipe.frames is None else list(self.recipe.frames)
        self.threat = Threat(self.recipe.p, self.recipe.ball, frames, clip, self.lengths).to(
            self.frames, self.x.shape[1:]
        )

    @cached_property
    def graph(self) -> Graph:
        return graph_of(self.network, self.frames.shape[1], self.frames.dtype, "plane", self.lengths)

    def bounds(self, method: str, centers: Tensor | None = None, share: float = 1.0, sound: bool = False) -> BoundPass:
        """A pass over balls of a share of the moment's eps, around x or other points, (batch, T, n)."""
        centers = self.frames if centers is None else centers
        eps = centers.new_full((len(centers),), share * self.moment.eps)
        balls = self.threat.around(centers, eps)
        balls.rough = True
        return BoundPass(self.graph, balls, method, sound=sound)

    def attacked(self, share: float = 1.0) -> Tensor:
        """Points, (batch, T, n), of balls of a share of the moment's eps where the loss is high."""
        balls, steps = self.threat.moves(self.frames), self.recipe.attack_steps
        return worst_points(self.scores, balls, self.y, share * self.moment.eps, steps)

    def scores(self, frames: Tensor) -> Tensor:
        """The model's logits, (batch, classes), of inputs that are given as frames, (batch, T, n)."""
        lengths = () if self.lengths is None else (self.lengths,)
        return self.model(frames.reshape(self.x.shape), *lengths)


def robust_loss(batch: Batch) -> Tensor:
    """The recipe's loss of each sample, (batch,), nats."""
    return LOSSES[batch.recipe.loss](batch)


def of_margins(margins: Tensor) -> Tensor:
    """Cross entropy, (batch,), where all margins are as low as these, (batch, classes - 1)."""
    return torch.logsumexp(nn.functional.pad(-margins, (1, 0)), dim=1)


def rows_of(batch: Batch, bounds: BoundPass) -> Tensor:
    """The spec matrix C of all margins, (batch, classes - 1, classes)."""
    return margin_rows(batch.y, bounds.graph.output.size).to(batch.frames)


def interval_loss(batch: Batch, centers: Tensor | None = None, share: float = 1.0) -> Tensor:
    """By intervals."""
    _, upper = difference_intervals(batch.bounds("ibp", centers, share), batch.y)
    return torch.logsumexp(upper, dim=1)


def mixed_bound_loss(batch: Batch) -> Tensor:
    """By backward bounds over intervals' boxes, of which intervals take over 1 - beta."""
    return backward_loss(batch, "crown-ibp", batch.moment.beta)


def backward_loss(batch: Batch, method: str = "crown", beta: float = 1.0) -> Tensor:
    """By backward bounds, and 1 - beta of intervals; both are lower bounds, and so is any mean of them."""
    bounds = batch.bounds(method)
    if beta > 0.0 and batch.recipe.fusion:
        return fused_loss(bounds, batch.y, beta)
    lower, upper = difference_intervals(bounds, batch.y)
    if beta == 0.0:
        return torch.logsumexp(upper, dim=1)
    rows = rows_of(batch, bounds)
    interval = -_of_others(upper, batch.y)
    return of_margins(beta * bounds.lower_bound(bounds.graph.output, rows) + (1.0 - beta) * interval)


def fused_loss(bounds: BoundPass, y: Tensor, beta: float = 1.0) -> Tensor:
    """log of an upper bound of 1 + sum_i exp(v_i), (batch,), over the set, for v_i = z_i - z_y, i not y.

    Over its interval [l, u] each exp lies below its chord, e^l + k (v - l), so the sum lies below a constant plus the
    one row  sum_i k_i v_i, which a backward pass bounds; ``beta`` mixes the sum of all e^u in.
    """
    lower, upper = (_of_others(end, y) for end in difference_intervals(bounds, y))
    shift = upper.detach().amax(dim=1, keepdim=True).clamp(min=0.0)
    ends = (lower - shift).exp(), (upper - shift).exp()
    width = upper - lower
    flat = width < 1e-4  # there a chord's slope would be all rounding; the steepest slope does as well
    slope = torch.where(flat, ends[1], (ends[1] - ends[0]) / torch.where(flat, 1.0, width))
    constant = (ends[0] - slope * lower).sum(dim=1)
    row = torch.zeros(len(y), bounds.graph.output.size, dtype=slope.dtype, device=slope.device)
    row = row.scatter(1, other_classes(y, row.shape[1]), -slope).scatter_add(1, y[:, None], slope.sum(1, keepdim=True))
    linear = -bounds.lower_bound(bounds.graph.output, row[:, None]).squeeze(1)
    total = beta * (constant + linear) + (1.0 - beta) * ends[1].sum(dim=1)
    own = (-shift).exp().squeeze(1)
    return shift.squeeze(1) + (own + total.clamp(min=0.0)).log()


def _of_others(values: Tensor, y: Tensor) -> Tensor:
    """Without those of the labels, (batch, classes - 1)."""
    return values.gather(1, other_classes(y, values.shape[1]))


def small_box_loss(batch: Batch) -> Tensor:
    """SABR: by intervals over a small ball inside of the ball, around a point that an attack found."""
    share = batch.recipe.box
    return interval_loss(batch, batch.attacked(1.0 - share), share)


def mixed_loss(batch: Batch) -> Tensor:
    """MTL-IBP: the loss where an attack ends, and that by intervals over the ball."""
    alpha, points = batch.recipe.alpha, batch.attacked()
    attacked = nn.functional.cross_entropy(batch.scores(points), batch.y, reduction="none")
    return (1.0 - alpha) * attacked + alpha * interval_loss(batch)


LOSSES: dict[str, Callable[[Batch], Tensor]] = {
    "ibp": interval_loss,
    "crown-ibp": mixed_bound_loss,
    "crown": backward_loss,
    "sabr": small_box_loss,
    "mtl-ibp": mixed_loss,
}
