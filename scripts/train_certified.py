"""Train the shipped models that can be verified, those that are not there yet: RNN, LSTM, GRU and CNN on MNIST.

    python scripts/train_certified.py                                # all of them, some hours
    python scripts/train_certified.py --dry-run                      # their commands
    python scripts/train_certified.py --models lstm_7_64_ibp_inf_0.1 --save-dir seeds/1 -- --seed 1

What follows a lone -- is handed to every training script. How the recipes were found: docs/certified_training.md.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.experiments.table_arguments import MODELS_DIR
from utils.runs.cli import ROOT, ArgumentParser, run_main

# By the start of a folder's name: script, checkpoint and flags.
KINDS = {
    "rnn_{}_128_relu_mean": ("vanilla_rnn", "rnn", "--activation relu --hidden-size 128 --pooling mean --lr 3e-3"),
    "rnn_{}_256_relu_mean": ("vanilla_rnn", "rnn", "--activation relu --hidden-size 256 --pooling mean --lr 3e-3"),
    "rnn_{}_64_tanh": ("vanilla_rnn", "rnn", "--activation tanh --hidden-size 64 --lr 3e-3"),
    "lstm_{}_64": ("lstm", "lstm", "--hidden-size 64 --lr 1e-2"),
    "lstm_{}_64_mean": ("lstm", "lstm", "--hidden-size 64 --pooling mean --lr 3e-3"),
    "gru_{}_64": ("gru", "gru", "--hidden-size 64 --lr 1e-2"),
}
# Kind, slices, loss, norm, eps, epochs and more flags: SABR's for small boxes, a start from which states are handed on,
# fewer and calmer steps, images moved by a pixel, and what relu RNNs learn sooner by.
HALF = "--small-box 0.5"
SHIFTED = "--hidden-scale 0.1 --hidden-shift 0.9"
LARGE, LARGER, SLOWER = "--batch-size 512", "--batch-size 1024", "--lr 5e-3"
MOVED = "--shift 1"
NARROWED = "--start-size 256 --narrow-shares 0 0.3 --input-rate 1"
CALM = f"{LARGE} --overshoot 1 --adam-beta2 0.99"
SOONER = f"--overshoot 1 {SHIFTED} --input-rate 3 --adam-beta2 0.99"
MODELS = [
    ("rnn_{}_128_relu_mean", 7, "ibp", "inf", 0.1, 100, f"{SOONER} {LARGE}"),
    ("lstm_{}_64", 7, "ibp", "inf", 0.1, 300, LARGE),
    ("gru_{}_64", 7, "ibp", "inf", 0.1, 300, f"{LARGE} --input-penalty 3e-4"),
    ("rnn_{}_64_tanh", 7, "ibp", "inf", 0.1, 160, f"{SHIFTED} {CALM}"),
    ("rnn_{}_128_relu_mean", 7, "sabr", "inf", 0.02, 200, f"{HALF} {LARGE} {MOVED}"),
    ("lstm_{}_64", 7, "sabr", "inf", 0.02, 40, f"{HALF} {MOVED}"),
    ("gru_{}_64", 7, "sabr", "inf", 0.02, 40, f"{SLOWER} {HALF} {MOVED}"),
    ("rnn_{}_64_tanh", 7, "sabr", "inf", 0.02, 300, f"{HALF} {SHIFTED} {LARGE} {MOVED}"),
    ("rnn_{}_128_relu_mean", 7, "ibp", "2", 0.2, 30, ""),
    ("lstm_{}_64", 7, "ibp", "2", 0.2, 40, ""),
    ("gru_{}_64", 7, "ibp", "2", 0.2, 15, ""),
    ("rnn_{}_64_tanh", 7, "ibp", "2", 0.2, 60, f"{SHIFTED} {LARGER}"),
    ("rnn_{}_256_relu_mean", 7, "ibp", "inf", 0.1, 100, f"{SOONER} {LARGER}"),
    ("rnn_{}_256_relu_mean", 7, "ibp", "inf", 0.3, 15, SOONER),
    ("rnn_{}_128_relu_mean", 14, "ibp", "inf", 0.1, 15, SOONER),
    ("lstm_{}_64_mean", 14, "ibp", "inf", 0.1, 15, "--clean-share 0.1"),
]
# Where the best of several starts, or a wider one, goes on: number, epochs and flags of starts, those then, the seed.
STARTS = {
    "rnn_7_64_tanh_ibp_inf_0.1": (6, 40, "", "", 1),  # of three seeds that with most images held back verified
    "rnn_7_128_relu_mean_ibp_inf_0.1": (1, 40, "--hidden-size 256", NARROWED, 2),  # of three seeds, likewise
    "rnn_7_64_tanh_ibp_2_0.2": (3, 100, "", CALM, 0),
}
# Others by folder: script, checkpoint and flags.
OTHERS = {
    "cnn_small_32_bn_ibp_inf_0.3_clip": (
        "cnn/train_cnn_mnist_classifier.py",
        "cnn",
        "--model small --width 32 --batch-norm --batch-size 256 --lr 2e-3 --epochs 36 --clip --certified ibp "
        "--train-eps 0.3 --clean-share 0.03 --ramp-share 0.45",
    ),
    "cnn_large_16_bn_sabr_inf_0.1_clip": (
        "cnn/train_cnn_mnist_classifier.py",
        "cnn",
        "--model large --width 16 --batch-norm --batch-size 256 --lr 2e-3 --epochs 24 --clip --certified sabr "
        "--train-eps 0.1 --small-box 0.6 --clean-share 0.04 --ramp-share 0.4",
    ),
}


def commands(models_dir: Path) -> dict[str, list[str]]:
    """The training command of every model, by its folder's name; those that are in ``models_dir`` are left out."""
    found = {}
    for kind, frames, loss, norm, eps, epochs, more in MODELS:
        folder, checkpoint, flags = KINDS[kind]
        name = f"{kind.format(frames)}_{loss}_{norm}_{eps:g}"
        if not (models_dir / name / checkpoint).exists():
            script = f"{folder}/train_{checkpoint}_mnist_classifier.py"
            own = f"--time-step {frames} {flags} --certified {loss} --p {norm} --train-eps {eps:g} {more}".split()
            found[name] = [*first_words(name, epochs), script, *own, *["--epochs", str(epochs)] * (name not in STARTS)]
    for name, (script, checkpoint, flags) in OTHERS.items():
        if not (models_dir / name / checkpoint).exists():
            found[name] = [script, *flags.split()]
    return found


