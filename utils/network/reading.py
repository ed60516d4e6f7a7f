"""What can be certified: sequence classifiers, any other module that can be read, and graphs, behind one interface.

What was read of a module is kept between calls as long as nothing of it has changed: for the same module with the same
submodules, attributes and code (``utils.network.kept``), and parameters and buffers that are equal bit by bit,
since they can be written to without any trace. It is not kept where gradients in the module's tensors may be asked for,
of modules that change in their own forward, or use objects that nobody looks into. And at the first sample that was
read the module must still give what it gave then, which the graph was found to compute.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.graph import Graph
from .constants.extra import NOTHING, Extra
from .constants.groups import read_alike
from .kept import Unknown, fingerprint
from .models import SequenceClassifier
from .modules import usable_model
from .operations import functions  # noqa: F401 - what more the reading knows
from .outputs import SCORES, Outputs
from .state import user_state
from .symbolic import as_graph
from .trace import TracedModule
from .unroll import unroll

Network = SequenceClassifier | TracedModule | Graph


MOST = 4  # readings of one module, for inputs of several shapes
_kept: weakref.WeakKeyDictionary[nn.Module, list[Reading]] = weakref.WeakKeyDictionary()


def read_network(
    model: nn.Module | Graph, x: Tensor, outputs: Outputs = SCORES, extra: Any = None
) -> tuple[Network, Tensor]:
    """What is certified of ``model``, and its input as frames, (batch, T, n).

    A sequence classifier takes the frames as they are, with lengths if need be. Any other module is read by
    ``utils.network.trace``. A graph's single frame takes all values of an input of another shape. ``outputs`` says what
    of a module's result is meant, ``extra`` the forward's further arguments (``constants.extra``).
    """
    model, extra = usable_model(model), Extra.of(extra, len(x))
    if extra and isinstance(model, (Graph, SequenceClassifier)):
        raise ValueError("extra are further arguments of a module's forward: this model has none")
    if isinstance(model, Graph):
        return model, x if x.dim() == 3 or x.dim() < 2 else x.flatten(1)[:, None]
    if not isinstance(model, SequenceClassifier):
        traced = read_module(model, x, outputs, extra)
        return traced, traced.frames
    return model, x


def read_for_step(model: nn.Module, x: Tensor, check: bool) -> tuple[Network, Tensor]:
    """``read_network`` for one training step: its graph is made once, and only compared with the module if asked."""
    model = usable_model(model)
    if isinstance(model, SequenceClassifier):
        return model, x
    traced = read_alike(model, x, check=check)
    traced.keep_graphs()
    return traced, traced.frames


def output_shape(network: Network) -> torch.Size:
    """Of the outputs for a sample: (classes,) of a classifier."""
    if isinstance(network, Graph):
        return torch.Size((network.output.size,))
    return network.output_shape if isinstance(network, TracedModule) else torch.Size((network.head.out_features,))


def num_classes(network: Network) -> int:
    return output_shape(network).numel()


def graph_of(
    network: Network, num_frames: int, dtype: torch.dtype, relaxation: str, lengths: Tensor | None = None
) -> Graph:
    """The network's graph over ``num_frames`` frames."""
    if isinstance(network, Graph):
        weights = (value for node in network.nodes for value in vars(node).values() if isinstance(value, Tensor))
        device = next((value.device for value in weights), "cpu")
        return as_graph(network, dtype, device, relaxation)
    if isinstance(network, TracedModule):
        return network.graph(dtype, relaxation)
    return unroll(network, num_frames, dtype, relaxation, lengths)


def check_network(network: Network, x: Tensor, lengths: Tensor | None) -> None:
    """Raise ValueError, saying what is wrong, unless the frames x, (batch, T, n), fit the network."""
    if isinstance(network, (Graph, TracedModule)):
        if lengths is not None:
            raise ValueError("lengths are for a SequenceClassifier: give other networks sequences of one length")
        if isinstance(network, Graph):
            _check_graph(network, x)
        return
    if x.shape[2] != network.input_size:
        raise ValueError(f"x has {x.shape[2]} values a frame, the model takes {network.input_size}")
    for name, parameter in (*network.named_parameters(), *network.named_buffers()):
        if not bool(parameter.isfinite().all()):
            raise ValueError(f"the model's parameter {name} is not finite")
    if bool((network.std == 0).any()):
        raise ValueError("the model divides its inputs by a std of 0")


def _check_graph(graph: Graph, x: Tensor) -> None:
    frames = sorted(graph.frames, key=lambda node: node.frame)
    if [node.frame for node in frames] != list(range(x.shape[1])) or any(node.size != x.shape[2] for node in frames):
        shape = f"{len(frames)} frames of {frames[0].size if frames else 0} values"
        raise ValueError(f"x has {x.shape[1]} frames of {x.shape[2]} values, the graph takes {shape}")
    for node in graph.nodes:
        for value in _tensors(vars(node)):
            if not bool(value.isfinite().all()):
                raise ValueError(f"a weight of the graph's node {node.index} is not finite")


def _tensors(value):
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


# --- readings that are kept ------------------------------------------------------------------------------------------


class Reading:
    """A module that was read, and how it was then; the module itself is not held."""

    def __init__(self, traced: TracedModule, state: tuple, tensors: list[Tensor]):
        self.state, self.tensors = state, [tensor.detach().clone() for tensor in tensors]
        self.traced = traced.without_module()

    def fits(self, state: tuple, tensors: list[Tensor]) -> bool:
        return self.state == state and all(map(torch.equal, self.tensors, tensors))


def read_module(module: nn.Module, x: Tensor, outputs: Outputs = SCORES, extra: Extra = NOTHING) -> TracedModule:
    """``read_alike(module, x, outputs)``, from an earlier reading where that is as good."""
    tensors = [*module.parameters(), *module.buffers()]
    learnt = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if learnt or extra or not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2 or len(x) == 0:
        return read_alike(module, x, outputs, extra=extra)
    try:
        state = (x.shape[1:], x.dtype, x.device, outputs, user_state(), fingerprint(module))
    except Unknown:
        return TracedModule(module, x, outputs)
    known = _kept.get(module, [])
    for reading in known:
        if reading.fits(state, tensors):
            traced = reading.traced.for_input(module, x)
            if traced is not None:
                return traced
    traced = TracedModule(module, x, outputs)
    traced.keep_graphs()
    if traced.is_pure:
        _kept[module] = [Reading(traced, state, tensors), *(one for one in known if one.state != state)][:MOST]
    return traced
