"""Layers over images: the module's values, sound bounds for every norm, and those of the matrices that they are."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
import torch.nn.functional as F
from helpers import Threat, check_below, check_intervals, lowest_margins, normal, random_points
from torch import Tensor, nn

from data.torchvision_compat import import_torchvision
from utils.bounds.passes import BoundPass
from utils.certify import certified_margin, certified_radius
from utils.graph.convolution import Convolution, Windows
from utils.graph.pooling import Maximum
from utils.network.trace import trace
from utils.perturbation.lp_ball import INF
from utils.question import margin_rows
from utils.relaxation.lines import Relaxation

CLASSES = 3


class Net(nn.Module):
    """A forward, given as a function of the net and x, and its layers."""

    def __init__(self, forward, **layers: nn.Module):
        super().__init__()
        self.forward_of = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_of(self, x)


def chain(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(CLASSES))


def dense_block(net, x):
    x = net.first(x)
    for norm, conv in ((net.norm1, net.conv1), (net.norm2, net.conv2)):
        x = torch.cat((conv(F.relu(norm(x))), x), dim=1)
    return net.head(F.avg_pool2d(F.relu(x), 2).mean(dim=(2, 3)))


def residual(net, x):
    x = F.relu(net.norm1(net.first((x - 0.4) / 0.5)))
    return net.head(torch.flatten(F.relu(net.norm2(net.conv1(x)) + net.shortcut(x)), 1))


def normalised(net, x):
    mean, std = torch.tensor([0.3, 0.5]).reshape(1, 2, 1, 1), torch.tensor([0.2, 0.4]).reshape(1, 2, 1, 1)
    return net.head(F.relu(net.conv((x - mean) / std)).flatten(1))


def per_pixel(net, x):
    return net.head(F.relu(net.conv(x * net.scale + 0.1)).flatten(1))


def pixels() -> nn.Module:
    net = Net(per_pixel, conv=nn.Conv2d(2, 2, 3, padding=1), head=nn.LazyLinear(CLASSES))
    net.register_buffer("scale", 0.5 + normal(2, 5, 6, seed=8).abs().float())
    return net


def residual_net() -> nn.Module:
    layers = {
        "first": nn.Conv2d(2, 3, 3, padding=1),
        "norm1": nn.BatchNorm2d(3),
        "conv1": nn.Conv2d(3, 3, 3, padding=1),
    }
    return Net(residual, **layers, norm2=nn.BatchNorm2d(3), shortcut=nn.Conv2d(3, 3, 1), head=nn.LazyLinear(CLASSES))


def dense_net() -> nn.Module:
    layers = {"first": nn.Conv2d(2, 2, 3, 2, 1), "norm1": nn.BatchNorm2d(2), "conv1": nn.Conv2d(2, 2, 3, padding=1)}
    return Net(dense_block, **layers, norm2=nn.BatchNorm2d(4), conv2=nn.Conv2d(4, 2, 1), head=nn.Linear(6, CLASSES))


NETS = {
    "strides, padding, groups": lambda: chain(
        nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0)),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2),
        nn.Tanh(),
    ),
    "conv, conv, norm": lambda: chain(
        nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()
    ),
    "same, even kernel": lambda: chain(nn.Conv2d(2, 2, (2, 4), padding="same"), nn.ReLU()),
    "transposed": lambda: chain(
        nn.Conv2d(2, 2, 3, stride=2),
        nn.ReLU(),
        nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
    ),
    "transposed first": lambda: chain(nn.ConvTranspose2d(2, 2, 2, stride=3), nn.BatchNorm2d(2), nn.ReLU()),
    "max pool, padded": lambda: chain(nn.Conv2d(2, 2, 3), nn.ReLU(), nn.MaxPool2d(3, stride=1, padding=1)),
    "max pool of the input": lambda: chain(nn.MaxPool2d((3, 2), stride=2, padding=(1, 1), ceil_mode=True)),
    "mean pool": lambda: chain(
        nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False, ceil_mode=True), nn.Conv2d(2, 2, 2), nn.ReLU()
    ),
    "adaptive": lambda: chain(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d((2, 1))),
    "residual": residual_net,
    "densenet": dense_net,
    "normalised": lambda: Net(normalised, conv=nn.Conv2d(2, 2, 3, padding=1), head=nn.LazyLinear(CLASSES)),
    "pixels": pixels,
}


def net_of(name: str) -> tuple[nn.Module, Tensor]:
    """A net of random weights and statistics, and its input."""
    net, x = NETS[name](), (0.5 + 0.2 * normal(2, 2, 5, 6, seed=3)).clamp(0.05, 0.95)
    net(x.float())
    for number, parameter in enumerate(net.parameters()):
        scale = 1.0 / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 0.4
        parameter.data = scale * normal(*parameter.shape, seed=number)
    for number, module in enumerate(net.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = normal(module.num_features, seed=number)
            module.running_var = normal(module.num_features, seed=number + 50).abs() + 0.3
    return net.double().eval().requires_grad_(False), x


def check_sound(graph, x: Tensor, eps: float, threats, methods=("ibp", "crown-ibp", "crown")) -> None:
    rows, sizes = margin_rows(torch.arange(len(x)), CLASSES).double(), torch.full(x.shape[:2], eps).double()
    for number, threat in enumerate(threats):
        found = lowest_margins(graph, x, sizes, rows, threat, number)
        points = random_points(x, sizes, threat, 8, number)
        for method in methods:
            bounds = BoundPass(graph, threat.around(x, sizes), method)
            check_below(bounds.margin(rows), found, f"{method} margin")
            check_intervals(bounds, points)


@pytest.mark.parametrize("name", NETS)
def test_values_and_bounds(name):
    net, x = net_of(name)
    graph, frames = trace(net, x), x.flatten(1)[:, None]
    assert any(isinstance(node, (Convolution, Maximum)) for node in graph.nodes)
    torch.testing.assert_close(graph.evaluate(frames), net(x), rtol=1e-12, atol=1e-12)
    check_sound(graph, frames, 0.1, [*map(Threat, (1.0, 2.0, INF)), Threat(INF, clip=(0.0, 1.0))])


@pytest.mark.parametrize("name", NETS)
def test_bounds_are_those_of_the_matrices(name):
    net, x = net_of(name)
    graph, frames = trace(net, x), x.flatten(1)[:, None]
    rows, sizes = margin_rows(torch.arange(len(x)), CLASSES).double(), torch.full((len(x), 1), 0.1).double()
    for threat in (Threat(1.0), Threat(2.0), Threat(INF)):
        for method in ("ibp", "crown"):
            found = [
                BoundPass(one, threat.around(frames, sizes), method).margin(rows) for one in (graph, graph.dense())
            ]
            torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_bounds_of_the_first_layer_are_exact_in_every_norm():
    """Of a convolution of a normalised image, each value's interval ends where the ball's furthest points lead."""
    net, x = net_of("normalised")
    graph, frames, eps = trace(net, x), x.flatten(1)[:, None], torch.full((2, 1), 0.1, dtype=torch.float64)
    first = next(node for node in graph.nodes if isinstance(node, Convolution))
    jacobian = torch.autograd.functional.jacobian(lambda flat: first.value(flat[None])[0], frames[0, 0])
    for norm, dual in ((1.0, INF), (2.0, 2.0), (INF, 1.0)):
        low, high = BoundPass(graph, Threat(norm).around(frames, eps), "ibp").interval(first)
        reach = 0.1 * torch.linalg.vector_norm(jacobian, ord=dual, dim=1)
        torch.testing.assert_close(high - low, 2 * reach.expand_as(low), rtol=1e-9, atol=1e-12)


def broken_windows(monkeypatch):
    """Coefficients do not come back to where they belong."""
    whole = Windows.spread
    monkeypatch.setattr(Windows, "spread", lambda self, images, weight: whole(self, images, weight.flip(-1)))


def broken_padding(monkeypatch):
    """Padding of max pooling counts as 0."""
    monkeypatch.setattr(
        Maximum, "_stacked", lambda self, parts: torch.stack(torch.broadcast_tensors(*parts)) * 1.0 - 1.0
    )


def broken_pivot(monkeypatch):
    """The maximum is taken to be where the lower plane has it."""
    right = Maximum.relax

    def wrong(self, *operands, slopes=None):
        lower, _ = right(self, *operands, slopes=slopes)
        return Relaxation(lower, lower)

    monkeypatch.setattr(Maximum, "relax", wrong)


def broken_norms(monkeypatch):
    """An l_2 ball is met by weights without the normalisation's scale."""
    monkeypatch.setattr(Convolution, "row_norms", lambda self, norm: torch.full_like(self.bias, 0.5))


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("strides, padding, groups", broken_windows),
        ("max pool, padded", broken_padding),
        ("max pool, padded", broken_pivot),
        ("normalised", broken_norms),
    ],
)
def test_broken_versions_are_caught(name, broken, monkeypatch):
    net, x = net_of(name)
    graph = trace(net, x)
    broken(monkeypatch)
    with pytest.raises(AssertionError):
        check_sound(graph, x.flatten(1)[:, None], 0.1, (Threat(2.0), Threat(INF)))


def test_planes_of_a_maximum_on_a_grid():
    """Between the planes lies the maximum at all corners and points of a grid, in boxes of every kind."""
    low = normal(3, 40, seed=1)
    high = low + normal(3, 40, seed=2).abs() * torch.tensor([0.0, 0.1, 3.0]).double()[torch.arange(40) % 3]
    present = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) < 0.7
    present[0] |= ~present.any(dim=0)
    node = Maximum.__new__(Maximum)
    node.present = present
    shares = normal(3, 1, 40, seed=4)
    for slopes in (None, (tuple(shares), tuple(shares))):
        lower, upper = node.relax(
            *((one[None], other[None]) for one, other in zip(low, high, strict=True)), slopes=slopes
        )
        for steps in torch.cartesian_prod(*[torch.linspace(0, 1, 5).double()] * 3):
            point = low + steps[:, None] * (high - low)
            value = torch.where(present, point, -torch.inf).amax(dim=0)
            for sign, plane in ((1, lower), (-1, upper)):
                line = plane.intercept[0] + sum(s[0] * p for s, p in zip(plane.slopes, point, strict=True))
                assert (sign * (value - line) >= -1e-12).all()
    exact = present.sum(dim=0) == 1
    assert (upper.intercept[0][exact] == 0).all() and exact.any()


