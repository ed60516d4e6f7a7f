"""The bound script of convolutional networks, the cascade and decide.py on such a network, run tiny."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from mnist_files import ROOT, write_mnist_folder
from PIL import Image
from test_bound_scripts import assert_one_line, call
from test_tables import rows_of

from data.cifar10 import CLASS_NAMES, load_cifar10
from data.mnist import load_mnist
from utils.attack.attack_file import replay_attack
from utils.attack.pgd import pgd
from utils.certify import certified_margin, certified_radius
from utils.experiments import cnn as cnn_runs
from utils.network.checkpoint import build_model, load_checkpoint, model_name, save_checkpoint
from utils.runs.bound_rows import read_bound_rows
from utils.runs.results import read_record
from utils.training.images.cnn import as_images

INF = float("inf")
BOUND = "cnn/bound_cnn.py"


def config_of(dataset: str = "mnist", **changes) -> dict:
    channels, size = (1, 28) if dataset == "mnist" else (3, 32)
    config = {"architecture": "cnn", "kind": "small", "width": 2, "batch_norm": False, "channels": channels}
    config |= {"size": size, "num_classes": 10, "input_mean": [0.2] * channels, "input_std": [0.4] * channels}
    return config | {"data_source": dataset} | changes


def train(folder, data, config: dict):
    """A few steps, so that some images are classified correctly."""
    torch.manual_seed(0)
    model, x, y = build_model(config), as_images(data.train_x), data.train_y
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        adam.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        adam.step()
    path = folder / model_name(config) / "cnn"
    save_checkpoint(path, model.eval(), config)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images and two networks that have learnt a little, one with normalisation and a recipe's name."""
    folder = write_mnist_folder(tmp_path_factory.mktemp("cnn"), train=100)
    data = load_mnist(folder)
    train(folder, data, config_of())
    train(folder, data, config_of(batch_norm=True, recipe="ibp_inf_0.1"))
    return folder


def flags(folder, *more):
    return ("--width", 2, "--work-dir", folder, "--data-dir", folder, "--threads", 1, *more)


def case(folder, count: int, name: str = "cnn_small_2"):
    """The network, its images as a bound script draws them, labels and numbers."""
    model, _ = load_checkpoint(folder / name / "cnn")
    data = load_mnist(folder)
    order = torch.randperm(len(data.test_y), generator=torch.Generator().manual_seed(0))[:count]
    kept = order[model(as_images(data.test_x[order])).argmax(dim=1) == data.test_y[order]]
    return model, as_images(data.test_x[kept]), data.test_y[kept], kept


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((), {"norm": 2.0}),
        (("--p", "inf", "--clip", "--method", "crown-ibp"), {"norm": INF, "clip": (0.0, 1.0), "method": "crown-ibp"}),
        (("--p", 1, "--method", "ibp", "--batch-norm", "--recipe", "ibp_inf_0.1"), {"norm": 1.0, "method": "ibp"}),
    ],
    ids=str,
)
def test_radii_are_those_of_the_python_interface(folder, tmp_path, given, told):
    outcome = call(BOUND, *flags(folder, *given, "--N", 6, "--untargeted", "--out-dir", tmp_path))
    assert outcome.code == 0, outcome.err
    name = "cnn_small_2_bn_ibp_inf_0.1" if "--recipe" in given else "cnn_small_2"
    model, x, labels, kept = case(folder, 6, name)
    rows = read_bound_rows(tmp_path / "certified_bound.csv")
    assert [row.index for row in rows] == kept.tolist() and name in outcome.out
    radii = torch.tensor([row.radius for row in rows], dtype=torch.float64)
    assert (radii > 0).all()
    torch.testing.assert_close(radii, certified_radius(model, x, labels, **told), rtol=1e-3, atol=0.0)
    record = read_record(tmp_path)
    assert record["model"]["config"]["kind"] == "small" and "the image moves by at most eps" in record["threat_model"]


