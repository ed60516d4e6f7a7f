"""Certified radii of the single points of pen strokes: how far each point can move before a GRU misreads the digit.

    python gru/bound_gru_stroke.py                # 200 test digits, l_2
    python gru/bound_gru_stroke.py --p inf

Reads WORK_DIR/gru_32/gru (after --hidden-size); writes a row for every point (certified_bound.csv), run.json and
figures to 2_norm_bound_crown_plane/ (after norm and relaxation) beside it. scripts/make_strokes.py makes the strokes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.runs.cli import ArgumentParser, answer_early, run_main
from utils.steps.arguments import add_stroke_arguments


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    add_stroke_arguments(parser, "gru")
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

from utils.steps.stroke_bounds import bound_stroke_classifier


def main() -> None:
    bound_stroke_classifier(get_args(), "gru")


if __name__ == "__main__":
    run_main(main)
