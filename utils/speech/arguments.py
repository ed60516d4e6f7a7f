"""The flags of the scripts of spoken digits."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..choices.method import TIME_LIMIT, TUNED_METHODS
from ..runs.cli import ROOT, add_common_arguments, non_negative_float, positive_float, positive_int
from ..training.certified.arguments import add_certified_arguments

THREATS = {"noise": -90.0, "snr": 60.0, "features": 0.01}  # and their levels unless told otherwise
SPEECH_METHODS = ("ibp", "crown-ibp", "crown", *TUNED_METHODS)
DATA_HELP = "folder that holds recordings/0_george_0.wav ... (default: data/fsdd, where they are downloaded to)"


def add_speech_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a train script of spoken digits and the common ones."""
    group = parser.add_argument_group("model")
    group.add_argument("--hidden-size", type=positive_int, default=32, help="size of the hidden state")
    group.add_argument(
        "--pooling", choices=("last", "mean"), default="last", help="state that the classes are read off"
    )
    group.add_argument("--hop", type=positive_int, default=200, help="samples of a chunk, half a window")
    group.add_argument("--bands", type=positive_int, default=20, help="mel bands")
    group.add_argument(
        "--floor", type=positive_float, default=1e-3, help="energy added before the logarithm; white noise of -30 dB"
    )
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=positive_int, default=40, help="passes over the training set")
    group.add_argument("--batch-size", type=positive_int, default=64, help="utterances per step")
    group.add_argument("--lr", type=positive_float, default=1e-2, help="largest learning rate of Adam")
    group.add_argument("--weight-decay", type=non_negative_float, default=0.1, help="decoupled weight decay of Adam")
    group.add_argument(
        "--noise",
        type=float,
        nargs=2,
        metavar=("QUIETEST", "LOUDEST"),
        help="add white noise of a random level, in dB of its deviation below the peak, such as -60 -25",
    )
    group.add_argument(
        "--train-threat",
        choices=tuple(THREATS),
        default="noise",
        help="what --certified trains for, as --threat of the bound scripts",
    )
    group.add_argument(
        "--train-level",
        type=float,
        help="--train-eps as --level of the bound scripts: dB of the peak (-60 is 0.001), of signal to noise, or nats",
    )
    group.add_argument(
        "--train-span", type=float, nargs=2, metavar=("FROM", "TO"), help="only chunks in this span of seconds move"
    )
    group.add_argument(
        "--save-dir", type=Path, default=ROOT / "models" / "speech_classifier", help="folder of the model folders"
    )
    group.add_argument("--sample", action="store_true", help="use a few made-up tones, which need no data")
    group.add_argument("--resume", action="store_true", help="continue an interrupted training of the same arguments")
    add_certified_arguments(parser, of_sequences=False)
    add_common_arguments(parser, data=DATA_HELP)


def add_speech_bound_arguments(parser: argparse.ArgumentParser, architecture: str) -> None:
    """Add the flags of a bound script of spoken digits and the common ones."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--work-dir", type=Path, default=ROOT / "models" / "speech_classifier", help="folder of the model folders"
    )
    group.add_argument("--model-name", default=architecture, help="name of the checkpoint in its model folder")
    group.add_argument("--hidden-size", type=positive_int, default=32, help="size of the hidden state")
    group.add_argument("--recipe", metavar="NAME", help="of a model from certified training: ibp_-50dB")
    group = parser.add_argument_group("what is certified")
    group.add_argument("--N", type=positive_int, default=100, help="test utterances drawn")
    group.add_argument(
        "--threat",
        choices=tuple(THREATS),
        default="noise",
        help="noise: every sample moves by at most --level dB of the utterance's peak; snr: the noise's energy is that "
        "of a signal-to-noise ratio of --level dB; features: every feature moves by at most --level nats",
    )
    group.add_argument("--level", type=float, help="see --threat (default: -90, 60 and 0.01)")
    group.add_argument(
        "--span", type=float, nargs=2, metavar=("FROM", "TO"), help="only chunks in this span of seconds move"
    )
    group = parser.add_argument_group("how")
    group.add_argument(
        "--power",
        choices=("bands", "squares"),
        default="bands",
        help="energies as quadratic forms, or square by square",
    )
    group.add_argument("--method", choices=SPEECH_METHODS, default="crown", help="how margins are bounded")
    group.add_argument(
        "--time-limit",
        type=positive_float,
        default=TIME_LIMIT,
        help="seconds an utterance in which alpha, curve and bab tune bounds, each after all that those before it do",
    )
    group.add_argument(
        "--search", action="store_true", help="also find the loudest noise that is certified, and that breaks"
    )
    group.add_argument(
        "--save-certificate",
        action="store_true",
        help="write a file for every verified utterance that scripts/check_certificate.py can confirm by itself",
    )
    group.add_argument("--no-attack", action="store_true", help="leave out PGD")
    group.add_argument("--attack-steps", type=positive_int, default=30, help="gradient steps of PGD")
    group.add_argument(
        "--tol", type=positive_float, default=0.05, help="relative width of the final bracket of --search"
    )
    group.add_argument("--batch-size", type=positive_int, default=4, help="utterances of one length bounded at a time")
    group.add_argument(
        "--draw", type=int, default=0, metavar="K", help="draw K utterances' spectrograms with a radius a chunk"
    )
    group.add_argument(
        "--out-dir", type=Path, metavar="FOLDER", help="folder of the results (default: beside the checkpoint)"
    )
    group.add_argument("--resume", action="store_true", help="continue an interrupted run of the same arguments")
    group.add_argument("--overwrite", action="store_true", help="replace results of another run in the folder")
    group.add_argument("--sample", action="store_true", help="use a few made-up tones, which need no data")
    add_common_arguments(parser, data=DATA_HELP)
