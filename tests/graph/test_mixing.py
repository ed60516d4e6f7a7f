"""Products, softmax and LayerNorm inside of balls: every norm, one frame alone, points, saturated scores, float32."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from utils.certify import certified_margin
from utils.graph.mixing import MatMul, Softmax

T, N, BATCH = 3, 4, 2
INF = math.inf
METHODS = ("ibp", "crown-ibp", "crown", "forward-backward")


class Attends(nn.Module):
    """Two layers of attention, the second over what LayerNorm gives, and a product of values."""

    def __init__(self, scale: float = 1.0, norm: bool = True):
        super().__init__()
        self.scale, self.norm = scale, nn.LayerNorm(N) if norm else nn.Identity()
        self.first, self.second = (nn.MultiheadAttention(N, 2, batch_first=True) for _ in range(2))
        self.head = nn.Linear(N, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x + self.first(self.scale * x, x, x)[0])
        h = h + self.second(h, h, h)[0]
        return self.head((h * h.tanh()).mean(dim=1))


class One(nn.Module):
    """A single product of matrices, or a single softmax, between linear layers: little hides a wrong bound."""

    def __init__(self, kind: str = "product"):
        super().__init__()
        self.kind, self.inner = kind, nn.Linear(N, N)
        self.head = nn.Linear(T * (T if kind == "product" else N), 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return self.head((h @ h.mT if self.kind == "product" else h.softmax(dim=-1)).flatten(1))


def made(net: type[nn.Module] = Attends, **settings) -> nn.Module:
    torch.manual_seed(0)
    return net(**settings).double().eval().requires_grad_(False)


def inputs(seed: int = 1) -> Tensor:
    return torch.randn(BATCH, T, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moves(norm: float, seed: int = 2) -> Tensor:
    """Random points and vertices of unit balls of frames, (points, 1, T, N)."""
    noise = torch.randn(400, 1, T, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    vertices = noise.sign() if norm == INF else nn.functional.one_hot(noise.abs().argmax(-1), N) * noise.sign()
    return torch.cat((noise / torch.linalg.vector_norm(noise, ord=norm, dim=-1, keepdim=True), vertices.double()))


def excess(net: nn.Module, x: Tensor, eps: Tensor, norm: float, method: str, dtype=torch.float64) -> float:
    """How far a bound is above the margin of some point of the set, at most."""
    labels = torch.tensor([0, 2])
    found = certified_margin(net, x, labels, eps, norm=norm, method=method, dtype=dtype).double()
    points = x + eps[:, :, None] * moves(norm)
    logits = net(points.flatten(0, 1)).unflatten(0, points.shape[:2])
    others = torch.tensor([[1, 2], [0, 1]])
    margins = logits[:, [0, 1], labels][..., None] - logits.gather(-1, others.expand(len(logits), -1, -1))
    assert found.isfinite().all()
    return float((found - margins.amin(dim=0)).max())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("norm", [1.0, 2.0, INF])
def test_no_point_of_a_ball_is_below_a_bound(norm, method):
    x = inputs()
    for net in (made(), made(norm=False), made(scale=30.0, norm=False)):  # the last has saturated rows of scores
        assert excess(net, x, torch.full((BATCH, T), 0.05).double(), norm, method) <= 0
        one = torch.zeros(BATCH, T).double()
        one[:, 1] = 0.3
        assert excess(net, x, one, norm, method) <= 0


@pytest.mark.parametrize("norm", [1.0, 2.0, INF])
def test_single_precision(norm):
    net, x = made(norm=False), inputs().float().double()
    for eps in (1e-6, 0.05):
        assert excess(net, x, torch.full((BATCH, T), eps).double(), norm, "crown", torch.float32) <= 0


@pytest.mark.parametrize("method", METHODS)
def test_a_ball_of_one_point_has_its_margin(method):
    net, x = made(), inputs()
    labels, eps = torch.tensor([0, 2]), torch.zeros(BATCH, T).double()
    exact = net(x)[[0, 1], labels] - net(x)[[0, 1], [1, 0]]
    found = certified_margin(net, x, labels, eps, targets=torch.tensor([1, 0]), method=method)[:, 0]
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-9)


class Shares(nn.Module):
    """Single shares times single values: these are no means, as rows of shares times values are."""

    def __init__(self):
        super().__init__()
        self.scores, self.values, self.head = nn.Linear(T * N, 5), nn.Linear(T * N, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(1)
        return self.head(self.scores(h).softmax(dim=-1) * self.values(h))


def as_means(self, bounds, honest=MatMul._mean_interval):
    """An interval that takes every softmax for rows of shares of the product's own inner size."""
    parent = self.parents[0]
    if isinstance(parent, Softmax):
        parent.width, width = self.shape.inner, parent.width
        try:
            return honest(self, bounds)
        finally:
            parent.width = width


@pytest.mark.parametrize("method", METHODS)
def test_single_shares_are_no_means(method, monkeypatch):
    net, eps = made(Shares), torch.full((BATCH, T), 0.2).double()
    assert max(excess(net, inputs(seed), eps, INF, method) for seed in range(1, 4)) <= 0
    monkeypatch.setattr(MatMul, "_mean_interval", as_means)  # as it was once
    assert max(excess(net, inputs(seed), eps, INF, method) for seed in range(1, 4)) > 1e-3


def remainder_forgotten(monkeypatch):
    honest = MatMul._expand

    def expand(self, bounds):
        x, y, low, high = honest(self, bounds)
        return x, y, 0.0 * low, 0.0 * high

    monkeypatch.setattr(MatMul, "_expand", expand)


def planes_of_a_point(monkeypatch):
    honest = Softmax._planes

    def planes(self, bounds):
        *fields, middle = honest(self, bounds)
        fields[3], fields[7] = fields[3] + 0.05, fields[7] - 0.05
        return (*fields, middle)

    monkeypatch.setattr(Softmax, "_planes", planes)


def broken(kind: str) -> float:
    """The largest excess over some inputs and norms."""
    eps = torch.full((BATCH, T), 0.6).double()
    return max(
        excess(made(One, kind=kind), inputs(seed), eps, norm, "crown") for norm in (2.0, INF) for seed in range(1, 5)
    )


@pytest.mark.parametrize(("kind", "damage"), [("product", remainder_forgotten), ("softmax", planes_of_a_point)])
def test_broken_versions_are_noticed(kind, damage, monkeypatch):
    assert broken(kind) <= 0
    damage(monkeypatch)
    assert broken(kind) > 1e-3
