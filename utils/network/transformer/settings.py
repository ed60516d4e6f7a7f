"""The part of a checkpoint's config that a Transformer is built from."""

from __future__ import annotations

from typing import Any

from .model import LAYER_NORMS, SequenceTransformer

SIZES = ("input_size", "num_classes", "width", "heads", "inner", "num_layers")
TRANSFORMER_KEYS = ("architecture", *SIZES, "layer_norm", "max_frames")


def check_transformer(config: dict[str, Any]) -> None:
    """Raise ValueError, naming the key, if a value makes no Transformer."""
    places = [] if config["max_frames"] is None else ["max_frames"]
    for key in (*SIZES, *places):
        if type(config[key]) is not int or config[key] < 1:
            raise ValueError(f"{key} in the config must be a positive integer, not {config[key]!r}")
    if config["width"] % config["heads"]:
        raise ValueError(f"heads in the config must divide its width, {config['width']}, not be {config['heads']}")
    if config["layer_norm"] not in LAYER_NORMS:
        raise ValueError(f"layer_norm in the config must be one of {LAYER_NORMS}, not {config['layer_norm']!r}")


def make_transformer(config: dict[str, Any]) -> SequenceTransformer:
    """An untrained network of the sizes of config."""
    return SequenceTransformer(
        config["input_size"],
        config["num_classes"],
        width=config["width"],
        heads=config["heads"],
        inner=config["inner"],
        layers=config["num_layers"],
        layer_norm=config["layer_norm"],
        max_frames=config["max_frames"],
    )
