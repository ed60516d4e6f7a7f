"""Certified radius, CLEVER score and the radii of two attacks, per sample and as mean ± std: the paper's comparison.

    python scripts/table_radii.py                        # all committed models, 100 images, p = 1, 2, inf
    python scripts/table_radii.py --quick
    torchrun --nproc-per-node 2 scripts/table_radii.py --resume

Every image has one random target class; a ball of radius eps lies around every slice. The certified radius is a lower
bound of the least distortion that reaches the target, an attack's radius an upper bound, CLEVER an estimate. A
certified radius above an attack's is a contradiction: the script stops with exit code 3 and saves the evidence.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.experiments.table_arguments import add_run_arguments, finish_run_arguments
from utils.runs.cli import ArgumentParser, answer_early, run_main


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    add_run_arguments(parser, norms=(1.0, 2.0, inf), batch_size=10)
    parser.set_defaults(N=100)
    return finish_run_arguments(parser.parse_args(), quick_images=6)


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

from matplotlib.figure import Figure

from utils.attack.carlini_wagner import carlini_wagner
from utils.attack.clever import clever
from utils.attack.pgd import AttackResult, attack_radius
from utils.certify import certified_radius
from utils.experiments.plots import headline, images_text, log_axis, norm_symbol, size_of_model
from utils.experiments.table_run import Report, Table, batch_jobs, run_table, stop_by_contradiction
from utils.experiments.tables import Case, markdown_table, mean_std, norm_text
from utils.runs.bound_rows import statistics
from utils.runs.rows import KeyedRow

NAME = "radii"
METHODS = {"certified": "certified", "clever": "CLEVER", "carlini_wagner": "C&W", "pgd": "PGD"}
COLORS = ("tab:blue", "tab:green", "tab:orange", "tab:red")


@dataclass(frozen=True)
class RadiusKey:
    """A test image, its random target class, a model and a norm."""

    model: str
    norm: float
    index: int
    label: int
    target: int


@dataclass(frozen=True)
class RadiusRow(RadiusKey, KeyedRow):
    """Radii in pixel values, and times, shared evenly among the samples of a batch: of the clock for each radius, and
    of the processor for all of them."""

    KEY: ClassVar[type] = RadiusKey

    certified: float
    clever: float
    carlini_wagner: float
    pgd: float
    certified_seconds: float
    clever_seconds: float
    carlini_wagner_seconds: float
    pgd_seconds: float
    processor_seconds: float

    @property
    def attacked(self) -> float:
        return min(self.carlini_wagner, self.pgd)


def plan(cases: list[Case], args: argparse.Namespace) -> Table:
    find = partial(measure, folder=args.out_dir / NAME)
    jobs = batch_jobs(cases, args.p, args.batch_size, lambda *place: [key_of(*place)], find)
    return Table(NAME, RadiusRow, jobs, report)


def key_of(case: Case, norm: float, sample: int) -> RadiusKey:
    numbers = (int(values[sample]) for values in (case.index, case.labels, case.targets))
    return RadiusKey(case.name, norm, *numbers)


def measure(case: Case, norm: float, batch: list[int], folder: Path) -> list[RadiusRow]:
    """All radii of some samples. Raises ContradictionError if a certified radius is above an attack's."""
    arguments = (case.model, case.x[batch], case.labels[batch])
    options = {"norm": norm, "targets": case.targets[batch], "batch_size": len(batch)}
    found, seconds, begun = {}, {}, time.process_time()

    def timed(name: str, find: Callable) -> None:
        started = time.perf_counter()
        found[name] = find(*arguments, **options)
        seconds[f"{name}_seconds"] = (time.perf_counter() - started) / len(batch)

    timed("certified", certified_radius)
    timed("clever", clever)
    timed("carlini_wagner", carlini_wagner)
    timed("pgd", attack_radius)
    seconds["processor_seconds"] = (time.process_time() - begun) / len(batch)
    radii = {name: getattr(result, "radius", result).tolist() for name, result in found.items()}
    for place, sample in enumerate(batch):
        for name in ("carlini_wagner", "pgd"):
            if not radii["certified"][place] <= radii[name][place]:
                attack = AttackResult(found[name].x[place : place + 1], found[name].margin[place : place + 1])
                facts = {key: values[place] for key, values in radii.items()}
                stop_by_contradiction(folder, case, sample, norm, attack, targeted=True, facts=facts)
    return [
        RadiusRow(**vars(key_of(case, norm, n)), **{key: radii[key][place] for key in METHODS}, **seconds)
        for place, n in enumerate(batch)
    ]


