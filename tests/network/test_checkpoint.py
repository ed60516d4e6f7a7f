"""Checkpoints: what is saved comes back, and nothing unusable gets in or damages what is there."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from utils.network.checkpoint import (
    CheckpointError,
    build_model,
    load_checkpoint,
    load_weights,
    model_name,
    save_checkpoint,
)
from utils.network.models import SequenceClassifier

KINDS = [("rnn", "tanh"), ("rnn", "relu"), ("lstm", None), ("gru", None)]


def make_config(architecture="rnn", activation="tanh", **changes):
    config = {
        "architecture": architecture,
        "input_size": 6,
        "num_frames": 4,
        "hidden_size": 5,
        "num_layers": 1,
        "bidirectional": False,
        "bias": True,
        "activation": activation,
        "pooling": "last",
        "num_classes": 3,
        "input_mean": 0.5,
        "input_std": 0.25,
        "class_names": ["a", "b", "c"],
        "test_accuracy": 0.5,
    }
    return config | changes


@pytest.fixture
def saved(tmp_path):
    """A good checkpoint: its path, model and config."""
    path, config = tmp_path / "rnn_4_5_tanh" / "rnn", make_config()
    model = build_model(config)
    save_checkpoint(path, model, config)
    return path, model, config


@pytest.mark.parametrize(("architecture", "activation"), KINDS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False, "pooling": "mean"}, {"input_mean": [0.1] * 6}],
)
def test_round_trip(tmp_path, architecture, activation, changes):
    config = make_config(architecture, activation, **changes)
    model = build_model(config).eval()
    save_checkpoint(tmp_path / "new" / "model", model, config)
    loaded, loaded_config = load_checkpoint(tmp_path / "new" / "model")
    x = torch.randn(7, 4, 6)
    assert loaded_config == config and not loaded.training
    assert torch.equal(loaded(x), model(x))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]


def test_names_are_stock_names(saved):
    path, _, config = saved
    state = torch.load(path, weights_only=True)["state_dict"]
    head = {name: state.pop(name) for name in ("head.weight", "head.bias")}
    nn.RNN(config["input_size"], config["hidden_size"], batch_first=True).load_state_dict(state)
    assert head["head.weight"].shape == (3, 5)


def test_names_with_prefix_load_too(saved):
    path, model, config = saved
    torch.save({"config": config, "state_dict": model.state_dict()}, path)
    x = torch.randn(2, 4, 6)
    assert torch.equal(load_checkpoint(path)[0](x), model(x))


def test_float64_weights_stay(tmp_path):
    model = build_model(make_config(), torch.float64)
    save_checkpoint(tmp_path / "rnn", model, make_config())
    loaded, _ = load_checkpoint(tmp_path / "rnn")
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    assert torch.equal(loaded(x), model(x))


def test_loading_leaves_the_random_state(saved):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    load_checkpoint(saved[0])
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (make_config(), "rnn_4_5_tanh"),
        (make_config(activation="relu", num_layers=2), "rnn_4_5_relu_2layer"),
        (make_config("lstm", None), "lstm_4_5"),
        (make_config("gru", None, num_layers=3, bidirectional=True), "gru_4_5_3layer_bi"),
    ],
)
def test_model_name(config, name):
    assert model_name(config) == name


@pytest.mark.parametrize(
    ("folder", "command"),
    [
        ("rnn_7_64_relu", "vanilla_rnn/train_rnn_mnist_classifier.py --time-step 7 --hidden-size 64 --activation relu"),
        ("lstm_7_32_2layer", "lstm/train_lstm_mnist_classifier.py --time-step 7 --hidden-size 32 --num-layers 2"),
        ("gru_4_8_bi", "gru/train_gru_mnist_classifier.py --time-step 4 --hidden-size 8 --bidirectional"),
        ("other", "train_*_classifier.py"),
    ],
)
def test_missing_file_names_the_command(tmp_path, folder, command):
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / folder / "rnn")
    assert command in str(caught.value) and "no checkpoint" in str(caught.value)


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b"hello", lambda b: b[: len(b) // 2], lambda b: b[:100]])
def test_damaged_file(saved, damage):
    path = saved[0]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match="is damaged or is not a plain"):
        load_checkpoint(path)


def test_pickled_objects_are_not_run(saved):
    path, model, _ = saved
    torch.save(model, path)
    with pytest.raises(CheckpointError, match="is damaged or is not a plain"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["state_dict"], "bare weights without a config"),
        (lambda c: {"model": 1}, "not a checkpoint of this project"),
        (lambda c: {}, "not a checkpoint of this project"),
        (lambda c: [1, 2], "not a checkpoint of this project"),
        (lambda c: {"state_dict": c["state_dict"]}, "needs a config"),
        (lambda c: c | {"config": 3}, "must be dicts"),
        (lambda c: c | {"state_dict": {"head.weight": 1}}, "must be dicts"),
        (lambda c: c | {"config": {"hidden_size": 5}}, "the config lacks architecture"),
        (lambda c: c["config"].update(architecture="perceptron"), "architecture in the config"),
        (lambda c: c["config"].update(activation="sigmoid"), "activation in the config"),
        (lambda c: c["config"].update(hidden_size=0), "hidden_size in the config"),
        (lambda c: c["config"].update(hidden_size=10**9), "has shape"),
        (lambda c: c["config"].update(num_frames=True), "num_frames in the config"),
        (lambda c: c["config"].update(bidirectional=1), "bidirectional in the config"),
        (lambda c: c["config"].update(input_std=0.0), "input_std in the config"),
        (lambda c: c["config"].update(input_mean=float("nan")), "input_mean in the config"),
        (lambda c: c["config"].update(num_layers=2), "the weights lack weight_ih_l1"),
        (lambda c: c["config"].update(bias=False), "no place for bias_hh_l0"),
        (lambda c: c["state_dict"].pop("head.bias"), "the weights lack head.bias"),
        (lambda c: c["state_dict"].update({"head.bias": torch.zeros(4)}), "head.bias has shape (4,)"),
        (lambda c: c["state_dict"]["weight_hh_l0"].fill_(float("nan")), "weight_hh_l0 contains NaN"),
        (lambda c: c["state_dict"]["head.bias"][0].fill_(float("inf")), "head.bias contains NaN or inf"),
        (lambda c: c["state_dict"].update({"head.bias": torch.zeros(3, dtype=torch.int64)}), "not floating point"),
    ],
)
def test_unusable_content(saved, change, message):
    path = saved[0]
    content = torch.load(path, weights_only=True)
    replaced = change(content)  # new content, or whatever a change in place returns
    torch.save(replaced if isinstance(replaced, (dict, list)) else content, path)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_saving_the_wrong_config_keeps_the_earlier_file(saved):
    path, model, config = saved
    before = path.read_bytes()
    with pytest.raises(ValueError, match="has shape"):
        save_checkpoint(path, model, config | {"hidden_size": 6})
    with pytest.raises(ValueError, match="lacks pooling"):
        save_checkpoint(path, model, {key: value for key, value in config.items() if key != "pooling"})
    assert path.read_bytes() == before


def test_interrupted_saving_keeps_the_earlier_file(saved, monkeypatch):
    path, model, config = saved
    before = path.read_bytes()

    def half_written(content, target):
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, model, config)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["rnn"]


# --- weights of others ----------------------------------------------------------------------------------------------


@pytest.fixture
def trained():
    torch.manual_seed(3)
    return SequenceClassifier(nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2))


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


WRAPPED = {
    "bare": lambda state: state,
    "stock names": lambda state: {name.removeprefix("rnn."): value for name, value in state.items()},
    "DataParallel": lambda state: prefixed(state, "module."),
    "compiled": lambda state: prefixed(state, "_orig_mod."),
    "both": lambda state: prefixed(state, "module._orig_mod."),
    "compiled inside": lambda state: {name.replace("rnn.", "rnn._orig_mod."): value for name, value in state.items()},
    "Lightning": lambda state: {"state_dict": prefixed(state, "model."), "epoch": 3, "hyper_parameters": {"lr": 0.1}},
    "nested": lambda state: {"model_state_dict": state, "optimizer": {"state": {0: torch.zeros(2)}}},
    "half": lambda state: {name: value.half() for name, value in state.items()},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_weights_however_they_were_saved(trained, tmp_path, name):
    torch.save(WRAPPED[name](trained.state_dict()), tmp_path / "my.pt")
    model = SequenceClassifier(nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2))
    load_weights(model, tmp_path / "my.pt")
    rounded = {key: value.half().float() if name == "half" else value for key, value in trained.state_dict().items()}
    assert all(torch.equal(value, rounded[key]) for key, value in model.state_dict().items())


def test_weights_of_another_model_name_the_keys(trained, tmp_path):
    path = tmp_path / "my.pt"
    for content, words in (
        (prefixed(trained.state_dict(), "a.") | {"b": torch.zeros(1)}, "found a.head.bias.*needed head.bias"),
        ({"lstm.weight": torch.zeros(1)}, "found weight .*needed head.bias"),
        ({"a": trained.state_dict(), "b": trained.state_dict()}, "no state dict"),
        ([1, 2], "no state dict"),
        (trained.state_dict() | {"head.bias": torch.zeros(7)}, "another size: size mismatch for head.bias"),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=words) as caught:
            load_weights(trained, path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_safetensors_or_how_to_get_them(trained, tmp_path):
    path = tmp_path / "my.safetensors"
    path.write_bytes(b"")
    try:
        from safetensors.torch import save_file
    except ImportError:
        with pytest.raises(CheckpointError, match="install safetensors"):
            load_weights(trained, path)
        return
    with pytest.raises(CheckpointError, match="damaged"):
        load_weights(trained, path)
    state = {name: value.half() for name, value in trained.state_dict().items()}
    save_file(prefixed(state, "module."), path)
    other = copy.deepcopy(trained)
    torch.nn.init.zeros_(other.head.weight)
    load_weights(other, path)
    for name, value in other.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, trained.state_dict()[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_checkpoints_with_prefixes_and_in_half_precision(tmp_path, prefix):
    config = make_config()
    model = build_model(config)
    save_checkpoint(tmp_path / "rnn", model, config)
    content = torch.load(tmp_path / "rnn", weights_only=True)
    content["state_dict"] = {prefix + name: value.half() for name, value in content["state_dict"].items()}
    torch.save(content, tmp_path / "rnn")
    loaded, _ = load_checkpoint(tmp_path / "rnn")
    for own, other in zip(loaded.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-3)


def test_another_models_name_is_no_reason_to_train(tmp_path):
    save_checkpoint(tmp_path / "gru_4_32" / "gru", build_model(make_config()), make_config())
    with pytest.raises(CheckpointError, match="the models of that folder are gru") as caught:
        load_checkpoint(tmp_path / "gru_4_32" / "nope")
    assert "train" not in str(caught.value)
