"""What the scripts of multi-layer perceptrons share: flags and the model that they describe."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..network.checkpoint import CheckpointError, Config, load_checkpoint, model_name
from ..network.models import MLP
from ..training.datasets import DATASETS, settle_folder


def load_mlp(args: argparse.Namespace, device: torch.device) -> tuple[MLP, Config, Path]:
    """The model that the flags describe, its config and its path. Raises CheckpointError if there is none like it."""
    settle_folder(args, "work_dir")
    described = {"architecture": "mlp", "layers": args.layers, "activation": args.activation}
    trained = {"lipschitz_weight": float(args.lipschitz), "recipe": getattr(args, "recipe", None)}
    path = args.work_dir / model_name(described | trained) / args.model_name
    model, config = load_checkpoint(path, device)
    for key, value in described.items():
        if config[key] != value:
            raise CheckpointError(f"{path} holds a model with {key} = {config[key]}, not {value}")
    if config["input_size"] != DATASETS[args.dataset] or config["num_classes"] != 10:
        size = f"{config['input_size']} values, {config['num_classes']} classes"
        raise CheckpointError(f"{path} is no classifier of {args.dataset}: it takes {size}")
    return model, config, path
