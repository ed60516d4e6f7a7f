"""The table of models trained to be verified, run tiny: rows, summary, models found by their recipe, contradictions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from unittest import mock

import pytest
import torch
from mnist_files import ROOT, write_mnist_folder
from test_bound_scripts import Outcome, assert_one_line, call, make_checkpoint
from test_tables import FILES, rows_of

from data.mnist import as_frames, load_mnist
from utils.attack.attack_file import replay_attack
from utils.attack.pgd import pgd
from utils.certify import cascade, certified_margin
from utils.experiments import table_arguments
from utils.network.checkpoint import load_checkpoint, save_checkpoint
from utils.training.certified.arguments import recipe_facts
from utils.training.certified.recipe import Recipe

SCRIPT = str(ROOT / "scripts" / "table_certified_training.py")
EPS = 0.02
RECIPE = recipe_facts(Recipe("ibp", eps=EPS))
NAME = "rnn_4_16_relu"
EFFORT = ("--steps", 10, "--time-limit", 0.05, "--total-limit", 1e-9)  # none of what depends on time


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an ordinary model and one that is trained by its intervals, and their images."""
    folder = tmp_path_factory.mktemp("certified_training")
    data = write_mnist_folder(folder / "mnist", train=100)
    images = load_mnist(data)
    ordinary = train(make_checkpoint(folder / "models", hidden_size=16, activation="relu"), images, 0.0)
    path = folder / "models" / f"{NAME}_ibp_inf_{EPS}" / "rnn"
    path.parent.mkdir()
    model, config = load_checkpoint(ordinary)
    save_checkpoint(path, model, config | RECIPE)
    return [ordinary, train(path, images, 1.5 * EPS)], data


