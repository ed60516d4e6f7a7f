"""Certified radii of the words of texts, from the arguments of a bound script to the result folder.

Every word has a ball of its own in the space of word vectors; within it, the text keeps its class if all other words
stay. Words of the vocabulary in that ball are substitutions that the certificate rules out as attacks.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data.text import MAX_WORDS, PADDING, UNKNOWN, TextData, tokenize
from utils.bound_arguments import relative_tolerance
from utils.checkpoint import CheckpointError
from utils.cli import (
    ROOT,
    add_common_arguments,
    apply_common_arguments,
    git_commit,
    norm_value,
    positive_int,
    versions,
)
from utils.perturbation import INF
from utils.planes import SLOPES
from utils.results import CSV_NAME, Record
from utils.step_bounds import check_steps, sequence_radii, step_attacks, step_radii
from utils.text_models import TextModel, load_text_model, tokens_of
from utils.text_training import TextTask, text_model_name
from utils.training import check_writable
from utils.word_report import print_sentences, print_summary, write_reports
from utils.word_results import SENTENCES_NAME, SentenceRow, WordRow, write_results
from utils.word_summary import summarize

COMPARED = ("plane", "line", "constant")
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


def add_word_arguments(parser: argparse.ArgumentParser, architecture: str, task: TextTask) -> None:
    """Add the flags of a word bound script and the common ones."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--work-dir", type=Path, default=ROOT / "models" / task.folder, help="folder of the model folders"
    )
    group.add_argument("--model-name", default=architecture, help="name of the checkpoint in its model folder")
    group.add_argument("--hidden-size", type=positive_int, default=32, help="size of the hidden state")
    group.add_argument("--embedding-size", type=positive_int, default=100, help="numbers in a word's vector")
    group = parser.add_argument_group("what is certified (eps and radii are in units of the word vectors)")
    group.add_argument("--N", type=positive_int, default=200, help=f"test {task.item}s drawn")
    group.add_argument(
        "--text", action="append", metavar="TEXT", help=f"certify this {task.item} instead; may be given several times"
    )
    group.add_argument("--p", type=norm_value, default=2.0, help="norm of the perturbation: 1, 2 or inf")
    group = parser.add_argument_group("how")
    group.add_argument(
        "--relaxation",
        choices=tuple(SLOPES),
        default="plane",
        help="bounds of the gates' products: planes with contracting slopes or of least volume, lines, constants",
    )
    group.add_argument("--compare", action="store_true", help=f"also find the radii by {' and '.join(COMPARED[1:])}s")
    group.add_argument("--no-attack", action="store_true", help="leave out the attack on every word")
    group.add_argument("--tol", type=relative_tolerance, default=1e-3, help="relative width of the final bracket")
    group.add_argument("--batch-size", type=positive_int, default=200, help="words bounded at a time")
    group.add_argument("--show", type=positive_int, default=10, help=f"{task.item}s printed")
    group.add_argument("--sample", action="store_true", help=f"use the small built-in sample of made-up {task.item}s")
    add_common_arguments(parser, data=f"folder that holds the {task.item}s (default: data/)")


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
    device = apply_common_arguments(args)
    given = [tokens_of(text) for text in args.text or []]
    name = text_model_name(architecture, args.hidden_size, args.embedding_size)
    path = args.work_dir / name / args.model_name
    if not path.exists():
        script = f"{architecture}/train_{architecture}_{task.name}_classifier.py --hidden-size {args.hidden_size}"
        raise CheckpointError(f"there is no checkpoint {path}: train it by python {script}")
    model = load_text_model(path, device)
    check_model(model, architecture, args, path)
    counts: dict[str, int] = {}
    if given:
        source, texts = "given by --text", given_texts(model, args.text, given)
    else:
        data = task.load(args.data_dir, args.sample)
        source, (texts, counts) = data.source, draw_texts(model, data, args)
    record = make_record(args, model, name, path, source, counts, task)
    print(f"{record['model']['name']} on {task.item}s of {source}", end="")
    print(f": {counts['drawn']} drawn, {counts['misclassified']} misclassified" if counts else "", end="")
    print(f"; {len(texts)} to certify. One word at a time moves by at most eps in the l_{args.p:g} norm", flush=True)
    if args.dry_run:
        words, _ = certify_texts(model, texts[:1], args)
        print(f"dry run: {words[0].word!r} has radius {words[0].radius:.4g}, nothing written")
        return
    folder = path.parent / result_folder_name(args)
    check_writable(folder)
    words, sentences = certify_texts(model, texts, args)
    compared = compare(model, texts, words, args) if args.compare else []
    class_names = list(model.config["class_names"])
    summary = summarize(words, sentences, compared)
    record |= {"finished": _now(), "class_names": class_names, "summary": summary}
    write_results(folder, words, sentences, record)
    print_sentences(words, sentences, class_names, args.show)
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
    """2_norm_bound for p = 2, with _text for texts that were given and the relaxation if it is not planes."""
    words = [f"{args.p:g}_norm_bound", *["text"] * bool(args.text)]
    return "_".join(words + [args.relaxation] * (args.relaxation != "plane"))


