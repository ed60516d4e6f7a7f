"""What certified training of a small LSTM reaches in a given time: the setting of auto_LiRPA's sequence example.

    python benchmarks/train_for_a_time.py                  # 190 s, as measured for that example with 64 units
    python benchmarks/train_for_a_time.py --seconds 60 --loss crown-ibp

The LSTM reads an image as 8 slices of 98 pixels; the mean of its states is classified. Boxes of --eps (0.1 in the
normalised units of that example, 0.0308 in pixel values) around all pixels, not cut. The schedule follows the clock.
Prints clean accuracy and what intervals, then backward bounds, verify of the first --N test images.
"""

from __future__ import annotations

import argparse
import sys
import time
from math import inf
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.runs.cli import (
    ArgumentParser,
    add_common_arguments,
    answer_early,
    apply_common_arguments,
    positive_float,
    positive_int,
    run_main,
)
from utils.training.certified.recipe import LOSSES


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=positive_float, default=190.0, help="wall time of the training")
    parser.add_argument("--loss", choices=LOSSES, default="ibp", help="certified loss")
    parser.add_argument("--eps", type=positive_float, default=0.0308, help="half-width of the boxes, in pixel values")
    parser.add_argument("--hidden-size", type=positive_int, default=64, help="size of the hidden state")
    parser.add_argument("--batch-size", type=positive_int, default=128, help="images per step")
    parser.add_argument("--lr", type=positive_float, default=1e-2, help="largest learning rate of Adam")
    parser.add_argument("--N", type=positive_int, default=1000, help="test images")
    add_common_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

import torch
from torch import Tensor, nn

from data.mnist import load_mnist
from utils.certify import certified_margin
from utils.network.models import SequenceClassifier
from utils.training.certified.objective import Certified
from utils.training.certified.recipe import Recipe, rate_factor
from utils.training.loop import CLIP_NORM

SLICES, CLASSES = 8, 10


def fit(model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe, args: argparse.Namespace) -> int:
    """Train until the time is over; returns the number of steps."""
    objective, adam = Certified(recipe), torch.optim.Adam(model.parameters(), args.lr)
    objective.prepare(model)
    start, steps = time.perf_counter(), 0
    while True:
        for batch in torch.randperm(len(y)).split(args.batch_size):
            progress = (time.perf_counter() - start) / args.seconds
            if progress >= 1.0:
                return steps
            for group in adam.param_groups:
                group["lr"] = args.lr * rate_factor(recipe, progress)
            adam.zero_grad()
            objective.loss(model, x[batch], y[batch], progress).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            adam.step()
            steps += 1


def main() -> None:
    args = get_args()
    device = apply_common_arguments(args)
    data = load_mnist(args.data_dir)
    x, test = (images.reshape(len(images), SLICES, -1).to(device) for images in (data.train_x, data.test_x))
    model = SequenceClassifier(
        nn.LSTM(x.shape[2], args.hidden_size, batch_first=True), nn.Linear(args.hidden_size, CLASSES), pooling="mean"
    ).to(device)
    seconds = 1.0 if args.dry_run else args.seconds
    args.seconds = seconds
    steps = fit(model, x, data.train_y.to(device), Recipe(args.loss, eps=args.eps), args)
    x, y = test[: args.N], data.test_y[: args.N].to(device)
    clean = (model(x).argmax(dim=1) == y).double().mean().item()
    print(f"{steps} steps in {seconds:g} s; {len(y)} images of {data.source}: clean {100 * clean:.1f} %", flush=True)
    verified = torch.zeros_like(y, dtype=torch.bool)
    for method in ("ibp", "crown"):  # the second for those that the first leaves
        rest = (~verified).nonzero().flatten()
        margins = certified_margin(model, x[rest], y[rest], args.eps, norm=inf, method=method)
        verified[rest] = (margins > 0).all(dim=1)
        print(f"verified at l_inf {args.eps:g} up to {method}: {100 * verified.double().mean():.1f} %", flush=True)


if __name__ == "__main__":
    run_main(main)
