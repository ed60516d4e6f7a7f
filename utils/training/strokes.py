"""Training of classifiers of pen strokes: sequences of (dx, dy, end of stroke, end of digit)."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from data.strokes import POINT_SIZE, StrokeData, load_strokes, sequence_lengths

from ..network.checkpoint import Config, build_model
from ..network.models import SequenceClassifier
from ..runs.cli import (
    ROOT,
    add_common_arguments,
    apply_common_arguments,
    non_negative_float,
    positive_float,
    positive_int,
)
from .mnist import check_writable, train_and_save, training_facts

# Movements are divided by this many pixels in the model's first layer; radii stay in pixels.
INPUT_STD = [3.0, 3.0, 1.0, 1.0]
DATA_HELP = "folder that holds strokes/strokes.npz or the published sequences (default: data/)"


class StrokeNet(nn.Module):
    """The classifier as it is trained: takes padded sequences (N, T, 4), which end at their end-of-digit flag."""

    def __init__(self, classifier: SequenceClassifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        lengths = sequence_lengths(x)
        return self.classifier(x[:, : int(lengths.max())], lengths)


def add_stroke_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a stroke train script and the common ones."""
    group = parser.add_argument_group("model")
    group.add_argument("--hidden-size", type=positive_int, default=32, help="size of the hidden state")
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=positive_int, default=12, help="passes over the training set")
    group.add_argument("--batch-size", type=positive_int, default=128, help="digits per step")
    group.add_argument("--lr", type=positive_float, default=1e-2, help="largest learning rate of Adam")
    group.add_argument("--weight-decay", type=non_negative_float, default=0.05, help="decoupled weight decay of Adam")
    group.add_argument(
        "--save-dir", type=Path, default=ROOT / "models" / "stroke_classifier", help="folder of the model folders"
    )
    add_common_arguments(parser, data=DATA_HELP)


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
