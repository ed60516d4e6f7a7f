"""The local Lipschitz constant in the loss: an upper bound, differentiable, and worth its weight."""

from __future__ import annotations

import pytest
import torch
from helpers import normal
from torch import nn

from utils.certify import margin_rows, sampled_lipschitz
from utils.models import SequenceClassifier
from utils.training.lipschitz import local_constants


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.LeakyReLU(0.3), nn.Linear(7, 3)).double()


def rnn() -> nn.Module:
    torch.manual_seed(0)
    return SequenceClassifier(nn.RNN(6, 5, batch_first=True), nn.Linear(5, 3)).double()


@pytest.mark.parametrize("norm", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("kind", ["mlp", "rnn"])
def test_constants_lie_above_sampled_gradients(kind, norm):
    model, x = (mlp(), normal(4, 6, seed=1)) if kind == "mlp" else (rnn(), normal(4, 3, 6, seed=1))
    labels = model(x).argmax(dim=1)
    others = model(x).scatter(1, labels[:, None], -torch.inf).argmax(dim=1)
    for eps in (1e-4, 0.1, 1.0):
        bound = local_constants(model, x, labels, eps, norm)
        below = sampled_lipschitz(model, x, eps, margin_rows(labels, 3, others), norm=norm, samples=50).constant[:, 0]
        assert bool((below <= bound * (1 + 1e-9)).all())
        if eps == 1e-4:
            torch.testing.assert_close(bound, below, rtol=0.01, atol=0.0)


def test_gradients_match_finite_differences():
    model, x = mlp(), normal(2, 6, seed=2)
    labels = model(x).argmax(dim=1)
    weight = model[2].weight
    (gradient,) = torch.autograd.grad(local_constants(model, x, labels, 0.05).sum(), weight)
    direction = normal(*weight.shape, seed=3)
    values = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            weight.add_(step * direction)
        values.append(float(local_constants(model, x, labels, 0.05).sum().detach()))
        with torch.no_grad():
            weight.sub_(step * direction)
    assert float((gradient * direction).sum()) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)


def test_training_for_it_makes_constants_smaller():
    x = normal(60, 6, seed=4)
    y = (x[:, :3].argmax(dim=1)).long()
    means = {}
    for weight in (0.0, 0.3):
        model = mlp(seed=5)
        adam = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(60):
            adam.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            (loss + weight * local_constants(model, x, y, 0.05).mean() if weight else loss).backward()
            adam.step()
        assert float((model(x).argmax(dim=1) == y).double().mean()) > 0.8
        means[weight] = float(local_constants(model, x, y, 0.05).mean().detach())
    assert means[0.3] < 0.7 * means[0.0]
