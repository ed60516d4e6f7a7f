"""Bounds of any output: no point that is sampled or attacked is outside, and simple modules have the closed form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from utils.attack import pgd
from utils.certify import (
    band_radius,
    certified_margin,
    certified_radius,
    local_lipschitz,
    output_bounds,
)
from utils.certify.certificate import save_certificates
from utils.certify.outputs import bounds as module_of_bounds
from utils.network import UnsupportedError
from utils.network.trace import trace
from utils.perturbation.lp_ball import INF, project, random_on_sphere, steepest

BATCH, T, N = 3, 3, 2
NORMS = (1.0, 2.0, INF)


class Several(nn.Module):
    """A recurrent net with outputs of every step, two values of the last one, and its state."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(N, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x):
        steps, last = self.rnn(x)
        return {"steps": self.head(steps), "values": self.head(last[-1]), "states": (last[0], None)}


class Part(nn.Module):
    def __init__(self, module, choose):
        super().__init__()
        self.module, self.choose = module, choose

    def forward(self, x):
        return self.choose(self.module(x))


class OneScore(nn.Module):
    def __init__(self, end, shape=(-1,), steps=False):
        super().__init__()
        self.rnn, self.head, self.end = nn.LSTM(N, 5, batch_first=True), nn.Linear(5, 1, bias=False), end
        self.shape, self.steps = shape, steps

    def forward(self, x):
        steps, _ = self.rnn(x)
        return self.end(self.head(steps if self.steps else steps[:, -1])).reshape(x.shape[0], *self.shape)


