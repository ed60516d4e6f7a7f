"""VNN-LIB properties: input boxes and what must not happen to inputs and outputs in them.

A property describes the counter-examples: it is "sat" if some input X in its boxes satisfies, with its outputs Y, the
constraints, and "unsat", which is what a safe network gives, if none does.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

BELOW_ZERO = -5e-324  # the float64 below 0
ROUNDING = 1e-9  # of sums in float64, as a share of their terms: far more than it is


@dataclass
class Case:
    """A box of inputs, lower and upper (n,), and conjunctions of linear constraints: ``rows @ Y <= limits`` each.

    Where a property has constraints of several inputs, or of inputs and outputs, all rows are of Y and X, (m + n,).
    A counter-example is an X in the box that satisfies, with its Y, all constraints of some conjunction.
    ``inner_lower`` and ``inner_upper`` leave out the sides that < and > exclude: X must be there, a proof is of the
    whole box. A limit of ``rows @ Y < limit`` is the float64 below it, which means the same for float64 numbers.
    """

    lower: Tensor
    upper: Tensor
    conjunctions: list[tuple[Tensor, Tensor]]
    inner_lower: Tensor = None
    inner_upper: Tensor = None

    def __post_init__(self):
        self.inner_lower = self.lower if self.inner_lower is None else self.inner_lower
        self.inner_upper = self.upper if self.inner_upper is None else self.inner_upper

    @property
    def with_equalities(self) -> list[int]:
        """The numbers of conjunctions in which one constraint is another's opposite."""
        return [number for number, part in enumerate(self.conjunctions) if _has_equality(*part)]


def _has_equality(rows: Tensor, limits: Tensor) -> bool:
    both = torch.cat((rows, limits[:, None]), dim=1)
    of, opposite = ({row.numpy().tobytes() for row in sign * both + 0.0} for sign in (1.0, -1.0))  # -0.0 becomes 0.0
    return not of.isdisjoint(opposite)


@dataclass
class Property:
    """``strict`` says whether a constraint is < or >; the shapes are those that VNN-LIB 2.0 declares."""

    num_inputs: int
    num_outputs: int
    cases: list[Case]
    strict: bool = False
    input_shape: tuple[int, ...] | None = None

    def holds_for(self, x: Tensor, y: Tensor, tolerance: float = 0.0) -> bool:
        """Whether input x, (n,), with outputs y, (m,), is a counter-example.

        Sums are exact. A tolerance is in proportion to 1, to limits and to what inputs add to a row.
        """
        values = torch.cat((y, x))
        for case in self.cases:
            if not bool(((x >= case.inner_lower - tolerance) & (x <= case.inner_upper + tolerance)).all()):
                continue
            for rows, limits in case.conjunctions:
                own, inputs = values[: rows.shape[1]], rows[:, len(y) :]
                sizes = 1.0 + limits.abs() + inputs.abs() @ x[: inputs.shape[1]].abs()
                if _meets(rows, limits, own, tolerance * sizes):
                    return True
        return False

    @property
    def compares_outputs_only(self) -> bool:
        """Whether all constraints are of the form Y_i <= Y_j or Y_i < Y_j, which no softmax changes."""
        parts = [part for case in self.cases for part in case.conjunctions]
        for rows, limits in parts:
            if rows.shape[1] > self.num_outputs:
                return False
            ordered = rows.sort(dim=1).values
            pairs = (ordered[:, 0] == -1) & (ordered[:, -1] == 1) & ((rows != 0).sum(dim=1) == 2)
            if not bool((((limits == 0) | (limits == BELOW_ZERO)) & pairs).all()):
                return False
        return True


def _meets(rows: Tensor, limits: Tensor, values: Tensor, room: Tensor) -> bool:
    """Whether ``rows @ values <= limits + room`` in exact arithmetic, which is asked where float64 may be wrong."""
    excess = rows @ values - limits - room
    if not bool(excess.isfinite().all()):
        return bool((excess <= 0).all())
    doubt = ROUNDING * (limits.abs() + room + rows.abs() @ values.abs())
    if bool((excess > doubt).any()):
        return False
    return all(_exact_excess(rows[k], values, limits[k], room[k]) <= 0 for k in (excess > -doubt).nonzero().flatten())


def _exact_excess(row: Tensor, values: Tensor, *limits: Tensor) -> Fraction:
    places = row.nonzero().flatten()
    terms = zip(row[places].tolist(), values[places].tolist(), strict=True)
    return sum(Fraction(factor) * Fraction(value) for factor, value in terms) - sum(Fraction(k.item()) for k in limits)
