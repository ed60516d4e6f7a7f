"""Where rooms meet a budget: moves that each have an end of their own, and share a norm.

What a row with coefficients A gains over moves d of x, each in a range, is that of the sizes c = |A| over

    0 <= d_j <= r_j,        ||d||_p <= eps,

where r_j is the room in the direction that A_j asks for. By duality, for every s with 0 <= s <= c,

    max_d c.d  <=  eps ||c - s||_q  +  s.r,        1/p + 1/q = 1,

as (c - s).d is bounded by norms and s.d by the rooms. The best s leaves  c - s = min(c, level): of one level for all in
l_1, of a level in proportion to r in l_2, and with it both sides are equal. For p = 0 at most eps of the moves are not
0, and the maximum is the sum of the eps largest gains c_j r_j.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

HALVINGS = 30  # of the search of a threshold in l_1
ROUNDS = 40  # of the search of a level in l_2, which ends by itself after a few; any level is sound


def most(sizes: Tensor, rooms: Tensor, eps: Tensor, norm: float) -> Tensor:
    """max c.d over 0 <= d <= r and ||d||_p <= eps, (...), for sizes c >= 0 and rooms r >= 0, (..., n), and eps (...).

    It is exact but for rounding, and has the gradient in c and r; p is 0, 1 or 2. Numbers of moves, for p = 0, need not
    be whole: a share of one more counts that share of its gain.
    """
    if norm == 0.0:
        return largest_sum(sizes * rooms, eps)
    if norm == 1.0:
        level = _level_of_sizes(sizes, rooms, eps)
        return eps * level + ((sizes - level[..., None]).clamp(min=0.0) * rooms).sum(dim=-1)
    with torch.no_grad():
        level = rooms / reach(sizes, rooms, eps).clamp(min=torch.finfo(sizes.dtype).tiny ** 0.5)[..., None]
    beyond = (sizes - level).clamp(min=0.0)
    return eps * torch.linalg.vector_norm(sizes - beyond, dim=-1) + (beyond * rooms).sum(dim=-1)


def largest_sum(gains: Tensor, count: Tensor) -> Tensor:
    """The sum of the largest gains, (...), for gains >= 0, (..., n), and how many count, (...)."""
    size = gains.shape[-1]
    fewest, highest = int(count.min()), math.ceil(float(count.max()))
    if fewest >= size:
        return gains.sum(dim=-1)
    if highest == 1:
        return count.clamp(max=1.0) * gains.amax(dim=-1)
    largest = gains.topk(min(highest, size), dim=-1).values
    places = torch.arange(largest.shape[-1], dtype=gains.dtype, device=gains.device)
    return (largest * (count[..., None] - places).clamp(0.0, 1.0)).sum(dim=-1)


def _level_of_sizes(sizes: Tensor, rooms: Tensor, eps: Tensor) -> Tensor:
    """The best level in l_1, (...): the size of the move with which the largest ones first fill the budget.

    0 where the budget is enough for all of them.
    """
    sizes, rooms = torch.broadcast_tensors(sizes, rooms)
    with torch.no_grad():
        order = sizes.argsort(dim=-1, descending=True)
        filled = rooms.gather(-1, order).cumsum(dim=-1)
        full = (filled < eps[..., None]).sum(dim=-1, keepdim=True)
        enough = full.squeeze(-1) == sizes.shape[-1]
        last = order.gather(-1, full.clamp(max=sizes.shape[-1] - 1))
    return torch.where(enough, 0.0, sizes.gather(-1, last).squeeze(-1))


def reach(sizes: Tensor, rooms: Tensor, eps: Tensor) -> Tensor:
    """The t at which  d = min(t c, r)  has the length eps, (...), from below; inf where all of r is shorter.

    Moves that are at their ends for some t are so for every larger one. So from a t that is too small, with what is
    left of eps^2 shared among the others in proportion to c, t grows until no more of them come to their ends.
    """
    squares, tiny = sizes**2, torch.finfo(sizes.dtype).tiny
    t = eps / torch.linalg.vector_norm(sizes, dim=-1).clamp(min=tiny)
    for _ in range(ROUNDS):
        ended = sizes * t[..., None] >= rooms
        left = eps**2 - torch.where(ended, rooms, 0.0).square().sum(dim=-1)
        free = torch.where(ended, 0.0, squares).sum(dim=-1)
        longer = torch.where(free > 0, (left.clamp(min=0.0) / free.clamp(min=tiny)).sqrt(), torch.inf)
        longer = torch.maximum(t, longer)
        if bool((longer <= t * (1.0 + 4.0 * torch.finfo(t.dtype).eps)).all()):
            return longer
        t = longer
    return t


def nearest_within(moves: Tensor, rooms: Tensor, eps: Tensor, norm: float) -> Tensor:
    """The point d nearest to moves v >= 0, (..., n), with 0 <= d <= r and ||d||_p <= eps, (...); p is 1 or 2.

    In l_2 that is  min(t v, r)  for the largest t <= 1 that is short enough, in l_1  min(max(v - theta, 0), r)  for the
    least theta >= 0: one from the far end of its bracket, so that d is inside.
    """
    if norm == 2.0:
        return torch.minimum(reach(moves, rooms, eps).clamp(max=1.0)[..., None] * moves, rooms)
    inside, outside = moves.amax(dim=-1), torch.zeros_like(moves[..., 0])

    def at(theta: Tensor) -> Tensor:
        return torch.minimum((moves - theta[..., None]).clamp(min=0.0), rooms)

    inside = torch.where(at(outside).sum(dim=-1) <= eps, 0.0, inside)
    for _ in range(HALVINGS if bool((inside > 0).any()) else 0):
        middle = 0.5 * (inside + outside)
        short = at(middle).sum(dim=-1) <= eps
        inside, outside = torch.where(short, middle, inside), torch.where(short, outside, middle)
    return at(inside)
