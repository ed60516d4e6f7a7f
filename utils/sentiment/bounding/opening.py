"""What a bound run is about: the model that the flags name, and the sentences that are drawn or given."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data.sst import Sentence, load_sst, words_of_free_text
from data.text import MAX_WORDS

from ...network.checkpoint import CheckpointError, missing
from ...training.text_models import TextModel, load_text_model
from ..arguments import DRAWN, METHODS
from ..naming import model_name
from ..words import Group, group_by_length


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


@dataclass(frozen=True)
class Opened:
    """A model with the sentences that are asked about.

    Attributes:
        name, path: of the model; ``source`` says where the sentences are from, ``sha256`` are their files'.
        groups: of the sentences drawn, by length.
    """

    name: str
    path: Path
    model: TextModel
    drawn: list[Drawn]
    groups: list[Group]
    source: str
    sha256: dict[str, str]


def settle(args: argparse.Namespace) -> None:
    """Check flags against each other, and put in what depends on others. Raises ValueError."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a word that the terminal cannot show must not end the run
    if args.text and (args.N is not None or args.max_words is not None):
        raise ValueError("--text draws no sentences: leave out --N and --max-words")
    if getattr(args, "save_certificate", False) and args.radii is not None:
        raise ValueError("--save-certificate is of replaced words: leave out --radii")
    args.N = args.N or DRAWN
    args.budgets = list(dict.fromkeys(args.budgets))
    args.methods = [method for method in METHODS if method in args.methods]


def open_run(args: argparse.Namespace, architecture: str, device: torch.device) -> Opened:
    """Raises ValueError if checkpoint or data are damaged, or do not fit the flags."""
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
    groups = group_by_length([one.sentence for one in drawn], model.vocabulary, data.synonyms)
    source = "given by --text" if args.text else f"{args.part} set of {data.source}"
    return Opened(name, path, model, drawn, groups, source, data.sha256)


def named_config(args: argparse.Namespace, architecture: str) -> dict[str, object]:
    """What the flags say about the model, as a checkpoint's config does."""
    config = {"architecture": architecture, "input_size": args.embedding_size, "recipe": args.recipe}
    if architecture != "transformer":
        return config | {"hidden_size": args.hidden_size}
    sizes = {"width": args.hidden_size, "num_layers": args.num_layers, "layer_norm": args.layer_norm}
    return config | sizes | {"max_frames": MAX_WORDS if args.positions else None}
