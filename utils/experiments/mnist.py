"""What the bound scripts of MNIST classifiers share: models by their flags, rows and how they are written, words."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.mnist import SIDE, ImageData

from ..certify.certificate import FOLDER_NAME as CERTIFICATES_NAME
from ..certify.certificate import say_missing, write_certificates
from ..certify.problem import MarginProblem
from ..choices.method import TUNED_METHODS, start_of
from ..network.checkpoint import CheckpointError, Config, load_checkpoint, model_name
from ..network.models import SequenceClassifier
from ..runs.bound_rows import Key, Row, summarize
from ..runs.cli import apply_common_arguments, checkpoint_facts, run_facts, utc_now
from ..runs.ranks import Ranks, joined
from ..runs.results import CSV_NAME, EXAMPLES_NAME, Record, check_writable, digest, exclusive, read_record, replacing
from ..runs.work import Job, batches, explained, find_rows
from ..training.images.mnist import check_slices
from .arguments import check_arguments
from .plots import plot_results
from .samples import Samples
from .wording import describe_goal, describe_method, describe_threat, short_title, unit_of

DEFAULT_BATCH = {"cpu": 20, "cuda": 500}
NUM_EXAMPLES = 4  # images drawn beside the heat-map

# Of some samples, one only of whose frames moves (None: as the threat says): the problem; columns of results by name.
ProblemOf = Callable[[list[int], int | None], MarginProblem]
ColumnsOf = Callable[[MarginProblem], dict[str, Tensor]]


@contextmanager
def started(args: argparse.Namespace) -> Iterator[tuple[torch.device, Ranks]]:
    """Check a bound script's arguments, and join the other processes of the run. Raises ValueError if they clash."""
    check_arguments(args)
    device = apply_common_arguments(args)
    args.batch_size = args.batch_size or DEFAULT_BATCH[device.type]
    check_slices(args.time_step)
    with joined(device) as ranks:
        yield device, ranks


def load_classifier(
    args: argparse.Namespace, architecture: str, activation: str | None, device: torch.device
) -> tuple[SequenceClassifier, Config, Path]:
    """The model that the flags describe, its config and its path. Raises CheckpointError if there is none like it."""
    path = checkpoint_path(args, architecture, activation)
    model, config = load_checkpoint(path, device)
    check_config(config, args, architecture, activation, path)
    return model, config, path


def checkpoint_path(args: argparse.Namespace, architecture: str, activation: str | None) -> Path:
    """WORK_DIR/<model name>/MODEL_NAME."""
    described = {"architecture": architecture, "activation": activation, "num_frames": args.time_step}
    described |= {name: getattr(args, name) for name in ("hidden_size", "num_layers", "bidirectional", "pooling")}
    return args.work_dir / model_name(described | {"recipe": args.recipe}) / args.model_name


def check_config(
    config: Config, args: argparse.Namespace, architecture: str, activation: str | None, path: Path
) -> None:
    """Raise CheckpointError if the checkpoint holds another model than the flags name, or one for other data."""
    if config["architecture"] != architecture:
        raise CheckpointError(f"{path} holds a model of type {config['architecture']}, not {architecture}")
    flags = {"num_frames": args.time_step, "hidden_size": args.hidden_size, "num_layers": args.num_layers}
    flags |= {"bidirectional": args.bidirectional, "activation": activation, "pooling": args.pooling}
    for key, value in flags.items():
        flag = "--time-step" if key == "num_frames" else f"--{key.replace('_', '-')}"
        if config[key] != value:
            raise CheckpointError(f"{path} holds a model with {key} = {config[key]}, but {flag} says {value}")
    if config["input_size"] * config["num_frames"] != SIDE * SIDE or config["num_classes"] != 10:
        size = f"{config['num_frames']} frames of {config['input_size']} values, {config['num_classes']} classes"
        raise CheckpointError(f"{path} is no MNIST classifier: it takes {size}")


def largest_eps(args: argparse.Namespace, values: int = SIDE * SIDE) -> float:
    """A ball of this radius around an image, of so many values, holds all images: a larger one says nothing more."""
    if args.p == math.inf:
        return 1.0
    moved = args.time_step if args.frames is None else len(args.frames)
    frames = moved if args.ball == "sequence" and not args.per_frame else 1
    size = values // args.time_step * frames
    return float(args.k or size) if args.p == 0.0 else size ** (1 / args.p)


