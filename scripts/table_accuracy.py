"""Verified, attacked and clean accuracy over eps, against all other classes.

    python scripts/table_accuracy.py                     # all committed models, 50 images, p = inf
    python scripts/table_accuracy.py --quick
    torchrun --nproc-per-node 2 scripts/table_accuracy.py --p 2 --eps 0.02 0.05 0.1 0.2 --resume

All accuracies are shares of all images drawn. Clean: classified correctly. Attacked: still so after PGD. Verified: no
perturbation of the slices within eps changes the class. Verified <= attacked <= clean holds image by image; otherwise
the script stops with exit code 3 and saves the evidence.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.experiments.table_arguments import add_run_arguments, finish_run_arguments
from utils.runs.cli import ArgumentParser, answer_early, positive_float, positive_int, run_main

EPS = {1.0: (0.05, 0.1, 0.2, 0.5, 1.0), 2.0: (0.02, 0.05, 0.1, 0.2, 0.3), inf: (0.002, 0.005, 0.01, 0.02, 0.03)}


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    add_run_arguments(parser, norms=(inf,), batch_size=25)
    parser.add_argument(
        "--eps", type=positive_float, nargs="+", help=f"radii in pixel values (default for inf: {EPS[inf]})"
    )
    parser.add_argument("--steps", type=positive_int, default=40, help="steps of the attack")
    parser.add_argument("--restarts", type=positive_int, default=1, help="random starts of the attack for each class")
    parser.set_defaults(N=50)
    return finish_run_arguments(parser.parse_args(), quick_images=10)


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

import torch
from matplotlib.figure import Figure
from torch import Tensor

from utils.attack.pgd import AttackProblem, AttackResult, pgd
from utils.certify import certified_margin, margin_problem
from utils.experiments.plots import columns_of_panels, headline, images_text, norm_symbol, size_of_model
from utils.experiments.table_run import Report, Table, batch_jobs, run_table, stop_by_contradiction
from utils.experiments.tables import Case, load_all_images, markdown_table, norm_text
from utils.runs.rows import KeyedRow

NAME = "accuracy"
KINDS = ("clean", "attacked", "verified")
DTYPE = torch.float64


@dataclass(frozen=True)
class AccuracyKey:
    """A test image, a model, a norm and a radius in pixel values."""

    model: str
    norm: float
    index: int
    label: int
    eps: float


@dataclass(frozen=True)
class AccuracyRow(AccuracyKey, KeyedRow):
    """1 or 0: whether the image is classified correctly, still so under attack, and verified to be.

    ``seconds`` is the wall time of the image's batch, divided by its numbers of images and of eps.
    """

    KEY: ClassVar[type] = AccuracyKey

    clean: int
    attacked: int
    verified: int
    seconds: float


def eps_of(norm: float, args: argparse.Namespace) -> list[float]:
    return sorted(set(args.eps or EPS[norm]))


def plan(cases: list[Case], args: argparse.Namespace) -> Table:
    keys, find = partial(keys_of, args=args), partial(measure, args=args)
    return Table(NAME, AccuracyRow, batch_jobs(cases, args.p, args.batch_size, keys, find), report)


def keys_of(case: Case, norm: float, sample: int, args: argparse.Namespace) -> list[AccuracyKey]:
    numbers = [int(values[sample]) for values in (case.index, case.labels)]
    return [AccuracyKey(case.name, norm, *numbers, eps) for eps in eps_of(norm, args)]


def measure(case: Case, norm: float, batch: list[int], args: argparse.Namespace) -> list[AccuracyRow]:
    """The rows of some samples. Raises ContradictionError if an attack breaks what is verified."""
    started = time.perf_counter()
    x, labels, values = case.x[batch].to(DTYPE), case.labels[batch], eps_of(norm, args)
    clean = AttackProblem(case.model, x, labels).worst_margin(x) > 0
    verified = verify(case, x, labels, clean, norm, values)
    attacked = [torch.zeros_like(clean) for _ in values]
    unbroken = clean.nonzero().squeeze(-1)  # what breaks at a smaller eps is broken at a larger one
    for number, eps in enumerate(values):
        if not unbroken.numel():
            break
        options = {"norm": norm, "steps": args.steps, "restarts": args.restarts, "seed": args.seed}
        found = pgd(case.model, x[unbroken], labels[unbroken], eps, **options)
        broken = found.margin < 0
        for place in (broken & verified[number][unbroken]).nonzero().squeeze(-1).tolist():
            attack = AttackResult(found.x[place : place + 1], found.margin[place : place + 1])
            facts = {"eps": eps, "verified": True, "attack's margin": found.margin[place].item()}
            sample = batch[int(unbroken[place])]
            stop_by_contradiction(args.out_dir / NAME, case, sample, norm, attack, targeted=False, facts=facts)
        unbroken = unbroken[~broken]
        attacked[number][unbroken] = True
    seconds = (time.perf_counter() - started) / (len(batch) * len(values))
    columns = {"clean": [clean] * len(values), "attacked": attacked, "verified": verified}
    return [
        AccuracyRow(**vars(key), **{name: int(columns[name][number][place]) for name in KINDS}, seconds=seconds)
        for place, sample in enumerate(batch)
        for number, key in enumerate(keys_of(case, norm, sample, args))
    ]


@torch.no_grad()
def verify(case: Case, x: Tensor, labels: Tensor, clean: Tensor, norm: float, values: list[float]) -> list[Tensor]:
    """Whether each sample is verified at each eps, (batch,) of bool; what holds at one eps holds at smaller ones."""
    verified = [torch.zeros_like(clean) for _ in values]
    slack = torch.zeros_like(x[:, 0, 0])
    left = clean.nonzero().squeeze(-1)
    if left.numel():
        slack[left] = margin_problem(case.model, x[left], labels[left], norm=norm).slack(DTYPE).amax(dim=1)
    for number in reversed(range(len(values))):
        if left.numel():
            margin = certified_margin(case.model, x[left], labels[left], values[number], norm=norm).amin(dim=1)
            holds = left[margin > slack[left]]
            for smaller in range(number + 1):
                verified[smaller][holds] = True
            left = left[~(margin > slack[left])]
    return verified


def report(rows: list[AccuracyRow]) -> Report:
    groups: dict[tuple[str, float, float], list[AccuracyRow]] = {}
    for row in sorted(rows, key=lambda row: (row.norm, size_of_model(row.model))):
        groups.setdefault((row.model, row.norm, row.eps), []).append(row)
    summary = [
        {"model": model, "norm": f"{norm:g}", "eps": eps, "images": len(group)}
        | {kind: sum(getattr(row, kind) for row in group) / len(group) for kind in KINDS}
        for (model, norm, eps), group in groups.items()
    ]
    lines = [
        "# Verified, attacked and clean accuracy",
        "",
        "Shares of all images drawn, in per cent, against all other classes; eps in pixel values in [0, 1], a ball",
        "around every slice. Each cell: verified / attacked. Verified <= attacked <= clean holds for every image.",
    ]
    for norm in dict.fromkeys(record["norm"] for record in summary):
        own = [record for record in summary if record["norm"] == norm]
        values = sorted({record["eps"] for record in own})
        cells = []
        for model in dict.fromkeys(record["model"] for record in own):
            found = {record["eps"]: record for record in own if record["model"] == model}
            first = found[values[0]]
            shares = [f"{100 * found[eps]['verified']:.0f} / {100 * found[eps]['attacked']:.0f}" for eps in values]
            cells.append([f"`{model}`", str(first["images"]), f"{100 * first['clean']:.0f}", *shares])
        header = ["model", "images", "clean", *(f"eps {eps:g}" for eps in values)]
        lines += ["", f"## {norm_text(float(norm))}", "", *markdown_table(header, cells)]
    return Report(summary, lines, plot(summary))


def plot(summary: list[dict]) -> Figure:
    """Accuracies over eps, a panel for each model and norm: what lies between the lines is undecided."""
    panels = list(dict.fromkeys((record["norm"], record["model"]) for record in summary))
    columns = columns_of_panels(len(panels))
    count = -(-len(panels) // columns)
    figure = Figure(figsize=(0.6 + 2.5 * columns, 0.8 + 2.1 * count), layout="constrained")
    every = figure.subplots(count, columns, squeeze=False, sharey=True)
    for axes in every.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (norm, model) in zip(every.flat, panels, strict=False):
        own = [record for record in summary if (record["norm"], record["model"]) == (norm, model)]
        eps = [0.0] + [record["eps"] for record in own]
        start = own[0]["clean"]
        lines = {kind: [100 * v for v in (start, *(record[kind] for record in own))] for kind in KINDS}
        axes.plot(eps, lines["clean"], color="black", linestyle=":", label="clean")
        axes.plot(eps, lines["attacked"], "s-", markersize=3, color="tab:red", label="attacked (PGD)")
        axes.plot(eps, lines["verified"], "o-", markersize=3, color="tab:blue", label="verified")
        axes.fill_between(eps, lines["verified"], lines["attacked"], color="tab:gray", alpha=0.15, label="undecided")
        axes.set_title(model, fontsize=9)
        axes.set_xlabel(rf"$\epsilon$ ({norm_symbol(norm)}, pixel values)", fontsize=9)
        axes.set_ylim(0, 103)
        axes.locator_params(axis="x", nbins=4)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    for axes in every[:, 0]:
        axes.set_ylabel("share of images (%)", fontsize=9)
    figure.legend(*every[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    shown = images_text([record["images"] for record in summary])
    headline(figure, f"{shown} a model, all classes; every slice in a ball of its own; crown, planes; attack: PGD")
    return figure


def main() -> None:
    args = get_args()
    run_table(args, partial(plan, args=args), load_all_images)


if __name__ == "__main__":
    run_main(main)
