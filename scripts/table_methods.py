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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.choices import METHODS
from utils.choices.method import TUNED_METHODS
from utils.experiments.arguments import add_effort_arguments, fill_in, refuse_balls
from utils.experiments.table_arguments import add_run_arguments, finish_run_arguments
from utils.own.arguments import add_own_data, check_own_data
from utils.runs.cli import ArgumentParser, answer_early, run_main

# Each of these begins with what the one before it does, so it must not certify less, if there is time for that.
NESTED = ("crown", *TUNED_METHODS)
CHEAPEST_FIRST = tuple(dict.fromkeys(("ibp", "crown-ibp", *METHODS)))
QUICK = {"alpha_steps": 6, "curve_steps": 2, "time_limit": 1.0}  # at most, with --quick


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    add_run_arguments(parser, norms=(2.0, inf), batch_size=10)
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=NESTED, help="methods to compare")
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

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data.mnist import ImageData
from utils.attack.pgd import AttackResult, RadiusAttackResult, attack_radius
from utils.certify import certified_radius
from utils.experiments.plots import columns_of_panels, headline, images_text, norm_symbol, size_of_model, stairs, tidy
from utils.experiments.table_run import Report, Table, batch_jobs, run_table, stop_by_contradiction
from utils.experiments.tables import Case, load_case, markdown_table, norm_text
from utils.experiments.wording import is_own, noun_of, short_unit
from utils.own.case import own_case
from utils.runs.bound_rows import statistics
from utils.runs.rows import KeyedRow

NAME = "methods"
COLORS = {"ibp": "tab:gray", "crown-ibp": "tab:brown", "crown": "tab:blue", "alpha": "tab:green"}
COLORS |= {"curve": "tab:purple", "bab": "black"}
TOL = 1e-3  # the search's: a radius is at most this share below what its method could certify


@dataclass(frozen=True)
class MethodKey:
    """A test image, the class to keep away from ("all" for every other), a model, a norm and a method."""

    model: str
    norm: float
    index: int
    label: int
    target: int | str
    method: str


@dataclass(frozen=True)
class MethodRow(MethodKey, KeyedRow):
    """The method's radius and the attack's, in pixel values, and times, shared evenly among the images of a batch.

    ``seconds`` are those of the clock, ``processor_seconds`` those of all of the process's threads. The attack is made
    once for all methods of an image.
    """

    KEY: ClassVar[type] = MethodKey

    radius: float
    attack: float
    seconds: float
    processor_seconds: float
    attack_seconds: float

    @property
    def share(self) -> float:
        return self.radius / self.attack


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


def cheaper_method(method: str, methods: Sequence[str]) -> str | None:
    """The next cheaper of ``methods``, which ``method`` begins with; None if there is none."""
    before = [name for name in NESTED if name in methods]
    return before[before.index(method) - 1] if method in before[1:] else None


def least_method(method: str, methods: Sequence[str]) -> str | None:
    """That which ``method`` must not fall behind: the next cheaper one.

    For bab that is the cheapest: its limit counts all that it does, and may leave no time for curves.
    """
    if method == "bab":
        return NESTED[0] if NESTED[0] in methods else None
    return cheaper_method(method, methods)


def falls_short(row: MethodRow, cheaper: MethodRow) -> bool:
    """Whether a radius is below the cheaper method's by more than the ends of two searches can lie apart."""
    return row.radius < cheaper.radius / (1.0 + TOL)


def shortfalls(rows: Sequence[MethodRow], methods: Sequence[str]) -> list[str]:
    """A line for every radius that falls short of the cheaper method's on the same image."""
    place = {row.key: row for row in rows}
    lines = []
    for row in rows:
        method = least_method(row.method, methods)
        cheaper = method and place[MethodKey(**vars(row.key) | {"method": method})]
        if cheaper and falls_short(row, cheaper):
            where = f"{row.model}, {norm_text(row.norm)}, image {row.index}"
            lines.append(f"{where}: {row.method} certifies {row.radius:.6g}, {method} {cheaper.radius:.6g}")
    return lines


Group = dict[str, list[MethodRow]]  # rows of a model and a norm by method, images in the same order


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


def summarize(group: Group, method: str) -> dict:
    rows = group[method]
    radius, attack = (statistics([getattr(row, name) for row in rows]) for name in ("radius", "attack"))
    cheaper = cheaper_method(method, list(group))
    pairs = list(zip(rows, group[cheaper], strict=True)) if cheaper else []
    record = {"model": rows[0].model, "norm": f"{rows[0].norm:g}", "method": method, "images": len(rows)}
    record |= {"radius_mean": radius["mean"], "radius_std": radius["std"]}
    record |= {"attack_mean": attack["mean"], "attack_std": attack["std"]}
    record |= {"ratio_of_means": radius["mean"] / attack["mean"]}
    record |= {"mean_of_ratios": statistics([row.share for row in rows])["mean"]}
    for name in ("seconds", "processor_seconds", "attack_seconds"):
        record[name] = statistics([getattr(row, name) for row in rows])["mean"]
    record["cheaper"] = cheaper or ""
    record["below_cheaper"] = sum(falls_short(*pair) for pair in pairs) if cheaper else ""
    return record


