"""What the bound scripts of words and strokes share: flags, and the radii of all steps of some sequences."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

from ..network.models import SequenceClassifier
from .step_bounds import step_attacks, step_radii


@dataclass(frozen=True)
class Steps:
    """Sequences whose single steps move.

    Attributes:
        x: (batch, T, n) sequences in float64; frames at and after their ``lengths``, (batch,), do not count.
        labels: (batch,) classes that must win.
    """

    model: SequenceClassifier
    x: Tensor
    labels: Tensor
    lengths: Tensor

    @property
    def sequences(self) -> tuple[SequenceClassifier, Tensor, Tensor, Tensor]:
        return self.model, self.x, self.labels, self.lengths

    def pairs(self) -> list[tuple[int, int]]:
        """Sample and position of every step, in order."""
        return [(n, t) for n, length in enumerate(self.lengths.tolist()) for t in range(length)]


def search_options(args: argparse.Namespace) -> dict[str, object]:
    """The flags as ``step_radii`` and ``sequence_radii`` take them."""
    return {"norm": args.p, "relaxation": args.relaxation, "tol": args.tol, "batch_size": args.batch_size}


def find_steps(steps: Steps, args: argparse.Namespace) -> dict[str, list[list[float]]]:
    """Radius, failed eps, attack and seconds of every step, (batch, T), by the name of their columns.

    The attack is NaN where it is left out, and everything after a sequence's end.
    """
    found = step_radii(*steps.sequences, **search_options(args))
    attack = torch.full_like(found.radius, torch.nan)
    if not args.no_attack:
        attack = step_attacks(*steps.sequences, norm=args.p)
    columns = {"radius": found.radius, "failed_eps": found.failed, "attack": attack, "seconds": found.seconds}
    return {name: values.tolist() for name, values in columns.items()}
