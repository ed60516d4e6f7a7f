"""Questions by the kind of answer they ask for (UIUC CogComp, Li and Roth 2002): six classes."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import torch

from data.mnist import DataError, DownloadError
from data.sample_texts import sample_questions
from data.text import TextData, download, read_text, sha256

DATA_FOLDER = Path(__file__).resolve().parent / "questions"
CLASS_NAMES = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
TRAIN_FILE, TEST_FILE = "train_5500.label", "TREC_10.label"
ADDRESS = "https://cogcomp.seas.upenn.edu/Data/QA/QC/"
# Of the published files, by which a download is checked and a folder's files are recognised.
PUBLISHED = {
    TRAIN_FILE: "9e4c8bdcaffb96ed61041bd64b564183d52793a8e91d84fc3a8646885f466ec3",
    TEST_FILE: "033f22c028c2bbba9ca682f68ffe204dc1aa6e1cf35dd6207f2d4ca67f0d0e8e",
}
LINE = re.compile(r"(?P<coarse>[A-Z]+):[A-Za-z]+\s+(?P<question>\S.*)")


def load_questions(data_dir: str | Path | None = None, sample: bool = False) -> TextData:
    """The questions of data_dir; without it those of data/questions, else downloaded to there, else the sample.

    Raises:
        DataError: data_dir does not hold the two files, or one is damaged.
    """
    if sample:
        return sample_questions(CLASS_NAMES)
    if data_dir is not None:
        return read_questions(_find_folder(Path(data_dir)))
    if not (DATA_FOLDER / TRAIN_FILE).exists():
        try:
            download_questions(DATA_FOLDER)
        except DownloadError as error:
            print(f"the questions are not in data/questions ({error}): using the small built-in sample")
            return sample_questions(CLASS_NAMES)
    return read_questions(_find_folder(DATA_FOLDER))


def _find_folder(folder: Path) -> Path:
    for candidate in (folder / "questions", folder):
        missing = [name for name in (TRAIN_FILE, TEST_FILE) if not (candidate / name).is_file()]
        if len(missing) == 1:
            raise DataError(f"the questions in {candidate} are incomplete: {missing[0]} is missing")
        if not missing:
            return candidate
    raise DataError(f"no questions in {folder}: it must hold {TRAIN_FILE} and {TEST_FILE}")


def read_questions(folder: Path) -> TextData:
    """Read the two files of a folder. Raises DataError if a line is damaged."""
    (train_texts, train_labels), (test_texts, test_labels) = (
        read_label_file(folder / name) for name in (TRAIN_FILE, TEST_FILE)
    )
    checksums = {name: sha256(folder / name) for name in (TRAIN_FILE, TEST_FILE)}
    source = "uiuc" if checksums == PUBLISHED else f"uiuc-{len(train_texts)}+{len(test_texts)}"
    labels = torch.tensor(train_labels), torch.tensor(test_labels)
    return TextData("questions", source, CLASS_NAMES, train_texts, labels[0], test_texts, labels[1], checksums)


def read_label_file(path: Path) -> tuple[list[str], list[int]]:
    """Questions and class numbers of a file of lines "COARSE:fine question". Raises DataError at another line."""
    texts, labels = [], []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        match = LINE.fullmatch(line.strip())
        if match is None:
            raise DataError(f"{path} is damaged in line {number}: it is not of the form COARSE:fine question")
        if match["coarse"] not in CLASS_NAMES:
            raise DataError(
                f"{path} is damaged in line {number}: {match['coarse']} is none of {', '.join(CLASS_NAMES)}"
            )
        texts.append(match["question"])
        labels.append(CLASS_NAMES.index(match["coarse"]))
    if not texts:
        raise DataError(f"{path} holds no question")
    return texts, labels


def download_questions(folder: Path) -> None:
    """Download both files to folder, both or none. Raises DownloadError if they cannot be had."""
    contents = {name: download(ADDRESS + name, checksum) for name, checksum in PUBLISHED.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
            for name, content in contents.items():
                (Path(temporary) / name).write_bytes(content)
            for name in contents:
                os.replace(Path(temporary) / name, folder / name)
    except OSError as error:
        raise DownloadError(f"{folder} cannot be written: {error.strerror}") from error
