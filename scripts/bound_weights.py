"""How far weights may move before a prediction can change: certified radii in the weights, or bits after the point.

    python scripts/bound_weights.py --model rnn_7_64_tanh --p 2 --parameters rnn.weight_hh_l0 --attack
    python scripts/bound_weights.py --model mlp_20_20_relu --p inf --relative --bias
    python scripts/bound_weights.py --model cnn_small_16 --bits --N 1000   # rounded to multiples of 2^-b

Every chosen parameter moves in a ball of its own, all at once, and an image is certified if no such move changes its
class. With --bits all weights, biases too, are rounded to a fixed point, and the class that must stay is the model's
own, right or wrong. Writes rows.csv and run.json to --out-dir, if it is given.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.experiments.table_arguments import MODELS_DIR
from utils.runs.cli import (
    ROOT,
    ArgumentParser,
    ContradictionError,
    add_common_arguments,
    answer_early,
    apply_common_arguments,
    norm_value,
    positive_int,
    run_main,
)
from utils.training.datasets import add_dataset_argument, load_images

METHODS = ("crown", "crown-ibp", "ibp")


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument(
        "--model", required=True, help=f"folder in {MODELS_DIR.relative_to(ROOT)}, or the path of a checkpoint"
    )
    add_dataset_argument(parser)
    group = parser.add_argument_group("what moves")
    group.add_argument("--p", type=norm_value, help="inf (the default): every entry; 2: the whole matrix, Frobenius")
    group.add_argument("--parameters", nargs="+", help="names of those that move (default: all matrices and kernels)")
    group.add_argument("--bias", action="store_true", help="biases move too")
    group.add_argument("--relative", action="store_true", help="eps counts in the entries' sizes, or matrices' norms")
    group.add_argument("--apart", action="store_true", help="a weight may move otherwise at every step: a larger set")
    group.add_argument("--bits", action="store_true", help="all weights are rounded to multiples of 2^-b: the least b")
    group = parser.add_argument_group("how")
    group.add_argument("--N", type=positive_int, default=100, help="test images drawn")
    group.add_argument("--method", choices=METHODS, default="crown", help="how margins are bounded")
    group.add_argument("--attack", action="store_true", help="also the least eps at which descent breaks the image")
    group.add_argument("--out-dir", type=Path, help="folder for rows.csv and run.json (default: none are written)")
    add_common_arguments(parser)
    args = parser.parse_args()
    if args.bits and (args.p == 2 or args.parameters or args.relative or args.attack or args.apart):
        parser.error("--bits moves all entries by as much: leave out --p 2, --parameters, --relative and --attack")
    args.p = args.p or float("inf")
    return args


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

import torch

from utils.certify import search_radius
from utils.choices import Method
from utils.experiments.table_run import make_record
from utils.experiments.tables import Case, load_all_images, norm_text, write_csv, write_lines
from utils.question import Question
from utils.weights import MovedWeights, WeightProblem, Weights, attacked_radius, certified_bits, rounded


def find_radii(case: Case, args: argparse.Namespace) -> list[dict]:
    """A row an image that the model classifies rightly."""
    predictions = case.model(case.x).argmax(dim=1)
    right = (predictions == case.labels).nonzero().squeeze(-1)
    if not len(right):
        raise ValueError("the model misclassifies all images that were drawn")
    x, labels = case.x[right], case.labels[right]
    moved = MovedWeights(case.model, x, Weights(args.p, args.parameters, args.bias, args.relative))
    problem = WeightProblem(Question(case.model, x, labels), moved, Method(args.method), shared=not args.apart)
    radius = search_radius(problem).radius
    columns = {"index": case.index[right.cpu()].tolist(), "label": labels.tolist(), "radius": radius.tolist()}
    if args.attack:
        broken = attacked_radius(problem, radius.clamp(min=1e-12))
        if bool((broken <= radius).any()):
            raise ContradictionError("descent broke an image inside its certified radius")
        columns["attacked"] = broken.tolist()
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def find_bits(case: Case, args: argparse.Namespace) -> list[dict]:
    """A row an image: the fewest bits that are certified to keep its prediction."""
    predictions = case.model(case.x).argmax(dim=1)
    moved = MovedWeights(case.model, case.x, Weights(bias=True))
    problem = WeightProblem(Question(case.model, case.x, predictions), moved, Method(args.method))
    bits = certified_bits(problem).tolist()
    facts = zip(case.index.tolist(), case.labels.tolist(), predictions.tolist(), bits, strict=True)
    return [dict(zip(("index", "label", "prediction", "bits"), values, strict=True)) for values in facts]


@torch.no_grad()
def check_rounding(case: Case, bits: int) -> int:
    """The fewest bits at which really rounding the weights changes no prediction, if at most ``bits``."""
    names = [name for name, _ in case.model.named_parameters()]
    before = case.model(case.x).argmax(dim=1)
    for fewer in range(bits, 0, -1):
        if not torch.equal(rounded(case.model, fewer, names)(case.x).argmax(dim=1), before):
            if fewer == bits:
                raise ContradictionError(f"rounding to {bits} bits changes a prediction that was certified")
            return fewer + 1
    return 1


def summary_of(rows: list[dict], case: Case, args: argparse.Namespace) -> list[str]:
    if args.bits:
        bits = max(row["bits"] for row in rows)
        tried = check_rounding(case, bits)
        return [
            f"{bits} bits after the point, steps of {2.0**-bits:.3g}: proved to change none of {len(rows)} predictions",
            f"really rounding changes none from {tried} bits on",
        ]
    lines = []
    for name in ("radius", "attacked"):
        values = torch.tensor([row[name] for row in rows if name in row])
        if len(values):
            lines.append(f"{name:<9} min {values.min():.3e}  mean {values.mean():.3e}  max {values.max():.3e}")
    return lines


def main() -> None:
    args = get_args()
    device = apply_common_arguments(args)
    data = load_images(args, train=False)
    case = load_all_images(args.model, data, args, device)
    case.model.requires_grad_(False)
    what = "all weights, rounded" if args.bits else ", ".join(args.parameters or ["all matrices and kernels"])
    unit = "" if args.bits else f", each in an {norm_text(args.p)} ball" + " of its own size" * args.relative
    print(f"{case.name} on {len(case)} test images of {data.source}; {what}{unit}; bounds: {args.method}", flush=True)
    if args.dry_run:
        case.x, case.labels, case.index = case.x[:2], case.labels[:2], case.index[:2]
    started = time.perf_counter()
    rows = find_bits(case, args) if args.bits else find_radii(case, args)
    seconds = (time.perf_counter() - started) / len(rows)
    print("\n".join([*summary_of(rows, case, args), f"{len(rows)} images, {seconds:.3g} s per image"]))
    if args.dry_run or args.out_dir is None:
        return
    write_csv(args.out_dir / "rows.csv", rows)
    write_lines(args.out_dir / "run.json", [json.dumps(make_record(args, [case], data.source, device), indent=1)])
    print(f"results in {args.out_dir}: rows.csv, run.json")


if __name__ == "__main__":
    run_main(main)
