"""A cascade: every sample is misclassified, broken by an attack, verified, or undecided in the end.

What a stage settles the later ones do not see: a verified sample needs no attack, a broken one no bound. An outcome is
never an estimate: "verified" is a lower bound in float64 that exceeds the slack for rounding, as that of a certified
radius does, "broken" an input inside the set whose margin in float64 is below 0.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...attack.pgd import pgd
from ...choices.method import Method
from ...clock import Pace, now, share_of
from ...graph.graph import Graph
from ...network.constants.extra import Extra
from ...network.state import plain_state
from ...question.arguments import as_inputs
from ...question.question import Question
from ...question.threat import threat_of
from ..bab import TUNED_SHARE, TUNING, certify_until
from ..problem import MarginProblem
from .settings import ATTACK_STAGES, CLEAN, TUNED_STAGES, CascadeResult, Effort, StageCost

DTYPE = torch.float64  # of every verdict
QUICK_STEPS = 10  # of the attack against the runner-up: it finds nine of ten that "pgd" does in a thirtieth of the time
# Samples that a stage takes before it looks whether it should give up.
AT_ONCE = {CLEAN: 1000, "ibp": 1000, "runner-up": 1000, "pgd": 100, "crown-ibp": 200, "crown": 50}
PATH_BYTES = 2**29  # of the values and gradients of an attack's paths at once
LEAST_LIMIT = 1e-9  # seconds for what is dear, where none are left
AT_ONCE |= {"alpha": 10, "curve": 1, "bab": 1}


@plain_state()
@torch.no_grad()
def cascade(
    model: nn.Module | Graph,
    x: Tensor,
    labels: Tensor,
    eps: float | Tensor,
    *,
    effort: Effort | None = None,
    relaxation: str = "plane",
    progress: bool = False,
    extra: Any = None,
    **threat: Any,
) -> CascadeResult:
    """Settle every sample at eps, against all other classes, by the cheapest stage that can.

    Samples that a module computes in ways of their own, as their masks or lengths differ, are settled kind by kind,
    each kind in its share of the time limit.

    Args:
        model, x, labels, eps, relaxation, extra: as for ``utils.certify.certified_margin``.
        effort: the stages and their limits.
        progress: show a bar of settled samples, on a terminal.
        threat: norm, frames, clip and ball.

    Raises:
        ValueError: an argument does not fit; the message says which.
    """
    effort = effort or Effort()
    told = threat_of(**threat)
    if told.lengths is not None:
        raise ValueError("a cascade takes sequences of one length: leave out lengths, and cut x")
    limits = {name: getattr(effort, name) for name in ("alpha_steps", "curve_steps", "time_limit")}
    x = as_inputs(x)
    extra = Extra.of(extra, len(x))
    problem = MarginProblem(
        Question(model, x, labels, None, told, extra=extra), Method(relaxation=relaxation, **limits)
    )
    problem.threat.check_even("cascades")
    eps = problem.question.eps(eps, DTYPE)
    whole, left = CascadeResult.open(len(problem.x)), effort.total_limit
    with tqdm(total=len(problem.x), unit="sample", disable=None if progress else True) as bar:
        open_samples = len(problem.x)
        for members, own in problem.groups():
            share = replace(effort, total_limit=max(left * len(members) / open_samples, LEAST_LIMIT))
            inputs = x[members.to(x.device)], eps[members], extra.part(members.cpu())
            run = _Cascade(own, model, *inputs, share, threat)
            run.settle_all(bar)
            whole.include(run.result, members.tolist())
            left -= sum(cost.seconds for cost in run.result.costs if cost.stage in TUNED_STAGES)
            open_samples -= len(members)
    return whole


class _Cascade:
    """The samples, what is known of them, and the stages.

    Attributes:
        promise: (batch,): a stage of bounds begins with the greatest, an attack with the least. It is the margin of
            the unperturbed input, then the attack's, then the bound by planes.
    """

    def __init__(
        self,
        problem: MarginProblem,
        model: nn.Module | Graph,
        x: Tensor,
        eps: Tensor,
        extra: Extra,
        effort: Effort,
        threat: dict[str, Any],
    ):
        self.problem, self.model, self.x, self.eps, self.extra, self.effort = problem, model, x, eps, extra, effort
        self.threat = threat | {"frames": problem.threat.frames}
        rows = problem.rows
        self.labels, self.others = problem.question.labels, problem.question.others
        self.runner_up = None if self.others is None else self.others[:, 0].clone()
        self.promise = torch.full((len(rows),), -torch.inf, dtype=DTYPE, device=self.eps.device)
        self.result = CascadeResult.open(len(rows))
        self.deadline = math.inf

    def settle_all(self, bar: tqdm) -> None:
        """All stages, one after the other."""
        for stage in (CLEAN, *self.effort.stages):
            bar.set_postfix_str(stage)
            left = self.result.undecided.to(self.eps.device)
            if stage in TUNED_STAGES and self.deadline == math.inf:
                self.deadline = now() + self.effort.total_limit
            cost = StageCost(stage)
            with _timed(cost):
                if len(left):
                    self._try(stage, left, cost, bar)
            self.result.costs.append(cost)

    def _try(self, stage: str, left: Tensor, cost: StageCost, bar: tqdm) -> None:
        """Take the samples in turn, the most promising first, until as many in a row as patience allows are left."""
        order = self.promise[left].argsort(descending=stage not in ATTACK_STAGES, stable=True)
        in_vain, bounds = 0, torch.full_like(self.promise, -torch.inf)
        for chosen in left[order].split(AT_ONCE[stage]):
            if self._gives_up(stage, in_vain):
                break
            bounds[chosen], settled = self._settle(stage, chosen)
            places = settled.nonzero().squeeze(-1)
            in_vain = len(chosen) - 1 - int(places[-1]) if len(places) else in_vain + len(chosen)
            cost.tried += len(chosen)
            cost.settled += len(places)
            bar.update(len(places))
        if stage in (CLEAN, *ATTACK_STAGES):  # an attack that gave up leaves the margins of those before it
            self.promise = torch.where(bounds > -torch.inf, bounds, self.promise)
        elif stage in ("crown", *TUNED_STAGES):
            self.promise = bounds

    def _gives_up(self, stage: str, in_vain: int) -> bool:
        patience = self.effort.patience
        if stage == CLEAN:
            return False
        if stage in TUNED_STAGES:
            return now() >= self.deadline or (patience is not None and in_vain >= max(1, patience // 10))
        return patience is not None and in_vain >= patience

    def _settle(self, stage: str, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Margins of the chosen samples, found by a stage, and which of them it settled, (m,) each."""
        if stage == CLEAN:
            return self._misclassified(chosen)
        if stage in ATTACK_STAGES:
            return self._attacked(stage, chosen)
        return self._bounded_in_time(stage, chosen) if stage in ("curve", "bab") else self._bounded(stage, chosen)

    def _misclassified(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        margins = self.problem.clean_margins(DTYPE, chosen)
        worst, place = margins.min(dim=1)
        if self.runner_up is not None:
            self.runner_up[chosen] = self.others[chosen].gather(1, place[:, None]).squeeze(1)
        wrong = ~(worst > 0)
        self._record("wrong", CLEAN, chosen[wrong], worst[wrong])
        return worst, wrong

    def _attacked(self, stage: str, chosen: Tensor) -> tuple[Tensor, Tensor]:
        quick = stage == "runner-up"
        how = {"steps": QUICK_STEPS if quick else self.effort.steps, "restarts": self.effort.restarts}
        how |= {"targets": self.runner_up[chosen]} if quick and self.runner_up is not None else {}
        threat = self.threat | {"frames": self.threat["frames"][chosen], "extra": self.extra.part(chosen.cpu())}
        inputs = (self.model, self.x[chosen], self.labels[chosen], self.eps[chosen])
        paths = how["restarts"] + 1 if quick else (how["restarts"] + 1) * self.problem.rows.shape[1]
        size = min(len(chosen), max(1, PATH_BYTES // (paths * self._path_bytes())))
        found = pgd(*inputs, seed=self.effort.seed, batch_size=size, **how, **threat)
        broken = found.margin < 0
        self._record("broken", stage, chosen[broken], found.margin[broken])
        for sample, example in zip(chosen[broken].tolist(), found.x[broken], strict=True):
            self.result.examples[sample] = example
        return found.margin, broken

    def _path_bytes(self) -> int:
        """Of all values of one sample and their gradients, in the precision of a descent."""
        graph = self.problem.graph(torch.float32, slice(0, 1))
        return 2 * torch.float32.itemsize * sum(node.size for node in graph.nodes)

    def _bounded(self, method: str, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """By one bound; slopes are tuned to samples together, which costs less than one after the other."""
        problem, eps = self.problem.by(method).part(chosen), self.eps[chosen]
        if method == "alpha":
            deadline = share_of(self._end(len(chosen)), TUNED_SHARE)
            problem.tune(eps, TUNING, self.effort.alpha_steps, pace=Pace(deadline))
        margins, resolution = problem.margins(eps, DTYPE), problem.resolution(DTYPE)
        resolution = resolution if eps.dim() == 1 else resolution[:, None]
        resolved = ((eps == 0) | (eps >= resolution)).reshape(len(chosen), -1).all(dim=1)
        certified = resolved & (margins > problem.slack(DTYPE)).all(dim=1)
        return self._keep_bounds(method, chosen, margins.amin(dim=1), certified)

    def _bounded_in_time(self, method: str, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """One sample, by bounds that take longer and longer."""
        certified, margins = certify_until(self.problem.by(method).part(chosen), self.eps[chosen], self._end(1))
        return self._keep_bounds(method, chosen, margins.amin()[None], torch.tensor([certified], device=margins.device))

    def _end(self, samples: int) -> float:
        """When a tuned stage must be done with so many samples."""
        return min(now() + samples * self.effort.time_limit, self.deadline)

    def _keep_bounds(self, stage: str, chosen: Tensor, worst: Tensor, certified: Tensor) -> tuple[Tensor, Tensor]:
        known = self.result.margins[chosen.cpu()].to(worst.device)
        best = torch.where(worst > known, worst, known)  # NaN is no bound
        self.result.margins[chosen.cpu()] = best.cpu()
        self._record("verified", stage, chosen[certified], best[certified])
        return best, certified

    def _record(self, outcome: str, stage: str, samples: Tensor, margins: Tensor) -> None:
        self.result.margins[samples.cpu()] = margins.cpu()
        for sample in samples.tolist():
            if self.result.outcomes[sample] != "undecided":
                raise RuntimeError(f"sample {sample} is settled twice")
            self.result.outcomes[sample], self.result.settled_by[sample] = outcome, stage


@contextmanager
def _timed(cost: StageCost) -> Iterator[None]:
    """Writes the seconds of what is done inside."""
    started, begun = time.perf_counter(), time.process_time()
    yield
    cost.seconds, cost.processor_seconds = time.perf_counter() - started, time.process_time() - begun
