"""MNIST digits as pen strokes: sequences of (dx, dy, end of stroke, end of digit), traced from the images' skeletons.

dx and dy are movements in pixels, y pointing down, the first one from the top left corner; the flags are 0 or 1.
That is the format of the MNIST stroke sequence data set (de Jong, 2016), whose files are read too.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.mnist import DataError

DATA_FOLDER = Path(__file__).resolve().parent / "strokes"
CLASS_NAMES = tuple(str(digit) for digit in range(10))
FILE_NAME = "strokes.npz"
POINT_SIZE = 4  # dx, dy, end of stroke, end of digit
PARTS = ("train", "test")
LABEL_FILES = {"train": "trainlabels.txt", "test": "testlabels.txt"}
SEQUENCE_FILE = re.compile(r"(train|test)img-(\d+)-inputdata\.txt")
# A corner and its eight neighbours, straight steps first: they are tried in this order.
STEPS = ((0, 1), (1, 0), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, -1), (-1, 1))


@dataclass(frozen=True)
class StrokeData:
    """Sequences padded with zeros, (N, T, 4) float32, which end at their end-of-digit flag, and labels, (N,) int64.

    Attributes:
        source: where they are from.
        test_index: (N,) numbers of the test digits in MNIST's test set.
    """

    source: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    test_index: Tensor
    name: str = "strokes"
    class_names: tuple[str, ...] = CLASS_NAMES


def sequence_lengths(x: Tensor) -> Tensor:
    """Points up to the end-of-digit flag, (N,)."""
    return x[..., 3].argmax(dim=1) + 1


# --- from an image to strokes ---------------------------------------------------------------------------------------


def skeleton(image: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """Bool skeleton, one pixel wide, of the image's pixels above the threshold (those of a digit without any: all)."""
    try:
        from skimage.morphology import skeletonize
    except ImportError as error:
        raise DataError("scikit-image, which thins the digits, is not there: pip install scikit-image") from error
    ink = image > threshold
    return skeletonize(ink if ink.any() else image > 0)


def trace(pixels: np.ndarray) -> list[list[tuple[int, int]]]:
    """Strokes, lists of (x, y), that pass through every pixel of a skeleton once.

    A stroke begins at an end of a line, the topmost and then leftmost if there are several, or anywhere on a closed
    one. It goes on to a neighbour that is not drawn yet, straight ahead if possible, until there is none.
    """
    left = {(int(x), int(y)) for y, x in np.argwhere(pixels)}
    strokes = []
    while left:
        ends = [point for point in left if sum(n in left for n in _neighbours(point)) <= 1]
        point = min(ends or left, key=lambda point: (point[1], point[0]))
        stroke, direction = [point], (0, 1)
        left.remove(point)
        while following := [n for n in _neighbours(point) if n in left]:
            ahead = [(n[0] - point[0]) * direction[0] + (n[1] - point[1]) * direction[1] for n in following]
            chosen = following[int(np.argmax(ahead))]
            direction = (chosen[0] - point[0], chosen[1] - point[1])
            point = chosen
            stroke.append(point)
            left.remove(point)
        strokes.append(stroke)
    return _in_order(strokes)


def _neighbours(point: tuple[int, int]) -> list[tuple[int, int]]:
    return [(point[0] + dx, point[1] + dy) for dx, dy in STEPS]


def _in_order(strokes: list[list[tuple[int, int]]]) -> list[list[tuple[int, int]]]:
    """The topmost stroke, then always the one whose nearer end is nearest to the pen, from that end."""
    ordered, rest = strokes[:1], strokes[1:]
    while rest:
        pen = ordered[-1][-1]
        distances = [[(s[end][0] - pen[0]) ** 2 + (s[end][1] - pen[1]) ** 2 for end in (0, -1)] for s in rest]
        nearest = min(range(len(rest)), key=lambda n: min(distances[n]))
        stroke = rest.pop(nearest)
        ordered.append(stroke if distances[nearest][0] <= distances[nearest][1] else stroke[::-1])
    return ordered


def to_sequence(strokes: Sequence[Sequence[tuple[int, int]]], stride: int = 1) -> np.ndarray:
    """(T, 4) points of a digit, every stride-th of a stroke and its last one; single pixels are left out beside others.

    Raises:
        ValueError: there is no stroke.
    """
    longer = [stroke for stroke in strokes if len(stroke) > 1] or list(strokes)
    if not longer:
        raise ValueError("there is no stroke")
    rows, pen = [], (0, 0)
    for number, stroke in enumerate(longer):
        kept = [*stroke[:-1:stride], stroke[-1]]
        for place, (x, y) in enumerate(kept):
            last = place == len(kept) - 1
            rows.append((x - pen[0], y - pen[1], last, last and number == len(longer) - 1))
            pen = (x, y)
    return np.array(rows, dtype=np.int16)