def model_table(records: list[dict]) -> list[str]:
    header = ["model", "method", "images", "radius", "PGD", "radius / PGD, of means", "mean of ratios"]
    header += ["s per image", "processor s", "below the cheaper method's"]
    cells = []
    for record in records:
        radius, attack = (f"{record[f'{n}_mean']:.3g} ± {record[f'{n}_std']:.2g}" for n in ("radius", "attack"))
        ratios = [f"{record[name]:.3f}" for name in ("ratio_of_means", "mean_of_ratios")]
        seconds = [f"{record[name]:.2g}" for name in ("seconds", "processor_seconds")]
        below = f"{record['below_cheaper']} of {record['images']}" if record["cheaper"] else "–"
        cells.append(
            [f"`{record['model']}`", record["method"], str(record["images"]), radius, attack, *ratios, *seconds, below]
        )
    return markdown_table(header, cells, text_columns=2)


def method_table(records: list[dict]) -> list[str]:
    """The trade-off of each method, all models counting alike."""
    names = {"ratio_of_means": ".3f", "mean_of_ratios": ".3f", "seconds": ".2g", "processor_seconds": ".2g"}
    cells = []
    for method in dict.fromkeys(record["method"] for record in records):
        own = [record for record in records if record["method"] == method]
        means = [f"{statistics([record[name] for record in own])['mean']:{form}}" for name, form in names.items()]
        cells.append([method, *means])
    return markdown_table(["method", "radius / PGD, of means", "mean of ratios", "s per image", "processor s"], cells)


def effort_line(args: argparse.Namespace) -> str:
    efforts = {"alpha": f"{args.alpha_steps} steps", "curve": f"{args.curve_steps} steps"}
    efforts["bab"] = f"{args.time_limit:g} s an image"
    words = [f"{name} {effort}" for name, effort in efforts.items() if name in args.methods]
    return "; ".join([f"Effort: radii are searched to a relative tolerance of {TOL:g}", *words]) + "."


def order_lines(rows: list[MethodRow], args: argparse.Namespace) -> list[str]:
    """Whether every tuned method certifies what the cheaper one does; the images on which one does not."""
    found = shortfalls(rows, args.methods)
    if not found:
        return ["On no image is a radius below the cheaper method's by more than that tolerance."]
    head = f"**{len(found)} radii are below the cheaper method's by more than that tolerance, which must not be:**"
    return [head, "", *(f"- {words}" for words in found)]


def plot(groups: dict[tuple[str, float], Group], against: str, args: argparse.Namespace) -> Figure:
    """Certified share of the images over eps, with the attack's above: a panel for each model and norm."""
    norms = list(dict.fromkeys(norm for _, norm in groups))
    models = list(dict.fromkeys(model for model, _ in groups))
    columns = columns_of_panels(len(models))
    lines = -(-len(models) // columns)
    figure = Figure(figsize=(max(5.0, 0.8 + 2.7 * columns), 0.9 + 2.3 * lines * len(norms)), layout="constrained")
    every = figure.subplots(lines * len(norms), columns, squeeze=False, sharey=True)
    for axes in every.flat:
        axes.set_visible(False)
    for (model, norm), group in groups.items():
        line, column = divmod(models.index(model), columns)
        axes = every[line + lines * norms.index(norm), column]
        axes.set_visible(True)
        plot_panel(axes, group)
        axes.set_title(model, fontsize=9)
        axes.set_xlabel(rf"$\epsilon$ ({norm_symbol(norm)}, {short_unit(args)})", fontsize=9)
    for axes in every[:, 0]:
        axes.set_ylabel(f"share of {noun_of(args)} (%)", fontsize=9)
    handles, names = every[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(columns + 1, 3), frameon=False, fontsize=9)
    shown = images_text([len(rows) for group in groups.values() for rows in group.values()], noun_of(args))
    headline(
        figure, f"{shown} a model, against {against};", "every slice in a ball of its own; planes, tuned by alpha on"
    )
    return figure


def plot_panel(axes: Axes, group: Group) -> None:
    """Shares of one model: what lies between the best certificate and the attack is undecided."""
    radii = {method: np.array([row.radius for row in rows]) for method, rows in group.items()}
    attack = np.array([row.attack for row in next(iter(group.values()))])
    every = np.concatenate([attack, *radii.values()])
    end = every[np.isfinite(every)].max()
    eps = np.unique(np.concatenate([[0.0], every.clip(max=2 * end)]))
    low, high = (100 * (values > eps[:, None]).mean(axis=1) for values in (list(radii.values())[-1], attack))
    axes.fill_between(eps, low, high, step="post", color="tab:gray", alpha=0.15, linewidth=0, label="undecided")
    # An endless radius ends beyond the axis. Cheaper methods are thinner and on top, so that equal curves are all seen.
    stairs(axes, attack.clip(max=2 * end), len(attack), color="tab:red", linestyle="--", label="not broken by PGD")
    for number, (method, values) in enumerate(radii.items()):
        style = {"color": COLORS.get(method, "tab:orange"), "linewidth": 1.2 + 0.6 * number, "zorder": 3 - 0.1 * number}
        stairs(axes, values.clip(max=2 * end), len(values), label=f"certified by {method}", **style)
    axes.set_xlim(0, 1.02 * end)
    axes.set_ylim(0, 103)
    axes.locator_params(axis="x", nbins=5)
    axes.tick_params(labelsize=8)
    tidy(axes)


def main() -> None:
    args = get_args()
    check_own_data(args, args.models)
    run_table(args, partial(plan, args=args), load)


if __name__ == "__main__":
    run_main(main)
