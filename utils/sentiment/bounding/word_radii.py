"""Radii of single words: how far the vector of one word may move while all others stay, in balls instead of lists.

A substitute that lies inside the ball of its word is ruled out by the radius as well; how many do compares the two.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch

from ...certify.interface import certified_radius
from ...experiments.arguments import result_folder
from ...runs.cli import apply_common_arguments, utc_now
from ...runs.ranks import Ranks, joined
from ...runs.results import CSV_NAME, Record, check_writable, exclusive
from ...runs.rows import KeyedRow
from ...runs.work import Job, explained, find_rows
from ...steps.word_summary import counted
from ..words import Group
from .bound import SentenceRun, make_record
from .opening import open_run, settle
from .question import strongest

INSIDE = 1e-9  # a substitute counts as covered if it is nearer than the radius by this share: room for rounding


@dataclass(frozen=True)
class RadiusKey:
    """What a row is about: a word of a sentence that is classified rightly; positions are from 0."""

    index: int
    words: int
    position: int
    word: str
    label: int
    prediction: int


@dataclass(frozen=True)
class RadiusRow(RadiusKey, KeyedRow):
    """What was found for one word, in units of the word vectors.

    Attributes:
        radius: within it, the word's vector may be any while all others stay as they are.
        substitutes: how many the word has; ``covered``, how many of them lie within the radius.
        seconds: wall time of the batch, divided by its sentences.
    """

    KEY: ClassVar[type] = RadiusKey

    radius: float
    substitutes: int
    covered: int
    seconds: float


def bound_word_radii(args: argparse.Namespace, architecture: str) -> None:
    """Find the radius of every word of the sentences that a script's arguments name, in the l_p norm of --radii."""
    settle(args)
    device = apply_common_arguments(args)
    with joined(device) as ranks:
        opened = open_run(args, architecture, device)
        run = RadiusRun(SentenceRun(args, opened))
        print(f"{opened.name}: {counted(len(opened.drawn), 'sentence')}, {opened.source}")
        print(f"one word's vector moves, in the l_{args.radii:g} norm; {run.method}", flush=True)
        if args.dry_run:
            print(f"dry run: {run.jobs()[0].compute()[0]}, nothing written")
            return
        kind = ["text"] if args.text else ["dev"] * (args.part == "dev")
        name = "_".join(["substitution_bound", *kind, "radii", f"{args.radii:g}", run.method])
        folder = result_folder(args, opened.path.parent, name)
        check_writable(folder)
        with exclusive(folder, ranks):
            run_and_write(run, folder, ranks)


def run_and_write(run: RadiusRun, folder: Path, ranks: Ranks) -> None:
    args = run.run.args
    record = make_record(run.run) | {"title": f"single words, l_{args.radii:g}, {run.method}"}
    layout = {"derived": (), "resume": args.resume, "overwrite": args.overwrite}
    results = find_rows(folder, record, run.jobs(), kind=RadiusRow, ranks=ranks, **layout)
    if not ranks.first:
        return
    summary = summarize(results.rows)
    results.finish(summary, utc_now())
    print(f"{counted(summary['words'], 'word')}: mean radius {summary['radius']:.4g}, ", end="")
    print(f"{summary['covered']} of {summary['substitutes']} substitutes inside, {summary['seconds']:.2g} s a word")
    print(f"results in {folder}: {CSV_NAME}, run.json")


def summarize(rows: list[RadiusRow]) -> Record:
    if not rows:
        raise ValueError("nothing to certify: no sentence is classified correctly")
    return {
        "words": len(rows),
        "radius": sum(row.radius for row in rows) / len(rows),
        "substitutes": sum(row.substitutes for row in rows),
        "covered": sum(row.covered for row in rows),
        "seconds": sum(row.seconds for row in rows) / len(rows),
    }


class RadiusRun:
    """The rows of a run, from the sentences of a ``SentenceRun``."""

    def __init__(self, run: SentenceRun):
        self.run, self.method = run, strongest(run.args.methods)
        self.parts = [self._right(part, guesses) for part, guesses in zip(run.parts, run.predictions, strict=True)]

    def _right(self, part: Group, predictions: list[int]) -> tuple[Group, list[int]]:
        """The sentences of a part that are classified rightly, and their labels."""
        pairs = zip(self.run.labels(part, predictions), predictions, strict=True)
        kept = [n for n, (label, guess) in enumerate(pairs) if label == guess]
        return (part.part(torch.tensor(kept)) if kept else part.part(slice(0, 0))), [predictions[n] for n in kept]

    def jobs(self) -> list[Job]:
        return [Job(self.keys(*pair), partial(self.search, *pair)) for pair in self.parts if len(pair[0])]

    def keys(self, part: Group, labels: list[int]) -> list[RadiusKey]:
        drawn = [self.run.drawn[place] for place in part.places.tolist()]
        return [
            RadiusKey(one.index, len(one.sentence.words), position, word, label, label)
            for one, label in zip(drawn, labels, strict=True)
            for position, word in enumerate(one.sentence.words)
        ]

    def search(self, part: Group, labels: list[int]) -> list[RadiusRow]:
        run, norm = self.run, self.run.args.radii
        x, vectors = run.vectors[part.numbers], run.vectors[part.choices]
        distances = torch.linalg.vector_norm(vectors - x[:, :, None], ord=norm, dim=-1)
        started, radii = time.perf_counter(), []
        with explained(f"in the sentences of {x.shape[1]} words", run.args.batch_size):
            for position in range(x.shape[1]):
                given = run.classifier, x, torch.tensor(labels, device=x.device)
                radii.append(certified_radius(*given, norm=norm, frames=position, method=self.method))
        seconds = (time.perf_counter() - started) / (len(x) * x.shape[1])
        radius = torch.stack(radii, dim=1)
        inside = ((distances <= radius[..., None] * (1.0 - INSIDE)) & part.valid).sum(dim=-1)
        columns = zip(*(value.flatten().tolist() for value in (radius, part.valid.sum(-1), inside)), strict=True)
        return [
            RadiusRow(**vars(key), radius=r, substitutes=s, covered=c, seconds=seconds)
            for key, (r, s, c) in zip(self.keys(part, labels), columns, strict=True)
        ]