def image_to_sequence(image: np.ndarray, stride: int = 1) -> np.ndarray:
    """(T, 4) points of an image, (28, 28) in [0, 1]."""
    return to_sequence(trace(skeleton(image)), stride)


# --- files ----------------------------------------------------------------------------------------------------------


def write_strokes(path: Path, parts: dict[str, tuple[list[np.ndarray], np.ndarray]], source: str) -> None:
    """Write sequences and labels of "train" and "test" into one file."""
    arrays = {"source": np.array(source)}
    for part, (sequences, labels) in parts.items():
        arrays[f"{part}_points"] = np.concatenate(sequences).astype(np.int16)
        arrays[f"{part}_lengths"] = np.array([len(sequence) for sequence in sequences])
        arrays[f"{part}_labels"] = np.asarray(labels, dtype=np.int64)
    np.savez_compressed(path, **arrays)


def load_strokes(data_dir: str | Path | None = None) -> StrokeData:
    """The strokes of data_dir (data/ without it), in a file made by scripts/make_strokes.py or as published.

    Raises:
        DataError: there are none, or they are damaged.
    """
    base = DATA_FOLDER.parent if data_dir is None else Path(data_dir)
    for folder in (base / "strokes", base / "sequences", base):
        if (folder / FILE_NAME).is_file():
            return read_npz(folder / FILE_NAME)
        if (folder / LABEL_FILES["train"]).is_file():
            return read_published(folder)
    raise DataError(f"no strokes in {base}: make them by python scripts/make_strokes.py (--help for where to)")


def read_npz(path: Path) -> StrokeData:
    """Inverse of ``write_strokes``. Raises DataError if the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        source = str(arrays["source"])
        parts = []
        for part in PARTS:
            points, lengths, labels = (arrays[f"{part}_{name}"] for name in ("points", "lengths", "labels"))
            if len(points) != lengths.sum() or len(lengths) != len(labels):
                raise ValueError("lengths and points do not belong together")
            parts.append((np.split(points, np.cumsum(lengths)[:-1]), labels))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    return _as_data(parts, np.arange(len(parts[1][1])), source, path)


def read_published(folder: Path) -> StrokeData:
    """Read the published files: one of four columns for every digit, and the labels, one a line.

    Digits whose file is not there are left out, so that a part of the data set is enough.

    Raises:
        DataError: a file is damaged or has no label.
    """
    parts, indices = [], []
    for part in PARTS:
        labels = _read_table(folder / LABEL_FILES[part], 1)[:, 0]
        matches = sorted(
            (int(match[2]), path)
            for path in folder.glob(f"{part}img-*-inputdata.txt")
            if (match := SEQUENCE_FILE.fullmatch(path.name))
        )
        if not matches:
            raise DataError(f"no {part}img-0-inputdata.txt or other digits in {folder}")
        if matches[-1][0] >= len(labels):
            raise DataError(f"{matches[-1][1]} has no label: {LABEL_FILES[part]} holds {len(labels)}")
        indices.append(np.array([number for number, _ in matches]))
        parts.append(([_read_table(path, POINT_SIZE) for _, path in matches], labels[indices[-1]]))
    return _as_data(parts, indices[1], "published", folder)


def _read_table(path: Path, columns: int) -> np.ndarray:
    try:
        rows = [[int(text) for text in line.split()] for line in path.read_text(encoding="ascii").splitlines()]
    except ValueError:
        rows = []
    rows = [row for row in rows if row]
    if not rows or any(len(row) != columns for row in rows):
        raise DataError(f"{path} is damaged: it must hold {columns} whole number(s) a line")
    return np.array(rows)


def _as_data(parts: list, test_index: np.ndarray, source: str, path: Path) -> StrokeData:
    padded = []
    for sequences, labels in parts:
        if not len(labels) or not ((labels >= 0) & (labels < len(CLASS_NAMES))).all():
            raise DataError(f"{path} is damaged: a label is not a digit")
        x = torch.zeros(len(sequences), max(map(len, sequences)), POINT_SIZE)
        for row, points in zip(x, sequences, strict=True):
            flags = points[:, 3]
            if not len(points) or not flags[-1] or flags[:-1].any() or not np.isin(points[:, 2:], (0, 1)).all():
                raise DataError(f"{path} is damaged: a digit's end flag is not at its last point, or no flag")
            row[: len(points)] = torch.from_numpy(np.ascontiguousarray(points)).float()
        padded += [x, torch.from_numpy(np.asarray(labels)).long()]
    return StrokeData(source, *padded, torch.from_numpy(test_index))
