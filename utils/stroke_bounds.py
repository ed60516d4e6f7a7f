"""Certified radii of the single points of pen strokes, from the arguments of a bound script to the result folder."""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import math
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from data.strokes import POINT_SIZE, StrokeData, load_strokes, sequence_lengths
from utils.bound_arguments import relative_tolerance
from utils.checkpoint import CheckpointError, Config, load_checkpoint
from utils.cli import (
    ROOT,
    add_common_arguments,
    apply_common_arguments,
    git_commit,
    norm_value,
    positive_int,
    versions,
)
from utils.models import SequenceClassifier
from utils.planes import SLOPES
from utils.results import CSV_NAME, Record, ResultError, read_record, replacing, write_record
from utils.step_bounds import check_steps, step_attacks, step_radii
from utils.stroke_training import DATA_HELP, predict_strokes
from utils.training import check_writable
from utils.word_report import figure_title
from utils.word_summary import mean_and_error, rank_correlation

DIGITS_FIGURE, SUMMARY_FIGURE = "strokes.png", "summary.png"
DRAWN, DPI, BINS = 15, 150, 5


@dataclass(frozen=True)
class PointRow:
    """What was found for one point of a digit; radii are of the point's (dx, dy, end of stroke, end of digit).

    Attributes:
        index: number of the digit in MNIST's test set.
        position: from 0; ``points`` is how many the digit has.
        x, y: where the pen is after the movement; ``ends_stroke`` is 1 at the end of a stroke.
        radius: the largest eps that was certified; ``failed_eps`` the smallest that was not.
        attack: size of the smallest change of this point by which PGD changed the class; inf if none did.
    """

    index: int
    position: int
    points: int
    x: float
    y: float
    ends_stroke: int
    label: int
    prediction: int
    radius: float
    failed_eps: float
    attack: float
    seconds: float


