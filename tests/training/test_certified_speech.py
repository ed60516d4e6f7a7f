"""Certified training on waveforms: losses bound those of points, lengths count, scripts write and resume."""

from __future__ import annotations

import pytest
import torch
from helpers import normal
from test_bound_scripts import assert_one_line, call
from torch import nn

from utils.certify import certified_margin
from utils.network import load_checkpoint
from utils.network.speech import MelFeatures, SpeechClassifier
from utils.training.certified.losses import robust_loss
from utils.training.certified.recipe import Moment, Recipe
from utils.training.certified.speech import CertifiedSpeech
from utils.training.speech import SpeechNet

TRAIN = "gru/train_gru_speech_classifier.py"
SMALL = ("--hidden-size", 6, "--sample", "--threads", 1, "--batch-size", 16, "--bands", 6, "--lr", 3e-2)
HOP, BANDS, EPS = 8, 3, 0.05
LENGTHS = [5, 3, 2]


def small_net() -> SpeechNet:
    rnn, head = nn.LSTM(BANDS, 3, batch_first=True), nn.Linear(3, 3)
    for number, parameter in enumerate((*rnn.parameters(), *head.parameters())):
        parameter.data = normal(*parameter.shape, seed=number)
    return SpeechNet(SpeechClassifier(MelFeatures(HOP, BANDS, 0.3), rnn, head, mean=1.0, std=2.0).double())


def padded() -> torch.Tensor:
    x = normal(3, 5, HOP, seed=3)
    for row, length in zip(x, LENGTHS, strict=True):
        row[length:] = 0.0
    return x


