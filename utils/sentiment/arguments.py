"""The flags of the scripts of sentences: training and bounds."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from ..runs.cli import (
    ROOT,
    add_common_arguments,
    non_negative_float,
    non_negative_int,
    norm_value,
    positive_float,
    positive_int,
)
from ..training.arguments import add_vocabulary_arguments, probability
from .naming import EMBEDDING_SIZE
from .recipe import LOSSES, Recipe

DRAWN = 200  # sentences, unless told otherwise
METHODS = ("ibp", "crown-ibp", "crown", "decide")
EVERY_WORD = "all"
FOLDER = ROOT / "models" / "sentiment_classifier"
# Flags by field of a recipe.
FLAGS = {"budget": "train_budget", "clean": "clean_share", "ramp": "ramp_share"}
FLAGS |= {name: name for name in ("kappa", "beta", "hidden_scale")}


def add_model_arguments(parser: argparse.ArgumentParser, architecture: str):
    """Add the flags that name a model, and return their group."""
    group = parser.add_argument_group("model")
    what = "width of the layers" if architecture == "transformer" else "size of the hidden state of each direction"
    group.add_argument("--hidden-size", type=positive_int, default=64, help=what)
    group.add_argument("--embedding-size", type=positive_int, default=EMBEDDING_SIZE, help="numbers in a word's vector")
    if architecture == "transformer":
        group.add_argument("--num-layers", type=positive_int, default=1, help="layers of attention")
        group.add_argument("--positions", action="store_true", help="add a vector of its place to every word's")
        group.add_argument(
            "--layer-norm",
            choices=("no-variance", "standard"),
            default="no-variance",
            help="normalisation: without its division, so that it is linear, or with it",
        )
    return group


def add_sentiment_training_arguments(parser: argparse.ArgumentParser, architecture: str) -> None:
    """Add the flags of a train script and the common ones."""
    transformer = architecture == "transformer"
    group = add_model_arguments(parser, architecture)
    if transformer:
        group.add_argument("--heads", type=positive_int, default=4, help="heads of each layer; must divide the width")
        group.add_argument("--inner-size", type=positive_int, default=128, help="hidden values of feed-forward parts")
    add_vocabulary_arguments(group)
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=non_negative_int, default=6, help="passes over the phrases, if there are any")
    group.add_argument("--phrase-words", type=positive_int, help="leave out phrases of more words, which take longer")
    group.add_argument(
        "--sentence-epochs", type=positive_int, default=6, help="passes over the whole sentences, after those"
    )
    group.add_argument("--batch-size", type=positive_int, default=32, help="sentences per step, all of one length")
    group.add_argument("--lr", type=positive_float, default=1e-3, help="largest learning rate of Adam")
    group.add_argument("--weight-decay", type=non_negative_float, default=0.1, help="decoupled weight decay of Adam")
    group.add_argument(
        "--dropout", type=probability, default=0.3, help="share of zeros in word vectors and in what the head reads"
    )
    group.add_argument("--word-dropout", type=probability, default=0.1, help="share of words read as unknown")
    group.add_argument("--save-dir", type=Path, default=FOLDER, help="folder of the model folders")
    group.add_argument("--resume", action="store_true", help="continue an interrupted training of the same arguments")
    _add_certified_arguments(parser)
    _add_data_arguments(parser)


def _add_certified_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("certified training")
    group.add_argument(
        "--certified",
        choices=LOSSES,
        help="train for a bound of the worst loss over all replacements: intervals (ibp), or mixed with backward ones",
    )
    group.add_argument("--train-budget", type=positive_int, help="words that change, for backward bounds (default: 6)")
    group.add_argument("--clean-share", type=probability, help="share of the steps before substitutes come in")
    group.add_argument(
        "--ramp-share", type=positive_float, help="share of the steps after which they are there in full"
    )
    pair = {"type": non_negative_float, "nargs": 2, "metavar": ("FIRST", "LAST")}
    group.add_argument("--kappa", help="share of the clean loss when the ramp begins, and once it is over", **pair)
    group.add_argument("--beta", help="likewise of backward bounds against intervals, of mixed", **pair)
    group.add_argument("--hidden-scale", type=non_negative_float, help="factor of the initial W_hh of recurrent layers")


def add_sentiment_bound_arguments(parser: argparse.ArgumentParser, architecture: str) -> None:
    """Add the flags of a bound script and the common ones."""
    group = add_model_arguments(parser, architecture)
    group.add_argument("--recipe", choices=LOSSES, help="the model that was trained with --certified RECIPE")
    group.add_argument("--work-dir", type=Path, default=FOLDER, help="folder of the model folders")
    group.add_argument("--model-name", default=architecture, help="name of the checkpoint in its model folder")
    group = parser.add_argument_group("what is certified")
    group.add_argument(
        "--budgets",
        type=budget,
        nargs="+",
        default=[1, 2, 3, 6],
        metavar="K",
        help="how many words may be replaced at most, each a question of its own; all: every word",
    )
    group.add_argument(
        "--radii",
        type=norm_value,
        metavar="P",
        help="instead, how far single words' vectors may move in the l_P norm (1, 2 or inf), by the tightest method",
    )
    group.add_argument("--N", type=positive_int, help=f"sentences drawn (default: {DRAWN})")
    group.add_argument("--part", choices=("test", "dev"), default="test", help="part of the data they are drawn from")
    group.add_argument("--max-words", type=positive_int, help="draw from sentences of at most so many words")
    group.add_argument(
        "--text", action="append", metavar="TEXT", help="certify this sentence instead; may be given several times"
    )
    group = parser.add_argument_group("how")
    group.add_argument(
        "--methods",
        choices=METHODS,
        nargs="+",
        default=["crown-ibp", "crown", "decide"] if architecture == "transformer" else ["ibp", "crown-ibp", "decide"],
        help="bounds by intervals, by a backward pass over intervals, or over backward bounds of all layers; decide "
        "divides the sets that these leave open until each is certified or falsified",
    )
    group.add_argument(
        "--every-method",
        action="store_true",
        help="bound every sentence by every method, not only what those before it leave open at some budget",
    )
    group.add_argument(
        "--time-limit", type=positive_float, default=5.0, help="seconds of decide, a sentence and budget"
    )
    group.add_argument("--no-attack", action="store_true", help="leave out the search for the worst replacement")
    group.add_argument("--beam", type=non_negative_int, default=8, help="width of the attack's search; 0: greedy")
    group.add_argument(
        "--exhaustive", type=positive_int, default=5000, help="the attack tries all sentences where there are so few"
    )
    group.add_argument("--batch-size", type=positive_int, default=32, help="sentences of one length bounded at a time")
    group.add_argument(
        "--out-dir", type=Path, metavar="FOLDER", help="folder of the results (default: beside the checkpoint)"
    )
    group.add_argument("--resume", action="store_true", help="continue an interrupted run of the same arguments")
    group.add_argument("--overwrite", action="store_true", help="replace results of another run in the folder")
    group.add_argument("--show", type=positive_int, default=10, help="sentences printed")
    if architecture != "transformer":
        group.add_argument(
            "--save-certificate",
            action="store_true",
            help="write a file for every sentence and budget that bounds certify, which scripts/check_certificate.py "
            "confirms by itself",
        )
    _add_data_arguments(parser)


def budget(text: str) -> int | str:
    """argparse type: a number of words, or all."""
    return text if text == EVERY_WORD else positive_int(text)


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--sample", action="store_true", help="use the small built-in sample of made-up sentences")
    group.add_argument(
        "--synonyms", type=Path, metavar="FILE", help="JSON, word -> list, in place of the substitutes of the data"
    )
    add_common_arguments(parser, data="folder that holds the sentences of SST-2 (default: data/)")


def recipe_of(args: argparse.Namespace) -> Recipe | None:
    """The recipe of the flags, None for plain training. Raises ValueError if flags contradict each other."""
    given = {field.name: getattr(args, FLAGS[field.name]) for field in fields(Recipe) if field.name != "loss"}
    told = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    told = {name: value for name, value in told.items() if value is not None}
    if args.certified is None:
        if told:
            flag = FLAGS[next(iter(told))].replace("_", "-")
            raise ValueError(f"--{flag} is for certified training: give --certified too")
        return None
    if args.certified == "ibp" and told.keys() & {"budget", "beta"}:
        raise ValueError("intervals do not see a budget nor backward bounds: give --certified mixed")
    return Recipe(args.certified, **told)