def made(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.double().parameters():
        parameter.data = 0.8 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module.eval().requires_grad_(False)


def inputs(seed: int = 5) -> torch.Tensor:
    return torch.randn(BATCH, T, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def extremes(function, x, eps, norm, steps: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest values of (batch, k) functions met on the frames' spheres, and by projected gradients."""
    batch, count = len(x), function(x).shape[1]
    moves = eps * random_on_sphere((60, *x.shape), norm, torch.Generator().manual_seed(1))
    values = function((x + moves).flatten(0, 1)).reshape(60, batch, count)
    signs = torch.cat((torch.eye(count), -torch.eye(count))).to(x)  # each output up, and each down, side by side
    move = torch.zeros(len(signs), *x.shape, dtype=x.dtype)
    for step in range(steps):
        point = (x + move).requires_grad_()
        found = function(point.flatten(0, 1)).reshape(-1, batch, count)
        (gradient,) = torch.autograd.grad((found * signs[:, None]).sum(), point)
        move = move + eps * 0.8**step * steepest(gradient, norm)
        move = project(move, torch.full(move.shape[:-1], eps, dtype=x.dtype), norm)
    met = function((x + move).flatten(0, 1)).reshape(-1, batch, count).detach()
    stacked = torch.cat((values, met))
    return stacked.amin(dim=0), stacked.amax(dim=0)


def flat_outputs(module):
    def function(x):
        steps, values, (state, _) = module(x).values()
        return torch.cat([part.flatten(1) for part in (steps, values, state)], 1)

    return function


def flat_bounds(found) -> tuple[torch.Tensor, torch.Tensor]:
    parts = (found["steps"], found["values"], found["states"][0])
    return tuple(torch.cat([getattr(part, side).flatten(1) for part in parts], 1) for side in ("lower", "upper"))


def check_outputs(norm: float, method: str, eps: float = 0.3) -> None:
    module, x = made(Several()), inputs()
    low, high = flat_bounds(output_bounds(module, x, eps, norm=norm, method=method, alpha_steps=3, curve_steps=2))
    least, most = extremes(flat_outputs(module), x, eps, norm)
    assert (low <= least).all() and (most <= high).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", ["ibp", "crown"])
def test_no_output_is_outside(norm, method):
    check_outputs(norm, method)


def test_bounds_of_half_the_set_are_noticed(monkeypatch):
    whole = module_of_bounds._both_sides
    monkeypatch.setattr(module_of_bounds, "_both_sides", lambda q, rows, eps, *rest: whole(q, rows, eps / 2, *rest))
    for norm in NORMS:
        with pytest.raises(AssertionError):
            check_outputs(norm, "crown")


def test_linear_modules_have_the_closed_form():
    module, x = made(nn.Sequential(nn.Flatten(), nn.Linear(T * N, 2))), inputs()
    weight = module[1].weight.reshape(2, T, N)
    for norm, dual in ((1.0, INF), (2.0, 2.0), (INF, 1.0)):
        reach = 0.3 * torch.linalg.vector_norm(weight, ord=dual, dim=2).sum(dim=1)
        found = output_bounds(made(module), x, 0.3, norm=norm)
        torch.testing.assert_close(found.upper, module(x) + reach, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(found.lower, module(x) - reach, rtol=1e-7, atol=1e-7)
        assert (found.upper > module(x) + reach).all() and (found.lower < module(x) - reach).all()


@pytest.mark.parametrize("method", ["alpha", "curve"])
def test_tuned_bounds_are_tuned_for_each_row(method):
    module, x = made(Part(Several(), lambda parts: parts["values"])), inputs()
    crown = output_bounds(module, x, 0.3)
    tuned = output_bounds(module, x, 0.3, method=method, alpha_steps=4, curve_steps=3)
    assert (tuned.lower >= crown.lower - 1e-9).all() and (tuned.upper <= crown.upper + 1e-9).all()
    assert (tuned.lower > crown.lower).all() and (tuned.upper < crown.upper).all()
    least, most = extremes(module, x, 0.3, 2.0)
    assert (tuned.lower <= least).all() and (most <= tuned.upper).all()


def test_linear_functions_of_outputs():
    module, x = made(Several()), inputs()
    apart = output_bounds(module, x, 0.3, output="values")
    rows = torch.tensor([[1.0, -1.0], [2.0, 0.0]])
    both = output_bounds(module, x, 0.3, output="values", C=rows)
    assert both.lower.shape == (BATCH, 2)
    assert (both.lower[:, 0] >= apart.lower[:, 0] - apart.upper[:, 1]).all()
    torch.testing.assert_close(both.upper[:, 1], 2 * apart.upper[:, 0], rtol=1e-7, atol=1e-7)
    least, most = extremes(lambda x: module(x)["values"] @ rows.double().T, x, 0.3, 2.0)
    assert (both.lower <= least).all() and (most <= both.upper).all()
    first = torch.zeros(1, T, 2)
    first[0, 0, 1] = 1.0
    by_place = output_bounds(module, x, 0.3, output="steps", C=first)
    whole = output_bounds(module, x, 0.3, output="steps")
    torch.testing.assert_close(by_place.lower[:, 0], whole.lower[:, 0, 1], rtol=1e-7, atol=1e-7)


def test_nothing_moves_at_eps_0():
    module, x = made(Several()), inputs()
    found = output_bounds(module, x, 0.0)
    for bounds, value in ((found["steps"], module(x)["steps"]), (found["states"][0], module(x)["states"][0])):
        assert bounds.lower.shape == value.shape and (bounds.lower <= value).all() and (value <= bounds.upper).all()
        torch.testing.assert_close(bounds.lower, bounds.upper, rtol=1e-6, atol=1e-6)
    deep = output_bounds(module, x, 0.2, output=("states", 0))
    torch.testing.assert_close(deep.lower, output_bounds(module, x, 0.2)["states"][0].lower)


def test_what_does_not_fit_is_said_in_one_line():
    module, x = made(Several()), inputs()
    with pytest.raises(UnsupportedError, match="has no 'score'"):
        output_bounds(module, x, 0.1, output="score")
    with pytest.raises(ValueError, match="say which by output="):
        output_bounds(module, x, 0.1, C=[[1.0, 2.0]])
    with pytest.raises(ValueError, match="C must be"):
        output_bounds(module, x, 0.1, output="values", C=[[1.0, 2.0, 3.0]])
    with pytest.raises(ValueError, match="take curve"):
        output_bounds(module, x, 0.1, method="bab")
    ended = made(nn.Sequential(nn.Flatten(), nn.Linear(T * N, 3), nn.Softmax(dim=1)))
    assert certified_margin(ended, x, ended(x).argmax(1), 0.01).shape == (BATCH, 2)


# --- classifiers with one score ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("end", "shape"), [(nn.Identity(), (1,)), (nn.Sigmoid(), ())], ids=["score", "sigmoid"])
def test_one_score_is_that_of_two_classes(end, shape):
    """With scores 0 and z: the same margins and radii, by any end and shape of the output."""
    x, module = inputs(), made(OneScore(end, shape))
    scores = made(OneScore(nn.Identity(), (1,)))
    two = Part(scores, lambda z: torch.cat((torch.zeros_like(z), z), dim=1))
    labels = torch.tensor([0, 1, 1])
    torch.testing.assert_close(certified_margin(module, x, labels, 0.1), certified_margin(two, x, labels, 0.1))
    right = (scores(x)[:, 0] > 0).long()
    radius = certified_radius(module, x, right)
    torch.testing.assert_close(radius, certified_radius(two, x, right))
    assert (radius > 0).all() and (certified_radius(module, x, 1 - right) == 0).all()
    assert (pgd(module, x, right, radius).margin > 0).all() and (pgd(module, x, right, 20 * radius).margin < 0).any()
    with pytest.raises(ValueError, match="labels must be 0 or 1"):
        certified_margin(module, x, torch.tensor([0, 1, 2]), 0.1)


def test_a_sigmoid_is_bounded_itself_where_outputs_are_asked_for():
    module, x = made(OneScore(nn.Sigmoid(), (1,))), inputs()
    found = output_bounds(module, x, 3.0)
    assert (found.lower >= -1e-8).all() and (found.upper <= 1 + 1e-8).all()
    least, most = extremes(module, x, 3.0, 2.0)
    assert (found.lower <= least).all() and (most <= found.upper).all()


def test_only_signs_leave_a_sigmoid_out():
    """A graph is what the module computes, and so are its gradients."""
    module, x = made(OneScore(nn.Sigmoid(), (1,))), inputs()
    torch.testing.assert_close(trace(module, x).evaluate(x), module(x))
    row = torch.ones(1, 1)
    steep = local_lipschitz(module, x, 0.01, row).constant
    of_score = local_lipschitz(made(OneScore(nn.Identity(), (1,))), x, 0.01, row).constant
    assert (steep <= 0.26 * of_score).all()


# --- classifiers of every step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [nn.Softmax(dim=-1), nn.LogSoftmax(dim=-1)], ids=["shares", "logarithms"])
def test_shares_of_classes(end):
    module, x = made(Part(Several(), lambda parts: end(2.0 * parts["steps"]))), inputs()
    bounds = output_bounds(module, x, 0.1, norm=INF)
    for k in range(BATCH):
        least, most = extremes(lambda y: module(y).flatten(1), x[k : k + 1], 0.1, INF)
        lower, upper = bounds.lower[k].flatten(), bounds.upper[k].flatten()
        assert (lower <= least[0] + 1e-9).all() and (most[0] <= upper + 1e-9).all()
        assert ((upper - lower) < 5 * (most - least)[0]).all()
    if isinstance(end, nn.Softmax):
        assert (bounds.lower >= 0).all() and (bounds.upper <= 1).all()


@pytest.mark.parametrize("end", [nn.Identity(), nn.Softmax(dim=-1)], ids=["scores", "softmax"])
def test_labels_of_every_step(end):
    whole = made(Part(Several(), lambda parts: parts["steps"]))
    module, x = Part(whole, end), inputs()
    labels = module(x).argmax(dim=-1)
    margins = certified_margin(module, x, labels, 0.1)
    assert margins.shape == (BATCH, T, 1)
    for step in range(T):
        alone = certified_margin(Part(whole, lambda out, step=step: out[:, step]), x, labels[:, step], 0.1)
        torch.testing.assert_close(margins[:, step], alone, rtol=1e-6, atol=1e-9)
    labels[0, :2] = -100
    asked = certified_margin(module, x, labels, 0.1)
    assert asked[0, :2].isinf().all() and torch.equal(asked[1:], margins[1:])
    torch.testing.assert_close(asked[0, 2:], margins[0, 2:])
    radius = certified_radius(module, x, labels)
    assert (radius > 0).all() and (pgd(module, x, labels, radius).margin > 0).all()
    assert (pgd(module, x, labels, 20 * radius).margin < 0).any()
    labels[0] = -100
    with pytest.raises(ValueError, match="asks for nothing"):
        certified_margin(module, x, labels, 0.1)


@pytest.mark.parametrize("shape", [(T,), (T, 1)])
def test_one_score_of_every_step(shape):
    x, module = inputs(), made(OneScore(nn.Sigmoid(), shape, steps=True))
    right = (module(x).reshape(BATCH, T) > 0.5).long()
    radius = certified_radius(module, x, right)
    assert (radius > 0).all() and (certified_margin(module, x, right, radius).amin(dim=(1, 2)) > 0).all()
    assert (pgd(module, x, right, radius).margin > 0).all() and (pgd(module, x, right, 30 * radius).margin < 0).any()
    wrong = right.clone()
    wrong[0, -1] = 1 - wrong[0, -1]
    assert certified_radius(module, x, wrong)[0] == 0


def test_certificates_of_one_score_are_refused(tmp_path):
    module, x = made(OneScore(nn.Identity())), inputs()
    labels = (module(x) > 0).long()
    with pytest.raises(ValueError):
        save_certificates(tmp_path, module, x, labels, 0.1)


# --- bands ------------------------------------------------------------------------------------------------------------


def check_band(radius, module, x, low, high, norm) -> None:
    for sample, eps in enumerate(radius.tolist()):
        least, most = extremes(module, x[sample : sample + 1], eps, norm)
        assert (least >= low[sample]).all() and (most <= high[sample]).all()


@pytest.mark.parametrize("norm", NORMS)
def test_outputs_stay_in_their_band(norm):
    module, x = made(Part(Several(), lambda parts: parts["values"])), inputs()
    low, high = module(x) - torch.tensor([0.2, 0.1]), module(x) + 0.3
    radius = band_radius(module, x, low, high, norm=norm)
    assert (radius > 0).all()
    check_band(radius, module, x, low, high, norm)
    with pytest.raises(AssertionError):  # the check has teeth
        check_band(6 * radius, module, x, low, high, norm)
    wider = band_radius(module, x, low, norm=norm)
    assert (wider >= radius).all()
    if norm == 2.0:
        by_tuning = band_radius(module, x[:1], low[:1], high[:1], method="alpha", alpha_steps=3)
        assert (by_tuning >= radius[0]).all()
        check_band(by_tuning, module, x, low, high, norm)


def test_a_band_of_a_linear_module_has_the_closed_form():
    module, x = made(nn.Sequential(nn.Flatten(), nn.Linear(T * N, 1))), inputs()
    slope = module[1].weight.reshape(T, N).norm(dim=1).sum()
    radius = band_radius(module, x, module(x) - 0.2, module(x) + 0.5)
    torch.testing.assert_close(radius, torch.full_like(radius, 0.2 / slope), rtol=2e-3, atol=0.0)
    only_one = band_radius(module, x, torch.tensor([[-torch.inf], [0.0], [0.0]]), torch.tensor(1e3), C=[[1.0]])
    expected = torch.where(module(x)[:, 0] > 0, module(x)[:, 0] / slope, 0.0)
    torch.testing.assert_close(only_one[1:], expected[1:], rtol=2e-3, atol=0.0)
    with pytest.raises(ValueError, match="without an end"):
        band_radius(module, x)