def first_words(name: str, epochs: int) -> list[str]:
    """Of the command of a model that goes on from the best of several starts."""
    if name not in STARTS:
        return []
    starts, start_epochs, first, last, seed = STARTS[name]
    words = f"--starts {starts} --start-epochs {start_epochs} --epochs {epochs} --seed {seed}".split()
    for flag, different in (("--first", first), ("--last", last)):
        words += [flag, different] * bool(different)
    return ["scripts/train_from_best.py", *words, "--"]


def with_flags(command: list[str], save_dir: Path, flags: list[str]) -> list[str]:
    """A command that saves in a folder and goes on after an interruption; ``flags`` are for the training script."""
    if "--" not in command:
        return [*command, "--save-dir", str(save_dir), "--resume", *flags]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--seed")
    told, rest = parser.parse_known_args(flags)  # the seed is that of all starts
    seed, place = [] if told.seed is None else ["--seed", told.seed], command.index("--")
    return [*command[:place], "--save-dir", str(save_dir), *seed, *command[place:], *rest]


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    names = list(commands(Path("nowhere")))
    parser.add_argument("--models", nargs="+", choices=names, metavar="NAME", default=names, help="folders' names")
    parser.add_argument("--save-dir", type=Path, default=MODELS_DIR, help="folder of the model folders")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")
    parser.add_argument("flags", nargs="*", help="flags for the training scripts, after --")
    return parser.parse_args()


def main() -> None:
    args = get_args()
    missing = {name: command for name, command in commands(args.save_dir).items() if name in args.models}
    print(f"{len(missing)} models to train", flush=True)
    for command in missing.values():
        script, *flags = with_flags(command, args.save_dir, args.flags)
        print(shlex.join(["python", script, *flags]), flush=True)
        if not args.dry_run and subprocess.run([sys.executable, str(ROOT / script), *flags]).returncode != 0:
            raise ValueError("training failed: see above")


if __name__ == "__main__":
    run_main(main)
