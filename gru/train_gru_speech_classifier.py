"""Train a GRU on the waveforms of spoken digits (Free Spoken Digit Dataset), and save it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.runs.cli import ArgumentParser, answer_early, run_main
from utils.speech.arguments import add_speech_training_arguments


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add_speech_training_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

from utils.training.speech import train_speech_classifier


def main() -> None:
    train_speech_classifier(get_args(), "gru")


if __name__ == "__main__":
    run_main(main)
