"""A user's own model and data as a case of the scripts about the project's models."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..experiments.tables import OWN, Case
from ..graph.graph import Graph
from .loading import load_own
from .run import classes_of, scores_of, targets_of


def own_case(
    name: str, args: argparse.Namespace, device: torch.device, targeted: bool = False, only_right: bool = False
) -> Case:
    """The model of a file and its --data: the first --N inputs, or those of them that it classifies correctly.

    ``targeted`` draws a random other class for each. args.N becomes the number of inputs that there are.

    Raises:
        ValueError: a file does not hold what it should, or nothing is classified correctly.
    """
    model, x, labels, extra = load_own(args, name, device)
    args.N = len(x)
    scores = scores_of(model, x, extra)
    predicted = classes_of(scores)
    labels = predicted if labels is None else labels
    drawing = argparse.Namespace(target="random" if targeted else None, seed=args.seed)
    targets = targets_of(drawing, scores, labels)
    index = torch.arange(len(x))
    if only_right:
        kept = (labels == predicted).nonzero().squeeze(-1)
        if not len(kept):
            raise ValueError(f"nothing to certify: {name} classifies none of the {len(x)} inputs correctly")
        x, labels, index, extra = x[kept], labels[kept], index[kept.cpu()], extra.part(kept.cpu())
        targets = None if targets is None else targets[kept]
    file, _, attribute = name.rpartition(":")
    path = Path(file or name)
    called = "_".join([path.name.partition(".")[0], *[attribute] * bool(file)])
    sequences = x.dim() == 3 or not x.is_floating_point()
    frames = len(model.frames) if isinstance(model, Graph) else x.shape[1] if sequences else 1
    config = {"architecture": OWN, "num_frames": frames}
    files = () if args.weights is None else (args.weights,)
    return Case(called, config, model, x, labels, targets, index, path, extra, files)
