"""Whether splitting operands of neurons pays beside bab: worst margins of single images after the same seconds.

    python benchmarks/compare_splits.py --models rnn_7_64_relu lstm_4_32 gru_4_32 --eps 0.13 0.2 0.2 --time-limit 60

Both begin with tuned curves. Splitting takes the open part with the least margin, cuts the operands of the neurons that
lose most there, one at a time, at 0 (relu) or in the middle of their intervals, and keeps the cut whose worse half is
best. Curves stay as they were tuned.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.experiments.table_arguments import committed_models
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
    names = committed_models(certified=True)
    parser.add_argument("--models", choices=names, nargs="+", required=True, help="committed models")
    parser.add_argument("--eps", type=positive_float, nargs="+", required=True, help="l_2 eps of every frame, a model")
    parser.add_argument("--N", type=positive_int, default=1, help="test images a model, the misclassified left out")
    parser.add_argument("--candidates", type=positive_int, default=8, help="neurons that are tried for a cut")
    parser.add_argument("--time-limit", type=positive_float, default=60.0, help="seconds an image of each way")
    add_common_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

import torch
from torch import Tensor

from data.mnist import as_frames, load_mnist
from utils.bounds.curve import CurvedPass
from utils.bounds.passes import intersect
from utils.certify.bab import TUNING, best_margins
from utils.certify.problem import MarginProblem, margin_problem, select_curves
from utils.graph.nonlinear import NonLinear
from utils.network.checkpoint import load_checkpoint
from utils.runs.cli import ROOT


class CutPass(CurvedPass):
    """A curved pass in which intervals of some operands are cut; it holds where operands are in them."""

    def __init__(self, *arguments, cuts: dict, **options):
        self.cuts, self.losses = cuts, {}
        super().__init__(*arguments, **options)

    def interval(self, node):
        new = node not in self._intervals
        found = super().interval(node)
        if new and node.index in self.cuts:
            found = self._intervals[node] = intersect(found, self.cuts[node.index])
        return found

    def _meet(self, node, coefficients):
        if self._target is self.graph.output and isinstance(node, NonLinear):
            lower, upper = self.relaxation(node)
            for operand, low, high in zip(node.parents, lower.slopes, upper.slopes, strict=True):
                gap = (high - low).abs() + (upper.intercept - lower.intercept).abs()
                width = self.interval(operand)[1] - self.interval(operand)[0]
                self.losses[operand.bounded_through.index, getattr(operand, "start", 0)] = (
                    coefficients.abs().amax(dim=1) * gap * width.sign()
                )
        return super()._meet(node, coefficients)


def bound(problem: MarginProblem, eps: Tensor, parts: list[dict]) -> tuple[Tensor, CutPass]:
    """Worst margins, (parts,), and the pass."""
    same = torch.zeros(len(parts), dtype=torch.long)
    graph = problem.graph(TUNING, same)
    perturbation = problem._perturbation(eps.expand(len(parts)), same, TUNING)
    cuts = {}
    for index in {index for part in parts for index in part}:
        size = graph.nodes[index].size
        everything = (torch.full((size,), -torch.inf), torch.full((size,), torch.inf))
        ends = [part.get(index, everything) for part in parts]
        cuts[index] = tuple(torch.stack([end[k] for end in ends]) for k in (0, 1))
    passed = CutPass(graph, perturbation, select_curves(problem.curves, same, TUNING), cuts=cuts)
    return passed.margin(problem.rows[same].to(TUNING)).amin(dim=1), passed


def halves(passed: CutPass, part: dict, count: int) -> list[dict]:
    """Two parts for every neuron that may be worth a cut."""
    scores = [(float(v), key, k) for key, loss in passed.losses.items() for k, v in enumerate(loss[0])]
    made = []
    for _, (index, start), k in sorted(scores, key=lambda score: -score[0])[:count]:
        node, k = passed.graph.nodes[index], start + k
        low, high = (end[0, k] for end in passed.interval(node))
        at = torch.zeros(()) if bool(low < 0) and bool(high > 0) else 0.5 * (low + high)
        for side in (0, 1):
            ends = part.get(index, (torch.full((node.size,), -torch.inf), torch.full((node.size,), torch.inf)))
            ends = [end.clone() for end in ends]
            ends[1 - side][k] = torch.minimum(ends[1][k], at) if side == 0 else torch.maximum(ends[0][k], at)
            made.append(part | {index: tuple(ends)})
    return made


@torch.no_grad()
def by_splitting(problem: MarginProblem, eps: Tensor, args: argparse.Namespace) -> tuple[float, int]:
    """Worst margin of all parts, and how many there are, when time is up."""
    deadline = time.perf_counter() + args.time_limit
    parts, margins = [{}], [float(bound(problem, eps, [{}])[0])]
    while time.perf_counter() < deadline:
        worst = margins.index(min(margins))
        part, margin = parts.pop(worst), margins.pop(worst)
        _, passed = bound(problem, eps, [part])
        children = halves(passed, part, args.candidates)
        found = bound(problem, eps, children)[0].unflatten(0, (-1, 2))
        best = int(found.amin(dim=1).argmax())
        parts += children[2 * best : 2 * best + 2]
        margins += found[best].clamp(min=margin).tolist()
    return min(margins), len(parts)


@torch.no_grad()
def main() -> None:
    args = get_args()
    apply_common_arguments(args)
    args.time_limit = min(args.time_limit, 1.0) if args.dry_run else args.time_limit
    if len(args.eps) != len(args.models):
        raise ValueError("--eps takes one number a model")
    data = load_mnist(args.data_dir)
    print("| model | eps | image | curve | bab | split | parts |")
    print("| :-- | --: | --: | --: | --: | --: | --: |")
    for name, size in zip(args.models, args.eps, strict=True):
        path = next(p for p in sorted((ROOT / "models" / "mnist_classifier" / name).iterdir()) if p.suffix == "")
        model, _ = load_checkpoint(path)
        frames = int(name.split("_")[1])
        for image in range(1 if args.dry_run else args.N):
            x, label = as_frames(data.test_x[image : image + 1], frames), data.test_y[image : image + 1]
            label = model(x).argmax(dim=1) if args.dry_run else label
            if model(x).argmax(dim=1) != label:
                continue
            problem = margin_problem(model, x, label, time_limit=args.time_limit, method="bab")
            eps = torch.tensor([size])
            problem.tune_curves(eps, TUNING, 2 if args.dry_run else 40)
            margins = problem.margins(eps, TUNING)
            further = torch.maximum(margins, best_margins(problem, eps, TUNING))
            split, parts = by_splitting(problem, eps, args)
            worst = f"{float(margins.min()):.3f} | {float(further.min()):.3f} | {split:.3f}"
            print(f"| `{name}` | {size:g} | {image} | {worst} | {parts} |", flush=True)


if __name__ == "__main__":
    run_main(main)
