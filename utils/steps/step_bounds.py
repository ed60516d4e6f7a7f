"""Certified radii of single steps of a sequence: one word or one pen stroke moves, all the others are exact.

What comes before the perturbed step is exact, so it is run beforehand, and the bound begins there from the state that
was reached. So the first step is the perturbed one in every sample of a batch, whichever sequences and places its steps
are from. A batch begins with the steps after which most follow, and frames after a sample's end are not bounded for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attack.pgd import attack_radius
from ..certify.problem import MarginProblem
from ..certify.radius import search_radius
from ..choices.method import Method
from ..graph.graph import Graph
from ..network.models import SequenceClassifier
from ..network.unroll import unroll
from ..question.question import Question
from ..question.threat import Threat

VERDICT = torch.float64
MAX_BATCH = 200


@dataclass
class Continuation:
    """A classifier as ``unroll`` reads it, with an initial state (layers, batch, hidden) of every sample's own."""

    model: SequenceClassifier
    h0: Tensor
    c0: Tensor | None

    def __getattr__(self, name: str):
        return getattr(self.model, name)


class ContinuedProblem(MarginProblem):
    """A margin problem of sequences that go on from given states, (layers, batch, hidden) each."""

    def __init__(self, state: tuple[Tensor, ...], question: Question, method: Method):
        self.state = state
        super().__init__(question, method)

    def graph(self, dtype: torch.dtype, chosen: Tensor | slice = slice(None), bounded: bool = True) -> Graph:
        h0, *c0 = (part[:, chosen] for part in self.state)
        continued = Continuation(self.model, h0, c0[0] if c0 else None)
        lengths = self.threat.lengths[chosen]
        falling = bool((lengths[1:] <= lengths[:-1]).all())
        return unroll(continued, int(lengths.max()), dtype, self.method.relaxation, lengths, falling)


@dataclass
class StepResult:
    """What was found for every step, (batch, T) each; NaN after a sequence's end.

    Attributes:
        radius: the largest eps that was certified; 0 if none was.
        failed: the smallest eps that was not certified; inf if there was none up to the largest that was tried.
        evaluations: how many bounds were computed.
        seconds: wall time of the step's batch, divided by the number of steps in it.
    """

    radius: Tensor
    failed: Tensor
    evaluations: Tensor
    seconds: Tensor


@torch.no_grad()
def states_before(model: SequenceClassifier, x: Tensor) -> tuple[Tensor, ...]:
    """The states (h,) or (h, c) before every frame of x, (T, layers, batch, hidden) each, in the precision of x."""
    rnn = model.rnn
    exact = type(rnn)(
        rnn.input_size,
        rnn.hidden_size,
        rnn.num_layers,
        bias=rnn.bias,
        batch_first=True,
        **({"nonlinearity": rnn.nonlinearity} if isinstance(rnn, nn.RNN) else {}),
    ).to(x)
    exact.load_state_dict(rnn.state_dict())
    like = x.new_zeros(rnn.num_layers, len(x), rnn.hidden_size)
    given = (model.h0, model.c0) if isinstance(rnn, nn.LSTM) else (model.h0,)
    state = tuple(like if part is None else (like + part[:, None].to(x)) for part in given)
    states = [state]
    frames = (x - model.mean.to(x)) / model.std.to(x)
    for t in range(x.shape[1] - 1):
        _, after = exact(frames[:, t : t + 1], state if len(state) == 2 else state[0])
        state = after if isinstance(after, tuple) else (after,)
        states.append(state)
    return tuple(torch.stack(part) for part in zip(*states, strict=True))


def check_steps(model: SequenceClassifier) -> None:
    """Raise ValueError if single steps of the model cannot be bounded from the state before them."""
    if not model.is_bare:
        raise ValueError(
            f"single steps need a model whose recurrent layer reads x itself, not a {type(model).__name__}"
        )
    if model.rnn.bidirectional:
        raise ValueError("single steps need a model that reads forwards only, not a bidirectional one")
    if model.pooling != "last":
        raise ValueError(f"single steps need a model that classifies by its last state, not by the {model.pooling}")


