"""What the train scripts of convolutional networks share: the checkpoint's config, and images that are changed."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from data.mnist import ImageData

from ..choices.tables import CNN_WIDTHS
from ..network.checkpoint import Config
from .certified.arguments import recipe_facts
from .certified.recipe import Recipe
from .loop import EVALUATION_BATCH, Change
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


def random_change(shift: int, flip: bool) -> Change | None:
    """Moves each image by up to ``shift`` pixels along both axes, zeros coming in, and mirrors every second one."""
    if not shift and not flip:
        return None

    def change(images: Tensor, random: torch.Generator) -> Tensor:
        """(batch, channels, height, width)."""
        height, width = images.shape[2:]
        rows, columns = (_places(images, random, shift, size) for size in (height, width))
        if flip:
            mirrored = torch.rand(len(images), generator=random).to(images.device) < 0.5
            columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        padded = F.pad(images, (shift,) * 4)
        samples = torch.arange(len(images), device=images.device)[:, None, None]
        moved = padded.permute(0, 2, 3, 1)[samples, rows[:, :, None], columns[:, None, :]]
        # In torch 2.13 the gradient of a convolution over images whose channels come last can end in a double free.
        return moved.permute(0, 3, 1, 2).contiguous()

    return change


def _places(images: Tensor, random: torch.Generator, shift: int, size: int) -> Tensor:
    """Rows or columns of the padded images that are taken, (batch, size)."""
    first = torch.randint(2 * shift + 1, (len(images), 1), generator=random)
    return (first + torch.arange(size)).to(images.device)
