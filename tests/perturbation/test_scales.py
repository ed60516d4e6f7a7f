"""Masks and scales of elements: the same as a network that scales its input; boxes by element."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from utils.attack import pgd
from utils.attack.clever import clever
from utils.certify import cascade, certified_margin, certified_radius, decide, output_bounds
from utils.network.models import SequenceClassifier
from utils.perturbation.lp_ball import INF
from utils.perturbation.sets import Perturbation
from utils.question import Threat
from utils.question.elements import box_of

BATCH, T, N = 3, 3, 4
NORMS = (1.0, 2.0, INF)
SCALES = torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
MOVES = SCALES > 0


def model(cell: type[nn.RNNBase] = nn.RNN) -> SequenceClassifier:
    torch.manual_seed(0)
    return SequenceClassifier(cell(N, 5, batch_first=True), nn.Linear(5, 3)).double().requires_grad_(False)


def question() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(BATCH, T, N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return x, model()(x).argmax(dim=1)


class Scaled(nn.Module):
    """The model of z with x = z * scales, but for exact elements, which are z themselves."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.register_buffer("factor", torch.where(MOVES, SCALES, 1.0))

    def forward(self, z):
        return self.module(z * self.factor)


@pytest.mark.parametrize("ball", ["frame", "sequence"])
@pytest.mark.parametrize("norm", NORMS)
def test_scales_are_those_of_a_network_that_scales(norm, ball):
    """Only the elements that move differ in what they are scaled by: the others are exact on both sides."""
    net, (x, labels) = model(), question()
    twin, z = Scaled(net), x / torch.where(MOVES, SCALES, 1.0)
    for method in ("ibp", "crown", "crown-ibp"):
        how = {"norm": norm, "ball": ball, "method": method, "frames": [0, 2]}
        scaled = certified_margin(net, x, labels, 0.2, scales=SCALES, **how)
        expected = certified_margin(twin, z, labels, 0.2, features=MOVES, **how)
        torch.testing.assert_close(scaled, expected, rtol=1e-9, atol=1e-9)
        assert (scaled > certified_margin(net, x, labels, 0.4, **how)).all()  # the largest scale for all elements


def check_points(found, x, eps, scales, norm) -> None:
    """Attacked inputs lie in the set."""
    delta = (found.x - x).abs()
    assert (delta[..., scales == 0] == 0).all()
    own = delta[..., scales > 0] / scales[scales > 0]
    assert (torch.linalg.vector_norm(own, ord=norm, dim=-1) <= eps).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", ["crown", "curve", "jacobian"])
def test_no_attack_inside_a_radius(norm, method):
    net, (x, labels) = model(), question()
    how = {"norm": norm, "scales": SCALES}
    margin = certified_margin(net, x, labels, 0.3, method=method, alpha_steps=2, curve_steps=2, **how)
    found = pgd(net, x, labels, 0.3, **how)
    check_points(found, x, 0.3, SCALES, norm)
    assert (margin.amin(dim=1) <= found.margin + 1e-9).all()
    if method == "crown":
        radius = certified_radius(net, x, labels, **how)
        assert (radius > 0).all() and (pgd(net, x, labels, radius, **how).margin > 0).all()
        beyond = pgd(net, x, labels, 20 * radius, **how)
        assert (beyond.margin < 0).any()
        check_points(beyond, x, 20 * radius[:, None], SCALES, norm)


def test_a_set_that_forgets_its_scales_is_noticed(monkeypatch):
    monkeypatch.setattr(Perturbation, "_stretched", lambda self, frame, coefficients: coefficients)
    with pytest.raises(AssertionError):
        test_scales_are_those_of_a_network_that_scales(2.0, "frame")


