"""Local Lipschitz constants against eps: the run that the lipschitz scripts share, its rows and its figure."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from data.mnist import ImageData

from ..certify.lipschitz import LocalLipschitz, local_lipschitz, sampled_lipschitz
from ..network.checkpoint import Config, model_name
from ..question.specification import margin_rows
from ..runs.cli import apply_common_arguments, checkpoint_facts, run_facts, utc_now
from ..runs.ranks import Ranks, joined
from ..runs.results import Record, check_writable, digest, exclusive, replacing
from ..runs.rows import KeyedRow
from ..runs.work import Job, batches, explained, find_rows
from ..training.images.mnist import check_slices
from .lipschitz_arguments import describe_function, radii
from .plots import DPI, headline, norm_symbol, tidy
from .samples import Samples
from .wording import UNIT, describe_threat

SAMPLED = "sampled"
ALL_FRAMES = "all"
STYLES = {"joint": "-", "chord": "-.", "recurjac": "--", "interval": ":", SAMPLED: "-"}
TITLES = ("all frames change, each by at most eps", "one frame changes, by {}")
FIGURE_NAME, CLASSES = "lipschitz.png", 10


@dataclass(frozen=True)
class LipschitzKey:
    """A test image, a radius, the frame that changes (or "all"), and how the constant was found.

    Attributes:
        bound: "joint", "chord", "recurjac" or "interval": an upper bound; "sampled": the largest of some gradients.
    """

    index: int
    label: int
    eps: float
    frame: int | str
    bound: str


@dataclass(frozen=True)
class LipschitzRow(LipschitzKey, KeyedRow):
    """A key and its constant, in units of the output for each unit of the input's norm."""

    KEY: ClassVar[type] = LipschitzKey

    constant: float = 0.0
    seconds: float = 0.0


@contextmanager
def started(args: argparse.Namespace) -> Iterator[tuple[torch.device, Ranks]]:
    """Check a lipschitz script's arguments, and join the other processes of the run."""
    if not args.logit and not args.untargeted and args.target is None:
        args.target = "random"
    if args.logit and (args.untargeted or args.target is not None):
        raise ValueError("--logit is about the label's logit: leave out --untargeted and --target")
    args.untargeted |= args.logit  # no target is drawn
    radii(args)
    device = apply_common_arguments(args)
    check_slices(args.time_step)
    with joined(device) as ranks:
        yield device, ranks


def make_lipschitz_record(
    args: argparse.Namespace, samples: Samples, path: Path, config: Config, data: ImageData, device: torch.device
) -> Record:
    """What run.json says about the run."""
    return {
        "threat_model": describe_threat(args),
        "goal": describe_function(args),
        "method": f"{', '.join(args.chains)} over {args.layer_method}; {args.samples} gradients sampled in each ball",
        "unit": UNIT,
        "model": checkpoint_facts(path, model_name(config), config),
        "data": {"source": data.source, "test_images": len(data.test_y), "drawn_sha256": digest(samples.as_bytes())},
        "counts": samples.counts,
        **run_facts(args, device, args.dtype),
    }


def introduce(record: Record) -> None:
    """What a run is about, on the console."""
    counts = record["counts"]
    print(f"{record['model']['name']} on test images of {record['data']['source']}: ", end="")
    print(f"{counts['drawn']} drawn, {counts['kept']} correctly classified")
    print(f"local Lipschitz constants of {record['goal']}, in units of the output for each of {record['unit']}")
    print(f"{record['threat_model']}\nbounds: {record['method']}", flush=True)


def rows_of(args: argparse.Namespace, samples: Samples) -> Tensor:
    """The function of the outputs for every image, (n, n_rows, classes): the label's logit or its margins."""
    if args.logit:
        return torch.eye(CLASSES)[samples.labels][:, None]
    return margin_rows(samples.labels, CLASSES, samples.targets)


