"""Modules are read once, and again as soon as anything of them has changed."""

from __future__ import annotations

import gc
import os
import weakref

import pytest
import torch
from helpers import normal
from torch import Tensor, nn

from utils.certify import certified_margin
from utils.graph import Graph
from utils.network import reading as readings
from utils.network.reading import read_module
from utils.network.trace import TracedModule

SCALE = 1.0


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.norm = nn.BatchNorm1d(5)
        self.slope, self.parts = 0.1, [1, 2]

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.leaky_relu(self.norm(self.first(x * SCALE)), self.slope)
        return self.last(h) / sum(self.parts)


def net_of() -> tuple[nn.Module, Tensor]:
    net = Net()
    for number, parameter in enumerate(net.parameters()):
        parameter.data = normal(*parameter.shape, seed=number)
    return net.double().eval().requires_grad_(False), normal(2, 4, seed=9)


@pytest.fixture
def counted(monkeypatch) -> list:
    """The modules that are really read."""
    found = []
    whole = TracedModule.__init__

    def counting(self, module, x, *outputs, **how):
        found.append(module)
        whole(self, module, x, *outputs, **how)

    monkeypatch.setattr(TracedModule, "__init__", counting)
    return found


def margin(net: nn.Module, x: Tensor) -> Tensor:
    return certified_margin(net, x, torch.zeros(len(x), dtype=torch.int64), 0.1)


