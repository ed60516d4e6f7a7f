"""What each method certifies, how near that comes to the attack, and what it costs; and the certified share over eps.

    python scripts/table_methods.py                      # all committed models, 20 images, p = 2 and inf
    python scripts/table_methods.py --quick
    torchrun --nproc-per-node 2 scripts/table_methods.py --methods crown alpha --p inf --resume
    python scripts/table_methods.py --models my_model.py:Net --weights w.pt --data x.npy --labels y.npy --out-dir FOLDER

Methods are compared on the same images. A certified radius is a lower bound of the least distortion that changes the
class, PGD's an upper bound: a radius above it is a contradiction, at which the script stops with exit code 3 and saves
the evidence. No tuned method may certify less than a cheaper one: what falls short by more than the search's tolerance
is said at once, counted and listed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.choices import METHODS
from utils.choices.method import TUNED_METHODS
from utils.experiments.arguments import add_effort_arguments, fill_in, refuse_balls
from utils.experiments.table_arguments import add_run_arguments, finish_run_arguments
from utils.own.arguments import add_own_data, check_own_data
from utils.runs.cli import ArgumentParser, answer_early, run_main

CHEAPEST_FIRST = tuple(dict.fromkeys(("ibp", "crown-ibp", *METHODS)))
QUICK = {"alpha_steps": 6, "curve_steps": 2, "time_limit": 1.0}  # at most, with --quick


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    add_run_arguments(parser, norms=(2.0, inf), batch_size=10)
    parser.add_argument(
        "--methods", choices=METHODS, nargs="+", default=("crown", *TUNED_METHODS), help="methods to compare"
    )
    parser.add_argument(
        "--targeted", action="store_true", help="keep away from one random class an image, not from all others"
    )
    add_effort_arguments(parser)
    add_own_data(parser)
    args = finish_run_arguments(parser.parse_args(), quick_images=2)
    args.methods = sorted(set(args.methods), key=CHEAPEST_FIRST.index)
    refuse_balls(args.methods, "--methods")
    fill_in(args, METHODS)  # all efforts may be given, those of methods that are left out too
    if args.quick:
        for name, most in QUICK.items():
            setattr(args, name, min(getattr(args, name), most))
    return args


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

import torch

from data.mnist import ImageData
from utils.attack.pgd import AttackResult, RadiusAttackResult, attack_radius
from utils.certify import certified_radius
from utils.experiments.methods.report import effort_line, method_table, model_table, order_lines, plot, summarize
from utils.experiments.methods.rows import TOL, Group, MethodKey, MethodRow, shortfalls
from utils.experiments.plots import size_of_model
from utils.experiments.table_run import Report, Table, batch_jobs, run_table, stop_by_contradiction
from utils.experiments.tables import Case, load_case, norm_text
from utils.experiments.wording import is_own
from utils.own.case import own_case

NAME = "methods"


def plan(cases: list[Case], args: argparse.Namespace) -> Table:
    keys, find = partial(keys_of, args=args), partial(measure, args=args)
    jobs = batch_jobs(cases, args.p, args.batch_size, keys, find)
    return Table(folder_name(args), MethodRow, jobs, partial(report, args=args))


def folder_name(args: argparse.Namespace) -> str:
    return f"{NAME}_own" if is_own(args) else NAME


def load(name: str, data: ImageData | None, args: argparse.Namespace, device: torch.device) -> Case:
    """A model and the images that it classifies correctly; or one's own, and such inputs."""
    if is_own(args):
        return own_case(name, args, device, targeted=args.targeted, only_right=True)
    return load_case(name, data, args, device)


def keys_of(case: Case, norm: float, sample: int, args: argparse.Namespace) -> list[MethodKey]:
    numbers = [int(values[sample]) for values in (case.index, case.labels)]
    target = int(case.targets[sample]) if args.targeted else "all"
    return [MethodKey(case.name, norm, *numbers, target, method) for method in args.methods]


