"""Sets of p = 0 as attacks see them: which values, or groups of values, change, and what each can gain."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..choices.tables import BALLS
from .moves import FrameBalls


@dataclass
class Changes(FrameBalls):
    """Where x' may lie: at most so many *units* of each ball differ from x, by anything in the valid range.

    A unit is a value, or a group of them. Sizes count units; eps are numbers of them.

    Attributes:
        x, mask, ball, clip, stretch: as of ``FrameBalls``; p is 0, and every stretch 0 or 1.
        together: numbers of groups, (T, n), as of ``CutBalls``, or None.
    """

    norm: float = 0.0
    together: Tensor | None = None

    def __post_init__(self):
        self._ball = BALLS[self.ball]
        self._check_range()
        numbers = torch.arange(self.x.shape[1:].numel(), device=self.x.device).reshape(self.x.shape[1:])
        if self.together is not None:
            numbers = self.together.unique(return_inverse=True)[1]
        self._numbers = self._ball.group(numbers)  # (groups, elements)
        self._count = int(self._numbers.max()) + 1

    def select(self, rows: Tensor | slice, dtype: torch.dtype) -> Changes:
        stretch = None if self.stretch is None else self.stretch[rows].to(dtype)
        told = (self.x[rows].to(dtype), self.mask[rows], self.norm, self.ball, self.clip, stretch)
        return Changes(*told, together=self.together)

    def of_units(self, values: Tensor) -> Tensor:
        """Sums over units, (..., groups, units), of numbers of the elements, (..., T, n), at least 0."""
        grouped = self._ball.group(values)
        numbers = self._numbers.expand(grouped.shape)
        return grouped.new_zeros(*grouped.shape[:-1], self._count).scatter_add(-1, numbers, grouped)

    def of_elements(self, units: Tensor) -> Tensor:
        """What each element's unit has, (..., T, n), from (..., groups, units)."""
        numbers = self._numbers.expand(*units.shape[:-1], self._numbers.shape[-1])
        return self._ball.frames(units.gather(-1, numbers), self.x.shape[1:])

    def sizes(self, delta: Tensor) -> Tensor:
        """How many units of each ball change, (..., groups)."""
        return (self.of_units((delta != 0).to(delta)) > 0).sum(dim=-1).to(delta)

    def project(self, delta: Tensor, eps: Tensor) -> Tensor:
        """The nearest point of the set: the units that are farthest from x, within the range."""
        free = self._between(self.may_move(), delta)
        inside = self.clip_range(torch.where(free, delta, 0.0))
        won = self.of_units(delta**2 - (delta - inside) ** 2)
        return torch.where(self.of_elements(self.largest(won, self._spread(eps, delta))), inside, 0.0)

    def largest(self, values: Tensor, counts: Tensor) -> Tensor:
        """Which units have the largest values of their ball, as many as ``counts``, (..., groups): of bool."""
        order = values.argsort(dim=-1, descending=True, stable=True)
        first = torch.arange(self._count, device=values.device) < counts[..., None]
        return torch.zeros_like(values, dtype=torch.bool).scatter(-1, order, first.expand(values.shape))

    def best_ends(self, gradient: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Moves of every element to the end where a function of this gradient is least, and what that takes off."""
        x = self._between(self.x, delta)
        ends = torch.where(gradient > 0, self.clip[0], self.clip[1]) - x
        ends = torch.where(self._between(self.may_move(), delta), ends, 0.0)
        return ends, (gradient * (delta - ends)).clamp(min=0.0)
