"""Parabolas below relu, and bounds of networks by them."""

from __future__ import annotations

import pytest
import torch
from helpers import normal
from torch import nn

from utils.attack import pgd
from utils.bounds import parabola
from utils.bounds.parabola import quadratic_below
from utils.certify import certified_margin, certified_radius
from utils.perturbation.lp_ball import INF

NORMS = (1.0, 2.0, INF)


def net(width: int = 12, inputs: int = 6, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, 3)).double()


def case(seed: int = 1):
    model, x = net(), normal(6, 1, 6, seed=seed)
    return model, x, model(x).argmax(dim=1)


def gap(rows, l, u, points: int = 201):  # noqa: E741
    """rows * relu(z) less the quadratic function below it, on a grid of the interval, element by element."""
    shares = torch.linspace(0.0, 1.0, points, dtype=torch.float64)[:, None]
    z = l + shares * (u - l)
    one = [
        quadratic_below(r[None, None, None], a[None, None, None], b[None, None, None])
        for r, a, b in zip(rows, l, u, strict=True)
    ]
    parts = [torch.stack([getattr(q, name).flatten()[0] for q in one]) for name in ("curvature", "slope", "constant")]
    return rows * z.relu() - (parts[0] * z**2 + parts[1] * z + parts[2])


def intervals():
    l = torch.tensor([-1.0, -3.0, -1.0, -2.0, 0.0, 0.5, -4.0, -1e-3, -1e3, -1.0]).double()  # noqa: E741
    u = torch.tensor([1.5, 1.0, 5.0, 3.9, 2.0, 3.0, -1.0, 1e-3, 1e3, 0.0]).double()
    return l, u


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_function_is_below_on_dense_grids(sign):
    l, u = intervals()  # noqa: E741
    rows = sign * torch.linspace(0.5, 2.0, len(l), dtype=torch.float64)
    gaps = gap(rows, l, u)
    assert float(gaps.min()) >= -1e-12 * 1e3
    assert bool((gaps.amin(dim=0) <= 1e-9 * (1 + u - l)).all())  # and touches


def test_a_parabola_with_the_wrong_end_is_noticed(monkeypatch):
    honest = quadratic_below
    monkeypatch.setitem(globals(), "quadratic_below", lambda rows, low, high: honest(rows, 0.8 * low, high))
    with pytest.raises(AssertionError):
        test_the_function_is_below_on_dense_grids(1.0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("eps", [1e-3, 0.1, 0.4, 2.0])
def test_margins_are_below_attacks_and_no_worse_than_planes(norm, eps):
    model, x, labels = case()
    planes, margins = (certified_margin(model, x, labels, eps, norm=norm, method=m) for m in ("crown", "parabola"))
    assert bool((margins >= planes).all())
    found = pgd(model, x, labels, eps, norm=norm)
    assert bool((margins.amin(dim=1) <= found.margin + 1e-9).all())


@pytest.mark.parametrize("norm", NORMS)
def test_radii_gain_and_hold(norm):
    model, x, labels = case(seed=3)
    planes, radii = (certified_radius(model, x, labels, norm=norm, method=m, tol=1e-6) for m in ("crown", "parabola"))
    assert bool((radii >= planes * (1 - 1e-6)).all())
    if norm != 1.0:  # there it gains nothing here that a search could tell
        assert float((radii / planes).mean()) > 1.001
    assert bool((pgd(model, x, labels, radii, norm=norm).margin > 0).all())


def test_few_steps_cost_tightness_but_no_soundness(monkeypatch):
    """A dual value is a bound wherever the steps end; a primal one is none."""
    model, x, labels = case(seed=5)
    full = certified_margin(model, x, labels, 0.5, method="parabola")
    monkeypatch.setattr(parabola, "STEPS", 1)
    few = certified_margin(model, x, labels, 0.5, method="parabola")
    assert bool((few <= full + 1e-9).all()) and bool((few < full - 1e-6).any())


def test_clip_float32_and_gradients():
    model, x, labels = case()
    x = x.clamp(-1.0, 1.0)
    labels = model(x).argmax(dim=1)
    clipped = certified_margin(model, x, labels, 0.5, norm=INF, method="parabola", clip=(-1.0, 1.0))
    whole = certified_margin(model, x, labels, 0.5, norm=INF, method="parabola")
    assert bool((clipped >= whole - 1e-9).all())
    single = certified_margin(model.float(), x.float(), labels, 0.5, norm=INF, method="parabola")
    torch.testing.assert_close(single.double(), whole, rtol=1e-3, atol=1e-3)
    model = model.double()
    certified_margin(model, x, labels, 0.1, method="parabola").sum().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())


# --- deeper networks --------------------------------------------------------------------------------------------------


def deep_case(activation=nn.ReLU, seed: int = 4):
    torch.manual_seed(seed)
    layers = (nn.Flatten(), nn.Linear(6, 10), activation(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 3))
    model, x = nn.Sequential(*layers).double(), normal(6, 1, 6, seed=seed)
    return model, x, model(x).argmax(dim=1)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("norm", NORMS)
def test_deeper_networks_gain_and_hold(norm, activation):
    model, x, labels = deep_case(activation)
    gained = 0.0
    for eps in (0.1, 0.4, 1.5):
        planes, margins = (certified_margin(model, x, labels, eps, norm=norm, method=m) for m in ("crown", "parabola"))
        assert bool((margins >= planes).all())
        assert bool((margins.amin(dim=1) <= pgd(model, x, labels, eps, norm=norm).margin + 1e-9).all())
        gained = max(gained, float((margins - planes).detach().max()))
    assert gained > 1e-3


def test_a_primal_value_is_noticed(monkeypatch):
    """What the function is at a point of the box is no bound of the margin."""

    def primal(self, rows):
        return (rows * 0.5 * sum(self.interval(self._hidden))[:, None]).sum(dim=-1)

    monkeypatch.setattr(parabola.ParabolaPass, "_least", primal)
    monkeypatch.setattr(parabola, "DEEP_STEPS", 0)
    with pytest.raises(AssertionError):
        test_deeper_networks_gain_and_hold(INF, nn.ReLU)


def test_other_networks_are_refused_in_one_line():
    smooth = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = normal(2, 1, 6, seed=1)
    with pytest.raises(ValueError, match="last hidden layer is of relu: take curve"):
        certified_margin(smooth, x, smooth(x).argmax(dim=1), 0.1, method="parabola")
