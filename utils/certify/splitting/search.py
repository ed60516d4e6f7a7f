"""Branch and bound over the phases of piecewise-linear neurons, for one sample and every open row of its spec matrix.

Of the open parts those with the least bounds are split at once: a neuron is chosen for each by what its planes cost,
the most costly are tried out by bounds of both halves, and the pair whose worse half has the greater bound is kept
(filtered smart branching: De Palma et al., 2021). Then slopes and multipliers of the new parts are tuned, and parts
whose bounds are above what is asked for are done.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ...bounds.alpha import SlopeTable, default_slopes, nonlinear_nodes, select
from ...bounds.splits import CutPass, Cuts, Narrowed, Neurons, knot_of, raise_linear, tune_parts
from ...clock import Pace, now
from ...graph.graph import Graph
from .parts import Parts
from .question import TUNING, SplitQuestion

ROOT_STEPS, TUNING_STEPS = 40, 10  # gradient steps for the whole set and for new parts
LAST_STEPS = 200  # for parts in which all is linear
BETTER_SHARE = 0.1  # of the better half's lead in what a cut is worth
TRIED = 10  # neurons of a part whose halves are bounded before one is chosen
PART_BYTES = 2**27  # of coefficients of parts that are worked on at once
OPEN_BYTES = 2**29  # of the slopes of parts that are kept; with more the search ends


@torch.no_grad()
def split_rows(question: SplitQuestion, known: Tensor, enough: Tensor, deadline: float) -> Tensor:
    """Lower bounds of a question's rows, raised until all are above ``enough`` or time is up.

    Args:
        question: the set and its rows.
        known: lower bounds that are known, (n_rows,).
        enough: what they need to exceed, (n_rows,).
        deadline: ``clock.now()`` at which the search ends.

    Returns:
        Lower bounds, (n_rows,): a row's is the least of its parts'.
    """
    return _Search(question, known, enough, deadline).run()


class _Search:
    """The parts of one sample's set that are open, and the best bounds of those that are done.

    Attributes:
        known, done, enough: (n_rows,): bounds over the whole set, the least over the parts that are done, and what is
            asked for.
        visited: parts that were bounded.
        in_vain: whether a part without neurons to split has a bound that is too low.
    """

    def __init__(self, question: SplitQuestion, known: Tensor, enough: Tensor, deadline: float):
        self.question, self.enough, self.deadline = question, enough, deadline
        self.known, self.done = known, torch.full_like(known, torch.inf)
        self.visited, self.in_vain = 0, False
        self.last = (1, 0.0)  # parts of the last round, and its seconds
        self._prepare()

    def _prepare(self) -> None:
        """Intervals of all neurons over the whole set, and a part that is all of it for every open row."""
        question, device = self.question, self.known.device
        dtype, whole, one = question.dtype, question.whole, torch.zeros(1, dtype=torch.long, device=device)
        whole.margin(question.rows[None])
        self.graphs = {kind: question.graph_of(kind) for kind in (dtype, TUNING)}
        self.neurons = {kind: Neurons(graph) for kind, graph in self.graphs.items()}
        known = Narrowed({node.index: whole.interval(node) for node in self.neurons[dtype].nodes})
        self.whole = {kind: known.to(kind) for kind in (dtype, TUNING)}
        open_rows = (self.known <= self.enough).nonzero().squeeze(1)
        count = len(open_rows)
        slopes = _flat_below(select(default_slopes(whole), one.expand(count), TUNING), whole.graph)
        like = torch.empty(0, dtype=TUNING, device=device)
        self.open = Parts(open_rows, self.known[open_rows], Cuts.none(count, like), slopes)
        self.done[self.known > self.enough] = self.known[self.known > self.enough]
        widest = max(node.size for node in whole.graph.nodes)
        self.at_once = max(2, min(256, PART_BYTES // (8 * widest * (1 + TRIED))))
        self.most_open = max(64, OPEN_BYTES // (8 * sum(node.size for node in nonlinear_nodes(whole.graph))))
        whole_parts, self.open = self.open, self.open[:0]
        with self._timed(len(whole_parts)):
            self._keep(self._tuned(whole_parts, ROOT_STEPS))

    @contextmanager
    def _timed(self, parts: int) -> Iterator[None]:
        began = now()
        yield
        self.last = (parts, now() - began)

    def run(self) -> Tensor:
        """Rounds until no part is open, one cannot be split, or time or memory is up."""
        while 0 < len(self.open) < self.most_open and not self.in_vain:
            parts = self._affordable(min(self.at_once, 2 * len(self.open)))
            if parts < 2:
                break
            with self._timed(parts):
                self._round(parts // 2)
        best = self.done.clone()
        best.scatter_reduce_(0, self.open.row, self.open.bound, "amin")
        return torch.maximum(self.known, best)

    def _affordable(self, parts: int) -> int:
        """At most so many that a round of them ends in time: it takes as long as the last, or as it had more parts."""
        last, seconds = self.last
        left = self.deadline - now()
        return 0 if left < seconds else min(parts, int(last * left / max(seconds, 1e-9)))

    def _round(self, count: int) -> None:
        """Split so many of the open parts, those with the least bounds."""
        order = self.open.bound.argsort()
        taken, self.open = self.open[order[:count]], self.open[order[count:]]
        passed = self._pass(taken, TUNING)
        passed.margin(self._rows(taken, TUNING))
        numbers, points, losses = self._candidates(passed)
        splittable = losses.amax(dim=1) > 0
        if not bool(splittable.all()):  # linear there: multipliers alone can raise the bound, or nothing can
            last = self._linear(taken[(~splittable).nonzero().squeeze(1)])
            self.done.scatter_reduce_(0, last.row, last.bound, "amin")
            self.in_vain = bool((last.bound <= self.enough[last.row]).any())
        if bool(splittable.any()):
            chosen = splittable.nonzero().squeeze(1)
            halves = self._halves(taken[chosen], numbers, points, losses[chosen])
            self._keep(self._tuned(halves, TUNING_STEPS))

    def _keep(self, tuned: Parts) -> None:
        """Parts that are still open join the others."""
        self.visited += len(tuned)
        closed = (tuned.bound > self.enough[tuned.row]) | tuned.bound.isinf()
        self.done.scatter_reduce_(0, tuned.row[closed], tuned.bound[closed], "amin")
        still = tuned[(~closed).nonzero().squeeze(1)]
        self.open = still if len(self.open) == 0 else self.open.join(still)

    def _halves(self, parts: Parts, numbers: Tensor, points: Tensor, losses: Tensor) -> Parts:
        """Both halves of each part, by the candidate that promises most."""
        tried = min(TRIED, losses.shape[1])
        losses, place = losses.topk(tried, dim=1)
        neuron, point = numbers[place], points[place]
        copies = torch.arange(len(parts), device=neuron.device).repeat_interleave(tried)
        halves = parts[copies].halves(neuron.flatten(), point.flatten())
        found = self._pass(halves, TUNING).margin(self._rows(halves, TUNING)).view(2, len(parts), tried)
        best = torch.where(losses > 0, _promise(found), -torch.inf).argmax(dim=1, keepdim=True)
        return parts.halves(neuron.gather(1, best).squeeze(1), point.gather(1, best).squeeze(1))

    def _candidates(self, passed: CutPass) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers and points of all neurons that may be cut, and what their planes cost each part, (parts, neurons)."""
        nothing = passed.cuts.point.new_zeros(1)
        numbers, points, losses = [nothing.long()], [nothing], [nothing.expand(len(passed.empty), 1)]
        for node, loss in passed.losses.items():
            operand, knot = node.parents[0], knot_of(node)
            own, sign = passed.neurons.read_by(operand)
            numbers.append(own.to(loss.device))
            points.append(torch.full((node.size,), sign * knot, dtype=loss.dtype, device=loss.device))
            low, high = passed.interval(operand)
            losses.append(torch.where((low < knot) & (high > knot), loss, 0.0))
        return torch.cat(numbers), torch.cat(points), torch.cat(losses, dim=1)

    def _tuned(self, parts: Parts, steps: int) -> Parts:
        """The parts with better slopes and multipliers, and bounds that hold."""
        narrow = self._pass(parts, TUNING).narrowed()
        rows = self._rows(parts, TUNING)
        cuts, slopes, _ = tune_parts(
            lambda cuts, slopes: self._pass(parts, TUNING, cuts, slopes, narrow),
            rows,
            parts.cuts,
            parts.slopes,
            steps,
            self.enough[parts.row].to(TUNING),
            Pace(self.deadline),
        )
        return self._bounded(Parts(parts.row, parts.bound, cuts, slopes))

    def _linear(self, parts: Parts) -> Parts:
        """Parts in which the network is linear, with better multipliers."""
        dtype = self.question.dtype
        parts = Parts(parts.row, parts.bound, parts.cuts.to(dtype), parts.slopes)
        narrow = self._pass(parts, dtype).narrowed()

        def make(cuts: Cuts, slopes: None) -> CutPass:
            return self._pass(parts, dtype, cuts, slopes, narrow)

        enough, pace = self.enough[parts.row], Pace(self.deadline)
        cuts = raise_linear(make, self._rows(parts, dtype), parts.cuts, LAST_STEPS, enough, pace)
        return self._bounded(Parts(parts.row, parts.bound, cuts, parts.slopes))

    def _bounded(self, parts: Parts) -> Parts:
        """With bounds that hold."""
        dtype, cuts, slopes = self.question.dtype, parts.cuts, parts.slopes
        passed = self._pass(parts, dtype, cuts.to(dtype), select(slopes, slice(None), dtype))
        bound = passed.margin(self._rows(parts, dtype))
        return Parts(parts.row, torch.maximum(parts.bound, bound.squeeze(1)), cuts, slopes)

    def _rows(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        return self.question.rows[parts.row, None].to(dtype)

    def _pass(
        self,
        parts: Parts,
        dtype: torch.dtype,
        cuts: Cuts | None = None,
        slopes: SlopeTable | None = None,
        narrow: Narrowed | None = None,
    ) -> CutPass:
        """Over the parts; sound in the question's own precision."""
        return CutPass(
            self.graphs[dtype],
            self.question.set_of(len(parts), dtype),
            self.neurons[dtype],
            self.whole[dtype] if narrow is None else narrow,
            parts.cuts if cuts is None else cuts,
            parts.slopes if slopes is None else slopes,
            sound=dtype == self.question.dtype,
            fresh=narrow is None,
        )


def _promise(bounds: Tensor) -> Tensor:
    """How good a cut is, by the bounds of its halves, (2, ...): the worse half counts, and the other a little.

    inf is the bound of an empty half: nothing is better than a cut that leaves one part.
    """
    worse, better = bounds.amin(dim=0), bounds.amax(dim=0)
    return worse + BETTER_SHARE * torch.where(better.isinf(), worse.abs() + 1.0, better - worse)


def _flat_below(slopes: SlopeTable, graph: Graph) -> SlopeTable:
    """With lower lines of slope 0 where a function has two pieces: there ascent begins nearest to intervals' bounds."""
    return [
        entry if knot_of(node) is None or entry is None else ((torch.zeros_like(entry[0][0]),), entry[1])
        for node, entry in zip(nonlinear_nodes(graph), slopes, strict=True)
    ]
