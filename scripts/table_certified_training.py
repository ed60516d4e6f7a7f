"""Clean, PGD and verified accuracy over eps of models that were trained to be verified, beside ordinary ones.

    python scripts/table_certified_training.py           # all such models in models/, all 10,000 test images
    python scripts/table_certified_training.py --quick
    python scripts/table_certified_training.py --models lstm_7_64 --eps 0.01 --N 1000 --p inf
    python scripts/table_certified_training.py --cnn --p inf --clip    # convolutional models in place of recurrent ones
    python scripts/table_certified_training.py --dataset cifar10 --data-dir FOLDER --p inf --clip
    python scripts/table_certified_training.py --models my_model.py:Net --weights w.pt --data x.npy --labels y.npy \
        --p inf --eps 0.1 --out-dir FOLDER

Every image goes through a cascade (utils/certify/cascade): it is misclassified as it is, verified by the cheapest bound
that can, broken by an attack, or undecided in the end. The table says which stage settled how many, in what time.
An image that is verified at an eps and broken at a smaller one stops the script with exit code 3 and leaves evidence.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.choices import BALLS
from utils.experiments.arguments import add_clip_argument, settle_clip, valid_range
from utils.experiments.table_arguments import RECURRENT, add_run_arguments, committed_models, models_dir
from utils.own.arguments import add_own_data, check_own_data
from utils.runs.cli import ArgumentParser, answer_early, positive_float, positive_int, run_main
from utils.training.datasets import add_dataset_argument

EPS = {1.0: (0.2, 0.5, 1.0, 2.0), 2.0: (0.05, 0.1, 0.2, 0.3), inf: (0.01, 0.02, 0.05, 0.1, 0.15)}
QUICK = {"N": 100, "time_limit": 1.0, "total_limit": 5.0}  # at most, with --quick


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    add_run_arguments(parser, norms=(inf,), batch_size=1000)
    parser.add_argument(
        "--eps",
        type=positive_float,
        nargs="+",
        help=f"radii in pixel values (default: {EPS[inf]} and those trained at)",
    )
    parser.add_argument(
        "--own-eps", action="store_true", help="only the radii that a model's architecture is trained at"
    )
    add_dataset_argument(parser)
    parser.add_argument(
        "--cnn", action="store_true", help="convolutional models in place of recurrent ones, as with cifar10"
    )
    parser.add_argument("--ball", choices=tuple(BALLS), help="a ball around every frame, or one around all (with --p)")
    add_clip_argument(parser)
    add_own_data(parser)
    group = parser.add_argument_group("effort")
    group.add_argument("--steps", type=positive_int, default=40, help="steps of PGD")
    group.add_argument("--restarts", type=positive_int, default=1, help="random starts of PGD for each class")
    group.add_argument(
        "--patience", type=positive_int, default=100, help="images in a row that a stage fails at before it gives up"
    )
    group.add_argument(
        "--time-limit", type=positive_float, default=10.0, help="seconds an image of each of alpha, curve and bab"
    )
    group.add_argument(
        "--total-limit",
        type=positive_float,
        default=300.0,
        help="seconds of these for all images of a model at an eps, shared evenly among batches; 1e-9 leaves them out",
    )
    parser.set_defaults(N=10000, p=None)
    args = parser.parse_args()
    args.cnn |= args.dataset != "mnist"
    if args.ball and not args.p:
        parser.error("--ball needs --p: without, models have the ball that they were trained for")
    if args.own_eps and args.eps:
        parser.error("--own-eps contradicts --eps: leave out one of them")
    if args.data and not args.eps:
        parser.error("radii are in the units of your --data: give --eps")
    for name, most in QUICK.items() if args.quick else ():
        setattr(args, name, min(getattr(args, name), most))
    return args


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

import torch

from data.mnist import ImageData
from utils.attack.pgd import AttackProblem, AttackResult
from utils.certify import Effort, cascade
from utils.certify.cascade import ATTACK_STAGES, CLEAN, STAGES
from utils.experiments.cascade.report import (
    accuracy_table,
    architecture_of,
    base,
    effort_lines,
    plot,
    recipe_of,
    stage_table,
    summarize,
)
from utils.experiments.cascade.rows import BROKEN, LETTERS, VERIFIED, CascadeKey, CascadeRow, Group, column, letters_of
from utils.experiments.plots import size_of_model
from utils.experiments.table_run import Report, Table, run_table, stop_by_contradiction
from utils.experiments.tables import Case, case_path, load_all_images, norm_text
from utils.experiments.wording import clip_text, is_own, unit_of
from utils.network.checkpoint import load_checkpoint
from utils.own.case import own_case
from utils.runs.work import Job, batches

NAME = "certified_training"
BALL_WORDS = {"frame": "a ball around every slice", "sequence": "one ball around the image"}


def default_models(args: argparse.Namespace) -> list[str]:
    """Folders of all models that were trained to be verified, and of the ordinary ones of their architectures.

    Those that were trained for chosen frames only are left out: they are verified where all frames move.
    """
    names = committed_models(certified=True, kinds=("cnn",) if args.cnn else RECURRENT, dataset=args.dataset)
    configs = {name: load_checkpoint(case_path(name, args.dataset))[1] for name in names}
    recipes = {name: recipe for name, recipe in ((n, recipe_of(config)) for n, config in configs.items()) if recipe}
    trained = {name: architecture_of(configs[name]) for name, recipe in recipes.items() if not recipe.get("frames")}
    if not trained:
        raise ValueError(f"no model in {models_dir(args.dataset)} was trained to be verified: name models by --models")
    ordinary = [name for name in configs if name not in recipes]
    return [*(name for name in ordinary if architecture_of(configs[name]) in trained.values()), *trained]


def load(name: str, data: ImageData | None, args: argparse.Namespace, device: torch.device) -> Case:
    """A model and all images drawn, sorted by their numbers; or one's own, and its inputs."""
    if args.data:
        return own_case(name, args, device)
    case = load_all_images(name, data, args, device)
    order = case.index.argsort()
    own = case.path.parent.name if recipe_of(case.config) else case.name
    return replace(case, name=own, x=case.x[order], labels=case.labels[order], index=case.index[order])


