"""Certified radii of an MNIST classifier's test images, from the arguments of a bound script to the result folder."""

from __future__ import annotations

import argparse
import hashlib
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data.mnist import SIDE, ImageData, as_frames, load_mnist

from ..certify.certificate import FOLDER_NAME as CERTIFICATES_NAME
from ..certify.certificate import write_certificates
from ..certify.interface import RadiusResult, search_radius
from ..certify.problem import MarginProblem, margin_problem
from ..network.checkpoint import Config, load_checkpoint, model_name
from ..network.models import SequenceClassifier
from ..perturbation.lp_ball import INF
from ..runs.bound_rows import Key, Row, summarize
from ..runs.cli import apply_common_arguments, checkpoint_facts, run_facts, utc_now
from ..runs.ranks import Ranks, joined
from ..runs.results import EXAMPLES_NAME, Record, exclusive, read_record, replacing
from ..runs.work import Job, batches, explained, find_rows
from ..training.mnist import check_writable
from .arguments import check_arguments, check_config, checkpoint_path, result_folder_name
from .plots import plot_results
from .samples import Samples, draw_samples
from .wording import UNIT, describe_goal, describe_threat, short_title

DEFAULT_BATCH = {"cpu": 20, "cuda": 500}
NUM_EXAMPLES = 4  # images drawn beside the heat-map


def bound_mnist_classifier(args: argparse.Namespace, architecture: str, activation: str | None = None) -> None:
    """Search the certified radii that a script's arguments ask for and write them to the result folder.

    Everything is checked first; what lies in the folder is replaced when the first radii are there.

    Raises:
        ValueError: arguments, checkpoint, data or earlier results do not fit; the message says which.
        OSError: a file cannot be read or the folder cannot be written.
    """
    check_arguments(args)
    device = apply_common_arguments(args)
    args.batch_size = args.batch_size or DEFAULT_BATCH[device.type]
    as_frames(torch.empty(0, SIDE, SIDE), args.time_step)
    with joined(device) as ranks:
        _bound(args, architecture, activation, device, ranks)


def _bound(
    args: argparse.Namespace, architecture: str, activation: str | None, device: torch.device, ranks: Ranks
) -> None:
    path = checkpoint_path(args, architecture, activation)
    model, config = load_checkpoint(path, device)
    check_config(config, args, architecture, activation, path)
    data = load_mnist(args.data_dir)
    samples = draw_samples(data, model, args)
    run = Run(args, model, samples)
    record = make_record(run, path, config, data)
    print_introduction(record)
    if args.dry_run:
        rows = run.search([0])
        print(f"dry run: image {rows[0].index} has radius {rows[0].radius:.4g}, nothing written")
        return
    folder = path.parent / result_folder_name(args)
    check_writable(folder)
    with exclusive(folder, ranks):
        run_and_write(run, folder, record, ranks)


class Run:
    """The rows of a run and how they are found."""

    def __init__(self, args: argparse.Namespace, model: SequenceClassifier, samples: Samples):
        self.args, self.model, self.samples = args, model, samples
        self.device = model.head.weight.device
        self.frames = list(range(args.time_step)) if args.per_frame else [None]
        targets = ["all"] * len(samples.labels) if samples.targets is None else samples.targets.tolist()
        self.keys = [
            Key(index, label, label, target, frame)
            for index, label, target in zip(samples.index.tolist(), samples.labels.tolist(), targets, strict=True)
            for frame in self.frames
        ]
        num_moved = args.time_step if args.frames is None else len(args.frames)
        values = SIDE * SIDE // args.time_step * (num_moved if args.ball == "sequence" and not args.per_frame else 1)
        # A ball of this radius around an image holds all images, so a larger radius says nothing more.
        self.max_eps = 1.0 if args.p == INF else values ** (1 / args.p)

    def jobs(self) -> list[Job]:
        """A job for every batch of samples."""
        width = len(self.frames)
        return [
            Job(self.keys[batch[0] * width : (batch[-1] + 1) * width], partial(self.search, batch))
            for batch in batches(len(self.samples.labels), self.args.batch_size)
        ]

    def search(self, chosen: list[int]) -> list[Row]:
        """The rows of the chosen samples, which follow each other."""
        width = len(self.frames)
        found = {}
        for position, frame in enumerate(self.frames):
            started = time.perf_counter()
            result = self._search_frame(chosen, frame)
            values = {
                "radius": result.radius.tolist(),
                "failed_eps": result.failed.tolist(),
                "margin": result.margin.tolist(),
                "evaluations": result.evaluations.tolist(),
            }
            seconds = (time.perf_counter() - started) / len(chosen)
            for n, sample in enumerate(chosen):
                number = sample * width + position
                own = {name: column[n] for name, column in values.items()}
                found[number] = Row(**vars(self.keys[number]), **own, seconds=seconds)
        return [found[number] for number in sorted(found)]

    def _problem(self, chosen: list[int], frame: int | None) -> MarginProblem:
        args, samples = self.args, self.samples
        relaxation = {"relaxation": args.relaxation} if hasattr(args, "relaxation") else {}
        return margin_problem(
            self.model,
            samples.frames(args.time_step)[chosen].to(self.device),
            samples.labels[chosen].to(self.device),
            norm=args.p,
            targets=None if samples.targets is None else samples.targets[chosen].to(self.device),
            frames=args.frames if frame is None else frame,
            clip=(0.0, 1.0) if args.clip else None,
            ball=args.ball,
            method=args.method,
            alpha_steps=args.alpha_steps,
            curve_steps=args.curve_steps,
            time_limit=args.time_limit,
            **relaxation,
        )

    def save_certificates(self, rows: list[Row], folder: Path) -> None:
        """Write the certificates of some rows."""
        number = {index: sample for sample, index in enumerate(self.samples.index.tolist())}
        for frame in self.frames:
            own = [row for row in rows if row.frame == frame]
            if own:
                suffix = "" if frame is None else f"_frame_{frame}"
                names = [f"{row.index:05d}{suffix}" for row in own]
                radius = torch.tensor([row.radius for row in own], dtype=torch.float64, device=self.device)
                write_certificates(folder, self._problem([number[row.index] for row in own], frame), radius, names)

    @torch.no_grad()
    def _search_frame(self, chosen: list[int], frame: int | None) -> RadiusResult:
        args, samples = self.args, self.samples
        with explained(f"in the batch of test image {samples.index[chosen[0]]}", len(chosen)):
            return search_radius(
                self._problem(chosen, frame),
                tol=args.tol,
                eps0=args.eps0,
                max_eps=self.max_eps,
                dtype=getattr(torch, args.dtype),
                batch_size=len(chosen),
            )


