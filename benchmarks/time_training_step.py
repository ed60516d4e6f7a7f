"""Processor time of a training step, forward and backward, by every certified loss, beside a plain step.

    python benchmarks/time_training_step.py
    python benchmarks/time_training_step.py --hidden-size 128 --losses ibp sabr

Cells read 7 slices of images (112 values), 128 samples a step, on one thread; times are the least of some repetitions,
alternating, so that other work on the machine counts little. The last column is the step over the plain one.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.runs.cli import ArgumentParser, answer_early, positive_int, run_main
from utils.training.certified.recipe import LOSSES

CELLS = ("rnn", "lstm", "gru")


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), help="kinds of cells")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=["ibp", "crown-ibp", "sabr"], help="losses")
    parser.add_argument("--hidden-size", type=positive_int, default=64, help="size of the hidden state")
    parser.add_argument("--time-step", type=positive_int, default=7, help="slices of an image")
    parser.add_argument("--batch-size", type=positive_int, default=128, help="images per step")
    parser.add_argument("--repetitions", type=positive_int, default=10, help="steps timed of each kind")
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

import torch
from torch import nn

from utils.network.models import SequenceClassifier
from utils.training.certified.objective import Certified
from utils.training.certified.recipe import Recipe
from utils.training.loop import Objective

KINDS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


def objectives(losses: list[str]) -> dict[str, Objective]:
    """By name; crown-ibp with one row in place of nine, and backward bounds all the time."""
    recipes = {name: Recipe(name, fusion=name.startswith("crown"), beta=(1.0, 1.0)) for name in losses}
    return {"plain": Objective()} | {name: Certified(recipe) for name, recipe in recipes.items()}


def main() -> None:
    args = get_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    size = 28 * 28 // args.time_step
    x = torch.rand(args.batch_size, args.time_step, size)
    y = torch.randint(0, 10, (args.batch_size,))
    print(f"processor ms a step of {args.batch_size} images, {args.time_step} x {args.hidden_size}, one thread")
    print(f"{'cell':5} {'loss':10} {'ms':>8} {'of plain':>9}")
    for cell in args.cells:
        rnn = KINDS[cell](size, args.hidden_size, batch_first=True)
        model = SequenceClassifier(rnn, nn.Linear(args.hidden_size, 10))
        least = fastest(model, objectives(args.losses), x, y, args.repetitions)
        for name, seconds in least.items():
            print(f"{cell:5} {name:10} {1e3 * seconds:8.1f} {seconds / least['plain']:8.1f}x", flush=True)


def fastest(model: nn.Module, kinds: dict[str, Objective], x, y, repetitions: int) -> dict[str, float]:
    """Least processor seconds of a step of each kind; they take turns."""
    least = dict.fromkeys(kinds, float("inf"))
    for _ in range(repetitions + 2):  # the first ones are slower
        for name, objective in kinds.items():
            start = time.process_time()
            objective.loss(model, x, y, 1.0).backward()
            least[name] = min(least[name], time.process_time() - start)
    return least


if __name__ == "__main__":
    run_main(main)
