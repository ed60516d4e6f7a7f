"""Perturbation sets as attacks see them: projection, steepest direction and random points of sets of frames."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..choices.tables import BALLS
from .budgets import nearest_within
from .lp_ball import INF, NORMS, dual_norm, random_in_ball, random_on_sphere, steepest


@dataclass
class FrameBalls:
    """Where x' may lie: balls around the chosen frames of x (or one around all of them), in the valid input range.

    Attributes:
        x: sequences, (batch, T, n).
        mask: which frames are perturbed, (batch, T) of bool; the others are exact.
        norm: p, one of 1, 2 and inf.
        ball: a key of ``BALLS``, see ``utils.perturbation.balls``.
        clip: (lowest, highest) valid input value, for any p, or None.
        stretch: by which every element's move is larger than that of a ball, (batch, T, n); None for 1.
        above: that of moves upwards, where ``stretch`` is that of moves downwards; None if both are alike.

    Perturbations are delta = x' - x, (batch, T,
    n) or with more dimensions between the batch and T; radii are eps, (batch, groups) or with the same dimensions.
    """

    x: Tensor
    mask: Tensor
    norm: float = 2.0
    ball: str = "frame"
    clip: tuple[float, float] | None = None
    stretch: Tensor | None = None
    above: Tensor | None = None

    def __post_init__(self):
        if self.norm not in NORMS:
            raise ValueError(f"p must be 1, 2 or inf, not {self.norm}")
        self._ball = BALLS[self.ball]
        self._check_range()

    def _check_range(self) -> None:
        if self.clip is not None and bool(((self.x < self.clip[0]) | (self.x > self.clip[1])).any()):
            raise ValueError(f"inputs lie outside the range {list(self.clip)} that they are to be clipped to")

    def select(self, rows: Tensor | slice, dtype: torch.dtype) -> FrameBalls:
        """The set of some of the samples, in a precision."""
        stretch = None if self.stretch is None else self.stretch[rows].to(dtype)
        above = None if self.above is None else self.above[rows].to(dtype)
        return FrameBalls(self.x[rows].to(dtype), self.mask[rows], self.norm, self.ball, self.clip, stretch, above)

    @property
    def groups(self) -> int:
        return self._ball.groups(self.x.shape[1])

    def per_group(self, eps: Tensor) -> Tensor:
        """Radii (batch, groups) from one a sample, (batch,), or one a frame, (batch, T); 0 for exact frames."""
        return self._ball.per_group(eps, self.mask)

    def _between(self, tensor: Tensor, like: Tensor) -> Tensor:
        """A tensor of the samples (batch, a, ...) with the dimensions that ``like`` has between batch and T."""
        return tensor.reshape(tensor.shape[0], *([1] * (like.dim() - 3)), *tensor.shape[1:])

    def group(self, delta: Tensor) -> Tensor:
        """(..., groups, elements) of the balls' own moves behind perturbations, zeros where nothing may move."""
        delta = delta * self._between(self.mask, delta)[..., None]
        if self.stretch is not None:
            factor = self._factor(delta)
            delta = torch.where(factor > 0, delta / torch.where(factor > 0, factor, 1.0), 0.0)
        return self._ball.group(delta)

    def gradient_group(self, gradient: Tensor) -> Tensor:
        """Gradients with respect to the balls' own moves, (..., groups, elements), from those with respect to x."""
        gradient = gradient * self._between(self.mask, gradient)[..., None]
        if self.stretch is not None:
            gradient = gradient * self._factor(gradient)
        return self._ball.group(gradient)

    def frames(self, grouped: Tensor) -> Tensor:
        """Perturbations (..., T, n) of the balls' own moves."""
        delta = self._ball.frames(grouped, self.x.shape[1:])
        return delta if self.stretch is None else delta * self._factor(delta)

    def _factor(self, moves: Tensor) -> Tensor:
        """By what moves in these directions are larger than those of balls."""
        down = self._between(self.stretch, moves).to(moves)
        return down if self.above is None else torch.where(moves > 0, self._between(self.above, moves).to(moves), down)

    def may_move(self) -> Tensor:
        """Which elements are perturbed at all, (batch, T, n) or (batch, T, 1)."""
        mask = self.mask[..., None]
        if self.stretch is None:
            return mask
        return mask & (self.stretch > 0) if self.above is None else mask & (torch.maximum(self.stretch, self.above) > 0)

    def sizes(self, delta: Tensor) -> Tensor:
        """||.||_p of each group, (..., groups)."""
        return self._ball.sizes(self.group(delta), self.norm)

    def size(self, delta: Tensor) -> Tensor:
        """The largest ||.||_p of a group: the smallest common eps whose set contains delta."""
        return self.sizes(delta).amax(dim=-1)

    def gradient_norms(self, gradient: Tensor) -> Tensor:
        """Most that a linear function of this gradient changes per unit of eps of each group, (..., groups)."""
        return dual_norm(self.gradient_group(gradient), self.norm)

    def steepest(self, gradient: Tensor, delta: Tensor) -> Tensor:
        """Direction of size 1 in each group along which a function of this gradient grows fastest from delta.

        Elements that the valid range lets go no further are left out: an l_1 step would choose one of them for ever.
        """
        if self.clip is not None:
            x = self._between(self.x, delta) + delta
            gradient = gradient.masked_fill((x >= self.clip[1]) & (gradient > 0), 0.0)
            gradient = gradient.masked_fill((x <= self.clip[0]) & (gradient < 0), 0.0)
        return self.frames(steepest(self.gradient_group(gradient), self.norm))

    def scaled(self, delta: Tensor, eps: Tensor) -> Tensor:
        """Each group of moves of balls, (batch or 1, ..., T, n), times its eps, (batch, groups), as a perturbation."""
        moves = delta.expand(len(eps), *delta.shape[1:])
        moves = self._ball.group(moves * self._between(self.mask, moves)[..., None])
        return self.frames(moves * self._spread(eps, delta)[..., None])

    def _spread(self, eps: Tensor, delta: Tensor) -> Tensor:
        return eps if eps.dim() == delta.dim() - 1 else self._between(eps[..., None], delta).squeeze(-1)

    def project(self, delta: Tensor, eps: Tensor) -> Tensor:
        """The point of the set nearest to a perturbation, in l_2 of the balls' own moves."""
        grouped, eps = self.group(delta), self._spread(eps, delta)
        if self.clip is None or self.norm == INF:
            nearest = self._ball.project(grouped, eps, self.norm)
        else:
            rooms = torch.where(grouped > 0, self._rooms(delta, self.clip[1]), self._rooms(delta, self.clip[0]))
            nearest = grouped.sign() * nearest_within(grouped.abs(), rooms.abs(), eps, self.norm)
        return self.clip_range(self.frames(nearest))

    def _rooms(self, like: Tensor, end: float) -> Tensor:
        """Moves of the balls that would bring x to an end of the range, grouped."""
        return self.group(self._between(end - self.x, like).expand(like.shape))

    def clip_range(self, delta: Tensor) -> Tensor:
        """Perturbations cut to the valid range: as x is in it, no element grows, so no ball is left."""
        if self.clip is None:
            return delta
        x = self._between(self.x, delta)
        return (x + delta).clamp(*self.clip) - x

    def random_starts(self, count: int, generator: torch.Generator) -> Tensor:
        """(1, count, T, n) perturbations of eps = 1, the same for all samples: half of them on the boundary."""
        shape = (1, count, self.groups, self.x.shape[1:].numel() // self.groups)
        points = random_on_sphere(shape, self.norm, generator)
        points[:, ::2] = random_in_ball(shape, self.norm, generator)[:, ::2]
        return self._ball.frames(points, self.x.shape[1:]).to(self.x)
