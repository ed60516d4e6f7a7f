"""Certified radii of an MNIST classifier's test images, from the arguments of a bound script to the result folder."""

from __future__ import annotations

import argparse
import copy
import hashlib
import math
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.mnist import SIDE, ImageData, as_frames, load_mnist
from utils.bounds import METHODS
from utils.certificate import FOLDER_NAME as CERTIFICATES_NAME
from utils.certificate import write_certificates
from utils.certify import MarginProblem, RadiusResult, search_radius
from utils.checkpoint import CheckpointError, Config, load_checkpoint, model_name
from utils.cli import (
    ROOT,
    add_common_arguments,
    apply_common_arguments,
    git_commit,
    non_negative_int,
    norm_value,
    positive_float,
    positive_int,
    versions,
)
from utils.models import SequenceClassifier
from utils.perturbation import BALLS, INF
from utils.planes import SLOPES
from utils.plots import plot_results
from utils.results import (
    EXAMPLES_NAME,
    Key,
    Record,
    ResultFolder,
    Row,
    read_record,
    replacing,
    summarize,
    unfinished_rows,
)
from utils.training import check_writable

UNIT = "pixel values, which lie in [0, 1]"
TARGETS = ("random", "runnerup", "least")
NUM_EXAMPLES = 4  # images drawn beside the heat-map


def add_bound_arguments(parser: argparse.ArgumentParser, architecture: str, hidden_size: int, time_step: int) -> None:
    """Add the flags of a bound script, with the given defaults, and the common ones; gated cells get one more."""
    group = parser.add_argument_group("model (the checkpoint must agree)")
    group.add_argument(
        "--work-dir", type=Path, default=ROOT / "models" / "mnist_classifier", help="folder of the model folders"
    )
    group.add_argument("--model-name", default=architecture, help="name of the checkpoint in its model folder")
    group.add_argument("--hidden-size", type=positive_int, default=hidden_size, help="size of the hidden state")
    group.add_argument("--time-step", type=positive_int, default=time_step, help="frames an image is cut into")
    group.add_argument("--num-layers", type=positive_int, default=1, help="recurrent layers on top of each other")
    group.add_argument("--bidirectional", action="store_true", help="frames are read in both directions")
    group = parser.add_argument_group("what is certified (eps and radii are in pixel values, which lie in [0, 1])")
    group.add_argument("--N", type=positive_int, default=100, help="test images drawn; the misclassified get no radius")
    group.add_argument("--p", type=norm_value, default=2.0, help="norm of the perturbation: 1, 2 or inf")
    group.add_argument("--untargeted", action="store_true", help="against all other classes instead of one target")
    group.add_argument(
        "--target",
        type=target_choice,
        metavar="{random,runnerup,least,K}",
        help="class to keep away from: a random one, the one with the highest or the lowest logit besides the label, "
        "or class K (default: random)",
    )
    group.add_argument("--per-frame", action="store_true", help="a radius for every single frame, the others exact")
    group.add_argument("--frames", type=non_negative_int, nargs="+", help="perturb only these frames (0: the top one)")
    group.add_argument("--ball", choices=BALLS, default="frame", help="a ball around every frame, or one around all")
    group.add_argument("--clip", action="store_true", help="perturbed pixels stay in [0, 1] (only for --p inf)")
    group = parser.add_argument_group("how")
    group.add_argument("--method", choices=METHODS, default="crown", help="bounds: backward, interval, or both")
    if architecture != "rnn":
        group.add_argument(
            "--relaxation",
            choices=tuple(SLOPES),
            default="plane",
            help="bounds of the gates' products: planes with contracting slopes or of least volume, lines, constants",
        )
    group.add_argument("--eps0", type=positive_float, help="first eps of the search (default: from the gradient)")
    group.add_argument("--tol", type=relative_tolerance, default=1e-3, help="relative width of the final bracket")
    group.add_argument("--dtype", choices=("float64", "float32"), default="float64", help="precision of the verdict")
    group.add_argument("--batch-size", type=positive_int, default=20, help="images bounded and written at a time")
    group.add_argument("--resume", action="store_true", help="continue an interrupted run of the same arguments")
    group.add_argument(
        "--save-certificate",
        action="store_true",
        help="write a file for every radius that scripts/check_certificate.py can confirm by itself",
    )
    add_common_arguments(parser)


def target_choice(text: str) -> str | int:
    """argparse type: a way to choose the target, or a class number."""
    return text if text in TARGETS else non_negative_int(text)


