"""Small convolutional nets as they are verified elsewhere: bounds against grids, attacks and looser bounds."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import INF, Threat, check_below, normal, project
from torch import Tensor, nn

from utils.attack.pgd import pgd
from utils.bounds.neurons import windows
from utils.bounds.passes import BoundPass
from utils.certify import certified_margin, certified_radius
from utils.graph.convolution import Convolution
from utils.graph.graph import Graph
from utils.graph.nonlinear import Activation
from utils.graph.pooling import Maximum
from utils.network.cnn import make_cnn
from utils.network.trace import trace
from utils.question import margin_rows
from utils.relaxation.lines import Plane, Relaxation

CLASSES, SIDE, BATCH = 4, 8, 3
METHODS = ("ibp", "crown-ibp", "crown")
THREATS = (Threat(1.0), Threat(2.0), Threat(INF), Threat(INF, clip=(0.0, 1.0)))


def seeded_net(net: nn.Module, bias: float = 0.3) -> nn.Module:
    """Weights, biases and statistics by a seed, in double precision."""
    for number, parameter in enumerate(net.parameters()):
        scale = 1.5 / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else bias
        parameter.data = scale * normal(*parameter.shape, seed=number)
    for number, module in enumerate(net.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data = 1.0 + 0.3 * normal(module.num_features, seed=number + 80)
            module.running_mean = normal(module.num_features, seed=number)
            module.running_var = normal(module.num_features, seed=number + 50).abs() + 0.3
    return net.double().eval().requires_grad_(False)


# --- nets of the usual kinds ------------------------------------------------------------------------------------------


def plain_net() -> nn.Module:
    """Two convolutions of stride 2, two linear layers."""
    layers = [nn.Conv2d(1, 4, 4, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 4, 2, 1), nn.ReLU()]
    return seeded_net(nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, CLASSES)))


class Block(nn.Module):
    """Two convolutions with BatchNorm beside a shortcut, which is a convolution with BatchNorm if it shrinks."""

    def __init__(self, channels: int, wide: int, stride: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, wide, 3, stride, 1, bias=False), nn.BatchNorm2d(wide)
        self.conv2, self.norm2 = nn.Conv2d(wide, wide, 3, 1, 1, bias=False), nn.BatchNorm2d(wide)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def residual_net() -> nn.Module:
    first = [nn.Conv2d(1, 3, 3, 2, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU()]
    blocks = [Block(3, 3, 1), Block(3, 4, 2)]
    return seeded_net(nn.Sequential(*first, *blocks, nn.Flatten(), nn.Linear(16, CLASSES)))


NETS = {"plain": plain_net, "residual": residual_net}


def asked(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A net, images and the classes that it gives them."""
    net, x = NETS[name](), (0.5 + 0.25 * normal(BATCH, 1, SIDE, SIDE, seed=7)).clamp(0.0, 1.0)
    return net, x, net(x).argmax(dim=1)


def check_order(name: str, threat: Threat, eps: float, tuned: bool = True) -> None:
    """IBP below CROWN-IBP and CROWN, these below alpha on the whole, and all below what PGD finds."""
    net, x, labels = asked(name)
    told = {"norm": threat.norm, "clip": threat.clip}
    found = pgd(net, x, labels, eps, steps=15, restarts=1, dtype=torch.float64, **told).margin
    worst = {
        method: certified_margin(net, x, labels, eps, method=method, alpha_steps=4, **told).amin(dim=1)
        for method in (*METHODS, *["alpha"] * tuned)
    }
    for method, margin in worst.items():
        check_below(margin, found, f"{name}, {threat}: {method} above an attack")
    for better in ("crown-ibp", "crown"):
        check_below(worst["ibp"], worst[better], f"{name}, {threat}: {better} below ibp")
    best = worst["alpha" if tuned else "crown"]
    check_below(worst["crown"], best, f"{name}, {threat}: alpha below crown")
    assert worst["crown"].mean() > worst["crown-ibp"].mean() > worst["ibp"].mean()
    assert (found - best < 0.8 * (found - worst["ibp"])).all()  # bounds that say something


EPS = {1.0: 0.3, 2.0: 0.1, INF: 0.01}


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("name", NETS)
def test_bounds_lie_between_looser_ones_and_an_attack(name, threat):
    check_order(name, threat, EPS[threat.norm], tuned=threat.norm == 2.0)


