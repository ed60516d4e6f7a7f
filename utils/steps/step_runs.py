"""What the bound scripts of words and strokes share: flags, and the radii of all steps of some sequences."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..choices.tables import RELAXATIONS
from ..experiments.arguments import relative_tolerance
from ..network.models import SequenceClassifier
from ..runs.cli import positive_int
from .step_bounds import step_attacks, step_radii


def add_step_arguments(parser: argparse.ArgumentParser, sample: str, step: str, batch_size: int):
    """Add the flags that say how steps are bounded; returns their group. A step is a word or a point of a sample."""
    group = parser.add_argument_group("how")
    group.add_argument(
        "--relaxation",
        choices=tuple(RELAXATIONS),
        default="plane",
        help="bounds of the gates' products: planes with contracting slopes or of least volume, lines, constants",
    )
    group.add_argument("--no-attack", action="store_true", help=f"leave out the attack on every {step}")
    group.add_argument("--tol", type=relative_tolerance, default=1e-3, help="relative width of the final bracket")
    group.add_argument("--batch-size", type=positive_int, default=batch_size, help=f"{step}s bounded at a time")
    group.add_argument(
        "--save-every", type=positive_int, default=20, help=f"{sample}s whose rows are found and written at a time"
    )
    group.add_argument("--resume", action="store_true", help="continue an interrupted run of the same arguments")
    return group


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


def digest(parts: Iterable[bytes]) -> str:
    """SHA-256 of the samples of a run."""
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(part)
    return sha256.hexdigest()
