"""Lower bounds of margins by the gradient: integrated from x outwards, shell after shell.

With D(s) the most that a margin can fall over the set at a share s of its size by the gradients there
(``JacobianPass.fall``), the gradient along the way from x to x' between the shares s_{k-1} and s_k takes off at most
(s_k - s_{k-1}) D(s_k) / s_k. So with B(0) = margin(x)

    B(s_k) = B(s_{k-1}) - (s_k - s_{k-1}) D(s_k) / s_k

bounds the margin over the set at s_k: Weng et al.'s integral (RecurJac, section 3.4) as a sum, "jacobian". And where a
pass over the network itself bounds it by C(s_k), so does the greater one of both: the shell rule, "shell".
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..bounds.passes import BoundPass
from ..choices.method import SHELLS
from ..choices.tables import METHODS
from ..graph.graph import Graph
from ..perturbation.sets import Perturbation
from .adjoint import Adjoint, repeated
from .operator_norms import NormPass
from .passes import JacobianPass

ROUNDING_ULPS = 64.0


def values_pass(graph: Graph, perturbation: Perturbation, layers: str, sound: bool = True) -> BoundPass:
    """A pass over the network, by a method's name, whose intervals bound derivatives."""
    return METHODS[layers](graph, perturbation, None, sound)


def margins_at(graph: Graph, perturbation: Perturbation, rows: Tensor, sound: bool = True) -> Tensor:
    """Margins at x itself, (batch, n_rows), less what rounding may have added to them."""
    point = replace(perturbation, eps=torch.zeros_like(perturbation.eps))
    return BoundPass(graph, point, "ibp", sound=sound).margin(rows)


class Shells(NamedTuple):
    """What is known of some sets within each other.

    Attributes:
        shares: their sizes, as shares of the largest one's, (K,), increasing.
        falls: D, (batch, K, n_rows).
        direct: C, likewise, or None.
        scaled: whether they are shares of the largest one, or at least that: see ``Perturbation.scales``.
    """

    shares: Tensor
    falls: Tensor
    direct: Tensor | None
    scaled: bool

    def bounds(self, start: Tensor) -> Tensor:
        """B at every share, (batch, K, n_rows), from margins at x, (batch, n_rows)."""
        bound, found = start, []
        for k, (inner, share) in enumerate(self._shells()):
            bound = bound - (share - inner) / share * self.falls[:, k] - self._lost(bound, self.falls[:, k])
            if self.direct is not None:
                bound = torch.fmax(bound, self.direct[:, k])
            found.append(bound)
        return torch.stack(found, dim=1)

    def ends(self, start: Tensor) -> Tensor:
        """The share up to which each row's bound is positive, (batch, n_rows).

        At a share s inside a shell, B(s) = B(inner) - (1 - inner / s) D(s), where D(s) <= D(outer), and
        D(s) <= s / outer D(outer) if the sets are shares of each other.
        """
        bounds, shells = self.bounds(start), start.new_tensor(self._shells())
        inner, outer = shells[:, :1], shells[:, 1:]
        before = torch.cat((start[:, None], bounds[:, :-1]), dim=1)
        share = (before - self._lost(before, self.falls)) / self.falls
        within = inner + share * outer if self.scaled else inner / torch.where(share < 1, 1.0 - share, 0.5)
        within = torch.where(share < 1, torch.minimum(within, outer), outer)
        within = torch.where(share > 0, within, inner)  # NaN is not above 0
        passed = (bounds > 0).long().cumprod(dim=1).sum(dim=1)  # shells before the first in which the margin may vanish
        first = passed.clamp(max=bounds.shape[1] - 1)[:, None]
        return torch.where(passed == bounds.shape[1], self.shares[-1], within.gather(1, first).squeeze(1))

    def _lost(self, bound: Tensor, fall: Tensor) -> Tensor:
        """By rounding, of a shell's share and of what it takes off."""
        return ROUNDING_ULPS * torch.finfo(bound.dtype).eps * (bound.detach().abs() + fall.detach())

    def _shells(self) -> list[tuple[float, float]]:
        """Shares within which and out of which each shell lies."""
        return list(itertools.pairwise((0.0, *self.shares.tolist())))


