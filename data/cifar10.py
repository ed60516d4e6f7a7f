"""CIFAR-10 as tensors: from the files that torchvision stores, or from a folder of images by class."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.mnist import DATA_FOLDER, DataError, ImageData

SIDE, CHANNELS = 32, 3
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = {"train": tuple(f"data_batch_{n}" for n in range(1, 6)), "test": ("test_batch",)}
STORED = "cifar-10-batches-py"
SUFFIXES = (".png", ".jpg", ".jpeg")
# All that a pickled batch of arrays and lists may call; anything else in such a file is not data.
ALLOWED = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): np.zeros(1).__reduce__()[0] for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): np.zeros(1).__reduce_ex__(5)[0] for core in ("core", "_core")},
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): lambda text, coding: text.encode(coding),
}


def load_cifar10(data_dir: str | Path | None = None, train: bool = True) -> ImageData:
    """CIFAR-10 from data_dir, without it from data/: images (N, 3, 32, 32), floats in [0, 1], channels red first.

    Either folder may hold cifar-10-batches-py/ as torchvision downloads it, or train/CLASS/*.png (or .jpg) and
    test/CLASS/..., by themselves or in a folder cifar10/.

    Args:
        train: read the training images as well; else there are none, which saves the time.

    Raises:
        DataError: there is neither, or a file is missing, damaged, or no image of 32 by 32.
        OSError: a file cannot be read.
    """
    folder = DATA_FOLDER if data_dir is None else Path(data_dir)
    parts = ("train", "test") if train else ("test",)
    for place in (folder, folder / "cifar10"):
        if (place / STORED).is_dir() or (place / BATCHES["test"][0]).is_file():
            stored = place / STORED if (place / STORED).is_dir() else place
            found = {part: _read_batches(stored, part) for part in parts}
            return _as_data("cifar10", CLASS_NAMES, found)
        if (place / "test").is_dir():
            names = _class_folders(place)
            found = {part: _read_images(place / part, names) for part in parts}
            lossy = any(path.suffix.lower() != ".png" for path in (place / "test" / names[0]).iterdir())
            return _as_data("cifar10 as JPEG" if lossy else "cifar10 as images", names, found)
    raise DataError(
        f"no CIFAR-10 in {folder}: --data-dir must name a folder with {STORED}/ as torchvision stores it, or with "
        "train/CLASS/*.png and test/CLASS/*.png"
    )


def _as_data(source: str, names: tuple[str, ...], found: dict[str, tuple[Tensor, Tensor]]) -> ImageData:
    none = torch.empty(0, CHANNELS, SIDE, SIDE), torch.empty(0, dtype=torch.int64)
    return ImageData("cifar10", source, names, *found.get("train", none), *found["test"])


def _read_batches(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images and labels of the pickled files of a part."""
    images, labels = [], []
    for path in (folder / name for name in BATCHES[part]):
        if not path.is_file():
            raise DataError(f"CIFAR-10 in {folder} is incomplete: {path.name} is missing")
        content = read_arrays(path)
        try:
            pixels, classes = content[b"data"], np.asarray(content[b"labels"], dtype=np.int64)
            pixels = np.asarray(pixels, dtype=np.uint8).reshape(len(classes), CHANNELS, SIDE, SIDE)
        except Exception as error:  # damaged bytes fail in whatever way they lead to
            raise DataError(f"damaged CIFAR-10 file {path} ({type(error).__name__}: {error})") from error
        if not len(classes) or classes.min() < 0 or classes.max() >= len(CLASS_NAMES):
            raise DataError(f"damaged CIFAR-10 file {path}: no labels from 0 to {len(CLASS_NAMES) - 1}")
        images.append(pixels)
        labels.append(classes)
    return torch.from_numpy(np.concatenate(images)).float() / 255, torch.from_numpy(np.concatenate(labels))


def read_arrays(path: Path) -> object:
    """What a file of pickled arrays, lists and tables holds. Raises DataError if it is damaged or asks for more."""
    try:
        return _Unpickler(path).load()
    except OSError:
        raise
    except Exception as error:  # damaged bytes fail in whatever way they lead to
        raise DataError(f"damaged file {path} ({type(error).__name__}: {error})") from error


class _Unpickler(pickle.Unpickler):
    """Reads pickled arrays, and runs nothing that a file asks for."""

    def __init__(self, path: Path):
        self._file = path.open("rb")
        super().__init__(self._file, encoding="bytes")

    def find_class(self, module: str, name: str):
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return ALLOWED[module, name]

    def load(self):
        with self._file:
            return super().load()


def _class_folders(folder: Path) -> tuple[str, ...]:
    """The classes: names of the folders in test/, in the order of the alphabet."""
    names = tuple(sorted(path.name for path in (folder / "test").iterdir() if path.is_dir()))
    if not names:
        raise DataError(f"{folder / 'test'} holds no folders of classes")
    return names


def _read_images(folder: Path, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Images and labels of a folder of one folder for each class; files in the order of their names."""
    from PIL import Image

    images, labels = [], []
    for label, name in enumerate(names):
        paths = sorted(path for path in (folder / name).glob("*") if path.suffix.lower() in SUFFIXES)
        if not paths:
            raise DataError(f"{folder / name} holds no images (.png or .jpg)")
        for path in paths:
            try:
                with Image.open(path) as image:
                    pixels = np.asarray(image.convert("RGB"))
            except (OSError, SyntaxError, ValueError) as error:
                raise DataError(f"{path} cannot be read as an image: {error}") from error
            if pixels.shape != (SIDE, SIDE, CHANNELS):
                raise DataError(f"{path} has {pixels.shape[1]} by {pixels.shape[0]} pixels, not {SIDE} by {SIDE}")
            images.append(pixels)
            labels.append(label)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return pixels.float() / 255, torch.tensor(labels)
