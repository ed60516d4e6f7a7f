"""Sets of sequences in which at most k frames are replaced, each by one of a list of its own: words by synonyms.

    X_k = { x' : x'_t in {x_t} u {x_t^s : s in S_t},  #{t : x'_t != x_t} <= k }

A linear function  sum_t A_t x'_t  is least over it at

    sum_t A_t x_t  +  the sum of the k least  delta_t,        delta_t = min(0, min_s A_t (x_t^s - x_t)) :

for a fixed set of changed frames the minimum separates, frames that gain nothing need not change, and of all sets of k
frames that of the least delta is best. So it is exact, and that of the convex hull of X_k, too.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from .sets import InputSet


class Substitutions(InputSet):
    """At most ``budget`` frames become one of their substitutes.

    Attributes:
        x: the sequences, (batch, T, n), in the model's own input units.
        moves: what a frame changes by when it becomes a substitute, (batch, T, S + 1, n); the first is 0, and so are
            those that fill the lists up to S.
        budget: how many frames may change, (batch,); or (batch, rows), a set for each row that is bounded.
    """

    norm = float("nan")  # of no ball
    is_symmetric = False

    def __init__(self, x: Tensor, vectors: Tensor, valid: Tensor, budget: int | Tensor | None = None):
        """
        Args:
            x: (batch, T, n).
            vectors: what each frame may become, (batch, T, S, n).
            valid: which of these there are, (batch, T, S) of bool.
            budget: a number, (batch,) of these, or None: every frame may change.

        Raises:
            ValueError: the shapes do not fit, or a budget is negative.
        """
        if x.dim() != 3 or vectors.dim() != 4 or valid.shape != vectors.shape[:3] or valid.dtype != torch.bool:
            raise ValueError("x must be (batch, T, n), vectors (batch, T, S, n) and valid (batch, T, S) of bool")
        if vectors.shape[:2] != x.shape[:2] or vectors.shape[3] != x.shape[2]:
            raise ValueError(f"x is {tuple(x.shape)}, and vectors must be (batch, T, S, n), not {tuple(vectors.shape)}")
        frames = x.shape[1]
        counts = torch.as_tensor(frames if budget is None else budget, device=x.device).expand(len(x))
        if counts.is_floating_point() or bool((counts < 0).any()):
            raise ValueError(f"budgets must be whole numbers of at least 0, or None, not {budget}")
        self.x, self.budget = x, counts.clamp(max=frames)
        usable = valid & (self.budget > 0)[:, None, None]
        moves = torch.where(usable[..., None], vectors - x[:, :, None], 0.0)
        self.moves = torch.cat((torch.zeros_like(moves[:, :, :1]), moves), dim=2)
        self._exact = (~usable.any(dim=2)).all(dim=0).tolist()

    @property
    def is_box(self) -> bool:
        return False

    def of_first(self, samples: int) -> Substitutions:
        """The part of the first samples of the batch."""
        part = copy.copy(self)
        part.x, part.moves, part.budget = self.x[:samples], self.moves[:samples], self.budget[:samples]
        return part

    def repeated(self, times: int) -> Substitutions:
        """The set of a batch in which every sample stands ``times`` times in a row."""
        part = copy.copy(self)
        part.x, part.moves, part.budget = (
            value.repeat_interleave(times, dim=0) for value in (self.x, self.moves, self.budget)
        )
        return part

    @property
    def largest_budget(self) -> Tensor:
        """Of any row, (batch,)."""
        return self.budget if self.budget.dim() == 1 else self.budget.amax(dim=1)

    def is_exact(self, frame: int) -> bool:
        return self._exact[frame]

    def center(self, frame: int) -> Tensor:
        return self.x[:, frame]

    def half_widths(self, frame: int) -> Tensor:
        """Of a box around x that holds the frame, (batch, n)."""
        return self.moves[:, frame].abs().amax(dim=1)

    def frame_deviation(self, frame: int, coefficients: Tensor) -> Tensor:
        return -(coefficients @ self.moves[:, frame].mT).amin(dim=-1)

    def total_deviation(self, deviations: list[Tensor]) -> Tensor:
        """The sum of the ``budget`` largest, (batch, rows), of deviations (batch or 1, rows) of frames."""
        return self.largest(torch.stack(torch.broadcast_tensors(*deviations), dim=-1))

    def largest(self, deviations: Tensor) -> Tensor:
        """The sum of the ``budget`` largest of numbers of at least 0, (batch, rows, T), over the last axis."""
        budget = self.budget.reshape(len(self.budget), -1)
        ordered = deviations.sort(dim=-1, descending=True).values
        kept = torch.arange(deviations.shape[-1], device=deviations.device) < budget.unsqueeze(-1)
        return torch.where(kept, ordered, 0.0).sum(dim=-1)