def worst_found(net: SpeechNet, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The greatest cross entropy of each sample at corners of its ball, of which the network's gradient is one."""
    x = x.clone().requires_grad_()
    lengths = torch.tensor(LENGTHS)
    loss = nn.functional.cross_entropy(net.classifier(x, lengths), y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    moves = [gradient.sign(), *normal(30, *x.shape, seed=4).sign()]
    found = [nn.functional.cross_entropy(net.classifier(x + EPS * m, lengths), y, reduction="none") for m in moves]
    return torch.stack(found).amax(dim=0).detach()


def losses(loss: str, eps: float = EPS, broken: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(bound, what points reach) of every sample."""
    net, x, y = small_net(), padded(), torch.tensor([0, 1, 2])
    objective = CertifiedSpeech(Recipe(loss, eps=EPS, input_penalty=0.0))
    batch = objective.batch(net, x, y, objective.recipe, Moment(eps, 0.0, 1.0, 1.0))
    if broken:  # ends are not known: states go on in the silence behind them
        batch.lengths = None
    return robust_loss(batch).detach(), worst_found(net, x, y)


FRAMES = (1, 3)  # a span; the second sample has only the first of them, the third neither


def other_losses(kind: str, loss: str, share: float = 1.0, lost: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """(bound, what points reach) of every sample: of ratios, of features, or of a span that alone moves."""
    net, x, y, lengths = small_net(), padded(), torch.tensor([0, 1, 2]), torch.tensor(LENGTHS)
    span = {"frames": FRAMES} if kind == "span" else {}
    ball = {"p": 2.0, "ball": "sequence"} if kind == "snr" else {}
    objective = CertifiedSpeech(Recipe(loss, eps=EPS, input_penalty=0.0, **ball, **span), kind)
    batch = objective.batch(net, x, y, objective.recipe, Moment(share * EPS, 0.0, 1.0, 1.0))
    if lost == "sizes":
        batch.sizes = None
    bound = robust_loss(batch).detach()
    part = batch.model  # what is asked about, and its inputs
    start, ends = batch.x, batch.lengths
    own = (torch.arange(start.shape[1]) < ends[:, None])[..., None]
    if kind == "span":
        own = own & torch.isin(torch.arange(start.shape[1]), torch.tensor(FRAMES))[:, None]
    leaf = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(part(leaf, ends), y, reduction="sum"), leaf)
    found = []
    for move in (gradient, -gradient, *normal(30, *start.shape, seed=4)):
        move = (move if kind == "snr" else move.sign()) * own
        if kind == "snr":
            move = move * (x.flatten(1).norm(dim=1) / move.flatten(1).norm(dim=1))[:, None, None]
        found.append(nn.functional.cross_entropy(part(start + EPS * move, ends), y, reduction="none"))
    assert lengths.equal(ends + (kind == "features"))
    return bound, torch.stack(found).amax(dim=0).detach()


KINDS = ("snr", "features", "span")


@pytest.mark.parametrize("loss", ["ibp", "crown"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_other_threats_are_above_those_of_points(kind, loss):
    bound, reached = other_losses(kind, loss)
    assert (bound >= reached - 1e-12).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_check_of_other_threats_catches_smaller_sets(kind):
    bound, reached = other_losses(kind, "crown", share=0.1)
    assert not (bound >= reached - 1e-12).all()
    if kind == "snr":  # of utterances of norm 3 or so
        bound, reached = other_losses(kind, "crown", lost="sizes")
        assert not (bound >= reached - 1e-12).all()


@pytest.mark.parametrize("loss", ["ibp", "crown-ibp", "crown"])
def test_losses_are_above_those_of_points(loss):
    bound, reached = losses(loss)
    assert (bound >= reached).all()


@pytest.mark.parametrize("broken", [{"eps": 0.3 * EPS}, {"broken": True, "eps": 1e-6}], ids=["small ball", "no ends"])
def test_the_check_of_losses_catches_broken_ones(broken):
    bound, reached = losses("crown", **broken)
    assert not (bound >= reached).all()


def test_a_batch_is_what_its_utterances_are_one_by_one():
    net, x, y = small_net(), padded(), torch.tensor([0, 1, 2])
    objective = CertifiedSpeech(Recipe("ibp", eps=EPS, overshoot=1.0, input_penalty=0.0))
    together = objective.loss(net, x, y, 1.0)
    apart = [objective.loss(net, x[n : n + 1, :length], y[n : n + 1], 1.0) for n, length in enumerate(LENGTHS)]
    torch.testing.assert_close(together, torch.stack(apart).mean(), rtol=1e-9, atol=1e-9)
    assert torch.autograd.grad(together, net.classifier.rnn.weight_hh_l0)[0].abs().max() > 0


def test_what_is_watched_is_certified():
    """A network that verifies some by intervals: the share counts what ``certified_margin`` proves, or less."""
    net, x, y = small_net(), padded(), torch.tensor([0, 1, 2])
    objective = CertifiedSpeech(Recipe("ibp", eps=1e-4))
    y = net.classifier(x, torch.tensor(LENGTHS)).argmax(dim=1)
    watched = objective.measure(net, x, y)
    how = {"norm": torch.inf, "method": "ibp", "lengths": torch.tensor(LENGTHS)}
    share = (certified_margin(net.classifier, x, y, 1e-4, **how) > 0).all(dim=1).double().mean()
    assert 0 < watched["verified"] <= share and watched["accuracy"] == 1.0


def train(folder, *flags):
    return call(TRAIN, *SMALL, "--certified", "ibp", "--train-level", -60, "--save-dir", folder, *flags)


def test_a_training_is_saved_with_its_recipe_and_resumed(tmp_path, monkeypatch):
    from utils.training.certified import speech as module

    done = train(tmp_path / "whole", "--epochs", 3)
    assert done.code == 0 and "verified test accuracy" in done.out, done.err
    path = tmp_path / "whole" / "gru_6_ibp_-60dB" / "gru"
    model, config = load_checkpoint(path)
    assert config["certified"]["train_eps"] == pytest.approx(1e-3) and config["held_back"] == 80 // 9
    measure, epochs = module.CertifiedSpeech.measure, []

    def stop(self, *arguments):
        epochs.append(0)
        if len(epochs) == 3:
            raise KeyboardInterrupt
        return measure(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module.CertifiedSpeech, "measure", stop)
        assert train(tmp_path / "parts", "--epochs", 3).code != 0
    done = train(tmp_path / "parts", "--epochs", 3, "--resume")
    assert done.code == 0, done.err
    again, _ = load_checkpoint(tmp_path / "parts" / "gru_6_ibp_-60dB" / "gru")
    for one, other in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other)
    where = ("--work-dir", tmp_path / "whole", "--hidden-size", 6, "--recipe", "ibp_-60dB")
    done = call("gru/bound_gru_speech.py", *where, "--sample", "--N", 40, "--dry-run")
    assert done.code == 0 and "dry run" in done.out, done.err


@pytest.mark.parametrize(
    "flags, name",
    [
        (("--train-threat", "snr", "--train-level", 40), "gru_6_ibp_snr_40dB"),
        (("--train-threat", "features", "--train-level", 0.1), "gru_6_ibp_nats_0.1"),
        (("--train-level", -40, "--train-span", 0.1, 0.15), "gru_6_ibp_-40dB_0.1_0.15"),
    ],
)
def test_other_threats_are_trained_for_and_saved(tmp_path, flags, name):
    done = call(TRAIN, *SMALL, "--certified", "ibp", *flags, "--epochs", 1, "--save-dir", tmp_path)
    assert done.code == 0 and "verified test accuracy" in done.out, done.err
    _, config = load_checkpoint(tmp_path / name / "gru")
    assert config["certified"]["threat"] == (flags[1] if flags[0] == "--train-threat" else "noise")
    assert (config["certified"]["frames"] is None) == ("--train-span" not in flags)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--train-level", -60), "--train-eps is for certified training"),
        (("--certified", "ibp"), "--certified needs --train-eps"),
        (("--certified", "ibp", "--train-level", -8000), "levels must be from -300 to 300 for noise, not -8000"),
        (("--certified", "ibp", "--train-level", "nan"), "levels must be from -300 to 300 for noise, not nan"),
        (("--certified", "ibp", "--train-level", -60, "--train-eps", 0.1), "give one of them"),
        (("--certified", "ibp", "--train-level", -60, "--p", 2), "leave out --clip and --p"),
        (("--train-threat", "snr"), "are for certified training"),
        (("--certified", "sabr", "--train-threat", "snr", "--train-level", 40), "knows only one"),
        (("--certified", "ibp", "--train-level", -60, "--train-span", 7, 8), "no chunk lies between 7 and 8"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(tmp_path, flags, message):
    assert_one_line(call(TRAIN, *SMALL, "--save-dir", tmp_path, *flags), message)
