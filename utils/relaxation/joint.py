"""Planes around a derivative times an adjoint, in the adjoint and in what the derivative is taken at.

The chord (``derivatives``) knows of a derivative kappa(z) only where it lies. Here z stays a symbol. A derivative is a
product of functions of one operand each, such as tanh(x) sigmoid'(y), and these have lines (``bells``, ``lines``). Of
two factors f in [fl, fu] and g in [gl, gu], for any share s in [0, 1],

    f g  <=  (s gu + (1 - s) gl) f + (s fl + (1 - s) fu) g - s fl gu - (1 - s) fu gl,

a sum of s (f - fl)(g - gu) <= 0 and (1 - s) (f - fu)(g - gl) <= 0 (McCormick). With a factor's lines in its place, by
the sign of what it is multiplied with, that is a plane in the operands; one below is that of (-f) g, mirrored.

Of kappa times an adjoint a the coefficient m of kappa may be any number in a's interval. With m = 0, where that is in
it, the plane is the chord, and what kappa varies by is lost; with a's middle it is kept, but the gap of kappa's own
lines counts m times. So m is the middle times (1 - gap / range of kappa)^4: where the lines say nothing that the range
does not say, the chord is taken. A share is about tightness alone.

All functions are element-wise on tensors of one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .bells import relax_arctan_bell, relax_bell, relax_elu_step, relax_gate_bell
from .derivatives import (
    Interval,
    arctan_range,
    elu_range,
    gate_range,
    relax_factor,
    sigmoid_range,
    tanh_interval,
    tanh_range,
)
from .lines import GUARD_ULPS, Plane, Relaxation, relax_sigmoid, relax_tanh

POWER = 4  # of the share of kappa's range that its lines leave out
ROUNDING_ULPS = 8 * GUARD_ULPS  # of the sizes of all terms of a plane


class Factor(NamedTuple):
    """A function of one operand that derivatives are products of: its range over an interval, and lines there."""

    operand: int
    range: Callable[[Tensor, Tensor], Interval]
    lines: Callable[[Tensor, Tensor], Relaxation]


def itself(l: Tensor, u: Tensor) -> Relaxation:  # noqa: E741
    """The operand."""
    line = Plane((torch.ones_like(l),), torch.zeros_like(l))
    return Relaxation(line, line)


def as_it_is(l: Tensor, u: Tensor) -> Interval:  # noqa: E741
    return l, u


def _bells(operand: int) -> dict[str, Factor]:
    return {
        "tanh": Factor(operand, tanh_interval, relax_tanh),
        "tanh'": Factor(operand, tanh_range, relax_bell),
        "sigmoid": Factor(operand, gate_range, relax_sigmoid),
        "sigmoid'": Factor(operand, sigmoid_range, relax_gate_bell),
    }


X, Y = _bells(0), _bells(1)
# For each non-linearity, of its derivative in each operand: the factors.
FACTORS: dict[str, tuple[tuple[Factor, ...], ...]] = {
    "tanh": ((X["tanh'"],),),
    "sigmoid": ((X["sigmoid'"],),),
    "arctan": ((Factor(0, arctan_range, relax_arctan_bell),),),
    "softplus": ((X["sigmoid"],),),
    "elu": ((Factor(0, elu_range, relax_elu_step),),),
    "x*sigmoid(y)": ((Y["sigmoid"],), (Factor(0, as_it_is, itself), Y["sigmoid'"])),
    "tanh(x)*sigmoid(y)": ((X["tanh'"], Y["sigmoid"]), (X["tanh"], Y["sigmoid'"])),
}


class Form(NamedTuple):
    """``sum_k slopes[k] * operand_k + intercept``; ``size`` bounds the sum of its terms' absolute values."""

    slopes: dict[int, Tensor]
    intercept: Tensor
    size: Tensor

    def scaled(self, factor: Tensor) -> Form:
        slopes = {k: factor * slope for k, slope in self.slopes.items()}
        return Form(slopes, factor * self.intercept, factor.abs() * self.size)

    def negative(self) -> Form:
        return Form({k: -slope for k, slope in self.slopes.items()}, -self.intercept, self.size)

    def plus(self, other: Form) -> Form:
        slopes = dict(self.slopes)
        for k, slope in other.slopes.items():
            slopes[k] = slopes[k] + slope if k in slopes else slope
        return Form(slopes, self.intercept + other.intercept, self.size + other.size)

    def at(self, point: Sequence[Tensor]) -> Tensor:
        return sum((slope * point[k] for k, slope in self.slopes.items()), start=self.intercept)


