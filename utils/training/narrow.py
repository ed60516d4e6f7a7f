"""Recurrent classifiers that begin with more units than they end with: those that matter least go, a few an epoch.

What a network comes to is much a matter of its start; a wider one learns more, and keeps most of it if it is narrowed
slowly. Which units go is told by the first-order criterion of Molchanov et al. 2019 (Importance Estimation).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..network.models import SequenceClassifier
from ..runs.ranks import ALONE, Ranks

SCORED, SCORED_AT_ONCE = 10_000, 500
SHARES = (0.0, 0.35)
LossOf = Callable[[Tensor, Tensor], Tensor]


def check_narrowing(args: argparse.Namespace) -> None:
    """Raise ValueError if --start-size and --narrow-shares contradict other flags, or have no effect."""
    if args.start_size is None:
        if args.narrow_shares is not None:
            raise ValueError("--narrow-shares is for networks that begin wider: give --start-size too")
        return
    if args.start_size <= args.hidden_size:
        raise ValueError(f"--start-size must be above --hidden-size {args.hidden_size}, not {args.start_size}")
    if args.num_layers > 1 or args.bidirectional:
        raise ValueError("--start-size is for networks of one layer that reads in one direction")
    first, last = shares_of(args)
    if not 0.0 <= first < last <= 1.0:
        raise ValueError(f"--narrow-shares must rise within 0 and 1, not be {first:g} and {last:g}")


def shares_of(args: argparse.Namespace) -> tuple[float, float]:
    return SHARES if args.narrow_shares is None else tuple(args.narrow_shares)


def narrowing_of(args: argparse.Namespace, model: nn.Module, adam: torch.optim.Optimizer) -> Narrowing | None:
    """What --start-size asks for; None of scripts without that flag, and where it is left out."""
    if getattr(args, "start_size", None) is None:
        return None
    return Narrowing(model, adam, args.hidden_size, shares_of(args))


class Narrowing:
    """Takes units from a classifier with one recurrent layer, and what its optimiser knows of them, between two shares.

    Args:
        model: the classifier, changed in place; it has as many units as the training begins with.
        adam: its optimiser.
        last: units in the end.
        shares: of the steps, when the first units go and when the last ones have gone; the number falls by equal
            factors.
    """

    def __init__(self, model: SequenceClassifier, adam: torch.optim.Optimizer, last: int, shares: tuple[float, float]):
        self.model, self.adam, self.last, self.shares = model, adam, last, shares
        self.first = self.units

    @property
    def units(self) -> int:
        return self.model.rnn.hidden_size

    def wanted(self, progress: float) -> int:
        """How many units are left after a share ``progress`` of the steps."""
        begin, end = self.shares
        share = min(1.0, max(0.0, (progress - begin) / (end - begin)))
        return round(self.first * (self.last / self.first) ** share)

    def advance(self, loss_of: LossOf, x: Tensor, y: Tensor, progress: float, ranks: Ranks = ALONE) -> bool:
        """Take the units that are not to be there at ``progress``; whether there were any.

        ``loss_of`` is the mean loss of a batch of x, (N, T, n), and y, (N,), by whose first images units are told.
        """
        wanted = self.wanted(progress)
        if wanted >= self.units:
            return False
        self.model.train()  # gradients through a recurrent layer on a GPU are of training only
        scores = importance(self.model, loss_of, x[:SCORED], y[:SCORED])
        self.keep(ranks.of_first(torch.topk(scores, wanted).indices.sort().values))
        return True

    def keep(self, units: Tensor) -> None:
        """Leave only these units, (k,), in this order."""
        hidden, rnn, head = self.units, self.model.rnn, self.model.head
        places = [(rnn, name) for name, _ in rnn.named_parameters()] + [(head, "weight")]
        for module, name in places:
            old = getattr(module, name)
            new = nn.Parameter(part_of(old.detach(), module is head, name, hidden, units))
            setattr(module, name, new)
            for group in self.adam.param_groups:
                group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
            if old in self.adam.state:
                self.adam.state[new] = {
                    key: part_of(value, module is head, name, hidden, units) if value.shape == old.shape else value
                    for key, value in self.adam.state.pop(old).items()
                }
        rnn.hidden_size = head.in_features = len(units)
        rnn.flatten_parameters()

    def state_dict(self) -> dict[str, int]:
        return {"units": self.units}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Make the classifier as narrow as it was; its weights are still to be put back."""
        self.keep(torch.arange(state["units"], device=self.model.head.weight.device))


def importance(model: SequenceClassifier, loss_of: LossOf, x: Tensor, y: Tensor) -> Tensor:
    """(units,): by how much a batch's loss changes, to first order, as a unit's outgoing weights vanish.

    Of all batches of x, (N, T, n), and y, (N,), the sum of squares.
    """
    weights = [model.rnn.weight_hh_l0, model.head.weight]
    total = torch.zeros_like(model.head.weight[0])
    for images, classes in zip(x.split(SCORED_AT_ONCE), y.split(SCORED_AT_ONCE), strict=True):
        slopes = torch.autograd.grad(loss_of(images, classes), weights, materialize_grads=True, allow_unused=True)
        total += sum((weight.detach() * slope).sum(0) for weight, slope in zip(weights, slopes, strict=True)) ** 2
    return total


def part_of(values: Tensor, of_head: bool, name: str, hidden: int, units: Tensor) -> Tensor:
    """Of a parameter, or of what is like it, the rows and columns that belong to these units."""
    if of_head:
        return values[:, units].clone()
    rows = values.unflatten(0, (-1, hidden))[:, units]  # of every gate
    return (rows[:, :, units] if name.startswith("weight_hh") else rows).flatten(0, 1).contiguous()
