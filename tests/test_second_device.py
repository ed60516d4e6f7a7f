"""Networks and questions on a pretended second device: what they give there is what they give here."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from elsewhere import DEVICE, SecondDevice
from on_device import moved
from test_certificate import run_checker
from torch import nn

from utils.attack import attack_radius, pgd
from utils.certify import certified_margin, certified_radius, decide, save_certificates
from utils.models import SequenceClassifier
from utils.network import symbolic

INF = float("inf")


class Pooled(nn.Module):
    """Places that are picked and maxima over those that are there."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2, padding=1), nn.Flatten())
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = self.net(x)
        return self.head(h[:, [0, 2, 1, 3, 4, 5, 7, 6]])


def networks():
    torch.manual_seed(0)
    lstm = SequenceClassifier(nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3))
    gru = SequenceClassifier(nn.GRU(3, 4, batch_first=True, bidirectional=True), nn.Linear(8, 3), pooling="mean")
    return {
        "lstm": (lstm, torch.rand(3, 3, 3)),
        "gru": (gru, torch.rand(3, 3, 3)),
        "pooled": (Pooled(), torch.rand(3, 1, 4, 4)),
    }


NETWORKS = networks()
QUESTIONS = {
    "ibp": lambda *given: certified_margin(*given, 0.05, norm=INF, method="ibp"),
    "crown": lambda *given: certified_margin(*given, 0.05, norm=2),
    "alpha": lambda *given: certified_margin(*given, 0.05, norm=INF, method="alpha", alpha_steps=2, clip=(0, 1)),
    "curve": lambda *given: certified_margin(*given, 0.05, norm=2, method="curve", alpha_steps=1, curve_steps=2),
    "radius": lambda *given: certified_radius(*given, tol=0.1),
    "decide": lambda *given: torch.stack([one.margins for one in decide(*given, 1e-3)]),
    "pgd": lambda *given: pgd(*given, 0.3, steps=2, restarts=1).margin,
    "attack": lambda *given: attack_radius(*given, steps=2, restarts=1, tol=0.5).radius,
}


def given(name):
    model, x = NETWORKS[name]
    return model.eval(), x, model(x).argmax(dim=1)


def there(question, arguments):
    with SecondDevice():
        found = question(*moved(arguments, DEVICE, {}))
        assert found.device == DEVICE
        return found.to("cpu")


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("question", QUESTIONS)
def test_answers_are_those_of_the_cpu(name, question):
    arguments = given(name)
    here = QUESTIONS[question](*arguments).detach()
    torch.testing.assert_close(there(QUESTIONS[question], arguments).detach(), here, rtol=1e-4, atol=1e-6)


def test_certificates_of_frames_that_are_exact(tmp_path, capsys):
    """Their hints are made of nothing that is on the device."""
    model, x, labels = given("lstm")
    with SecondDevice():
        arguments = moved((model, x, labels), DEVICE, {})
        paths = save_certificates(tmp_path, *arguments, [1e-3] * 3, frames=[2])
    code, output, errors = run_checker(capsys, *paths)
    assert code == 0 and len(paths) == 3, output + errors


def test_masks_that_stay_behind_are_noticed():
    """As once was: only numbers with fractions went to the device."""
    stock = torch.Tensor.to

    def to(tensor, device, dtype=None):
        return stock(tensor, device, dtype) if tensor.is_floating_point() else tensor

    with mock.patch.object(symbolic, "usable_tensor", lambda value: mock.Mock(to=lambda *how: to(value, *how))):
        for name in ("ibp", "crown"):
            with pytest.raises((AssertionError, ValueError), match="two devices|another device"):
                there(QUESTIONS[name], given("pooled"))
