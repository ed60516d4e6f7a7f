"""Certified training of classifiers of waveforms: noise, signal-to-noise ratios and spans, and balls of features."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from data.speech import RATE, chunk_lengths

from ...bounds.passes import BoundPass
from ...network.speech import SpeechClassifier
from ...network.speech.threats import SpeechThreat
from .arguments import recipe_facts, recipe_of
from .losses import Batch
from .objective import Certified
from .recipe import Moment, Recipe

HELD_BACK_SHARE = 9  # of so many training utterances one is held back, unless told otherwise
POINT_LOSSES = ("sabr", "mtl-ibp")


@dataclass
class SpeechBatch(Batch):
    """A batch whose balls are the moment's eps times ``sizes``, (batch,); None for 1."""

    sizes: Tensor | None = None

    def bounds(self, method: str, centers: Tensor | None = None, share: float = 1.0, sound: bool = False) -> BoundPass:
        if self.sizes is None:
            return super().bounds(method, centers, share, sound)
        balls = self.threat.around(self.frames if centers is None else centers, share * self.moment.eps * self.sizes)
        balls.rough = True
        return BoundPass(self.graph, balls, method, sound=sound)


class CertifiedSpeech(Certified):
    """Bounds over what is done to waveforms with a peak of 1, each of its own length; zeros behind it stay as they are.

    The network's classifier is bounded, without the white noise that the network adds while it learns clean classes.
    For ratios the recipe's eps is a share of each utterance's l_2 norm, for features it is in nats.
    """

    def __init__(self, recipe: Recipe, kind: str = "noise"):
        super().__init__(recipe)
        self.kind = kind

    def batch(
        self, model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe, moment: Moment, check: bool = True
    ) -> Batch:
        classifier, lengths = model.classifier, chunk_lengths(x)
        last = max(recipe.frames or (0,)) + (self.kind == "features")  # a span may lie behind all of a batch
        x = x[:, : max(int(lengths.max()), 1 + last)]
        if self.kind == "features":
            with torch.no_grad():
                x, lengths = classifier.features(x), lengths - 1
            return SpeechBatch(recurrent_part(classifier), x, y, recipe, moment, check, lengths)
        sizes = x.flatten(1).norm(dim=1) if self.kind == "snr" else None
        return SpeechBatch(classifier, x, y, recipe, moment, check, lengths, sizes)


def recurrent_part(classifier: SpeechClassifier) -> nn.Module:
    """What reads the features."""
    return SpeechThreat("features", 0.0).model(classifier)


def speech_recipe(args: argparse.Namespace, utterances: int, chunks: int) -> Recipe | None:
    """The recipe of the flags, None for plain training on so many utterances of so many chunks at most.

    Fills in --train-eps and --held-back.

    Raises:
        ValueError: flags contradict each other, or have no effect.
    """
    if args.clip or args.p is not None:
        raise ValueError("speech is trained for what --train-threat says: leave out --clip and --p")
    threat = SpeechThreat(args.train_threat, args.train_level or 0.0, args.train_span and tuple(args.train_span))
    if args.train_level is not None:
        if args.train_eps is not None:
            raise ValueError("--train-level is --train-eps in other units: give one of them")
        args.train_eps = threat.share
    if args.certified is None and (args.train_span or args.train_threat != "noise"):
        raise ValueError("--train-threat and --train-span are for certified training: give --certified too")
    if args.train_threat == "snr" and args.certified in POINT_LOSSES:
        raise ValueError(f"--train-threat snr has balls of many sizes: --certified {args.certified} knows only one")
    if args.certified is not None and args.held_back is None:
        args.held_back = max(1, utterances // HELD_BACK_SHARE)
    told = {"p": 2.0, "ball": "sequence"} if args.train_threat == "snr" else {}
    recipe = recipe_of(args, frames=1, input_penalty=0.0, **told)
    if recipe is None or args.train_span is None:
        return recipe
    count = chunks - (args.train_threat == "features")
    moved = threat.moved(count, args.hop / RATE)
    return replace(recipe, frames=tuple(moved.nonzero().squeeze(-1).tolist()))


def speech_recipe_facts(args: argparse.Namespace, recipe: Recipe) -> dict[str, object]:
    """What a checkpoint's config says of a recipe, whose name has the level: ibp_-50dB, ibp_snr_40dB, ibp_nats_0.05."""
    level = 20.0 * math.log10(recipe.eps)
    names = {"noise": f"{level:g}dB", "snr": f"snr_{-level:g}dB", "features": f"nats_{recipe.eps:g}"}
    span = [f"{end:g}" for end in args.train_span or ()]
    told = {"threat": args.train_threat, "span": args.train_span}
    facts = recipe_facts(recipe)
    facts["certified"] |= told
    return facts | {"recipe": "_".join([recipe.loss, names[args.train_threat], *span])}