def test_attacks_stand_beside_radii_and_runs_are_resumed(folder, tmp_path):
    given = flags(folder, "--p", "inf", "--attack", "--batch-size", 2, "--out-dir", tmp_path)
    outcome = call(BOUND, *given, "--N", 3)
    assert outcome.code == 0 and "attacked" in outcome.out, outcome.err
    few = read_bound_rows(tmp_path / "certified_bound.csv")
    outcome = call(BOUND, *given, "--N", 5, "--resume")
    assert outcome.code == 0, outcome.err
    rows = read_bound_rows(tmp_path / "certified_bound.csv")
    assert rows[: len(few)] == few and len(rows) > len(few)
    model, x, labels, _ = case(folder, 5)
    for row, image, label in zip(rows, x, labels, strict=True):
        assert 0 < row.radius <= row.attack_radius < INF
        asked = (model, image[None], label[None], 0.98 * row.radius)
        assert pgd(*asked, norm=INF, targets=torch.tensor([row.target])).margin > 0
    summary = read_record(tmp_path)["summary"]["attack"]
    assert summary["samples"] == len(rows)
    assert summary["mean"] == pytest.approx(sum(row.attack_radius for row in rows) / len(rows))
    with (tmp_path / "certified_bound.csv").open() as file:
        assert next(csv.reader(file))[-1] == "attack_radius"
    assert_one_line(call(BOUND, *given, "--N", 5, "--resume", "--target", 3), "cannot resume")


def test_a_radius_above_an_attacks_stops_the_script(folder, tmp_path, monkeypatch):
    stock = cnn_runs.attacked
    monkeypatch.setattr(cnn_runs, "attacked", lambda problem, x, radius, *more: stock(problem, x, 3.0 * radius, *more))
    outcome = call(BOUND, *flags(folder, "--p", "inf", "--attack", "--N", 3, "--out-dir", tmp_path))
    assert outcome.code == 3 and outcome.err.startswith("CONTRADICTION: ") and outcome.err.count("\n") == 1
    replay = replay_attack(tmp_path / "contradiction.pt", load_checkpoint(folder / "cnn_small_2" / "cnn")[0])
    assert (replay.margin < 0).all() and replay.valid.all()


def test_what_does_not_fit_is_named(folder, tmp_path):
    out = ("--out-dir", tmp_path)
    assert_one_line(call(BOUND, *flags(folder, "--together", "pixel", *out)), "--together", "--p 0")
    assert_one_line(call(BOUND, *flags(folder, "--model", "cnn7", *out)), "cnn/train_cnn_mnist_classifier.py")
    assert_one_line(call(BOUND, *flags(folder, "--width", 3, *out)), "--width 3")
    other = ("--model-name", "cnn", "--batch-norm")
    assert_one_line(call(BOUND, *flags(folder, *other, *out)), "no checkpoint")
    outcome = call(BOUND, *flags(folder, "--dry-run", "--N", 2))
    assert (
        outcome.code == 0 and "dry run" in outcome.out and not (folder / "cnn_small_2" / "2_norm_bound_crown").exists()
    )


def test_colour_images(tmp_path):
    """Classes that their colours tell apart, as folders of images."""
    numbers = np.random.default_rng(0)
    for part in ("train", "test"):
        for label, name in enumerate(CLASS_NAMES):
            place = tmp_path / part / name
            place.mkdir(parents=True)
            for n in range(3):
                color = 25 * np.array([label, 9 - label, label % 2]) + numbers.integers(-9, 10, (32, 32, 3))
                Image.fromarray(color.clip(0, 255).astype(np.uint8)).save(place / f"{n}.png")
    train(tmp_path / "models", load_cifar10(tmp_path), config_of("cifar10"))
    given = ("--width", 2, "--dataset", "cifar10", "--data-dir", tmp_path, "--work-dir", tmp_path / "models")
    outcome = call(BOUND, *given, "--N", 8, "--p", "inf", "--untargeted", "--out-dir", tmp_path / "out")
    assert outcome.code == 0 and "cifar10 as images" in outcome.out, outcome.err
    model, _ = load_checkpoint(tmp_path / "models" / "cnn_small_2" / "cnn")
    test, rows = load_cifar10(tmp_path, train=False), read_bound_rows(tmp_path / "out" / "certified_bound.csv")
    index = [row.index for row in rows]
    radii = torch.tensor([row.radius for row in rows], dtype=torch.float64)
    expected = certified_radius(model, test.test_x[index], test.test_y[index], norm=INF)
    torch.testing.assert_close(radii, expected, rtol=1e-3, atol=0.0)
    table = ("--models", tmp_path / "models" / "cnn_small_2" / "cnn", "--dataset", "cifar10", "--data-dir", tmp_path)
    more = ("--p", "inf", "--eps", 0.001, "--N", 10, "--steps", 5, "--total-limit", 1e-9, "--out-dir", tmp_path / "t")
    outcome = call(str(ROOT / "scripts" / "table_certified_training.py"), *table, *more)
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "t" / "certified_training_cnn_cifar10" / "table.md").exists()
    grey = ("--width", 2, "--data-dir", write_mnist_folder(tmp_path / "mnist"), "--work-dir", tmp_path / "models")
    assert_one_line(call(BOUND, *grey, "--out-dir", tmp_path / "none"), "no classifier of mnist", "3 x 32 x 32")