class Bounded(NamedTuple):
    """What lies in [low, high], and above and below forms in the operands."""

    low: Tensor
    high: Tensor
    lower: Form
    upper: Form

    def negative(self) -> Bounded:
        return Bounded(-self.high, -self.low, self.upper.negative(), self.lower.negative())

    def above(self, factor: Tensor) -> Form:
        """Above ``factor`` times this."""
        return self.upper.scaled(factor.clamp(min=0.0)).plus(self.lower.scaled(factor.clamp(max=0.0)))


def _by_lines(factor: Factor, operands: Sequence[Interval], known: Interval | None = None) -> Bounded:
    l, u = operands[factor.operand]  # noqa: E741
    most = torch.maximum(l.abs(), u.abs())
    forms = [
        Form({factor.operand: slope}, intercept, slope.abs() * most + intercept.abs())
        for (slope,), intercept in factor.lines(l, u)
    ]
    return Bounded(*(known or factor.range(l, u)), *forms)


def product_above(f: Bounded, g: Bounded, share: Tensor) -> Form:
    """A form above f g: the inequality at the top of this page."""
    rest = 1.0 - share
    of_f, of_g = share * g.high + rest * g.low, share * f.low + rest * f.high
    constant = share * f.low * g.high + rest * f.high * g.low
    form = f.above(of_f).plus(g.above(of_g))
    size = form.size + share * (f.low * g.high).abs() + rest * (f.high * g.low).abs()
    return Form(form.slopes, form.intercept - constant, size)


def product_between(f: Bounded, g: Bounded, share: Tensor) -> tuple[Form, Form]:
    """Forms below and above f g."""
    return product_above(f, g.negative(), 1.0 - share).negative(), product_above(f, g, share)


def _share(kappa: Bounded, adjoint: Interval, middle: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Of the plane above kappa a, and where the chord is better."""
    l, u = adjoint  # noqa: E741
    room, width = kappa.high - kappa.low, u - l
    gap = (kappa.upper.at(middle) - kappa.lower.at(middle)) / torch.where(room > 0, room, 1.0)
    known = torch.where(room > 0, 1.0 - gap, 0.0).clamp(0.0, 1.0) ** POWER
    wanted = (0.5 * (l + u) * known).clamp(l, u)
    share = torch.where(width > 0, (wanted - l) / torch.where(width > 0, width, 1.0), 0.5)
    return share.clamp(0.0, 1.0), known == 0


def relax_jointly(
    factors: Sequence[Factor], known: Interval, adjoint: Interval, operands: Sequence[Interval]
) -> Relaxation:
    """Planes around kappa * a, kappa being the product of one or two factors; slopes are in a, then in the operands.

    ``known`` is the range of kappa, ``adjoint`` a's interval, ``operands`` are those of what kappa is taken at.
    """
    every = torch.broadcast_tensors(*adjoint, *known, *(end for interval in operands for end in interval))
    adjoint, known, operands = every[:2], every[2:4], list(zip(every[4::2], every[5::2], strict=True))
    if len(factors) == 1:
        kappa = _by_lines(factors[0], operands, known)
    else:
        parts = [_by_lines(factor, operands) for factor in factors]
        kappa = Bounded(*known, *product_between(*parts, torch.full_like(adjoint[0], 0.5)))
    share, by_chord = _share(kappa, adjoint, [0.5 * (low + high) for low, high in operands])
    number = len(operands)  # of a, among the forms' operands
    a = _by_lines(Factor(number, as_it_is, itself), (*operands, adjoint), adjoint)
    chord = relax_factor(*known, adjoint)
    signed = zip(product_between(kappa, a, share), (-1.0, 1.0), chord, strict=True)
    return Relaxation(*(_plane(form, sign, number, line, by_chord) for form, sign, line in signed))


def _plane(form: Form, sign: float, adjoint: int, chord: Plane, by_chord: Tensor) -> Plane:
    """The form, moved outward by what rounding may have taken; or the chord."""
    zero = torch.zeros_like(form.intercept)
    lost = ROUNDING_ULPS * torch.finfo(zero.dtype).eps * form.size + torch.finfo(zero.dtype).tiny
    slopes = [form.slopes.get(k, zero) for k in (adjoint, *range(adjoint))]
    intercept = form.intercept + sign * lost.detach()
    by_chord = by_chord | ~torch.stack((intercept, *slopes)).isfinite().all(dim=0)
    slopes = [
        torch.where(by_chord, own, slope) for own, slope in zip((*chord.slopes, *[zero] * adjoint), slopes, strict=True)
    ]
    return Plane(tuple(slopes), torch.where(by_chord, chord.intercept, intercept))
