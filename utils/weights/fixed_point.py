"""Fixed-point weights: how many bits after the point keep every prediction, proved and tried.

Rounded to multiples of 2^-b, no weight moves by more than 2^-(b + 1): an l_inf ball of all parameters.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..certify.problem import SLACK
from .problem import WeightProblem

MOST_BITS = 24
AT_ONCE = 500


@torch.no_grad()
def certified_bits(problem: WeightProblem, most: int = MOST_BITS, dtype: torch.dtype = torch.float64) -> Tensor:
    """Per sample the fewest bits after the point at which all margins are certified, (batch,); most + 1 for none.

    The problem's weights must move in l_inf balls, not relative ones.
    """
    weights = problem.moved.weights
    if weights.relative or weights.norm == 2.0:
        raise ValueError("rounding moves every weight by as much: take norm inf, and not relative")
    going = torch.arange(len(problem.x), device=problem.x.device)
    found = torch.full((len(problem.x),), most + 1, device=problem.x.device)
    for bits in range(most, 0, -1):  # small moves first: their bounds cost least
        going = torch.cat([part[_certifies(problem, part, 2.0 ** -(bits + 1), dtype)] for part in going.split(AT_ONCE)])
        found[going] = bits
        if not len(going):
            break
    return found


def _certifies(problem: WeightProblem, samples: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    if dtype not in SLACK:
        raise ValueError(f"margins are bounded in torch.float32 or torch.float64, not {dtype}")
    radii = torch.full((len(samples),), eps, dtype=dtype, device=samples.device)
    return (problem.margins(radii, dtype, samples) > problem.slack(dtype, samples)).all(dim=1)


@torch.no_grad()
def rounded(model: nn.Module, bits: int, parameters: list[str]) -> nn.Module:
    """A copy whose parameters of these names are the nearest multiples of 2^-bits."""
    twin = copy.deepcopy(model)
    for name in parameters:
        value = twin.get_parameter(name)
        value.copy_((value * 2.0**bits).round() / 2.0**bits)
    return twin
