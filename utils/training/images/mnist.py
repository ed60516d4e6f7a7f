"""What the checkpoint of an MNIST classifier says of itself."""

from __future__ import annotations

import argparse

import torch

from data.mnist import SIDE, ImageData, as_frames

from ...network.checkpoint import Config
from ...runs.cli import json_value
from ..certified.arguments import recipe_facts
from ..certified.recipe import Recipe
from ..loop import Change, training_facts
from ..narrow import shares_of
from .changes import random_change

MOVED = ("perturb", "perturb_eps", "perturb_norm", "perturb_method")  # flags of training against moves of weights


def check_slices(time_step: int) -> None:
    """Raise ValueError if images cannot be cut into so many slices."""
    as_frames(torch.empty(0, SIDE, SIDE), time_step)


def make_mlp_config(args: argparse.Namespace, data: ImageData, recipe: Recipe | None = None) -> Config:
    """Likewise, of a multi-layer perceptron."""
    return {
        "architecture": "mlp",
        "input_size": data.train_x[0].numel(),
        "layers": list(args.layers),
        "activation": args.activation,
        "leaky_slope": args.leaky_slope if args.activation == "leaky" else 0.0,
        **{name: getattr(args, name) for name in ("lipschitz_weight", "lipschitz_eps", "lipschitz_norm")},
        **({name: json_value(getattr(args, name)) for name in MOVED} if args.perturb else {}),
        **data_facts(args, data),
        **({} if recipe is None else recipe_facts(recipe) | {"held_back": args.held_back}),
    }


def make_config(
    args: argparse.Namespace, architecture: str, activation: str | None, data: ImageData, recipe: Recipe | None = None
) -> Config:
    """The checkpoint's config, still without accuracies. Pixels are fed as they are: eps is in units of pixels."""
    return {
        "architecture": architecture,
        "input_size": data.train_x[0].numel() // args.time_step,
        "num_frames": args.time_step,
        "hidden_size": args.hidden_size,
        "num_layers": getattr(args, "num_layers", 1),
        "bidirectional": getattr(args, "bidirectional", False),
        "bias": True,
        "activation": activation,
        "pooling": getattr(args, "pooling", "last"),
        **({"shift": args.shift} if args.shift else {}),
        **({"narrowed": {"from": args.start_size, "shares": list(shares_of(args))}} if args.start_size else {}),
        "input_mean": 0.0,
        "input_std": 1.0,
        **data_facts(args, data),
        **({} if recipe is None else recipe_facts(recipe) | {"held_back": args.held_back}),
    }


def shift_of_frames(shift: int) -> Change | None:
    """Moves the image of each sequence, (batch, T, 784 / T), by up to ``shift`` pixels along both axes."""
    change = random_change(shift, flip=False)
    if change is None:
        return None
    return lambda x, random: change(x.reshape(len(x), 1, SIDE, SIDE), random).reshape(x.shape)


def data_facts(args: argparse.Namespace, data: ImageData) -> Config:
    """What a config says of the data, and of how the training went over them."""
    return {
        "num_classes": len(data.class_names),
        "dataset": data.name,
        "data_source": data.source,
        "class_names": list(data.class_names),
        "train_size": len(data.train_y),
        "test_size": len(data.test_y),
        **training_facts(args),
    }
