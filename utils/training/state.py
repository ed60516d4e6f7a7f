"""Trainings that are interrupted: the last finished epoch is kept beside where the model will be, and gone on from."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..runs.cli import json_value
from ..runs.results import FREE_ARGUMENTS, differences, digest, replacing

STATE_NAME = "training_state.pt"


class TrainingState:
    """The file of an unfinished training, beside its model's path.

    It holds weights, optimiser, schedule, random numbers and history, so that a training that is resumed ends with the
    weights of one that was not interrupted (on the same machine).
    """

    def __init__(self, path: Path, args: argparse.Namespace, labels: Tensor):
        """``labels``, (N,), of the training set are what its data are known by."""
        self.path, self.resume = path.with_name(STATE_NAME), args.resume
        free = (*FREE_ARGUMENTS, "save_dir")
        self.identity: dict[str, Any] = {
            f"--{name.replace('_', '-')}": json_value(value) for name, value in vars(args).items() if name not in free
        }
        self.identity["the training set's sha256"] = digest([labels.cpu().numpy().tobytes()])

    def restore(self, model: nn.Module, parts: dict[str, Any], device: torch.device) -> dict[str, list[float]]:
        """Put back what an earlier training left, if it is to be resumed; its history, empty if there is none.

        Raises:
            ValueError: the file is damaged, or is another training's.
        """
        if not self.path.exists():
            return {}
        if not self.resume:
            print(f"note: {self.path} is left from an interrupted training; --resume would continue it", flush=True)
            return {}
        try:
            kept = torch.load(self.path, map_location=device, weights_only=True)
            changes = differences(kept["identity"], self.identity)
            if not changes:
                for name, part in parts.items():  # before the weights: one can make the model as narrow as they are
                    part.load_state_dict(kept[name])
                model.load_state_dict(kept["model"])
                torch.set_rng_state(kept["random"].cpu())
        except Exception as error:  # a damaged file fails in whatever way its bytes lead to
            raise ValueError(f"{self.path} cannot be resumed from ({error}): remove it to start again") from error
        if changes:
            raise ValueError(f"cannot resume from {self.path}: {changes[0]}; leave out --resume to start again")
        return kept["history"]

    def save(self, model: nn.Module, parts: dict[str, Any], history: dict[str, list[float]]) -> None:
        """Keep a finished epoch, whole or not at all."""
        kept = {name: part.state_dict() for name, part in parts.items()}
        kept |= {"identity": self.identity, "model": model.state_dict(), "history": history}
        with replacing(self.path) as temporary:
            torch.save(kept | {"random": torch.get_rng_state()}, temporary)

    def say_what_is_kept(self, epochs: int, total: int) -> None:
        if epochs:
            print(f"{epochs} of {total} epochs are kept in {self.path}; --resume continues", file=sys.stderr)

    def discard(self) -> None:
        """The training is finished and its model saved."""
        self.path.unlink(missing_ok=True)