def shells_of(
    graph: Graph,
    perturbation: Perturbation,
    rows: Tensor,
    shares: Tensor,
    chain: str = "joint",
    layers: str = "crown",
    direct: bool = False,
    sound: bool = True,
) -> Shells:
    """The sets at some shares of a perturbation set's size, all in one pass; arguments as for ``ShellPass``."""
    count, batch = len(shares), len(perturbation.x)
    rows = rows.expand(batch, -1, -1)
    within = perturbation.repeated(count)
    within = replace(within, eps=within.eps * shares.repeat(batch)[:, None])
    values = values_pass(repeated(graph, count), within, layers, sound)
    many = rows.repeat_interleave(count, dim=0)
    shape = (batch, count, rows.shape[1])
    falls = JacobianPass(values, many, chain, sound).fall().reshape(shape)
    return Shells(shares, falls, values.margin(many).reshape(shape) if direct else None, perturbation.scales)


class ShellPass:
    """Margins by integrated gradients over one perturbation set; made and asked like a ``BoundPass``."""

    def __init__(self, graph: Graph, perturbation: Perturbation, sound: bool = True, shells: int = SHELLS, **how):
        """``how`` has ``chain``, how gradients are bounded; ``layers``, the pass over the network; ``direct``."""
        self.graph, self.perturbation, self.sound, self.how = graph, perturbation, sound, how
        shares = torch.arange(1, shells + 1, device=perturbation.x.device) / shells
        self.shares = shares.to(perturbation.x.dtype)

    def margin(self, rows: Tensor) -> Tensor:
        """Lower bounds of ``rows @ output``, (batch, n_rows), for rows (batch or 1, n_rows, classes)."""
        rows = rows.expand(len(self.perturbation.x), -1, -1)
        start = margins_at(self.graph, self.perturbation, rows, self.sound)
        shells = shells_of(self.graph, self.perturbation, rows, self.shares, sound=self.sound, **self.how)
        return shells.bounds(start)[:, -1]


class SpectralPass:
    """Margins by the product of the layers' operator norms, whatever the ball: global, and without any search."""

    def __init__(self, graph: Graph, perturbation: Perturbation):
        self.graph, self.perturbation = graph, perturbation

    def margin(self, rows: Tensor) -> Tensor:
        """Lower bounds of ``rows @ output``, (batch, n_rows)."""
        batch = len(self.perturbation.x)
        rows = rows.expand(batch, -1, -1)
        margins = margins_at(self.graph, self.perturbation, rows)
        moving = BoundPass(self.graph, self.perturbation, "ibp", sound=False)
        reached = [not moving.is_exact(node) for node in self.graph.nodes]
        return margins - torch.stack([self._fall(row, reached) for row in rows.unbind(1)], dim=1)

    def _fall(self, row: Tensor, moving: list[bool]) -> Tensor:
        adjoint = Adjoint(self.graph, row, moving)
        norms = NormPass(self.perturbation.norm, None, self.graph)
        falls = [
            self.perturbation.most(frame, norms.through(weight, node))
            for frame, (node, weight) in sorted(adjoint.frames.items())
        ]
        if not falls:
            return row.new_zeros(len(self.perturbation.x))
        return self.perturbation.total_deviation([fall[:, None] for fall in falls]).squeeze(-1)


def spectral(graph: Graph, perturbation: Perturbation, slopes: list | None = None, sound: bool = True) -> SpectralPass:
    return SpectralPass(graph, perturbation)


def jacobian(graph: Graph, perturbation: Perturbation, slopes: list | None = None, sound: bool = True) -> ShellPass:
    return ShellPass(graph, perturbation, sound=sound)


def shell(graph: Graph, perturbation: Perturbation, slopes: list | None = None, sound: bool = True) -> ShellPass:
    return ShellPass(graph, perturbation, direct=True, sound=sound)
