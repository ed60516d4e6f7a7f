"""Certified radii of a GRU on MNIST: within them, no perturbation of the slices changes the classification.

    python gru/bound_gru.py                                     # 100 images, random targets, l_2
    python gru/bound_gru.py --p inf --untargeted --clip
    python gru/bound_gru.py --per-frame                         # a radius for every single slice

Reads WORK_DIR/gru_4_32/gru (after the flags --time-step, --hidden-size ...); writes certified_bound.csv,
run.json and figures to 2_norm_bound/ (after the norm and whatever else is not as usual) beside it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.experiments.arguments import add_bound_arguments
from utils.experiments.mnist import bound_mnist_classifier
from utils.runs.cli import ArgumentParser, run_main


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    add_bound_arguments(parser, "gru", hidden_size=32, time_step=4)
    return parser.parse_args()


def main() -> None:
    bound_mnist_classifier(get_args(), "gru")


if __name__ == "__main__":
    run_main(main)
