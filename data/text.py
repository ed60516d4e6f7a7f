"""Labelled texts as sequences of words: tokens, vocabulary, padding, and word vectors from a text file."""

from __future__ import annotations

import hashlib
import re
import threading
import unicodedata
import urllib.request
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from data.mnist import DataError, DownloadError

PADDING, UNKNOWN = 0, 1
SPECIAL_WORDS = ("<pad>", "<unk>")
DOWNLOAD_SECONDS = 8.0
# Longer texts are refused: the bounds of all words of a text cost about the cube of its length.
MAX_WORDS = 100

# An ending such as 's, a word or number (dots, hyphens and ampersands inside belong to it), or a single other sign.
TOKEN = re.compile(r"'(?:s|re|ve|ll|d|m|t)\b|[^\W_]+(?:[.\-&][^\W_]+)*|\S")
QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "`": "'", "\u201c": '"', "\u201d": '"'})


@dataclass(frozen=True)
class TextData:
    """A data set of short texts with labels, (N,) int64.

    Attributes:
        name: the data set; ``source`` also tells which form or part of it.
        sha256: of the files it was read from, by file name.
    """

    name: str
    source: str
    class_names: tuple[str, ...]
    train_texts: list[str]
    train_labels: Tensor
    test_texts: list[str]
    test_labels: Tensor
    sha256: dict[str, str] = field(default_factory=dict)


def tokenize(text: str) -> list[str]:
    """Words and signs of a text in lower case; every sign that is not white space ends up in a token.

    Raises:
        ValueError: there is none.
    """
    text = unicodedata.normalize("NFKC", text).translate(QUOTES).lower()
    tokens = TOKEN.findall("".join(" " if unicodedata.category(sign)[0] == "C" else sign for sign in text))
    if not tokens:
        raise ValueError("the text is empty: there is no word in it")
    return tokens


class Vocabulary:
    """Words with numbers; number 0 is the padding and 1 the vector that every unknown word gets."""

    def __init__(self, words: Sequence[str]):
        if tuple(words[:2]) != SPECIAL_WORDS or len(set(words)) != len(words):
            raise ValueError(f"a vocabulary is {', '.join(SPECIAL_WORDS)} and then different words")
        self.words = list(words)
        self._numbers = {word: number for number, word in enumerate(words) if number > UNKNOWN}

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: str) -> bool:
        return word in self._numbers

    def encode(self, tokens: Iterable[str]) -> list[int]:
        return [self._numbers.get(token, UNKNOWN) for token in tokens]


def build_vocabulary(token_lists: Iterable[Sequence[str]], min_count: int) -> Vocabulary:
    """The words that occur at least ``min_count`` times, the most frequent first, then in alphabetical order."""
    counts = Counter(token for tokens in token_lists for token in tokens)
    kept = [word for word, count in counts.items() if count >= min_count and word not in SPECIAL_WORDS]
    return Vocabulary([*SPECIAL_WORDS, *sorted(kept, key=lambda word: (-counts[word], word))])


def pad(encoded: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Word numbers (N, longest), padded at the end, and lengths (N,)."""
    lengths = torch.tensor([len(numbers) for numbers in encoded])
    padded = torch.full((len(encoded), int(lengths.max())), PADDING)
    for row, numbers in zip(padded, encoded, strict=True):
        row[: len(numbers)] = torch.tensor(numbers)
    return padded, lengths


def read_embeddings(path: Path, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """Vectors of the vocabulary's words from a text file of lines "word number number ..." (GloVe's format).

    A first line of two numbers (how many words, how many numbers) is skipped, and so are other words.

    Returns:
        (V, n) vectors, zero where the file has none, and (V,) of bool: where it has one.

    Raises:
        DataError: a line has another number of values, or they are not finite numbers.
    """
    found: dict[int, list[float]] = {}
    size = None
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            fields = line.rstrip().split(" ")
            if number == 1 and len(fields) == 2:
                continue
            size = size or len(fields) - 1
            word = " ".join(fields[:-size]) if size and len(fields) > size else None
            if size < 1 or word is None:
                raise DataError(f"{path} is damaged in line {number}: not a word and {size} numbers")
            if word in vocabulary:
                found[vocabulary.encode([word])[0]] = _numbers(fields[-size:], path, number)
    if not found:
        raise DataError(f"{path} holds no vector of a word in the vocabulary")
    vectors, known = torch.zeros(len(vocabulary), size), torch.zeros(len(vocabulary), dtype=torch.bool)
    for row, values in found.items():
        vectors[row], known[row] = torch.tensor(values), True
    return vectors, known


def _numbers(fields: Sequence[str], path: Path, line: int) -> list[float]:
    try:
        values = [float(text) for text in fields]
    except ValueError:
        values = [float("nan")]
    if not all(abs(value) < float("inf") for value in values):
        raise DataError(f"{path} is damaged in line {line}: it holds something else than finite numbers")
    return values


def read_text(path: Path) -> str:
    """A text file's content: UTF-8, or Latin-1, in which some of the published files are, if it is not that.

    Raises:
        DataError: it is no text.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    if b"\0" in content:
        raise DataError(f"{path} is no text file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def download(url: str, checksum: str | None, seconds: float = DOWNLOAD_SECONDS) -> bytes:
    """What lies at url. Raises DownloadError if it does not come within the seconds or is not what the checksum says.

    Without a checksum it is the caller's to check.
    """
    content: list[bytes] = []

    def fetch() -> None:
        try:
            with urllib.request.urlopen(url, timeout=seconds) as answer:
                content.append(answer.read())
        except (OSError, ValueError):
            return

    # In a thread, because no timeout covers the look-up of a name, which can hang for long without a network.
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(seconds)
    if not content:
        raise DownloadError("no network to download them")
    if checksum is not None and hashlib.sha256(content[0]).hexdigest() != checksum:
        raise DownloadError(f"{url} is not the file that was published")
    return content[0]


def split_by_seed(number: int, test_share: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers 0 ... number - 1 in two parts, training and test, each in increasing order."""
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()
    first = round(number * test_share)
    return sorted(order[first:]), sorted(order[:first])
