"""Certified radii of the words of texts, from the arguments of a bound script to the result folder.

Every word has a ball of its own in the space of word vectors; within it, the text keeps its class if all other words
stay. Words of the vocabulary in that ball are substitutions that the certificate rules out as attacks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data.text import MAX_WORDS, PADDING, UNKNOWN, TextData, tokenize

from ..experiments.arguments import result_folder
from ..experiments.wording import RELAXED
from ..network.checkpoint import CheckpointError, missing
from ..perturbation.lp_ball import INF
from ..runs.cli import (
    apply_common_arguments,
    checkpoint_facts,
    run_facts,
    utc_now,
)
from ..runs.ranks import Ranks, joined
from ..runs.results import CSV_NAME, Record, check_writable, digest, exclusive
from ..runs.work import Job, batches, explained, find_rows
from ..training.tasks import TextTask, text_model_name
from ..training.text_models import TextModel, load_text_model, tokens_of
from .arguments import COMPARED, COMPARED_COLUMNS, DRAWN_TEXTS
from .step_bounds import check_steps, sequence_radii, step_radii
from .step_runs import Steps, find_steps, search_options
from .word_report import REPORTS, print_sentences, print_summary, write_reports
from .word_results import (
    SENTENCES_NAME,
    SentenceRow,
    WordKey,
    WordRow,
    write_sentences,
)
from .word_summary import by_text, counted, summarize

LISTED = 5  # words of a ball that are named
# A word counts as covered if it is nearer than the radius by this share: room for the rounding of its distance.
INSIDE = 1e-9


@dataclass(frozen=True)
class Text:
    """A text to be certified.

    Attributes:
        index: its number in the test set, or among those given.
        label: the class that must be kept; the prediction of a text that was given.
    """

    index: int
    text: str
    tokens: list[str]
    label: int


def bound_text_classifier(args: argparse.Namespace, architecture: str, task: TextTask) -> None:
    """Find the radii that a script's arguments ask for; print them and write them to the result folder.

    Raises:
        ValueError: arguments, checkpoint or data do not fit; the message says which. Earlier results stay.
        OSError: a file cannot be read or the folder cannot be written.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a word that the terminal cannot show must not end the run
    if args.text and (args.sample or args.data_dir):
        raise ValueError("--text brings its own data: leave out --data-dir and --sample")
    if args.text and args.N is not None:
        raise ValueError("--N is how many test texts are drawn, and --text draws none: leave out one of them")
    args.N = args.N or DRAWN_TEXTS
    device = apply_common_arguments(args)
    with joined(device) as ranks:
        _bound(args, architecture, task, device, ranks)


def _bound(args: argparse.Namespace, architecture: str, task: TextTask, device: torch.device, ranks: Ranks) -> None:
    given = [tokens_of(text) for text in args.text or []]
    name = text_model_name(architecture, args.hidden_size, args.embedding_size)
    path = args.work_dir / name / args.model_name
    if not path.exists():
        script = f"{architecture}/train_{architecture}_{task.name}_classifier.py --hidden-size {args.hidden_size}"
        raise missing(path, f"train it by python {script}")
    model = load_text_model(path, device)
    check_model(model, architecture, args, path)
    counts: dict[str, int] = {}
    if given:
        source, texts = "given by --text", given_texts(model, args.text, given)
    else:
        data = task.load(args.data_dir, args.sample)
        source, (texts, counts) = data.source, draw_texts(model, data, args)
    run = WordRun(args, model, texts)
    record = make_record(run, name, path, source, counts, task)
    drawn = f"of {source}: {counts['drawn']} drawn, {counts['misclassified']} misclassified" if counts else source
    print(f"{record['model']['name']} on {task.item}s {drawn}; {counted(len(texts), task.item)} to certify")
    print(f"One word at a time moves by at most eps in the l_{args.p:g} norm; bounds: {record['method']}", flush=True)
    if args.dry_run:
        words = run.search([0])
        print(f"dry run: {words[0].word!r} has radius {words[0].radius:.4g}, nothing written")
        return
    folder = result_folder(args, path.parent, result_folder_name(args))
    check_writable(folder)
    with exclusive(folder, ranks):
        run_and_write(run, folder, record, ranks)


