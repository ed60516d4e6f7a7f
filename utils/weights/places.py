"""Where a module's parameters stand in its graph: which node's weights are made of which of their entries.

A graph holds copies of the weights, split into gates, divided by a normalisation, or scaled by what follows. That every
entry of a node's weight is one entry of a parameter times a number is found out by changing the parameter in a copy of
the module and reading it again: the same change of all entries gives the numbers, a change by an entry's own number
says which entry it is, and a third, random change must then be foretold. What is not, is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..graph.convolution import Convolution
from ..graph.graph import Graph
from ..graph.nodes import Linear, Node
from ..network.models import SequenceClassifier
from ..network.modules import usable_model
from ..network.reading import graph_of
from ..network.trace import TracedModule

BIAS = -1  # number of a node's bias among its weights
SAME = 1e-7  # relative difference between a change of a weight and what is foretold
DERIVED = ("parents", "child_weights", "bias_size")  # attributes of nodes that follow from others


@dataclass(frozen=True)
class MatrixPlace:
    """Of a Linear node, ``weights[number] = W = diag(row_scale) P[rows][:, columns] diag(column_scale)``.

    P is the parameter as a matrix, one column if it is a vector. With ``number`` ``BIAS`` that is the node's bias, of a
    convolution as well.

    Attributes:
        parameter: its name in the module.
        node: index in the graph.
        shape: of P.
        rows, row_scale: (size of the node,); columns, column_scale: (size of the parent,).
        shift: (size of the parent,), or None for 0: the node holds W (parent + shift), as where a mean is taken off.
    """

    parameter: str
    node: int
    number: int
    shape: tuple[int, int]
    rows: Tensor
    columns: Tensor
    row_scale: Tensor
    column_scale: Tensor
    shift: Tensor | None = None


@dataclass(frozen=True)
class KernelPlace:
    """Of a convolution, ``weight = scale * P``, entry by entry; scale has the shape of the weight, shift as above."""

    parameter: str
    node: int
    scale: Tensor
    shift: Tensor | None = None


Place = MatrixPlace | KernelPlace


def chosen_parameters(model: nn.Module, names: Sequence[str] | None = None, bias: bool = False) -> list[str]:
    """Names of the parameters that move: those given, else all matrices and kernels, and vectors with ``bias``.

    Raises:
        ValueError: there is no parameter of a name.
    """
    known = dict(model.named_parameters())
    if names is None:
        return [name for name, value in known.items() if value.dim() > 1 or bias]
    for name in names:
        if name not in known:
            raise ValueError(f"the model has no parameter {name!r}: its parameters are {', '.join(known)}")
    return list(dict.fromkeys(names))


@torch.no_grad()
def find_places(model: nn.Module, x: Tensor, names: Sequence[str]) -> dict[str, list[Place]]:
    """The places of some parameters in the graph of ``model`` for inputs like x, (batch, ...), by name.

    Raises:
        ValueError: a parameter is merged with others, does not come to the output, or stands where it may not move.
    """
    model = usable_model(model)
    if not isinstance(model, nn.Module):
        raise ValueError("weights move in modules: a graph does not say which of its weights are one parameter")
    reader = _Reader(model, x)
    return {name: reader.places(name) for name in names}


class _Reader:
    """Reads a module again and again, each time with a change of one parameter."""

    def __init__(self, model: nn.Module, x: Tensor):
        self._model = copy.deepcopy(model).cpu().double().eval()
        self._x = x[:1].cpu().double() if x.is_floating_point() else x[:1].cpu()
        self.plain = self._read(self._model)

    def _read(self, model: nn.Module) -> Graph:
        if isinstance(model, SequenceClassifier):
            return graph_of(model, self._x.shape[1], torch.float64, "plane")
        return TracedModule(model, self._x, check=False).graph(torch.float64, "plane")

    def changes(self, name: str, change: Tensor) -> dict[tuple, Tensor]:
        """What the change of a parameter changes: by node and ``_tensors``' key, all that is not left as it is."""
        twin = copy.deepcopy(self._model)  # graphs share their weights with the module that they were read from
        parameter = twin.get_parameter(name)
        parameter += change.to(parameter)
        graph = self._read(twin)
        if [type(node) for node in graph.nodes] != [type(node) for node in self.plain.nodes]:
            raise ValueError(f"the parameter {name} decides what the graph looks like: it cannot move")
        found = {}
        for node, other in zip(self.plain.nodes, graph.nodes, strict=True):
            before, after = dict(_tensors(node)), dict(_tensors(other))
            found |= {(node.index, *key): after[key] - before[key] for key in before}
        return {key: value for key, value in found.items() if bool((value != 0).any())}

    def places(self, name: str) -> list[Place]:
        shape = self._model.get_parameter(name).shape
        numbers = torch.arange(1.0, shape.numel() + 1.0, dtype=torch.float64).reshape(shape)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        ones, numbered, random = (self.changes(name, change) for change in (torch.ones_like(numbers), numbers, noise))
        places: dict[int, list[Place]] = {}
        shifted = []
        for key in sorted(random):
            node, attribute, number = key
            changes = [found.get(key, torch.zeros_like(random[key])) for found in (ones, numbered, random)]
            place = _place(name, self.plain.nodes[node], attribute, number, changes, noise)
            if place is not None:
                places.setdefault(node, []).append(place)
            elif attribute == "bias" and len(shape) > 1:
                shifted.append(key)
            else:
                raise _merged(name, self.plain.nodes[node])
        for key in shifted:
            own = places.get(key[0], [])
            if len(own) != 1:
                raise _merged(name, self.plain.nodes[key[0]])
            own[0] = self._with_shift(own[0], key, noise, random[key])
        if not places:
            raise ValueError(f"the output does not depend on the parameter {name}: leave it out")
        return [place for node in sorted(places) for place in places[node]]

    def _with_shift(self, place: Place, key: tuple, noise: Tensor, random: Tensor) -> Place:
        """The place with what is added to the parent before; the bias of its node holds W times that."""
        node = self.plain.nodes[place.node]
        probe = self._probe_kernel if isinstance(place, KernelPlace) else self._probe_matrix
        shift = probe(place, key, node)
        moved = replace(place, shift=shift)
        if not _agree([shift_of_bias(moved, node, noise)], [random]):
            raise _merged(place.parameter, node)
        return moved

    def _probe_matrix(self, place: MatrixPlace, key: tuple, node: Node) -> Tensor:
        """Row by row one entry is changed, of another column each time: the bias's change tells what it meets."""
        row_of, column_of = place.rows.tolist(), place.columns.tolist()
        found = torch.zeros(len(column_of), dtype=torch.float64)
        for start in range(0, len(column_of), len(row_of)):
            change = torch.zeros(place.shape, dtype=torch.float64)
            probed = list(zip(range(len(row_of)), range(start, len(column_of)), strict=False))
            for row, column in probed:
                change[row_of[row], column_of[column]] = 1.0
            name = place.parameter
            met = self.changes(name, change.reshape(self._model.get_parameter(name).shape)).get(key)
            for row, column in probed if met is not None else []:
                found[column] = met[row] / (place.row_scale[row] * place.column_scale[column])
        return found

    def _probe_kernel(self, place: KernelPlace, key: tuple, node: Convolution) -> Tensor:
        """The shift is a number a channel; the middle tap meets it, or padding."""
        channels, height, width = node.windows.large
        taps = tuple(size // 2 for size in place.scale.shape[2:])
        found = torch.zeros(channels, dtype=torch.float64)
        for channel in range(place.scale.shape[1]):
            change = torch.zeros(place.scale.shape, dtype=torch.float64)
            change[0, channel, taps[0], taps[1]] = 1.0
            name = place.parameter
            met = self.changes(name, change.reshape(self._model.get_parameter(name).shape)).get(key)
            if met is not None:
                found[channel] = met[met.abs().argmax()] / place.scale[0, channel, taps[0], taps[1]]
        return found[:, None].expand(-1, height * width).reshape(-1)


def shift_of_bias(place: Place, node: Node, change: Tensor) -> Tensor:
    """By how much a node's bias changes, (size,), if the parameter changes, as the place has it."""
    if isinstance(place, KernelPlace):
        return node.apply(place.shift[None], place.scale * change.reshape(place.scale.shape))[0]
    table = change.reshape(place.shape)[place.rows][:, place.columns]
    return place.row_scale * (table @ (place.column_scale * place.shift))


def _merged(name: str, node: Node) -> ValueError:
    return ValueError(
        f"the parameter {name} is merged with others in the graph, or stands where it may not move "
        f"({type(node).__name__}): leave it out"
    )


def _tensors(node: Node) -> list[tuple[tuple, Tensor]]:
    """A node's tensors, with the attribute that holds them and their number in it."""
    found = []
    for name, value in vars(node).items():
        if name in DERIVED:
            continue
        if isinstance(value, Tensor) and value.is_floating_point():
            found.append(((name, 0), value))
        elif isinstance(value, tuple):
            found += [((name, k), part) for k, part in enumerate(value) if isinstance(part, Tensor)]
    return found


def _place(name: str, node: Node, attribute: str, number: int, changes: list[Tensor], noise: Tensor) -> Place | None:
    """None where the node's tensor is not made of single entries of the parameter."""
    if isinstance(node, Convolution) and attribute == "weight":
        scale, numbered, random = changes
        entries = torch.arange(1.0, noise.numel() + 1.0, dtype=noise.dtype)
        if scale.numel() != noise.numel() or node.transposed:
            return None
        foretold = [scale * entries.reshape(scale.shape), scale * noise.reshape(scale.shape)]
        return KernelPlace(name, node.index, scale) if _agree(foretold, [numbered, random]) else None
    if not isinstance(node, (Linear, Convolution)) or attribute not in ("weights", "bias"):
        return None
    table = noise.reshape(len(noise), -1)
    if attribute == "bias":
        if noise.dim() != 1:
            return None
        changes = [change[:, None] for change in changes]
    found = _of_matrix(changes, table)
    number = BIAS if attribute == "bias" else number
    return found and MatrixPlace(name, node.index, number, tuple(table.shape), *found)


def _of_matrix(changes: list[Tensor], noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Rows and columns of the parameter that a weight takes, and their scales; None if it is no such part of it."""
    scale, numbered, random = changes
    there = scale != 0
    entries = torch.where(there, (numbered / torch.where(there, scale, 1.0)).round().long() - 1, 0)
    if bool(((entries < 0) | (entries >= noise.numel())).any()):
        return None
    row, column = (int(place) for place in divmod(int(scale.abs().argmax()), scale.shape[1]))
    column_scale, row_scale = scale[row], scale[:, column] / scale[row, column]
    columns, rows = entries[row] % noise.shape[1], entries[:, column] // noise.shape[1]
    foretold = [row_scale[:, None] * numbers[rows][:, columns] * column_scale for numbers in _tables(noise)]
    return (rows, columns, row_scale, column_scale) if _agree(foretold, [numbered, random]) else None


def _tables(noise: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(1.0, noise.numel() + 1.0, dtype=noise.dtype).reshape(noise.shape), noise


def _agree(foretold: list[Tensor], found: list[Tensor]) -> bool:
    pairs = zip(foretold, found, strict=True)
    return all(bool(((a - b).abs() <= SAME * (1.0 + b.abs().amax())).all()) for a, b in pairs)