def threats_of(case: Case, cases: Sequence[Case], args: argparse.Namespace) -> list[tuple[float, str]]:
    """Norms and balls in which a model is verified: those of --p, or those that models like it were trained for."""
    if args.p:
        return [(norm, args.ball or "frame") for norm in dict.fromkeys(args.p)]
    like = [case] if recipe_of(case.config) else [one for one in cases if base(one) == base(case)]
    recipes = [recipe for recipe in (recipe_of(one.config) for one in like) if recipe]
    found = dict.fromkeys((float(recipe["p"]), recipe.get("ball", "frame")) for recipe in recipes)
    return list(found or {(inf, "frame"): None})


def eps_of(threat: tuple[float, str], case: Case, cases: Sequence[Case], args: argparse.Namespace) -> list[float]:
    """Those of --eps, or a grid and those at which models of the architecture were trained."""
    if args.eps:
        return sorted(set(args.eps))
    recipes = [recipe for recipe in (recipe_of(one.config) for one in cases if base(one) == base(case)) if recipe]
    trained = [float(r["train_eps"]) for r in recipes if (float(r["p"]), r.get("ball", "frame")) == threat]
    return sorted({*(() if args.own_eps and trained else EPS[threat[0]]), *trained})


def plan(cases: list[Case], args: argparse.Namespace) -> Table:
    jobs = []
    for case in cases:
        for threat in threats_of(case, cases, args):
            for eps in eps_of(threat, case, cases, args):
                for batch in batches(len(case), args.batch_size):
                    key = CascadeKey(case.name, *threat, eps, batch[0], len(batch))
                    jobs.append(Job([key], partial(measure, case, key, args)))
    return Table(folder_name(args), CascadeRow, jobs, partial(report, cases=cases, args=args))


def folder_name(args: argparse.Namespace) -> str:
    words = [NAME, *["cnn"] * args.cnn, *[args.dataset] * (args.dataset != "mnist"), *["clip"] * bool(args.clip)]
    return "_".join([*words, *["own"] * is_own(args)])


def threat_words(key: CascadeKey, args: argparse.Namespace) -> dict[str, Any]:
    return {"norm": key.norm, "ball": key.ball, "clip": valid_range(args)}


