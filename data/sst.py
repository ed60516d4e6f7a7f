"""Sentences of film reviews by their sentiment (SST-2, Socher et al. 2013), and what may stand in for their words.

Two layouts are read: JSON files of {"sentence", "label", "candidates"}, as auto_LiRPA's language data, and GLUE's tsv.
``candidates`` has a list for each blank-separated word: the word itself and then its substitutes. Where there are none,
a table of synonyms, word -> list, gives them: the counter-fitted neighbours of Jia et al. (2019), or any other.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.mnist import DataError
from data.sample_reviews import SAMPLE_SYNONYMS, sample_reviews
from data.text import Vocabulary, read_text, sha256, split_by_seed, tokenize

DATA_FOLDER = Path(__file__).resolve().parent / "sst"
CLASS_NAMES = ("negative", "positive")
JSON_FILES = {part: f"sst2_{part}.json" for part in ("train", "dev", "test")}
TSV_FILES = {part: f"{part}.tsv" for part in ("train", "dev", "test")}
PHRASES_FILE = "sst2_train_phrases.tsv"
SYNONYM_FILES = ("counterfitted_neighbors.json", "synonyms.json")
HELD_BACK, SPLIT_SEED = 0.02, 0  # of GLUE's training phrases, whose test set has no labels

Synonyms = dict[str, list[str]]


@dataclass(frozen=True)
class Sentence:
    """A sentence as it is written, its class (1: positive), and for each word it and its substitutes, if given."""

    text: str
    label: int
    candidates: tuple[tuple[str, ...], ...] | None = None

    @property
    def words(self) -> list[str]:
        return words_of(self.text)


@dataclass(frozen=True)
class SentimentData:
    """Sentences in three parts, phrases of the first one, and synonyms.

    Attributes:
        phrases: shorter parts of training sentences with labels of their own; may be empty.
        sha256: of the files it was read from, by file name.
    """

    source: str
    train: list[Sentence]
    dev: list[Sentence]
    test: list[Sentence]
    phrases: list[Sentence]
    synonyms: Synonyms
    sha256: dict[str, str] = field(default_factory=dict)


def words_of(text: str) -> list[str]:
    """The blank-separated words of a sentence of the data, which is split into tokens already, in lower case."""
    return text.lower().split()


def words_of_free_text(text: str) -> list[str]:
    """Words of any text, split as the treebank does: "isn't" becomes "is", "n't".

    Raises:
        ValueError: there are none.
    """
    found: list[str] = []
    for token in tokenize(text):
        if token == "'t" and found and len(found[-1]) > 1 and found[-1].endswith("n"):
            found[-1:] = [found[-1][:-1], "n't"]
        else:
            found.append(token)
    return found


def substitutes_of(
    words: list[str],
    vocabulary: Vocabulary,
    synonyms: Synonyms,
    candidates: tuple[tuple[str, ...], ...] | None = None,
) -> list[list[str]]:
    """What each word may become: words of the vocabulary, each once; nothing for words that it does not have."""
    if candidates is None:
        lists = [synonyms.get(word, []) for word in words]
    else:
        lists = [given[1:] if given and given[0] == word else [] for word, given in zip(words, candidates, strict=True)]
    return [
        [other for other in dict.fromkeys(given) if other in vocabulary and other != word] if word in vocabulary else []
        for word, given in zip(words, lists, strict=True)
    ]


def load_sst(data_dir: Path | None = None, sample: bool = False, synonyms: Path | None = None) -> SentimentData:
    """The sentences of data_dir; without it those of data/sst, else a small made-up sample.

    ``synonyms`` is a JSON file, word -> list, which takes the place of the folder's and of all candidates.

    Raises:
        DataError: data_dir holds no such files, or one is damaged.
    """
    folder = None if sample else _find_folder(data_dir)
    if folder is None:
        if not sample:
            print("the sentences of SST-2 are not in data/sst: using the small built-in sample")
        data = _sample()
    else:
        data = read_sst(folder, needs_synonyms=synonyms is None)
    if synonyms is None:
        return data
    parts = {
        part: [Sentence(sentence.text, sentence.label) for sentence in getattr(data, part)]
        for part in ("train", "dev", "test", "phrases")
    }
    return SentimentData(
        data.source, **parts, synonyms=read_synonyms(synonyms), sha256=data.sha256 | {synonyms.name: sha256(synonyms)}
    )


def _find_folder(data_dir: Path | None) -> Path | None:
    base = DATA_FOLDER if data_dir is None else Path(data_dir)
    for folder in (base / "sst", base):
        for names in (JSON_FILES, TSV_FILES):
            there = [name for name in names.values() if (folder / name).is_file()]
            if there and len(there) < len(names):
                raise DataError(f"the sentences in {folder} are incomplete: {' and '.join(there)} alone are there")
            if there:
                return folder
    if data_dir is not None:
        wanted = f"{', '.join(JSON_FILES.values())} or GLUE's {', '.join(TSV_FILES.values())}"
        raise DataError(f"no sentences of SST-2 in {base}: it must hold {wanted}")
    return None


def read_sst(folder: Path, needs_synonyms: bool = True) -> SentimentData:
    """Read a folder in either layout. Raises DataError if a file is damaged, or no list of synonyms is there."""
    of_json = (folder / JSON_FILES["train"]).is_file()
    names = list((JSON_FILES if of_json else TSV_FILES).values())
    if of_json:
        train, dev, test = (read_json_file(folder / name) for name in names)
        phrases = read_phrases(folder / PHRASES_FILE) if (folder / PHRASES_FILE).is_file() else []
        names += [PHRASES_FILE] * bool(phrases)
    else:
        train, dev, test, phrases = _read_glue(*(folder / name for name in names))
    files = [folder / name for name in SYNONYM_FILES if (folder / name).is_file()][:1]
    if needs_synonyms and not files:
        raise DataError(f"no synonyms in {folder}: it must hold {SYNONYM_FILES[0]}, or give a file by --synonyms")
    synonyms = read_synonyms(files[0]) if files else {}
    names += [path.name for path in files]
    source = f"{'sst2' if of_json else 'glue-sst2'}-{len(train)}+{len(dev)}+{len(test)}"
    return SentimentData(source, train, dev, test, phrases, synonyms, {name: sha256(folder / name) for name in names})


def read_json_file(path: Path) -> list[Sentence]:
    """A list of {"sentence": text, "label": 0 or 1} and perhaps "candidates". Raises DataError if it is another."""
    entries = _read_json(path)
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path} is damaged: it is no list of sentences")
    return [_sentence(entry, path, number) for number, entry in enumerate(entries)]


def _sentence(entry: Any, path: Path, number: int) -> Sentence:
    where = f"{path} is damaged in entry {number}"
    if not isinstance(entry, dict) or not isinstance(entry.get("sentence"), str):
        raise DataError(f"{where}: it has no sentence")
    if entry.get("label") not in (0, 1):
        raise DataError(f"{where}: its label is {entry.get('label')!r}, not 0 or 1")
    count, candidates = len(words_of(entry["sentence"])), entry.get("candidates")
    if not count:
        raise DataError(f"{where}: the sentence is empty")
    if candidates is None:
        return Sentence(entry["sentence"], entry["label"])
    if not isinstance(candidates, list) or len(candidates) != count or not all(map(_are_words, candidates)):
        raise DataError(f"{where}: candidates must be a list of words for each of the {count} words")
    return Sentence(entry["sentence"], entry["label"], tuple(tuple(map(str.lower, given)) for given in candidates))


def _are_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def read_phrases(path: Path) -> list[Sentence]:
    """Lines "label, tab, phrase". Raises DataError at another line."""
    found = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        label, _, phrase = line.partition("\t")
        if label not in ("0", "1") or not words_of(phrase):
            raise DataError(f"{path} is damaged in line {number}: it is not of the form label, tab, phrase")
        found.append(Sentence(phrase.strip(), int(label)))
    return found


def read_tsv_file(path: Path) -> list[Sentence] | None:
    """Sentences of a file of GLUE with a header; None if it has no labels. Raises DataError if it is damaged."""
    rows = list(csv.reader(read_text(path).splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
    header = rows[0] if rows else []
    if "sentence" not in header:
        raise DataError(f"{path} is damaged: its first line must name the columns sentence and label")
    if "label" not in header:
        return None
    text, label = header.index("sentence"), header.index("label")
    found = []
    for number, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        if len(row) != len(header) or row[label] not in ("0", "1") or not words_of(row[text]):
            raise DataError(f"{path} is damaged in line {number}: not {', '.join(header)}, the label 0 or 1")
        found.append(Sentence(row[text].strip(), int(row[label])))
    return found


def _read_glue(*paths: Path) -> tuple[list[Sentence], list[Sentence], list[Sentence], list[Sentence]]:
    """Train, dev, test, phrases. GLUE's training set is one of phrases; where its test set has no labels, its dev set
    is the test set here, and a part of the phrases is held back as the dev set.
    """
    train, dev, test = (read_tsv_file(path) for path in paths)
    if not train or not dev:
        raise DataError(f"{paths[0 if not train else 1]} holds no labelled sentence")
    if test is None:
        kept, held = split_by_seed(len(train), HELD_BACK, SPLIT_SEED)
        train, dev, test = [train[n] for n in kept], [train[n] for n in held], dev
    return train, dev, test, []


def read_synonyms(path: Path) -> Synonyms:
    """A JSON file {word: [words]}, all in lower case here. Raises DataError if it is another."""
    table = _read_json(path)
    if not isinstance(table, dict) or not all(map(_are_words, table.values())):
        raise DataError(f"{path} is no table of synonyms: it must be JSON of the form word -> list of words")
    return {word.lower(): [other.lower() for other in others] for word, others in table.items() if others}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise DataError(f"{path} is damaged: it is no JSON ({error})") from error


def _sample() -> SentimentData:
    parts = [[Sentence(text, label) for text, label in part] for part in sample_reviews()]
    return SentimentData(f"built-in-{sum(map(len, parts))}", *parts, phrases=[], synonyms=dict(SAMPLE_SYNONYMS))
