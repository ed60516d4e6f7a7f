"""Verdicts on VNN-LIB properties: counter-examples by attack, proofs by bounds, tuned, and over parts of boxes.

A property is "unsat", proved, if the boxes can be covered by boxes in each of which, for every conjunction of
constraints, one constraint's least violation ``rows @ Y - limits`` is bounded above 0 (by more than a slack for
rounding). Where inputs are compared too, a last layer adds their part of every row. It is "sat" if an input is found
that satisfies a conjunction, in float64 and, where onnxruntime can run the file, there too. Everything else is
"unknown", or "timeout": whatever takes long looks at the clock.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..clock import Pace, now
from ..network.onnx_graph import OnnxNetwork
from .boxes import check_clock
from .case_problem import DTYPE, CaseProblem
from .vnnlib import Property

RESTARTS, STEPS = 16, 40  # of the attack on a whole box
CHILD_STEPS = 4  # of the attack on each box that is split
MAX_BATCH = 64
TUNED_SIDES = 24  # a box of few sides is soon cut small; one of as many is first bounded as tightly as can be
TUNING_COST = 10.0  # bounds that the time must suffice for if tuning is to start
MAX_NUMBERS = 20_000_000  # that describe open boxes: above, memory would run out
# What onnxruntime's float32 outputs may miss a constraint by, relative to its limit, for a counter-example to count.
RUNTIME_ROOM = 1e-5
STRICT_NOTE = "< and > are read as <= and >= for unsat; sat meets them as they are"


@dataclass
class Verdict:
    """``result`` is sat, unsat, unknown or timeout; x and y are the counter-example of sat; note is for the reader."""

    result: str
    x: Tensor | None = None
    y: Tensor | None = None
    boxes: int = 0
    note: str = ""


class Verifier:
    """One network and property.

    Args:
        deadline: of ``utils.clock``, at which to give up.
        split: whether to split boxes that can be neither proved nor broken as a whole.
    """

    def __init__(self, network: OnnxNetwork, prop: Property, deadline: float, split: bool = True, seed: int = 0):
        if (network.num_inputs, network.graph.output.size) != (prop.num_inputs, prop.num_outputs):
            own = f"{network.num_inputs} inputs and {network.graph.output.size} outputs"
            raise ValueError(f"the network has {own}, the property {prop.num_inputs} and {prop.num_outputs}")
        if network.softmax and not prop.compares_outputs_only:
            raise ValueError(
                f"the network ends with a {network.softmax}, which is left out: the property may only compare outputs"
            )
        if prop.input_shape is not None and _long_axes(prop.input_shape) != _long_axes(network.input_shape):
            raise ValueError(f"the network's input is {network.input_shape}, the property's {prop.input_shape}")
        self.network, self.property, self.deadline, self.split = network, prop, deadline, split
        self.generator = torch.Generator().manual_seed(seed)
        self.session = network.session()
        self.boxes = 0

    def run(self) -> Verdict:
        """The verdict; sat and unsat are final, whatever time is left."""
        try:
            verdict = self._decide()
        except TimeoutError:
            verdict = Verdict("timeout")
        verdict.boxes = self.boxes
        notes = [STRICT_NOTE] * self.property.strict + [self.network.note] * bool(self.network.note)
        verdict.note = "; ".join(notes)
        return verdict

    def _decide(self) -> Verdict:
        problems = []
        for case in self.property.cases:
            check_clock(self.deadline)
            problem = CaseProblem(self.network, case, self.deadline)
            problems.append(problem)
            lower, upper = problem.case.lower[None], problem.case.upper[None]
            found = self._confirmed(problem.attack(lower, upper, RESTARTS, STEPS, self.generator))
            if found is not None:
                return found
        names = []
        for problem in problems:
            verdict = self._prove(problem)
            if verdict.result in ("sat", "timeout"):
                return verdict
            names.append(verdict.result)
        return Verdict("unknown" if "unknown" in names else "unsat")

    def _time_left(self) -> float:
        return self.deadline - now()

    def _prove(self, problem: CaseProblem) -> Verdict:
        """Bound the case's box; split what is left. Bounds of boxes with many sides are tuned before."""
        lower, upper = problem.case.lower[None], problem.case.upper[None]
        if int((upper > lower).sum()) >= TUNED_SIDES:
            self.boxes += 1
            bounds = Pace(now() + self._time_left())
            with bounds.work():
                proved = float(problem.bound(lower, upper)[0]) > 0
            if proved or (bounds.allows(TUNING_COST) and problem.proved_by_tuning(lower, upper, bounds)):
                return Verdict("unsat")
            if self.split and bounds.allows(TUNING_COST) and problem.proved_by_splitting(lower, upper):
                return Verdict("unsat")
        scores = torch.zeros(1, dtype=DTYPE)
        batch = 1
        while len(lower):
            check_clock(self.deadline)
            if lower.numel() > MAX_NUMBERS:
                return Verdict("unknown")
            order = scores.argsort()  # the most violated first: there a counter-example would be
            chosen, rest = order[:batch], order[batch:]
            started = now()
            low, high = lower[chosen], upper[chosen]
            score, slopes = problem.bound(low, high)
            self.boxes += len(chosen)
            left = score <= 0
            low, high, score, slopes = low[left], high[left], score[left], slopes[left]
            if len(low):
                if not self.split:
                    return Verdict("unknown")
                found = self._confirmed(problem.attack(low, high, 1, CHILD_STEPS, self.generator))
                if found is not None:
                    return found
                halves = _halves(low, high, slopes)
                if halves is None:
                    return Verdict("unknown")
                low, high = halves
                score = torch.cat((score, score))
            lower, upper = torch.cat((lower[rest], low)), torch.cat((upper[rest], high))
            scores = torch.cat((scores[rest], score))
            each = (now() - started) / len(chosen)
            batch = max(1, min(2 * batch, MAX_BATCH, int(self._time_left() / max(each, 1e-9))))
        return Verdict("unsat")

    def _confirmed(self, points: Tensor) -> Verdict | None:
        """The first of the points (k, n) that is a counter-example, also to onnxruntime."""
        for x in points:
            check_clock(self.deadline)
            (scores,) = self.network.graph.evaluate(self.network.frames(x[None]))
            if not self.property.holds_for(x, scores):
                continue
            outputs = self.network.outputs(x[None])[0]
            if self.session is not None:
                outputs = self.network.runtime_outputs(x[None], self.session)[0]
                if not self.property.holds_for(x, outputs, RUNTIME_ROOM):
                    continue
            return Verdict("sat", x, outputs)
        return None


def _long_axes(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size != 1]


def _halves(lower: Tensor, upper: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor] | None:
    """The boxes cut in two across the input that matters most; None if one is too small to be cut."""
    width = upper - lower
    axis = (width * (slopes.abs() + 1e-3 * slopes.abs().amax(dim=1, keepdim=True) + 1e-12)).argmax(dim=1)
    rows = torch.arange(len(lower))
    cut = 0.5 * (lower[rows, axis] + upper[rows, axis])
    if bool(((cut <= lower[rows, axis]) | (cut >= upper[rows, axis])).any()):
        return None
    left, right = upper.clone(), lower.clone()
    left[rows, axis], right[rows, axis] = cut, cut
    return torch.cat((lower, right)), torch.cat((left, upper))
