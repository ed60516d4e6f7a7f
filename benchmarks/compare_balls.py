"""Norm balls beside planes and curves on feed-forward networks: an MLP or a small CNN, trained here on MNIST.

    python benchmarks/compare_balls.py --net mlp --eps 0.5           # 784-100-100-10, trained plainly
    python benchmarks/compare_balls.py --net mlp --norms --eps 1.0   # every layer's spectral norm at 1
    python benchmarks/compare_balls.py --net cnn --norms --eps 0.3 --methods ball

One l_2 ball around each of the first test images, not cut to [0, 1], against all other classes. Prints a table: images
verified, mean of the worst margins, processor seconds an image (reading the network and its norms included).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.choices import METHODS
from utils.runs.cli import (
    ArgumentParser,
    add_common_arguments,
    answer_early,
    apply_common_arguments,
    positive_float,
    positive_int,
    run_main,
)


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("--net", choices=("mlp", "cnn"), default="mlp", help="architecture")
    parser.add_argument("--norms", action="store_true", help="train with spectral norms of all weights at 1")
    parser.add_argument("--epochs", type=positive_int, default=3, help="passes over the training data")
    parser.add_argument("--eps", type=positive_float, default=0.5, help="radius of the l_2 ball, in pixel values")
    parser.add_argument("--N", type=positive_int, default=20, help="test images, the misclassified left out")
    parser.add_argument("--time-limit", type=positive_float, default=20.0, help="seconds an image of bab")
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=("crown", "ball", "alpha", "curve"))
    add_common_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from data.mnist import load_mnist
from utils.certify import certified_margin

DTYPE = torch.float64


def build(kind: str) -> nn.Sequential:
    if kind == "mlp":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
        )
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1568, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def train(net: nn.Sequential, x: Tensor, labels: Tensor, epochs: int, norms: bool) -> None:
    layers = [layer for layer in net if isinstance(layer, (nn.Linear, nn.Conv2d))]
    for layer in layers if norms else ():
        parametrizations.spectral_norm(layer)  # of a convolution's kernel as a matrix
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(200):
            # Small norms make small logits: the loss sees them larger.
            loss = nn.functional.cross_entropy((8.0 if norms else 1.0) * net(x[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for layer in layers if norms else ():
        parametrize.remove_parametrizations(layer, "weight")


def main() -> None:
    args = get_args()
    apply_common_arguments(args)
    data = load_mnist(args.data_dir)
    net = build(args.net)
    used, count = (400, 1) if args.dry_run else (len(data.train_x), args.N)
    train(net, data.train_x[:used, None], data.train_y[:used], args.epochs, args.norms)
    net.eval()
    x, labels = data.test_x[:count, None], data.test_y[:count]
    with torch.no_grad():
        labels = net(x).argmax(dim=1) if args.dry_run else labels
        correct = net(x).argmax(dim=1) == labels
    x, labels = x[correct].to(DTYPE), labels[correct]
    net = net.to(DTYPE)
    print(f"{args.net}, norms at 1: {args.norms}, l_2, eps {args.eps:g}, {len(x)} of {count} images are correct")
    print("| method | verified | mean worst margin | s an image |")
    print("| :-- | --: | --: | --: |")
    for method in args.methods:
        started = time.process_time()
        with torch.no_grad():
            margins = certified_margin(net, x, labels, args.eps, method=method, time_limit=args.time_limit)
        worst, seconds = margins.amin(dim=1), (time.process_time() - started) / max(1, len(x))
        print(f"| {method} | {int((worst > 0).sum())} | {worst.mean():.3g} | {seconds:.2g} |", flush=True)


if __name__ == "__main__":
    run_main(main)
