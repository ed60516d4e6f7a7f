"""Certified radii of a vanilla RNN on MNIST: within them, no perturbation of the slices changes the classification.

    python vanilla_rnn/bound_vanilla_rnn.py                                     # 100 images, random targets, l_2
    python vanilla_rnn/bound_vanilla_rnn.py --p inf --untargeted --clip
    python vanilla_rnn/bound_vanilla_rnn.py --per-frame                         # a radius for every single slice

Reads WORK_DIR/rnn_7_64_tanh/rnn (after the flags --time-step, --hidden-size ...); writes certified_bound.csv,
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
    add_bound_arguments(parser, "rnn", hidden_size=64, time_step=7)
    parser.add_argument("--activation", choices=("tanh", "relu"), default="tanh", help="activation of the cells")
    return parser.parse_args()


def main() -> None:
    args = get_args()
    bound_mnist_classifier(args, "rnn", args.activation)


if __name__ == "__main__":
    run_main(main)
