"""Bounds of a node's neurons by backward passes: from those that may change a plane, in parts that fit a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ...graph.nodes import Interval, Linear, Node
from ...graph.nonlinear import NonLinear
from .choice import is_exact_image, readers, undecided
from .windows import WindowPass, fits

ROW_BYTES = 2**25  # of a node's coefficients that are worked on at once, where not all of its neurons have rows


def tightened(bounds, node: Node, read_by: list[NonLinear]) -> Interval:
    """Bounds of the node's elements, (batch, size) each, of which some may be its interval's, as it is known.

    Args:
        bounds: a ``BoundPass``.
        read_by: the nodes whose relaxations need the bounds.
    """
    interval = bounds.interval(node)
    # Boxes of layers narrow their balls, too: of matrices, whose rows are cheap, all neurons count.
    may_choose = bounds.chooses and (bounds.balls is None or not isinstance(node, Linear))
    chosen = undecided(node, interval, read_by) if may_choose else None
    if bounds.chooses and bounds.has_images and fits(bounds, node):
        return _by_windows(bounds, node, interval, chosen)
    if chosen is None:
        return bounds.bound_by_rows(node)
    neurons = chosen.any(dim=0).nonzero().squeeze(-1)
    if not len(neurons):
        return interval
    found = bounds.bound_by_rows(node) if len(neurons) == node.size else _by_rows(bounds, node, neurons)
    return tuple(_where_chosen(chosen, neurons, *ends) for ends in zip(interval, found, strict=True))


def _where_chosen(chosen: Tensor, neurons: Tensor, end: Tensor, found: Tensor) -> Tensor:
    """An end of the interval with what was found for each sample's own choice: a sample's bounds know no other one."""
    end, own = end.expand(found.shape[0], -1), chosen.expand(found.shape[0], -1)[:, neurons]
    return end.index_copy(1, neurons, torch.where(own, found, end[:, neurons]))


def _by_windows(bounds, node: Node, interval: Interval, chosen: Tensor | None) -> Interval:
    chosen = torch.ones_like(interval[0], dtype=torch.bool) if chosen is None else chosen
    batch = len(bounds.perturbation.x)
    samples, neurons = chosen.expand(batch, -1).nonzero(as_tuple=True)
    if not len(samples):
        return interval
    found = WindowPass(bounds, node).bound(samples, neurons)
    return tuple(
        end.expand(batch, -1).index_put((samples, neurons), own) for end, own in zip(interval, found, strict=True)
    )


def _by_rows(bounds, node: Node, neurons: Tensor) -> Interval:
    """Of some of the node's elements as those of rows e_k and -e_k."""
    like = bounds.interval(node)[0]
    widest = max(part.size for part in bounds.graph.nodes[: node.index + 1])
    size = max(1, ROW_BYTES // (2 * like.element_size() * widest * len(bounds.perturbation.x)))
    parts = []
    for part in neurons.split(size):
        rows = torch.zeros(len(part), node.size, dtype=like.dtype, device=like.device)
        rows[torch.arange(len(part)), part] = 1.0
        lower, minus_upper = bounds.lower_bound(node, torch.cat((rows, -rows))[None]).split(len(part), dim=-1)
        parts.append((lower, -minus_upper))
    lower, upper = zip(*parts, strict=True)
    return torch.cat(lower, dim=-1), torch.cat(upper, dim=-1)


__all__ = ["is_exact_image", "readers", "tightened"]
