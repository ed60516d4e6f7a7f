"""Rows of single neurons: which get them, and that windows give what images of coefficients give."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import INF, Threat, check_below, normal, random_points
from torch import Tensor, nn

from utils.bounds.neurons import tighten, windows
from utils.bounds.passes import BoundPass
from utils.graph.convolution import Convolution
from utils.network.trace import trace
from utils.question import margin_rows

CLASSES = 3


class Residual(nn.Module):
    """Convolutions one upon another, with padding and biases, a shortcut of another kernel, channels side by side."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.left, self.left2 = nn.Conv2d(3, 4, 5, stride=2, padding=2), nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.right, self.last = nn.Conv2d(3, 4, 1, stride=2), nn.Conv2d(8, 4, 3, padding=2, dilation=2)
        self.head = nn.Linear(4 * 7 * 6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = self.left2(self.left(x)) + self.right(x)
        return self.head(F.relu(self.last(torch.cat((F.relu(x), x), dim=1))).flatten(1))


def net_of() -> tuple:
    """A graph and its frames; biases are large, so that what padding gains by mistake is seen."""
    net = Residual()
    for number, parameter in enumerate(net.parameters()):
        scale = 1.0 / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 1.0
        parameter.data = scale * normal(*parameter.shape, seed=number)
    net.norm.running_mean, net.norm.running_var = normal(3, seed=50), 0.5 + normal(3, seed=51).abs()
    net, x = net.double().eval().requires_grad_(False), normal(2, 1, 13, 11, seed=52)
    return trace(net, x), x.flatten(1)[:, None]


THREATS = (Threat(2.0), Threat(INF, clip=(-3.0, 3.0)))


def bounded(graph, frames: Tensor, threat: Threat, eps: float = 0.1) -> BoundPass:
    sizes = torch.full(frames.shape[:2], eps, dtype=frames.dtype)
    return BoundPass(graph, threat.around(frames, sizes), "crown")


def check_neurons(graph, frames: Tensor, threat: Threat, eps: float = 0.1) -> None:
    """The bounds of every operand hold at points of the set, and are those of images of coefficients."""
    by_windows = bounded(graph, frames, threat, eps)
    operands = [node.relaxed_operands[0] for node in graph.nodes if node.relaxed_operands]
    points = random_points(frames, torch.full(frames.shape[:2], eps, dtype=frames.dtype), threat, 8, 1)
    for point in points:
        values = graph._values(point)
        for node in operands:
            low, high = by_windows.interval(node)
            check_below(low, values[node.index])
            check_below(-high, -values[node.index])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tighten, "fits", lambda bounds, node: False)
        by_images = bounded(graph, frames, threat, eps)
    for node in operands:
        for end, other in zip(by_windows.interval(node), by_images.interval(node), strict=True):
            (low, high) = by_images.interval(node)
            unsure = (low < 0) & (high > 0)
            torch.testing.assert_close(end[unsure], other[unsure], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_windows_give_what_images_give(threat):
    graph, frames = net_of()
    assert sum(windows.fits(bounded(graph, frames, threat), node) for node in graph.nodes) > 3
    check_neurons(graph, frames, threat)


@pytest.mark.parametrize("share", [1, 40, 10**6])
def test_parts_of_neurons_and_products_by_matrices_change_nothing(share, monkeypatch):
    graph, frames = net_of()
    monkeypatch.setattr(windows, "BYTES", share * 1000)
    monkeypatch.setattr(windows, "MATRIX_ENTRIES", 0 if share == 1 else 2**22)
    check_neurons(graph, frames, Threat(INF))


def forgets_padding(monkeypatch):
    """Coefficients outside of an image are passed on as if they were some of it."""
    monkeypatch.setattr(windows.WindowPass, "_inside", lambda self, node, given: given)


def shifts_windows(monkeypatch):
    """Windows stand a pixel to the right."""
    whole = windows._cut

    def shifted(images, samples, given):
        return whole(images, samples, windows.replace(given, left=given.left + 1))

    monkeypatch.setattr(windows, "_cut", shifted)


def joins_corners(monkeypatch):
    """Windows of two branches are added corner by corner."""
    whole = windows.WindowPass._joined

    def joined(self, parts, shape):
        return whole(self, [windows.replace(part, top=parts[0].top, left=parts[0].left) for part in parts], shape)

    monkeypatch.setattr(windows.WindowPass, "_joined", joined)


@pytest.mark.parametrize("broken", [forgets_padding, shifts_windows, joins_corners])
def test_broken_windows_are_caught(broken, monkeypatch):
    graph, frames = net_of()
    broken(monkeypatch)
    with pytest.raises(AssertionError):
        check_neurons(graph, frames, Threat(INF))


class Folded(nn.Module):
    """A vector read as images of two shapes, one below the other or side by side; with biases that nothing decides."""

    def __init__(self, below: bool):
        super().__init__()
        self.below = below
        self.first, self.second = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, 1, 4, 16)"""
        folded = F.relu(self.first(x)) if self.below else x
        y = self.second(folded.reshape(-1, 1, 8, 8)).flatten(1)
        return self.head(F.relu(y if self.below else y + self.first(x).flatten(1)))


class Stacked(nn.Module):
    """Images one above the other: pieces of a channel side by side in a vector."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, (2, 3), padding=(0, 1))
        self.last, self.head = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(30, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, 1, 2, 5)"""
        x = torch.cat((F.relu(self.first(x)), F.relu(self.second(x))), dim=2)
        return self.head(F.relu(self.last(x)).flatten(1))


def odd_net(net: nn.Module, *shape: int) -> tuple:
    """A graph and its frames, with weights large enough for windows at the wrong places to be seen."""
    for number, parameter in enumerate(net.parameters()):
        parameter.data = normal(*parameter.shape, seed=number)
    net, x = net.double().eval().requires_grad_(False), normal(2, *shape, seed=52)
    return trace(net, x), x.flatten(1)[:, None]


@pytest.mark.parametrize("net, shape", [(Folded(True), (4, 16)), (Folded(False), (4, 16)), (Stacked(), (2, 5))])
def test_vectors_that_are_no_images_of_one_shape_get_whole_rows(net, shape):
    check_neurons(*odd_net(net, 1, *shape), Threat(INF), 0.5)


@pytest.mark.parametrize("below", [True, False])
def test_windows_over_an_image_of_another_shape_are_caught(below, monkeypatch):
    def first_shape(node, is_exact):
        shapes, open_nodes = {node: windows.image_shape(node)}, [node]
        while open_nodes:
            current = open_nodes.pop()
            sides = (current.in_shape if isinstance(current, Convolution) else shapes[current])[1:]
            for parent in current.parents:
                if parent not in shapes:
                    shapes[parent] = (parent.size // (sides[0] * sides[1]), *sides)
                    open_nodes.append(parent)
        return shapes

    graph, frames = odd_net(Folded(below), 1, 4, 16)
    monkeypatch.setattr(windows, "_shapes", first_shape)
    with pytest.raises(AssertionError):
        check_neurons(graph, frames, Threat(INF), 0.5)


def test_only_neurons_that_matter_get_rows(monkeypatch):
    """And the margins are those of rows for all."""
    graph, frames = net_of()
    rows = margin_rows(torch.arange(len(frames)), CLASSES).double()
    asked = []
    whole = windows.WindowPass.bound
    monkeypatch.setattr(
        windows.WindowPass, "bound", lambda self, *pairs: (asked.append(len(pairs[0])), whole(self, *pairs))[1]
    )
    some = bounded(graph, frames, Threat(INF), 0.02)
    found, few = some.margin(rows), sum(asked)
    asked.clear()
    monkeypatch.setattr(tighten, "undecided", lambda *given: None)
    everything = bounded(graph, frames, Threat(INF), 0.02)
    torch.testing.assert_close(found, everything.margin(rows), rtol=1e-9, atol=1e-9)
    assert 0 < few < 0.7 * sum(asked)


def test_a_choice_that_leaves_out_undecided_neurons_is_caught(monkeypatch):
    """It is sound, but not as tight."""
    graph, frames = net_of()
    rows = margin_rows(torch.arange(len(frames)), CLASSES).double()
    right = bounded(graph, frames, Threat(INF)).margin(rows)
    monkeypatch.setattr(tighten, "undecided", lambda node, interval, read_by: torch.zeros_like(interval[0]) > 0)
    assert (bounded(graph, frames, Threat(INF)).margin(rows) < right - 1e-6).any()


def test_slopes_of_the_planes_get_gradients_through_windows():
    """A step of a first-layer slope changes a later neuron's bound as the gradient says."""
    graph, frames = net_of()
    rows = margin_rows(torch.arange(len(frames)), CLASSES).double()
    first = next(node for node in graph.nodes if isinstance(node, Convolution))
    bias = first.bias

    def margin(shift: Tensor) -> Tensor:
        first.bias = bias + shift
        return bounded(graph, frames, Threat(INF)).margin(rows).sum()

    shift = torch.zeros_like(bias).requires_grad_()
    (gradient,) = torch.autograd.grad(margin(shift), shift)
    step = torch.zeros_like(bias)
    step[40] = 1e-6
    change = (margin(step) - margin(-step)) / 2e-6
    first.bias = bias
    torch.testing.assert_close(change, gradient[40], rtol=1e-3, atol=1e-5)
