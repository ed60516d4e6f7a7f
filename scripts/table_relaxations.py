"""The paper's ablation on this project's models: mean certified radius by planes, lines and constants.

python scripts/table_relaxations.py                  # 20 images, p = 2
python scripts/table_relaxations.py --quick
torchrun --nproc-per-node 2 scripts/table_relaxations.py --N 100 --p 1 2 inf --resume
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.experiments.table_arguments import add_run_arguments, finish_run_arguments
from utils.runs.cli import ArgumentParser, answer_early, run_main

MODELS = tuple(f"{kind}_{size}" for kind in ("lstm", "gru") for size in ("4_32", "7_64", "14_64"))


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    add_run_arguments(parser, norms=(2.0,), batch_size=20)
    args = parser.parse_args()
    if args.models is None and not args.quick:
        args.models = list(MODELS)
    return finish_run_arguments(args, quick_images=4, gated=True)


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

import torch
from matplotlib.figure import Figure

from utils.certify import certified_radius
from utils.experiments.plots import headline, images_text, norm_symbol, size_of_model
from utils.experiments.table_run import Report, Table, batch_jobs, run_table
from utils.experiments.tables import Case, markdown_table, norm_text
from utils.runs.bound_rows import statistics
from utils.runs.rows import KeyedRow

RELAXATIONS = ("plane", "line", "constant")
COLORS = ("tab:blue", "tab:orange", "tab:gray")
# Mean bounds that Ko et al., "POPQORN: Quantifying robustness of recurrent neural networks" (ICML 2019), report for
# their own LSTMs, by the number of slices of an MNIST image: 2-D planes, 1-D lines, constants; p = 2.
PAPER = {4: (0.232, 0.071, 0.041), 7: (0.140, 0.015, 0.012), 14: (0.059, 1.5e-4, 2e-5)}


@dataclass(frozen=True)
class RelaxationKey:
    """A test image, its random target class, a model and a norm."""

    model: str
    norm: float
    index: int
    label: int
    target: int


@dataclass(frozen=True)
class RelaxationRow(RelaxationKey, KeyedRow):
    """Certified radii in pixel values, and the wall time of each, shared evenly among the samples of its batch."""

    KEY: ClassVar[type] = RelaxationKey

    plane: float
    line: float
    constant: float
    plane_seconds: float
    line_seconds: float
    constant_seconds: float

    @property
    def in_order(self) -> bool:
        return self.plane >= self.line >= self.constant


def plan(cases: list[Case], args: argparse.Namespace) -> Table:
    for case in cases:
        if not case.gated:
            raise ValueError(f"{case.name} has no gates: --models must name LSTMs and GRUs")
    keys = lambda *place: [key_of(*place)]  # noqa: E731
    configs = {case.name: case.config for case in cases}
    jobs = batch_jobs(cases, args.p, args.batch_size, keys, measure)
    return Table("relaxations", RelaxationRow, jobs, partial(report, configs=configs))


def key_of(case: Case, norm: float, sample: int) -> RelaxationKey:
    numbers = (int(values[sample]) for values in (case.index, case.labels, case.targets))
    return RelaxationKey(case.name, norm, *numbers)


def measure(case: Case, norm: float, batch: list[int]) -> list[RelaxationRow]:
    x, columns = case.x[batch].double(), {}
    for relaxation in RELAXATIONS:
        started = time.perf_counter()
        options = {"norm": norm, "targets": case.targets[batch], "relaxation": relaxation}
        found = certified_radius(case.model, x, case.labels[batch], search_dtype=torch.float64, **options)
        columns[relaxation] = found.tolist()
        columns[f"{relaxation}_seconds"] = [(time.perf_counter() - started) / len(batch)] * len(batch)
    return [
        RelaxationRow(**vars(key_of(case, norm, n)), **{name: values[place] for name, values in columns.items()})
        for place, n in enumerate(batch)
    ]


def summarize(model: str, norm: float, rows: list[RelaxationRow]) -> dict:
    record = {"model": model, "norm": f"{norm:g}", "samples": len(rows)}
    for name in (*RELAXATIONS, *(f"{name}_seconds" for name in RELAXATIONS)):
        record[name] = statistics([getattr(row, name) for row in rows])["mean"]
    return record | {"in_order": sum(row.in_order for row in rows)}


def paper_of(config: dict, norm: str) -> tuple[float, ...] | None:
    known = config["architecture"] == "lstm" and config["num_layers"] == 1 and norm == "2"
    return PAPER.get(config["num_frames"]) if known else None


def report(rows: list[RelaxationRow], configs: dict[str, dict]) -> Report:
    groups: dict[tuple[str, float], list[RelaxationRow]] = {}
    for row in sorted(rows, key=lambda row: (row.norm, size_of_model(row.model))):
        groups.setdefault((row.model, row.norm), []).append(row)
    summary = [summarize(model, norm, group) for (model, norm), group in groups.items()]
    papers = [paper_of(configs[record["model"]], record["norm"]) for record in summary]
    header = ["model", "images", *RELAXATIONS, "plane / line", "plane / constant", "in this order"]
    header += ["paper's LSTM: plane / line / constant", "its ratios"]
    lines = [
        "# Planes, lines and constants around the gates' products",
        "",
        "Mean certified radius (pixel values in [0, 1], a ball around every slice, one random target class).",
        '"In this order": images whose plane radius is at least the line radius, and that the constant one.',
        "The paper's figures are for its own trained LSTMs, with trained planes, so only orders and ratios compare:",
        'Ko et al., "POPQORN: Quantifying robustness of recurrent neural networks", ICML 2019.',
    ]
    for norm in dict.fromkeys(record["norm"] for record in summary):
        cells = []
        for record, paper in zip(summary, papers, strict=True):
            if record["norm"] == norm:
                cells.append(cells_of(record, paper))
        lines += ["", f"## {norm_text(float(norm))}", "", *markdown_table(header, cells)]
    lines += ["", "Searched and certified in float64, relative tolerance 1e-3."]
    return Report(summary, lines, plot(summary, papers))


def cells_of(record: dict, paper: tuple[float, ...] | None) -> list[str]:
    plane, line, constant = (record[name] for name in RELAXATIONS)
    ratios = [f"{plane / other:.3g}" if other else "inf" for other in (line, constant)]
    cells = [f"`{record['model']}`", str(record["samples"]), *(f"{v:.3g}" for v in (plane, line, constant)), *ratios]
    cells.append(f"{record['in_order']} of {record['samples']}")
    return cells + (["–", "–"] if paper is None else [" / ".join(f"{v:g}" for v in paper), _ratios(paper)])


def _ratios(paper: tuple[float, ...]) -> str:
    return " / ".join(f"{paper[0] / other:.3g}" for other in paper[1:])


def plot(summary: list[dict], papers: list[tuple[float, ...] | None]) -> Figure:
    """Bars of the mean radii, a group a model, and the paper's figures as marks; a panel a norm."""
    norms = list(dict.fromkeys(record["norm"] for record in summary))
    figure = Figure(figsize=(8.0, 0.8 + 3.2 * len(norms)), layout="constrained")
    width = 0.8 / len(RELAXATIONS)
    for axes, norm in zip(figure.subplots(len(norms), 1, squeeze=False)[:, 0], norms, strict=True):
        own = [(record, paper) for record, paper in zip(summary, papers, strict=True) if record["norm"] == norm]
        for number, (name, color) in enumerate(zip(RELAXATIONS, COLORS, strict=True)):
            places = [group + (number - 1) * width for group in range(len(own))]
            axes.bar(places, [record[name] for record, _ in own], width, color=color, label=name)
            marks = [(place, paper[number]) for place, (_, paper) in zip(places, own, strict=True) if paper is not None]
            if marks:
                label = "the paper's LSTMs" if number == 0 else None
                axes.plot(*zip(*marks, strict=True), "kD", markersize=5, markerfacecolor="white", label=label)
        axes.set_yscale("log")
        axes.set_xticks(range(len(own)), [record["model"] for record, _ in own])
        axes.set_ylabel(f"mean certified radius ({norm_symbol(norm)})")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    shown = images_text([record["samples"] for record in summary])
    headline(figure, f"{shown} a model, one random target each; every slice in a ball of its own, pixel values; crown")
    return figure


def main() -> None:
    args = get_args()
    run_table(args, partial(plan, args=args))


if __name__ == "__main__":
    run_main(main)
