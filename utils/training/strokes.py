"""Training of classifiers of pen strokes: sequences of (dx, dy, end of stroke, end of digit)."""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn

from data.strokes import POINT_SIZE, StrokeData, load_strokes, sequence_lengths

from ..network.checkpoint import Config, build_model
from ..network.models import SequenceClassifier
from ..runs.cli import (
    apply_common_arguments,
)
from ..runs.results import check_writable
from .loop import train_and_save, training_facts

# Movements are divided by this many pixels in the model's first layer; radii stay in pixels.
INPUT_STD = [3.0, 3.0, 1.0, 1.0]


class StrokeNet(nn.Module):
    """The classifier as it is trained: takes padded sequences (N, T, 4), which end at their end-of-digit flag."""

    def __init__(self, classifier: SequenceClassifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        lengths = sequence_lengths(x)
        return self.classifier(x[:, : int(lengths.max())], lengths)


def train_stroke_classifier(args: argparse.Namespace, architecture: str) -> None:
    """Train and save the classifier that a script's arguments ask for.

    Writes SAVE_DIR/lstm_32/lstm (after architecture and size) and training_curve.png beside it.

    Raises:
        ValueError: there are no strokes, they are damaged, or the training diverges.
        OSError: the folder cannot be written.
    """
    device = apply_common_arguments(args)
    data = load_strokes(args.data_dir)
    config = make_stroke_config(args, architecture, data)
    folder = args.save_dir / f"{architecture}_{args.hidden_size}"
    if not args.dry_run:
        check_writable(folder)
    classifier = build_model(config)
    net = StrokeNet(classifier).to(device)
    sequences = [x.to(device) for x in (data.train_x, data.test_x)]
    labels = [y.to(device) for y in (data.train_y, data.test_y)]
    title, items = f"stroke classifier {folder.name}", f"digits of {data.source}"
    train_and_save(net, classifier, sequences, labels, args, config, folder / architecture, title, items)


def make_stroke_config(args: argparse.Namespace, architecture: str, data: StrokeData) -> Config:
    """The checkpoint's config, still without accuracies."""
    return {
        "architecture": architecture,
        "input_size": POINT_SIZE,
        "num_frames": int(sequence_lengths(data.train_x).max()),  # digits of any length can be read
        "hidden_size": args.hidden_size,
        "num_layers": 1,
        "bidirectional": False,
        "bias": True,
        "activation": None,
        "pooling": "last",
        "num_classes": len(data.class_names),
        "input_mean": 0.0,
        "input_std": INPUT_STD,
        "dataset": data.name,
        "data_source": data.source,
        "class_names": list(data.class_names),
        "train_size": len(data.train_y),
        "test_size": len(data.test_y),
        **training_facts(args),
    }


@torch.no_grad()
def predict_strokes(classifier: SequenceClassifier, x: Tensor) -> Tensor:
    """Classes (N,) of padded sequences, computed in float64."""
    exact = StrokeNet(copy.deepcopy(classifier).double())
    return torch.cat([exact(part.double()).argmax(dim=1) for part in x.split(1000)])
