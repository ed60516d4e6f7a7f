"""Loaders of questions and titles, tokens, vocabulary, word vectors."""

import gzip
import hashlib

import pytest
import torch

from data import news, questions, text
from data.mnist import DataError, DownloadError
from data.news import load_news, read_csv_file, read_original_file
from data.questions import load_questions, read_label_file
from data.text import Vocabulary, build_vocabulary, download, pad, read_embeddings, tokenize

LABELS = "NUM:dist How far is it from Denver to Aspen ?\nHUM:desc Who was Galileo ?\n\nDESC:def What is caf\u00e9 ?\n"
CSV = '0,goal in the cup,"a ""late"" goal",0\r\n1,"talks, again",text,1\r\n'


def write(path, content, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode(encoding))
    return path


def test_tokens():
    assert tokenize("What's  the U.S. e-mail\taddress?") == ["what", "'s", "the", "u.s", ".", "e-mail", "address", "?"]
    assert tokenize("\u201cDon\u2019t\u201d \u2603 5,000 $3") == [
        '"',
        "don",
        "'t",
        '"',
        "\u2603",
        "5",
        ",",
        "000",
        "$",
        "3",
    ]


@pytest.mark.parametrize("empty", ["", "  \n", "\x00\x07", "\u200b"])
def test_text_without_a_word(empty):
    with pytest.raises(ValueError, match="empty"):
        tokenize(empty)


def test_every_sign_ends_up_in_a_token():
    signs = "".join(chr(n) for n in range(33, 0x250) if not 127 <= n <= 160 and n != 0xAD) + "\U0001f600 \u4e2d\u6587"
    assert "".join(tokenize(signs)).lower() == "".join("".join(tokenize(" ".join(signs))).split()).lower()


def test_vocabulary_order_and_unknown_words():
    vocabulary = build_vocabulary([["b", "a", "b"], ["a", "c", "<pad>"], ["d"]], min_count=1)
    assert vocabulary.words[:4] == ["<pad>", "<unk>", "a", "b"]
    assert vocabulary.encode(["a", "never", "<unk>"]) == [2, 1, 1]
    assert "never" not in vocabulary and "a" in vocabulary
    assert len(build_vocabulary([["b", "a", "b"]], min_count=2)) == 3


@pytest.mark.parametrize("words", [["a", "b"], ["<pad>", "<unk>", "a", "a"]])
def test_bad_vocabulary(words):
    with pytest.raises(ValueError, match="different words"):
        Vocabulary(words)


def test_padding():
    padded, lengths = pad([[5], [2, 3, 4]])
    assert padded.tolist() == [[5, 0, 0], [2, 3, 4]]
    assert lengths.tolist() == [1, 3]


def test_label_file(tmp_path):
    expected = (["How far is it from Denver to Aspen ?", "Who was Galileo ?", "What is caf\u00e9 ?"], [5, 3, 1])
    for encoding in ("utf-8", "latin-1"):
        assert read_label_file(write(tmp_path / "x.label", LABELS, encoding)) == expected


@pytest.mark.parametrize("line", ["no label here", "NUM:dist", "XYZ:dist How far ?", "\x00\x01"])
def test_wrong_label_file(tmp_path, line):
    with pytest.raises(DataError, match="x.label"):
        read_label_file(write(tmp_path / "x.label", f"{LABELS}{line}\n"))


def test_questions_of_a_folder(tmp_path):
    write(tmp_path / "questions" / "train_5500.label", LABELS)
    with pytest.raises(DataError, match="TREC_10.label is missing"):
        load_questions(tmp_path)
    write(tmp_path / "questions" / "TREC_10.label", LABELS)
    data = load_questions(tmp_path)
    assert data.source == "uiuc-3+3"
    assert data.sha256["TREC_10.label"] == hashlib.sha256(LABELS.encode()).hexdigest()
    with pytest.raises(DataError, match="no questions"):
        load_questions(tmp_path / "elsewhere")


def test_download_needs_the_published_checksum(tmp_path, monkeypatch):
    class Answer:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read(self):
            return LABELS.encode()

    monkeypatch.setattr(text.urllib.request, "urlopen", lambda *_, **__: Answer())
    assert download("https://x", hashlib.sha256(LABELS.encode()).hexdigest()) == LABELS.encode()
    with pytest.raises(DownloadError, match="not the file"):
        questions.download_questions(tmp_path)
    assert not list(tmp_path.iterdir())


