"""How the balls of frames make a set of sequences: each frame has one of its own, or all share one.

A *group* is what has a ball to itself: a frame, or the whole sequence. Bounds ask a ball how deviations of frames add
up, attacks how to take perturbations apart into groups and put them together again; neither asks which ball it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .lp_ball import dual_norm, lp_norm, project


class Ball:
    """A ball of its own for every frame, ||x'_t - x_t||_p <= eps_t; others differ in what they override."""

    def check(self, eps: Tensor) -> None:
        """Raise ValueError, saying what is wrong, if radii of frames, (batch, T), do not describe such a set."""

    # --- for bounds ---

    def total(self, deviations: Tensor, norm: float) -> Tensor:
        """Most that sum_t A_t x'_t can deviate, (...), from what each frame can by itself, (..., T)."""
        return deviations.sum(dim=-1)

    def ellipsoid(self, eps: Tensor, squares: Tensor, widths: list[int]) -> tuple[Tensor, Tensor]:
        """Scales s, (batch, n), and sizes, (batch,), with  sum_j (delta_j / s_j)^2 <= size  on the set (p <= 2).

        Frames that matter more by their ``squares`` of coefficients, (batch, n), get smaller scales; others would be
        sound too. eps is (batch, frames), ``widths`` are the frames' shares of the n coordinates.
        """
        sums = [part.sum(dim=-1, keepdim=True) for part in squares.split(widths, dim=-1)]
        squares = torch.cat([s.expand(-1, n) for s, n in zip(sums, widths, strict=True)], dim=-1)
        sides = eps.repeat_interleave(torch.tensor(widths, device=eps.device), dim=-1)
        root = floored(squares).sqrt()
        first = torch.tensor([sum(widths[:k]) for k in range(len(widths))], device=eps.device)
        return (sides / root).sqrt(), (sides * root)[:, first].sum(dim=-1)

    # --- for attacks ---

    def groups(self, num_frames: int) -> int:
        return num_frames

    def per_group(self, eps: Tensor, mask: Tensor) -> Tensor:
        """Radii (batch, groups) from one a sample, (batch,), or one a frame, (batch, T); 0 for exact frames."""
        return (eps[:, None] if eps.dim() == 1 else eps) * mask

    def group(self, delta: Tensor) -> Tensor:
        """(..., groups, elements) of perturbations (..., T, n)."""
        return delta

    def frames(self, grouped: Tensor, shape: torch.Size) -> Tensor:
        """Back from groups to (..., T, n), of which the last two are ``shape``."""
        return grouped

    def sizes(self, grouped: Tensor, norm: float) -> Tensor:
        """||.||_p of each group, (..., groups): inside the set if none is above its radius."""
        return lp_norm(grouped, norm)

    def project(self, grouped: Tensor, eps: Tensor, norm: float) -> Tensor:
        """The nearest point of the set, (..., groups, elements); eps is (..., groups)."""
        return project(grouped, eps, norm)


class SequenceBall(Ball):
    """One ball around the whole sequence, ||x' - x||_p <= eps, over the frames whose eps is not 0."""

    def check(self, eps: Tensor) -> None:
        if not bool(((eps == eps.amax(dim=1, keepdim=True)) | (eps == 0)).all()):
            raise ValueError("a ball around the whole sequence has one eps a sample")

    def total(self, deviations: Tensor, norm: float) -> Tensor:
        """||(A_1 ... A_T)||_q = ||(||A_1||_q ... ||A_T||_q)||_q."""
        return dual_norm(deviations, norm)

    def ellipsoid(self, eps: Tensor, squares: Tensor, widths: list[int]) -> tuple[Tensor, Tensor]:
        return torch.ones_like(squares), eps.amax(dim=1) ** 2

    def groups(self, num_frames: int) -> int:
        return 1

    def per_group(self, eps: Tensor, mask: Tensor) -> Tensor:
        return (eps if eps.dim() == 1 else eps.amax(dim=1))[:, None]

    def group(self, delta: Tensor) -> Tensor:
        return delta.flatten(-2)[..., None, :]

    def frames(self, grouped: Tensor, shape: torch.Size) -> Tensor:
        return grouped.reshape(*grouped.shape[:-2], *shape)


def floored(squares: Tensor) -> Tensor:
    """Squares of coefficients, (batch, n), with a little added, so that none is 0."""
    return squares + 1e-8 * squares.mean(dim=-1, keepdim=True) + torch.finfo(squares.dtype).tiny ** 0.5


FRAME, SEQUENCE = Ball(), SequenceBall()
