"""Balls cut to the valid range of inputs, for p = 0, 1 and 2: each value has a room of its own below and above x.

For p = 0 at most eps values change, to anything in the range; or at most eps groups of values, such as the channels of
a pixel or a whole frame. Where a number of groups is not whole, a share of one more counts that share: what the
training ramps over.

Seen from x, such a set does not look the same in both directions. A row with coefficients A falls at most by what the
sizes |A| gain over the rooms below x where A > 0, and above it where A < 0 (``budgets``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..choices.tables import BALLS
from .budgets import largest_sum, most
from .sets import Perturbation

PART_NUMBERS = 2**22  # gains that are made at once where rows are shared by many places
# Entries of a row, beside as many as may change, among which the largest gains are looked for first; fewer if rough.
CANDIDATES, FEWER_CANDIDATES = 16, 4


@dataclass
class CutBalls(Perturbation):
    """Balls ||x' - x||_p <= eps of frames, or of the whole sequence, within the valid range.

    Attributes:
        x, eps, ball, clip, stretch: as in ``Perturbation``; for p = 0, eps counts values, and every stretch is 0 or 1.
        norm: p, one of 0, 1 and 2.
        together: for p = 0, numbers of groups, (T, n): values with one number change together and count as one. None
            for each by itself.
    """

    together: Tensor | None = None

    norms = (0.0, 1.0, 2.0)
    is_symmetric = False
    takes_windows = True
    is_round = False
    norms_weights = False

    def __post_init__(self):
        if self.norm not in self.norms:
            raise ValueError(f"p must be 0, 1 or 2, not {self.norm}")
        if self.clip is None:
            raise ValueError("values change to anything in a range: p = 0 needs clip")
        self._ball, self._box = BALLS[self.ball], None
        self._check_shapes()
        low, high = self.clip
        moved = self.eps[..., None] > 0 if self.stretch is None else (self.eps[..., None] * self.stretch) > 0
        if bool((((self.x < low) | (self.x > high)) & moved).any()):
            raise ValueError(f"inputs lie outside the range [{low}, {high}] that they are to be clipped to")
        # In units of the balls' own moves.
        self._below, self._above = self._own(self.x - low, moved), self._own(high - self.x, moved)
        self._exact = (torch.maximum(self._below, self._above) == 0).all(dim=0).all(dim=-1).tolist()
        self._groups: dict[int | None, tuple[Tensor, int]] = {}

    def _own(self, room: Tensor, moved: Tensor) -> Tensor:
        if self.stretch is not None:
            room = room / torch.where(moved, self.stretch, 1.0)
        room = torch.where(moved, room, 0.0)
        return room if self.norm == 0.0 else torch.minimum(room, self.eps[..., None])

    def of_first(self, samples: int) -> CutBalls:
        return self._with(lambda tensor: tensor[:samples])

    def repeated(self, times: int) -> CutBalls:
        return self._with(lambda tensor: tensor.repeat_interleave(times, dim=0))

    def _with(self, change: Callable[[Tensor], Tensor]) -> CutBalls:
        """The set with another batch, whose every tensor of samples comes about likewise."""
        part = copy.copy(self)
        for name in ("x", "eps", "stretch", "_below", "_above"):
            tensor = getattr(self, name)
            setattr(part, name, None if tensor is None else change(tensor))
        return part

    @property
    def uncut(self) -> Perturbation:
        """The l_1 or l_2 balls without the range."""
        return Perturbation(self.x, self.eps, self.norm, self.ball, None, self.stretch)

    @property
    def is_joint(self) -> bool:
        """Whether frames share a budget: what each can deviate by itself does not say what all can."""
        return self.ball == "sequence"

    # --- boxes and balls around it ---

    @property
    def in_ball(self) -> bool:
        return self.norm == 2.0 and self.stretch is None

    def ball_radius(self, frame: int) -> Tensor:
        return torch.minimum(self.eps[:, frame], torch.linalg.vector_norm(self.half_widths(frame), dim=-1))

    def half_widths(self, frame: int) -> Tensor:
        """How far the frame's values can be from x, (batch, n)."""
        return torch.maximum(*self.sides(frame))

    def sides(self, frame: int) -> tuple[Tensor, Tensor]:
        sides = self._below[:, frame], self._above[:, frame]
        return sides if self.stretch is None else tuple(side * self.stretch[:, frame] for side in sides)

    # --- rows ---

    def frame_deviation(self, frame: int, coefficients: Tensor) -> Tensor:
        size = max(1, PART_NUMBERS // (len(self.x) * coefficients.shape[-1]))
        found = [self._frame_fall(frame, part) for part in coefficients.split(size, dim=-2)]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)

    def _frame_fall(self, frame: int, coefficients: Tensor) -> Tensor:
        coefficients = self._stretched(frame, coefficients)
        rooms = (self._below[:, frame, None], self._above[:, frame, None])
        return self._fall(coefficients, *rooms, self.eps[:, frame, None], lambda gains: self._grouped(gains, frame))

    def joint_deviation(self, coefficients: dict[int, Tensor]) -> Tensor:
        """Most that sum_t A_t x'_t can lie below sum_t A_t x_t, (batch, rows), by frame, (batch or 1, rows, n)."""
        frames = sorted(coefficients)
        if not self.is_joint:
            return sum(self.frame_deviation(frame, coefficients[frame]) for frame in frames)
        parts = [self._stretched(frame, coefficients[frame]).expand(len(self.x), -1, -1) for frame in frames]
        rooms = (side[:, frames].flatten(1)[:, None] for side in (self._below, self._above))
        number = None if self.together is None else self._joined_groups(tuple(frames))
        eps = self.eps[:, frames].amax(dim=1)[:, None]
        return self._fall(torch.cat(parts, dim=-1), *rooms, eps, lambda gains: _sums(gains, number))

    def total_deviation(self, deviations: list[Tensor]) -> Tensor:
        """More than all frames can deviate together, where they share a budget; ``joint_deviation`` is exact."""
        return torch.stack(torch.broadcast_tensors(*deviations), dim=-1).sum(dim=-1)

    def frame_reach(self, frame: int, weight: Tensor) -> tuple[Tensor, Tensor]:
        eps, total = self.eps[:, frame], weight.shape[1]
        count = min(int(eps.max().ceil()), total)
        if self.norm != 0.0 or self.together is not None or not 0 < count < total - CANDIDATES:
            return super().frame_reach(frame, weight)
        return self._reach_by_candidates(frame, weight, count)

    def _reach_by_candidates(self, frame: int, weight: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """``frame_reach`` for p = 0, at a small share of its cost, of rows that all samples share.

        Gains are made of a row's largest entries alone. No other entry gains more than the next largest one would in
        the whole range: where that is no more than the least gain that counts, the sum is exact. Where it is not, it
        is made anew, or, if the set is rough, left as it is, a little too large.
        """
        size, eps = count + (FEWER_CANDIDATES if self.rough else CANDIDATES), self.eps[:, frame]
        sizes, places = weight.detach().abs().topk(size + 1, dim=-1)
        others = (self.clip[1] - self.clip[0]) * sizes[:, size, None]
        entries, below, above = self._entries(frame, weight, places[:, :size])
        reach = []
        for sign in (1.0, -1.0):
            gains = (sign * entries).clamp(min=0.0) * below - (sign * entries).clamp(max=0.0) * above
            fall = largest_sum(torch.cat((gains, others.expand(len(eps), -1, count)), dim=-1), eps[:, None])
            if not self.rough:
                least = gains.topk(count, dim=-1).values[..., -1]
                doubtful = (least < others.squeeze(-1)).any(dim=0).nonzero().squeeze(-1)
                if len(doubtful):
                    fall = fall.index_copy(1, doubtful, self._rows_of(frame, sign * weight[doubtful]))
            reach.append(fall)
        return tuple(reach)

    def _rows_of(self, frame: int, weight: Tensor) -> Tensor:
        return self.frame_deviation(frame, weight[None]).expand(len(self.x), -1)

    def _entries(self, frame: int, weight: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Some entries of each row, (batch or 1, size, k), and their rooms, (batch, size, k), for places (size, k)."""
        entries = weight.gather(1, places)[None]
        if self.stretch is not None:
            entries = entries * self.stretch[:, frame][:, places]
        rooms = torch.stack((self._below[:, frame], self._above[:, frame]))
        below, above = rooms.index_select(2, places.flatten()).unflatten(2, places.shape)
        return entries, below, above

    def _fall(
        self,
        coefficients: Tensor,
        below: Tensor,
        above: Tensor,
        eps: Tensor,
        grouped: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Most that A d can lie below 0, (...), A (..., n), of moves d in [-below, above] with a budget eps, (...)."""
        if self.norm == 0.0:
            gains = coefficients.clamp(min=0.0) * below + (-coefficients).clamp(min=0.0) * above
            return largest_sum(grouped(gains), eps)
        return most(coefficients.abs(), torch.where(coefficients > 0, below, above), eps, self.norm)

    # --- groups ---

    def _grouped(self, gains: Tensor, frame: int) -> Tensor:
        """What the frame's groups gain, (..., groups), from what its values do, (..., n)."""
        if self.together is None:
            return gains
        if frame not in self._groups:
            found, number = self.together[frame].unique(return_inverse=True)
            self._groups[frame] = number, len(found)
        return _sums(gains, self._groups[frame])

    def _joined_groups(self, frames: tuple[int, ...]) -> tuple[Tensor, int]:
        if frames not in self._groups:
            found, number = self.together[list(frames)].flatten().unique(return_inverse=True)
            self._groups[frames] = number, len(found)
        return self._groups[frames]

    # --- windows of an image ---

    def window_deviation(
        self, frame: int, coefficients: Tensor, windows: Callable[[Tensor], Tensor], samples: Tensor | None = None
    ) -> Tensor:
        """``frame_deviation`` of rows that meet a window each, (..., places), for A (..., channels, places).

        ``windows`` gives vectors of the frame, (batch, n), as windows, broadcastable to A, with zeros outside of the
        image; ``samples`` are those that eps is of, (...), where A has no dimension of the batch in front.
        """
        if self.stretch is not None:
            coefficients = coefficients * windows(self.stretch[:, frame])
        below, above = windows(self._below[:, frame]), windows(self._above[:, frame])
        eps = self.eps[:, frame] if samples is None else self.eps[samples, frame]
        eps = eps.reshape(-1, *[1] * (coefficients.dim() - 3)) if samples is None else eps
        by_pixel = self.together is not None and self._are_pixels(frame, coefficients.shape[-2])
        if self.norm == 0.0 and by_pixel:
            gains = coefficients.clamp(min=0.0) * below + (-coefficients).clamp(min=0.0) * above
            return largest_sum(gains.sum(dim=-2), eps)
        if self.together is not None and not by_pixel:
            eps = eps * self._largest_group(frame)  # as if so many values had a choice each
        flat = (part.flatten(-2) for part in torch.broadcast_tensors(coefficients, below, above))
        return self._fall(*flat, eps, lambda gains: gains)

    def _are_pixels(self, frame: int, channels: int) -> bool:
        """Whether the frame's groups are all channels of a pixel each."""
        number = self.together[frame].reshape(channels, -1)
        return bool((number == number[:1]).all()) and len(number[0].unique()) == number.shape[1]

    def _largest_group(self, frame: int) -> int:
        return int(self.together[frame].unique(return_counts=True)[1].max())

    def map_deviation(self, frame, absolute, norms, samples=slice(None)) -> Tensor:
        """More than elements can deviate: by the box, or the ball without a range."""
        by_box = absolute(self.half_widths(frame))
        if self.norm == 0.0:
            return by_box
        return torch.minimum(self.uncut.map_deviation(frame, absolute, norms, samples), by_box)

    # --- for gradients and squares ---

    def frame_fall(self, frame: int, low: Tensor, high: Tensor) -> Tensor:
        """Most that -J (x'_t - x_t) can be for J in [low, high]: each value as if it had the larger of its rooms."""
        up, down = self._stretched(frame, (-low).clamp(min=0.0)), self._stretched(frame, high.clamp(min=0.0))
        below, above = self._below[:, frame], self._above[:, frame]
        rooms = torch.maximum(torch.where(down > 0, below, 0.0), torch.where(up > 0, above, 0.0))
        return most(torch.maximum(up, down), rooms, self.eps[:, frame], self.norm)

    def linear_deviation(self, gradients: Tensor) -> Tensor:
        if self.norm != 0.0:
            return super().linear_deviation(gradients)
        return self.joint_deviation({frame: gradients[:, frame, None] for frame in range(gradients.shape[1])})[:, 0]

    def squared_radius(self, frames: list[int]) -> Tensor:
        if self.norm != 0.0:
            return super().squared_radius(frames)
        squares = [self._grouped(self.half_widths(frame) ** 2, frame) for frame in frames]
        return sum(largest_sum(part, self.eps[:, frame]) for frame, part in zip(frames, squares, strict=True))


def _sums(gains: Tensor, groups: tuple[Tensor, int] | None) -> Tensor:
    """Sums of groups' gains, (..., groups), from those of values, (..., n), by their numbers, (n,)."""
    if groups is None:
        return gains
    number, count = groups
    return gains.new_zeros(*gains.shape[:-1], count).index_add(-1, number, gains)
