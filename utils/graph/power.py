"""Energies: squares, and sums of squares as quadratic forms of the input.

Over a set of deviations d of a window from its centre v, an energy  E(v + d) = (v + d)' Q (v + d)  with Q >= 0 lies
between the planes

    E(v) + 2 v'Q d      and      E(v) + 2 v'Q d + kappa,        kappa >= d'Q d  for every d of the set,

and its root within sqrt(kappa) of that of E(v). The planes share their slopes, so an energy costs an interval of width
kappa, however many squares it is the sum of. For rows B_k times a window w, Q = sum_k m_k B_k B_k' = diag(w) R diag(w),

    d'Q d  <=  lambda(R) sum_j w_j^2 d_j^2,         d'Q d  <=  sum_k m_k (sum_j |B_kj| h_j)^2  for |d_j| <= h_j;

the second is what planes of the single squares come to. Boxes take the lesser, l_2 balls lambda(Q) |d|^2.

A row of several energies with coefficients of which |a_m| are below 0 pays for these sum_m |a_m| kappa_m, or, as no
frequency is in many bands and so no d is the worst of many,

    sum_m |a_m| d'Q_m d  =  sum_k (sum_m |a_m| m_mk) (B_k w d)^2  <=  max_k (sum_m |a_m| m_mk) sum_k (B_k w d)^2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..relaxation.lines import Relaxation
from ..relaxation.squares import relax_square
from .nodes import Bounds, Frame, Interval, Node
from .nonlinear import NonLinear
from .sums import apply_rows

ROUNDING = 1.0 + 1e-9  # room for that of norms, in double precision
POWER_STEPS = 20


class Square(NonLinear):
    """The parent's square, element-wise."""

    name = "square"

    def __init__(self, parent: Node):
        super().__init__(parent.size, (parent,))

    def value(self, parent: Tensor) -> Tensor:
        return parent**2

    def interval(self, bounds: Bounds) -> Interval:
        low, high = bounds.interval(self.parents[0])
        inside = (low < 0) & (high > 0)
        return torch.where(inside, 0.0, torch.minimum(low**2, high**2)), torch.maximum(low**2, high**2)

    def relax(self, operand: Interval, slopes=None) -> Relaxation:
        return relax_square(*operand, None if slopes is None else (slopes[0][0], slopes[1][0]))