def report(rows: list[RadiusRow]) -> Report:
    rows = sorted(rows, key=lambda row: (row.norm, size_of_model(row.model)))
    groups: dict[tuple[str, float], list[RadiusRow]] = {}
    for row in rows:
        groups.setdefault((row.model, row.norm), []).append(row)
    summary = [summarize(model, norm, group) for (model, norm), group in groups.items()]
    lines = [
        "# Certified radius, CLEVER and attacks",
        "",
        "Mean ± standard deviation over the images, in pixel values in [0, 1]: a ball around every slice, one random",
        "target class an image. Certified radii are lower bounds of the least distortion, attacks' radii upper bounds",
        "and CLEVER scores estimates. No certified radius is above an attack's: the script would have stopped.",
    ]
    for norm in dict.fromkeys(row.norm for row in rows):
        header = [
            "model",
            "images",
            *METHODS.values(),
            "certified / best attack",
            "CLEVER between",
            "processor s per image",
        ]
        cells = []
        for record in summary:
            if record["norm"] == f"{norm:g}":
                group = groups[record["model"], norm]
                cells.append(
                    [
                        f"`{record['model']}`",
                        str(record["images"]),
                        *(mean_std([getattr(row, name) for row in group]) for name in METHODS),
                        f"{record['mean_share_of_attack']:.2f}",
                        f"{record['clever_between']} of {record['images']}",
                        f"{record['processor_seconds']:.2g}",
                    ]
                )
        lines += ["", f"## {norm_text(norm)}", "", *markdown_table(header, cells)]
    between, total = sum(record["clever_between"] for record in summary), len(rows)
    spent = sum(row.processor_seconds for row in rows) / 3600
    ahead = 100 * sum(record["processor_seconds"] for record in summary) / 3600
    lines += [
        "",
        '"Certified / best attack": mean of the ratios. "CLEVER between": images whose CLEVER score lies between the',
        f"certified radius and the smaller attack's, in all {between} of {total} ({100 * between / total:.1f} %).",
        f"The rows took {spent:.2f} h of processor time; 100 images of each of these models and norms would take "
        f"{ahead:.2f} h.",
    ]
    return Report(summary, lines, plot(summary))


def summarize(model: str, norm: float, rows: list[RadiusRow]) -> dict:
    record = {"model": model, "norm": f"{norm:g}", "images": len(rows)}
    for name in METHODS:
        found = statistics([getattr(row, name) for row in rows])
        record |= {f"{name}_mean": found["mean"], f"{name}_std": found["std"]}
    record["mean_share_of_attack"] = statistics([row.certified / row.attacked for row in rows])["mean"]
    record["clever_between"] = sum(row.certified <= row.clever <= row.attacked for row in rows)
    for name in (*METHODS, "processor"):
        record[f"{name}_seconds"] = statistics([getattr(row, f"{name}_seconds") for row in rows])["mean"]
    return record


def plot(summary: list[dict]) -> Figure:
    """Mean radii of every model, with their standard deviations; a panel a norm."""
    norms = list(dict.fromkeys(record["norm"] for record in summary))
    models = list(dict.fromkeys(record["model"] for record in summary))
    figure = Figure(figsize=(1.6 + 0.75 * len(models), 2.5 * len(norms) + 1.2), layout="constrained")
    for axes, norm in zip(figure.subplots(len(norms), 1, sharex=True, squeeze=False)[:, 0], norms, strict=True):
        own = {record["model"]: record for record in summary if record["norm"] == norm}
        for number, ((name, label), color) in enumerate(zip(METHODS.items(), COLORS, strict=True)):
            places = [models.index(model) + 0.16 * (number - 1.5) for model in own]
            means = [record[f"{name}_mean"] for record in own.values()]
            spread = [record[f"{name}_std"] for record in own.values()]
            low = [min(s, 0.9 * m) for s, m in zip(spread, means, strict=True)]  # above 0 on a logarithmic axis
            axes.errorbar(places, means, (low, spread), fmt="o", markersize=4, capsize=2, color=color, label=label)
        axes.set_yscale("log")
        axes.set_ylabel(f"radius ({norm_symbol(norm)},\npixel values)")
        log_axis(axes.yaxis)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    axes.set_xticks(range(len(models)), models, rotation=30, ha="right")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    shown = images_text([record["images"] for record in summary])
    about = f"mean of {shown} a model, one random target each; bars: standard deviation"
    headline(figure, about, "every slice in a ball of its own; certified by crown, planes")
    return figure


def main() -> None:
    args = get_args()
    run_table(args, partial(plan, args=args))


if __name__ == "__main__":
    run_main(main)
