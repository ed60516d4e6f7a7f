"""Verdicts on spoken digits, utterance by utterance, from the arguments of a bound script to the result folder."""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from data.speech import SpeechData, Utterance, as_chunks, load_speech, write_wav

from ..attack.attack_file import save_attack
from ..attack.pgd import AttackResult, attack_radius, pgd
from ..certify.bab import best_margins
from ..certify.certificate import FOLDER_NAME, save_certificates
from ..certify.interface import certified_radius, margins_at
from ..certify.problem import MarginProblem, margin_problem
from ..choices.method import CURVED_METHODS
from ..experiments.arguments import result_folder
from ..network.checkpoint import CheckpointError, Config, load_checkpoint, missing
from ..network.speech import SpeechClassifier
from ..network.speech.threats import SpeechThreat
from ..runs.cli import ContradictionError, apply_common_arguments, checkpoint_facts, run_facts, utc_now
from ..runs.ranks import Ranks, joined
from ..runs.results import CSV_NAME, Record, check_writable, digest, exclusive, read_record, replacing
from ..runs.rows import KeyedRow
from ..runs.work import Job, explained, find_rows
from ..training.tasks import speech_model_name
from .arguments import THREATS
from .figure import FIGURE, plot_spectrograms

UNITS = {"noise": "dB of the peak", "snr": "dB of signal to noise", "features": "nats"}
WAVES = "falsified"  # folder of counter-examples
EVIDENCE = "contradiction.pt"
DPI = 150


@dataclass(frozen=True)
class UtteranceKey:
    """What a row is about: the utterance's file and label, and how many chunks it has."""

    name: str
    label: int
    chunks: int


@dataclass(frozen=True)
class UtteranceRow(UtteranceKey, KeyedRow):
    """What was found for one utterance.

    Attributes:
        verdict: verified, falsified or unknown at ``level``.
        margin: the least certified margin there, less the slack for rounding.
        attack_margin: the least margin that PGD met there; NaN where it was left out or not needed.
        seconds: processor time of the bounds of the utterance's batch, over the utterances in it.
        certified_level, attacked_level: those of the largest radius that was certified and the smallest that PGD broke;
            NaN where they were not searched.
    """

    KEY: ClassVar[type] = UtteranceKey

    level: float
    verdict: str
    margin: float
    attack_margin: float
    seconds: float
    certified_level: float
    attacked_level: float


def bound_speech_classifier(args: argparse.Namespace, architecture: str) -> None:
    """Decide on the utterances that a script's arguments ask for.

    Raises:
        ValueError: arguments, checkpoint or data do not fit; the message says which. Earlier results stay.
        OSError: a file cannot be read or the folder cannot be written.
    """
    device = apply_common_arguments(args)
    if args.save_certificate and (args.method in CURVED_METHODS or args.power != "bands"):
        raise ValueError("--save-certificate has rules for planes and bands: take --method crown or alpha, no --power")
    if args.search and args.method == "curve":
        raise ValueError("--search has no time limit: leave out --method curve")
    args.level = THREATS[args.threat] if args.level is None else args.level
    with joined(device) as ranks:
        _bound(args, architecture, device, ranks)


def _bound(args: argparse.Namespace, architecture: str, device: torch.device, ranks: Ranks) -> None:
    path = args.work_dir / speech_model_name(architecture, args.hidden_size, args.recipe) / args.model_name
    if not path.exists():
        script = f"{architecture}/train_{architecture}_speech_classifier.py --hidden-size {args.hidden_size}"
        script += " --certified ..." * (args.recipe is not None)
        raise missing(path, f"train it by python {script}")
    classifier, config = load_checkpoint(path, device)
    if not isinstance(classifier, SpeechClassifier) or config["architecture"] != architecture:
        raise CheckpointError(f"{path} holds no {architecture} that classifies speech")
    run = SpeechRun(args, classifier.requires_grad_(False), load_speech(args.data_dir, args.sample))
    where = f"between {args.span[0]:g} and {args.span[1]:g} s" if args.span else "everywhere"
    print(f"{path.parent.name} on utterances of {run.data.source}: {args.N} drawn, {len(run.kept)} to decide. ", end="")
    print(f"{args.threat} of {args.level:g} {UNITS[args.threat]}, {where}; bounds: {args.method}")
    if args.dry_run:
        (row,) = run.decide(run.kept[:1])
        print(f"dry run: {row.name} is {row.verdict}, nothing written")
        return
    folder = result_folder(args, path.parent, result_folder_name(args))
    check_writable(folder)
    with exclusive(folder, ranks):
        run_and_write(run, folder, make_record(run, path, config), ranks)


