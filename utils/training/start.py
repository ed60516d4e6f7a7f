"""What a training begins with: new weights, or those of a model that was trained before."""

from __future__ import annotations

import argparse

from torch import nn

from ..network.checkpoint import CONFIG_KEYS, KEYS, Config, load_checkpoint
from .loop import Objective

# What a config keeps of the training before: its flags, what it reached, and in turn what it began with.
FLAGS = ("seed", "epochs", "batch_size", "lr", "weight_decay", "shift", "certified")
REACHED = ("held_back", "held_back_accuracy", "held_back_verified")


def begin(model: nn.Module, config: Config, args: argparse.Namespace, objective: Objective) -> None:
    """Prepare an untrained model, or give it --start-from's weights, whose training ``config`` then speaks of.

    Raises:
        ValueError: there is no such model, or it is of another kind or size.
    """
    if args.start_from is None:
        return objective.prepare(model)
    earlier, facts = load_checkpoint(args.start_from)
    for key in KEYS.get(config["architecture"], CONFIG_KEYS):
        if facts.get(key) != config[key]:
            told = f"its {key} is {facts.get(key)}, not {config[key]}"
            raise ValueError(f"--start-from {args.start_from} is another kind of model: {told}")
    model.load_state_dict(earlier.state_dict())
    if (args.held_back or 0) > (facts.get("held_back") or 0):  # those of more images contain those of fewer
        print("note: the model of --start-from was trained on images that are held back now", flush=True)
    config["started_from"] = {name: facts[name] for name in (*FLAGS, *REACHED, "started_from") if name in facts}
