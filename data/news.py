"""Titles of news items by section (TagMyNews): seven classes."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import torch

from data.mnist import DataError
from data.sample_texts import sample_titles
from data.text import TextData, read_text, sha256, split_by_seed

DATA_FOLDER = Path(__file__).resolve().parent / "news"
CLASS_NAMES = ("Sport", "World", "U.S.", "Business", "Health", "Entertainment", "Sci&Tech")
# How the classes are written in the original file of TagMyNews.
PUBLISHED_NAMES = ("sport", "world", "us", "business", "health", "entertainment", "sci_tech")
CSV_FILE, ORIGINAL_FILE = "news_titles.csv", "news"
ORIGINAL_LINES = 7  # of an item: title, description, link, number, date, source, class; an empty line follows
TEST_SHARE, SPLIT_SEED = 0.2, 0


def load_news(data_dir: str | Path | None = None, sample: bool = False) -> TextData:
    """The titles of data_dir; without it those of data/news, else the sample.

    They are split into training and test here, always in the same way; a title that occurs twice counts once.

    Raises:
        DataError: data_dir holds no news, or they are damaged.
    """
    if sample:
        return sample_titles(CLASS_NAMES)
    if data_dir is not None:
        return read_news(_find_file(Path(data_dir)))
    try:
        path = _find_file(DATA_FOLDER)
    except DataError:
        print(f"the news are not in data/news (as {CSV_FILE} or {ORIGINAL_FILE}): using the small built-in sample")
        return sample_titles(CLASS_NAMES)
    return read_news(path)


def _find_file(folder: Path) -> Path:
    for path in (folder / part / name for part in ("news", ".") for name in (CSV_FILE, ORIGINAL_FILE)):
        if path.is_file():
            return path
    raise DataError(f"no news in {folder}: it must hold {CSV_FILE} (CSV) or {ORIGINAL_FILE} (the file of TagMyNews)")


def read_news(path: Path) -> TextData:
    """Read a file in one of the two formats. Raises DataError if it is damaged."""
    titles, labels = (read_csv_file if path.suffix == ".csv" else read_original_file)(path)
    first = {title: position for position, title in reversed(list(enumerate(titles)))}
    kept = sorted(first.values())
    if len(kept) < 2 / TEST_SHARE:
        raise DataError(f"{path} holds only {len(kept)} different titles: too few to split")
    parts = [[kept[n] for n in part] for part in split_by_seed(len(kept), TEST_SHARE, SPLIT_SEED)]
    texts = [[titles[n] for n in part] for part in parts]
    classes = [torch.tensor([labels[n] for n in part]) for part in parts]
    checksums = {path.name: sha256(path)}
    source = f"tagmynews-{len(kept)}"
    return TextData("news", source, CLASS_NAMES, texts[0], classes[0], texts[1], classes[1], checksums)


def read_csv_file(path: Path) -> tuple[list[str], list[int]]:
    """Titles and class numbers of a CSV file without header: index, title, description, class number.

    Raises:
        DataError: a row has other fields, or a quotation mark is left open, as in a truncated file.
    """
    titles, labels = [], []
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        for row in reader:
            if not row:
                continue
            if len(row) != 4:
                raise DataError(f"{path} is damaged in line {reader.line_num}: {len(row)} fields instead of 4")
            if not row[3].strip().isdecimal() or int(row[3]) >= len(CLASS_NAMES):
                raise DataError(f"{path} is damaged in line {reader.line_num}: {row[3]!r} is no class from 0 to 6")
            if not row[1].strip():
                raise DataError(f"{path} is damaged in line {reader.line_num}: the title is empty")
            titles.append(row[1])
            labels.append(int(row[3]))
    except csv.Error as error:
        raise DataError(f"{path} is damaged in line {reader.line_num}: {error}") from error
    return titles, labels


def read_original_file(path: Path) -> tuple[list[str], list[int]]:
    """Titles and class numbers of the file of TagMyNews: seven lines an item and an empty one.

    Raises:
        DataError: the items have other lines or unknown classes.
    """
    titles, labels = [], []
    lines = read_text(path).replace("\r\n", "\n").rstrip("\n").split("\n")
    for start in range(0, len(lines), ORIGINAL_LINES + 1):
        item = lines[start : start + ORIGINAL_LINES]
        following = lines[start + ORIGINAL_LINES : start + ORIGINAL_LINES + 1]
        if len(item) < ORIGINAL_LINES or (following and following[0].strip()) or not item[0].strip():
            raise DataError(f"{path} is damaged in the item of line {start + 1}: not seven lines and an empty one")
        if item[-1].strip() not in PUBLISHED_NAMES:
            raise DataError(f"{path} is damaged in line {start + ORIGINAL_LINES}: unknown class {item[-1].strip()!r}")
        titles.append(item[0].strip())
        labels.append(PUBLISHED_NAMES.index(item[-1].strip()))
    return titles, labels