def measure(case: Case, norm: float, batch: list[int], args: argparse.Namespace) -> list[MethodRow]:
    """The rows of some images. Raises ContradictionError if a certified radius is above the attack's."""
    targets = case.targets[batch] if args.targeted else None
    inputs = (case.model, case.x[batch], case.labels[batch])
    options = {"norm": norm, "targets": targets, "batch_size": len(batch), "extra": case.extra.part(batch)}
    effort = {name: getattr(args, name) for name in ("alpha_steps", "curve_steps", "time_limit")}
    attack, attack_seconds, _ = timed(partial(attack_radius, *inputs, **options))
    columns = {}
    for method in args.methods:
        found, *seconds = timed(partial(certified_radius, *inputs, method=method, tol=TOL, **effort, **options))
        radii = found.tolist()
        check_attack(case, norm, batch, method, radii, attack, args)
        columns[method] = (radii, *(value / len(batch) for value in seconds))
    rows = []
    for place, sample in enumerate(batch):
        radius = attack.radius[place].item()
        for key in keys_of(case, norm, sample, args):
            radii, wall, processor = columns[key.method]
            rows.append(
                MethodRow(
                    **vars(key),
                    radius=radii[place],
                    attack=radius,
                    seconds=wall,
                    processor_seconds=processor,
                    attack_seconds=attack_seconds / len(batch),
                )
            )
    for words in shortfalls(rows, args.methods):
        print(f"SHORTFALL: {words}", file=sys.stderr, flush=True)
    return rows


def timed(find: Callable[[], Any]) -> tuple[Any, float, float]:
    """What ``find`` finds, and the seconds of the clock and of the processor that it takes."""
    started, begun = time.perf_counter(), time.process_time()
    found = find()
    return found, time.perf_counter() - started, time.process_time() - begun


def check_attack(
    case: Case,
    norm: float,
    batch: list[int],
    method: str,
    radii: list[float],
    attack: RadiusAttackResult,
    args: argparse.Namespace,
) -> None:
    for place, radius in enumerate(radii):
        broken = attack.radius[place].item()
        if not radius <= broken:
            own = AttackResult(attack.x[place : place + 1], attack.margin[place : place + 1])
            facts = {"method": method, "certified": radius, "pgd": broken}
            folder = args.out_dir / folder_name(args)
            stop_by_contradiction(folder, case, batch[place], norm, own, targeted=args.targeted, facts=facts)


def report(rows: list[MethodRow], args: argparse.Namespace) -> Report:
    groups: dict[tuple[str, float], Group] = {}
    for row in sorted(rows, key=lambda row: (row.norm, size_of_model(row.model))):
        groups.setdefault((row.model, row.norm), {}).setdefault(row.method, []).append(row)
    summary = [summarize(group, method) for group in groups.values() for method in group]
    against = "one random other class an image" if args.targeted else "all other classes"
    units = "pixel values in [0, 1], a ball around every slice."
    units = "units of the data, a ball around every frame." if is_own(args) else units
    lines = [
        "# Methods: radius and time",
        "",
        f"Certified radius by each method against {against}, on the images that are classified correctly; in",
        f"{units} PGD: the smallest perturbation that the attack found, an upper",
        'bound. "Of means" is mean radius / mean attack radius, "mean of ratios" that of radius / attack radius of',
        f"every image. Seconds are those per image of a whole search, in batches of {args.batch_size}; a tuned",
        "method's hold those of the cheaper ones that it begins with.",
    ]
    for norm in dict.fromkeys(record["norm"] for record in summary):
        own = [record for record in summary if record["norm"] == norm]
        lines += ["", f"## {norm_text(float(norm))}", "", *model_table(own)]
        if len({record["model"] for record in own}) > 1:
            lines += ["", "Means over the models:", "", *method_table(own)]
    lines += ["", effort_line(args), "", *order_lines(rows, args)]
    lines = [line.replace("image", "input") for line in lines] if is_own(args) else lines
    return Report(summary, lines, plot(groups, against, args))


def main() -> None:
    args = get_args()
    check_own_data(args, args.models)
    run_table(args, partial(plan, args=args), load)


if __name__ == "__main__":
    run_main(main)
