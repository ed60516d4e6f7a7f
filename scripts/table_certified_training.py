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
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, ClassVar

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
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from data.mnist import ImageData
from utils.attack.pgd import AttackProblem, AttackResult
from utils.certify import Effort, cascade
from utils.certify.cascade import ATTACK_STAGES, CLEAN, STAGES
from utils.experiments.plots import columns_of_panels, headline, images_text, norm_symbol, size_of_model, tidy
from utils.experiments.table_run import Report, Table, run_table, stop_by_contradiction
from utils.experiments.tables import OWN, Case, case_path, load_all_images, markdown_table, norm_text
from utils.experiments.wording import clip_text, is_own, noun_of, short_unit, unit_of
from utils.network.checkpoint import Config, load_checkpoint, model_name
from utils.own.case import own_case
from utils.runs.rows import KeyedRow
from utils.runs.work import Job, batches

NAME = "certified_training"
# A letter an image: the stage that settled it.
LETTERS = {CLEAN: "w", "ibp": "i", "runner-up": "r", "pgd": "p", "crown-ibp": "m", "crown": "c", "alpha": "a"}
LETTERS |= {"curve": "k", "bab": "b", "": "-"}
WRONG, UNDECIDED, BROKEN = LETTERS[CLEAN], LETTERS[""], "".join(LETTERS[stage] for stage in ATTACK_STAGES)
VERIFIED = "".join(LETTERS[stage] for stage in STAGES if stage not in ATTACK_STAGES)
COLORS = ("tab:blue", "tab:green", "tab:orange", "tab:purple", "tab:brown", "tab:cyan")
ORDINARY = "ordinary"
STAGE_NAMES = {CLEAN: "wrong as it is", "runner-up": "PGD, runner-up", "pgd": "PGD, all classes"}
BALL_WORDS = {"frame": "a ball around every slice", "sequence": "one ball around the image"}


@dataclass(frozen=True)
class CascadeKey:
    """A model, a threat, a radius in pixel values, and a batch of the images drawn, which are sorted by number."""

    model: str
    norm: float
    ball: str
    eps: float
    first: int
    images: int

    @property
    def threat(self) -> tuple[float, str]:
        return self.norm, self.ball


@dataclass(frozen=True)
class CascadeRow(CascadeKey, KeyedRow):
    """The outcomes of a batch, a letter of ``LETTERS`` an image, and what each stage took.

    That is: how many images it tried, and the processor's seconds.
    """

    KEY: ClassVar[type] = CascadeKey

    outcomes: str
    clean_tried: int
    clean_seconds: float
    ibp_tried: int
    ibp_seconds: float
    runner_up_tried: int
    runner_up_seconds: float
    pgd_tried: int
    pgd_seconds: float
    crown_ibp_tried: int
    crown_ibp_seconds: float
    crown_tried: int
    crown_seconds: float
    alpha_tried: int
    alpha_seconds: float
    curve_tried: int
    curve_seconds: float
    bab_tried: int
    bab_seconds: float

    def cost(self, stage: str, kind: str) -> float:
        return getattr(self, column(stage, kind))


def column(stage: str, kind: str) -> str:
    """Where a row has what a stage took; ``kind`` is "tried" or "seconds"."""
    return f"{stage.replace('-', '_')}_{kind}"


def recipe_of(config: Config) -> dict[str, Any] | None:
    """How a model was trained to be verified; None of an ordinary one."""
    return config.get("certified") or None


def architecture_of(config: Config) -> str:
    """The name of a model of this cell, with these sizes, trained without a recipe; its head may read other states."""
    return model_name({key: value for key, value in config.items() if key != "recipe"} | {"pooling": "last"})


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


def base(case: Case) -> str:
    return case.name if case.is_own else architecture_of(case.config)


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


Group = list[CascadeRow]  # all batches of a model and an eps


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


def letters_of(group: Group) -> str:
    """The outcomes of all images, a letter each."""
    return "".join(row.outcomes for row in group)


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


def summarize(group: Group, case: Case) -> dict[str, Any]:
    letters, first = letters_of(group), group[0]
    total = len(letters)
    wrong, broken, verified = (sum(letter in kind for letter in letters) for kind in (WRONG, BROKEN, VERIFIED))
    unbroken = total - wrong - broken
    record = {"model": first.model, "architecture": base(case), "recipe": recipe_text(case.config)}
    record |= {"norm": f"{first.norm:g}", "ball": first.ball, "eps": first.eps, "images": total}
    record |= {"clean": 1 - wrong / total, "pgd": unbroken / total, "verified": verified / total}
    record["verified_of_unbroken"] = verified / unbroken if unbroken else 1.0
    record["undecided"] = letters.count(UNDECIDED) / total
    record["processor_seconds"] = sum(row.cost(stage, "seconds") for row in group for stage in (CLEAN, *STAGES))
    for stage in (CLEAN, *STAGES):
        record[f"settled_by_{stage}"] = letters.count(LETTERS[stage]) / total
        record[f"tried_by_{stage}"] = sum(row.cost(stage, "tried") for row in group)
        record[f"{stage}_processor_seconds"] = sum(row.cost(stage, "seconds") for row in group)
    return record


