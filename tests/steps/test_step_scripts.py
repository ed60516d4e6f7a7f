"""The bound scripts for words and strokes: killed and resumed, shared by processes, refused."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch._dynamo  # can be imported only once, but call() below makes a script's imports undone
from elsewhere import DEVICE, SecondDevice
from kill_runs import rows_of
from mnist_files import ROOT, run_script
from test_bound_scripts import Outcome, assert_one_line, call
from test_interrupted_runs import TORCHRUN, wait_for, worker_of

from data.questions import load_questions
from data.strokes import CLASS_NAMES, load_strokes, write_strokes
from data.text import Vocabulary, tokenize
from utils.network.checkpoint import build_model, save_checkpoint
from utils.runs.lock import locked
from utils.runs.results import CSV_NAME, part_path, read_record
from utils.runs.rows import read_rows
from utils.steps import stroke_bounds, word_bounds
from utils.steps.stroke_bounds import PointRow
from utils.steps.word_results import WordRow, read_results
from utils.training.strokes import predict_strokes

HIDDEN, VECTORS = 3, 4
TEXTS = ("What , where ?", "Who is \u2603 ?", "How ?", "What is the name ?")


def make_checkpoint(path: Path, input_size: int, classes: tuple[str, ...], seed: int = 0, **changes):
    """A tiny untrained GRU whose predictions differ."""
    config = {
        "architecture": "gru",
        "input_size": input_size,
        "num_frames": 5,
        "hidden_size": HIDDEN,
        "num_layers": 1,
        "num_classes": len(classes),
        "bidirectional": False,
        "bias": True,
        "activation": None,
        "pooling": "last",
        "input_mean": 0.0,
        "input_std": 1.0,
        "class_names": list(classes),
    } | changes
    torch.manual_seed(seed)
    model = build_model(config)
    model.head.weight.data *= 4
    save_checkpoint(path, model, config)
    return model


@dataclass
class Place:
    """A work folder with one checkpoint, and the flags of a short run."""

    script: str
    work: Path
    flags: tuple

    @property
    def checkpoint(self) -> Path:
        return next(path for path in self.work.rglob("gru") if path.is_file())

    @property
    def folder(self) -> Path:
        text = "_text" * ("--text" in self.flags)
        return self.checkpoint.parent / f"2_norm_bound{text}_crown_plane"

    @property
    def arguments(self) -> list[str]:
        return list(map(str, (*self.flags, "--work-dir", self.work, "--threads", 1)))

    def bound(self, *arguments: object) -> Outcome:
        return call(self.script, *self.arguments, *arguments)

    def start(self, processes: int, *flags: str) -> subprocess.Popen:
        command = [*TORCHRUN, str(processes), str(ROOT / self.script), *self.arguments, *flags]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def copy(self, folder: Path, results: bool = False) -> Place:
        shutil.copytree(self.work, folder / "copy")
        copied = Place(self.script, folder / "copy", self.flags)
        if not results:
            shutil.rmtree(copied.folder)
        return copied


def make_words(folder: Path) -> Place:
    data = load_questions(sample=True)
    tokens = sorted({token for text in data.train_texts for token in tokenize(text)})[:60]
    words = ["<pad>", "<unk>", *tokens]
    vectors = torch.randn(len(words), VECTORS, generator=torch.Generator().manual_seed(0)).half()
    path = folder / "work" / f"gru_{HIDDEN}_d{VECTORS}" / "gru"
    make_checkpoint(path, VECTORS, data.class_names, vocabulary=Vocabulary(words).words, embeddings=vectors)
    flags = ("--hidden-size", HIDDEN, "--embedding-size", VECTORS, "--tol", 0.5, "--save-every", 1)
    texts = itertools.chain.from_iterable(("--text", text) for text in TEXTS)
    return Place("gru/bound_gru_question.py", folder / "work", (*flags, *texts))


def make_strokes(folder: Path, seed: int = 0, digits: int = 8) -> Path:
    """Made-up strokes whose labels are what the checkpoint says, but for the first one."""
    chance = np.random.default_rng(seed)
    sequences = []
    for length in chance.integers(2, 6, digits):
        points = chance.integers(-3, 4, (length, 4))
        points[:, 2:] = 0
        points[-1, 2:] = 1
        sequences.append(points)
    model = make_checkpoint(folder / "work" / f"gru_{HIDDEN}" / "gru", 4, CLASS_NAMES)
    folder = folder / f"data_{seed}"
    folder.mkdir()
    write_strokes(folder / "strokes.npz", dict.fromkeys(("train", "test"), (sequences, np.zeros(digits))), "made up")
    labels = predict_strokes(model, load_strokes(folder).test_x).numpy()
    labels[0] = (labels[0] + 1) % 10
    write_strokes(folder / "strokes.npz", dict.fromkeys(("train", "test"), (sequences, labels)), "made up")
    return folder


def make_points(folder: Path) -> Place:
    data = make_strokes(folder)
    flags = ("--data-dir", data, "--hidden-size", HIDDEN, "--tol", 0.5, "--N", 8, "--save-every", 1)
    return Place("gru/bound_gru_stroke.py", folder / "work", flags)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    place = make_words(tmp_path_factory.mktemp("words"))
    outcome = place.bound("--compare")
    assert outcome.code == 0, outcome
    return place


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    place = make_points(tmp_path_factory.mktemp("points"))
    outcome = place.bound()
    assert outcome.code == 0, outcome
    return place


def test_a_row_for_every_word_and_every_relaxation(words):
    rows, sentences = read_results(words.folder)
    assert [sentence.text for sentence in sentences] == list(TEXTS)
    assert len(rows) == sum(sentence.words for sentence in sentences)
    for row in rows:
        assert row.plane_radius == row.radius and row.line_radius > 0 and row.constant_radius > 0
        assert row.text_radius in {sentence.radius for sentence in sentences if sentence.index == row.index}
    record = read_record(words.folder)
    table = {entry["relaxation"]: entry for entry in record["summary"]["relaxations"]}
    assert table["line"]["mean_radius"] == pytest.approx(np.mean([row.line_radius for row in rows]))
    assert table["plane"]["covered_pairs"] == sum(row.covered for row in rows)
    assert record["status"] == "finished" and record["processes"] == 1


def test_points_of_a_gru(points):
    rows, _ = read_rows(points.folder / CSV_NAME, PointRow)
    assert len({row.index for row in rows}) == 7 and all(0 < row.radius <= row.attack for row in rows)
    assert {path.name for path in points.folder.iterdir()} == {CSV_NAME, "run.json", "strokes.png", "summary.png"}


@pytest.mark.parametrize(
    "make, flags",
    [(make_words, ("--no-attack",)), pytest.param(make_points, ("--no-attack",), marks=pytest.mark.full)],
)
def test_killed_at_random_points_a_run_resumes_to_the_same_rows(tmp_path, make, flags):
    place = make(tmp_path)
    result = run_script("tests/kill_runs.py", 4, 0, ROOT / place.script, *place.arguments, *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr + result.stdout
    assert re.search(r"killed [4-9] times", result.stdout), result.stdout


@pytest.mark.parametrize("name, kind", [("words", WordRow), ("points", PointRow)])
def test_half_a_row_is_found_again(request, tmp_path, name, kind):
    finished = request.getfixturevalue(name)
    place = finished.copy(tmp_path, results=True)
    flags = ("--compare",) * (name == "words")
    content = (place.folder / CSV_NAME).read_bytes()
    ends = [n + 1 for n, byte in enumerate(content) if byte == ord("\n")]
    cut = (ends[3] + ends[4]) // 2
    (place.folder / CSV_NAME).write_bytes(content[:cut])
    assert len(read_rows(place.folder / CSV_NAME, kind)[0]) == 3
    outcome = place.bound(*flags, "--resume")
    assert outcome.code == 0 and f"resuming: 3 of {len(ends) - 1} rows" in outcome.out, outcome
    assert rows_of(place.folder) == rows_of(finished.folder)
    lines = (place.folder / CSV_NAME).read_bytes().split(b"\n")
    assert lines[:4] == content.split(b"\n")[:4]  # with their times: what was there is not done again


def test_another_run_is_not_resumed(words, points, tmp_path):
    place = words.copy(tmp_path / "words", results=True)
    before = rows_of(place.folder)
    for flags, words_of in (
        (("--compare", "--text", "Who ?"), ("--text was ['What , where ?', ",)),
        ((), ("--compare was True",)),
        (("--compare", "--tol", 0.25), ("--tol was 0.5, now it is 0.25",)),
        (("--compare", "--save-every", 2), ("--save-every was 1",)),
        (("--compare", "--no-attack"), ("--no-attack was False",)),
    ):
        assert_one_line(place.bound(*flags, "--resume"), "cannot resume", *words_of)
    content = torch.load(place.checkpoint, weights_only=True)
    content["state_dict"]["head.bias"] += 1e-4
    torch.save(content, place.checkpoint)
    assert_one_line(place.bound("--compare", "--resume"), "the checkpoint's sha256 was")
    assert rows_of(place.folder) == before

    place = points.copy(tmp_path / "points", results=True)
    before = rows_of(place.folder)
    others = make_strokes(tmp_path / "others", seed=1)
    assert_one_line(place.bound("--data-dir", others, "--resume"), "the drawn samples' sha256 was")
    with locked(place.folder):
        assert_one_line(place.bound(), "in use by another run")
    path = place.folder / CSV_NAME
    path.write_text(path.read_text().replace(",", ";", 30))
    assert_one_line(place.bound("--resume"), CSV_NAME)
    assert rows_of(points.folder) == before


@pytest.mark.full  # test_interrupted_runs.py and test_decide.py have the same of others: one function shares rows
@pytest.mark.real_rounding
def test_two_processes_give_the_rows_of_one(words, tmp_path):
    place = words.copy(tmp_path)
    run = place.start(2, "--compare")
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    assert out.count("to certify") == 1, "the first process alone should print"
    assert rows_of(place.folder) == rows_of(words.folder)
    assert read_record(place.folder)["processes"] == 2
    assert {path.name for path in place.folder.iterdir()} == {path.name for path in words.folder.iterdir()}


@pytest.mark.full  # test_interrupted_runs.py has the same of the bound scripts: one function writes the rows
@pytest.mark.real_rounding
def test_what_a_killed_process_finished_is_kept(points, tmp_path):
    place = points.copy(tmp_path)
    data = make_strokes(tmp_path / "more", seed=2, digits=20)
    flags = ("--data-dir", str(data), "--N", "20", "--tol", "1e-3", "--no-attack")
    run = place.start(2, *flags)
    parts = [part_path(place.folder / CSV_NAME, rank) for rank in range(2)]
    try:
        wait_for(lambda: all(path.exists() and path.read_bytes().count(b"\n") > 1 for path in parts), run)
        os.kill(worker_of(run, 1), signal.SIGKILL)
    finally:
        _, err = run.communicate(timeout=60)
    assert run.returncode != 0, err
    before = [line for path in parts for line in path.read_text().splitlines()[1:]]
    outcome = place.bound(*flags, "--resume")
    assert outcome.code == 0 and f"resuming: {len(before)} of " in outcome.out, outcome
    lines = (place.folder / CSV_NAME).read_text().splitlines()
    assert len(lines) > len(before) and all(line in lines for line in before)
    alone = points.copy(tmp_path / "alone")
    assert alone.bound(*flags).code == 0 and rows_of(alone.folder) == rows_of(place.folder)


def as_number(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


@pytest.mark.parametrize("make, module", [(make_words, word_bounds), (make_points, stroke_bounds)])
def test_all_happens_on_the_device_that_was_asked_for(tmp_path, make, module):
    place = make(tmp_path)
    place.flags = place.flags[: 8 if module is word_bounds else None]
    place.flags += ("--text", "How ?") if module is word_bounds else ("--N", 2)
    assert place.bound().code == 0
    reference = rows_of(place.folder)
    with (
        mock.patch.object(module, "apply_common_arguments", return_value=DEVICE),
        mock.patch("utils.bounds.memory.free_bytes", return_value=2**30),
        SecondDevice(),
    ):
        outcome = place.bound()
    assert outcome.code == 0, outcome
    assert read_record(place.folder)["device"] == str(DEVICE) and len(reference) > 2
    # A device's kernels round otherwise: 1e-7 in the float32 that foretells radii, and some hundred times that in them.
    for row, expected in zip(rows_of(place.folder), reference, strict=True):
        assert [as_number(cell) for cell in row] == [
            pytest.approx(value, rel=1e-4, nan_ok=True) if isinstance(value, float) else value
            for value in map(as_number, expected)
        ]


def test_the_pretended_device_tells_what_lies_on_the_wrong_one():
    with SecondDevice():
        there, here = torch.ones(3, device=DEVICE), torch.ones(3)
        assert (there + 1).device == DEVICE and there.sum().item() == 3 and there.to("cpu").device != DEVICE
        for mix in (lambda: there + here, lambda: here[there.long()], lambda: there.index_put_((here.long(),), here)):
            with pytest.raises(AssertionError):
                mix()
