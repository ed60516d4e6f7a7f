"""How long a module's reading takes, at first and in every later call, beside the module's own forward of a sample.

    python benchmarks/time_readings.py
    python benchmarks/time_readings.py --steps 7 28 --hidden-size 128

Each module reads a sequence of rows of an image and is read into a graph in float64, as the bounds take it: at first
as a new module, then again with other inputs of that shape. Medians, on one thread; before each first reading garbage
is collected, which would else fall to one of them.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.runs.cli import ArgumentParser, answer_early, positive_int, run_main

ROW, CLASSES = 28, 10


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument(
        "--steps", nargs="+", type=positive_int, default=[28], help="frames of a sequence, of 28 values"
    )
    parser.add_argument("--hidden-size", type=positive_int, default=64, help="size of the hidden state")
    parser.add_argument("--repetitions", type=positive_int, default=20, help="readings timed of each kind")
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

import torch
from torch import Tensor, nn

from utils.network.reading import graph_of, read_network


class Last(nn.Module):
    """A recurrent layer and a linear one of its last state."""

    def __init__(self, kind: type[nn.RNNBase], hidden: int):
        super().__init__()
        self.rnn, self.fc = kind(ROW, hidden, batch_first=True), nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0][:, -1])


class ByHand(nn.Module):
    """The same with a loop over an nn.LSTMCell."""

    def __init__(self, hidden: int):
        super().__init__()
        self.cell, self.fc, self.hidden = nn.LSTMCell(ROW, hidden), nn.Linear(hidden, CLASSES), hidden

    def forward(self, x: Tensor) -> Tensor:
        state = (x.new_zeros(len(x), self.hidden),) * 2
        for frame in x.unbind(1):
            state = self.cell(frame, state)
        return self.fc(state[0])


def modules(hidden: int, steps: int) -> dict:
    """What makes a module of each kind."""
    return {
        "LSTM": lambda: Last(nn.LSTM, hidden),
        "GRU": lambda: Last(nn.GRU, hidden),
        "RNN": lambda: Last(nn.RNN, hidden),
        "LSTM cell, by hand": lambda: ByHand(hidden),
        "MLP": lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(steps * ROW, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES)
        ),
    }


def milliseconds(call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def read(module: nn.Module, x: Tensor) -> None:
    network, frames = read_network(module, x)
    graph_of(network, frames.shape[1], torch.float64, "plane")


def times(make, steps: int, repetitions: int) -> tuple[float, float, float]:
    """Medians of the first reading, of later ones, and of the module's forward of a sample."""
    first, later, forward = [], [], []
    for _ in range(repetitions):
        module, inputs = make().eval(), torch.rand(5, 8, steps, ROW)
        gc.collect()
        first.append(milliseconds(lambda module=module, x=inputs[0]: read(module, x)))
        for x in inputs[1:]:
            later.append(milliseconds(lambda module=module, x=x: read(module, x)))
            forward.append(milliseconds(lambda module=module, x=x: module(x[:1])))
    return statistics.median(first), statistics.median(later), statistics.median(forward)


@torch.no_grad()
def main() -> None:
    args = get_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"ms a reading, {args.hidden_size} hidden units, one thread, medians")
    print(f"{'module':20} {'steps':>5} {'first':>8} {'later':>8} {'forward':>8}")
    for steps in args.steps:
        for name, make in modules(args.hidden_size, steps).items():
            first, later, forward = times(make, steps, args.repetitions)
            print(f"{name:20} {steps:5} {first:8.1f} {later:8.2f} {forward:8.2f}", flush=True)


if __name__ == "__main__":
    run_main(main)
