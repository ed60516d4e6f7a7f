"""TinyImageNet (200 classes) and downscaled ImageNet (1,000), read as they are published; pixels stay bytes.

As floats a training set would take 5 and 63 GB at 64 by 64. So images are bytes, and those to train on come in parts:
``as_floats`` makes of a batch what a model takes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.cifar10 import CHANNELS, read_arrays
from data.mnist import DATA_FOLDER, DataError

TINY_FOLDER, TINY_SIDE = "tiny-imagenet-200", 64
BATCH_NAME = re.compile(r"train_data_batch_(\d+)")
VALIDATION_NAME, CLASSES = "val_data", 1000
Part = tuple[Tensor, Tensor]  # images, (N, 3, side, side) uint8, and labels, (N,) int64


@dataclass(frozen=True)
class LargeImageData:
    """A data set of images as bytes, 0 to 255, of which those to train on are read part by part.

    Attributes:
        name: of the data set; ``class_names`` are WordNet's numbers, or numbers where only these are published.
        test_x, test_y: the published validation set: (N, 3, side, side) uint8 and (N,) int64. The test set has no
            labels.
        parts: each reads some of the training images, in the order of their files.
    """

    name: str
    class_names: tuple[str, ...]
    test_x: Tensor
    test_y: Tensor
    parts: tuple[Callable[[], Part], ...]

    def train(self) -> Iterator[Part]:
        """The training images, as large parts as files have. Raises DataError where one is damaged."""
        for part in self.parts:
            yield part()

    def train_at_once(self) -> Part:
        """All training images, (N, 3, side, side) uint8, and their labels."""
        images, labels = zip(*self.train(), strict=True)
        return torch.cat(images), torch.cat(labels)


def as_floats(images: Tensor) -> Tensor:
    """Bytes as floats in [0, 1]."""
    return images.float() / 255


# --- TinyImageNet ---


def load_tiny_imagenet(data_dir: str | Path | None = None) -> LargeImageData:
    """TinyImageNet from data_dir, without it from data/: images of 64 by 64 of 200 classes, in the order of wnids.txt.

    The folder is tiny-imagenet-200/ or holds it: wnids.txt, train/WNID/images/*.JPEG, val/images/ and
    val/val_annotations.txt, as in the published archive.

    Raises:
        DataError: there is none, or a file is missing, damaged, or no image of 64 by 64.
        OSError: a file cannot be read.
    """
    folder = DATA_FOLDER if data_dir is None else Path(data_dir)
    place = next((p for p in (folder, folder / TINY_FOLDER) if (p / "wnids.txt").is_file()), None)
    if place is None:
        raise DataError(f"no TinyImageNet in {folder}: it must hold {TINY_FOLDER}/ with wnids.txt, train/ and val/")
    names = tuple((place / "wnids.txt").read_text(encoding="utf-8").split())
    parts = tuple(partial(_tiny_class, place / "train" / name / "images", label) for label, name in enumerate(names))
    return LargeImageData("tiny-imagenet", names, *_tiny_validation(place / "val", names), parts)


def _tiny_class(folder: Path, label: int) -> Part:
    paths = sorted(folder.glob("*.JPEG"), key=lambda path: (len(path.name), path.name))
    if not paths:
        raise DataError(f"{folder} holds no images (.JPEG)")
    return _read_images(paths), torch.full((len(paths),), label)


def _tiny_validation(folder: Path, names: tuple[str, ...]) -> Part:
    listed, numbers = folder / "val_annotations.txt", {name: label for label, name in enumerate(names)}
    if not listed.is_file():
        raise DataError(f"TinyImageNet in {folder.parent} is incomplete: {listed.name} is missing")
    paths, labels = [], []
    for number, line in enumerate(listed.read_text(encoding="utf-8").splitlines(), start=1):
        name, wnid, *_ = (*line.split("\t"), "", "")
        if wnid not in numbers:
            raise DataError(f"{listed}, line {number}: {wnid!r} is no class of wnids.txt")
        paths.append(folder / "images" / name)
        labels.append(numbers[wnid])
    if not paths:
        raise DataError(f"{listed} lists no images")
    return _read_images(paths), torch.tensor(labels)


def _read_images(paths: list[Path]) -> Tensor:
    from PIL import Image

    images = np.empty((len(paths), TINY_SIDE, TINY_SIDE, CHANNELS), dtype=np.uint8)
    for number, path in enumerate(paths):
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))  # some are grey
        except FileNotFoundError:
            raise DataError(f"{path} is missing") from None
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{path} cannot be read as an image: {error}") from error
        if pixels.shape != images.shape[1:]:
            raise DataError(f"{path} has {pixels.shape[1]} by {pixels.shape[0]} pixels, not {TINY_SIDE} by {TINY_SIDE}")
        images[number] = pixels
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


# --- downscaled ImageNet ---


def load_downscaled_imagenet(data_dir: str | Path, side: int = 64) -> LargeImageData:
    """ImageNet at side by side pixels (Chrabaszcz et al. 2017) from a folder of its published files.

    These are train_data_batch_1 ... train_data_batch_10 and val_data: pickled tables of "data", (N, 3 * side * side)
    bytes, red first, and "labels" from 1 to 1000, which become 0 to 999.

    Raises:
        DataError: a file is missing, damaged, or of images of another size.
        OSError: a file cannot be read.
    """
    folder = Path(data_dir)
    found = {int(match[1]): path for path in folder.glob("*") if (match := BATCH_NAME.fullmatch(path.name))}
    if not found or not (folder / VALIDATION_NAME).is_file():
        raise DataError(
            f"no downscaled ImageNet in {folder}: it must hold train_data_batch_1 ... and {VALIDATION_NAME}"
        )
    lacking = sorted(set(range(1, max(found) + 1)) - set(found))
    if lacking:
        raise DataError(f"downscaled ImageNet in {folder} is incomplete: train_data_batch_{lacking[0]} is missing")
    parts = tuple(partial(_downscaled_part, found[number], side) for number in sorted(found))
    names = tuple(map(str, range(CLASSES)))
    return LargeImageData(f"imagenet{side}", names, *_downscaled_part(folder / VALIDATION_NAME, side), parts)


def _downscaled_part(path: Path, side: int) -> Part:
    content = read_arrays(path)
    try:
        table = {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
        pixels, labels = np.asarray(table["data"], dtype=np.uint8), np.asarray(table["labels"], dtype=np.int64)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"damaged file {path} ({type(error).__name__}: {error})") from error
    if labels.ndim != 1 or pixels.shape != (len(labels), CHANNELS * side * side):
        raise DataError(f"{path} holds {pixels.shape} pixels and {labels.shape} labels, not those of {side} by {side}")
    if not len(labels) or labels.min() < 1 or labels.max() > CLASSES:
        raise DataError(f"damaged file {path}: no labels from 1 to {CLASSES}")
    return torch.from_numpy(pixels.reshape(-1, CHANNELS, side, side).copy()), torch.from_numpy(labels - 1)
