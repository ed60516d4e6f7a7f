"""scripts/decide.py and the tables on a user's own model and data: what the Python interface says of them."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from mnist_files import ROOT
from own_files import LENGTHS, SHIFT, write_files
from test_bound_scripts import assert_one_line, call

from utils.attack.attack_file import replay_attack
from utils.certify import Effort, cascade, certified_radius, decide
from utils.own.loading import load_model

DECIDE, TABLE, METHODS = (
    ROOT / "scripts" / f"{name}.py" for name in ("decide", "table_certified_training", "table_methods")
)
INF = float("inf")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("own"))


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_decisions_of_a_net_and_its_labels(place, tmp_path):
    """One input is misclassified, and so its own counter-example."""
    folder, flags, model, x, labels = place
    flags = (*flags, "--data", folder / "x.npy", "--labels", folder / "y.csv", "--time-limit", 1, "--out-dir", tmp_path)
    flags = (*flags, "--p", "inf", "--eps", 0.2, "--clip", -3, 2.5)
    done = call(DECIDE, *flags)
    assert done.code == 0, done.err
    assert "on the first 5 inputs of" in done.out and "values stay in [-3, 2.5]" in done.out
    assert "5 inputs at eps 0.2 (units of the data" in done.out and "pixel" not in done.out
    rows = rows_of(tmp_path / "verdicts.csv")
    expected = decide(model, x, labels, 0.2, norm=INF, clip=(-3, 2.5), time_limit=1.0)
    for row, found in zip(rows, expected, strict=True):
        assert row["verdict"] == found.verdict
    assert rows[3]["verdict"] == "falsified" and rows[3]["label"] != rows[3]["prediction"]
    again = call(DECIDE, *flags, "--resume")
    assert again.code == 0 and "5 of 5 rows" in again.out
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["unit"] == "units of the data" and "my_model_Net, w.pt" in record["checkpoints"]


def test_decisions_of_one_score(place, tmp_path):
    folder, *_ = place
    name = f"{folder / 'my_model.py'}:one_score"
    model, x = load_model(name), place[3]
    labels = (model(x)[:, 0] > 0.5).long()
    labels[1] = 1 - labels[1]
    np.save(tmp_path / "y.npy", labels.numpy())
    flags = ("--model", name, "--data", folder / "x.npy", "--labels", tmp_path / "y.npy", "--p", 2, "--eps", 0.3)
    done = call(DECIDE, *flags, "--time-limit", 1, "--out-dir", tmp_path / "out")
    assert done.code == 0, done.err
    rows = rows_of(tmp_path / "out" / "verdicts.csv")
    expected = decide(model, x, labels, 0.3, time_limit=1.0)
    assert [row["verdict"] for row in rows] == [found.verdict for found in expected]
    assert rows[1]["verdict"] == "falsified" and rows[1]["margin"].startswith("-")
    assert_one_line(call(DECIDE, *flags, "--targeted", "--out-dir", tmp_path / "out"), "one score, and so no targets")


def test_decisions_with_further_arguments_replay_with_them(place, tmp_path):
    folder, flags, *_ = place
    name = f"{folder / 'my_model.py'}:Padded"
    model, x = load_model(name, folder / "w.pt"), place[3]
    flags = ("--model", name, *flags[2:], "--data", folder / "x.npy", "--extra", folder / "more.npz", "--p", 2)
    done = call(DECIDE, *flags, "--eps", 1.0, "--time-limit", 1, "--out-dir", tmp_path)
    assert done.code == 0, done.err
    extra = {"lengths": torch.tensor(LENGTHS), "shift": torch.tensor(SHIFT)}
    labels = model(x, **extra).argmax(dim=1)
    expected = decide(model, x, labels, 1.0, time_limit=1.0, extra=extra)
    rows = rows_of(tmp_path / "verdicts.csv")
    assert [row["verdict"] for row in rows] == [found.verdict for found in expected]
    broken = [int(row["index"]) for row in rows if row["verdict"] == "falsified"]
    assert broken
    for index in broken:
        path = tmp_path / "counterexamples" / f"{index:05d}.pt"
        replay = replay_attack(path, model)
        assert replay.margin < 0 and replay.size <= 1.0 and replay.valid
        moved = torch.load(path, weights_only=True)["perturbed"].float()
        own = slice(index, index + 1)
        assert model(moved, extra["lengths"][own], extra["shift"]).argmax() != labels[index]


def test_a_table_of_stages(place, tmp_path):
    folder, flags, model, x, labels = place
    flags = ("--models", *flags[1:], "--data", folder / "both.npz:x", "--labels", folder / "both.npz:y")
    effort = ("--steps", 10, "--total-limit", 1e-9, "--batch-size", 5)
    done = call(TABLE, *flags, "--p", "inf", "--eps", 0.02, 0.4, *effort, "--clip", -3, 2.5, "--out-dir", tmp_path)
    assert done.code == 0, done.err
    place_of = tmp_path / "certified_training_clip_own"
    text = (place_of / "table.md").read_text()
    assert (
        "Shares of all inputs" in text and "values stay in [-3, 2.5]" in text and "image" not in text.split("- made")[0]
    )
    for row in rows_of(place_of / "rows.csv"):
        how = Effort(steps=10, restarts=1, total_limit=1e-9)
        found = cascade(model, x, labels, float(row["eps"]), norm=INF, clip=(-3, 2.5), effort=how)
        letters = {"wrong": "w", "broken": "rp", "verified": "imcakb", "undecided": "-"}
        assert all(letter in letters[out] for letter, out in zip(row["outcomes"], found.outcomes, strict=True))
        assert row["outcomes"][3] == "w"


def test_a_table_of_methods(place, tmp_path):
    """Only inputs that are classified correctly have radii."""
    folder, flags, model, x, labels = place
    flags = ("--models", *flags[1:], "--data", folder / "x.npy", "--labels", folder / "y.csv", "--p", 2)
    done = call(METHODS, *flags, "--methods", "ibp", "crown", "--out-dir", tmp_path)
    assert done.code == 0, done.err
    rows = [row for row in rows_of(tmp_path / "methods_own" / "rows.csv") if row["method"] == "crown"]
    right = [0, 1, 2, 4]
    assert [int(row["index"]) for row in rows] == right
    radius = certified_radius(model, x[right], labels[right])
    found = torch.tensor([float(row["radius"]) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(found, radius, rtol=2e-3, atol=0.0)
    assert "units of the data" in (tmp_path / "methods_own" / "table.md").read_text()


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        (DECIDE, ("--model", "MODEL:Net", "--p", "inf", "--eps", "0.1"), "say by --data"),
        (DECIDE, ("--model", "rnn_4_32_tanh", "--labels", "X", "--eps", "0.1"), "--labels belongs to a model of your"),
        (DECIDE, ("--model", "rnn_4_32_tanh", "--data", "X", "--eps", "0.1"), "FILE.py:NAME"),
        (DECIDE, ("--model", "rnn_4_32_tanh", "--eps", "0.1", "--clip", "0", "2"), "so --clip is enough"),
        (DECIDE, ("--model", "MODEL:Net", "--data", "X", "--eps", "0.1", "--clip", "1"), "--clip takes LOW and HIGH"),
        (DECIDE, ("--model", "MODEL:Net", "--data", "X", "--p", "0", "--k", "1"), "give --clip LOW HIGH"),
        (TABLE, ("--models", "MODEL:Net", "--data", "X", "--p", "inf"), "give --eps"),
        (TABLE, ("--data", "X", "--p", "inf", "--eps", "0.1"), "name them by --models"),
        (METHODS, ("--models", "MODEL:Net", "MODEL:one_score", "--data", "X", "--weights", "W"), "those of one model"),
    ],
)
def test_bad_input_is_one_line(place, tmp_path, script, flags, words):
    folder = place[0]
    names = {"X": folder / "x.npy", "W": folder / "w.pt"}
    flags = [str(names.get(flag, flag)).replace("MODEL:", f"{folder / 'my_model.py'}:") for flag in flags]
    assert_one_line(call(script, *flags, "--out-dir", tmp_path / "out"), words)
    assert not (tmp_path / "out").exists()