def train(path: Path, images, eps: float) -> Path:
    """Some steps by the margins' bounds at eps."""
    model, config = load_checkpoint(path)
    x, labels = as_frames(images.train_x, 4), images.train_y
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(60):
        margins = certified_margin(model, x, labels, eps * min(1.0, step / 30), norm=math.inf, method="ibp")
        loss = torch.log1p((-margins).exp().sum(dim=1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_checkpoint(path, model, config)
    return path


def run(place, out: Path, *flags: object, models=None, images: int = 20) -> Outcome:
    own, data = place
    named = ("--models", *(own if models is None else models)) if models != () else ()
    common = (*named, "--data-dir", data, "--out-dir", out, "--threads", 1, "--N", images)
    return call(SCRIPT, *common, "--batch-size", 8, *EFFORT, *flags)


def shares(letters: str, kinds: str) -> float:
    return sum(letter in kinds for letter in letters) / len(letters)


def test_a_table_is_written_and_resumed(place, tmp_path):
    done = run(place, tmp_path, "--eps", EPS, 0.01)
    assert done.code == 0 and done.err == "", done.err
    folder = tmp_path / "certified_training"
    assert {path.name for path in folder.iterdir()} == FILES
    rows, summary = rows_of(folder / "rows.csv"), rows_of(folder / "summary.csv")
    assert len(rows) == 2 * 2 * 3 and all(len(row["outcomes"]) == int(row["images"]) for row in rows)
    assert len(summary) == 4 and {record["recipe"] for record in summary} == {"ordinary", "ibp, l_∞ 0.02"}
    for record in summary:
        own = [row for row in rows if (row["model"], row["eps"]) == (record["model"], record["eps"])]
        letters = "".join(row["outcomes"] for row in own)
        clean, unbroken = 1 - shares(letters, "w"), 1 - shares(letters, "wrp")
        assert float(record["clean"]) == pytest.approx(clean) and float(record["pgd"]) == pytest.approx(unbroken)
        assert float(record["verified"]) == pytest.approx(shares(letters, "imcakb"))
        ratio = shares(letters, "imcakb") / unbroken if unbroken > 1e-9 else 1.0
        assert float(record["verified_of_unbroken"]) == pytest.approx(ratio)
        assert float(record["settled_by_ibp"]) == pytest.approx(shares(letters, "i"))
        assert int(record["tried_by_clean"]) == 20 and int(record["tried_by_ibp"]) == round(20 * clean)
        check_letters(place, record, letters)
    at_eps = {record["recipe"]: float(record["verified"]) for record in summary if float(record["eps"]) == EPS}
    assert at_eps["ibp, l_∞ 0.02"] > at_eps["ordinary"]
    text = (folder / "table.md").read_text()
    assert "python scripts/table_certified_training.py" in text and "l_∞, a ball around every slice" in text
    assert "verified / PGD" in text and "crown-ibp" in text and "pixel values in [0, 1]" in text
    assert (folder / "figure.png").stat().st_size > 5000

    content, record = (folder / "rows.csv").read_bytes(), json.loads((folder / "run.json").read_text())
    (folder / "rows.csv").write_bytes(content[: int(0.5 * len(content))])
    (folder / "run.json").write_text(json.dumps(record | {"status": "running"}))
    assert run(place, tmp_path, "--eps", EPS, 0.01, "--resume").code == 0
    assert rows_of(folder / "rows.csv") == rows
    assert_one_line(run(place, tmp_path, "--eps", EPS, "--resume"), "cannot resume", "--eps was")


def check_letters(place, record: dict, letters: str) -> None:
    """The letters are of the images by their numbers, and true of them."""
    path = next(path for path in place[0] if path.parent.name.endswith("0.02") == (record["recipe"] != "ordinary"))
    model, data = load_checkpoint(path)[0], load_mnist(place[1])
    index = torch.randperm(50, generator=torch.Generator().manual_seed(0))[:20].sort().values
    x, labels, eps = as_frames(data.test_x[index], 4), data.test_y[index], float(record["eps"])
    right = model(x).argmax(dim=1) == labels
    assert [letter == "w" for letter in letters] == (~right).tolist()
    verified = torch.tensor([letter in "imcakb" for letter in letters])
    broken = torch.tensor([letter in "rp" for letter in letters])
    attack = pgd(model, x, labels, eps, norm=math.inf, steps=10, restarts=1)
    assert not (verified & (attack.margin <= 0)).any() and bool((attack.margin[broken] < 1e-3).all())
    by_ibp = torch.tensor([letter == "i" for letter in letters])
    bound = certified_margin(model, x.double(), labels, eps, norm=math.inf, method="ibp").amin(dim=1)
    assert torch.equal(by_ibp, right & (bound > 0))


def test_models_are_found_by_their_recipe_and_verified_as_they_were_trained(place, tmp_path, monkeypatch):
    folder = place[0][0].parents[1]
    monkeypatch.setattr(table_arguments, "MODELS_DIR", folder)
    monkeypatch.setattr(table_arguments, "ROOT", folder.parent)
    make_checkpoint(folder, "gru")  # like no model that was trained to be verified
    done = run(place, tmp_path, models=(), images=5)
    assert done.code == 0, done.err
    summary = rows_of(tmp_path / "certified_training" / "summary.csv")
    assert {record["model"] for record in summary} == {NAME, f"{NAME}_ibp_inf_{EPS}"}
    assert {record["architecture"] for record in summary} == {NAME}
    assert {(record["norm"], record["ball"]) for record in summary} == {("inf", "frame")}
    assert EPS in {float(record["eps"]) for record in summary} and len(summary) >= 10
    monkeypatch.setattr(table_arguments, "MODELS_DIR", folder.parent)
    assert_one_line(run(place, tmp_path, models=(), images=5), "no model", "--models")


def test_threats_by_flags(place, tmp_path):
    done = run(place, tmp_path, "--p", 2, "--ball", "sequence", "--eps", 0.2, "--quick", models=place[0][1:])
    assert done.code == 0 and "one ball around the image" in done.out, done.err
    done = run(place, tmp_path, "--p", "inf", "--clip", "--eps", EPS, models=place[0][1:], images=5)
    assert done.code == 0 and (tmp_path / "certified_training_clip" / "table.md").exists(), done.err
    assert "pixels stay in [0, 1]" in done.out
    assert_one_line(run(place, tmp_path, "--ball", "frame"), "needs --p")
    assert run(place, tmp_path / "dry", "--dry-run").code == 0 and not (tmp_path / "dry").exists()


def test_an_image_verified_above_where_it_is_broken_stops_the_script(place, tmp_path):
    """A cascade that verifies all that it is asked about at the larger eps."""

    def too_sure(model, x, labels, eps, **how):
        result = cascade(model, x, labels, eps, **how)
        if eps == 0.6:
            result.settled_by = ["crown" if stage != "clean" else stage for stage in result.settled_by]
        return result

    with mock.patch("utils.certify.cascade", too_sure):
        done = run(place, tmp_path, "--eps", 0.5, 0.6, models=place[0][:1])
    assert done.code == 3 and done.err.startswith("CONTRADICTION: ") and done.err.count("\n") == 1
    (evidence,) = (tmp_path / "certified_training").glob("contradiction_*.pt")
    facts = json.loads(evidence.with_suffix(".json").read_text())
    replay = replay_attack(evidence, load_checkpoint(place[0][0])[0])
    assert replay.margin.item() < 0 and replay.valid.item() and replay.size.item() <= facts["eps"] == 0.5
    assert facts["verified at eps"] == 0.6 and not (tmp_path / "certified_training" / "table.md").exists()
