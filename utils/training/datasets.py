"""Which data set of images a script is about: the flag, the folder of its models, and how it is read."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..runs.cli import ROOT

if TYPE_CHECKING:
    from data.mnist import ImageData

SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}  # channels, height, width
DATASETS = {name: channels * height * width for name, (channels, height, width) in SHAPES.items()}  # values of an image
MODELS = ROOT / "models"


def add_dataset_argument(group) -> None:
    """Add --dataset."""
    group.add_argument(
        "--dataset",
        choices=tuple(DATASETS),
        default="mnist",
        help="cifar10 is looked for in --data-dir: cifar-10-batches-py/, or train/CLASS/*.png and test/CLASS/*.png; "
        "its models lie in models/cifar10_classifier unless told otherwise",
    )


def settle_folder(args: argparse.Namespace, flag: str) -> None:
    """Let a folder of models that was not given, args.<flag>, be the one of the data set."""
    if getattr(args, flag) == MODELS / "mnist_classifier":
        setattr(args, flag, MODELS / f"{args.dataset}_classifier")


def load_images(args: argparse.Namespace, train: bool = True) -> ImageData:
    """The images of --dataset, MNIST's where there is no such flag; ``train``: whether training images are needed.

    Raises DataError.
    """
    if getattr(args, "dataset", "mnist") == "cifar10":
        from data.cifar10 import load_cifar10

        return load_cifar10(args.data_dir, train)
    from data.mnist import load_mnist

    return load_mnist(args.data_dir)
