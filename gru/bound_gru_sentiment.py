"""Certify sentences against the replacement of words by their substitutes, for a GRU.

    python gru/bound_gru_sentiment.py --recipe ibp
    python gru/bound_gru_sentiment.py --methods crown --budgets 1 all
    python gru/bound_gru_sentiment.py --radii 2
    python gru/bound_gru_sentiment.py --text "A warm , funny and moving film ."

Reads WORK_DIR/gru_64_ibp/gru (after the flags); writes a row for every sentence and budget
(certified_bound.csv), the sentences with their substitutes (sentences.csv), run.json and sentences.html to
substitution_bound_.../ (after the methods) beside it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.runs.cli import ArgumentParser, answer_early, run_main
from utils.sentiment.arguments import add_sentiment_bound_arguments


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    add_sentiment_bound_arguments(parser, "gru")
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

from utils.sentiment.bounding.bound import bound_sentiment_classifier
from utils.sentiment.bounding.word_radii import bound_word_radii


def main() -> None:
    args = get_args()
    bound = bound_sentiment_classifier if args.radii is None else bound_word_radii
    bound(args, "gru")


if __name__ == "__main__":
    run_main(main)
