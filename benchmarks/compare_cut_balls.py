"""What l_1 and l_2 balls gain that are cut to the valid range of pixels: certified and attacked radii of both kinds.

    python benchmarks/compare_cut_balls.py --N 20 --data-dir FOLDER
    python benchmarks/compare_cut_balls.py --models lstm_4_32 --p 2 --ball sequence

Images and random targets are those of the bound scripts; PGD's steps are cut as the balls are.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.choices import BALLS
from utils.experiments.arguments import relative_tolerance
from utils.runs.cli import (
    ArgumentParser,
    add_common_arguments,
    answer_early,
    apply_common_arguments,
    norm_value,
    positive_int,
    run_main,
)

MODELS = ("rnn_7_64_tanh", "rnn_7_64_relu", "lstm_4_32", "gru_4_32", "mlp_20_20_relu")


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME", help="folders of committed models")
    parser.add_argument("--p", type=norm_value, nargs="+", default=[1.0, 2.0], help="norms of the balls: 1, 2")
    parser.add_argument("--ball", choices=tuple(BALLS), default="frame", help="around every frame, or around all")
    parser.add_argument("--N", type=positive_int, default=20, help="test images a model, the misclassified left out")
    parser.add_argument("--tol", type=relative_tolerance, default=1e-2, help="relative width of brackets, and of PGD's")
    add_common_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

from data.mnist import load_mnist
from utils.attack.pgd import attack_radius
from utils.certify import certified_radius
from utils.experiments.tables import Case, load_case, markdown_table, norm_text


def measure(case: Case, norm: float, args: argparse.Namespace) -> list[float]:
    """Mean radii: certified and attacked, of whole balls, then of cut ones. Raises ArithmeticError if they cross."""
    means = []
    for clip in (None, (0.0, 1.0)):
        told = {"norm": norm, "ball": args.ball, "clip": clip, "targets": case.targets, "tol": args.tol}
        certified = certified_radius(case.model, case.x, case.labels, **told)
        attacked = attack_radius(case.model, case.x, case.labels, seed=args.seed, **told).radius
        if bool((attacked < certified).any()):
            raise ArithmeticError(f"an attack on {case.name} is smaller than a certified radius, clip {clip}")
        broken = attacked.isfinite()
        means += [float(certified.mean()), float(attacked[broken].mean()) if bool(broken.any()) else float("nan")]
    return means


def main() -> None:
    args = get_args()
    device = apply_common_arguments(args)
    data, rows = load_mnist(args.data_dir), []
    for name in args.models[: 1 if args.dry_run else None]:
        case = load_case(name, data, args, device)
        for norm in args.p:
            whole, attacked, cut, attacked_cut = measure(case, norm, args)
            gain = f"{100 * (cut / whole - 1):+.1f} %" if whole > 0 else ""
            cells = [f"{value:.4g}" for value in (whole, cut)]
            rows.append([case.name, norm_text(norm), *cells, gain, f"{attacked:.4g}", f"{attacked_cut:.4g}"])
            print(" ".join(rows[-1]), flush=True)
    header = ["model", "norm", "certified", "cut to [0, 1]", "gain", "PGD", "PGD, cut"]
    print("\n".join(markdown_table(header, rows, text_columns=2)))


if __name__ == "__main__":
    run_main(main)
