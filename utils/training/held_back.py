"""What is measured of a classifier: on samples held back while it is trained, on the test set once, in the end."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..network.checkpoint import Config
from .loop import History, Objective, accuracy


def hold_back(frames: list[Tensor], labels: list[Tensor], count: int | None) -> tuple[list[Tensor], list[Tensor]]:
    """[training, watched] sequences and labels from [training, test] ones.

    With a count so many of the training set, the same for every seed, are watched in place of the test set, so that
    what is chosen by the training curve is not chosen by the test set.

    Raises:
        ValueError: nothing would be left to train on.
    """
    if count is None:
        return frames, labels
    if count >= len(labels[0]):
        raise ValueError(f"--held-back {count} leaves nothing of {len(labels[0])} training images")
    order = torch.randperm(len(labels[0]), generator=torch.Generator().manual_seed(1)).to(labels[0].device)
    parts = order[count:], order[:count]
    return [frames[0][part] for part in parts], [labels[0][part] for part in parts]


def evaluate(
    model: nn.Module, frames: list[Tensor], labels: list[Tensor], objective: Objective, history: History
) -> dict[str, float]:
    """Accuracies, 0 to 1, of [training, test] sequences; of the test set also what the objective watches.

    Of certified training also the last ones of the images held back.
    """
    measured = {f"test_{name}": value for name, value in objective.measure(model, frames[1], labels[1]).items()}
    if history.verified:
        measured |= {"held_back_accuracy": history.accuracy[-1], "held_back_verified": history.verified[-1]}
    return {"train_accuracy": accuracy(model, frames[0], labels[0])} | measured


def accuracies(config: Config) -> str:
    """What a training says in the end, of a config with what ``evaluate`` found."""
    text = f"test accuracy {config['test_accuracy']:.4f}, training accuracy {config['train_accuracy']:.4f}"
    if "certified" not in config:
        return text
    recipe = config["certified"]
    group = "image" if config["architecture"] in ("cnn", "mlp") else recipe["ball"]
    ball = f"l_{float(recipe['p']):g} {recipe['train_eps']:g} around every {group}"
    if float(recipe["p"]) == 0.0:
        ball = f"{recipe['train_eps']:g} changed values of every {group}"
    kept = f"held back: {config['held_back_verified']:.4f} verified, {config['held_back_accuracy']:.4f} clean"
    return f"verified test accuracy {config['test_verified']:.4f} ({ball}), {text}; {kept}"
