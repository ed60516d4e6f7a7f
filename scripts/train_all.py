"""Train the classifiers of the paper's grid, those that are not there yet: RNN, LSTM and GRU, 4/7/14 slices, 32/64/128.

    python scripts/train_all.py                          # 27 models
    python scripts/train_all.py --kinds lstm --time-steps 7 14 --hidden-sizes 128 -- --epochs 10

What follows a lone -- is handed to every training script. The table scripts find the models by themselves.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.experiments.table_arguments import MODELS_DIR
from utils.runs.cli import ROOT, ArgumentParser, positive_int, run_main

SCRIPTS = {
    kind: f"{'vanilla_rnn' if kind == 'rnn' else kind}/train_{kind}_mnist_classifier.py"
    for kind in ("rnn", "lstm", "gru")
}


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=tuple(SCRIPTS), default=list(SCRIPTS), help="kinds of cells")
    parser.add_argument("--time-steps", nargs="+", type=positive_int, default=[4, 7, 14], help="slices of an image")
    parser.add_argument(
        "--hidden-sizes", nargs="+", type=positive_int, default=[32, 64, 128], help="sizes of the state"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")
    parser.add_argument("flags", nargs="*", help="flags for the training scripts, after --")
    return parser.parse_args()


def commands(args: argparse.Namespace) -> list[list[str]]:
    """The command of every model that is not there."""
    found = []
    for kind, frames, hidden in itertools.product(args.kinds, args.time_steps, args.hidden_sizes):
        name = f"{kind}_{frames}_{hidden}" + "_tanh" * (kind == "rnn")
        if not (MODELS_DIR / name / kind).exists():
            sizes = ["--time-step", str(frames), "--hidden-size", str(hidden)]
            found.append([sys.executable, str(ROOT / SCRIPTS[kind]), *sizes, *args.flags])
    return found


def main() -> None:
    args = get_args()
    missing = commands(args)
    print(f"{len(missing)} models to train", flush=True)
    for command in missing:
        print(" ".join(["python", Path(command[1]).relative_to(ROOT).as_posix(), *command[2:]]), flush=True)
        if not args.dry_run and subprocess.run(command).returncode != 0:
            raise ValueError("training failed: see above")


if __name__ == "__main__":
    run_main(main)
