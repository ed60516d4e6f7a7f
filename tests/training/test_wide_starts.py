"""Networks that begin with more units than they end with."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from mnist_files import write_mnist_folder
from test_bound_scripts import assert_one_line, call
from torch import nn

from utils.network.checkpoint import load_checkpoint
from utils.network.models import SequenceClassifier
from utils.training import loop
from utils.training.narrow import Narrowing, importance

SCRIPTS = {
    "rnn": "vanilla_rnn/train_rnn_mnist_classifier.py",
    "lstm": "lstm/train_lstm_mnist_classifier.py",
    "gru": "gru/train_gru_mnist_classifier.py",
}
FOLDERS = {"rnn": "rnn_4_5_tanh", "lstm": "lstm_4_5", "gru": "gru_4_5"}
BALLS = ("--certified", "ibp", "--train-eps", 0.05, "--held-back", 40, "--input-rate", 2)
WIDE = ("--hidden-size", 5, "--start-size", 9, "--time-step", 4, "--batch-size", 25, "--threads", 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_mnist_folder(tmp_path_factory.mktemp("data"))


def classifier(kind: type[nn.RNNBase], hidden: int = 7, **more) -> SequenceClassifier:
    torch.manual_seed(0)
    return SequenceClassifier(
        kind(6, hidden, batch_first=True, dtype=torch.float64, **more), nn.Linear(hidden, 3).double()
    )


def silence(model: SequenceClassifier, units: list[int]) -> None:
    """Make the model's logits independent of some of its units."""
    with torch.no_grad():
        model.rnn.weight_hh_l0[:, units] = 0.0
        model.head.weight[:, units] = 0.0


def loss_of(model: SequenceClassifier):
    return lambda x, y: nn.functional.cross_entropy(model(x), y)


