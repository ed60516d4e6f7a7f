"""The flags of the train scripts."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..choices.tables import CNN_WIDTHS
from ..runs.cli import (
    ROOT,
    add_common_arguments,
    non_negative_float,
    non_negative_int,
    norm_value,
    positive_float,
    positive_int,
)
from .tasks import TextTask

PLAIN_DECAY = 0.3
MLP_ACTIVATIONS = ("relu", "leaky", "tanh", "sigmoid", "arctan", "elu", "softplus")
STROKES_HELP = "folder that holds strokes/strokes.npz or the published sequences (default: data/)"


def add_training_arguments(parser: argparse.ArgumentParser, hidden_size: int = 64, time_step: int = 7) -> None:
    """Add the flags that all MNIST train scripts share, with the given defaults, and the common ones."""
    group = parser.add_argument_group("model")
    group.add_argument("--hidden-size", type=positive_int, default=hidden_size, help="size of the hidden state")
    group.add_argument(
        "--time-step", type=positive_int, default=time_step, help="frames an image is cut into; must divide 28"
    )
    add_shift_argument(parser.add_argument_group("changed images"))
    add_loop_arguments(parser)


def add_shift_argument(group: argparse._ArgumentGroup, shift: int = 0) -> None:
    """Add --shift."""
    group.add_argument(
        "--shift", type=non_negative_int, default=shift, metavar="PIXELS", help="largest random shift of an image"
    )


def add_mlp_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of an MLP's train script and the common ones."""
    group = parser.add_argument_group("model")
    add_mlp_model_arguments(group)
    group = parser.add_argument_group("small gradients")
    group.add_argument(
        "--lipschitz-weight",
        type=non_negative_float,
        default=0.0,
        help="weight in the loss of the margin's local Lipschitz constant; more of it makes larger radii",
    )
    group.add_argument(
        "--lipschitz-eps", type=positive_float, default=0.1, help="radius of the balls in which that is bounded"
    )
    group.add_argument("--lipschitz-norm", type=norm_value, default=2.0, help="norm of these balls: 1, 2 or inf")
    group = parser.add_argument_group("moves of the weights")
    group.add_argument(
        "--perturb", choices=("weights",), help="train for a bound of the worst loss over balls around all matrices"
    )
    group.add_argument("--perturb-eps", type=positive_float, default=0.1, help="radius of these balls")
    group.add_argument(
        "--perturb-norm",
        type=norm_value,
        default=2.0,
        help="their norm: 2 (whole matrices) or inf (entries)",
    )
    group.add_argument(
        "--perturb-method", choices=("ibp", "crown-ibp", "crown"), default="ibp", help="how the loss is bounded"
    )
    add_loop_arguments(parser)


def add_cnn_training_arguments(parser: argparse.ArgumentParser, shift: int = 0, flip: bool = False) -> None:
    """Add the flags of a CNN's train script and the common ones; by default images are shifted and flipped so."""
    add_cnn_model_arguments(parser.add_argument_group("model"))
    group = parser.add_argument_group("changed images")
    add_shift_argument(group, shift)
    group.add_argument(
        "--flip", action=argparse.BooleanOptionalAction, default=flip, help="mirror half of the images at random"
    )
    add_loop_arguments(parser)


def add_cnn_model_arguments(group: argparse._ArgumentGroup) -> None:
    """Add --model, --width and --batch-norm."""
    group.add_argument("--model", choices=tuple(CNN_WIDTHS), default="small", help="kind of network")
    widths = ", ".join(f"{width} for {kind}" for kind, width in CNN_WIDTHS.items())
    group.add_argument("--width", type=positive_int, help=f"channels of the first layers (default: {widths})")
    group.add_argument(
        "--batch-norm",
        action="store_true",
        help="normalise after every convolution of small, large and resnet too; the others always do",
    )


def add_mlp_model_arguments(group: argparse._ArgumentGroup) -> None:
    """Add --layers, --activation and --leaky-slope."""
    group.add_argument(
        "--layers", type=positive_int, nargs="+", default=[20, 20], metavar="N", help="sizes of the hidden layers"
    )
    group.add_argument("--activation", choices=MLP_ACTIVATIONS, default="relu", help="activation of the hidden layers")
    group.add_argument(
        "--leaky-slope", type=non_negative_float, default=0.3, help="slope of --activation leaky below 0"
    )


def add_recipe_argument(group: argparse._ArgumentGroup) -> None:
    """Add --lipschitz, of scripts that read models, and --recipe."""
    group.add_argument("--recipe", metavar="NAME", help="of a model from certified training: ibp_0_1")
    group.add_argument("--lipschitz", action="store_true", help="the model that was trained with --lipschitz-weight")


