"""The scripts of multi-layer perceptrons and of local Lipschitz constants, run tiny."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from mnist_files import write_mnist_folder
from PIL import Image
from test_bound_scripts import call

from data.cifar10 import CLASS_NAMES, load_cifar10
from data.mnist import as_frames, load_mnist
from utils.certify import certified_radius, local_lipschitz, margin_rows, sampled_lipschitz
from utils.network.checkpoint import CheckpointError, build_model, load_checkpoint, model_name, save_checkpoint
from utils.runs.bound_rows import read_bound_rows

SIZES = ("--layers", 6, 5)
ACTIVATIONS = ("relu", "leaky", "tanh", "sigmoid", "arctan", "elu", "softplus")


def config_of(activation: str) -> dict:
    config = {"architecture": "mlp", "input_size": 784, "layers": [6, 5], "activation": activation}
    return config | {"num_classes": 10, "leaky_slope": 0.3 if activation == "leaky" else 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, and a model of each activation that has learnt a little."""
    folder = write_mnist_folder(tmp_path_factory.mktemp("mlp"))
    data = load_mnist(folder)
    x, y = data.train_x.flatten(1), data.train_y
    for activation in ACTIVATIONS:
        torch.manual_seed(0)
        model = build_model(config_of(activation))
        adam = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(60):
            adam.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            adam.step()
        save_checkpoint(folder / model_name(config_of(activation)) / "mlp", model, config_of(activation))
    return folder


def flags(folder, *more):
    return (*SIZES, "--work-dir", folder, "--data-dir", folder, *more)


def case(folder, activation="relu", count=12):
    model, _ = load_checkpoint(folder / model_name(config_of(activation)) / "mlp")
    data = load_mnist(folder)
    order = torch.randperm(len(data.test_y), generator=torch.Generator().manual_seed(0))[:count]
    kept = order[model(data.test_x[order]).argmax(1) == data.test_y[order]]
    return model, as_frames(data.test_x[kept], 1), data.test_y[kept], kept


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_radii_are_those_of_the_python_interface(folder, tmp_path, activation):
    more = ("--N", 12, "--untargeted", "--activation", activation, "--out-dir", tmp_path)
    outcome = call("mlp/bound_mlp.py", *flags(folder, *more))
    assert outcome.code == 0, outcome.err
    model, x, labels, kept = case(folder, activation)
    rows = read_bound_rows(tmp_path / "certified_bound.csv")
    assert [row.index for row in rows] == kept.tolist()
    radii = torch.tensor([row.radius for row in rows], dtype=torch.float64)
    torch.testing.assert_close(radii, certified_radius(model, x, labels), rtol=1e-3, atol=0.0)


RECURJACS_NAMES = {
    "fastlin": (("--layer-bound", "fastlin"), {"method": "fastlin"}),
    "interval": (("--layer-bound", "interval"), {"method": "ibp"}),
    "spectral": (("--layer-bound", "spectral"), {"method": "spectral"}),
    "chord": (("--jacobian-bound", "chord"), {"method": "jacobian"}),
    "fastlip": (
        ("--layer-bound", "fastlin", "--jacobian-bound", "fastlip"),
        {"method": "jacobian", "chain": "interval", "layers": "fastlin"},
    ),
    "recurjac": (("--jacobian-bound", "recurjac"), {"method": "jacobian", "chain": "recurjac"}),
    "shell": (("--method", "shell"), {"method": "shell"}),
}


@pytest.mark.parametrize("name", RECURJACS_NAMES)
def test_recurjacs_names_of_methods(folder, tmp_path, name):
    given, method = RECURJACS_NAMES[name]
    more = (*given, "--N", 6, "--p", "inf", "--untargeted", "--out-dir", tmp_path)
    outcome = call("mlp/bound_mlp.py", *flags(folder, *more))
    assert outcome.code == 0, outcome.err
    model, x, labels, _ = case(folder, count=6)
    radii = torch.tensor([row.radius for row in read_bound_rows(tmp_path / "certified_bound.csv")]).double()
    expected = certified_radius(model, x, labels, norm=float("inf"), max_eps=1.0, **method)
    torch.testing.assert_close(radii, expected, rtol=2e-3, atol=0.0)


def test_clashing_flags_end_in_one_line(folder, tmp_path):
    for given in (
        ("--method", "curve", "--jacobian-bound", "chord"),
        ("--layer-bound", "spectral", "--jacobian-bound", "chord"),
        ("--jacobian-bound", "fastlip", "--activation", "tanh"),
        ("--lipsteps", 5),
    ):
        arguments = flags(folder, *given, "--out-dir", tmp_path / "none")
        outcome = call("mlp/bound_mlp.py", *arguments)
        assert outcome.code == 2 and len(outcome.err.splitlines()) == 1, outcome.err
        assert not (tmp_path / "none").exists()


