"""Train the shipped models that can be verified, those that are not there yet: RNN, LSTM and GRU on MNIST's slices.

    python scripts/train_certified.py                                # all of them
    python scripts/train_certified.py --dry-run                      # the commands
    python scripts/train_certified.py --models lstm_7_64_ibp_inf_0.1 -- --seed 1 --save-dir seeds/1

What follows a lone -- is handed to every training script. How the recipes were found: docs/certified_training.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.experiments.table_arguments import MODELS_DIR
from utils.runs.cli import ROOT, ArgumentParser, run_main

TRAIN = {
    kind: f"{'vanilla_rnn' if kind == 'rnn' else kind}/train_{kind}_mnist_classifier.py"
    for kind in ("rnn", "lstm", "gru")
}
KINDS = {
    "relu": "--activation relu --hidden-size 128 --pooling mean --lr 3e-3 --epochs {relu}",
    "tanh": "--activation tanh --hidden-size 64 --lr 3e-3 --epochs {tanh}",
    "lstm": "--hidden-size 64 --lr 1e-2 --epochs {gated}",
    "gru": "--hidden-size 64 --lr 1e-2 --epochs {gated}",
}


def model(name: str, kind: str, frames: int, ball: str, epochs: dict[str, int]) -> tuple[str, str]:
    """A model's folder name and its training command."""
    script = TRAIN["rnn" if kind in ("relu", "tanh") else kind]
    return name, f"{script} --time-step {frames} {KINDS[kind].format(**epochs)} --certified ibp {ball}"
