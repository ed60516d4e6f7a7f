"""Certified training of classifiers of waveforms: balls around all samples, through the features."""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn

from data.speech import chunk_lengths

from .arguments import recipe_facts, recipe_of
from .losses import Batch
from .objective import Certified
from .recipe import Moment, Recipe

LOUDEST = 300.0  # dB of the peak, either way: about what numbers can tell apart
HELD_BACK_SHARE = 9  # of so many training utterances one is held back, unless told otherwise


class CertifiedSpeech(Certified):
    """Bounds over noise on waveforms with a peak of 1, each of its own length; zeros behind it stay as they are.

    The network's classifier is bounded, without the white noise that the network adds while it learns clean classes.
    """

    def batch(
        self, model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe, moment: Moment, check: bool = True
    ) -> Batch:
        lengths = chunk_lengths(x)
        longest = int(lengths.max())
        return Batch(model.classifier, x[:, :longest], y, recipe, moment, check, lengths)


def speech_recipe(args: argparse.Namespace, utterances: int) -> Recipe | None:
    """The recipe of the flags, None for plain training on so many utterances; fills in --train-eps and --held-back.

    Raises:
        ValueError: flags contradict each other, or have no effect.
    """
    if args.train_level is not None:
        if args.train_eps is not None:
            raise ValueError("--train-level is --train-eps in decibels: give one of them")
        if not abs(args.train_level) <= LOUDEST:
            raise ValueError(f"--train-level must be decibels from -{LOUDEST:g} to {LOUDEST:g}, not {args.train_level}")
        args.train_eps = 10.0 ** (args.train_level / 20.0)
    if args.clip or args.p not in (None, torch.inf):
        raise ValueError("speech is trained for noise on every sample: leave out --clip and --p, or take --p inf")
    if args.certified is not None and args.held_back is None:
        args.held_back = max(1, utterances // HELD_BACK_SHARE)
    return recipe_of(args, frames=1, input_penalty=0.0)


def speech_recipe_facts(recipe: Recipe) -> dict[str, object]:
    """What a checkpoint's config says of a recipe, whose name has the level in decibels: ibp_-50dB."""
    return recipe_facts(recipe) | {"recipe": f"{recipe.loss}_{20.0 * math.log10(recipe.eps):g}dB"}
