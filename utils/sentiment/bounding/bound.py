"""Sentences certified against the replacement of words, from the arguments of a bound script to the result folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from ...certify.certificate import FOLDER_NAME as CERTIFICATES_NAME
from ...experiments.arguments import result_folder
from ...runs.cli import apply_common_arguments, checkpoint_facts, run_facts, utc_now
from ...runs.ranks import Ranks, joined
from ...runs.results import CSV_NAME, Record, check_writable, digest, exclusive
from ...runs.work import Job, explained, find_rows
from ...steps.word_summary import counted
from ..arguments import EVERY_WORD
from ..words import Group
from .certificates import write_certificate
from .opening import Opened, open_run, settle
from .question import Batch, Settings, ask
from .report import HTML_NAME, print_sentences, write_page
from .rows import SENTENCES_NAME, SentenceKey, SentenceRow, Shown, columns_of, write_sentences
from .summary import summarize, summary_lines


def bound_sentiment_classifier(args: argparse.Namespace, architecture: str) -> None:
    """Answer what a script's arguments ask; print it and write it to the result folder.

    Raises:
        ValueError: arguments, checkpoint or data do not fit; the message says which. Earlier results stay.
        OSError: a file cannot be read or the folder cannot be written.
        ContradictionError: a bound lies above the margin of a sentence.
    """
    settle(args)
    device = apply_common_arguments(args)
    with joined(device) as ranks:
        _bound(args, architecture, device, ranks)


def _bound(args: argparse.Namespace, architecture: str, device: torch.device, ranks: Ranks) -> None:
    opened = open_run(args, architecture, device)
    run = SentenceRun(args, opened)
    record = make_record(run)
    print(f"{opened.name}: {counted(len(opened.drawn), 'sentence')}, {opened.source}")
    print(f"at most {', '.join(map(str, args.budgets))} words are replaced; {', '.join(args.methods)}", flush=True)
    if args.dry_run:
        row = run.search(run.parts[0])[0]
        print(f"dry run: sentence {row.index} is {row.verdict} at budget {row.budget}, nothing written")
        return
    folder = result_folder(args, opened.path.parent, result_folder_name(args))
    check_writable(folder)
    with exclusive(folder, ranks):
        run_and_write(run, folder, record, ranks)


def run_and_write(run: SentenceRun, folder: Path, record: Record, ranks: Ranks) -> None:
    """Search and write some sentences after the other, then summarize and show them."""
    args = run.args
    layout = {"derived": (SENTENCES_NAME, HTML_NAME), "columns": columns_of(args.methods)}
    layout |= {"resume": args.resume, "overwrite": args.overwrite, "attached": (CERTIFICATES_NAME,)}
    certificates, wanted = folder / CERTIFICATES_NAME, getattr(args, "save_certificate", False)
    save = partial(run.save_certificates, folder=certificates) if wanted else None
    results = find_rows(folder, record, run.jobs(), kind=SentenceRow, ranks=ranks, before_writing=save, **layout)
    if not ranks.first:
        return
    summary = summarize(results.rows, args.methods)
    write_sentences(folder, run.shown())
    results.finish(summary, utc_now())
    print_sentences(results.rows, run.shown(), record["class_names"], args.show)
    print("\n" + "\n".join(summary_lines(summary)))
    write_page(folder)
    print(f"results in {folder}: {CSV_NAME}, {SENTENCES_NAME}, run.json, {HTML_NAME}")
    if wanted:
        print(f"certificates in {certificates}: check them by python scripts/check_certificate.py {certificates}")


def result_folder_name(args: argparse.Namespace) -> str:
    """substitution_bound_ibp_crown-ibp_decide, after the methods; with text or dev for other sentences."""
    kind = ["text"] if args.text else ["dev"] * (args.part == "dev")
    return "_".join(["substitution_bound", *kind, *args.methods])


class SentenceRun:
    """The rows of a run and how they are found: sentences of one length at a time, the shortest first."""

    def __init__(self, args: argparse.Namespace, opened: Opened):
        self.args, self.opened, self.model, self.drawn = args, opened, opened.model, opened.drawn
        self.classifier = self.model.classifier.double()
        self.vectors = self.model.embeddings.double()
        device = self.vectors.device
        self.parts = [part.to(device) for group in opened.groups for part in group.batches(args.batch_size)]
        self._where = {
            self.drawn[place].index: (part, n) for part in self.parts for n, place in enumerate(part.places.tolist())
        }
        self.predictions = [self._predict(part) for part in self.parts]
        budgets = [None if budget == EVERY_WORD else budget for budget in args.budgets]
        self.settings = Settings(
            budgets, args.methods, args.time_limit, args.beam, args.exhaustive, not args.no_attack, args.every_method
        )

    @torch.no_grad()
    def _predict(self, part: Group) -> list[int]:
        return self.classifier(self.vectors[part.numbers]).argmax(dim=1).tolist()

    def labels(self, part: Group, predictions: list[int]) -> list[int]:
        """Those of the data; of given sentences the predictions."""
        own = [self.drawn[place] for place in part.places.tolist()]
        return [guess if one.given else one.sentence.label for one, guess in zip(own, predictions, strict=True)]

    def keys(self, part: Group, predictions: list[int]) -> list[SentenceKey]:
        """What the rows of a part are about: every sentence at every budget."""
        labels, replaceable = self.labels(part, predictions), part.valid.any(dim=2).sum(dim=1).tolist()
        return [
            SentenceKey(
                index=self.drawn[place].index,
                words=part.numbers.shape[1],
                replaceable=replaceable[n],
                label=labels[n],
                prediction=predictions[n],
                budget=budget,
            )
            for n, place in enumerate(part.places.tolist())
            for budget in self.args.budgets
        ]

    def jobs(self) -> list[Job]:
        return [
            Job(self.keys(part, guesses), partial(self.search, part))
            for part, guesses in zip(self.parts, self.predictions, strict=True)
        ]

    def search(self, part: Group) -> list[SentenceRow]:
        """The rows of a part."""
        predictions = self._predict(part)
        labels = torch.tensor(self.labels(part, predictions), device=part.numbers.device)
        right = (torch.tensor(predictions, device=labels.device) == labels).nonzero().squeeze(1)
        answers = {}
        if len(right):
            kept = part.part(right)
            given = self.vectors[kept.numbers], labels[right], self.vectors[kept.choices], kept.valid
            with explained(f"in the sentences of {part.numbers.shape[1]} words", self.args.batch_size):
                answers = dict(zip(right.tolist(), ask(Batch(self.classifier, *given), self.settings), strict=True))
        margins = self._margins(part, labels)
        keys, count = self.keys(part, predictions), len(self.args.budgets)
        return [self._row(key, margins[n // count], answers.get(n // count), n % count) for n, key in enumerate(keys)]

    @torch.no_grad()
    def _margins(self, part: Group, labels: torch.Tensor) -> list[float]:
        logits = self.classifier(self.vectors[part.numbers])
        own = logits.gather(1, labels[:, None])
        others = logits.scatter(1, labels[:, None], -torch.inf)
        return (own.squeeze(1) - others.amax(dim=1)).tolist()

    def _row(self, key: SentenceKey, margin: float, answers: list | None, place: int) -> SentenceRow:
        if answers is None:
            empty = {name: "" if name == "decided" else float("nan") for name in columns_of(self.args.methods)}
            return SentenceRow(
                **vars(key), margin=margin, attack=margin, exact=0, replaced="", attack_seconds=0.0, **empty
            )
        worst, columns = answers[place].worst, answers[place].columns
        replaced = " ".join(f"{position}:{self.substitute(key.index, position, s)}" for position, s in worst.choice)
        return SentenceRow(
            **vars(key), margin=margin, attack=worst.margin, exact=int(worst.exact), replaced=replaced, **columns
        )

    def save_certificates(self, rows: Sequence[SentenceRow], folder: Path) -> None:
        """Write the certificates of some rows."""
        for row in rows:
            part, n = self._where[row.index]
            write_certificate(folder, self.classifier, self.vectors, part.part(slice(n, n + 1)), row)

    def substitute(self, index: int, position: int, number: int) -> str:
        return self.substitutes[index][position][number]

    @property
    def substitutes(self) -> dict[int, list[list[str]]]:
        """By sentence's number, the words that each word may become."""
        if not hasattr(self, "_substitutes"):
            words = self.model.vocabulary.words
            self._substitutes = {
                self.drawn[place].index: [[words[n] for n in given if n] for given in row]
                for part in self.parts
                for place, row in zip(part.places.tolist(), part.choices.tolist(), strict=True)
            }
        return self._substitutes

    def shown(self) -> list[Shown]:
        """What is shown of the sentences, in the order of the rows."""
        places = [place for part in self.parts for place in part.places.tolist()]
        return [
            Shown(one.index, one.sentence.words, [w in self.model.vocabulary for w in one.sentence.words], lists)
            for one, lists in ((self.drawn[place], self.substitutes[self.drawn[place].index]) for place in places)
        ]

    def drawn_bytes(self) -> list[bytes]:
        """The sentences with all that may replace their words, by which a run is known."""
        return [f"{shown.index} {shown.words} {shown.substitutes}\n".encode() for shown in self.shown()]


def make_record(run: SentenceRun) -> Record:
    """What run.json says about the run; paths inside the repository are relative to it."""
    args, opened = run.args, run.opened
    config = {key: value for key, value in run.model.config.items() if key not in ("vocabulary", "embeddings")}
    budgets = ", ".join(map(str, args.budgets))
    return {
        "title": f"{counted(len(run.drawn), 'sentence')}, at most {budgets} words replaced",
        "class_names": list(config["class_names"]),
        "model": checkpoint_facts(opened.path, opened.name, config) | {"words": len(run.model.vocabulary)},
        "data": {"source": opened.source, "sha256": opened.sha256, "drawn_sha256": digest(run.drawn_bytes())},
        **run_facts(args, run.vectors.device),
    }