def test_news_are_downloaded_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    def item(n: int) -> str:
        return f"title {n}\ndescription\nlink\n{n}\ndate\nsource\n{news.PUBLISHED_NAMES[n % 7]}\n"

    whole = "\n".join(item(n) for n in range(40)).encode()
    monkeypatch.setattr(news, "DATA_FOLDER", tmp_path / "news")
    monkeypatch.setattr(news, "LEAST_ITEMS", 40)
    for content in (b"no gzip", gzip.compress(whole)[:-9], gzip.compress(whole[:900]), gzip.compress(item(0).encode())):
        monkeypatch.setattr(news, "download", lambda *_, content=content: content)
        assert load_news().source.startswith("built-in-")
        assert "built-in" in capsys.readouterr().out
        assert not (tmp_path / "news" / "news").exists()
    monkeypatch.setattr(news, "download", lambda *_: gzip.compress(whole))
    data = load_news()
    assert data.source == "tagmynews-40" and len(data.train_texts) == 32
    assert data.sha256["news"] in capsys.readouterr().out
    monkeypatch.setattr(news, "download", lambda *_: pytest.fail("it is there"))
    assert load_news().train_texts == data.train_texts
    (tmp_path / "news" / "news").write_bytes(whole[:-8])
    with pytest.raises(DataError, match="not what was downloaded"):
        load_news()


def test_without_network_the_sample_is_used(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(text.urllib.request, "urlopen", refuse)
    monkeypatch.setattr(questions, "DATA_FOLDER", tmp_path)
    monkeypatch.setattr(news, "DATA_FOLDER", tmp_path)
    for load in (load_questions, load_news):
        data = load()
        assert data.source.startswith("built-in-") and "built-in" in capsys.readouterr().out
        assert data.train_texts == load(sample=True).train_texts
        assert len(data.train_texts) + len(data.test_texts) > 200
        assert set(data.train_labels.tolist()) == set(data.test_labels.tolist()) == set(range(len(data.class_names)))
        assert not set(data.train_texts) & set(data.test_texts)


def test_csv_file(tmp_path):
    path = write(tmp_path / "news_titles.csv", CSV)
    assert read_csv_file(path) == (["goal in the cup", "talks, again"], [0, 1])


@pytest.mark.parametrize(
    "bad", ['2,title,"cut off', "2,title\r\n", "2,title,text,7\r\n", "2,title,text,x\r\n", "2, ,t,1"]
)
def test_damaged_csv_file(tmp_path, bad):
    with pytest.raises(DataError, match="line 3"):
        read_csv_file(write(tmp_path / "news_titles.csv", CSV + bad))


def test_file_of_tagmynews(tmp_path):
    item = "a title\na description\nhttp://x\n1\n2011\nnyt.com\n{}\n\n"
    path = write(tmp_path / "news", item.format("sport") + item.format("sci_tech"))
    assert read_original_file(path) == (["a title"] * 2, [0, 6])
    for bad in (item.format("gossip"), "a title\nsport\n\n", "\n" + item.format("us")):
        with pytest.raises(DataError, match="damaged"):
            read_original_file(write(path, item.format("sport") + bad))


def test_news_split_is_fixed_and_without_repetitions(tmp_path):
    rows = "".join(f"{n},title {n % 40},text,{n % 40 % 7}\n" for n in range(60))
    write(tmp_path / "news_titles.csv", rows)
    data = load_news(tmp_path)
    assert (len(data.train_texts), len(data.test_texts)) == (32, 8)
    assert len({*data.train_texts, *data.test_texts}) == 40
    assert load_news(tmp_path).test_texts == data.test_texts
    assert all(
        int(title.split()[1]) % 7 == label for title, label in zip(data.test_texts, data.test_labels, strict=True)
    )


def test_word_vectors(tmp_path):
    vocabulary = Vocabulary(["<pad>", "<unk>", "a", "b c", "d"])
    path = write(tmp_path / "glove.txt", "3 2\na 1 -2.5\nb c 0 1e-3\nother 9 9\n<unk> 4 4\n")
    vectors, known = read_embeddings(path, vocabulary)
    assert known.tolist() == [False, False, True, True, False]
    torch.testing.assert_close(vectors[2:4], torch.tensor([[1.0, -2.5], [0.0, 1e-3]]))


@pytest.mark.parametrize("bad", ["d 1\n", "d 1 x\n", "d nan 1\n", "d\n"])
def test_damaged_word_vectors(tmp_path, bad):
    vocabulary = Vocabulary(["<pad>", "<unk>", "a", "d"])
    with pytest.raises(DataError, match="line 2"):
        read_embeddings(write(tmp_path / "glove.txt", "a 1 2\n" + bad), vocabulary)


def test_word_vectors_without_a_known_word(tmp_path):
    with pytest.raises(DataError, match="no vector"):
        read_embeddings(write(tmp_path / "glove.txt", "x 1 2\n"), Vocabulary(["<pad>", "<unk>", "a"]))
