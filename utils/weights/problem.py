"""Questions about moves of weights: certified margins and certified radii in the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..bounds.passes import METHODS as PASSES
from ..certify.problem import MarginProblem
from ..certify.radius import MAX_EPS, search_radius
from ..choices.method import Method
from ..network.modules import usable_model
from ..network.state import plain_state
from ..perturbation.lp_ball import INF
from ..precision import full_precision
from ..question.arguments import as_norm
from ..question.question import Question
from ..question.threat import Threat
from .balls import WeightBalls
from .passes import WeightPass
from .places import Place, chosen_parameters, find_places

TINY = 1e-6  # eps at which the slope of margins in eps is taken


@dataclass(frozen=True)
class Weights:
    """Which parameters move, and how.

    Attributes:
        norm: 2 (of the whole matrix, Frobenius) or inf (of every entry).
        parameters: names in the module; None for all matrices and kernels.
        bias: whether vectors move too, where no names are given.
        relative: eps counts in units of each entry's size (inf), or of the matrix's norm (2).
    """

    norm: float = INF
    parameters: Sequence[str] | None = None
    bias: bool = False
    relative: bool = False

    def __post_init__(self):
        object.__setattr__(self, "norm", as_norm(self.norm))
        if self.norm not in (2.0, INF):
            raise ValueError(f"weights move in balls of p = 2 or inf, not {self.norm:g}")

    def units(self, model: nn.Module, places: dict[str, list[Place]], dtype: torch.dtype) -> dict[str, Tensor]:
        """Radii at eps = 1 of the parameters; see ``WeightBalls``."""
        found = {}
        for name in places:
            value = model.get_parameter(name).detach().to(dtype)
            if not self.relative:
                found[name] = value.new_ones(())
            elif self.norm == INF:
                found[name] = value.abs() if value.dim() > 1 else value.abs()[:, None]
            else:
                found[name] = torch.linalg.vector_norm(value)
        return found


class MovedWeights:
    """The parameters of one model that move, and their places in its graphs."""

    def __init__(self, model: nn.Module, x: Tensor, weights: Weights | None = None):
        self.weights, self.model = weights or Weights(), usable_model(model)
        names = chosen_parameters(self.model, self.weights.parameters, self.weights.bias)
        self._found, self._places = find_places(self.model, x, names), {}

    def places(self, dtype: torch.dtype) -> dict[str, list[Place]]:
        """Places whose scales have a precision, on the model's device."""
        key = dtype, next(self.model.parameters()).device
        if key not in self._places:
            known = self._found.items()
            self._places[key] = {name: [_on(place, *key) for place in own] for name, own in known}
        return self._places[key]

    def balls(self, eps: Tensor, dtype: torch.dtype) -> WeightBalls:
        """Balls of radii eps, (batch,), in units of the model's weights as they are."""
        units = self.weights.units(self.model, self.places(dtype), dtype)
        return WeightBalls(eps.to(dtype), self.weights.norm, units)


def _on(place: Place, dtype: torch.dtype, device: torch.device) -> Place:
    tensors = {name: value for name, value in vars(place).items() if isinstance(value, Tensor)}
    return replace(
        place, **{name: v.to(device, dtype if v.is_floating_point() else v.dtype) for name, v in tensors.items()}
    )