def add_stroke_arguments(parser: argparse.ArgumentParser, architecture: str) -> None:
    """Add the flags of a stroke bound script and the common ones."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--work-dir", type=Path, default=ROOT / "models" / "stroke_classifier", help="folder of the model folders"
    )
    group.add_argument("--model-name", default=architecture, help="name of the checkpoint in its model folder")
    group.add_argument("--hidden-size", type=positive_int, default=32, help="size of the hidden state")
    group = parser.add_argument_group("what is certified (eps and radii: pixels of dx and dy, units of the two flags)")
    group.add_argument("--N", type=positive_int, default=200, help="test digits drawn; the misclassified get no radius")
    group.add_argument("--p", type=norm_value, default=2.0, help="norm of the perturbation: 1, 2 or inf")
    group = parser.add_argument_group("how")
    group.add_argument("--relaxation", choices=tuple(SLOPES), default="plane", help="bounds of the gates' products")
    group.add_argument("--no-attack", action="store_true", help="leave out the attack on every point")
    group.add_argument("--tol", type=relative_tolerance, default=1e-3, help="relative width of the final bracket")
    group.add_argument("--batch-size", type=positive_int, default=100, help="points bounded at a time")
    add_common_arguments(parser, data=DATA_HELP)


def bound_stroke_classifier(args: argparse.Namespace, architecture: str) -> None:
    """Find the radius of every point of the digits that a script's arguments ask for.

    Raises:
        ValueError: arguments, checkpoint or data do not fit; the message says which. Earlier results stay.
        OSError: a file cannot be read or the folder cannot be written.
    """
    device = apply_common_arguments(args)
    path = args.work_dir / f"{architecture}_{args.hidden_size}" / args.model_name
    if not path.exists():
        script = f"{architecture}/train_{architecture}_stroke_classifier.py --hidden-size {args.hidden_size}"
        raise CheckpointError(f"there is no checkpoint {path}: train it by python {script}")
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
    print(f"One point at a time moves by at most eps in the l_{args.p:g} norm", flush=True)
    if args.dry_run:
        rows = certify_digits(classifier, data, kept[:1], args)
        print(f"dry run: the first point of digit {rows[0].index} has radius {rows[0].radius:.4g}, nothing written")
        return
    folder = path.parent / result_folder_name(args)
    check_writable(folder)
    rows = certify_digits(classifier, data, kept, args)
    record = make_record(args, path, config, data, counts, rows)
    write_rows(folder / CSV_NAME, rows)
    write_record(folder, record)
    print_summary(record["summary"])
    names = write_figures(folder)
    print(f"results in {folder}: {CSV_NAME}, run.json, {', '.join(names)}")


def result_folder_name(args: argparse.Namespace) -> str:
    """2_norm_bound for p = 2, with the relaxation if it is not planes."""
    return "_".join([f"{args.p:g}_norm_bound", *[args.relaxation] * (args.relaxation != "plane")])


def certify_digits(
    classifier: SequenceClassifier, data: StrokeData, chosen: Tensor, args: argparse.Namespace
) -> list[PointRow]:
    """A row for every point of the chosen test digits."""
    device = classifier.head.weight.device
    x, labels = data.test_x[chosen].double().to(device), data.test_y[chosen].to(device)
    lengths = sequence_lengths(x)
    search = {"norm": args.p, "relaxation": args.relaxation, "tol": args.tol, "batch_size": args.batch_size}
    found = step_radii(classifier, x, labels, lengths, **search)
    attack = torch.full_like(found.radius, torch.nan)
    if not args.no_attack:
        attack = step_attacks(classifier, x, labels, lengths, norm=args.p)
    places = x[..., :2].cumsum(dim=1)
    return [
        PointRow(
            index=int(data.test_index[chosen[n]]),
            position=t,
            points=length,
            x=float(places[n, t, 0]),
            y=float(places[n, t, 1]),
            ends_stroke=int(x[n, t, 2]),
            label=int(labels[n]),
            prediction=int(labels[n]),
            radius=float(found.radius[n, t]),
            failed_eps=float(found.failed[n, t]),
            attack=float(attack[n, t]),
            seconds=float(found.seconds[n, t]),
        )
        for n, length in enumerate(lengths.tolist())
        for t in range(length)
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


def make_record(
    args: argparse.Namespace, path: Path, config: Config, data: StrokeData, counts: dict, rows: list[PointRow]
) -> Record:
    """What run.json says about the run."""
    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in sorted(vars(args).items())}
    arguments["p"] = f"{args.p:g}"
    for key in ("work_dir", "data_dir"):  # where things lie on a machine says nothing about the results
        arguments.pop(key)
    return {
        "title": f"one point of the strokes at a time, l_{args.p:g}",
        "unit": "pixels of dx and dy, units of the flags",
        "arguments": arguments,
        "model": {
            "name": path.parent.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "config": config,
        },
        "data": {"source": data.source},
        "counts": counts,
        "device": args.device,
        "dtype": "float64",
        "versions": versions(),
        "commit": git_commit(),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "status": "finished",
        "summary": summarize(rows),
    }


def write_rows(path: Path, rows: list[PointRow]) -> None:
    """Write the CSV file, whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in fields(PointRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    with replacing(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="ascii", newline="")


def read_rows(path: Path) -> list[PointRow]:
    """Inverse of ``write_rows``. Raises ResultError if the file is damaged."""
    types = {field.name: {"int": int, "float": float}[field.type] for field in fields(PointRow)}
    with path.open(encoding="ascii", newline="") as file:
        reader = csv.DictReader(file)
        try:
            return [PointRow(**{key: types[key](value) for key, value in row.items()}) for row in reader]
        except (ValueError, TypeError, KeyError) as error:
            raise ResultError(f"{path} is damaged in line {reader.line_num}") from error


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
    rows, record = read_rows(folder / CSV_NAME), read_record(folder)
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
    figure.suptitle(figure_title(record), fontsize=11)
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
    counts = f"{summary['points']} points of {summary['digits']} digits; bars: 2 standard errors"
    figure.suptitle(f"{figure_title(record)}\n({counts})", fontsize=11)
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
