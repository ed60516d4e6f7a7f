"""Forward mode against backward passes: radii and processor time where one frame of a sequence moves.

    python benchmarks/forward_mode.py             # a committed model of questions, and random wide networks
    python benchmarks/forward_mode.py --quick     # smaller ones

Prints a line a case: what the method's mean radius is of crown's, and how much less time it takes.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.runs.cli import ROOT, ArgumentParser, answer_early, positive_int, run_main

METHODS = ("crown", "forward-backward", "forward")


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("--batch", type=positive_int, default=10, help="sequences")
    parser.add_argument("--repeat", type=positive_int, default=2, help="runs, of which the fastest counts")
    parser.add_argument("--quick", action="store_true", help="one small case only")
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

import torch
from torch import Tensor, nn

from utils.certify import certified_radius
from utils.network.checkpoint import load_checkpoint
from utils.network.models import SequenceClassifier


def questions(batch: int) -> tuple[SequenceClassifier, Tensor]:
    """The LSTM of 32 units for questions, and ten random words."""
    model, config = load_checkpoint(ROOT / "models" / "question_classifier" / "lstm_32" / "lstm")
    table = config["embeddings"].float()
    return model, table[torch.randint(1, len(table), (batch, 10))]


def random_network(kind: type[nn.RNNBase], hidden: int, frames: int, batch: int) -> tuple[SequenceClassifier, Tensor]:
    """With torch's initial weights, and frames of eight values."""
    model = SequenceClassifier(kind(8, hidden, batch_first=True), nn.Linear(hidden, 5))
    return model, torch.randn(batch, frames, 8)


def compare(title: str, model: SequenceClassifier, x: Tensor, frame: int, repeat: int) -> None:
    labels, found = model(x).argmax(dim=1), {}
    for method in METHODS:
        seconds = []
        for _ in range(repeat):
            begun = time.process_time()
            radius = certified_radius(model, x, labels, frames=frame, method=method, tol=1e-2)
            seconds.append(time.process_time() - begun)
        found[method] = radius, min(seconds)
    radius, seconds = found["crown"]
    for method in METHODS[1:]:
        share, faster = float((found[method][0] / radius).mean()), seconds / found[method][1]
        print(
            f"{title:<34} frame {frame}  {method:<16} radius {share:7.1%} of crown's, {faster:5.2f} times as fast",
            flush=True,
        )


@torch.no_grad()
def main() -> None:
    args = get_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if args.quick:
        compare("random LSTM 4 x 8", *random_network(nn.LSTM, 8, 4, 2), 0, 1)
        return
    model, x = questions(args.batch)
    for frame in (0, 5, 8):
        compare("questions, LSTM 10 x 32", model, x, frame, args.repeat)
    for kind, hidden in ((nn.RNN, 256), (nn.LSTM, 128)):
        title = f"random {kind.__name__} 6 x {hidden}"
        compare(title, *random_network(kind, hidden, 6, args.batch), 0, args.repeat)


if __name__ == "__main__":
    run_main(main)
