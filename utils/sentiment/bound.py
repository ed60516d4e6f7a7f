"""Sentences certified against the replacement of words, from the arguments of a bound script to the result folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from data.sst import Sentence, load_sst, words_of_free_text
from data.text import MAX_WORDS

from ..experiments.arguments import result_folder
from ..network.checkpoint import CheckpointError, missing
from ..runs.cli import apply_common_arguments, checkpoint_facts, run_facts, utc_now
from ..runs.ranks import Ranks, joined
from ..runs.results import CSV_NAME, Record, check_writable, digest, exclusive
from ..runs.work import Job, explained, find_rows
from ..steps.word_summary import counted
from ..training.text_models import TextModel, load_text_model
from .arguments import DRAWN, EVERY_WORD, METHODS
from .naming import model_name
from .question import Batch, Settings, ask
from .report import HTML_NAME, print_sentences, write_page
from .rows import SENTENCES_NAME, SentenceKey, SentenceRow, Shown, columns_of, write_sentences
from .summary import summarize, summary_lines
from .words import Group, group_by_length


def bound_sentiment_classifier(args: argparse.Namespace, architecture: str) -> None:
    """Answer what a script's arguments ask; print it and write it to the result folder.

    Raises:
        ValueError: arguments, checkpoint or data do not fit; the message says which. Earlier results stay.
        OSError: a file cannot be read or the folder cannot be written.
        ContradictionError: a bound lies above the margin of a sentence.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a word that the terminal cannot show must not end the run
    if args.text and (args.N is not None or args.max_words is not None):
        raise ValueError("--text draws no sentences: leave out --N and --max-words")
    args.N = args.N or DRAWN
    args.budgets = list(dict.fromkeys(args.budgets))
    args.methods = [method for method in METHODS if method in args.methods]
    device = apply_common_arguments(args)
    with joined(device) as ranks:
        _bound(args, architecture, device, ranks)


def _bound(args: argparse.Namespace, architecture: str, device: torch.device, ranks: Ranks) -> None:
    name = model_name(named_config(args, architecture))
    path = args.work_dir / name / args.model_name
    if not path.exists():
        command = f"python {architecture}/train_{architecture}_sentiment_classifier.py"
        command += f" --certified {args.recipe}" if args.recipe else ""
        raise missing(path, f"train it by {command}")
    model = load_text_model(path, device)
    if model_name(model.config) != name:
        raise CheckpointError(f"{path} holds another model, {model_name(model.config)}")
    data = load_sst(args.data_dir, args.sample, args.synonyms)
    drawn = given_sentences(args.text) if args.text else draw_sentences(getattr(data, args.part), args)
    run = SentenceRun(
        args, model, drawn, group_by_length([one.sentence for one in drawn], model.vocabulary, data.synonyms)
    )
    source = "given by --text" if args.text else f"{args.part} set of {data.source}"
    record = make_record(run, name, path, source, data.sha256)
    print(f"{name}: {counted(len(drawn), 'sentence')}, {source}")
    print(f"at most {', '.join(map(str, args.budgets))} words are replaced; {', '.join(args.methods)}", flush=True)
    if args.dry_run:
        row = run.search(run.parts[0])[0]
        print(f"dry run: sentence {row.index} is {row.verdict} at budget {row.budget}, nothing written")
        return
    folder = result_folder(args, path.parent, result_folder_name(args))
    check_writable(folder)
    with exclusive(folder, ranks):
        run_and_write(run, folder, record, ranks)


def run_and_write(run: SentenceRun, folder: Path, record: Record, ranks: Ranks) -> None:
    """Search and write some sentences after the other, then summarize and show them."""
    args = run.args
    layout = {"derived": (SENTENCES_NAME, HTML_NAME), "columns": columns_of(args.methods)}
    layout |= {"resume": args.resume, "overwrite": args.overwrite}
    results = find_rows(folder, record, run.jobs(), kind=SentenceRow, ranks=ranks, **layout)
    if not ranks.first:
        return
    summary = summarize(results.rows, args.methods)
    write_sentences(folder, run.shown())
    results.finish(summary, utc_now())
    print_sentences(results.rows, run.shown(), record["class_names"], args.show)
    print("\n" + "\n".join(summary_lines(summary)))
    write_page(folder)
    print(f"results in {folder}: {CSV_NAME}, {SENTENCES_NAME}, run.json, {HTML_NAME}")