def test_methods_that_ask_for_matrices_get_them():
    net, x = net_of("conv, conv, norm")
    labels = net(x).argmax(dim=1)
    by_crown = certified_radius(net, x, labels, norm=2.0)
    for method, least in (("alpha", 1.0), ("curve", 1.0), ("ball", 0.5), ("fastlin", 0.1), ("jacobian", 0.1)):
        radius = certified_radius(net, x, labels, norm=2.0, method=method, curve_steps=3)
        assert (radius >= least * (1 - 1e-2) * by_crown).all(), method


def test_alpha_tunes_the_planes_of_a_maximum():
    net, x = net_of("max pool, padded")
    labels = net(x).argmax(dim=1)
    crown, alpha = (certified_margin(net, x, labels, 0.3, norm=INF, method=method) for method in ("crown", "alpha"))
    assert (alpha >= crown - 1e-9).all() and (alpha > crown + 1e-6).any()


def test_gradients_reach_the_weights():
    net, x = net_of("residual")
    net.requires_grad_(True)
    labels = torch.zeros(2, dtype=torch.int64)
    margin = certified_margin(net, x, labels, 0.05)
    gradients = torch.autograd.grad(margin.sum(), list(net.parameters()))
    step = 1e-6
    net.first.weight.data[1, 0, 2, 2] += step
    after = certified_margin(net, x, labels, 0.05)
    torch.testing.assert_close((after - margin).sum() / step, gradients[0][1, 0, 2, 2], rtol=1e-3, atol=1e-4)


def test_an_image_in_parts_of_several_frames():
    """Convolution over the time steps of a sequence, and of a transposed one."""
    net = nn.Sequential(nn.Conv1d(4, 3, 3, padding=1, groups=1), nn.ReLU(), nn.Flatten(), nn.Linear(9, CLASSES))
    net, x = net.double().eval().requires_grad_(False), normal(2, 4, 3, seed=1)
    graph = trace(net, x)
    torch.testing.assert_close(graph.evaluate(x), net(x), rtol=1e-12, atol=1e-12)
    check_sound(graph, x, 0.1, (Threat(2.0), Threat(INF)))


def frame_by_frame(net, x):
    """Images of all frames go through the layers as one large batch, time step by time step or sample by sample."""
    images = (x.transpose(0, 1) if net.steps_first else x).reshape(-1, 1, 4, 4)
    y = net.pool(F.relu(net.conv2(F.relu(net.conv1(images))))).flatten(1)
    y = y.reshape(x.shape[1], x.shape[0], -1).transpose(0, 1) if net.steps_first else y.reshape(*x.shape[:2], -1)
    return net.head(net.rnn(y)[1][0])


