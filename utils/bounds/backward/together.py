"""Planes of many small nodes at once, such as the gate products of all steps of a recurrent cell.

Planes are made element by element, by some hundred calls, whatever the number of elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...graph.nodes import Bounds, Interval
from ...graph.nonlinear import NonLinear
from ...relaxation.lines import Plane, Relaxation

ELEMENTS = 2**14  # of all samples, that are relaxed together: more would fit no cache, and save no calls that count


def alike(nodes: list[NonLinear], first: NonLinear, batch: int) -> list[NonLinear]:
    """Those of the nodes that are relaxed as ``first`` is, it among them, as many as are worth it."""
    if first.kind is None:
        return [first]
    found = [node for node in nodes if node.kind == first.kind and node is not first]
    room, kept = ELEMENTS // max(1, batch) - first.size, [first]
    for node in found:
        room -= node.size
        if room < 0:
            break
        kept.append(node)
    return kept


def relaxed(
    bounds: Bounds, nodes: list[NonLinear], relax: Callable[[NonLinear, list[Interval]], Relaxation]
) -> Iterator[tuple[NonLinear, Relaxation]]:
    """Nodes of one kind and planes around each, by one call of ``relax`` with the intervals of all operands."""
    operands = [[bounds.interval(operand) for operand in node.parents] for node in nodes]
    if len(nodes) == 1:
        return zip(nodes, [relax(nodes[0], operands[0])], strict=True)
    joined = [_side_by_side(intervals) for intervals in zip(*operands, strict=True)]
    return zip(nodes, _apart(relax(nodes[0], joined), [node.size for node in nodes]), strict=True)


def _side_by_side(intervals: tuple[Interval, ...]) -> Interval:
    batch = max(end.shape[0] for interval in intervals for end in interval)
    low, high = (torch.cat([end.expand(batch, -1) for end in ends], dim=-1) for ends in zip(*intervals, strict=True))
    return low, high


def _apart(relaxation: Relaxation, sizes: list[int]) -> list[Relaxation]:
    pieces: dict[int, tuple[Tensor, ...]] = {}

    def split(tensor: Tensor) -> tuple[Tensor, ...]:
        if id(tensor) not in pieces:  # slopes that both planes share stay one tensor
            pieces[id(tensor)] = tensor.split(sizes, dim=-1)
        return pieces[id(tensor)]

    def parts(plane: Plane) -> list[Plane]:
        slopes = zip(*map(split, plane.slopes), strict=True)
        return [Plane(own, intercept) for own, intercept in zip(slopes, split(plane.intercept), strict=True)]

    return [Relaxation(*pair) for pair in zip(*map(parts, relaxation), strict=True)]