@torch.no_grad()
def step_radii(
    model: SequenceClassifier,
    x: Tensor,
    labels: Tensor,
    lengths: Tensor,
    *,
    norm: float = 2.0,
    relaxation: str = "plane",
    tol: float = 1e-3,
    max_eps: float = 1e6,
    dtype: torch.dtype = VERDICT,
    batch_size: int = MAX_BATCH,
) -> StepResult:
    """The certified radius of every single step of every sequence, against all other classes.

    Args:
        model: reads forwards only and classifies by its last state; any number of layers.
        x: (batch, T, n) sequences; frames at and after their ``lengths``, (batch,), do not count.
        labels: (batch,) classes that must win; steps of misclassified sequences get 0.
        norm, relaxation, tol, max_eps, dtype: as for ``utils.certify.certified_radius``.
        batch_size: most steps that are bounded at once.
    """
    check_steps(model)
    x, labels, lengths = x.to(dtype), labels.to(x.device), lengths.to(x.device)
    states = states_before(model, x)
    columns = {name: x.new_full(x.shape[:2], torch.nan) for name in StepResult.__annotations__}
    for sample, step in step_batches(lengths, batch_size):
        started = time.perf_counter()
        rest = lengths[sample] - step
        frames = (step[:, None] + torch.arange(int(rest.max()), device=x.device)).clamp(max=x.shape[1] - 1)
        state = tuple(part[step, :, sample].transpose(0, 1) for part in states)
        threat = Threat(norm, frames=0, lengths=rest)
        question = Question(model, x[sample[:, None], frames], labels[sample], threat=threat)
        problem = ContinuedProblem(state, question, Method(relaxation=relaxation))
        found = search_radius(problem, tol=tol, max_eps=max_eps, dtype=dtype, batch_size=len(sample))
        columns["radius"][sample, step] = found.radius.to(x)
        columns["failed"][sample, step] = found.failed.to(x)
        columns["evaluations"][sample, step] = found.evaluations.to(x)
        columns["seconds"][sample, step] = (time.perf_counter() - started) / len(sample)
    return StepResult(**columns)


def step_batches(lengths: Tensor, batch_size: int = MAX_BATCH) -> Iterator[tuple[Tensor, Tensor]]:
    """All steps of sequences of the given lengths in batches, (sample, step), (m,) each, longest rest first."""
    longest = torch.arange(int(lengths.max()), device=lengths.device)
    sample, step = (longest < lengths[:, None]).nonzero(as_tuple=True)
    rest = lengths[sample] - step
    order = rest.argsort(descending=True, stable=True)
    yield from zip(sample[order].split(batch_size), step[order].split(batch_size), strict=True)


@torch.no_grad()
def sequence_radii(
    model: SequenceClassifier,
    x: Tensor,
    labels: Tensor,
    lengths: Tensor,
    *,
    norm: float = 2.0,
    relaxation: str = "plane",
    tol: float = 1e-3,
    max_eps: float = 1e6,
    dtype: torch.dtype = VERDICT,
    batch_size: int = MAX_BATCH,
) -> Tensor:
    """The certified radius, (batch,), if every step of a sequence moves, each in a ball of its own."""
    radius = x.new_zeros(len(x), dtype=dtype)
    labels, lengths = labels.to(x.device), lengths.to(x.device)
    for length in sorted(set(lengths.tolist())):
        for rows in (lengths == length).nonzero().squeeze(-1).split(batch_size):
            question = Question(model, x[rows, :length].to(dtype), labels[rows], threat=Threat(norm))
            problem = MarginProblem(question, Method(relaxation=relaxation))
            radius[rows] = search_radius(problem, tol=tol, max_eps=max_eps, dtype=dtype, batch_size=len(rows)).radius
    return radius


def step_attacks(
    model: SequenceClassifier,
    x: Tensor,
    labels: Tensor,
    lengths: Tensor,
    *,
    norm: float = 2.0,
    tol: float = 0.05,
    steps: int = 10,
    restarts: int = 1,
    batch_size: int = MAX_BATCH,
) -> Tensor:
    """Size of the smallest change of every single step, (batch, T), by which PGD changes the class: an upper bound.

    inf where none was found, NaN after a sequence's end.
    """
    radius = torch.full(x.shape[:2], torch.nan, dtype=VERDICT, device=x.device)
    labels, lengths = labels.to(x.device), lengths.to(x.device)
    samples, positions = (lengths[:, None] > torch.arange(x.shape[1], device=x.device)).nonzero(as_tuple=True)
    for length in sorted(set(lengths.tolist())):
        chosen = (lengths[samples] == length).nonzero().squeeze(-1)
        for rows in chosen.split(batch_size):
            sample, step = samples[rows], positions[rows]
            mask = step[:, None] == torch.arange(length, device=x.device)
            threat = {"norm": norm, "frames": mask, "tol": tol, "steps": steps, "restarts": restarts}
            found = attack_radius(model, x[sample, :length], labels[sample], batch_size=batch_size, **threat)
            radius[sample, step] = found.radius
    return radius