def given_texts(model: TextModel, texts: list[str], token_lists: list[list[str]]) -> list[Text]:
    """Texts of --text, with the predicted class as their label."""
    labels = model.predict(*model.encode(token_lists), torch.float64).tolist()
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


def certify_texts(
    model: TextModel, texts: list[Text], args: argparse.Namespace
) -> tuple[list[WordRow], list[SentenceRow]]:
    """Radii of all words, and of the texts as a whole."""
    numbers, lengths = model.encode([text.tokens for text in texts])
    x, labels = model.embed(numbers).double(), torch.tensor([text.label for text in texts])
    search = {"norm": args.p, "relaxation": args.relaxation, "tol": args.tol, "batch_size": args.batch_size}
    # disable=None: a bar on a terminal, silence in a log file
    with tqdm(total=3 - args.no_attack, unit="part", disable=None) as progress:
        found = step_radii(model.classifier, x, labels, lengths, **search)
        progress.update()
        whole = sequence_radii(model.classifier, x, labels, lengths, **search)
        progress.update()
        attack = torch.full_like(found.radius, torch.nan)
        if not args.no_attack:
            attack = step_attacks(model.classifier, x, labels, lengths, norm=args.p)
            progress.update()
    balls = [(n, t) for n, text in enumerate(texts) for t in range(len(text.tokens))]
    at = tuple(torch.tensor(column) for column in zip(*balls, strict=True))
    near = neighbours(model, numbers[at], found.radius[at], args.p)
    rows = []
    for place, (n, t) in enumerate(balls):
        text = texts[n]
        rows.append(
            WordRow(
                index=text.index,
                position=t,
                words=len(text.tokens),
                word=text.tokens[t],
                known=int(numbers[n, t] != UNKNOWN),
                label=text.label,
                prediction=text.label,
                radius=float(found.radius[n, t]),
                failed_eps=float(found.failed[n, t]),
                attack=float(attack[n, t]),
                norm=float(torch.linalg.vector_norm(x[n, t], ord=args.p)),
                seconds=float(found.seconds[n, t]),
                **near[place],
            )
        )
    sentences = [
        SentenceRow(text.index, text.label, text.label, len(text.tokens), float(radius), text.text)
        for text, radius in zip(texts, whole, strict=True)
    ]
    return rows, sentences


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
            values[[PADDING, UNKNOWN, number]] = INF
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


def compare(model: TextModel, texts: list[Text], rows: list[WordRow], args: argparse.Namespace) -> list[Record]:
    """Mean radius, covered words and time of each relaxation, over the same words."""
    numbers, lengths = model.encode([text.tokens for text in texts])
    x, labels = model.embed(numbers).double(), torch.tensor([text.label for text in texts])
    valid = torch.arange(numbers.shape[1]) < lengths[:, None]
    table = []
    for relaxation in COMPARED:
        if relaxation == args.relaxation:
            radii = torch.tensor([row.radius for row in rows], dtype=torch.float64)
            seconds, covered = sum(row.seconds for row in rows), [row.covered for row in rows]
        else:
            started = time.perf_counter()
            found = step_radii(
                model.classifier,
                x,
                labels,
                lengths,
                norm=args.p,
                relaxation=relaxation,
                tol=args.tol,
                batch_size=args.batch_size,
            )
            seconds, radii = time.perf_counter() - started, found.radius[valid]
            covered = [near["covered"] for near in neighbours(model, numbers[valid], radii, args.p)]
        table.append(
            {
                "relaxation": relaxation,
                "mean_radius": float(radii.mean()),
                "median_radius": float(radii.median()),
                "covered_pairs": sum(covered),
                "words_with_covered": sum(count > 0 for count in covered),
                "seconds_per_word": seconds / len(radii),
            }
        )
    return table


def make_record(
    args: argparse.Namespace, model: TextModel, name: str, path: Path, source: str, counts: dict, task: TextTask
) -> Record:
    """What run.json says about the run; paths inside the repository are relative to it."""
    config = {key: value for key, value in model.config.items() if key not in ("vocabulary", "embeddings")}
    return {
        "title": f"{task.item}s, one word at a time, l_{args.p:g}",
        "unit": "word vectors",
        "arguments": {key: _plain(value) for key, value in sorted(vars(args).items())},
        "model": {
            "name": name,
            "path": _plain(path),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "words": len(model.vocabulary),
            "config": config,
        },
        "data": {"source": source},
        "counts": counts,
        "device": str(model.embeddings.device),
        "dtype": "float64",
        "versions": versions(),
        "commit": git_commit(),
        "started": _now(),
        "status": "finished",
    }


def _plain(value: object) -> object:
    """A value as JSON takes it."""
    if isinstance(value, Path):
        resolved = value.resolve()
        return str(resolved.relative_to(ROOT) if resolved.is_relative_to(ROOT) else resolved)
    return f"{value:g}" if isinstance(value, float) and not math.isfinite(value) else value


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