def batch(count: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    x = torch.rand(count, 4, 6, generator=random, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=random)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("bias", [True, False])
def test_units_that_reach_nothing_go_first_and_nothing_changes(kind, bias):
    """Logits, and Adam's next step, are those of the wide network on the units that are left."""
    model, (x, y) = classifier(kind, bias=bias), batch()
    adam = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    loss_of(model)(x, y).backward()
    adam.step()
    silence(model, [1, 2, 5])
    scores = importance(model, loss_of(model), x, y)
    assert (scores[[1, 2, 5]] == 0).all() and (scores[[0, 3, 4, 6]] > 0).all()
    wide, narrowing = deepcopy(model), Narrowing(model.eval(), adam, 4, (0.0, 1.0))
    moments = {name: deepcopy(adam.state[p]) for name, p in model.named_parameters()}
    assert narrowing.advance(loss_of(model), x, y, 1.0) and narrowing.units == model.head.in_features == 4
    assert model.training  # cuDNN has no gradients otherwise
    assert torch.allclose(model(x), wide(x), rtol=0, atol=1e-14)
    left = torch.tensor([0, 3, 4, 6])
    gates = model.rnn.weight_ih_l0.shape[0] // 4
    rows = torch.cat([left + 7 * gate for gate in range(gates)])
    for name, parameter in model.named_parameters():
        full = moments[name]["exp_avg"]
        full = full[:, left] if name == "head.weight" else full[rows] if name.startswith("rnn") else full
        full = full[:, left] if "weight_hh" in name else full
        assert torch.equal(adam.state[parameter]["exp_avg"], full) and adam.state[parameter]["step"] == 1
    assert {p for group in adam.param_groups for p in group["params"]} == set(model.parameters()) == set(adam.state)
    for net in (model, wide):
        net.zero_grad()
        loss_of(net)(x, y).backward()
    assert torch.allclose(model.rnn.weight_ih_l0.grad, wide.rnn.weight_ih_l0.grad[rows], rtol=0, atol=1e-14)
    before = deepcopy(model.state_dict())
    adam.step()
    assert all(not torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_scores_are_first_order_changes_of_the_loss():
    """Against differences: each batch's loss by a unit's outgoing weights made smaller by a millionth."""
    model, (x, y) = classifier(nn.LSTM), batch(1000)
    scores, step = importance(model, loss_of(model), x, y), 1e-6
    parts = ((x[:500], y[:500]), (x[500:], y[500:]))
    for unit in range(7):
        small = deepcopy(model)
        with torch.no_grad():
            small.rnn.weight_hh_l0[:, unit] *= 1 - step
            small.head.weight[:, unit] *= 1 - step
            changes = [float(loss_of(small)(*part) - loss_of(model)(*part)) / step for part in parts]
        assert float(scores[unit]) == pytest.approx(sum(change**2 for change in changes), rel=1e-3, abs=1e-12)


def test_the_number_of_units_falls_by_equal_factors_between_the_shares():
    narrowing = Narrowing(classifier(nn.RNN, 16), torch.optim.SGD([torch.zeros(1)]), 4, (0.2, 0.6))
    assert [narrowing.wanted(at) for at in (0.0, 0.2, 0.4, 0.6, 1.0)] == [16, 16, 8, 4, 4]


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("balls", [(), BALLS])
def test_a_training_ends_narrow_and_can_be_resumed(tmp_path, data, name, balls):
    """What was interrupted before, while and after units went ends with the weights of a training that was not."""
    flags = (*WIDE, *balls, "--data-dir", data, "--epochs", 4, "--narrow-shares", 0.3, 0.8)
    folder = FOLDERS[name] + ("_ibp_inf_0.05" if balls else "")
    assert call(SCRIPTS[name], *flags, "--save-dir", tmp_path / "whole").code == 0
    model, config = load_checkpoint(tmp_path / "whole" / folder / name)
    assert model.rnn.hidden_size == config["hidden_size"] == 5
    assert config["narrowed"] == {"from": 9, "shares": [0.3, 0.8]}
    for epochs in (1, 2, 3):
        with pytest.MonkeyPatch.context() as patched:
            stop_after(epochs, patched)
            assert call(SCRIPTS[name], *flags, "--save-dir", tmp_path / "parts").code == 130
        assert call(SCRIPTS[name], *flags, "--save-dir", tmp_path / "parts", "--resume").code == 0
        again, _ = load_checkpoint(tmp_path / "parts" / folder / name)
        for one, other in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
            assert torch.equal(one, other)


def stop_after(epochs: int, patched: pytest.MonkeyPatch) -> None:
    stock, done = loop.train_epoch, []

    def interrupted(*given):
        done.append(1)
        if len(done) > epochs:
            raise KeyboardInterrupt
        return stock(*given)

    patched.setattr(loop, "train_epoch", interrupted)


def test_a_wide_start_goes_on_narrow(tmp_path, data):
    """A model of the wider size can be gone on from, one of the last size cannot; the config says how it was begun."""
    flags = ("--time-step", 4, "--threads", 1, *BALLS, "--data-dir", data, "--epochs", 1, "--batch-size", 25)
    for size in (5, 9):
        assert call(SCRIPTS["gru"], *flags, "--hidden-size", size, "--save-dir", tmp_path).code == 0
    wide, narrow = (tmp_path / f"gru_4_{size}_ibp_inf_0.05" / "gru" for size in (9, 5))
    told = (*flags, "--hidden-size", 5, "--start-size", 9, "--save-dir", tmp_path / "on")
    assert_one_line(call(SCRIPTS["gru"], *told, "--start-from", narrow), "hidden_size is 5, not 9")
    assert call(SCRIPTS["gru"], *told, "--start-from", wide).code == 0
    config = load_checkpoint(tmp_path / "on" / narrow.relative_to(tmp_path))[1]
    assert (config["hidden_size"], config["started_from"]["hidden_size"]) == (5, 9)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--start-size", 5), "above --hidden-size 5"),
        (("--start-size", 9, "--num-layers", 2), "one layer"),
        (("--start-size", 9, "--bidirectional"), "one direction"),
        (("--start-size", 9, "--narrow-shares", 0.5, 0.5), "must rise"),
        (("--start-size", 9, "--narrow-shares", 0.5, 1.1), "must rise"),
        (("--narrow-shares", 0, 1), "give --start-size too"),
    ],
)
def test_flags_that_do_not_fit_are_refused(tmp_path, data, flags, words):
    told = ("--hidden-size", 5, "--time-step", 4, "--data-dir", data, "--save-dir", tmp_path / "no", *flags)
    assert_one_line(call(SCRIPTS["rnn"], *told), words)
    assert not (tmp_path / "no").exists()