def run_and_write(run: WordRun, folder: Path, record: Record, ranks: Ranks) -> None:
    """Search and write some texts after the other, then summarize and draw."""
    args = run.args
    layout = {"derived": (SENTENCES_NAME, *REPORTS), "columns": COMPARED_COLUMNS if args.compare else ()}
    layout |= {"drawn": run.drawn, "resume": args.resume, "overwrite": args.overwrite}
    results = find_rows(folder, record, run.jobs(), kind=WordRow, ranks=ranks, **layout)
    if not ranks.first:
        return
    words, sentences = results.rows, run.sentences(results.rows)
    summary = summarize(words, sentences, compare(run.model, words, args) if args.compare else [])
    write_sentences(folder, sentences)
    results.finish(summary, utc_now())
    print_sentences(words, sentences, record["class_names"], args.show, given=bool(args.text))
    print_summary(summary)
    figures = write_reports(folder)
    print(f"results in {folder}: {CSV_NAME}, {SENTENCES_NAME}, run.json, {', '.join(figures)}")


def check_model(model: TextModel, architecture: str, args: argparse.Namespace, path: Path) -> None:
    """Raise CheckpointError if the checkpoint holds another model than the flags name."""
    wanted = {
        "architecture": architecture,
        "hidden_size": args.hidden_size,
        "input_size": args.embedding_size,
    }
    for key, value in wanted.items():
        if model.config[key] != value:
            raise CheckpointError(f"{path} holds a model with {key} = {model.config[key]}, not {value}")
    check_steps(model.classifier)


def result_folder_name(args: argparse.Namespace) -> str:
    """2_norm_bound_crown_plane for p = 2 and planes, with _text_ for texts that were given."""
    return "_".join([f"{args.p:g}_norm_bound", *["text"] * bool(args.text), "crown", args.relaxation])


def given_texts(model: TextModel, texts: list[str], token_lists: list[list[str]]) -> list[Text]:
    """Texts of --text, with the predicted class as their label."""
    labels = model.predict(*model.encode(token_lists), torch.float64).tolist()
    # Bytes of the command line that are no text cannot be written to a file.
    texts = [text.encode(errors="replace").decode() for text in texts]
    return [
        Text(index, text, tokens, label)
        for index, (text, tokens, label) in enumerate(zip(texts, token_lists, labels, strict=True))
    ]


def draw_texts(model: TextModel, data: TextData, args: argparse.Namespace) -> tuple[list[Text], dict[str, int]]:
    """Draw test texts by the seed and keep those that are classified correctly and not too long.

    Raises:
        ValueError: there are too few, the classes are not the model's, or nothing is left.
    """
    if list(data.class_names) != list(model.config["class_names"]):
        raise ValueError(f"the model's classes are {', '.join(model.config['class_names'])}: other data are needed")
    total = len(data.test_texts)
    if total < args.N:
        raise ValueError(f"--N {args.N} is more than the {total} test texts of {data.source}")
    drawn = torch.randperm(total, generator=torch.Generator().manual_seed(args.seed))[: args.N].tolist()
    texts = [Text(n, data.test_texts[n], tokenize(data.test_texts[n]), int(data.test_labels[n])) for n in drawn]
    short = [text for text in texts if len(text.tokens) <= MAX_WORDS]
    predictions = model.predict(*model.encode([text.tokens for text in short]), torch.float64).tolist()
    kept = [text for text, prediction in zip(short, predictions, strict=True) if text.label == prediction]
    if not kept:
        raise ValueError(f"nothing to certify: none of the {args.N} texts is classified correctly")
    counts = {"drawn": args.N, "too_long": len(texts) - len(short), "misclassified": len(short) - len(kept)}
    return kept, counts | {"kept": len(kept)}


