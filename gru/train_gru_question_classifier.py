"""Train a GRU on questions, which it sorts by the kind of answer they ask for, and save it with its words."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.runs.cli import ArgumentParser, answer_early, run_main
from utils.training.arguments import add_text_training_arguments
from utils.training.tasks import QUESTIONS


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add_text_training_arguments(parser, QUESTIONS)
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

from utils.training.text import train_text_classifier


def main() -> None:
    train_text_classifier(get_args(), "gru", QUESTIONS)


if __name__ == "__main__":
    run_main(main)