def result_folder_name(args: argparse.Namespace) -> str:
    """noise_-90_norm_bound_crown, noise_-60_0.1_0.2_norm_bound_crown for a span."""
    span = [f"{end:g}" for end in args.span or ()]
    squares = ["squares"] * (args.power == "squares")
    return "_".join([args.threat, f"{args.level:g}", *span, "norm_bound", args.method, *squares])


class SpeechRun:
    """The rows of a run and how they are found."""

    def __init__(self, args: argparse.Namespace, classifier: SpeechClassifier, data: SpeechData):
        if len(data.test) < args.N:
            raise ValueError(f"--N {args.N} is more than the {len(data.test)} test utterances of {data.source}")
        self.args, self.classifier, self.data = args, classifier, data
        classifier.power = args.power
        self.threat = SpeechThreat(args.threat, args.level, args.span and tuple(args.span))
        order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(args.seed))[: args.N]
        drawn = [data.test[n] for n in order.tolist()]
        self.kept = [one for one in drawn if self.predict(one) == one.label]
        if not self.kept:
            raise ValueError(f"nothing to decide: none of the {args.N} utterances is classified correctly")
        self.counts = {"drawn": args.N, "misclassified": args.N - len(self.kept), "kept": len(self.kept)}
        self.drawn = [one.samples.tobytes() + one.name.encode() for one in self.kept]
        self.folder: Path | None = None

    def chunks(self, utterances: Sequence[Utterance]) -> Tensor:
        """(batch, C, hop) float64 of utterances of one length."""
        device = self.classifier.head.weight.device
        return as_chunks(utterances, self.classifier.features.hop)[0].double().to(device)

    @torch.no_grad()
    def predict(self, one: Utterance) -> int:
        return int(self.classifier(self.chunks([one]).to(self.classifier.head.weight)).argmax())

    def jobs(self) -> list[Job]:
        """A job for every few utterances of as many chunks each, the shortest first."""
        by_length: dict[int, list[Utterance]] = {}
        for one in self.kept:
            by_length.setdefault(self.chunks([one]).shape[1], []).append(one)
        jobs = []
        for length in sorted(by_length):
            group, size = by_length[length], self.args.batch_size
            for part in (group[start : start + size] for start in range(0, len(group), size)):
                jobs.append(
                    Job([UtteranceKey(one.name, one.label, length) for one in part], partial(self.decide, part))
                )
        return jobs

    @torch.no_grad()
    def decide(self, utterances: Sequence[Utterance]) -> list[UtteranceRow]:
        """The rows of some utterances of one length."""
        x = self.chunks(utterances)
        labels = torch.tensor([one.label for one in utterances], device=x.device)
        model = self.threat.model(self.classifier)
        moved, eps = self.threat.inputs(self.classifier.double(), x), self.threat.eps(x)
        settings = self.threat.settings(self.classifier, moved.shape[1])
        question = (model, moved, labels)
        with explained(f"in {utterances[0].name}", self.args.batch_size):
            started = time.process_time()
            problem = margin_problem(*question, method=self.args.method, time_limit=self.args.time_limit, **settings)
            margins, slack = self.margins(problem, eps), problem.slack(torch.float64)
            seconds = (time.process_time() - started) / len(x)
            margin = (margins - slack).amin(dim=1)
            columns = {"margin": margin, "attack_margin": self.attack(utterances, question, eps, margin, settings)}
            columns |= self.search(question, x, settings)
        rows = []
        for n, one in enumerate(utterances):
            values = {name: float(column[n]) for name, column in columns.items()}
            broken = values["attack_margin"] < 0
            verdict = "verified" if values["margin"] > 0 else "falsified" if broken else "unknown"
            key = {"name": one.name, "label": one.label, "chunks": x.shape[1]}
            rows.append(UtteranceRow(**key, level=self.args.level, verdict=verdict, seconds=seconds, **values))
        return rows

    @staticmethod
    def margins(problem: MarginProblem, eps: Tensor) -> Tensor:
        """Margins at eps; curves are tuned in the time that slopes leave, so that they are never worse than these."""
        if problem.method.tuned:
            return best_margins(problem, eps, torch.float64, alpha_share=1.0)
        return margins_at(problem, eps, torch.float64)

    def attack(self, utterances: Sequence[Utterance], question, eps: Tensor, margin: Tensor, settings) -> Tensor:
        """Least margins that PGD meets where nothing is proved, NaN elsewhere; waveforms that break it are written."""
        least = torch.full_like(eps, torch.nan)
        left = (margin <= 0).nonzero().squeeze(-1).tolist()
        if self.args.no_attack or not left:
            return least
        model, x, labels = question
        how = {"steps": self.args.attack_steps, "restarts": 1, "seed": self.args.seed, **settings}
        found = pgd(model, x[left], labels[left], eps[left], **how)
        least[left] = found.margin.to(least)
        if self.folder is not None and self.threat.kind != "features":
            for n, x, worst in zip(left, found.x, found.margin.tolist(), strict=True):
                if worst < 0:
                    self.write_wave(utterances[n], x)
        return least

    def write_wave(self, one: Utterance, x: Tensor) -> None:
        """A waveform that breaks the classifier, at the level of its file: to be heard; 16 bits round it."""
        (self.folder / WAVES).mkdir(parents=True, exist_ok=True)
        samples = x.flatten()[: len(one.samples)].cpu().numpy()
        write_wav(self.folder / WAVES / f"{one.name}.wav", samples * min(one.peak, 1.0 / np.abs(samples).max()))

    @torch.no_grad()
    def save_certificates(self, rows: Sequence[UtteranceRow], folder: Path) -> None:
        """Write the certificates of verified rows, of the weights as the checkpoint has them."""
        utterances = {one.name: one for one in self.kept}
        classifier = copy.deepcopy(self.classifier).float()
        model = self.threat.model(classifier)
        for row in rows:
            if row.verdict == "verified":
                x = self.chunks([utterances[row.name]])
                how = self.threat.settings(classifier, row.chunks - (self.threat.kind == "features"))
                how |= {"method": self.args.method, "names": [row.name]}
                moved, eps = self.threat.inputs(self.classifier.double(), x), self.threat.eps(x)
                save_certificates(folder, model, moved, torch.tensor([row.label], device=x.device), eps, **how)

    def search(self, question, x: Tensor, settings) -> dict[str, Tensor]:
        """Levels of the largest certified and the smallest broken radius."""
        nothing = torch.full((len(x),), torch.nan, dtype=torch.float64)
        if not self.args.search:
            return {"certified_level": nothing, "attacked_level": nothing}
        radius = certified_radius(*question, method=self.args.method, tol=self.args.tol, **settings)
        broken = nothing
        if not self.args.no_attack:
            steps = {"steps": self.args.attack_steps, "restarts": 1, "tol": self.args.tol, "seed": self.args.seed}
            found = attack_radius(*question, **steps, **settings)
            broken = found.radius
            if bool((broken < radius).any()):
                self.contradicted(found, question, settings)
        levels = (self.threat.level_of(size.double(), x) for size in (radius, broken))
        return dict(zip(("certified_level", "attacked_level"), levels, strict=True))

    def contradicted(self, found: AttackResult, question, settings) -> None:
        """Raise ContradictionError: an attack is smaller than a certified radius; it is saved."""
        where = ""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            where = f", which is saved as {self.folder / EVIDENCE}"
            save_attack(self.folder / EVIDENCE, found, question[1], question[2], **settings)
        raise ContradictionError(f"a certified radius is contradicted by an attack{where}")

    @torch.no_grad()
    def radii_of_chunks(self, one: Utterance) -> tuple[Tensor, Tensor]:
        """Features, (C - 1, bands), and the level at which each chunk by itself can move, (C,)."""
        x = self.chunks([one])
        count = x.shape[1]
        labels = torch.full((count,), one.label)
        model = self.classifier.double()
        same = x.expand(count, -1, -1)
        how = {"norm": math.inf, "frames": torch.eye(count).bool(), "tol": self.args.tol, "method": self.args.method}
        radii = certified_radius(model, same, labels, **how)
        return model.features(x)[0], 20.0 * radii.log10()


