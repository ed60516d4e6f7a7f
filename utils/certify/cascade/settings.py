"""What a cascade is asked for, and what it says: stages, limits, outcomes and their costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...choices.method import ALPHA_STEPS, CURVE_STEPS

CLEAN = "clean"  # the stage that finds the misclassified
ATTACK_STAGES = ("runner-up", "pgd")
TUNED_STAGES = ("alpha", "curve", "bab")
STAGES = ("ibp", *ATTACK_STAGES, "crown-ibp", "crown", *TUNED_STAGES)
DEFAULT_STAGES = tuple(name for name in STAGES if name != "curve")  # bab goes over it, within its time

OUTCOMES = ("wrong", "broken", "verified", "undecided")


@dataclass(frozen=True)
class Effort:
    """Which stages a cascade has, in their order, and where each gives up.

    A stage takes the most promising samples first. What it leaves undecided goes to the next.

    Attributes:
        stages: some of ``STAGES``, in their order: "runner-up" is a short attack against the class with the second
            highest logit only, "pgd" one against every class; the others are methods of ``certified_margin``.
        steps: of "pgd".
        restarts: random starts of "pgd" for each class, besides the unperturbed input.
        seed: of the random starts.
        patience: a stage stops after so many samples in a row that it did not settle (a tuned stage after a tenth of
            that); None for never. It saves time, and may leave a sample undecided that the stage would have settled.
        time_limit: seconds that each of "alpha", "curve" and "bab" may take for a sample.
        total_limit: seconds that these may take for all samples of a call together.
        alpha_steps: gradient steps of "alpha"; curve_steps: of "curve"; both also of what "bab" does before.
    """

    stages: Sequence[str] = DEFAULT_STAGES
    steps: int = 40
    restarts: int = 1
    seed: int = 0
    patience: int | None = 100
    time_limit: float = 10.0
    total_limit: float = 300.0
    alpha_steps: int = ALPHA_STEPS
    curve_steps: int = CURVE_STEPS

    def __post_init__(self):
        unknown = [name for name in self.stages if name not in STAGES]
        if unknown:
            raise ValueError(f"unknown stage {unknown[0]!r}: use {', '.join(STAGES)}")
        if list(self.stages) != sorted(set(self.stages), key=STAGES.index):
            raise ValueError(f"stages go from cheap to dear, each once: {', '.join(STAGES)}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be at least 1, or None, not {self.patience}")
        for name in ("time_limit", "total_limit"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be a positive number of seconds, not {getattr(self, name)}")


@dataclass
class StageCost:
    """What a stage took: samples that it tried and settled, and seconds, by the clock and of the processor."""

    stage: str
    tried: int = 0
    settled: int = 0
    seconds: float = 0.0
    processor_seconds: float = 0.0


@dataclass
class CascadeResult:
    """The outcome of every sample, and what it took.

    Attributes:
        outcomes: one of ``OUTCOMES`` for each sample. "wrong": misclassified as it is; "broken": ``examples`` has a
            perturbed input that is misclassified; "verified": no perturbation is; "undecided": none of these is known.
        settled_by: the stage that found it: "clean", one of ``STAGES``, or "" for the undecided.
        margins: (batch,), float64: the worst margin, of a broken sample that of the perturbed input, of a wrong one the
            unperturbed; otherwise the best lower bound over all perturbations, -inf if there is none.
        examples: perturbed inputs, (T, n), float64, of the broken samples, by their number.
        costs: of every stage, in order, ``CLEAN`` first.
    """

    outcomes: list[str]
    settled_by: list[str]
    margins: Tensor
    examples: dict[int, Tensor] = field(default_factory=dict)
    costs: list[StageCost] = field(default_factory=list)

    @classmethod
    def open(cls, batch: int) -> CascadeResult:
        """That of samples of which nothing is known."""
        margins = torch.full((batch,), -torch.inf, dtype=torch.float64)
        return cls(["undecided"] * batch, [""] * batch, margins)

    def include(self, part: CascadeResult, samples: Sequence[int]) -> None:
        """Take over what was found of some samples, of which nothing was known; costs of a stage add up."""
        self.margins[list(samples)] = part.margins
        for number, sample in enumerate(samples):
            self.outcomes[sample], self.settled_by[sample] = part.outcomes[number], part.settled_by[number]
        self.examples |= {samples[number]: example for number, example in part.examples.items()}
        if not self.costs:
            self.costs = [StageCost(cost.stage) for cost in part.costs]
        for total, own in zip(self.costs, part.costs, strict=True):
            for name in ("tried", "settled", "seconds", "processor_seconds"):
                setattr(total, name, getattr(total, name) + getattr(own, name))

    @property
    def undecided(self) -> Tensor:
        """The numbers of samples without an outcome."""
        return torch.tensor([n for n, outcome in enumerate(self.outcomes) if outcome == "undecided"], dtype=torch.long)

    def share(self, *outcomes: str) -> float:
        """The share of all samples that have one of these outcomes: ``share("verified")`` is the verified accuracy."""
        return sum(outcome in outcomes for outcome in self.outcomes) / len(self.outcomes)

    def count(self, stage: str) -> int:
        """How many samples a stage settled."""
        return self.settled_by.count(stage)
