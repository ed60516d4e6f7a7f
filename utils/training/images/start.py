"""What a training begins with: new weights, or those of a model that was trained before."""

from __future__ import annotations

import argparse

import torch
from torch import nn

from ...network.checkpoint import CONFIG_KEYS, KEYS, Config, build_model, load_checkpoint
from ..loop import Objective
from ..narrow import check_narrowing

# What a config keeps of the training before: its flags, what it reached, and in turn what it began with.
FLAGS = ("hidden_size", "narrowed", "seed", "epochs", "batch_size", "lr", "weight_decay", "shift", "certified")
REACHED = ("held_back", "held_back_accuracy", "held_back_verified")


def begin(config: Config, args: argparse.Namespace, objective: Objective, device: torch.device) -> nn.Module:
    """The model of ``config`` as training begins: prepared or with --start-from's weights, with --start-size wider.

    ``config`` then speaks of the training before.

    Raises:
        ValueError: there is no such model, or it is of another kind or size; --start-size does not fit other flags.
    """
    if "start_size" in args:
        check_narrowing(args)
    wide = config | {"hidden_size": args.start_size} if getattr(args, "start_size", None) else config
    model = build_model(wide).to(device)
    if args.start_from is None:
        objective.prepare(model)
        return model
    earlier, facts = load_checkpoint(args.start_from)
    for key in KEYS.get(config["architecture"], CONFIG_KEYS):
        if facts.get(key) != wide[key]:
            told = f"its {key} is {facts.get(key)}, not {wide[key]}"
            raise ValueError(f"--start-from {args.start_from} is another kind of model: {told}")
    model.load_state_dict(earlier.state_dict())
    if (args.held_back or 0) > (facts.get("held_back") or 0):  # those of more images contain those of fewer
        print("note: the model of --start-from was trained on images that are held back now", flush=True)
    config["started_from"] = {name: facts[name] for name in (*FLAGS, *REACHED, "started_from") if name in facts}
    return model