def make_record(run: Run, path: Path, config: Config, data: ImageData) -> Record:
    """What run.json says about the run; paths inside the repository are relative to it."""
    args, samples = run.args, run.samples
    pixels = (255 * samples.images).round().to(torch.uint8).numpy()
    return {
        "title": short_title(args),
        "threat_model": describe_threat(args),
        "goal": describe_goal(args),
        "unit": UNIT,
        "model": checkpoint_facts(path, model_name(config), config),
        "data": {
            "source": data.source,
            "test_images": len(data.test_y),
            "drawn_sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
        },
        "counts": samples.counts,
        **run_facts(args, run.device, args.dtype),
    }


def print_introduction(record: Record) -> None:
    counts, model, data = record["counts"], record["model"], record["data"]
    print(f"{model['name']} ({model['path']}) on test images of {data['source']}: {counts['drawn']} drawn, ", end="")
    print(f"{counts['misclassified']} misclassified, {counts['kept']} to certify")
    if counts["left_out"]:
        target = record["arguments"]["target"]
        print(f"{counts['left_out']} drawn images of class {target} are left out: that is the target")
    trained_on = model["config"].get("data_source")
    if trained_on not in (None, data["source"]):
        print(f"note: the model was trained on {trained_on}, which may contain images of {data['source']}")
    print(f"perturbation: {record['threat_model']}")
    print(f"certified: {record['goal']}; eps and radius are in {record['unit']}", flush=True)


def run_and_write(run: Run, folder: Path, record: Record, ranks: Ranks) -> None:
    """Search and write batch by batch, then summarize and draw."""
    args, certificates = run.args, folder / CERTIFICATES_NAME
    save = partial(run.save_certificates, folder=certificates) if args.save_certificate else None
    layout = {"ranks": ranks, "attached": (CERTIFICATES_NAME,)}
    results = find_rows(folder, record, run.jobs(), resume=args.resume, before_writing=save, **layout)
    if not ranks.first:
        return
    if args.per_frame:
        write_examples(run.samples, folder)
    results.finish(summarize(results.rows), utc_now())
    print_summary(read_record(folder)["summary"])
    figures = plot_results(folder)
    print(f"results in {folder}: {results.csv_path.name}, run.json, {', '.join(figures)}")
    if args.save_certificate:
        print(f"certificates in {certificates}: check them by python scripts/check_certificate.py {certificates}")


def write_examples(samples: Samples, folder: Path) -> None:
    """Save the first image of each of some classes for the heat-map: index (k,) and pixels (k, 28, 28), 0 to 255."""
    first = {}
    for position, label in enumerate(samples.labels.tolist()):
        first.setdefault(label, position)
    chosen = sorted(first.values())[:NUM_EXAMPLES]
    pixels = (255 * samples.images[chosen]).round().to(torch.uint8).numpy()
    with replacing(folder / EXAMPLES_NAME) as path:
        np.savez_compressed(path, index=samples.index[chosen].numpy(), pixels=pixels)


def print_summary(summary: Record) -> None:
    """The statistics of the radii as a table."""
    lines = [(f"frame {values['frame']}", values) for values in summary.get("frames", [])]
    names = ("min", "mean", "max", "std")
    print(f"{'radius':<10}" + "".join(f"{name:>10}" for name in names))
    for title, values in [*lines, ("all", summary)]:
        print(f"{title:<10}" + "".join(f"{values[name]:>10.5f}" for name in names))
    if summary["not_certified"]:
        print(f"{summary['not_certified']} radii are 0: not certified at any eps")
    print(f"{summary['samples']} images, {summary['seconds_per_sample']:.3g} s per image", end="")
    print(f", {summary['evaluations_per_row']:.1f} bounds per radius")