def recipe_text(config: Config) -> str:
    recipe = recipe_of(config)
    if recipe is None:
        return "–" if config["architecture"] == OWN else ORDINARY
    ball = ", one ball" * (recipe.get("ball", "frame") == "sequence") + ", cut boxes" * bool(recipe.get("clip"))
    return f"{recipe['loss']}, {norm_text(float(recipe['p']))} {float(recipe['train_eps']):g}{ball}"


def accuracy_table(records: list[dict]) -> list[str]:
    header = [
        "model",
        "training",
        "eps",
        "images",
        "clean",
        "PGD",
        "verified",
        "verified / PGD",
        "undecided",
        "seconds",
    ]
    cells = []
    for record in records:
        shares = [f"{100 * record[name]:.2f}" for name in ("clean", "pgd", "verified")]
        ratio = f"{record['verified_of_unbroken']:.3f}" if record["pgd"] > 0 else "–"
        row = [f"`{record['model']}`", record["recipe"], f"{record['eps']:g}", str(record["images"]), *shares, ratio]
        cells.append([*row, f"{100 * record['undecided']:.2f}", f"{record['processor_seconds']:.3g}"])
    return markdown_table(header, cells, text_columns=2)


def stage_table(records: list[dict]) -> list[str]:
    used = [stage for stage in (CLEAN, *STAGES) if any(r[f"tried_by_{stage}"] for r in records)]
    cells = []
    for record in records:
        shares = [stage_cell(record, stage) for stage in used]
        cells.append([f"`{record['model']}`", f"{record['eps']:g}", *shares])
    return markdown_table(["model", "eps", *(STAGE_NAMES.get(stage, stage) for stage in used)], cells)


def stage_cell(record: dict, stage: str) -> str:
    """The share that a stage settled, in per cent, what it tried, and its seconds; a dash where nothing was left."""
    tried, seconds = record[f"tried_by_{stage}"], record[f"{stage}_processor_seconds"]
    return f"{100 * record[f'settled_by_{stage}']:.2f} ({tried}, {seconds:.2g} s)" if tried else "–"


def effort_lines(args: argparse.Namespace) -> list[str]:
    names = STAGE_NAMES | {"": "undecided"}
    letters = ", ".join(f"`{letter}` {names.get(stage, stage)}" for stage, letter in LETTERS.items())
    return [
        f"Effort: a stage takes the most promising images of a batch of {args.batch_size} first, and gives up after",
        f"{args.patience} in a row that it cannot settle (alpha and bab after a tenth of that). These two may take",
        f"{args.time_limit:g} s an image each, and together {args.total_limit:g} s for a model at an eps.",
        f"rows.csv has a letter an image, in the order of their numbers: {letters}.",
    ]


def plot(summary: list[dict], args: argparse.Namespace) -> Figure:
    """Accuracies over eps, a panel for each architecture and threat, a colour for each of its models."""
    panels: dict[tuple, list[dict]] = {}
    for record in summary:
        panels.setdefault((record["architecture"], record["norm"], record["ball"]), []).append(record)
    columns = columns_of_panels(len(panels))
    count = -(-len(panels) // columns)
    figure = Figure(figsize=(max(5.0, 0.8 + 3.1 * columns), 1.2 + 2.8 * count), layout="constrained")
    every = figure.subplots(count, columns, squeeze=False, sharey=True)
    for axes in every.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, ((name, norm, ball), records) in zip(every.flat, panels.items(), strict=False):
        plot_panel(axes, records)
        axes.set_title(name + ", one ball" * (ball == "sequence"), fontsize=9)
        axes.set_xlabel(rf"$\epsilon$ ({norm_symbol(norm)}, {short_unit(args)})", fontsize=9)
    for axes in every[:, 0]:
        axes.set_ylabel(f"share of {noun_of(args)} (%)", fontsize=9)
    styles = {"clean": ":", "not broken by PGD": "--", "verified": "-"}
    handles = [Line2D([], [], color="black", linestyle=style, label=name) for name, style in styles.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    shown = images_text([record["images"] for record in summary], noun_of(args))
    headline(figure, f"{shown}, all classes{f'; {clip_text(args)}' if args.clip else ''}")
    return figure


def plot_panel(axes: Axes, records: list[dict]) -> None:
    colors = iter(COLORS)
    for model in dict.fromkeys(record["model"] for record in records):
        own = [record for record in records if record["model"] == model]
        color = "black" if own[0]["recipe"] == ORDINARY else next(colors, "tab:gray")
        eps, clean = [0.0, *(record["eps"] for record in own)], 100 * own[0]["clean"]
        axes.plot(eps, [clean] * len(eps), ":", color=color, linewidth=1)
        for kind, style in (("pgd", "--"), ("verified", "o-")):
            label = {"label": own[0]["recipe"]} if kind == "verified" else {}
            axes.plot(eps, [clean, *(100 * r[kind] for r in own)], style, color=color, markersize=3, **label)
    axes.set_ylim(0, 103)
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", nbins=5)
    axes.tick_params(labelsize=8)
    axes.legend(frameon=False, fontsize=7)
    tidy(axes)


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