def run_and_write(run: SpeechRun, folder: Path, record: Record, ranks: Ranks) -> None:
    """Decide and write some utterances after the other, then summarize and draw."""
    run.folder = folder
    layout = {"derived": (FIGURE,), "ranks": ranks, "drawn": run.drawn, "attached": (FOLDER_NAME,)}
    layout |= {"resume": run.args.resume, "overwrite": run.args.overwrite}
    certificates = folder / FOLDER_NAME
    save = partial(run.save_certificates, folder=certificates) if run.args.save_certificate else None
    results = find_rows(folder, record, run.jobs(), kind=UtteranceRow, before_writing=save, **layout)
    if not ranks.first:
        return
    results.finish(summarize(results.rows), utc_now())
    print_summary(read_record(folder)["summary"], run.args)
    names = [CSV_NAME, "run.json"]
    if run.args.draw:
        drawn = [(one, *run.radii_of_chunks(one)) for one in run.kept[: run.args.draw]]
        with replacing(folder / FIGURE) as path:
            plot_spectrograms(drawn, run.classifier.features).savefig(path, dpi=DPI)
        names.append(FIGURE)
    print(f"results in {folder}: {', '.join(names)}")
    if save is not None:
        print(f"certificates in {certificates}: check them by python scripts/check_certificate.py {certificates}")


