"""The flags of the scripts of spoken digits."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..runs.cli import ROOT, add_common_arguments, non_negative_float, positive_float, positive_int

DATA_HELP = "folder that holds recordings/0_george_0.wav ... (default: data/fsdd)"


def add_speech_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a train script of spoken digits and the common ones."""
    group = parser.add_argument_group("model")
    group.add_argument("--hidden-size", type=positive_int, default=32, help="size of the hidden state")
    group.add_argument("--pooling", choices=("last", "mean"), default="last", help="state that the classes are read off")
    group.add_argument("--hop", type=positive_int, default=200, help="samples of a chunk, half a window")
    group.add_argument("--bands", type=positive_int, default=20, help="mel bands")
    group.add_argument(
        "--floor", type=positive_float, default=1e-3, help="energy added before the logarithm; white noise of -30 dB"
    )
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=positive_int, default=40, help="passes over the training set")
    group.add_argument("--batch-size", type=positive_int, default=64, help="utterances per step")
    group.add_argument("--lr", type=positive_float, default=1e-2, help="largest learning rate of Adam")
    group.add_argument("--weight-decay", type=non_negative_float, default=0.1, help="decoupled weight decay of Adam")
    group.add_argument(
        "--noise",
        type=float,
        nargs=2,
        metavar=("QUIETEST", "LOUDEST"),
        help="add white noise of a random level, in dB of its deviation below the peak, such as -60 -25",
    )
    group.add_argument(
        "--save-dir", type=Path, default=ROOT / "models" / "speech_classifier", help="folder of the model folders"
    )
    group.add_argument("--sample", action="store_true", help="use a few made-up tones, which need no data")
    group.add_argument("--resume", action="store_true", help="continue an interrupted training of the same arguments")
    add_common_arguments(parser, data=DATA_HELP)
