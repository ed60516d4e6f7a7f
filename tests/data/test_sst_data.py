"""Sentences of SST-2 in both layouts, and what may stand in for their words."""

import json

import pytest

from data.mnist import DataError
from data.sst import load_sst, read_synonyms, substitutes_of, words_of_free_text
from data.text import Vocabulary

SENTENCES = [
    {"sentence": "A lovely film .", "label": 1, "candidates": [[], ["lovely", "Fine", "grand"], ["film"], []]},
    {"sentence": "Dull .", "label": 0},
]
SYNONYMS = {"lovely": ["nice", "lovely", "fine", "fine"], "rare": ["nice"], "dull": []}


def write_json(folder, synonyms=SYNONYMS, phrases="1\ta lovely film\n0\tdull\n"):
    for part in ("train", "dev", "test"):
        (folder / f"sst2_{part}.json").write_text(json.dumps(SENTENCES))
    if synonyms is not None:
        (folder / "counterfitted_neighbors.json").write_text(json.dumps(synonyms))
    (folder / "sst2_train_phrases.tsv").write_text(phrases)
    return folder


def test_json_layout(tmp_path):
    data = load_sst(write_json(tmp_path))
    first, second = data.train
    assert first.words == ["a", "lovely", "film", "."] and (first.label, second.label) == (1, 0)
    assert first.candidates[1] == ("lovely", "fine", "grand") and second.candidates is None
    assert [(p.text, p.label) for p in data.phrases] == [("a lovely film", 1), ("dull", 0)]
    assert data.source == "sst2-2+2+2" and len(data.sha256) == 5
    (tmp_path / "outer").mkdir()
    inner = tmp_path / "outer" / "sst"
    inner.mkdir()
    write_json(inner)
    assert len(load_sst(tmp_path / "outer").test) == 2


def test_substitutes():
    vocabulary = Vocabulary(["<pad>", "<unk>", "lovely", "nice", "fine", "film"])
    words = ["lovely", "rare", "film"]
    # by the table: not the word itself, nothing twice, and nothing for a word that is unknown
    assert substitutes_of(words, vocabulary, SYNONYMS) == [["nice", "fine"], [], []]
    # candidates of the sentence go before; "grand" is outside the vocabulary
    given = (("lovely", "fine", "grand"), ("rare", "nice"), ())
    assert substitutes_of(words, vocabulary, SYNONYMS, given) == [["fine"], [], []]
    # a list that begins with another word says that this one is not replaceable
    assert substitutes_of(["film"], vocabulary, SYNONYMS, (("films", "fine"),)) == [[]]


def test_glue_layout(tmp_path):
    lines = [f"phrase {number}\t{number % 2}" for number in range(100)]
    (tmp_path / "train.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    (tmp_path / "dev.tsv").write_text('sentence\tlabel\na "lovely film\t1\n')
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\tno labels here\n")
    with pytest.raises(DataError, match="--synonyms"):
        load_sst(tmp_path)
    (tmp_path / "mine.json").write_text('{"Lovely": ["Fine"]}')
    data = load_sst(tmp_path, synonyms=tmp_path / "mine.json")
    assert (len(data.train), len(data.dev), len(data.test)) == (98, 2, 1)
    assert data.test[0].words == ["a", '"lovely', "film"] and data.synonyms == {"lovely": ["fine"]}
    (tmp_path / "test.tsv").write_text("sentence\tlabel\nwith a label\t0\n")
    assert load_sst(tmp_path, synonyms=tmp_path / "mine.json").test[0].text == "with a label"


def test_own_synonyms_take_the_place_of_candidates(tmp_path):
    (tmp_path / "mine.json").write_text('{"film": ["movie"]}')
    data = load_sst(write_json(tmp_path), synonyms=tmp_path / "mine.json")
    assert data.train[0].candidates is None and data.synonyms == {"film": ["movie"]}


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ({"label": 1}, "no sentence"),
        ({"sentence": "good", "label": 2}, "label"),
        ({"sentence": " ", "label": 1}, "empty"),
        ({"sentence": "a b", "label": 1, "candidates": [["a"]]}, "candidates"),
        ({"sentence": "a", "label": 1, "candidates": [[3]]}, "candidates"),
    ],
)
def test_damaged_json(tmp_path, entry, part):
    write_json(tmp_path)
    (tmp_path / "sst2_dev.json").write_text(json.dumps([SENTENCES[0], entry]))
    with pytest.raises(DataError, match=part):
        load_sst(tmp_path)


def test_other_damage(tmp_path):
    with pytest.raises(DataError, match="no sentences of SST-2"):
        load_sst(tmp_path)
    write_json(tmp_path, phrases="1\ta film\nx\tdull\n")
    with pytest.raises(DataError, match="line 2"):
        load_sst(tmp_path)
    (tmp_path / "sst2_dev.json").unlink()
    with pytest.raises(DataError, match="incomplete"):
        load_sst(tmp_path)
    (tmp_path / "bad.json").write_text('{"a": "b"}')
    with pytest.raises(DataError, match="word -> list"):
        read_synonyms(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(DataError, match="no JSON"):
        read_synonyms(tmp_path / "bad.json")


def test_built_in_sample():
    data = load_sst(sample=True)
    assert data.source.startswith("built-in") and min(len(data.train), len(data.dev), len(data.test)) > 40
    texts = [sentence.text for part in (data.train, data.dev, data.test) for sentence in part]
    assert len(set(texts)) == len(texts)
    assert sum(any(word in data.synonyms for word in sentence.words) for sentence in data.test) > 40


def test_words_of_any_text_are_those_of_the_treebank():
    assert words_of_free_text("It isn't bad, can't be.") == ["it", "is", "n't", "bad", ",", "ca", "n't", "be", "."]
    assert words_of_free_text("n't 'tis") == ["n", "'t", "'", "tis"]
    with pytest.raises(ValueError, match="empty"):
        words_of_free_text("  ")