class WordRun:
    """The rows of a run and how they are found."""

    def __init__(self, args: argparse.Namespace, model: TextModel, texts: list[Text]):
        self.args, self.model, self.texts = args, model, texts
        self.drawn = [f"{text.index} {text.label} {text.text}\n".encode() for text in texts]

    def keys(self, chosen: Sequence[int]) -> list[WordKey]:
        """What the rows of the chosen texts are about."""
        return [
            WordKey(
                index=text.index,
                position=position,
                words=len(text.tokens),
                word=word,
                known=int(word in self.model.vocabulary),
                label=text.label,
                prediction=text.label,
            )
            for text in (self.texts[n] for n in chosen)
            for position, word in enumerate(text.tokens)
        ]

    def jobs(self) -> list[Job]:
        """A job for every group of texts whose words are bounded together."""
        groups = batches(len(self.texts), self.args.save_every)
        return [Job(self.keys(group), partial(self.search, group)) for group in groups]

    @torch.no_grad()
    def search(self, chosen: list[int]) -> list[WordRow]:
        """The rows of the chosen texts."""
        args, model = self.args, self.model
        texts = [self.texts[n] for n in chosen]
        numbers, lengths = model.encode([text.tokens for text in texts])
        labels = torch.tensor([text.label for text in texts])
        steps = Steps(model.classifier, model.embed(numbers).double(), labels, lengths)
        with explained(f"in the texts from number {texts[0].index} on", args.batch_size):
            columns = find_steps(steps, args)
            columns |= self._compared(steps, columns)
            whole = sequence_radii(*steps.sequences, **search_options(args)).tolist()
        pairs = steps.pairs()
        own = [{name: values[n][t] for name, values in columns.items()} for n, t in pairs]
        moved = numbers[tuple(zip(*pairs, strict=True))]
        norms = torch.linalg.vector_norm(model.embeddings[moved].double(), ord=args.p, dim=1).tolist()
        near = neighbours(model, moved, torch.tensor([row["radius"] for row in own]), args.p)
        return [
            WordRow(**vars(key), **own[place], **near[place], text_radius=whole[n], norm=norms[place])
            for place, (key, (n, _)) in enumerate(zip(self.keys(chosen), pairs, strict=True))
        ]

    def _compared(self, steps: Steps, columns: dict) -> dict[str, list[list[float]]]:
        """Radius and seconds by each relaxation, as columns; none unless they are to be compared."""
        found = {}
        for name in COMPARED if self.args.compare else ():
            if name == self.args.relaxation:
                radius, seconds = columns["radius"], columns["seconds"]
            else:
                result = step_radii(*steps.sequences, **search_options(self.args) | {"relaxation": name})
                radius, seconds = result.radius.tolist(), result.seconds.tolist()
            found |= {f"{name}_radius": radius, f"{name}_seconds": seconds}
        return found

    def sentences(self, words: list[WordRow]) -> list[SentenceRow]:
        """A row for every text, from those of its words."""
        return [
            SentenceRow(text.index, text.label, text.label, len(rows), rows[0].text_radius, text.text)
            for text, rows in zip(self.texts, by_text(words), strict=True)
        ]


def neighbours(model: TextModel, numbers: Tensor, radii: Tensor, norm: float) -> list[dict]:
    """Which words of the vocabulary lie in the balls around words of given numbers, (m,), with given radii, (m,).

    The word itself, the padding and the unknown word's vector do not count.
    """
    vectors = model.embeddings.double()
    found = []
    distances: dict[int, tuple[Tensor, Tensor]] = {}
    for number, radius in zip(numbers.tolist(), radii.tolist(), strict=True):
        if number not in distances:
            values = torch.linalg.vector_norm(vectors - vectors[number], ord=norm, dim=1)
            values[PADDING] = values[UNKNOWN] = values[number] = INF
            distances[number] = values.sort()
        values, order = distances[number]
        covered = int(torch.searchsorted(values, radius * (1.0 - INSIDE), right=True))
        words = [model.vocabulary.words[n] for n in order[: max(1, min(covered, LISTED))].tolist()]
        found.append(
            {
                "covered": covered,
                "examples": " ".join(words[:covered]),
                "nearest": words[0],
                "distance": float(values[0]),
            }
        )
    return found


def compare(model: TextModel, rows: list[WordRow], args: argparse.Namespace) -> list[Record]:
    """Mean radius, covered words and time of each relaxation, over the same words."""
    numbers = torch.tensor(model.vocabulary.encode(row.word for row in rows))
    table = []
    for relaxation in COMPARED:
        radii = torch.tensor([getattr(row, f"{relaxation}_radius") for row in rows], dtype=torch.float64)
        covered = [near["covered"] for near in neighbours(model, numbers, radii, args.p)]
        table.append(
            {
                "relaxation": relaxation,
                "mean_radius": float(radii.mean()),
                "median_radius": float(radii.median()),
                "covered_pairs": sum(covered),
                "words_with_covered": sum(count > 0 for count in covered),
                "seconds_per_word": sum(getattr(row, f"{relaxation}_seconds") for row in rows) / len(rows),
            }
        )
    return table


def make_record(run: WordRun, name: str, path: Path, source: str, counts: dict, task: TextTask) -> Record:
    """What run.json says about the run; paths inside the repository are relative to it."""
    args, model = run.args, run.model
    config = {key: value for key, value in model.config.items() if key not in ("vocabulary", "embeddings")}
    method = f"crown, {RELAXED[args.relaxation]}"
    return {
        "title": f"{counted(len(run.texts), task.item)}, one word at a time, {method}, l_{args.p:g}",
        "method": method,
        "unit": "word vectors",
        "class_names": list(model.config["class_names"]),
        "model": checkpoint_facts(path, name, config) | {"words": len(model.vocabulary)},
        "data": {"source": source, "drawn_sha256": digest(run.drawn)},
        "counts": counts,
        **run_facts(args, model.embeddings.device),
    }
