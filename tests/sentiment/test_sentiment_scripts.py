"""The scripts of sentences, run tiny: training, its continuation, and bounds."""

import json
import re

import pytest
import torch
from scripts_in_process import fail, succeed

from utils.runs.rows import read_rows
from utils.sentiment.bounding.rows import BOUNDS, CERTIFIED, FALSIFIED, SentenceRow, by_sentence, read_sentences
from utils.sentiment.bounding.word_radii import RadiusRow
from utils.training.text_models import load_text_model

SIZES = ["--hidden-size", 4, "--embedding-size", 4, "--threads", 1]
TRAIN = [*SIZES, "--sample", "--epochs", 1, "--sentence-epochs", 8, "--lr", 0.05, "--dropout", 0, "--batch-size", 16]
METHODS = ["--methods", "ibp", "crown-ibp", "decide"]
BOUND = [*SIZES, *METHODS, "--sample", "--N", 12, "--budgets", 1, 2, "all", "--time-limit", 1, "--batch-size", 4]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for architecture in ("gru", "transformer"):
        script = f"{architecture}/train_{architecture}_sentiment_classifier.py"
        assert "test sentences of built-in" in succeed(script, *TRAIN, "--save-dir", folder, cwd=folder)
    return folder


def test_checkpoint_has_its_words(models):
    content = torch.load(models / "transformer_1_4_d4" / "transformer", weights_only=True)
    config = content["config"]
    assert config["vocabulary"][:2] == ["<pad>", "<unk>"] and config["dataset"] == "sst2"
    assert config["embeddings"].dtype == torch.float16 and len(config["embeddings"]) == len(config["vocabulary"])
    assert config["test_accuracy"] > 0.6 and config["class_names"] == ["negative", "positive"]


def test_a_training_that_is_resumed_ends_with_the_same_weights(models, tmp_path, monkeypatch):
    from utils.sentiment.training import train

    whole = torch.load(models / "gru_4_d4" / "gru", weights_only=True)
    flags = [*TRAIN, "--save-dir", tmp_path]
    original, calls = train.train_epoch, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*arguments)

    script = "gru/train_gru_sentiment_classifier.py"
    with monkeypatch.context() as patched:
        patched.setattr(train, "train_epoch", interrupted)
        from scripts_in_process import run

        code, _, errors = run(script, *flags, cwd=tmp_path)
        assert code == 130 and "4 of 9 epochs" in errors
    succeed(script, *flags, "--resume", cwd=tmp_path)
    resumed = torch.load(tmp_path / "gru_4_d4" / "gru", weights_only=True)
    for name, value in whole["state_dict"].items():
        torch.testing.assert_close(resumed["state_dict"][name], value, rtol=1e-5, atol=1e-7)


def test_flags_that_do_not_fit(models, tmp_path):
    script = "lstm/train_lstm_sentiment_classifier.py"
    flags = [*TRAIN, "--save-dir", tmp_path]
    assert "--certified" in fail(script, *flags, "--kappa", 1, 0, cwd=tmp_path)
    assert "budget" in fail(script, *flags, "--certified", "ibp", "--train-budget", 3, cwd=tmp_path)
    assert "ramp" in fail(script, *flags, "--certified", "ibp", "--clean-share", 0.9, cwd=tmp_path)
    assert "no sentences" in fail(script, *SIZES, "--data-dir", tmp_path, "--save-dir", tmp_path, cwd=tmp_path)
    assert not list(tmp_path.iterdir())
    out = succeed(script, *flags, "--dry-run", cwd=tmp_path)
    assert "nothing written" in out and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def bounded(models):
    for architecture in ("gru", "transformer"):
        script = f"{architecture}/bound_{architecture}_sentiment.py"
        succeed(script, *BOUND, "--work-dir", models, cwd=models)
    return {
        "gru": models / "gru_4_d4" / "substitution_bound_ibp_crown-ibp_decide",
        "transformer": models / "transformer_1_4_d4" / "substitution_bound_ibp_crown-ibp_decide",
    }


