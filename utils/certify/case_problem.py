"""What one case of a VNN-LIB property asks: its violations over boxes, bounded, tuned, split, and attacked."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..bounds.alpha import STEP_BOUNDS, SlopeTable, nonlinear_nodes, slopes_pay, tune_slopes
from ..bounds.curve import CurvedPass
from ..bounds.curve_tuning import CURVED_STEP, VERDICT_STEPS, tune_curves
from ..bounds.passes import BoundPass
from ..choices.method import ALPHA_STEPS
from ..clock import Pace, now, share_of
from ..graph.convolution import Convolution
from ..network.onnx_graph import OnnxNetwork
from ..network.symbolic import as_graph
from .boxes import PART_SECONDS, PART_WORK, BoxSet, PartedPass, check_clock, work_per_row
from .problem import SLACK
from .splitting import SplitQuestion, few_change_sides, has_pieces, split_rows
from .vnnlib import Case

DTYPE = torch.float64
FIRST_STEP, LAST_STEP = 0.5, 0.005  # step sizes of the attack, as shares of the box
TUNED_SHARE = 0.5  # of the time left: as long may a box's bounds be tuned
SPLIT_SHARE = 0.8  # of what is left after that, for splitting neurons; the rest is for splitting boxes
TUNED_STEPS = (40, 80, 160)  # of tuning curved bounds
NEWTON_STEPS, NEIGHBOURS = 20, 256  # of the search for inputs at which outputs are equal to a number


class CaseProblem:
    """A case's constraints, stacked: the violations ``rows @ Y - limits`` of all its conjunctions.

    Where these are of inputs too, ``outputs @ Y + inputs @ X`` is what the graph ends with, and rows pick from it.
    """

    def __init__(self, network: OnnxNetwork, case: Case, deadline: float = math.inf):
        self.network, self.case, self.deadline = network, case, deadline
        self.rows = torch.cat([rows for rows, _ in case.conjunctions])
        self.graph, self.outputs, self.inputs = network.graph, self.rows, None
        self.limits = torch.cat([limits for _, limits in case.conjunctions])
        sizes = torch.tensor([len(limits) for _, limits in case.conjunctions])
        self.owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        self.conjunctions = len(sizes)
        size = network.graph.output.size
        if not len(self.rows):
            self.outputs = self.rows = self.rows[:, :size]
        elif self.rows.shape[1] > size:
            self.outputs, self.inputs = self.rows[:, :size], self.rows[:, size:]
            self.graph = network.graph.beside_inputs(self.outputs, self.inputs)
            self.rows = torch.eye(len(self.rows), dtype=DTYPE)
        work = work_per_row(self.graph) + 2 * self.rows.numel()
        self.part = max(1, int(PART_WORK / 3 / work))  # inputs that are attacked at once
        self.slopes: SlopeTable | None = None  # of planes over the whole box, once they are tuned
        self.with_equalities = case.with_equalities

    def violations(self, x: Tensor) -> Tensor:
        """(..., rows) at inputs (..., n); a conjunction is satisfied where all of its own are <= 0."""
        outputs = self.graph.evaluate(self.network.frames(x.reshape(-1, x.shape[-1])))
        found = outputs @ self.rows.T if self.inputs is None else outputs
        return (found - self.limits).reshape(*x.shape[:-1], -1)

    def worst(self, violations: Tensor) -> Tensor:
        """Largest violation of each conjunction, (..., conjunctions); without constraints it is satisfied anywhere."""
        empty = violations.new_full((*violations.shape[:-1], self.conjunctions), -torch.inf)
        return empty.scatter_reduce(-1, self.owner.expand(violations.shape), violations, "amax")

    @torch.no_grad()
    def bound(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Scores, (boxes,), above 0 where no conjunction can be satisfied; slopes in each input, (boxes, n)."""
        check_clock(self.deadline)
        center = 0.5 * (lower + upper)
        with torch.enable_grad():
            at = center.clone().requires_grad_()
            at_center = self.violations(at)
            worst = self.worst(at_center)
            (slopes,) = (
                torch.autograd.grad(worst.amin(dim=-1).sum(), at) if len(self.limits) else (torch.ones_like(at),)
            )
        if not len(self.limits):
            return torch.full((len(lower),), -torch.inf, dtype=DTYPE), slopes
        return self._score(PartedPass(self.graph, self._boxes(lower, upper)), self._room(center)), slopes

    def _boxes(self, lower: Tensor, upper: Tensor) -> BoxSet:
        return BoxSet(self.network.frames(lower), self.network.frames(upper), self.deadline)

    def _score(self, passed: BoundPass, room: Tensor) -> Tensor:
        margins = passed.margin(self.rows[None]) - self.limits - room
        # NaN is no proof.
        return self.worst(margins.nan_to_num(nan=-torch.inf)).amin(dim=-1)

    def _room(self, center: Tensor) -> Tensor:
        """For rounding, as ``utils.certify.SLACK`` says, (boxes, rows)."""
        terms = self.network.graph.term_sizes(self.network.frames(center), self.outputs[None])
        if self.inputs is not None:
            terms = terms + center.abs() @ self.inputs.abs().T
        return SLACK[DTYPE] * (1.0 + terms + self.limits.abs())

    @torch.no_grad()
    def proved_by_tuning(self, lower: Tensor, upper: Tensor, bounds: Pace) -> bool:
        """Whether bounds that are tuned to one box prove its case, for ``TUNED_SHARE`` of the time left.

        ``bounds`` is the pace of bounds by planes, with the deadline.
        Tuning raises the least bound of all rows: that is what robustness asks for, and a start for other properties.
        """
        if not len(self.limits):
            return False
        graph, boxes, rows = self.graph, self._boxes(lower, upper), self.rows[None]
        deadline = share_of(bounds.deadline, TUNED_SHARE)
        room = self._room(0.5 * (lower + upper))
        aim = float((self.limits + room).max())
        if slopes_pay(graph):
            pace = Pace(deadline, STEP_BOUNDS * bounds.longest)
            self.slopes, _ = tune_slopes(graph, boxes, rows, ALPHA_STEPS, pace=pace)
            if bounds.allows() and bool(self._score(BoundPass(graph, boxes, slopes=self.slopes), room) > 0):
                return True
        if has_pieces(graph) and any(isinstance(node, Convolution) for node in graph.nodes):
            return False  # splitting neurons gains more than matrices of convolutions
        curves, pace = None, Pace(deadline, CURVED_STEP * bounds.longest)
        try:
            graph = graph.dense()
        except ValueError:  # curved bounds ask for matrices, of which one is too large
            return False
        for steps in TUNED_STEPS if any(node.curved for node in nonlinear_nodes(graph)) else ():
            if not pace.allows(1.0 + VERDICT_STEPS):
                break
            curves = tune_curves(graph, boxes, rows, steps, curves, aim=aim, pace=pace)
            if pace.allows(VERDICT_STEPS) and bool(self._score(CurvedPass(graph, boxes, curves), room) > 0):
                return True
        return False

    @torch.no_grad()
    def proved_by_splitting(self, lower: Tensor, upper: Tensor) -> bool:
        """Whether splitting neurons of one box proves its case in time: of every conjunction the likeliest row."""
        graph, boxes = self.graph, self._boxes(lower, upper)
        if not has_pieces(graph) or len(self.owner.unique()) < self.conjunctions:  # one without constraints holds
            return False
        whole = PartedPass(graph, boxes, slopes=self.slopes)
        known = whole.margin(self.rows[None])[0].nan_to_num(nan=-torch.inf)
        if graph.recurrent and not few_change_sides(whole):
            return False
        enough = self.limits + self._room(0.5 * (lower + upper))[0]
        likeliest = self.worst(known - enough)
        chosen = torch.stack([(known - enough == likeliest[k]) & (self.owner == k) for k in range(self.conjunctions)])
        chosen = chosen.long().argmax(dim=1)
        ends = [self.network.frames(end) for end in (lower, upper)]

        def set_of(parts: int, dtype: torch.dtype) -> BoxSet:
            return BoxSet(*(end.to(dtype).expand(parts, -1, -1) for end in ends), self.deadline)

        question = SplitQuestion(self.rows[chosen], whole, lambda dtype: as_graph(graph, dtype, ends[0].device), set_of)
        found = split_rows(question, known[chosen], enough[chosen], share_of(self.deadline, SPLIT_SHARE))
        return bool((found > enough[chosen]).all())

    @torch.no_grad()
    def attack(self, lower: Tensor, upper: Tensor, restarts: int, steps: int, generator: torch.Generator) -> Tensor:
        """Points, (k, n), that came nearest to satisfying each conjunction, by signs of the gradient, nearest first.

        It ends at the deadline with what it has found.
        """
        lower, upper = torch.maximum(lower, self.case.inner_lower), torch.minimum(upper, self.case.inner_upper)
        upper = torch.maximum(lower, upper)  # where only the excluded side is left, ``Property.holds_for`` says no
        shape = (len(lower), self.conjunctions, restarts, lower.shape[-1])
        low, high = (end[:, None, None].expand(shape).reshape(-1, shape[-1]) for end in (lower, upper))
        goals = torch.arange(self.conjunctions)[:, None].expand(shape[:3]).reshape(-1)
        x = low + torch.rand(low.shape, generator=generator, dtype=DTYPE) * (high - low)
        first = torch.arange(len(x)) % restarts == 0
        x[first] = 0.5 * (low + high)[first]
        best, best_x = torch.full((len(x),), torch.inf, dtype=DTYPE), x.clone()
        try:
            for step in range(steps + 1):
                settled = inside_float32(x, low, high)
                own, gradient = self._goal_gradients(settled, goals)
                better = own < best
                best, best_x = torch.where(better, own, best), torch.where(better[:, None], settled, best_x)
                rate = FIRST_STEP * (LAST_STEP / FIRST_STEP) ** (step / max(steps, 1))
                x = torch.minimum(torch.maximum(settled - rate * (high - low) * gradient.sign(), low), high)
        except TimeoutError:
            pass
        order = best.argsort()
        found = [best_x[order[best[order] <= 0]][:50]]
        if not len(found[0]):
            for goal in self.with_equalities:
                start = int(torch.where(goals == goal, best, torch.inf).argmin())
                found.append(self._equal(best_x[start], low[start], high[start], goal, generator))
        return torch.cat(found)

    def _goal_gradients(self, x: Tensor, goals: Tensor) -> tuple[Tensor, Tensor]:
        """The largest violation of each input's own conjunction, (k,), and its gradient, (k, n)."""
        found, gradients, start = [], [], 0
        while start < len(x):
            check_clock(self.deadline)
            began, part, goal = now(), x[start : start + self.part], goals[start : start + self.part]
            start += self.part
            with torch.enable_grad():
                at = part.clone().requires_grad_()
                own = self.worst(self.violations(at)).gather(1, goal[:, None]).squeeze(1)
                gradient = torch.autograd.grad(own.sum(), at)[0] if len(self.limits) else torch.zeros_like(part)
            found.append(own.detach())
            gradients.append(gradient)
            if now() - began > PART_SECONDS:
                self.part = max(1, len(part) // 2)
        return torch.cat(found), torch.cat(gradients)

    def _equal(self, x: Tensor, lower: Tensor, upper: Tensor, goal: int, generator: torch.Generator) -> Tensor:
        """Inputs, (k, n), near to x at which a conjunction holds with its equalities.

        Newton's method for what is violated, then neighbours of its last point: some of them have, rounded to
        float64, just the outputs that are asked for.
        """
        rows, limits = self.rows[self.owner == goal], self.limits[self.owner == goal]
        width = upper - lower
        for _ in range(NEWTON_STEPS):
            check_clock(self.deadline)
            with torch.enable_grad():
                at = x.clone().requires_grad_()
                violated = rows @ self.graph.evaluate(self.network.frames(at[None]))[0] - limits
                active = (violated > 0).nonzero().squeeze(-1).tolist()
                slopes = [torch.autograd.grad(violated[k], at, retain_graph=True)[0] for k in active]
            if not active:
                return x[None]
            step = width * (torch.linalg.pinv(torch.stack(slopes) * width) @ violated.detach()[active])
            x = torch.minimum(torch.maximum(x - step, lower), upper)
        spread = torch.randint(-8, 9, (NEIGHBOURS, len(x)), generator=generator) * torch.finfo(DTYPE).eps
        near = torch.minimum(torch.maximum(x + spread * x.abs(), lower), upper)
        worst, _ = self._goal_gradients(near, torch.full((NEIGHBOURS,), goal))
        return near[worst.argsort()[:50]]


def inside_float32(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Points of the box near to x that float32 can hold, where there are some: onnxruntime gets them unrounded."""
    single = x.to(torch.float32)
    up = torch.nextafter(single, torch.full_like(single, torch.inf))
    down = torch.nextafter(single, torch.full_like(single, -torch.inf))
    single = torch.where(single.double() < lower, up, torch.where(single.double() > upper, down, single)).double()
    return torch.where((single >= lower) & (single <= upper), single, torch.minimum(torch.maximum(x, lower), upper))
