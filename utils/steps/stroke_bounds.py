"""Certified radii of the single points of pen strokes, from the arguments of a bound script to the result folder."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from data.strokes import POINT_SIZE, StrokeData, load_strokes, sequence_lengths

from ..experiments.arguments import result_folder
from ..experiments.wording import RELAXED
from ..network.checkpoint import CheckpointError, Config, load_checkpoint, missing
from ..network.models import SequenceClassifier
from ..runs.cli import (
    apply_common_arguments,
    checkpoint_facts,
    run_facts,
    utc_now,
)
from ..runs.ranks import Ranks, joined
from ..runs.results import CSV_NAME, Record, check_writable, digest, exclusive, read_record, replacing
from ..runs.rows import KeyedRow, read_rows
from ..runs.work import Job, batches, explained, find_rows
from ..training.strokes import predict_strokes
from .step_bounds import check_steps
from .step_runs import Steps, find_steps
from .word_report import figure_title
from .word_summary import counted, mean_and_error, rank_correlation

DIGITS_FIGURE, SUMMARY_FIGURE = "strokes.png", "summary.png"
DRAWN, DPI, BINS = 15, 150, 5


@dataclass(frozen=True)
class PointKey:
    """What a row is about.

    Attributes:
        index: number of the digit in MNIST's test set.
        position: from 0; ``points`` is how many the digit has.
        x, y: where the pen is after the movement; ``ends_stroke`` is 1 at the end of a stroke.
    """

    index: int
    position: int
    points: int
    x: float
    y: float
    ends_stroke: int
    label: int
    prediction: int


@dataclass(frozen=True)
class PointRow(PointKey, KeyedRow):
    """What was found for one point of a digit; radii are of the point's (dx, dy, end of stroke, end of digit).

    Attributes:
        radius: the largest eps that was certified; ``failed_eps`` the smallest that was not.
        attack: size of the smallest change of this point by which PGD changed the class; inf if none did.
        seconds: wall time of the bounds of the point's batch, divided by the number of points in it.
    """

    KEY: ClassVar[type] = PointKey

    radius: float
    failed_eps: float
    attack: float
    seconds: float


def bound_stroke_classifier(args: argparse.Namespace, architecture: str) -> None:
    """Find the radius of every point of the digits that a script's arguments ask for.

    Raises:
        ValueError: arguments, checkpoint or data do not fit; the message says which. Earlier results stay.
        OSError: a file cannot be read or the folder cannot be written.
    """
    device = apply_common_arguments(args)
    with joined(device) as ranks:
        _bound(args, architecture, device, ranks)


def _bound(args: argparse.Namespace, architecture: str, device: torch.device, ranks: Ranks) -> None:
    path = args.work_dir / f"{architecture}_{args.hidden_size}" / args.model_name
    if not path.exists():
        script = f"{architecture}/train_{architecture}_stroke_classifier.py --hidden-size {args.hidden_size}"
        raise missing(path, f"train it by python {script}")
    classifier, config = load_checkpoint(path, device)
    if config["architecture"] != architecture or config["input_size"] != POINT_SIZE or config["num_classes"] != 10:
        raise CheckpointError(f"{path} holds no {architecture} that classifies strokes")
    check_steps(classifier)
    data = load_strokes(args.data_dir)
    if len(data.test_y) < args.N:
        raise ValueError(f"--N {args.N} is more than the {len(data.test_y)} test digits of {data.source}")
    drawn = torch.randperm(len(data.test_y), generator=torch.Generator().manual_seed(args.seed))[: args.N]
    kept = drawn[predict_strokes(classifier, data.test_x[drawn].to(device)).cpu() == data.test_y[drawn]]
    if not len(kept):
        raise ValueError(f"nothing to certify: none of the {args.N} digits is classified correctly")
    counts = {"drawn": args.N, "misclassified": args.N - len(kept), "kept": len(kept)}
    print(f"{path.parent.name} on digits of {data.source}: {args.N} drawn, {len(kept)} to certify. ", end="")
    print(
        f"One point at a time moves by at most eps in the l_{args.p:g} norm; bounds: crown, {RELAXED[args.relaxation]}"
    )
    run = StrokeRun(args, classifier, data, kept)
    if args.dry_run:
        rows = run.search([0])
        print(f"dry run: the first point of digit {rows[0].index} has radius {rows[0].radius:.4g}, nothing written")
        return
    folder = result_folder(args, path.parent, result_folder_name(args))
    check_writable(folder)
    with exclusive(folder, ranks):
        run_and_write(run, folder, make_record(run, path, config, counts), ranks)


def run_and_write(run: StrokeRun, folder: Path, record: Record, ranks: Ranks) -> None:
    """Search and write some digits after the other, then summarize and draw."""
    layout = {"derived": (DIGITS_FIGURE, SUMMARY_FIGURE), "ranks": ranks, "drawn": run.drawn}
    layout |= {"resume": run.args.resume, "overwrite": run.args.overwrite}
    results = find_rows(folder, record, run.jobs(), kind=PointRow, **layout)
    if not ranks.first:
        return
    results.finish(summarize(results.rows), utc_now())
    print_summary(read_record(folder)["summary"])
    names = write_figures(folder)
    print(f"results in {folder}: {CSV_NAME}, run.json, {', '.join(names)}")


def result_folder_name(args: argparse.Namespace) -> str:
    """2_norm_bound_crown_plane for p = 2 and planes."""
    return f"{args.p:g}_norm_bound_crown_{args.relaxation}"


class StrokeRun:
    """The rows of a run, about the chosen test digits, and how they are found."""

    def __init__(self, args: argparse.Namespace, classifier: SequenceClassifier, data: StrokeData, chosen: Tensor):
        self.args, self.classifier, self.data = args, classifier, data
        self.x, self.labels = data.test_x[chosen].double(), data.test_y[chosen]
        self.index, self.lengths = data.test_index[chosen].tolist(), sequence_lengths(self.x)
        pairs = zip(self.x.numpy(), self.labels.tolist(), strict=True)
        self.drawn = [x.tobytes() + str(label).encode() for x, label in pairs]

    def keys(self, chosen: Sequence[int]) -> list[PointKey]:
        """What the rows of some of the digits are about."""
        keys = []
        for n in chosen:
            points, label = int(self.lengths[n]), int(self.labels[n])
            places = self.x[n, :, :2].cumsum(dim=0).tolist()
            for position, (x, y) in enumerate(places[:points]):
                ends = int(self.x[n, position, 2])
                keys.append(PointKey(self.index[n], position, points, x, y, ends, label, label))
        return keys

    def jobs(self) -> list[Job]:
        """A job for every group of digits whose points are bounded together."""
        groups = batches(len(self.labels), self.args.save_every)
        return [Job(self.keys(group), partial(self.search, group)) for group in groups]

    @torch.no_grad()
    def search(self, chosen: list[int]) -> list[PointRow]:
        """The rows of some of the digits."""
        lengths = self.lengths[chosen]
        x = self.x[chosen, : int(lengths.max())].to(self.classifier.head.weight.device)
        steps = Steps(self.classifier, x, self.labels[chosen], lengths)
        with explained(f"in the digits from number {self.index[chosen[0]]} on", self.args.batch_size):
            columns = find_steps(steps, self.args)
        return [
            PointRow(**vars(key), **{name: values[n][t] for name, values in columns.items()})
            for key, (n, t) in zip(self.keys(chosen), steps.pairs(), strict=True)
        ]


def by_digit(rows: list[PointRow]) -> list[list[PointRow]]:
    """Rows of one digit after the other."""
    return [list(own) for _, own in groupby(rows, key=lambda row: row.index)]


def summarize(rows: list[PointRow]) -> Record:
    """Statistics of the radii, and how they go with the position of a point."""
    digits, radii = by_digit(rows), [row.radius for row in rows]
    summary: Record = {
        "digits": len(digits),
        "points": len(rows),
        "radius": {"min": min(radii), "mean": float(np.mean(radii)), "max": max(radii)},
        "attack": mean_and_error(row.attack for row in rows),
        "radius_over_attack": mean_and_error(r.radius / r.attack for r in rows if 0 < r.attack < math.inf),
        "seconds_per_point": float(np.mean([row.seconds for row in rows])),
    }
    for name in ("radius", "attack"):
        shares = []
        for own in digits:
            values = np.array([getattr(row, name) for row in own])
            if np.isfinite(values).all() and values.mean() > 0:
                shares += list(zip(own, values / values.mean(), strict=True))
        if not shares:
            continue
        correlations = [
            rank_correlation([row.position for row in own], [getattr(row, name) for row in own])
            for own in digits
            if len(own) >= 3 and all(math.isfinite(getattr(row, name)) for row in own)
        ]
        summary[f"relative_{name}"] = {
            "places": [
                mean_and_error(v for row, v in shares if int(BINS * (row.position + 0.5) / row.points) == place)
                for place in range(BINS)
            ],
            "first_points": mean_and_error(v for row, v in shares if row.position == 0),
            "ends_of_strokes": mean_and_error(v for row, v in shares if row.ends_stroke),
            "other_points": mean_and_error(v for row, v in shares if row.position and not row.ends_stroke),
            "position_correlation": mean_and_error(correlations),
        }
    return summary


def make_record(run: StrokeRun, path: Path, config: Config, counts: dict[str, int]) -> Record:
    """What run.json says about the run; paths inside the repository are relative to it."""
    method = f"crown, {RELAXED[run.args.relaxation]}"
    return {
        "title": f"{len(run.index)} digits, one point at a time, {method}, l_{run.args.p:g}",
        "method": method,
        "unit": "pixels of dx and dy, units of the flags",
        "model": checkpoint_facts(path, path.parent.name, config),
        "data": {"source": run.data.source, "drawn_sha256": digest(run.drawn)},
        "counts": counts,
        **run_facts(run.args, run.classifier.head.weight.device),
    }


def print_summary(summary: Record) -> None:
    """The statistics as a table."""
    values = summary["radius"]
    print(f"{summary['points']} points of {summary['digits']} digits: radius mean {values['mean']:.4g}, ", end="")
    print(f"from {values['min']:.4g} to {values['max']:.4g}; {summary['seconds_per_point']:.3g} s per point")
    if summary["attack"]["mean"] is not None:
        ratio = summary["radius_over_attack"]["mean"]
        print(f"smallest change found by attacks: mean {summary['attack']['mean']:.4g}; radius / attack {ratio:.3f}")
    for name in ("radius", "attack"):
        found = summary.get(f"relative_{name}")
        if found:
            places = "  ".join("-" if place["mean"] is None else f"{place['mean']:.3f}" for place in found["places"])
            print(f"{name} / mean of the digit, from the first to the last fifth of the points: {places}")
            kinds = [(key, found[key]["mean"]) for key in ("first_points", "ends_of_strokes", "other_points")]
            listed = ", ".join(f"{key.replace('_', ' ')} {mean:.3f}" for key, mean in kinds if mean is not None)
            print(f"  {listed}; rank correlation with the position {found['position_correlation']['mean']:.3f}")


def write_figures(folder: Path) -> list[str]:
    """Draw the figures of a result folder from its files; returns their names."""
    rows, record = read_rows(folder / CSV_NAME, PointRow)[0], read_record(folder)
    for name, figure in ((DIGITS_FIGURE, plot_digits(rows, record)), (SUMMARY_FIGURE, plot_places(record))):
        with replacing(folder / name) as path:
            figure.savefig(path, dpi=DPI)
    return [DIGITS_FIGURE, SUMMARY_FIGURE]


def plot_digits(rows: list[PointRow], record: Record) -> Figure:
    """Digits as they are drawn, every point coloured by its radius: red is sensitive."""
    digits = sorted(by_digit(rows)[: 4 * DRAWN], key=lambda own: own[0].label)
    digits = [digits[n] for n in np.linspace(0, len(digits) - 1, min(DRAWN, len(digits))).round().astype(int)]
    columns = 5
    lines = math.ceil(len(digits) / columns)
    figure = Figure(figsize=(2.1 * columns + 1.2, 2.1 * lines + 0.6), layout="constrained")
    legend = "in brackets: the class, which holds while one point moves by its radius; ring: first point; grey: the pen"
    title = f"{figure_title(record)}; {len(digits)} of them drawn"
    figure.suptitle(f"{title}\n{legend}", fontsize=10)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in panels:
        axes.set(xlim=(1, 27), ylim=(27, 1), aspect="equal", xticks=[], yticks=[])
        axes.spines[:].set_color("#dddddd")
    for axes, own in zip(panels, digits, strict=False):
        least, mean = min(row.radius for row in own), np.mean([row.radius for row in own])
        starts = [0, *[n + 1 for n, row in enumerate(own[:-1]) if row.ends_stroke]]
        for start, end in zip(starts, [*starts[1:], len(own)], strict=True):
            axes.plot([r.x for r in own[start:end]], [r.y for r in own[start:end]], color="#999999", lw=5, alpha=0.4)
        values = [row.radius / mean if mean else 0.0 for row in own]
        xs, ys = [row.x for row in own], [row.y for row in own]
        axes.scatter(
            xs, ys, c=values, cmap="RdYlBu", norm=Normalize(0, 2), s=34, edgecolors="#444444", lw=0.5, zorder=3
        )
        axes.scatter(xs[:1], ys[:1], s=110, facecolors="none", edgecolors="black", lw=1.0, zorder=4)
        axes.set_title(f"test digit {own[0].index} ({own[0].label}), least {least:.2f}", fontsize=8)
    bar = figure.colorbar(ScalarMappable(Normalize(0, 2), "RdYlBu"), ax=figure.axes, shrink=0.7, pad=0.01)
    bar.set_label("certified radius / mean of the digit")
    return figure


def plot_places(record: Record) -> Figure:
    """Relative radii over the position of a point, certified and attacked."""
    summary = record["summary"]
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    counts = f"{counted(summary['points'], 'point')} of {summary['digits']} digits; bars: 2 standard errors"
    figure.suptitle(f"{figure_title(record)}\n({counts})", fontsize=10)
    axes = figure.add_subplot()
    for key, label, color in (
        ("relative_radius", "certified", "tab:blue"),
        ("relative_attack", "attacked", "tab:orange"),
    ):
        if key in summary:
            places = [place for place in summary[key]["places"] if place["mean"] is not None]
            means, errors = [p["mean"] for p in places], [2 * (p["error"] or 0.0) for p in places]
            axes.errorbar(range(len(places)), means, errors, fmt="o-", label=label, color=color, capsize=3)
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(BINS), ["first", *[""] * (BINS - 2), "last"])
    axes.set_xlabel("fifth of the digit's points")
    axes.set_ylabel("radius / mean of the digit")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure
