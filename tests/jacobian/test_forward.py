"""Bounds of gradients from the input on: equal to autograd's at a point, above all others in the set, never looser."""

from __future__ import annotations

import pytest
import torch
from helpers import Threat
from nets import NETS, gradients_of, points_within
from test_jacobian import BATCH, ROWS, inputs, net, no_gradients, radii

from utils.bounds.passes import BoundPass
from utils.jacobian import JacobianPass, forward
from utils.jacobian.forward import forward_bounds
from utils.perturbation.lp_ball import INF

__all__ = ["no_gradients"]  # a fixture


def values_of(graph, threat: Threat, x, eps) -> BoundPass:
    return BoundPass(graph, threat.around(x, eps))


def entries(name: str, threat: Threat, sizes, chain: str = "chord"):
    graph = net(name)
    x, eps = inputs(graph), radii(graph, sizes)
    values = values_of(graph, threat, x, eps)
    bounds = {frame: forward_bounds(values, ROWS, frame, chain) for frame in range(x.shape[1])}
    return graph, x, eps, bounds


@pytest.mark.parametrize("name", NETS)
def test_of_a_tiny_ball_they_are_the_gradient(name):
    graph, x, _, bounds = entries(name, Threat(2.0), (1e-9, 1e-9, 1e-9))
    gradients = gradients_of(graph, x, ROWS)
    for frame, sides in bounds.items():
        for side in sides:
            torch.testing.assert_close(side.view(BATCH, 2, -1), gradients[:, :, frame], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chain", ["joint", "chord", "recurjac"])
@pytest.mark.parametrize("name", NETS)
def test_no_gradient_of_the_set_is_outside(name, chain):
    threat = Threat(INF)
    graph, x, eps, bounds = entries(name, threat, (0.1, 0.0, 0.3), chain)
    for point in points_within(graph, x, eps, ROWS, threat):
        gradients = gradients_of(graph, point, ROWS).flatten(0, 1)
        for frame, (low, high) in bounds.items():
            assert bool((low <= gradients[:, frame] + 1e-9).all()) and bool((gradients[:, frame] <= high + 1e-9).all())


@pytest.mark.parametrize("name", ["relu", "lstm", "perceptron, tanh"])
def test_the_best_of_both_directions(name):
    graph = net(name)
    x, eps = inputs(graph), radii(graph, (0.2, 0.1, 0.3))
    values = values_of(graph, Threat(INF), x, eps)
    backward, both = (JacobianPass(values, ROWS, "chord", direction=direction) for direction in ("backward", "both"))
    for frame in backward.frames:
        one, other = backward.frame_bounds(frame), forward_bounds(values, ROWS, frame, "chord")
        low, high = both.frame_bounds(frame)
        torch.testing.assert_close(low, torch.maximum(one[0], other[0]))
        torch.testing.assert_close(high, torch.minimum(one[1], other[1]))
    assert bool((both.fall() <= backward.fall() * (1 + 1e-9)).all())


def test_a_derivative_that_is_forgotten_is_noticed(monkeypatch):
    """Of a gate's product the second operand's part counts, too."""

    class Half(forward.Tangents):
        def derivatives(self, node):
            found = super().derivatives(node)
            return forward.WeightedSum(found.parents[:1]) if isinstance(found, forward.WeightedSum) else found

    monkeypatch.setattr(forward, "Tangents", Half)
    with pytest.raises(AssertionError):
        test_of_a_tiny_ball_they_are_the_gradient("lstm")


def test_directions_are_named():
    graph = net("tanh")
    values = values_of(graph, Threat(2.0), inputs(graph), radii(graph))
    for how in ({"direction": "forward"}, {"direction": "both", "chain": "interval"}):
        with pytest.raises(ValueError, match="direction must be one of backward, both"):
            JacobianPass(values, ROWS, **how)