class LipschitzRun:
    """Rows of a run over images, radii, bounds and, if there are several, frames."""

    def __init__(self, args: argparse.Namespace, model: nn.Module, samples: Samples, device: torch.device):
        self.args, self.model, self.samples = args, model, samples
        self.x, self.rows = samples.frames(args.time_step).to(device), rows_of(args, samples).to(device)
        self.frames = [ALL_FRAMES, *(range(args.time_step) if args.time_step > 1 else [])]
        self.bounds = [*args.chains, SAMPLED]

    def jobs(self) -> list[Job]:
        """A job for every batch of images and every eps."""
        return [
            Job(self._keys(batch, eps), partial(self.compute, batch, eps))
            for batch in batches(len(self.x), self.args.batch_size)
            for eps in radii(self.args)
        ]

    def _keys(self, batch: list[int], eps: float) -> list[LipschitzKey]:
        index, labels = self.samples.index.tolist(), self.samples.labels.tolist()
        return [
            LipschitzKey(index[n], labels[n], eps, frame, bound)
            for n in batch
            for bound in self.bounds
            for frame in self.frames
        ]

    def compute(self, batch: list[int], eps: float) -> list[LipschitzRow]:
        found = {}
        for bound in self.bounds:
            begun = time.perf_counter()
            with explained(f"in the batch of test image {self.samples.index[batch[0]]}", len(batch)):
                constants = self._constants(batch, eps, bound)
            # Of several margins the steepest counts.
            steepest, apart = constants.constant.amax(dim=1), constants.frames.amax(dim=1)
            seconds = (time.perf_counter() - begun) / len(batch)
            for place, n in enumerate(batch):
                for frame in self.frames:
                    value = steepest[place] if frame == ALL_FRAMES else apart[place, frame]
                    found[n, bound, frame] = (float(value), seconds)
        keys = self._keys(batch, eps)
        places = [(n, bound, frame) for n in batch for bound in self.bounds for frame in self.frames]
        return [
            LipschitzRow(**vars(key), constant=found[place][0], seconds=found[place][1])
            for key, place in zip(keys, places, strict=True)
        ]

    def _constants(self, batch: list[int], eps: float, bound: str) -> LocalLipschitz:
        asked = (self.model, self.x[batch], eps, self.rows[batch])
        dtype = getattr(torch, self.args.dtype)
        if bound == SAMPLED:
            return sampled_lipschitz(
                *asked, norm=self.args.p, samples=self.args.samples, seed=self.args.seed, dtype=dtype
            )
        direction = "backward" if bound == "interval" else self.args.direction
        how = {"chain": bound, "layers": self.args.layer_method, "direction": direction}
        return local_lipschitz(*asked, norm=self.args.p, dtype=dtype, **how)

    def rehearse(self) -> None:
        """The first image at the smallest eps, for --dry-run."""
        row = self.compute([0], radii(self.args)[0])[0]
        print(f"dry run: image {row.index} has constant {row.constant:.4g} at eps {row.eps:g}, nothing written")

    def write(self, folder: Path, record: Record, ranks: Ranks) -> None:
        """Find the rows, write them as they come, summarise and draw; ``--resume`` continues."""
        check_writable(folder)
        with exclusive(folder, ranks):
            layout = {"kind": LipschitzRow, "ranks": ranks, "drawn": self.samples.as_bytes()}
            results = find_rows(
                folder, record, self.jobs(), resume=self.args.resume, overwrite=self.args.overwrite, **layout
            )
            if not ranks.first:
                return
            check(results.rows)
            results.finish({"rows": len(results.rows), "mean": means(results.rows)}, utc_now())
            figure = plot(results.rows, record)
            with replacing(folder / FIGURE_NAME) as path:
                figure.savefig(path, dpi=DPI)
            print_means(results.rows)
            print(f"results in {folder}: certified_bound.csv, run.json, {FIGURE_NAME}")


def check(rows: Sequence[LipschitzRow]) -> None:
    """Raise ValueError if a sampled gradient is steeper than a bound allows: then one of both is wrong."""
    sampled = {(row.index, row.eps, row.frame): row.constant for row in rows if row.bound == SAMPLED}
    for row in rows:
        if row.constant < sampled[row.index, row.eps, row.frame] * (1.0 - 1e-6):
            raise ValueError(f"image {row.index}, eps {row.eps:g}: a gradient is steeper than the bound by {row.bound}")


def means(rows: Sequence[LipschitzRow]) -> list[dict]:
    """Mean constants over the images, by bound, frame and eps."""
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        groups.setdefault((row.bound, row.frame, row.eps), []).append(row.constant)
    return [
        {"bound": bound, "frame": frame, "eps": eps, "images": len(values), "constant": math.fsum(values) / len(values)}
        for (bound, frame, eps), values in groups.items()
    ]


def print_means(rows: Sequence[LipschitzRow]) -> None:
    """A table of mean constants, a line an eps."""
    table = {(entry["bound"], entry["eps"]): entry["constant"] for entry in means(rows) if entry["frame"] == ALL_FRAMES}
    bounds = list(dict.fromkeys(bound for bound, _ in table))
    print(f"{'eps':>10}" + "".join(f"{bound:>12}" for bound in bounds) + "   (mean constants)")
    for eps in dict.fromkeys(eps for _, eps in table):
        print(f"{eps:>10.4g}" + "".join(f"{table[bound, eps]:>12.4g}" for bound in bounds))


def plot(rows: Sequence[LipschitzRow], record: Record) -> Figure:
    """Constants against eps, means over the images; beside it those of single frames if there are several."""
    entries = means(rows)
    frames = sorted({entry["frame"] for entry in entries} - {ALL_FRAMES})
    figure = Figure(figsize=(6.0 + 5.0 * bool(frames), 4.0), layout="constrained")
    panels = figure.subplots(1, 1 + bool(frames), squeeze=False)[0]
    symbol = norm_symbol(record["arguments"]["p"])
    headline(
        figure,
        f"{record['model']['name']}, {entries[0]['images']} images: {record['goal']}",
        f"layers bounded by {record['arguments']['layer_method']}; {record['arguments']['samples']} gradients sampled",
    )
    for bound in dict.fromkeys(entry["bound"] for entry in entries):
        own = [entry for entry in entries if (entry["bound"], entry["frame"]) == (bound, ALL_FRAMES)]
        color = "black" if bound == SAMPLED else None
        label = f"{bound}, from below" if bound == SAMPLED else bound
        panels[0].plot(*_curve(own), STYLES[bound], color=color, label=label)
    for frame in frames:
        chain = record["arguments"]["chains"][0]
        own = [entry for entry in entries if (entry["bound"], entry["frame"]) == (chain, frame)]
        panels[1].plot(*_curve(own), label=f"frame {frame}")
    for axes, title in zip(panels, TITLES, strict=False):
        axes.set(xscale="log", yscale="log", xlabel=f"eps ({symbol}, pixel values in [0, 1])")
        axes.set_ylabel("local Lipschitz constant, mean")
        axes.set_title(title.format(record["arguments"]["chains"][0]) if frames else "", fontsize=10)
        axes.legend(frameon=False, fontsize=8)
        tidy(axes)
    return figure


def _curve(entries: Sequence[dict]) -> tuple[list[float], list[float]]:
    return [entry["eps"] for entry in entries], [entry["constant"] for entry in entries]