@pytest.mark.parametrize("architecture", ["gru", "transformer"])
def test_sentences_are_bounded(bounded, architecture):
    folder = bounded[architecture]
    rows, _ = read_rows(folder / "certified_bound.csv", SentenceRow)
    assert len(rows) == 36 and {row.budget for row in rows} == {1, 2, "all"}
    right = [row for row in rows if row.margin > 0]
    assert 12 < len(right) <= 36 and any(row.verdict == CERTIFIED for row in right)
    for row in right:
        assert row.attack <= row.margin + 1e-9 and row.exact
        assert all(row.bound(method) <= row.attack + 1e-9 * (1 + abs(row.attack)) for method in BOUNDS)
        assert row.decided == (CERTIFIED if row.attack > 0 else FALSIFIED)  # complete, on sentences this short
    for group in by_sentence(right):  # a second method is asked of what the first leaves open
        proved = all(row.bound("ibp") > 0 for row in group)
        assert all((row.bound("crown-ibp") == -float("inf")) == proved for row in group)
    sentences = {shown.index: shown for shown in read_sentences(folder)}
    for row in rows:  # what replaces a word is one of its substitutes
        for place, word in re.findall(r"(\d+):(\S+)", row.replaced):
            assert word in sentences[row.index].substitutes[int(place)]
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "finished" and "vocabulary" not in record["model"]["config"]
    for found in record["summary"]["budgets"]:
        assert found["verified"] <= found["attacked"] <= found["clean"]
    page = (folder / "sentences.html").read_text(encoding="utf-8")
    assert page.count("<section>") == 12 and "<script" not in page and "http" not in page


def test_a_bound_above_a_margin_stops_the_run(bounded, models, tmp_path, monkeypatch):
    """The attack catches a bound that is wrong."""
    from scripts_in_process import run

    from utils.sentiment.bounding import question

    right = question.lowest_margins
    monkeypatch.setattr(question, "lowest_margins", lambda *given: right(*given) + 100.0)
    flags = [*BOUND, "--work-dir", models, "--out-dir", tmp_path / "out", "--methods", "ibp"]
    code, _, errors = run("gru/bound_gru_sentiment.py", *flags, cwd=tmp_path)
    assert code == 3 and "CONTRADICTION" in errors


def test_a_run_is_resumed_and_given_text_is_read(bounded, models, tmp_path):
    folder = bounded["gru"]
    path = folder / "certified_bound.csv"
    whole = path.read_text(encoding="utf-8")
    path.write_text("".join(whole.splitlines(keepends=True)[:8]), encoding="utf-8")
    flags = [*BOUND, "--work-dir", models]
    assert "7 of 36 rows" in succeed("gru/bound_gru_sentiment.py", *flags, "--resume", cwd=tmp_path)
    timeless = [re.sub(r"\b\d+\.\d{6}\b", "", text) for text in (whole, path.read_text(encoding="utf-8"))]
    assert timeless[0] == timeless[1]
    text = ["--text", "A lovely film <b>; it isn't \u2603 !", "--text", "dull", "--methods", "crown-ibp"]
    given = [*SIZES, "--sample", "--work-dir", models, *text]
    out = succeed("gru/bound_gru_sentiment.py", *given, cwd=tmp_path)
    assert "a lovely film < b > ; it is n't" in out
    found = models / "gru_4_d4" / "substitution_bound_text_crown-ibp"
    assert len(read_rows(found / "certified_bound.csv", SentenceRow)[0]) == 8
    assert "&lt;" in (found / "sentences.html").read_text(encoding="utf-8")
    for arguments, part in (
        (["--text", "good", "--N", 3], "--N"),
        (["--text", " "], "empty"),
        (["--N", 100000], "100000"),
        (["--recipe", "ibp"], "--certified ibp"),
        (["--embedding-size", 9], "train_gru_sentiment_classifier.py"),
    ):
        flags = [*SIZES, "--sample", "--work-dir", models, *arguments]
        assert part in fail("gru/bound_gru_sentiment.py", *flags, cwd=tmp_path)


