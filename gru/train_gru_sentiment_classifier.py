"""Train a GRU on sentences of film reviews, positive or negative, and save it with its words.

python gru/train_gru_sentiment_classifier.py
python gru/train_gru_sentiment_classifier.py --certified ibp  # so that it can be certified
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.runs.cli import ArgumentParser, answer_early, run_main
from utils.sentiment.arguments import add_sentiment_training_arguments


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    add_sentiment_training_arguments(parser, "gru")
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

from utils.sentiment.training.train import train_sentiment_classifier


def main() -> None:
    train_sentiment_classifier(get_args(), "gru")


if __name__ == "__main__":
    run_main(main)
