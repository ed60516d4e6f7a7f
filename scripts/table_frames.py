"""Sensitivity over time: the certified radius of every single slice of an image, the others being exact.

    python scripts/table_frames.py                       # all committed models, 20 images, p = 2
    python scripts/table_frames.py --quick
    torchrun --nproc-per-node 2 scripts/table_frames.py --p 1 2 inf --resume

The smaller a slice's radius, the less it takes to change the classification there. One random target class an image.
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
from utils.runs.cli import ArgumentParser, answer_early, run_main


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(__doc__.splitlines()[0])
    add_run_arguments(parser, norms=(2.0,), batch_size=20)
    return finish_run_arguments(parser.parse_args(), quick_images=10)


if __name__ == "__main__":
    answer_early(get_args)  # before the imports below, which take seconds

from matplotlib.figure import Figure

from data.mnist import SIDE
from utils.certify import certified_radius
from utils.experiments.plots import headline, images_text, log_axis, norm_symbol, size_of_model
from utils.experiments.table_run import Report, Table, batch_jobs, run_table
from utils.experiments.tables import Case, markdown_table, norm_text
from utils.runs.bound_rows import statistics
from utils.runs.rows import KeyedRow

STYLES = {"rnn": "o-", "lstm": "s--", "gru": "^:"}


@dataclass(frozen=True)
class FrameKey:
    """A slice of a test image, its random target class, a model and a norm."""

    model: str
    norm: float
    index: int
    label: int
    target: int
    frame: int


@dataclass(frozen=True)
class FrameRow(FrameKey, KeyedRow):
    """The slice's radius in pixel values, and the wall time of its batch divided by the number of samples."""

    KEY: ClassVar[type] = FrameKey

    radius: float
    seconds: float


def plan(cases: list[Case], args: argparse.Namespace) -> Table:
    return Table("frames", FrameRow, batch_jobs(cases, args.p, args.batch_size, keys_of, measure), report)


def keys_of(case: Case, norm: float, sample: int) -> list[FrameKey]:
    numbers = [int(values[sample]) for values in (case.index, case.labels, case.targets)]
    return [FrameKey(case.name, norm, *numbers, frame) for frame in range(case.config.get("num_frames", 1))]


def measure(case: Case, norm: float, batch: list[int]) -> list[FrameRow]:
    """The radii of all slices of some samples; no ball is larger than one that holds every slice."""
    largest = 1.0 if norm == inf else case.x.shape[2] ** (1 / norm)
    radii, seconds = [], []
    for frame in range(case.config.get("num_frames", 1)):
        started = time.perf_counter()
        options = {"norm": norm, "targets": case.targets[batch], "frames": frame, "max_eps": largest}
        radii.append(certified_radius(case.model, case.x[batch], case.labels[batch], **options).tolist())
        seconds.append((time.perf_counter() - started) / len(batch))
    return [
        FrameRow(**vars(key), radius=radii[key.frame][place], seconds=seconds[key.frame])
        for place, sample in enumerate(batch)
        for key in keys_of(case, norm, sample)
    ]


def report(rows: list[FrameRow]) -> Report:
    radii: dict[tuple[str, float], dict[int, list[float]]] = {}
    for row in sorted(rows, key=lambda row: (row.norm, size_of_model(row.model))):
        radii.setdefault((row.model, row.norm), {}).setdefault(row.frame, []).append(row.radius)
    summary = [
        {"model": model, "norm": f"{norm:g}", "frame": frame, "images": len(values)} | statistics(values)
        for (model, norm), frames in radii.items()
        for frame, values in frames.items()
    ]
    lines = [
        "# Sensitivity over time",
        "",
        "Mean certified radius of a single slice (pixel values in [0, 1]), the others exact; one random target class",
        "an image. Slice 0 is the top of the image and read first. In bold: the slice where the least is certified.",
        "Radii are lower bounds, and looser the more steps follow a slice.",
    ]
    for norm, count in sorted({(norm, len(frames)) for (_, norm), frames in radii.items()}):
        header = ["model", "images", *map(str, range(count))]
        cells = []
        for (model, own), frames in radii.items():
            if (own, len(frames)) == (norm, count):
                means = [statistics(frames[frame])["mean"] for frame in range(count)]
                shown = [f"**{mean:.3g}**" if mean == min(means) else f"{mean:.3g}" for mean in means]
                cells.append([f"`{model}`", str(len(frames[0])), *shown])
        lines += ["", f"## {norm_text(norm)}, {count} slices", "", *markdown_table(header, cells)]
    return Report(summary, lines, plot(summary))


def plot(summary: list[dict]) -> Figure:
    """Mean radius over the rows of the image, a line a model; a panel a norm and number of slices."""
    counts = {record["model"]: record["frame"] + 1 for record in summary}  # the last record of a model counts
    norms = list(dict.fromkeys(record["norm"] for record in summary))
    widths = sorted(set(counts.values()))
    figure = Figure(figsize=(1.2 + 3.6 * len(widths), 0.6 + 3.2 * len(norms)), layout="constrained")
    panels = figure.subplots(len(norms), len(widths), squeeze=False)
    for row, norm in zip(panels, norms, strict=True):
        for axes, count in zip(row, widths, strict=True):
            for model in (name for name, own in counts.items() if own == count):
                own = [record for record in summary if (record["model"], record["norm"]) == (model, norm)]
                middles = [(record["frame"] + 0.5) * SIDE / count for record in own]
                axes.plot(middles, [record["mean"] for record in own], STYLES[model.split("_")[0]], label=model)
            axes.set_yscale("log")
            axes.set_xlim(0, SIDE)
            axes.set_title(f"{count} slices", fontsize=10)
            axes.set_xlabel("row of the image (slice's middle)")
            axes.legend(fontsize=8, frameon=False)
            axes.grid(alpha=0.25, which="both")
            axes.spines[["top", "right"]].set_visible(False)
            log_axis(axes.yaxis)
        row[0].set_ylabel(f"mean certified radius ({norm_symbol(norm)}, pixel values)")
    shown = images_text([record["images"] for record in summary])
    headline(figure, f"{shown} a model, one random target each; one slice moves, the others are exact; crown, planes")
    return figure


def main() -> None:
    args = get_args()
    run_table(args, partial(plan, args=args))


if __name__ == "__main__":
    run_main(main)