def named_config(args: argparse.Namespace, architecture: str) -> dict[str, object]:
    """What the flags say about the model, as a checkpoint's config does."""
    config = {"architecture": architecture, "input_size": args.embedding_size, "recipe": args.recipe}
    if architecture != "transformer":
        return config | {"hidden_size": args.hidden_size}
    sizes = {"width": args.hidden_size, "num_layers": args.num_layers, "layer_norm": args.layer_norm}
    return config | sizes | {"max_frames": MAX_WORDS if args.positions else None}


def result_folder_name(args: argparse.Namespace) -> str:
    """substitution_bound_ibp_crown-ibp_decide, after the methods; with text or dev for other sentences."""
    kind = ["text"] if args.text else ["dev"] * (args.part == "dev")
    return "_".join(["substitution_bound", *kind, *args.methods])


@dataclass(frozen=True)
class Drawn:
    """A sentence and its number in its part of the data, or among those given (then its label does not count)."""

    index: int
    sentence: Sentence
    given: bool = False


def given_sentences(texts: Sequence[str]) -> list[Drawn]:
    """Raises ValueError if one has no word, or too many."""
    found = []
    for index, text in enumerate(texts):
        words = words_of_free_text(text.encode(errors="replace").decode())
        if len(words) > MAX_WORDS:
            raise ValueError(f"the sentence has {len(words)} words and signs, more than {MAX_WORDS}")
        found.append(Drawn(index, Sentence(" ".join(words), 0), given=True))
    return found


def draw_sentences(sentences: Sequence[Sentence], args: argparse.Namespace) -> list[Drawn]:
    """Sentences drawn by the seed. Raises ValueError if there are too few."""
    most = min(args.max_words or MAX_WORDS, MAX_WORDS)
    fitting = [place for place, sentence in enumerate(sentences) if len(sentence.words) <= most]
    if len(fitting) < args.N:
        raise ValueError(
            f"--N {args.N} is more than the {len(fitting)} sentences of at most {most} words that there are"
        )
    order = torch.randperm(len(fitting), generator=torch.Generator().manual_seed(args.seed))[: args.N].tolist()
    return [Drawn(fitting[n], sentences[fitting[n]]) for n in order]


class SentenceRun:
    """The rows of a run and how they are found: sentences of one length at a time, the shortest first."""

    def __init__(self, args: argparse.Namespace, model: TextModel, drawn: list[Drawn], groups: list[Group]):
        self.args, self.model, self.drawn = args, model, drawn
        self.classifier = model.classifier.double()
        self.vectors = model.embeddings.double()
        device = self.vectors.device
        self.parts = [part.to(device) for group in groups for part in group.batches(args.batch_size)]
        self.predictions = [self._predict(part) for part in self.parts]
        budgets = [None if budget == EVERY_WORD else budget for budget in args.budgets]
        self.settings = Settings(budgets, args.methods, args.time_limit, args.beam, args.exhaustive, args.every_method)

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


def make_record(run: SentenceRun, name: str, path: Path, source: str, checksums: dict[str, str]) -> Record:
    """What run.json says about the run; paths inside the repository are relative to it."""
    args, model = run.args, run.model
    config = {key: value for key, value in model.config.items() if key not in ("vocabulary", "embeddings")}
    budgets = ", ".join(map(str, args.budgets))
    return {
        "title": f"{counted(len(run.drawn), 'sentence')}, at most {budgets} words replaced",
        "class_names": list(model.config["class_names"]),
        "model": checkpoint_facts(path, name, config) | {"words": len(model.vocabulary)},
        "data": {"source": source, "sha256": checksums, "drawn_sha256": digest(run.drawn_bytes())},
        **run_facts(args, run.vectors.device),
    }
