"""The rows of a run about a user's own model and data."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..certify.certificate import FOLDER_NAME as CERTIFICATES_NAME
from ..certify.certificate import say_missing, write_certificates
from ..certify.interface import tuned_margins
from ..certify.problem import MarginProblem
from ..certify.radius import search_radius
from ..choices.method import TUNED_METHODS, Method
from ..experiments.arguments import method_of
from ..experiments.mnist import report
from ..graph.graph import Graph
from ..network.constants.extra import NOTHING, Extra
from ..network.constants.groups import groups_of
from ..network.models import SequenceClassifier
from ..network.modules import usable_model
from ..network.reading import graph_of, output_shape, read_network
from ..question.question import Question
from ..question.threat import Threat
from ..runs.bound_rows import Key, Row, summarize
from ..runs.cli import json_value, run_facts, utc_now
from ..runs.ranks import Ranks
from ..runs.results import Record, check_writable, digest, exclusive
from ..runs.work import Job, batches, explained, find_rows

DTYPE = torch.float64


class OwnRun:
    """Which inputs get a radius, against which classes, and how rows are found and written.

    Inputs that are misclassified, or whose class is the target, get no row.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        model: nn.Module | Graph,
        x: Tensor,
        labels: Tensor | None,
        scales: Tensor | None,
        box: tuple[Tensor, Tensor] | None = None,
        extra: Extra = NOTHING,
    ):
        self.args, self.model, self.box = args, model, box
        clip = None if args.clip is None else tuple(args.clip)
        told = {"features": args.features, "scales": scales, "together": args.together}
        self.threat = Threat(args.p, args.ball, args.frames, clip, **told)
        self.method: Method = method_of(args)
        scores = scores_of(model, x, extra)
        predicted = classes_of(scores)
        labels = predicted if labels is None else labels.to(predicted)
        if labels.shape != predicted.shape:
            raise ValueError(f"labels must be ({len(x)},), one an input, not {tuple(labels.shape)}")
        targets = targets_of(args, scores, labels)
        aimed = torch.zeros_like(labels, dtype=torch.bool) if targets is None else targets == labels
        kept = (~aimed & (labels == predicted)).nonzero().squeeze(-1)
        self.counts = {"drawn": len(x), "left_out": int(aimed.sum()), "kept": len(kept)}
        self.counts["misclassified"] = len(x) - self.counts["left_out"] - len(kept)
        self.x, self.labels, self.scales, self.extra = x[kept], labels[kept], scales, extra.part(kept.cpu())
        if scales is not None and scales.shape[:1] == x.shape[:1] and scales.dim() == x.dim():
            self.scales = scales[kept]
        if box is not None:
            self.box = tuple(end[kept] if end.shape == x.shape else end for end in box)
        self.targets = None if targets is None else targets[kept]
        names = ["all"] * len(kept) if targets is None else self.targets.tolist()
        rows = zip(kept.tolist(), self.labels.tolist(), names, strict=True)
        self.keys = [Key(index, label, label, target) for index, label, target in rows]

    def check(self) -> None:
        """Raise ValueError if there is nothing to do, or no certificate of such a model."""
        if not self.keys:
            drawn = self.counts["drawn"]
            raise ValueError(f"nothing to certify: none of the {drawn} inputs is classified correctly and has a target")
        if self.args.save_certificate and not isinstance(usable_model(self.model), SequenceClassifier):
            raise ValueError("--save-certificate: certificates are of a utils.models.SequenceClassifier")

    def problem_of(self, chosen: Sequence[int]) -> MarginProblem:
        chosen = torch.tensor(chosen, device=self.x.device)
        goal = None if self.targets is None else self.targets[chosen]
        own, scales = self.threat, self.scales
        if scales is not None and scales.dim() == self.x.dim() and len(scales) == len(self.x):
            scales = scales[chosen]
        box = self.box and tuple(end[chosen] if end.shape == self.x.shape else end for end in self.box)
        own = replace(own, scales=scales, box=box)
        inputs = (self.model, self.x[chosen], self.labels[chosen])
        return MarginProblem(Question(*inputs, goal, own, extra=self.extra.part(chosen.cpu())), self.method)

    def columns_of(self, problem: MarginProblem) -> dict[str, Tensor]:
        args = self.args
        dtype = getattr(torch, args.dtype)
        if args.eps is None:
            how = {"tol": args.tol, "eps0": args.k or args.eps0, "max_eps": args.k or args.max_eps, "dtype": dtype}
            found = search_radius(problem, batch_size=len(problem.x), **how)
            columns = {"radius": found.radius, "failed_eps": found.failed, "start_radius": found.start}
            return columns | {"margin": found.margin, "evaluations": found.evaluations}
        eps = problem.question.eps(args.eps, dtype)
        margin, resolution = torch.empty_like(eps), torch.empty_like(eps)
        for members, own in problem.groups():
            margin[members] = (tuned_margins(own, eps[members], dtype) - own.slack(dtype)).amin(dim=1)
            resolution[members] = own.resolution(dtype)
        holds = (margin > 0) & (eps >= resolution)
        columns = {"radius": torch.where(holds, eps, 0.0), "failed_eps": torch.where(holds, torch.inf, eps)}
        columns |= {"margin": margin, "evaluations": torch.ones_like(self.labels[: len(eps)])}
        return columns | {"start_radius": torch.full_like(margin, torch.nan)}

    @torch.no_grad()
    def search(self, chosen: list[int]) -> list[Row]:
        begun = time.perf_counter()
        with explained(f"in the batch of input {self.keys[chosen[0]].index}", len(chosen)):
            columns = self.columns_of(self.problem_of(chosen))
        values = {name: column.tolist() for name, column in columns.items()}
        seconds = (time.perf_counter() - begun) / len(chosen)
        return [
            Row(**vars(self.keys[sample]), **{name: column[n] for name, column in values.items()}, seconds=seconds)
            for n, sample in enumerate(chosen)
        ]

    def save_certificates(self, rows: Sequence[Row], folder: Path) -> None:
        number = {key.index: sample for sample, key in enumerate(self.keys)}
        problem = self.problem_of([number[row.index] for row in rows])
        radius = torch.tensor([row.radius for row in rows], dtype=DTYPE, device=problem.x.device)
        say_missing(radius, write_certificates(folder, problem, radius, [f"{row.index:05d}" for row in rows]))

    @property
    def unit(self) -> str:
        """What radii are in."""
        if self.box is not None:
            return "shares of the box"
        return "numbers of changes" if self.args.p == 0.0 else "units of the data"

    def record(self, device: torch.device, hashes: dict[str, str]) -> Record:
        """What run.json says about the run."""
        args = self.args
        goal = "untargeted" if args.target is None else f"target {args.target}"
        return {
            "title": f"{goal}; {args.method}",
            "unit": self.unit,
            "model": {"name": args.model, "path": json_value(args.weights or args.model), **hashes, "config": {}},
            "data": {"source": args.data, "drawn_sha256": digest(self.as_bytes())},
            "counts": self.counts,
            **run_facts(args, device, args.dtype),
        }

    def as_bytes(self) -> list[bytes]:
        return bytes_of(self.x, self.extra)

    def write(self, folder: Path, record: Record, ranks: Ranks) -> list[Row]:
        """Find the rows, batch by batch, write and report them; the first process gets all."""
        args, certificates = self.args, folder / CERTIFICATES_NAME
        wanted = getattr(args, "save_certificate", False)
        save = partial(self.save_certificates, folder=certificates) if wanted else None
        jobs = [
            Job([self.keys[sample] for sample in batch], partial(self.search, batch))
            for batch in batches(len(self.keys), args.batch_size)
        ]
        check_writable(folder)
        with exclusive(folder, ranks):
            layout = {"ranks": ranks, "attached": (CERTIFICATES_NAME,), "resume": args.resume}
            layout |= {"columns": ("start_radius",) if args.method in TUNED_METHODS else ()}
            layout |= {"drawn": self.as_bytes(), "overwrite": args.overwrite}
            results = find_rows(folder, record, jobs, before_writing=save, **layout)
            if not ranks.first:
                return []
            results.finish(summarize(results.rows), utc_now())
            report(folder)
            if wanted:
                print(f"certificates in {certificates}: python scripts/check_certificate.py {certificates}")
            return results.rows