def frames_net(pool: nn.Module, steps_first: bool) -> nn.Module:
    layers = {"conv1": nn.Conv2d(1, 2, 3, padding=1), "conv2": nn.ConvTranspose2d(2, 2, 3, padding=1), "pool": pool}
    net = Net(frame_by_frame, **layers, rnn=nn.RNN(8, 3, batch_first=True), head=nn.Linear(3, CLASSES))
    net.steps_first = steps_first
    for number, parameter in enumerate(net.parameters()):
        parameter.data = normal(*parameter.shape, seed=number)
    return net.double().eval().requires_grad_(False)


@pytest.mark.parametrize("pool, steps_first", [(nn.MaxPool2d(2), False), (nn.AvgPool2d(2), True)])
def test_images_of_frames_in_one_batch(pool, steps_first):
    net, x = frames_net(pool, steps_first), normal(2, 3, 16, seed=40)
    graph = trace(net, x)
    torch.testing.assert_close(graph.evaluate(x), net(x), rtol=1e-12, atol=1e-12)
    assert sum(isinstance(node, Convolution) for node in graph.nodes) >= 2 * 3
    check_sound(graph, x, 0.05, (Threat(2.0), Threat(INF)))


def test_samples_that_are_mixed_are_refused_as_before():
    for mixed in (lambda x: x.flip(0), lambda x: torch.cat((x[:1], -x[1:])), lambda x: x[:1].expand_as(x)):
        net = chain(nn.Conv2d(1, 1, 3), nn.ReLU(), nn.Conv2d(1, 1, 2), nn.MaxPool2d(1))
        net(torch.zeros(1, 1, 4, 4))
        first = net[0]
        first.register_forward_hook(lambda module, given, output, mixed=mixed: mixed(output))
        with pytest.raises(ValueError):
            trace(net.double().eval(), normal(2, 1, 4, 4, seed=2))


def test_padding_that_is_not_finite_is_refused():
    def padded(net, x):
        return net.head(F.max_pool2d(F.pad(net.conv(x), (1, 1, 1, 1), value=-INF), 3).flatten(1))

    net = Net(padded, conv=nn.Conv2d(1, 1, 3), head=nn.Linear(1, CLASSES)).double()
    with pytest.raises(ValueError, match="not finite"):
        trace(net, normal(2, 1, 4, 4, seed=2))


def test_windows_are_transposes_of_each_other():
    generator = torch.Generator().manual_seed(1)
    for pads in ((0, 0, 0, 0), (1, 1, 2, 2), (0, 2, 1, 0)):
        windows = Windows((4, 6, 7), (6, 2, 3), (3, 2), pads, (1, 2), 2)
        windows = dataclasses.replace(
            windows, small=(6, (6 + pads[2] + pads[3] - 3) // 3 + 1, (7 + sum(pads[:2]) - 3) // 2 + 1)
        )
        weight = torch.randn(6, 2, 3, 2, generator=generator).double()
        images = torch.randn(1, 4 * 6 * 7, generator=generator).double()
        places = torch.randn(1, windows.small[0] * windows.small[1] * windows.small[2], generator=generator).double()
        left = (windows.correlate(images, weight) * places).sum()
        torch.testing.assert_close(left, (windows.spread(places, weight) * images).sum(), rtol=1e-10, atol=1e-10)


def vision_nets(models) -> dict[str, nn.Module]:
    bottleneck = models.resnet.Bottleneck
    return {
        "resnet18": models.resnet18(num_classes=CLASSES),
        "densenet": models.DenseNet(4, (2, 2), 4, num_classes=CLASSES),
        "resnext": models.ResNet(bottleneck, [1, 1, 1, 1], CLASSES, groups=2, width_per_group=4),
    }


@pytest.mark.parametrize("name", ["resnet18", "densenet", "resnext"])
def test_torchvisions_networks_read_as_they_are(name):
    """Values are the module's; no bound is above what an attack finds."""
    torch.manual_seed(0)
    import_torchvision()
    net = vision_nets(importlib.import_module("torchvision.models"))[name].eval().requires_grad_(False)
    x, labels = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])
    graph = trace(net, x)
    torch.testing.assert_close(graph.evaluate(x.double().flatten(1)[:, None]).float(), net(x), rtol=1e-4, atol=1e-4)
    eps, rows = 1e-4, margin_rows(labels, CLASSES)
    margin = certified_margin(net, x, labels, eps, norm=INF, method="crown-ibp")
    for number in range(4):
        at = x + eps * torch.sign(normal(*x.shape, seed=number)).float()
        check_below(margin, (rows @ net(at)[..., None]).squeeze(-1))
    assert margin.isfinite().all()
