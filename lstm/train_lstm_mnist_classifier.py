"""Train an LSTM on MNIST, an image being a sequence of T slices, and save it with its training curve."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.runs.cli import ArgumentParser, run_main
from utils.training.mnist import add_stack_arguments, add_training_arguments, train_mnist_classifier


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add_training_arguments(parser, hidden_size=32, time_step=4)
    add_stack_arguments(parser)
    return parser.parse_args()


def main() -> None:
    train_mnist_classifier(get_args(), "lstm")


if __name__ == "__main__":
    run_main(main)