@pytest.mark.parametrize("name", NETS)
def test_radii_end_below_what_an_attack_needs(name):
    net, x, labels = asked(name)
    for norm in EPS:
        radius = certified_radius(net, x, labels, norm=norm)
        assert (radius > 0).all() and (pgd(net, x, labels, radius, norm=norm, steps=15, restarts=1).margin > 0).all()
        assert (certified_margin(net, x, labels, 1.05 * radius, norm=norm).amin(dim=1) < 1e-3).all()


def broken_relaxation(monkeypatch):
    """The chord above a ReLU lies a little too low."""
    stock = Activation.relax

    def wrong(self, *given, **more):
        lower, upper = stock(self, *given, **more)
        return Relaxation(lower, Plane(upper.slopes, 0.5 * upper.intercept))

    monkeypatch.setattr(Activation, "relax", wrong)


def broken_statistics(monkeypatch):
    """A convolution forgets its bias, into which BatchNorm is folded, where coefficients pass."""
    monkeypatch.setattr(
        Convolution,
        "offset",
        lambda self, bounds: (
            self.apply(bounds.known_part(self.parents[0]))
            if bounds.known_part(self.parents[0]) is not None
            else torch.zeros_like(self.bias)[None]
        ),
    )


@pytest.mark.parametrize(
    ("name", "broken"),
    [("plain", broken_relaxation), ("residual", broken_relaxation), ("residual", broken_statistics)],
)
def test_broken_bounds_are_caught(name, broken, monkeypatch):
    broken(monkeypatch)
    with pytest.raises(AssertionError):
        check_order(name, THREATS[2], EPS[INF], tuned=False)


# --- the kinds of cnn/, small -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "width"), [pytest.param("densenet", 1, marks=pytest.mark.full), ("resnext", 2), ("wide_resnet", 1)]
)
def test_dense_grouped_and_wide_networks(kind, width):
    """Random weights; statistics of their images. Backward bounds at every layer say something, intervals do not."""
    torch.manual_seed(0)
    net, x = make_cnn(kind, 1, 16, CLASSES, width, mean=0.5, std=0.25), torch.rand(1, 1, 16, 16)
    with torch.no_grad():
        net.train()(torch.rand(32, 1, 16, 16))
    net, x = net.double().eval().requires_grad_(False), x.double()
    labels, eps = net(x).argmax(dim=1), 5e-4
    found = pgd(net, x, labels, eps, norm=INF, steps=5, restarts=1, dtype=torch.float64).margin
    for method in METHODS:
        worst = certified_margin(net, x, labels, eps, norm=INF, method=method).amin(dim=1)
        check_below(worst, found, f"{kind}: {method} above an attack")
    check_below(found - 1.0, worst, f"{kind}: crown far below")


# --- four pixels: bounds against grids --------------------------------------------------------------------------------


