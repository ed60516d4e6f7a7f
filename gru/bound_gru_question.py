"""Certified radii of the single words of questions: how far each word's vector can move before a GRU errs.

    python gru/bound_gru_question.py                                   # 200 test questions, l_2
    python gru/bound_gru_question.py --p inf --compare                 # planes, lines and constants
    python gru/bound_gru_question.py --text "What is the name of the longest river in France ?"

Reads WORK_DIR/gru_32/gru (after the flags); writes a row for every word (certified_bound.csv) and every text
(sentences.csv), run.json, words.html and figures to 2_norm_bound_crown_plane/ (after norm and relaxation) beside it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.runs.cli import ArgumentParser, answer_early, run_main
from utils.steps.arguments import add_word_arguments
from utils.training.tasks import QUESTIONS


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    add_word_arguments(parser, "gru", QUESTIONS)
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

from utils.steps.word_bounds import bound_text_classifier


def main() -> None:
    bound_text_classifier(get_args(), "gru", QUESTIONS)


if __name__ == "__main__":
    run_main(main)