def summarize(rows: Sequence[UtteranceRow]) -> Record:
    """How many utterances have each verdict, seconds, and levels."""
    summary: Record = {"utterances": len(rows), "seconds": float(np.mean([row.seconds for row in rows]))}
    for verdict in ("verified", "falsified", "unknown"):
        summary[verdict] = sum(row.verdict == verdict for row in rows)
    for name in ("certified_level", "attacked_level"):
        values = [getattr(row, name) for row in rows if math.isfinite(getattr(row, name))]
        summary[name] = {"mean": float(np.mean(values)), "median": float(np.median(values))} if values else None
    return summary


def print_summary(summary: Record, args: argparse.Namespace) -> None:
    """The statistics as lines."""
    shares = ", ".join(f"{summary[name]} {name}" for name in ("verified", "falsified", "unknown"))
    print(f"{summary['utterances']} utterances: {shares}; {summary['seconds']:.3g} s of processor time each")
    for name in ("certified_level", "attacked_level"):
        if summary[name]:
            print(f"{name.replace('_', ' ')}: mean {summary[name]['mean']:.3g} {UNITS[args.threat]}", end="")
            print(f", median {summary[name]['median']:.3g}")


def make_record(run: SpeechRun, path: Path, config: Config) -> Record:
    """What run.json says about the run; paths inside the repository are relative to it."""
    args = run.args
    return {
        "title": f"{len(run.kept)} utterances, {args.threat} of {args.level:g} {UNITS[args.threat]}",
        "method": args.method,
        "unit": UNITS[args.threat],
        "model": checkpoint_facts(path, path.parent.name, config),
        "data": {"source": run.data.source, "drawn_sha256": digest(run.drawn)},
        "counts": run.counts,
        **run_facts(args, run.classifier.head.weight.device),
    }