class BandPower(Node):
    """``E_m = sum_k mel_mk (wave_k . v)^2`` of the window v that lies in several frames side by side.

    Args:
        frames: the window's frames.
        wave: (rows, window size).
        mel: (bands, rows), none below 0.
        window: (window size,), above 0, that the rows were multiplied by.
        shared: a table for what windows with the same matrices have in common.
    """

    meets_frames = True

    def __init__(
        self, frames: tuple[Frame, ...], wave: Tensor, mel: Tensor, window: Tensor, shared: dict | None = None
    ):
        super().__init__(len(mel), tuple(frames))
        self.wave, self.mel, self.window = wave, mel, window
        self.shared = {} if shared is None else shared

    @property
    def longest_sum(self) -> int:
        return sum(parent.size for parent in self.parents) + self.wave.shape[0]

    def detach(self) -> None:
        self.wave, self.mel, self.window = self.wave.detach(), self.mel.detach(), self.window.detach()

    def value(self, *parents: Tensor) -> Tensor:
        return (torch.cat(parents, dim=-1) @ self.wave.T) ** 2 @ self.mel.T

    def term_sizes(self, *parents: Tensor, own: bool = True) -> Tensor:
        """Four times the sums of absolute values: above those of the value, its slopes times d, and kappa together."""
        return 4.0 * (torch.cat(parents, dim=-1) @ self._absolute_wave.T) ** 2 @ self.mel.T

    @property
    def _absolute_wave(self) -> Tensor:
        return self._kept("absolute", lambda: self.wave.abs())

    def _kept(self, name: str, make) -> Tensor:
        if name not in self.shared:
            self.shared[name] = make().detach()
        return self.shared[name]

    @property
    def heaviest(self) -> Tensor:
        """Upper bounds of lambda(Q), (bands,)."""
        return self._kept("heaviest", lambda: heaviest(self.wave, self.mel))

    @property
    def heaviest_unwindowed(self) -> Tensor:
        """Upper bounds of lambda(R), (bands,)."""
        return self._kept("unwindowed", lambda: heaviest(self.wave / self.window, self.mel))

    # --- over a perturbation set ---

    def expansion(self, bounds: Bounds) -> tuple[Tensor, Tensor, Tensor]:
        """E and kappa, (batch or 1, bands), and the slopes 2 v'Q, (batch or 1, bands, window size)."""
        return bounds.once(self, lambda: self._expand(bounds))

    def slopes_at(self, frame: Frame, bounds: Bounds) -> Tensor:
        """Rows, (batch, bands, n), of which all coefficients that the node hands to one of its frames are made."""
        first = sum(parent.size for parent in self.parents[: self.parents.index(frame)])
        return self.expansion(bounds)[2][..., first : first + frame.size]

    def _expand(self, bounds: Bounds) -> tuple[Tensor, Tensor, Tensor]:
        center = torch.cat([bounds.known_part(frame) for frame in self.parents], dim=-1)
        rows = center @ self.wave.T
        slopes = (2.0 * rows.unsqueeze(-2) * self.mel) @ self.wave
        return rows**2 @ self.mel.T, self.kappa(bounds), slopes

    def kappa(self, bounds: Bounds) -> Tensor:
        """Upper bounds of d'Q d over the set, (batch, bands)."""
        if not bounds.perturbation.is_box:
            return ROUNDING * bounds.squared_radius(self.parents)[:, None] * self.heaviest
        sides = torch.cat([bounds.half_widths(frame) for frame in self.parents], dim=-1)
        whole = ((self.window * sides) ** 2).sum(dim=-1, keepdim=True) * self.heaviest_unwindowed
        single = (sides @ self._absolute_wave.T) ** 2 @ self.mel.T
        return ROUNDING * torch.minimum(whole, single)

    def interval(self, bounds: Bounds) -> Interval:
        if bounds.perturbation.rough:  # without the slopes, which cost most
            return self._around_roots(self.value(*map(bounds.known_part, self.parents)), self.kappa(bounds))
        energy, kappa, slopes = self.expansion(bounds)
        moved = [k for k, frame in enumerate(self.parents) if not bounds.is_exact(frame)]
        parts = slopes.split([frame.size for frame in self.parents], dim=-1)
        deviation = bounds.perturbation.total_deviation([bounds.deviation(self.parents[k], parts[k]) for k in moved])
        low, high = self._around_roots(energy, kappa)
        return torch.maximum(low, energy - deviation), torch.minimum(high, energy + deviation + kappa)

    @staticmethod
    def _around_roots(energy: Tensor, kappa: Tensor) -> Interval:
        root, most = energy.clamp(min=0.0).sqrt(), kappa.sqrt()
        return (root - most).clamp(min=0.0) ** 2, (root + most) ** 2

    def backward(self, coefficients: Tensor, bounds: Bounds) -> Tensor:
        energy, kappa, slopes = self.expansion(bounds)
        passed = coefficients @ slopes
        for frame, part in zip(self.parents, passed.split([frame.size for frame in self.parents], dim=-1), strict=True):
            if not bounds.is_exact(frame):
                bounds.pass_to(frame, part)
        _, negative = bounds.signed_parts(coefficients)
        constant = bounds.lose(self.parents, -self._lost(negative, kappa, bounds))
        known = apply_rows(coefficients, energy)
        return known if constant is None else known + constant

    def _lost(self, negative: Tensor, kappa: Tensor, bounds: Bounds) -> Tensor:
        """Lower bounds, (batch, rows), of sum_m a_m d'Q_m d for a <= 0, (batch or 1, rows, bands)."""
        together = (negative @ self.mel).amin(dim=-1) * self._whole(bounds)
        return torch.maximum(apply_rows(negative, kappa), together)

    def _whole(self, bounds: Bounds) -> Tensor:
        """Upper bounds of sum_k (W_k d)^2 over the set, (batch, 1)."""
        ones = torch.ones_like(self.mel[:1])
        if not bounds.perturbation.is_box:
            largest = self._kept("whole", lambda: heaviest(self.wave, ones))
            return ROUNDING * bounds.squared_radius(self.parents)[:, None] * largest
        largest = self._kept("whole_unwindowed", lambda: heaviest(self.wave / self.window, ones))
        sides = torch.cat([bounds.half_widths(frame) for frame in self.parents], dim=-1)
        return ROUNDING * ((self.window * sides) ** 2).sum(dim=-1, keepdim=True) * largest


def heaviest(rows: Tensor, mel: Tensor) -> Tensor:
    """Upper bounds of the greatest eigenvalues of sum_k mel_mk rows_k rows_k', (bands,).

    They are those of the Gram matrix G of the rows times sqrt(mel), and of a matrix G and any v > 0 no eigenvalue is
    above the greatest (|G| v)_i / v_i; v is found by powers of |G|.
    """
    found = []
    for weights in mel:
        scaled = rows[weights > 0].double() * weights[weights > 0].double().sqrt()[:, None]
        gram = (scaled @ scaled.T).abs()
        gram = gram + 1e-12 * gram.amax()  # more than the sums' rounding
        vector = torch.ones_like(gram[0])
        for _ in range(POWER_STEPS):
            vector = gram @ vector
            vector = vector / vector.amax() + 1e-3
        found.append(((gram @ vector) / vector).amax())
    return torch.stack(found).to(mel)
