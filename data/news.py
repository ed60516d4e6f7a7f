"""Titles of news items by section (TagMyNews): seven classes."""

from __future__ import annotations

import csv
import gzip
import io
import os
import tempfile
import zlib
from pathlib import Path

import torch

from data.mnist import DataError, DownloadError
from data.sample_texts import sample_titles
from data.text import TextData, download, read_text, sha256, split_by_seed

DATA_FOLDER = Path(__file__).resolve().parent / "news"
CLASS_NAMES = ("Sport", "World", "U.S.", "Business", "Health", "Entertainment", "Sci&Tech")
# How the classes are written in the original file of TagMyNews.
PUBLISHED_NAMES = ("sport", "world", "us", "business", "health", "entertainment", "sci_tech")
CSV_FILE, ORIGINAL_FILE = "news_titles.csv", "news"
ORIGINAL_LINES = 7  # of an item: title, description, link, number, date, source, class; an empty line follows
TEST_SHARE, SPLIT_SEED = 0.2, 0
ADDRESS = "http://acube.di.unipi.it/repo/news.gz"  # the authors' own, without a published checksum
LEAST_ITEMS = 30_000  # of a download; some 32,000 were published
CHECKSUM_FILE = "news.sha256"


def load_news(data_dir: str | Path | None = None, sample: bool = False) -> TextData:
    """The titles of data_dir; without it those of data/news, else downloaded to there, else the sample.

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
        try:
            path = download_news(DATA_FOLDER)
        except DownloadError as error:
            print(f"the news are not in data/news ({error}): using the small built-in sample")
            return sample_titles(CLASS_NAMES)
    return read_news(path)


def download_news(folder: Path) -> Path:
    """Download the file of TagMyNews to folder, with its checksum beside it, by which later damage is noticed.

    Raises:
        DownloadError: it cannot be had, or what came is not a whole file of that format.
    """
    try:
        content = gzip.decompress(download(ADDRESS, None))
    except (OSError, EOFError, zlib.error) as error:
        raise DownloadError(f"what came from {ADDRESS} is no whole gzip file") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
            path = Path(temporary) / ORIGINAL_FILE
            path.write_bytes(content)
            count = len(read_original_file(path)[0])
            if count < LEAST_ITEMS:
                raise DownloadError(f"what came from {ADDRESS} has {count} items, not some 32,000")
            checksum = sha256(path)
            (folder / CHECKSUM_FILE).write_text(checksum + "\n")
            os.replace(path, folder / ORIGINAL_FILE)
    except DownloadError:
        raise
    except DataError as error:
        raise DownloadError(f"what came from {ADDRESS} is damaged: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise DownloadError(f"{folder} cannot be written: {error.strerror}") from error
    print(
        f"downloaded {count} news items from {ADDRESS}, SHA-256 {checksum} (its authors published none to compare with)"
    )
    return folder / ORIGINAL_FILE


def _find_file(folder: Path) -> Path:
    for path in (folder / part / name for part in ("news", ".") for name in (CSV_FILE, ORIGINAL_FILE)):
        if path.is_file():
            return path
    raise DataError(f"no news in {folder}: it must hold {CSV_FILE} (CSV) or {ORIGINAL_FILE} (the file of TagMyNews)")


def read_news(path: Path) -> TextData:
    """Read a file in one of the two formats. Raises DataError if it is damaged."""
    recorded = path.parent / CHECKSUM_FILE
    if path.name == ORIGINAL_FILE and recorded.is_file() and recorded.read_text().strip() != sha256(path):
        raise DataError(f"{path} is not what was downloaded: delete it, and {CHECKSUM_FILE}, to download it again")
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