class WeightProblem(MarginProblem):
    """Margins of a batch over moves of the weights, of any eps, and of inputs in balls of a fixed ``input_eps``."""

    def __init__(
        self,
        question: Question,
        moved: MovedWeights,
        method: Method | None = None,
        input_eps: float = 0.0,
        shared: bool = True,
    ):
        super().__init__(question, method)
        if self.method.name not in PASSES:
            raise ValueError(f"moves of weights are bounded by {', '.join(PASSES)}, not by {self.method.name}")
        if question.threat.lengths is not None:
            raise ValueError("moves of weights are bounded over sequences of one length: leave out lengths")
        if question.offsets is not None or not input_eps >= 0:
            raise ValueError("input_eps must be a number >= 0")
        self.input_eps, self.moved, self.shared = input_eps, moved, shared

    def bounds(self, eps: Tensor, chosen: Tensor, dtype: torch.dtype, sound: bool = True) -> WeightPass:
        perturbation = self._perturbation(torch.full_like(eps, self.input_eps), chosen, dtype)
        balls, places = self.moved.balls(eps, dtype), self.moved.places(dtype)
        how = {"sound": sound, "shared": self.shared}
        return WeightPass(self.graph(dtype, chosen), perturbation, balls, places, self.method.name, **how)

    def linear_radius(self, dtype: torch.dtype, chosen: Tensor | slice = slice(None)) -> Tensor:
        """eps at which the worst margin would vanish if it went on as it begins, (m,)."""
        samples = torch.arange(len(self.x), device=self.x.device)[chosen]
        start, tiny = (self.x.new_full((len(samples),), eps, dtype=torch.float64) for eps in (0.0, TINY))
        first, then = (self.margins(eps, torch.float64, samples, sound=False) for eps in (start, tiny))
        radius = (TINY * first / (first - then)).amin(dim=1)
        return torch.where(radius.isfinite() & (radius > 0), radius, torch.ones_like(radius)).to(dtype)

    def resolution(self, dtype: torch.dtype, chosen: Tensor | slice = slice(None)) -> Tensor:
        """The spacing of floats of the model's precision at 1, (m,): no smaller eps certifies."""
        samples = torch.arange(len(self.x), device=self.x.device)[chosen]
        precision = next(self.moved.model.parameters()).dtype
        return torch.full((len(samples),), torch.finfo(precision).eps, dtype=dtype, device=self.x.device)


@full_precision()  # a network is read here
def weight_problem(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    targets: Tensor | None = None,
    *,
    norm: float = INF,
    parameters: Sequence[str] | None = None,
    bias: bool = False,
    relative: bool = False,
    method: str = "crown",
    relaxation: str = "plane",
    input_eps: float = 0.0,
    **threat: Any,
) -> WeightProblem:
    """The problem of ``certified_weight_margin``'s arguments."""
    told = {"norm" if name == "input_norm" else name: value for name, value in threat.items()}
    question = Question(model, x, labels, targets, Threat(**told))
    moved = MovedWeights(model, x, Weights(norm, parameters, bias, relative))
    return WeightProblem(question, moved, Method(method, relaxation), input_eps)


@plain_state()
def certified_weight_margin(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    eps: float | Tensor,
    *,
    targets: Tensor | None = None,
    dtype: torch.dtype | None = None,
    **arguments: Any,
) -> Tensor:
    """Lower bounds of the margins, (batch, n_specs), over all moves of the weights of size eps; differentiable.

    Each chosen parameter moves in a ball of its own, all at once; one that acts many times, as W_hh at every step,
    makes the same move each time.

    Args:
        model, x, labels, targets, dtype: as for ``utils.certify.certified_margin``; the model must be a module.
        eps: radius of every ball, a number or (batch,).
        norm: inf, for every entry, or 2, for the whole matrix.
        parameters: names of the parameters that move; None for all matrices and kernels.
        bias: whether vectors move as well, where no names are given.
        relative: eps counts in the entries' own sizes (inf) or the matrix's norm (2).
        method: "crown", "crown-ibp" or "ibp".
        relaxation: of an LSTM's or GRU's gate products.
        input_eps: radius of the inputs' balls, which move too; 0 leaves them as they are.
        input_norm, ball, frames, clip, features, scales: of these balls, as norm and so on are of ``certified_margin``.

    Raises:
        ValueError: an argument does not fit, or a parameter cannot be told from others in the graph.
    """
    problem = weight_problem(model, x, labels, targets, **arguments)
    dtype = dtype or problem.x.dtype
    return problem.question.arranged(problem.margins(problem.question.eps(eps, dtype), dtype))


@plain_state()
@torch.no_grad()
def certified_weight_radius(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    *,
    targets: Tensor | None = None,
    tol: float = 1e-3,
    max_eps: float = MAX_EPS,
    dtype: torch.dtype = torch.float64,
    batch_size: int = 100,
    **arguments: Any,
) -> Tensor:
    """The largest eps that certified, (batch,); see ``certified_weight_margin`` and ``certified_radius``."""
    problem = weight_problem(model, x, labels, targets, **arguments)
    return search_radius(problem, tol=tol, max_eps=max_eps, dtype=dtype, batch_size=batch_size).radius