CHANGES = {
    "nothing": lambda net: None,
    "a weight, in place": lambda net: net.first.weight.mul_(1.1),
    "a weight, behind its back": lambda net: net.first.weight.data[0, 0].add_(0.5),
    "a buffer": lambda net: net.norm.running_mean.add_(0.5),
    "another weight": lambda net: setattr(net.last, "weight", nn.Parameter(2 * net.last.weight, False)),
    "a layer": lambda net: setattr(net, "last", nn.Linear(5, 3).double().requires_grad_(False)),
    "a number": lambda net: setattr(net, "slope", 0.2),
    "a list": lambda net: net.parts.append(3),
    "eps of a layer": lambda net: setattr(net.norm, "eps", 0.5),
    "another forward": lambda net: setattr(net, "forward", lambda x: net.last(torch.relu(net.first(x)))),
    "a hook": lambda net: net.first.register_forward_hook(lambda module, given, output: 2 * output),
    "a global name": lambda net: globals().update(SCALE=2.0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_noticed(name, counted, monkeypatch):
    monkeypatch.setitem(globals(), "SCALE", 1.0)
    net, x = net_of()
    first = margin(net, x)
    assert len(counted) == 1
    torch.testing.assert_close(margin(net, x + 0.0), first)
    assert len(counted) == 1
    CHANGES[name](net)
    after = margin(net, x)
    assert (len(counted) == 1) == (name == "nothing")
    readings._kept.clear()
    torch.testing.assert_close(after, margin(net, x), rtol=0, atol=0)
    assert torch.equal(first, after) == (name == "nothing")


def test_the_test_catches_a_reading_that_is_kept_for_good(counted, monkeypatch):
    monkeypatch.setattr(readings.Reading, "fits", lambda self, state, tensors: True)
    monkeypatch.setattr(TracedModule, "_is_same", lambda self, *given: True)
    net, x = net_of()
    margin(net, x)
    CHANGES["a weight, in place"](net)
    stale = margin(net, x)
    readings._kept.clear()
    assert len(counted) == 1 and not torch.equal(stale, margin(net, x))


def named(x: Tensor) -> Tensor:
    return torch.relu(x)


def with_default(x: Tensor, *, factor: float = 2.0) -> Tensor:
    return factor * x


def positive_layer() -> nn.Module:
    layer = nn.Linear(4, 4, dtype=torch.float64).requires_grad_(False)
    layer.weight.copy_(normal(4, 4, seed=3).abs())
    layer.bias.fill_(0.1)
    return layer


def double(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(2.0 * layer.weight, False)


class Reaching(nn.Module):
    """Uses what is no attribute of its own: of its class, of its file, in a list, in a closure."""

    factor = 1.0

    def __init__(self):
        super().__init__()
        self.last, self.hidden, self.scaled = nn.Linear(4, 3), [positive_layer()], with_default
        self.truth, inner = 1, positive_layer()
        self.inner = lambda x: inner(x)

    def helped(self, x: Tensor) -> Tensor:
        return self.factor * x

    def forward(self, x: Tensor) -> Tensor:
        x = named(self.inner(self.hidden[0](x)))
        x = self.last(self.scaled(self.helped(x)))
        return x if self.truth is True else SCALE * x


class Plain(Reaching):
    """Without weights that nobody looks at: what is read of it is kept."""

    def __init__(self):
        super().__init__()
        self.hidden, self.inner = [nn.Identity.forward], None

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.scaled(self.helped(named(x))))
        return x if self.truth is True else SCALE * x + 1.0


FAR_CHANGES = {
    "a layer in a list": (Reaching, lambda net, patch: double(net.hidden[0])),
    "a layer in a closure": (Reaching, lambda net, patch: double(net.inner.__closure__[0].cell_contents)),
    "a number of the class": (Plain, lambda net, patch: patch.setattr(Reaching, "factor", 3.0)),
    "a method of the class": (Plain, lambda net, patch: patch.setattr(Reaching, "helped", lambda self, x: 3.0 * x)),
    "a function": (Plain, lambda net, patch: patch.setitem(globals(), "named", lambda x: torch.tanh(x))),
    "torch's function": (Plain, lambda net, patch: patch.setattr(torch, "relu", torch.tanh)),
    "a default": (Plain, lambda net, patch: patch.setitem(with_default.__kwdefaults__, "factor", 3.0)),
    "True for 1": (Plain, lambda net, patch: setattr(net, "truth", True)),
    "a number of the file": (Plain, lambda net, patch: patch.setitem(globals(), "SCALE", 2.0)),
}


def change_far(name: str, monkeypatch) -> tuple[Tensor, Tensor, Tensor]:
    """Margins before, after and after by a new reading, where no sample shows that the graph is another."""
    kind, change = FAR_CHANGES[name]
    net, x = kind().double().eval().requires_grad_(False), normal(2, 4, seed=9).abs()
    net.last.weight.copy_(normal(3, 4, seed=1))
    first = margin(net, x)
    monkeypatch.setattr(TracedModule, "for_input", lambda self, module, given: with_input(self, module, given))
    change(net, monkeypatch)
    after = margin(net, x)
    readings._kept.clear()
    return first, after, margin(net, x)


def with_input(traced: TracedModule, module: nn.Module, x: Tensor) -> TracedModule:
    twin = traced.without_module()
    twin.module, twin.x, twin.frames = module, x, x[:, None]
    return twin


@pytest.mark.parametrize("name", FAR_CHANGES)
def test_changes_out_of_the_modules_sight_are_noticed(name, monkeypatch):
    """A change may show at no unperturbed sample, or by less than what precisions differ by."""
    first, after, anew = change_far(name, monkeypatch)
    assert torch.equal(after, anew) and not torch.equal(first, anew)


@pytest.mark.parametrize("name", FAR_CHANGES)
def test_changes_that_are_not_looked_at_are_caught(name, monkeypatch):
    monkeypatch.setattr(readings, "fingerprint", lambda module: ())
    _, after, anew = change_far(name, monkeypatch)
    assert not torch.equal(after, anew)


class Named(nn.Module):
    """Asks for a number by a name that no code holds."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return float(os.environ["_".join(("FACTOR", "OF", "X"))]) * self.last(x)


@pytest.mark.parametrize("noticed", [True, False])
def test_what_no_code_names_shows_at_the_sample_that_was_read(noticed, counted, monkeypatch):
    monkeypatch.setenv("FACTOR_OF_X", "1.0")
    net, x = Named().eval().requires_grad_(False), normal(2, 4, seed=9)
    margin(net, x)
    monkeypatch.setenv("FACTOR_OF_X", "3.0")
    if not noticed:  # this test can fail
        monkeypatch.setattr(TracedModule, "_is_same", lambda self, *given: True)
    after = margin(net, x)
    monkeypatch.undo()
    monkeypatch.setenv("FACTOR_OF_X", "3.0")
    readings._kept.clear()
    assert torch.equal(after, margin(net, x)) == noticed


def test_what_holds_itself_is_read_and_kept(counted):
    def again(x, times):
        return again(torch.relu(x), times - 1) if times else x

    def unbound(x):
        return never(x) if x is None else x

    net, x = net_of()
    net.again, net.unbound, net.held = again, unbound, [1]
    net.held.append(net.held)
    if net is None:
        never = None
    margin(net, x)
    margin(net, x)
    assert len(counted) == 1


def test_a_later_reading_makes_and_evaluates_no_graph(monkeypatch):
    """It takes longer than all else that a later call does (benchmarks/time_readings.py)."""
    net, x = net_of()
    read_module(net, x)
    monkeypatch.setattr(Graph, "evaluate", None)
    monkeypatch.setattr(TracedModule, "_trace", None)
    with torch.no_grad():
        assert torch.equal(read_module(net, x + 1.0).frames, (x + 1.0)[:, None])
        net.slope = 0.2
        with pytest.raises(TypeError):
            read_module(net, x)


def test_shapes_and_precisions_have_readings_of_their_own(counted):
    net, x = net_of()
    for given in (x, x[:1], x.reshape(2, 4)):
        margin(net, given)
    assert len(counted) == 1
    assert certified_margin(net, x, torch.zeros(2, dtype=torch.int64), 0.1, dtype=torch.float32).dtype == torch.float32
    assert len(counted) == 1
    with pytest.raises(ValueError, match="finite"):
        margin(net, x * torch.nan)


def test_gradients_are_those_of_a_module_that_is_read_anew(counted):
    net, x = net_of()
    margin(net, x)
    net.requires_grad_(True)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(margin(net, x).sum(), net.first.weight)
        assert (gradient != 0).any()
    assert len(counted) == 3


class Counting(Net):
    def forward(self, x):
        self.slope = 0.1
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


class Holding(Net):
    def __init__(self):
        super().__init__()
        self.held = iter(())


@pytest.mark.parametrize("kind", [Counting, Holding])
def test_modules_that_change_or_hold_what_nobody_looks_into_are_read_each_time(kind, counted):
    net, x = kind().double().eval().requires_grad_(False), normal(2, 4, seed=9)
    margin(net, x)
    margin(net, x)
    assert len(counted) == 2


def test_modules_are_not_held():
    net, x = net_of()
    read_module(net, x)
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None
