"""Landscapes over two random directions of the weights: clean margins, and margins certified over balls around them.

    python scripts/draw_weight_landscape.py                    # a plain perceptron, and one trained against moves
    python scripts/draw_weight_landscape.py --models mlp_20_20_relu --p inf --eps 0.001 --span 0.3

Each matrix has a direction of its own norm, so that --span 1 goes as far as the matrix is long. At every point of a
grid the weights are moved so, and the mean over test images of the worst margin is drawn, and of its lower bound over
all moves of size --eps around that point. Writes landscape.csv and landscape.png to --out-dir.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.runs.cli import (
    ROOT,
    ArgumentParser,
    add_common_arguments,
    answer_early,
    apply_common_arguments,
    norm_value,
    positive_float,
    positive_int,
    run_main,
)
from utils.training.datasets import add_dataset_argument, load_images


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    models = ["mlp_64_64_relu", "mlp_64_64_relu_weights"]
    parser.add_argument("--models", nargs="+", default=models, help="folders of models, or paths of checkpoints")
    add_dataset_argument(parser)
    parser.add_argument("--p", type=norm_value, default=2.0, help="norm of the balls: 2 (whole matrices) or inf")
    parser.add_argument("--eps", type=positive_float, default=0.03, help="their radius")
    parser.add_argument("--method", choices=("crown", "crown-ibp", "ibp"), default="crown", help="how they are bounded")
    parser.add_argument("--N", type=positive_int, default=20, help="test images")
    parser.add_argument("--grid", type=positive_int, default=9, help="points along either direction")
    parser.add_argument("--span", type=positive_float, default=0.5, help="how far the grid goes to either side")
    parser.add_argument(
        "--out-dir", type=Path, default=ROOT / "docs" / "tables" / "weights", help="folder of the figure"
    )
    add_common_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from utils.choices import Method
from utils.experiments.tables import Case, load_all_images, norm_text, write_csv
from utils.question import Question
from utils.runs.results import replacing
from utils.weights import MovedWeights, WeightProblem, Weights

KINDS = ("clean", "certified")


def directions(model: nn.Module, seed: int) -> list[dict[str, Tensor]]:
    """Two random directions of all matrices and kernels, each as long as the matrix that it moves."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(2):
        noise = {n: torch.randn(v.shape, generator=generator) for n, v in model.named_parameters() if v.dim() > 1}
        values = dict(model.named_parameters())
        found.append({name: part * values[name].norm().cpu() / part.norm() for name, part in noise.items()})
    return found


def rows_of(case: Case, args: argparse.Namespace, steps: list[float]) -> list[dict]:
    """A row a point of the grid."""
    moved = MovedWeights(case.model, case.x, Weights(args.p))
    first, second = directions(case.model, args.seed)
    eps, rows = torch.full((len(case),), args.eps), []
    for a in steps:
        for b in steps:
            model = copy.deepcopy(case.model)
            for name, direction in first.items():
                model.get_parameter(name).add_((a * direction + b * second[name]).to(case.x.device))
            problem = WeightProblem(Question(model, case.x, case.labels), moved, Method(args.method))
            clean, bound = problem.clean_margins(torch.float32), problem.margins(eps, torch.float32)
            means = (float(part.amin(dim=1).mean()) for part in (clean, bound))
            rows.append({"model": case.name, "a": a, "b": b} | dict(zip(KINDS, means, strict=True)))
    return rows


def draw(rows: list[dict], args: argparse.Namespace, steps: list[float]) -> Figure:
    """A row of panels a model: clean margins, and what is certified."""
    names = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(8, 3.4 * len(names)), layout="constrained")
    title = f"mean worst margin of {args.N} test images ({args.dataset}); every matrix in a ball, bounds: {args.method}"
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(len(names), 2, squeeze=False)
    for number, name in enumerate(names):
        for panel, kind in zip(axes[number], KINDS, strict=True):
            values = torch.tensor([row[kind] for row in rows if row["model"] == name]).reshape(len(steps), -1)
            drawn = panel.contourf(steps, steps, values.T, levels=15, cmap="viridis")
            if float(values.min()) < 0 < float(values.max()):
                panel.contour(steps, steps, values.T, levels=[0.0], colors="white")
            figure.colorbar(drawn, ax=panel)
            size = "" if kind == "clean" else f", {norm_text(args.p)} {args.eps:g}"
            panel.set(title=f"{name}: {kind}{size}", xlabel="first direction (1: as long as each matrix)")
            panel.set_ylabel("second direction")
            panel.title.set_fontsize(9)
    return figure


@torch.no_grad()
def main() -> None:
    args = get_args()
    device = apply_common_arguments(args)
    data = load_images(args, train=False)
    points = 1 if args.dry_run else args.grid
    steps = torch.linspace(-args.span, args.span, points).tolist() if points > 1 else [0.0]
    rows = []
    for name in args.models:
        case = load_all_images(name, data, args, device)
        case.model.requires_grad_(False)
        found = rows_of(case, args, steps)
        rows += found
        middle = min(found, key=lambda row: row["a"] ** 2 + row["b"] ** 2)
        words = ", ".join(f"{kind} {middle[kind]:.3f}" for kind in KINDS)
        print(f"{case.name}: mean worst margin of {len(case)} test images of {data.source} in the middle: {words}")
    if args.dry_run:
        print("dry run: nothing written")
        return
    write_csv(args.out_dir / "landscape.csv", rows)
    with replacing(args.out_dir / "landscape.png") as temporary:
        draw(rows, args, steps).savefig(temporary, dpi=100, format="png")
    print(f"written to {args.out_dir}: landscape.csv, landscape.png")


if __name__ == "__main__":
    run_main(main)
