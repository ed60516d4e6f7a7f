"""Gradients through products, softmax, maxima and functions on half lines: none of a ball is outside of its bounds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import Threat, normal
from nets import check_gradients, gradients_of, jacobian_of, points_within
from torch import nn

from utils.attack.pgd import attack_radius
from utils.certify import certified_radius, local_lipschitz
from utils.graph.mixing import MatMul, Shape
from utils.graph.pooling import Maximum
from utils.jacobian.adjoint import Adjoint
from utils.network.trace import trace
from utils.perturbation.lp_ball import INF

T, N, BATCH = 3, 4, 2
ROWS = torch.tensor([[[1.0, -1.0, 0.0], [0.3, 0.2, -1.0]]], dtype=torch.float64)
MASK = torch.ones(T, T).tril().bool()


class Between(nn.Module):
    """A construct on (batch, T, N) between two linear layers."""

    def __init__(self, construct):
        super().__init__()
        self.first, self.construct = nn.Linear(N, N), construct
        self.last = nn.Linear(construct(torch.ones(1, T, N)).numel(), 3)
        for number, parameter in enumerate(self.parameters()):
            parameter.data = 0.6 * normal(*parameter.shape, seed=number)
        self.double().eval().requires_grad_(False)

    def forward(self, x):
        return self.last(self.construct(self.first(x)).flatten(1))


CONSTRUCTS = {
    "product": lambda h: h * h.roll(1, -1),
    "matrices": lambda h: h @ h.mT,
    "quotient": lambda h: h / (1.0 + h.square().sum(-1, keepdim=True)),
    "length": lambda h: F.normalize(h + 2.0, dim=-1),
    "rms norm": lambda h: h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 0.1),
    "layer norm": lambda h: F.layer_norm(h, (N,)),
    "attention": lambda h: F.scaled_dot_product_attention(h, h, h),
    "masked attention": lambda h: (h @ h.mT).masked_fill(~MASK, -torch.inf).softmax(-1) @ h,
    "maximum": lambda h: h.amax(1),
    "max pool": lambda h: F.max_pool1d(h, 2, 1),
    "log": lambda h: (h.square() + 0.3).log(),
    "root": lambda h: (h.abs().sum(-1) + 0.1).sqrt(),
    "waves": lambda h: torch.cat((h.sin(), h.cos()), -1),
    "logsumexp": lambda h: h.logsumexp(-1),
}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def check(name: str, norm: float, sizes=(0.05, 0.2)) -> None:
    x = normal(BATCH, T, N, seed=7)
    graph = trace(Between(CONSTRUCTS[name]), x)
    eps = torch.tensor(sizes, dtype=torch.float64)[:, None].expand(BATCH, T)
    threat, rows = Threat(norm), ROWS.expand(BATCH, -1, -1)
    points = points_within(graph, x, eps, rows, threat)
    check_gradients(jacobian_of(graph, threat, x, eps, rows), graph, x, eps, rows, threat, points)


@pytest.mark.parametrize("norm", (2.0, INF))
@pytest.mark.parametrize("name", CONSTRUCTS)
def test_no_gradient_of_the_set_is_outside(name, norm):
    check(name, norm)


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_of_a_tiny_ball_it_is_the_gradient(name):
    x = normal(BATCH, T, N, seed=7)
    graph, rows = trace(Between(CONSTRUCTS[name]), x), ROWS.expand(BATCH, -1, -1)
    eps = torch.full((BATCH, T), 1e-9, dtype=torch.float64)
    bounds = jacobian_of(graph, Threat(2.0), x, eps, rows)
    gradients = gradients_of(graph, x, rows)
    for frame in bounds.frames:
        for side in bounds.frame_bounds(frame):
            torch.testing.assert_close(side.view(BATCH, 2, -1), gradients[:, :, frame], rtol=1e-5, atol=1e-5)


def left_alone(self, node, adjoint):
    """The product rule without its second half."""
    moving, y = self.moving, node.parents[1]
    self.moving = [moving[n] and n != y.index for n in range(len(moving))]
    PRODUCT(self, node, adjoint)
    self.moving = moving


def not_summed(self, node, adjoint):
    """p a, without p sum(p a)."""
    self.scaled(node.parents[0], self.graph.add(MatMul(node, adjoint, Shape(node.size, 1, 1, 1))))


def first_wins(self, *operands):
    low = operands[0][0]
    return tuple((torch.full_like(low, float(k == 0)),) * 2 for k in range(len(operands)))


PRODUCT = Adjoint.product


@pytest.mark.parametrize(
    ("name", "owner", "method", "wrong"),
    [
        ("product", Adjoint, "product", left_alone),
        ("quotient", Adjoint, "product", left_alone),
        ("attention", Adjoint, "softmax", not_summed),
        ("maximum", Maximum, "derivative_ranges", first_wins),
    ],
)
def test_what_is_broken_is_noticed(name, owner, method, wrong, monkeypatch):
    monkeypatch.setattr(owner, method, wrong)
    with pytest.raises(AssertionError, match="above value"):
        check(name, 2.0, sizes=(0.01, 0.02))


class Padded(nn.Module):
    """Attention of words that count, by a mask of lengths."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(N, N), nn.Linear(N, 3)

    def forward(self, x, lengths):
        h, mask = self.first(x), torch.arange(x.shape[1]) < lengths[:, None]
        share = (h @ h.mT / 2).masked_fill(~mask[:, None], -torch.inf).softmax(-1)
        return self.last((share @ h * mask[..., None]).sum(1))


@pytest.mark.parametrize("method", ("alpha", "curve", "jacobian"))
def test_masks_and_lengths(method):
    """Samples with masks of their own have the radii that they have alone, and no greater ones than attacks leave."""
    torch.manual_seed(1)
    model, x, lengths = Padded().double().eval().requires_grad_(False), normal(3, T, N, seed=3), torch.tensor([3, 1, 2])
    labels, how = model(x, lengths).argmax(1), {"method": method, "alpha_steps": 3, "curve_steps": 3, "tol": 1e-2}
    radius = certified_radius(model, x, labels, extra=lengths, **how)
    attacked = attack_radius(model, x, labels, extra=lengths, steps=20, restarts=1).radius
    assert (radius > 0).all() and (radius <= attacked).all()
    alone = [
        certified_radius(model, x[k : k + 1], labels[k : k + 1], extra=lengths[k : k + 1], **how) for k in range(3)
    ]
    torch.testing.assert_close(torch.cat(alone), radius, rtol=3e-2, atol=0.0)


def test_from_the_input_on_products_are_refused():
    module = Between(CONSTRUCTS["attention"])
    with pytest.raises(ValueError, match="take direction backward"):
        local_lipschitz(module, normal(1, T, N, seed=2), 0.1, ROWS[0], direction="both")
