"""Train a vanilla RNN on MNIST, an image being a sequence of T slices, and save it with its training curve."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.runs.cli import ArgumentParser, run_main
from utils.training.mnist import add_stack_arguments, add_training_arguments, train_mnist_classifier


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add_training_arguments(parser, hidden_size=64, time_step=7)
    add_stack_arguments(parser)
    parser.add_argument("--activation", choices=("tanh", "relu"), default="tanh", help="activation of the cells")
    return parser.parse_args()


def main() -> None:
    args = get_args()
    train_mnist_classifier(args, "rnn", args.activation)


if __name__ == "__main__":
    run_main(main)
