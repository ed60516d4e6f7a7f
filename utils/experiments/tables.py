"""What the scripts behind the tables in docs/ and benchmarks/ share: models with their samples, and writing tables."""

from __future__ import annotations

import argparse
import copy
import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

from data.mnist import ImageData

from ..network.checkpoint import Classifier, Config, load_checkpoint, model_name
from ..network.constants.extra import NOTHING, Extra
from ..runs.bound_rows import statistics
from ..runs.cli import ROOT, git_commit, versions
from ..runs.results import replacing
from .arguments import check_arguments
from .samples import draw_index, draw_samples, form_of, random_targets
from .table_arguments import models_dir

OWN = "own"  # the architecture of a user's own model


@dataclass
class Case:
    """A checkpoint and the test images that a bound script draws for it: correctly classified, with random targets.

    From ``load_all_images``, it has all images that were drawn, the misclassified as well. ``x`` is as the model takes
    it, (n, T, values a frame) or (n, channels, height, width).

    Of a user's own model (``utils.own.case``), ``path`` is its file and ``files`` are others that it is made of; x is
    any input, and ``extra`` what else the forward is given.
    """

    name: str
    config: Config
    model: Classifier
    x: Tensor
    labels: Tensor
    targets: Tensor | None
    index: Tensor
    path: Path
    extra: Extra = NOTHING
    files: tuple[Path, ...] = field(default=())

    @property
    def gated(self) -> bool:
        return self.config["architecture"] in ("lstm", "gru")

    @property
    def num_frames(self) -> int:
        """What has a ball of its own: slices, or the whole image."""
        return self.config.get("num_frames", 1)

    @property
    def is_own(self) -> bool:
        return self.config["architecture"] == OWN

    @property
    def frames(self) -> Tensor:
        """x as frames, (n, T, values a frame), of floats."""
        return self.x if self.x.dim() == 3 else self.x.flatten(1)[:, None]

    def as_bytes(self) -> bytes:
        """All inputs, and what else the forward is given, by which a run knows them again."""
        others = [repr(self.extra.key(n)).encode() for n in range(len(self)) if self.extra]
        return b"".join([self.x.cpu().numpy().tobytes(), *others, self.labels.cpu().numpy().tobytes()])

    def __len__(self) -> int:
        return len(self.labels)


def case_path(name: str, dataset: str = "mnist") -> Path:
    """The checkpoint of a folder of the data set's models, or the file that ``name`` is the path of."""
    return Path(name) if Path(name).is_file() else models_dir(dataset) / name / name.split("_")[0]


def load_case(name: str, data: ImageData, args: argparse.Namespace, device: torch.device) -> Case:
    """A model and the images and targets that its bound script draws with the same --N and --seed.

    ``name`` is a folder of the data set's models or a checkpoint file.

    Raises:
        CheckpointError, ValueError: there is no such model, or nothing to certify.
    """
    path = case_path(name, data.name)
    model, config = load_checkpoint(path, device)
    options = {"time_step": config.get("num_frames", 1), "dtype": "float64", "untargeted": False, "target": "random"}
    options |= {"per_frame": False, "frames": None, "clip": False, "p": 2.0, "save_certificate": False}
    drawing = argparse.Namespace(**(vars(copy.copy(args)) | options))
    check_arguments(drawing)
    form = form_of(config)
    samples = draw_samples(data, model, drawing, form)
    x = form(samples.images).to(device)
    labels, targets = samples.labels.to(device), samples.targets.to(device)
    return Case(case_name(name, path, config), config, model, x, labels, targets, samples.index, path)


def load_all_images(
    name: str, data: ImageData, args: argparse.Namespace, device: torch.device, targeted: bool = False
) -> Case:
    """As ``load_case``, with all images that are drawn, and without targets unless ``targeted``."""
    path = case_path(name, data.name)
    model, config = load_checkpoint(path, device)
    index, generator = draw_index(data, args)
    targets = random_targets(data, index, generator).to(device) if targeted else None
    x = form_of(config)(data.test_x[index]).to(device)
    return Case(case_name(name, path, config), config, model, x, data.test_y[index].to(device), targets, index, path)


def case_name(name: str, path: Path, config: Config) -> str:
    """The model folder's name, or what a checkpoint elsewhere is to be called."""
    return name if path.parent.name == name else model_name(config)


def script_name() -> str:
    """The running script, relative to the repository."""
    return Path(sys.argv[0]).resolve().relative_to(ROOT).as_posix()


def provenance(args: argparse.Namespace, device: torch.device, source: str) -> list[str]:
    """Markdown lines that say what made a table. Where the data lie on this machine does not belong there."""
    words = [script_name(), *sys.argv[1:]]
    for flag in ("--data-dir", "--out-dir"):
        if flag in words:
            del words[words.index(flag) : words.index(flag) + 2]
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    return [
        f"- command: `python {' '.join(words)}`",
        f"- made {datetime.now(timezone.utc):%Y-%m-%d} at commit {(git_commit() or 'unknown')[:10]}, torch "
        f"{versions()['torch']}, {kind}",
        f"- test images of {source}: {args.N} drawn with seed {args.seed}, the misclassified left out; one random "
        "target class each",
    ]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> list[str]:
    """Lines of a Markdown table; columns after the first ``text_columns`` are set to the right."""
    rule = [":--" if number < text_columns else "--:" for number in range(len(header))]
    return ["| " + " | ".join(row) + " |" for row in (header, rule, *rows)]


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write a text file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_csv(path: Path, records: Sequence[dict]) -> None:
    """Write records of the same keys under a header, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def mean_std(values: Sequence[float]) -> str:
    """Mean and standard deviation as a cell of a table."""
    found = statistics(values)
    return f"{found['mean']:.3g} ± {found['std']:.2g}"


def norm_text(norm: float) -> str:
    """l_2, or l_∞."""
    return f"l_{norm:g}".replace("inf", "∞")
