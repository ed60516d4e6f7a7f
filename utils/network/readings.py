"""What was read of modules, kept between calls as long as nothing of them has changed.

A reading is used again only for the same module in the same state: the same submodules, attributes of the same values,
and parameters and buffers that are equal bit by bit, since they can be written to without any trace. It is not kept
where gradients in the module's tensors may be asked for, of modules that change in their own forward, or hold objects
that nobody looks into. And at the first sample of a new input the graph must still compute what the module does.
"""

from __future__ import annotations

import types
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .state import user_state
from .trace import TracedModule

MOST = 4  # readings of one module, for inputs of several shapes
PLAIN = (
    int,
    float,
    complex,
    bool,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
CALLED = (types.BuiltinFunctionType, types.MethodDescriptorType, type)

_kept: weakref.WeakKeyDictionary[nn.Module, list[Reading]] = weakref.WeakKeyDictionary()


class Unknown(Exception):
    """The module holds something whose changes would not be seen."""


class Reading:
    """A module that was read, and how it was then; the module itself is not held."""

    def __init__(self, traced: TracedModule, state: tuple, tensors: list[Tensor]):
        self.state, self.tensors = state, [tensor.detach().clone() for tensor in tensors]
        self.traced = traced.without_module()

    def fits(self, state: tuple, tensors: list[Tensor]) -> bool:
        return self.state == state and all(map(torch.equal, self.tensors, tensors))


def read_module(module: nn.Module, x: Tensor) -> TracedModule:
    """``TracedModule(module, x)``, from an earlier reading where that is as good."""
    tensors = [*module.parameters(), *module.buffers()]
    learnt = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if learnt or not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2 or len(x) == 0:
        return TracedModule(module, x)
    try:
        state = _state(module, x)
    except Unknown:
        return TracedModule(module, x)
    known = _kept.get(module, [])
    for reading in known:
        if reading.fits(state, tensors):
            traced = reading.traced.for_input(module, x)
            if traced is not None:
                return traced
    traced = TracedModule(module, x)
    traced.keep_graphs()
    if traced.is_pure:
        _kept[module] = [Reading(traced, state, tensors), *(one for one in known if one.state != state)][:MOST]
    return traced


def _state(module: nn.Module, x: Tensor) -> tuple:
    """All that a reading depends on but the values of tensors. Raises Unknown where that cannot be told."""
    registered = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}

    def sign(value: Any) -> Any:
        kind = type(value)
        if kind in PLAIN:
            return value
        if isinstance(value, weakref.ref):
            return sign(value())
        if isinstance(value, Tensor):
            if id(value) not in registered:
                raise Unknown
            return (id(value), value.dtype, value.shape, value.device)
        if isinstance(value, dict):
            return tuple((sign(key), sign(part)) for key, part in value.items())
        if isinstance(value, (tuple, list, set, frozenset)):
            return (kind, *map(sign, value))
        if isinstance(value, types.FunctionType):
            cells = [sign(cell.cell_contents) for cell in value.__closure__ or ()]
            return (id(value.__code__), *cells, sign(value.__defaults__))
        if isinstance(value, (nn.Module, *CALLED)):
            return id(value)
        raise Unknown

    signed = [x.shape[1:], x.dtype, x.device, user_state()]
    for path, part in module.named_modules():
        signed += (path, id(part), type(part), id(type(part).forward), sign(vars(part)))
    return tuple(signed)