def test_lipschitz_constants_lie_above_gradients_and_resume(folder, tmp_path):
    more = ("--N", 5, "--points", 3, "--log-start", -2, "--log-end", -1, "--samples", 20, "--untargeted", "--p", "inf")
    more = flags(folder, *more, "--chains", "chord", "recurjac", "interval", "--out-dir", tmp_path)
    outcome = call("mlp/lipschitz_mlp.py", *more)
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "lipschitz.png").exists()
    text = (tmp_path / "certified_bound.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    model, x, labels, _ = case(folder, count=5)
    assert len(rows) == len(x) * 3 * 4
    specs = margin_rows(labels, 10)
    for eps in sorted({row["eps"] for row in rows}, key=float):
        bound = local_lipschitz(model, x, float(eps), specs, norm=float("inf")).constant.amax(dim=1)
        own = [float(row["constant"]) for row in rows if (row["eps"], row["bound"]) == (eps, "chord")]
        torch.testing.assert_close(torch.tensor(own, dtype=torch.float64), bound, rtol=1e-9, atol=0.0)
        below = sampled_lipschitz(model, x, float(eps), specs, norm=float("inf"), samples=20).constant.amax(dim=1)
        assert bool((below <= bound * (1 + 1e-9)).all())
    lines = text.splitlines(keepends=True)
    (tmp_path / "certified_bound.csv").write_text("".join(lines[: len(lines) // 2]))
    record = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(record | {"status": "running"}))
    outcome = call("mlp/lipschitz_mlp.py", *more, "--resume")
    assert outcome.code == 0 and "resuming" in outcome.out, outcome.err
    again = list(csv.DictReader((tmp_path / "certified_bound.csv").read_text().splitlines()))
    assert [row["constant"] for row in again] == [row["constant"] for row in rows]


def test_landscape_by_directions_goes_farther_than_by_entries(folder, tmp_path):
    radii = {}
    for name, given in {"entries": ("--entries", "--chain", "recurjac"), "directions": ()}.items():
        more = flags(folder, "--N", 8, "--activation", "tanh", *given, "--out-dir", tmp_path / name)
        outcome = call("mlp/landscape_mlp.py", *more)
        assert outcome.code == 0, outcome.err
        radii[name] = torch.tensor([row.radius for row in read_bound_rows(tmp_path / name / "certified_bound.csv")])
    assert bool((radii["directions"] >= 0.998 * radii["entries"]).all())
    assert float(radii["directions"].mean()) > 1.02 * float(radii["entries"].mean())


def test_train_script_saves_what_bound_script_reads(folder, tmp_path):
    train = ("--layers", 4, "--activation", "leaky", "--epochs", 1, "--data-dir", folder, "--save-dir", tmp_path)
    outcome = call("mlp/train_mlp_mnist_classifier.py", *train)
    assert outcome.code == 0, outcome.err
    model, config = load_checkpoint(tmp_path / "mlp_4_leaky" / "mlp")
    assert config["leaky_slope"] == 0.3 and config["test_accuracy"] >= 0
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    with pytest.raises(CheckpointError, match="train it by python mlp/train_mlp_mnist_classifier.py --layers 7 7"):
        load_checkpoint(tmp_path / "mlp_7_7_relu" / "mlp")


@pytest.mark.parametrize(
    ("key", "value"), [("layers", [0]), ("layers", 5), ("activation", "gelu"), ("leaky_slope", -1), ("input_size", 1.5)]
)
def test_configs_that_make_no_mlp_are_named(key, value):
    with pytest.raises(ValueError, match=key):
        build_model(config_of("relu") | {key: value})


@pytest.mark.parametrize("script", ["vanilla_rnn/lipschitz_vanilla_rnn.py", "gru/lipschitz_gru.py"])
def test_lipschitz_scripts_of_recurrent_models(folder, tmp_path, script):
    architecture = "gru" if "gru" in script else "rnn"
    config = {"architecture": architecture, "input_size": 196, "num_frames": 4, "hidden_size": 4, "num_layers": 1}
    config |= {"num_classes": 10, "bidirectional": False, "bias": True, "pooling": "last"}
    config |= {"activation": "tanh" if architecture == "rnn" else None, "input_mean": 0.0, "input_std": 1.0}
    torch.manual_seed(1)
    model = build_model(config)
    data = load_mnist(folder)
    with torch.no_grad():  # the most frequent class is the one that some images have
        model.head.bias[data.test_y[0]] += 10.0
    save_checkpoint(tmp_path / model_name(config) / architecture, model, config)
    more = (
        "--time-step",
        4,
        "--hidden-size",
        4,
        "--work-dir",
        tmp_path,
        "--data-dir",
        folder,
        "--out-dir",
        tmp_path / "o",
    )
    more += ("--out-dir", tmp_path / "o", "--N", 30, "--points", 2, "--log-end", -1, "--samples", 5, "--logit")
    outcome = call(script, *more)
    assert outcome.code == 0, outcome.err
    rows = list(csv.DictReader((tmp_path / "o" / "certified_bound.csv").read_text().splitlines()))
    assert {row["frame"] for row in rows} == {"all", "0", "1", "2", "3"}
    assert all(float(row["constant"]) >= 0 for row in rows)


def test_decide_takes_perceptrons_and_export_says_that_it_does_not(folder, tmp_path):
    path = folder / "mlp_6_5_relu" / "mlp"
    given = ("--model", path, "--data-dir", folder)
    outcome = call("scripts/decide.py", *given, "--eps", 0.01, "--N", 3, "--time-limit", 2, "--out-dir", tmp_path)
    assert outcome.code == 0 and " of 3 test images" in outcome.out, outcome.err
    outcome = call("scripts/export_model.py", *given, "--out-dir", tmp_path)
    assert outcome.code == 2 and "torch.onnx.export" in outcome.err and len(outcome.err.splitlines()) == 1


def test_colour_images(tmp_path):
    """Classes that their colours tell apart, as folders of images: trained and certified."""
    numbers = np.random.default_rng(0)
    for part in ("train", "test"):
        for label, name in enumerate(CLASS_NAMES):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for n in range(3):
                color = 25 * np.array([label, 9 - label, label % 2]) + numbers.integers(-9, 10, (32, 32, 3))
                Image.fromarray(color.clip(0, 255).astype(np.uint8)).save(folder / f"{n}.png")
    data = ("--dataset", "cifar10", "--data-dir", tmp_path, "--layers", 8)
    outcome = call("mlp/train_mlp_mnist_classifier.py", *data, "--epochs", 30, "--save-dir", tmp_path / "models")
    assert outcome.code == 0 and "cifar10 as images" in outcome.out, outcome.err
    where = ("--work-dir", tmp_path / "models", "--N", 12, "--untargeted")
    outcome = call("mlp/bound_mlp.py", *data, *where, "--out-dir", tmp_path / "bound")
    assert outcome.code == 0, outcome.err
    model, config = load_checkpoint(tmp_path / "models" / "mlp_8_relu" / "mlp")
    assert config["input_size"] == 3 * 32 * 32 and config["dataset"] == "cifar10"
    test = load_cifar10(tmp_path, train=False)
    rows = read_bound_rows(tmp_path / "bound" / "certified_bound.csv")
    index = [row.index for row in rows]
    radii = torch.tensor([row.radius for row in rows], dtype=torch.float64)
    expected = certified_radius(model, test.test_x[index].flatten(1)[:, None], test.test_y[index])
    torch.testing.assert_close(radii, expected, rtol=1e-3, atol=0.0)
    outcome = call("mlp/bound_mlp.py", *data[2:], *where, "--out-dir", tmp_path / "none")
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1 and "no classifier of mnist" in outcome.err
    outcome = call("mlp/bound_mlp.py", *data, *where[2:], "--work-dir", tmp_path / "cifar10_classifier")
    assert outcome.code == 2 and "--dataset cifar10" in outcome.err


def test_a_model_for_counted_changes_is_trained_bounded_and_decided(tmp_path):
    data = write_mnist_folder(tmp_path / "data")
    where = ("--data-dir", data)
    how = (
        "--certified",
        "ibp",
        "--p",
        0,
        "--train-eps",
        1,
        "--epochs",
        20,
        "--lr",
        0.02,
        "--held-back",
        40,
        "--threads",
        1,
    )
    trained = call("mlp/train_mlp_mnist_classifier.py", *SIZES, *where, "--save-dir", tmp_path, *how)
    assert trained.code == 0 and "1 changed values of every image" in trained.out, trained.err
    named = (*SIZES, "--work-dir", tmp_path, "--recipe", "ibp_0_1", *where)
    bound = call("mlp/bound_mlp.py", *named, "--N", 12, "--p", 0, "--k", 2, "--out-dir", tmp_path / "out")
    assert bound.code == 0 and "certified at 2 changes" in bound.out, bound.err
    rows = read_bound_rows(tmp_path / "out" / "certified_bound.csv")
    assert {row.radius for row in rows} <= {0.0, 1.0, 2.0}
    checkpoint = tmp_path / "mlp_6_5_relu_ibp_0_1" / "mlp"
    asked = (
        "--model",
        checkpoint,
        *where,
        "--p",
        0,
        "--k",
        1,
        "--N",
        4,
        "--time-limit",
        2,
        "--out-dir",
        tmp_path / "v",
    )
    decided = call("scripts/decide.py", *asked, "--threads", 1)
    assert decided.code == 0 and "1 changed values" in decided.out, decided.err
    verdicts = list(csv.DictReader((tmp_path / "v" / "verdicts.csv").open()))
    assert len(verdicts) == 4 and {row["verdict"] for row in verdicts} <= {"certified", "falsified", "unknown"}
    for flags in (("--p", 0, "--train-eps", 1.5), ("--p", 0, "--train-eps", 1, "--clip")):
        refused = call("mlp/train_mlp_mnist_classifier.py", *SIZES, *where, "--certified", "ibp", *flags)
        assert refused.code == 2 and "--p 0" in refused.err and refused.err.count("\n") == 1, refused.err