def test_verified_accuracy_by_the_cascade(folder, tmp_path):
    models = [folder / name / "cnn" for name in ("cnn_small_2", "cnn_small_2_bn_ibp_inf_0.1")]
    given = ("--models", *models, "--data-dir", folder, "--threads", 1, "--N", 20, "--batch-size", 8)
    effort = ("--steps", 10, "--time-limit", 0.05, "--total-limit", 1e-9)
    table = str(ROOT / "scripts" / "table_certified_training.py")
    outcome = call(table, *given, *effort, "--p", "inf", "--eps", 0.01, 0.05, "--cnn", "--out-dir", tmp_path)
    assert outcome.code == 0, outcome.err
    place = tmp_path / "certified_training_cnn"
    summary = rows_of(place / "summary.csv")
    assert [record["model"] for record in summary] == 2 * ["cnn_small_2"] + 2 * ["cnn_small_2_bn_ibp_inf_0.1"]
    assert "one ball around the image" in (place / "table.md").read_text()
    index = torch.randperm(50, generator=torch.Generator().manual_seed(0))[:20].sort().values
    data, rows = load_mnist(folder), rows_of(place / "rows.csv")
    x, labels = as_images(data.test_x[index]), data.test_y[index]
    for record, path in zip(summary, (models[0], models[0], models[1], models[1]), strict=True):
        own = [row for row in rows if (row["model"], row["eps"]) == (record["model"], record["eps"])]
        letters = "".join(row["outcomes"] for row in own)
        model, eps = load_checkpoint(path)[0], float(record["eps"])
        right = model(x).argmax(dim=1) == labels
        assert [letter == "w" for letter in letters] == (~right).tolist()
        verified = torch.tensor([letter in "imc" for letter in letters])
        broken = torch.tensor([letter in "rp" for letter in letters])
        margin = certified_margin(model, x.double(), labels, eps, norm=INF).amin(dim=1)
        assert not (verified & ~(margin > 0) & torch.tensor([letter == "c" for letter in letters])).any()
        attack = pgd(model, x, labels, eps, norm=INF, steps=10, restarts=1).margin
        assert not (verified & (attack <= 0)).any() and not (broken & (margin > 0)).any()
        assert float(record["verified"]) == pytest.approx(verified.double().mean().item())


def test_decisions(folder, tmp_path):
    path = folder / "cnn_small_2" / "cnn"
    given = ("--model", path, "--data-dir", folder, "--p", "inf", "--clip", "--time-limit", 60, "--threads", 1)
    model, x, labels, kept = case(folder, 6)
    radius = certified_radius(model, x, labels, norm=INF, clip=(0.0, 1.0))
    for eps, verdict in ((0.9 * float(radius.min()), "certified"), (0.9, "falsified")):
        out = tmp_path / verdict
        outcome = call("scripts/decide.py", *given, "--eps", eps, "--N", 6, "--out-dir", out)
        assert outcome.code == 0, outcome.err
        rows = {int(row["index"]): row for row in rows_of(out / "verdicts.csv")}
        assert {rows[n]["verdict"] for n in kept.tolist()} == {verdict}
        assert json.loads((out / "run.json").read_text())["threat_model"].startswith("the image moves")
    examples = sorted((tmp_path / "falsified" / "counterexamples").glob("*.pt"))
    assert len(examples) == 6 and all((replay_attack(one, model).margin <= 0).all() for one in examples)