def add_loop_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the training loop and the common ones."""
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=positive_int, default=30, help="passes over the training set")
    group.add_argument("--batch-size", type=positive_int, default=128, help="images per step")
    group.add_argument("--lr", type=positive_float, default=3e-3, help="largest learning rate of Adam")
    group.add_argument(
        "--weight-decay",
        type=non_negative_float,
        help="decoupled weight decay of Adam; more of it makes smaller weights and larger radii (default: 0.3, but 0 "
        "with --certified)",
    )
    group.add_argument(
        "--save-dir", type=Path, default=ROOT / "models" / "mnist_classifier", help="folder of the model folders"
    )
    group.add_argument("--resume", action="store_true", help="continue an interrupted training of the same arguments")
    group.add_argument(
        "--start-from",
        metavar="CHECKPOINT",
        help="begin with the weights of a trained model of the same kind; in certified training with --clean-share 0 "
        "--ramp-share 0 balls are full from the first step",
    )
    add_common_arguments(parser)


def add_stack_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --num-layers and --bidirectional."""
    group = parser.add_argument_group("stack")
    group.add_argument("--num-layers", type=positive_int, default=1, help="recurrent layers on top of each other")
    group.add_argument("--bidirectional", action="store_true", help="read the frames in both directions")
    group.add_argument(
        "--pooling", choices=("last", "mean"), default="last", help="state that the classes are read off"
    )
    group = parser.add_argument_group("networks that begin wider")
    group.add_argument(
        "--start-size", type=positive_int, metavar="UNITS", help="begin with more units; those that matter least go"
    )
    group.add_argument(
        "--narrow-shares",
        type=non_negative_float,
        nargs=2,
        metavar=("FIRST", "LAST"),
        help="shares of the steps when the first units go, and when all that are to go have gone (default: 0 0.35)",
    )


def add_vocabulary_arguments(group: argparse._ArgumentGroup) -> None:
    """Add --min-count and --embeddings."""
    group.add_argument("--min-count", type=positive_int, default=2, help="rarer words of the training set are unknown")
    group.add_argument(
        "--embeddings",
        type=Path,
        metavar="FILE",
        help="text file of word vectors to start from (GloVe's format); its vectors set --embedding-size",
    )


def add_text_training_arguments(parser: argparse.ArgumentParser, task: TextTask) -> None:
    """Add the flags of a text train script and the common ones."""
    group = parser.add_argument_group("model")
    group.add_argument("--hidden-size", type=positive_int, default=32, help="size of the hidden state")
    group.add_argument("--embedding-size", type=positive_int, default=100, help="numbers in a word's vector")
    add_vocabulary_arguments(group)
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=positive_int, default=task.epochs, help="passes over the training set")
    group.add_argument("--batch-size", type=positive_int, default=64, help=f"{task.item}s per step")
    group.add_argument("--lr", type=positive_float, default=3e-3, help="largest learning rate of Adam")
    group.add_argument("--weight-decay", type=non_negative_float, default=0.1, help="decoupled weight decay of Adam")
    group.add_argument("--dropout", type=probability, default=0.5, help="share of zeros in word vectors and last state")
    group.add_argument("--word-dropout", type=probability, default=0.1, help="share of words read as unknown")
    group.add_argument(
        "--save-dir", type=Path, default=ROOT / "models" / task.folder, help="folder of the model folders"
    )
    group.add_argument("--sample", action="store_true", help=f"use the small built-in sample of made-up {task.item}s")
    group.add_argument("--resume", action="store_true", help="continue an interrupted training of the same arguments")
    add_common_arguments(parser, data=f"folder that holds the {task.item}s (default: data/)")


def probability(text: str) -> float:
    """argparse type: a number from 0 to below 1."""
    value = non_negative_float(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to below 1")
    return value


def add_stroke_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a stroke train script and the common ones."""
    group = parser.add_argument_group("model")
    group.add_argument("--hidden-size", type=positive_int, default=32, help="size of the hidden state")
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=positive_int, default=12, help="passes over the training set")
    group.add_argument("--batch-size", type=positive_int, default=128, help="digits per step")
    group.add_argument("--lr", type=positive_float, default=1e-2, help="largest learning rate of Adam")
    group.add_argument("--weight-decay", type=non_negative_float, default=0.05, help="decoupled weight decay of Adam")
    group.add_argument(
        "--save-dir", type=Path, default=ROOT / "models" / "stroke_classifier", help="folder of the model folders"
    )
    group.add_argument("--resume", action="store_true", help="continue an interrupted training of the same arguments")
    add_common_arguments(parser, data=STROKES_HELP)
