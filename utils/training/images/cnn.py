"""What the train scripts of convolutional networks share: the checkpoint's config, and statistics of the layers."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from data.mnist import ImageData

from ...choices.tables import CNN_WIDTHS
from ...network.checkpoint import Config
from ..certified.arguments import recipe_facts
from ..certified.recipe import Recipe
from ..loop import EVALUATION_BATCH
from .mnist import data_facts


def as_images(x: Tensor) -> Tensor:
    """(N, channels, height, width); grey images come without an axis of channels."""
    return x if x.dim() == 4 else x.unsqueeze(1)


def make_cnn_config(args: argparse.Namespace, data: ImageData, recipe: Recipe | None = None) -> Config:
    """The checkpoint's config, still without accuracies; images are normalised by mean and deviation of the channels.

    Pixels come in [0, 1]: eps is in units of pixels.
    """
    images = as_images(data.train_x)
    statistics = torch.std_mean(images, dim=(0, 2, 3))
    std, mean = ([round(float(value), 4) for value in values] for values in statistics)
    return {
        "architecture": "cnn",
        "kind": args.model,
        "width": args.width or CNN_WIDTHS[args.model],
        "batch_norm": args.batch_norm,
        "channels": images.shape[1],
        "size": images.shape[2],
        "input_mean": mean,
        "input_std": std,
        "shift": args.shift,
        "flip": args.flip,
        **data_facts(args, data),
        **({} if recipe is None else recipe_facts(recipe) | {"held_back": args.held_back}),
    }


@torch.no_grad()
def settle_statistics(model: nn.Module, images: Tensor) -> None:
    """Let normalisation take the statistics of all images, (N, ...), in place of the last batches' running ones.

    A mean over large batches; does nothing where no layer normalises. The model is in evaluation mode afterwards.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # every batch counts alike
    model.train()
    if layers:
        for batch in images.split(EVALUATION_BATCH)[: max(1, len(images) // EVALUATION_BATCH)]:
            model(batch)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    model.eval()