class Run:
    """The rows of a run and how they are found.

    Args:
        samples: what was drawn.
        problem_of: the question about some samples, and how it is answered.
        columns_of: what is found, a tensor (batch,) for every field of ``kind`` that is not in its key, but seconds.
        kind: the class of the rows.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        samples: Samples,
        problem_of: ProblemOf,
        columns_of: ColumnsOf,
        kind: type[Row] = Row,
    ):
        self.args, self.samples, self.kind = args, samples, kind
        self.problem_of, self.columns_of = problem_of, columns_of
        self.frames = list(range(args.time_step)) if args.per_frame else [None]
        asked = getattr(args, "k", None)
        self.counted = [n for n in (1, 2, 5, 10, asked) if n and n <= (asked or n)] if args.p == 0.0 else []
        targets = ["all"] * len(samples.labels) if samples.targets is None else samples.targets.tolist()
        self.keys = [
            Key(index, label, label, target, frame)
            for index, label, target in zip(samples.index.tolist(), samples.labels.tolist(), targets, strict=True)
            for frame in self.frames
        ]

    def jobs(self) -> list[Job]:
        """A job for every batch of samples."""
        width = len(self.frames)
        return [
            Job(self.keys[batch[0] * width : (batch[-1] + 1) * width], partial(self.search, batch))
            for batch in batches(len(self.samples.labels), self.args.batch_size)
        ]

    @torch.no_grad()
    def search(self, chosen: list[int]) -> list[Row]:
        """The rows of the chosen samples, which follow each other."""
        width, found = len(self.frames), {}
        for position, frame in enumerate(self.frames):
            begun = time.perf_counter()
            with explained(f"in the batch of test image {self.samples.index[chosen[0]]}", len(chosen)):
                columns = self.columns_of(self.problem_of(chosen, frame))
            values = {name: column.tolist() for name, column in columns.items()}
            seconds = (time.perf_counter() - begun) / len(chosen)
            for n, sample in enumerate(chosen):
                number = sample * width + position
                own = {name: column[n] for name, column in values.items()}
                found[number] = self.kind(**vars(self.keys[number]), **own, seconds=seconds)
        return [found[number] for number in sorted(found)]

    def save_certificates(self, rows: Sequence[Row], folder: Path) -> None:
        """Write the certificates of some rows."""
        number = {index: sample for sample, index in enumerate(self.samples.index.tolist())}
        for frame in self.frames:
            own = [row for row in rows if row.frame == frame]
            if own:
                suffix = "" if frame is None else f"_frame_{frame}"
                names = [f"{row.index:05d}{suffix}" for row in own]
                problem = self.problem_of([number[row.index] for row in own], frame)
                radius = torch.tensor([row.radius for row in own], dtype=torch.float64, device=problem.x.device)
                say_missing(radius, write_certificates(folder, problem, radius, names))

    def rehearse(self) -> None:
        """The first image, for --dry-run."""
        rows = self.search([0])
        print(f"dry run: image {rows[0].index} has radius {rows[0].radius:.4g}, nothing written")

    def write(self, folder: Path, record: Record, ranks: Ranks) -> list[Row]:
        """Search, write batch by batch, and report; what lies in the folder is replaced, or continued by --resume.

        Every process of the run comes here; the first one gets all rows.
        """
        args, certificates = self.args, folder / CERTIFICATES_NAME
        save = partial(self.save_certificates, folder=certificates) if args.save_certificate else None
        check_writable(folder)
        with exclusive(folder, ranks):
            layout = {"kind": self.kind, "ranks": ranks, "attached": (CERTIFICATES_NAME,)}
            layout |= {"columns": extra_columns(args)}
            layout |= {"drawn": self.samples.as_bytes(), "resume": args.resume, "overwrite": args.overwrite}
            results = find_rows(folder, record, self.jobs(), before_writing=save, **layout)
            if not ranks.first:
                return []
            if args.per_frame:
                write_examples(self.samples, folder)
            results.finish(summarize(results.rows, self.counted), utc_now())
            report(folder)
            if args.save_certificate:
                print(
                    f"certificates in {certificates}: check them by python scripts/check_certificate.py {certificates}"
                )
            return results.rows


def extra_columns(args: argparse.Namespace) -> tuple[str, ...]:
    """Columns that not every run has."""
    asked = {"start_radius": args.method in TUNED_METHODS, "attack_radius": getattr(args, "attack", False)}
    return tuple(name for name, given in asked.items() if given)


def report(folder: Path) -> None:
    """Print the summary of a finished run and draw its figures."""
    record = read_record(folder)
    print_summary(record["summary"])
    print_gain(record["summary"], record["arguments"].get("method"))
    figures = plot_results(folder)
    print(f"results in {folder}: {CSV_NAME}, run.json, {', '.join(figures)}")


def make_record(
    args: argparse.Namespace, samples: Samples, path: Path, config: Config, data: ImageData, device: torch.device
) -> Record:
    """What run.json says about the run; paths inside the repository are relative to it."""
    return {
        "title": short_title(args),
        "threat_model": describe_threat(args),
        "goal": describe_goal(args),
        "method": describe_method(args),
        "unit": unit_of(args),
        "model": checkpoint_facts(path, model_name(config), config),
        "data": {
            "source": data.source,
            "test_images": len(data.test_y),
            "drawn_sha256": digest(samples.as_bytes()),
        },
        "counts": samples.counts,
        **run_facts(args, device, args.dtype),
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
    print(f"certified: {record['goal']}; eps and radius are in {record['unit']}")
    print(f"bounds: {record['method']}", flush=True)


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
    attacked = [("attacked", summary["attack"])] if "attack" in summary else []
    for title, values in [*lines, ("all", summary), *attacked]:
        print(f"{title:<10}" + "".join(f"{values[name]:>10.5f}" for name in names))
    for number, share in summary.get("at_changes", {}).items():
        print(f"certified at {number} changes: {share} of {summary['rows']}")
    if summary["not_certified"]:
        print(f"{summary['not_certified']} radii are 0: not certified at any eps")
    print(f"{summary['samples']} images, {summary['seconds_per_sample']:.3g} s per image", end="")
    print(f", {summary['evaluations_per_row']:.1f} bounds per radius")


def print_gain(summary: Record, method: str) -> None:
    """What a tuned method gained over the one that it starts from, in one line."""
    if "gain" in summary:
        gain, start = summary["gain"], start_of(method)
        line = f"{method} gained nothing over {start} on {gain['in_vain']} of {gain['rows']} radii"
        print(
            line if gain["in_vain"] == gain["rows"] else f"{line}; the mean radius is {100 * gain['mean']:.1f} % larger"
        )