class Normalised(nn.Module):
    """Two channels of different mean and std, before anything else."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor([0.3, 0.6]).reshape(1, 2, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 1.5]).reshape(1, 2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.mean) / self.std)


def with_head(*layers: nn.Module, values: int) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(values, CLASSES))


def negative_maximum() -> nn.Module:
    """All values are negative, so that padding with zeros would be the greatest; windows overlap."""
    net = seeded_net(with_head(nn.Conv2d(2, 2, 1), nn.MaxPool2d((1, 2), stride=1, padding=(0, 1)), values=6))
    net[0].bias -= 4.0
    return net


SMALL = {
    "padded max pool": negative_maximum,
    "groups": lambda: seeded_net(
        with_head(
            nn.Conv2d(2, 4, (1, 2), padding=(0, 1), groups=2),
            nn.ReLU(),
            nn.Conv2d(4, 6, (1, 2), groups=2),
            nn.ReLU(),
            values=12,
        )
    ),
    "normalised": lambda: seeded_net(Normalised(with_head(nn.Conv2d(2, 3, (1, 2)), nn.ReLU(), values=3))),
    "BatchNorm first": lambda: seeded_net(
        with_head(nn.BatchNorm2d(2), nn.Conv2d(2, 3, (1, 2)), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU(), values=3)
    ),
}
GRID, RADIUS = 9, 0.4


def grid_points(x: Tensor, norm: float) -> Tensor:
    """(count, 4): a grid of the box around x, (4,), drawn into the ball."""
    steps = torch.linspace(-RADIUS, RADIUS, GRID).double()
    delta = torch.tensor(list(itertools.product(steps.tolist(), repeat=4))).double()
    frames = x.expand(len(delta), 1, 4)
    eps = torch.full((len(delta), 1), RADIUS).double()
    return project(frames + delta[:, None], frames, eps, Threat(norm))[:, 0]


def small(name: str) -> tuple[nn.Module, Tensor, Graph]:
    net, x = SMALL[name](), 0.5 + 0.2 * normal(1, 2, 1, 2, seed=3)
    return net, x, trace(net, x)


def check_grid(net: nn.Module, x: Tensor, graph: Graph, norm: float) -> None:
    points = grid_points(x.flatten(), norm)
    with torch.no_grad():
        logits = net(points.reshape(-1, 2, 1, 2))
    labels = net(x).argmax(dim=1)
    rows = margin_rows(labels, CLASSES).double()
    least = (rows @ logits[..., None]).squeeze(-1).amin(dim=0)
    clean = (rows @ net(x)[..., None]).squeeze(-1)
    values = graph._values(points[:, None])
    eps = torch.full((1, 1), RADIUS).double()
    for method in METHODS:
        bounds = BoundPass(graph, Threat(norm).around(x.reshape(1, 1, 4), eps), method)
        margin = bounds.margin(rows)
        check_below(margin, least, f"{norm}: {method} above a point of the grid")
        for node in (one for one in graph.nodes if isinstance(one, (Convolution, Activation, Maximum))):
            low, high = bounds.interval(node)
            check_below(low[0], values[node.index].amin(dim=0), f"{norm}: node {node.index}")
            check_below(-high[0], -values[node.index].amax(dim=0), f"{norm}: node {node.index}")
    assert (clean - margin < 3.0 * (clean - least) + 1e-9).all()  # the last, crown: tight as well
    first = next(node for node in graph.nodes if isinstance(node, Convolution))
    low, high = bounds.interval(first)
    reached = values[first.index].amax(dim=0) - values[first.index].amin(dim=0)
    assert (high - low <= (1.05 if norm == 2.0 else 1.0 + 1e-9) * reached).all()  # the first layer's are exact


@pytest.mark.parametrize("norm", [1.0, 2.0, INF])
@pytest.mark.parametrize("name", SMALL)
def test_bounds_hold_on_a_grid(name, norm):
    check_grid(*small(name), norm)


def pads_with_zeros(monkeypatch):
    monkeypatch.setattr(
        Maximum,
        "_stacked",
        lambda self, parts: torch.where(self.present[:, None], torch.stack(torch.broadcast_tensors(*parts)), 0.0),
    )


def takes_pools_as_disjoint(monkeypatch):
    """The greatest of a window is taken to be the one of the greatest lower bound."""
    stock = Maximum.relax

    def wrong(self, *operands, slopes=None):
        lower, _ = stock(self, *operands, slopes=slopes)
        return Relaxation(lower, lower)

    monkeypatch.setattr(Maximum, "relax", wrong)


def mixes_groups(monkeypatch):
    """The kernels of groups stand over each other's channels."""
    stock = windows._whole_kernel
    monkeypatch.setattr(windows, "_whole_kernel", lambda node: stock(node).flip(1))


def meets_balls_before_the_scale(monkeypatch):
    """A ball of radius eps is taken for one behind the normalisation."""
    scale = torch.tensor([0.2, 1.5]).double().reshape(1, 2, 1, 1)
    stock = Convolution.row_norms

    def wrong(self, norm):
        kept, self.weight = self.weight, self.weight * scale
        try:
            return stock(self, norm)
        finally:
            self.weight = kept

    monkeypatch.setattr(Convolution, "row_norms", wrong)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("padded max pool", pads_with_zeros),
        ("padded max pool", takes_pools_as_disjoint),
        ("groups", mixes_groups),
        ("normalised", meets_balls_before_the_scale),
    ],
)
def test_a_grid_catches_what_is_wrong(name, broken, monkeypatch):
    given = small(name)  # read before: a reading that computes something else is refused
    broken(monkeypatch)
    with pytest.raises(AssertionError):
        for norm in (1.0, 2.0, INF):
            check_grid(*given, norm)