def test_features_by_number_mask_and_sample():
    net, (x, labels) = model(), question()
    some = certified_margin(net, x, labels, 0.2, features=[0, 3])
    mask = torch.tensor([True, False, False, True])
    assert torch.equal(some, certified_margin(net, x, labels, 0.2, features=mask))
    assert torch.equal(some, certified_margin(net, x, labels, 0.2, features=mask.expand(BATCH, T, N)))
    assert torch.equal(some, certified_margin(net, x, labels, 0.2, features=mask.expand(T, N), scales=1.0))
    assert torch.equal(some, certified_margin(net, x, labels, 1.0, scales=0.2 * mask.double()))
    own = mask.expand(BATCH, T, N).clone()
    own[1] = False
    masked = certified_margin(net, x, labels, 0.2, features=own)
    torch.testing.assert_close(masked[[0, 2]], some[[0, 2]])
    torch.testing.assert_close(masked[1], certified_margin(net, x, labels, 0.0)[1])
    assert decide(net, x[:1], labels[:1], 0.0, features=own[:1], time_limit=1.0)[0].verdict == "certified"


def test_images_and_their_own_shape():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    net, x = net.double().requires_grad_(False), torch.rand(2, 2, 6, 6, dtype=torch.float64)
    labels = net(x).argmax(dim=1)
    scales = torch.rand(2, 6, 6, dtype=torch.float64)
    for norm in NORMS:
        margin = certified_margin(net, x, labels, 0.3, norm=norm, scales=scales)
        found = pgd(net, x, labels, 0.3, norm=norm, scales=scales.expand(x.shape))
        assert (margin.amin(dim=1) <= found.margin).all()
        assert (margin > certified_margin(net, x, labels, 0.3, norm=norm)).all()


def test_boxes_by_element():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double().requires_grad_(False)
    lower = torch.randn(2, 3, dtype=torch.float64)
    upper = lower + torch.tensor([0.4, 0.0, 1.5])
    found = output_bounds(net, lower=lower, upper=upper)
    corners = torch.stack(
        [torch.where(torch.tensor(c), upper, lower) for c in itertools.product([False, True], repeat=3)]
    )
    random = lower + (upper - lower) * torch.rand(300, 2, 3, dtype=torch.float64)
    values = net(torch.cat((corners, random)))
    assert (found.lower <= values.amin(dim=0)).all() and (values.amax(dim=0) <= found.upper).all()
    linear = nn.Sequential(nn.Linear(3, 2)).double().requires_grad_(False)
    weight, bias = linear[0].weight, linear[0].bias
    expected = upper @ weight.clamp(min=0).T + lower @ weight.clamp(max=0).T + bias
    torch.testing.assert_close(output_bounds(linear, lower=lower, upper=upper).upper, expected, rtol=1e-8, atol=1e-8)


def test_both_ends_of_a_box_are_inside_however_the_centre_is_rounded():
    generator = torch.Generator().manual_seed(0)
    lower = 1e6 * torch.randn(1, 40, 5, generator=generator, dtype=torch.float64)
    upper = lower + 1e-9 * torch.rand(1, 40, 5, generator=generator, dtype=torch.float64)
    center, sides = box_of(lower, upper)
    box = Threat(INF, scales=sides).to(center).around(center, torch.ones(1, dtype=torch.float64))
    for frame in range(40):
        middle, half = box.center(frame), box.half_widths(frame)
        # In whole multiples of the spacing of floats, where subtraction is exact.
        assert ((lower[:, frame] - middle) >= -half).all() and ((upper[:, frame] - middle) <= half).all()


def test_what_does_not_fit_is_said_in_one_line():
    net, (x, labels) = model(), question()
    for how, words in (
        ({"scales": [1.0, -1.0, 1.0, 1.0]}, "at least 0"),
        ({"scales": torch.ones(7)}, "scales must be"),
        ({"features": [4]}, "features must be from 0 ... 3"),
        ({"features": torch.ones(2, dtype=torch.bool)}, "features must be"),
    ):
        with pytest.raises(ValueError, match=words):
            certified_margin(net, x, labels, 0.1, **how)
    for ask in (lambda: cascade(net, x, labels, 0.1, features=[0]), lambda: clever(net, x, labels, features=[0])):
        with pytest.raises(ValueError, match="leave out features"):
            ask()
    with pytest.raises(ValueError, match="lower nowhere above upper"):
        output_bounds(net, lower=x, upper=x - 1.0)
    with pytest.raises(ValueError, match="give x and eps, or lower and upper"):
        output_bounds(net, x, lower=x)