def measure(case: Case, key: CascadeKey, args: argparse.Namespace) -> list[CascadeRow]:
    """The row of a batch."""
    own = slice(key.first, key.first + key.images)
    effort = {name: getattr(args, name) for name in ("steps", "restarts", "seed", "patience", "time_limit")}
    effort["total_limit"] = args.total_limit * key.images / len(case)
    inputs, extra = (case.model, case.x[own], case.labels[own], key.eps), case.extra.part(own)
    result = cascade(*inputs, effort=Effort(**effort), extra=extra, **threat_words(key, args))
    costs: dict[str, float] = dict.fromkeys((column(stage, "tried") for stage in (CLEAN, *STAGES)), 0)
    costs |= dict.fromkeys((column(stage, "seconds") for stage in (CLEAN, *STAGES)), 0.0)
    for cost in (cost for cost in result.costs if cost.tried):
        costs |= {column(cost.stage, "tried"): cost.tried, column(cost.stage, "seconds"): cost.processor_seconds}
    letters = "".join(LETTERS[stage] for stage in result.settled_by)
    return [CascadeRow(**vars(key), outcomes=letters, **costs)]


def report(rows: list[CascadeRow], cases: list[Case], args: argparse.Namespace) -> Report:
    groups: dict[tuple, Group] = {}
    for row in sorted(rows, key=lambda row: (row.norm, row.ball, size_of_model(row.model), row.eps, row.first)):
        groups.setdefault((row.model, row.threat, row.eps), []).append(row)
    by_name = {case.name: case for case in cases}
    check_order(groups, by_name, args)
    summary = [summarize(group, by_name[group[0].model]) for group in groups.values()]
    cut = f"; perturbed {clip_text(args)}" if args.clip else ""
    what, unit = ("inputs", unit_of(args)) if is_own(args) else ("test images drawn", "pixel values in [0, 1]")
    lines = [
        "# Trained to be verified: clean, PGD and verified accuracy",
        "",
        f"Shares of all {what}, in per cent, against all other classes; eps in {unit}{cut}.",
        "PGD: not broken by the attack. Verified: no perturbation within eps changes the class, proved in float64.",
        f"PGD has {args.steps} steps and {args.restarts} random start(s) for each class; verified images need none.",
        "Undecided: neither verified nor broken. Seconds are the processor's, for all images.",
    ]
    for threat in dict.fromkeys(row.threat for group in groups.values() for row in group):
        own = [record for record in summary if (float(record["norm"]), record["ball"]) == threat]
        ball = BALL_WORDS["sequence" if all(case.num_frames == 1 for case in cases) else threat[1]]
        lines += ["", f"## {norm_text(threat[0])}, {ball}", "", *accuracy_table(own)]
        lines += ["", "Settled by each stage, in per cent of all images (images that it tried, its seconds):", ""]
        lines += stage_table(own)
    lines += ["", *effort_lines(args)]
    lines = [line.replace("image", "input") for line in lines] if is_own(args) else lines
    return Report(summary, lines, plot(summary, args))


def check_order(groups: dict[tuple, Group], cases: dict[str, Case], args: argparse.Namespace) -> None:
    """Raise ContradictionError, with the evidence saved, if an image is broken below an eps at which it is verified."""
    letters = {key: letters_of(group) for key, group in groups.items()}
    for (model, threat, eps), own in letters.items():
        for above in (key for key in letters if key[:2] == (model, threat) and key[2] > eps):
            pairs = enumerate(zip(own, letters[above], strict=True))
            for sample in (n for n, (low, high) in pairs if low in BROKEN and high in VERIFIED):
                stop(cases[model], groups[model, threat, eps][0], sample, above[2], args)


def stop(case: Case, key: CascadeKey, sample: int, verified_eps: float, args: argparse.Namespace) -> None:
    """Find the attack on the image anew, and stop with it as the evidence."""
    own, threat = slice(sample, sample + 1), threat_words(key, args)
    effort = Effort(ATTACK_STAGES, steps=args.steps, restarts=args.restarts, seed=args.seed)
    inputs, extra = (case.model, case.x[own], case.labels[own]), case.extra.part(own)
    found = cascade(*inputs, key.eps, effort=effort, extra=extra, **threat)
    unperturbed = AttackProblem(*inputs, extra=extra).balls.x[0]
    attack = AttackResult(found.examples.get(0, unperturbed)[None], found.margins)
    facts = {"eps": key.eps, "verified at eps": verified_eps, "attack's margin": found.margins.item()}
    norm = threat.pop("norm")
    stop_by_contradiction(args.out_dir / folder_name(args), case, sample, norm, attack, False, facts, **threat)


def main() -> None:
    args = get_args()
    check_own_data(args, args.models or [])
    settle_clip(args)
    if args.data and not args.models:
        raise ValueError("--data is what models of your own are asked about: name them by --models FILE.py:NAME")
    args.models = args.models or default_models(args)
    run_table(args, partial(plan, args=args), load)


if __name__ == "__main__":
    run_main(main)