def bytes_of(x: Tensor, extra: Extra) -> list[bytes]:
    """Every input, with what else the forward is given for it, by which a run knows it again."""
    samples = [sample.cpu().numpy().tobytes() for sample in x]
    return [own + repr(extra.key(n)).encode() for n, own in enumerate(samples)] if extra else samples


@torch.no_grad()
def scores_of(model: nn.Module | Graph, x: Tensor, extra: Extra = NOTHING) -> Tensor:
    """The scores that are compared, (batch, classes) or (batch, 1), in float64."""
    network, frames = read_network(model, x, extra=extra)
    shape = output_shape(network)
    if len(shape) > 1:
        raise ValueError(
            f"the model has outputs {tuple(shape)} an input: the scripts take scores of classes, "
            "certified_radius and output_bounds take any"
        )
    scores = frames.new_zeros(len(frames), shape.numel(), dtype=DTYPE)
    for members, own in groups_of(network, len(frames)):
        members = members.to(frames.device)
        scores[members] = graph_of(own, frames.shape[1], DTYPE, "plane").evaluate(frames[members].to(DTYPE))
    return scores


def classes_of(scores: Tensor) -> Tensor:
    """What a model says, (batch,), by scores of classes or by one."""
    return (scores[:, 0] > 0).long() if scores.shape[1] == 1 else scores.argmax(dim=1)


def targets_of(args: argparse.Namespace, scores: Tensor, labels: Tensor) -> Tensor | None:
    """The class that each input is kept away from; None for all others."""
    if args.target is None:
        return None
    classes = scores.shape[1]
    if classes == 1:
        raise ValueError("the model has one score, and so no targets: leave out --target or --targeted")
    if isinstance(args.target, int):
        if args.target >= classes:
            raise ValueError(f"--target {args.target} is no class: there are 0 to {classes - 1}")
        return torch.full_like(labels, args.target)
    if args.target == "random":
        generator = torch.Generator().manual_seed(args.seed)
        return (labels + torch.randint(1, classes, labels.shape, generator=generator).to(labels)) % classes
    others = scores.clone()
    others[torch.arange(len(labels)), labels] = -torch.inf if args.target == "runnerup" else torch.inf
    return others.argmax(dim=1) if args.target == "runnerup" else others.argmin(dim=1)