def test_without_an_attack(bounded, models, tmp_path):
    flags = [*BOUND, "--work-dir", models, "--out-dir", tmp_path / "out", "--no-attack", "--every-method"]
    succeed("gru/bound_gru_sentiment.py", *flags, cwd=tmp_path)
    rows, _ = read_rows(tmp_path / "out" / "certified_bound.csv", SentenceRow)
    attacked, _ = read_rows(bounded["gru"] / "certified_bound.csv", SentenceRow)
    for row, other in zip(rows, attacked, strict=True):  # decisions are complete, and so the same
        assert row.verdict == other.verdict and (row.margin <= 0 or row.bound("crown-ibp") > -float("inf"))


def test_certificates_of_sentences(models, tmp_path, capsys):
    from test_certificate import run_checker

    flags = [*SIZES, "--sample", "--work-dir", models, "--N", 4, "--max-words", 6, "--budgets", 1, "all"]
    flags += ["--out-dir", tmp_path / "out", "--save-certificate"]
    out = succeed("gru/bound_gru_sentiment.py", *flags, cwd=tmp_path)
    assert "check_certificate.py" in out
    rows, _ = read_rows(tmp_path / "out" / "certified_bound.csv", SentenceRow)
    files = {path.name for path in (tmp_path / "out" / "certificates").glob("sample_*.npz")}
    proved = {f"sample_{row.index:05d}_{row.budget}.npz" for row in rows if row.best_bound > 0}
    certified = {f"sample_{row.index:05d}_{row.budget}.npz" for row in rows if row.verdict == CERTIFIED}
    assert proved and proved <= files <= certified
    code, out, errors = run_checker(capsys, tmp_path / "out" / "certificates")
    assert code == 0 and errors == "" and out.count("each by one of its own list") == len(files)
    assert "--radii" in fail("gru/bound_gru_sentiment.py", *flags, "--radii", 2, cwd=tmp_path)


def test_radii_of_single_words(models, tmp_path):
    flags = [
        *SIZES,
        "--sample",
        "--work-dir",
        models,
        "--text",
        "a lovely film",
        "--out-dir",
        tmp_path / "out",
        "--radii",
        2,
    ]
    out = succeed("transformer/bound_transformer_sentiment.py", *flags, "--methods", "crown", cwd=tmp_path)
    rows, _ = read_rows(tmp_path / "out" / "certified_bound.csv", RadiusRow)
    assert "mean radius" in out and any(row.radius > 0 for row in rows)
    model = load_text_model(models / "transformer_1_4_d4" / "transformer")
    classifier, chance = model.classifier.double(), torch.Generator().manual_seed(0)
    for row in rows:  # points on the ball keep the class
        words = [other.word for other in rows if other.index == row.index]
        x = model.embeddings[model.vocabulary.encode(words)].double().repeat(200, 1, 1)
        step = torch.randn(200, 4, generator=chance, dtype=torch.float64)
        x[:, row.position] += row.radius * step / step.norm(dim=1, keepdim=True)
        assert bool((classifier(x).argmax(dim=1) == row.label).all())
        assert 0 <= row.covered <= row.substitutes


def test_certified_training(tmp_path):
    script = "lstm/train_lstm_sentiment_classifier.py"
    flags = [*SIZES, "--sample", "--epochs", 0, "--sentence-epochs", 2, "--lr", 0.05, "--batch-size", 200]
    for recipe in ("ibp", "mixed"):
        succeed(script, *flags, "--certified", recipe, "--save-dir", tmp_path, cwd=tmp_path)
        config = torch.load(tmp_path / f"lstm_4_d4_{recipe}" / "lstm", weights_only=True)["config"]
        assert config["certified"]["loss"] == recipe