def relative_tolerance(text: str) -> float:
    """argparse type: a number between 0 and 1."""
    value = positive_float(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return value


def bound_mnist_classifier(args: argparse.Namespace, architecture: str, activation: str | None = None) -> None:
    """Search the certified radii that a script's arguments ask for and write them to the result folder.

    Everything is checked first; what lies in the folder is replaced when the first radii are there.

    Raises:
        ValueError: arguments, checkpoint, data or earlier results do not fit; the message says which.
        OSError: a file cannot be read or the folder cannot be written.
    """
    check_arguments(args)
    device = apply_common_arguments(args)
    as_frames(torch.empty(0, SIDE, SIDE), args.time_step)
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
    run_and_write(run, folder, record)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError if flags contradict each other or the data set."""
    if args.untargeted and args.target is not None:
        raise ValueError("--untargeted contradicts --target: leave out one of them")
    if not args.untargeted and args.target is None:
        args.target = "random"
    if args.per_frame and args.frames:
        raise ValueError("--per-frame bounds every frame by itself: leave out --frames")
    if args.clip and args.p != INF:
        raise ValueError("--clip cuts l_inf boxes: it needs --p inf")
    if args.frames:
        args.frames = sorted(set(args.frames))
        if args.frames[-1] >= args.time_step:
            raise ValueError(f"--frames must be from 0 to {args.time_step - 1}, not {args.frames[-1]}")


def checkpoint_path(args: argparse.Namespace, architecture: str, activation: str | None) -> Path:
    """WORK_DIR/<model name>/MODEL_NAME."""
    described = {"architecture": architecture, "activation": activation, "num_frames": args.time_step}
    described |= {name: getattr(args, name) for name in ("hidden_size", "num_layers", "bidirectional")}
    return args.work_dir / model_name(described | {"pooling": "last"}) / args.model_name


def result_folder_name(args: argparse.Namespace) -> str:
    """Name of the result folder: 2_norm_bound for p = 2 and all defaults, and a word for everything that differs.

    In this order: untargeted, or target_runnerup, target_least, target_K; per_frame, or frames_0_3; sequence (the
    ball); clip; the method (ibp, crown-ibp); the relaxation (line, constant). Number of images, seed, tolerance and
    precision have no word: a new run with others replaces the earlier one.
    """
    words = [f"{args.p:g}_norm_bound"]
    words += ["untargeted"] * args.untargeted
    words += [f"target_{args.target}"] * (args.target not in (None, "random"))
    words += ["per_frame"] * args.per_frame
    words += ["_".join(map(str, ["frames", *args.frames]))] if args.frames else []
    words += [args.ball] * (args.ball != "frame")
    words += ["clip"] * args.clip
    words += [args.method] * (args.method != "crown")
    words += [relaxation_of(args)] * (relaxation_of(args) != "plane")
    return "_".join(words)


def relaxation_of(args: argparse.Namespace) -> str:
    """--relaxation; "plane" for a script without that flag."""
    return getattr(args, "relaxation", "plane")


def check_config(
    config: Config, args: argparse.Namespace, architecture: str, activation: str | None, path: Path
) -> None:
    """Raise CheckpointError if the checkpoint holds another model than the flags name, or one for other data."""
    if config["architecture"] != architecture:
        raise CheckpointError(f"{path} holds a model of type {config['architecture']}, not {architecture}")
    flags = {"num_frames": args.time_step, "hidden_size": args.hidden_size, "num_layers": args.num_layers}
    flags |= {"bidirectional": args.bidirectional, "activation": activation}
    for key, value in flags.items():
        flag = "--time-step" if key == "num_frames" else f"--{key.replace('_', '-')}"
        if config[key] != value:
            raise CheckpointError(f"{path} holds a model with {key} = {config[key]}, but {flag} says {value}")
    if config["input_size"] * config["num_frames"] != SIDE * SIDE or config["num_classes"] != 10:
        size = f"{config['num_frames']} frames of {config['input_size']} values, {config['num_classes']} classes"
        raise CheckpointError(f"{path} is no MNIST classifier: it takes {size}")


@dataclass
class Samples:
    """The images that get a radius, (n, ...), in the order in which they were drawn.

    Attributes:
        index: their numbers in the test set.
        images: (n, 28, 28) pixels in [0, 1].
        labels: their classes, which the model predicts.
        targets: classes to keep away from, or None for all others.
        counts: images drawn, left out because their label is the target, misclassified, and kept.
    """

    index: Tensor
    images: Tensor
    labels: Tensor
    targets: Tensor | None
    counts: dict[str, int]

    def frames(self, num_frames: int) -> Tensor:
        return as_frames(self.images, num_frames)


def draw_samples(data: ImageData, model: SequenceClassifier, args: argparse.Namespace) -> Samples:
    """Draw test images by the seed and keep those that have a target and are classified correctly.

    An image's turn and its random target depend on the seed alone, so runs with other norms, batch sizes or numbers
    of images are about the same ones.

    Raises:
        ValueError: there are too few images, no such target, or nothing is left.
    """
    total = len(data.test_y)
    if total < args.N:
        raise ValueError(f"--N {args.N} is more than the {total} test images of {data.source}")
    num_classes = len(data.class_names)
    generator = torch.Generator().manual_seed(args.seed)
    index = torch.randperm(total, generator=generator)[: args.N]
    random_offset = torch.randint(1, num_classes, (total,), generator=generator)[index]
    images, labels = data.test_x[index], data.test_y[index]
    with torch.no_grad():
        exact = copy.deepcopy(model).cpu().to(getattr(torch, args.dtype))
        logits = exact(as_frames(images, args.time_step).to(exact.head.weight.dtype))
    if args.untargeted:
        targets = None
    elif isinstance(args.target, int):
        if args.target >= num_classes:
            raise ValueError(f"--target {args.target} is no class: there are 0 to {num_classes - 1}")
        targets = torch.full_like(labels, args.target)
    elif args.target == "random":
        targets = (labels + random_offset) % num_classes
    else:
        others = logits.clone()
        others[torch.arange(len(labels)), labels] = -INF if args.target == "runnerup" else INF
        targets = others.argmax(dim=1) if args.target == "runnerup" else others.argmin(dim=1)
    left_out = torch.zeros_like(labels, dtype=torch.bool) if targets is None else targets == labels
    wrong = ~left_out & (logits.argmax(dim=1) != labels)
    kept = ~left_out & ~wrong
    groups = {"left_out": left_out, "misclassified": wrong, "kept": kept}
    counts = {"drawn": args.N} | {name: int(group.sum()) for name, group in groups.items()}
    if not counts["kept"]:
        raise ValueError(f"nothing to certify: none of the {args.N} images is classified correctly and has a target")
    return Samples(index[kept], images[kept], labels[kept], None if targets is None else targets[kept], counts)


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

    def batches(self, finished: int) -> list[list[int]]:
        """Samples of each batch that has rows left when the first ``finished`` rows are there.

        The batches do not depend on ``finished``: a batch's size moves the last digits of its radii.
        """
        size, total = self.args.batch_size, len(self.samples.labels)
        parts = [list(range(start, min(start + size, total))) for start in range(0, total, size)]
        return [part for part in parts if (part[-1] + 1) * len(self.frames) > finished]

    def search(self, chosen: list[int], finished: int = 0) -> list[Row]:
        """The rows of the chosen samples, in a row, that come after the first ``finished`` rows of all."""
        width = len(self.frames)
        first, end = chosen[0] * width, (chosen[-1] + 1) * width
        found = {}
        for position, frame in enumerate(self.frames):
            if chosen[-1] * width + position < finished:
                continue
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
        return [found[number] for number in range(max(first, finished), end)]

    def _problem(self, chosen: list[int], frame: int | None) -> MarginProblem:
        args, samples = self.args, self.samples
        relaxation = {"relaxation": args.relaxation} if hasattr(args, "relaxation") else {}
        return MarginProblem(
            self.model,
            samples.frames(args.time_step)[chosen].to(self.device),
            samples.labels[chosen].to(self.device),
            norm=args.p,
            targets=None if samples.targets is None else samples.targets[chosen].to(self.device),
            frames=args.frames if frame is None else frame,
            clip=(0.0, 1.0) if args.clip else None,
            ball=args.ball,
            method=args.method,
            **relaxation,
        )

    def save_certificates(self, chosen: list[int], rows: list[Row], folder: Path) -> None:
        """Write the certificates of some of the chosen samples' rows."""
        number = {index: sample for sample, index in zip(chosen, self.samples.index[chosen].tolist(), strict=True)}
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
        try:
            return search_radius(
                self._problem(chosen, frame),
                tol=args.tol,
                eps0=args.eps0,
                max_eps=self.max_eps,
                dtype=getattr(torch, args.dtype),
                batch_size=len(chosen),
            )
        except ArithmeticError as error:
            raise ValueError(f"in the batch of test image {samples.index[chosen[0]]}: {error}") from error
        except torch.OutOfMemoryError as error:
            raise ValueError(f"the device is out of memory: try a smaller --batch-size than {len(chosen)}") from error


def make_record(run: Run, path: Path, config: Config, data: ImageData) -> Record:
    """What run.json says about the run; paths inside the repository are relative to it."""
    args, samples = run.args, run.samples
    pixels = (255 * samples.images).round().to(torch.uint8).numpy()
    return {
        "title": short_title(args),
        "threat_model": describe_threat(args),
        "goal": describe_goal(args),
        "unit": UNIT,
        "arguments": {name: _plain(value) for name, value in sorted(vars(args).items())},
        "model": {
            "name": model_name(config),
            "path": _plain(path),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "config": config,
        },
        "data": {
            "source": data.source,
            "test_images": len(data.test_y),
            "drawn_sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
        },
        "counts": samples.counts,
        "device": str(run.device),
        "dtype": args.dtype,
        "versions": versions(),
        "commit": git_commit(),
        "started": _now(),
    }


def _plain(value: object) -> object:
    """A value as JSON takes it."""
    if isinstance(value, Path):
        resolved = value.resolve()
        return str(resolved.relative_to(ROOT) if resolved.is_relative_to(ROOT) else resolved)
    return f"{value:g}" if isinstance(value, float) and not math.isfinite(value) else value


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def describe_threat(args: argparse.Namespace) -> str:
    """What may be done to an image, in words."""
    rows, norm = SIDE // args.time_step, f"l_{args.p:g}"
    band = f"{rows} rows, {rows * SIDE} pixels"
    moved = args.time_step if args.frames is None else len(args.frames)
    listed = f"all {args.time_step} frames"
    if args.frames is not None:
        listed = f"frames {', '.join(map(str, args.frames))} of {args.time_step}"
    if args.per_frame:
        text = f"one of {args.time_step} frames ({band}) moves by at most eps in the {norm} norm, the others are exact"
    elif args.ball == "sequence":
        text = f"{listed} ({band} each) together move by at most eps in the {norm} norm"
    else:
        every = "at most the same eps" if moved > 1 else "at most eps"
        text = f"{listed} ({band} each) move, each by {every} in the {norm} norm"
    return text + ("; pixels stay in [0, 1]" if args.clip else "")


def describe_goal(args: argparse.Namespace) -> str:
    """What is certified, in words."""
    if args.untargeted:
        return "no such image is classified differently"
    if isinstance(args.target, int):
        return f"no such image is classified as {args.target}"
    kind = {"random": "random", "runnerup": "highest logit besides the label", "least": "lowest logit"}[args.target]
    return f"no such image is classified as its target class ({kind})"


def short_title(args: argparse.Namespace) -> str:
    """The threat model in a few words, for figures."""
    if args.untargeted:
        goal = "untargeted"
    else:
        goal = f"{args.target} target" if isinstance(args.target, str) else f"target {args.target}"
    if args.per_frame:
        place = "one frame at a time"
    else:
        place = "every frame" if args.frames is None else "frames " + ", ".join(map(str, args.frames))
        place = f"one ball around {place}" if args.ball == "sequence" else place
    method = [args.method] * (args.method != "crown")
    method += [relaxation_of(args)] * (relaxation_of(args) != "plane")
    return ", ".join([goal, place, *["clipped"] * args.clip, *method])


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


def run_and_write(run: Run, folder: Path, record: Record) -> None:
    """Search and write batch by batch, then summarize and draw."""
    results = ResultFolder(folder, record, run.keys, resume=run.args.resume)
    certificates, finished = folder / CERTIFICATES_NAME, len(results.rows)
    if run.args.resume:
        print(f"resuming: {finished} of {len(run.keys)} rows are there")
    elif unfinished_rows(folder):
        print(f"note: this replaces {unfinished_rows(folder)} rows of an interrupted run (--resume would continue it)")
    try:
        # disable=None: a bar on a terminal, silence in a log file, where only errors go to stderr
        with tqdm(total=len(run.keys), initial=finished, unit="row", disable=None) as progress:
            for batch in run.batches(finished):
                rows = run.search(batch, finished=len(results.rows))
                if not results.rows:
                    shutil.rmtree(certificates, ignore_errors=True)  # of an earlier run, like the rows to be replaced
                if run.args.save_certificate:
                    run.save_certificates(batch, rows, certificates)
                results.append(rows)
                progress.update(len(rows))
    except KeyboardInterrupt:
        print(f"{len(results.rows)} of {len(run.keys)} rows lie in {folder}; --resume continues", file=sys.stderr)
        raise
    if run.args.per_frame:
        write_examples(run.samples, folder)
    results.finish(summarize(results.rows), _now())
    print_summary(read_record(folder)["summary"])
    figures = plot_results(folder)
    print(f"results in {folder}: {results.csv_path.name}, run.json, {', '.join(figures)}")
    if run.args.save_certificate:
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
