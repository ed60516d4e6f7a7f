"""Bounds of gradients from the input on: equal to autograd's at a point, above all others in the set, never looser."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import Threat
from nets import NETS, check_gradients, gradients_of, perceptron, points_within
from test_jacobian import BATCH, ROWS, inputs, layers_of, net, no_gradients, radii, recursion

from utils.bounds.passes import BoundPass
from utils.jacobian import JacobianPass, forward
from utils.jacobian.forward import forward_bounds
from utils.perturbation.lp_ball import INF
from utils.relaxation.derivatives import derivative_ranges

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
    for how in ({"direction": "forward"}, {"direction": "shift", "chain": "interval"}):
        with pytest.raises(ValueError, match="direction must be one of backward, both, shift"):
            JacobianPass(values, ROWS, **how)


# --- RecurJac's shift 1 -----------------------------------------------------------------------------------------------

WIDTHS = (5, 6, 5, 4)


def by_shift(activation: str, sizes, chain: str, norm: float = INF):
    graph, threat = perceptron(activation, WIDTHS, inputs=4, seed=6), Threat(norm)
    x, eps = inputs(graph), radii(graph, sizes)
    values = values_of(graph, threat, x, eps)
    return graph, threat, x, eps, values, JacobianPass(values, ROWS, chain, direction="shift")


@pytest.mark.parametrize("activation", ["relu", "leaky_relu(0.2)", "tanh"])
def test_shift_is_recurjac_s(activation):
    """As it is written: from the first hidden layer's units on, and then the first weights times an interval."""
    graph, _, _, _, values, bounds = by_shift(activation, (0.1, 0.4, 1.2), "recurjac")
    linear, active = layers_of(graph)
    weights = [node.weights[0].numpy() for node in linear]
    low, high = (side.view(BATCH, 2, -1).numpy() for side in bounds.frame_bounds(0))
    for sample, k in np.ndindex(BATCH, 2):
        ranges = [derivative_ranges(activation, values.interval(node.parents[0]))[0] for node in active]
        (gl, gh), *others = [tuple(side[sample].numpy() for side in pair) for pair in ranges]
        last = (ROWS[sample, k].numpy() @ weights[-1])[:, None]
        backwards = [last, *(weight.T for weight in reversed(weights[2:-1]))]
        entries = [recursion(backwards, others[::-1], column, {}, True) for column in weights[1].T]
        a_low, a_high = (np.concatenate(ends) for ends in zip(*entries, strict=True))
        corners = np.stack([gl * a_low, gl * a_high, gh * a_low, gh * a_high])
        least, most = corners.min(axis=0), corners.max(axis=0)
        up, down = weights[0].clip(0, None), weights[0].clip(None, 0)
        np.testing.assert_allclose(low[sample, k], least @ up + most @ down, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(high[sample, k], most @ up + least @ down, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chain", ["joint", "recurjac"])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_no_gradient_is_outside_of_shift(activation, chain):
    for norm in (1.0, 2.0, INF):
        graph, threat, x, eps, _, bounds = by_shift(activation, (0.1, 0.0, 0.6), chain, norm)
        check_gradients(bounds, graph, x, eps, ROWS, threat, points_within(graph, x, eps, ROWS, threat))


def test_a_first_layer_that_is_forgotten_is_noticed(monkeypatch):
    monkeypatch.setattr("utils.jacobian.adjoint.factor_interval", lambda low, high, value: value)
    with pytest.raises(AssertionError, match="above value"):
        test_no_gradient_is_outside_of_shift("tanh", "recurjac")


def test_shift_is_for_perceptrons():
    graph = net("lstm")
    values = values_of(graph, Threat(INF), inputs(graph), radii(graph))
    with pytest.raises(ValueError, match="direction shift is for perceptrons"):
        JacobianPass(values, ROWS, direction="shift").fall()
