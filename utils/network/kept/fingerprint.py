"""What a module's forward depends on but the values of its tensors, as a tuple: attributes, code, and what code names.

Code of a user's own classes and functions is followed to the global names, defaults and closures that it uses, that of
torch, NumPy and the standard library is taken as it is. What is reached by a name made up at run time is not seen.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .keeping import FOREIGN

PLAIN = {int, float, complex, bool, str, bytes, type(None)}
PLAIN |= {torch.dtype, torch.device, torch.layout, torch.memory_format}
BUILT_IN = (types.BuiltinFunctionType, types.MethodDescriptorType)
WITHOUT_EFFECT = {"__dict__", "__weakref__", "__doc__", "__annotations__", "__annotate__", "_abc_impl"}
NOT_CALLED = {"__init__", "__repr__", "extra_repr"}  # by a forward, of a module that exists
GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


class Unknown(Exception):
    """The module holds something whose changes would not be seen."""


def fingerprint(module: nn.Module) -> tuple:
    """Equal as long as none of that has changed. Raises Unknown where that cannot be told."""
    if any(getattr(nn.modules.module, name, None) for name in GLOBAL_HOOKS):
        raise Unknown
    signer = _Signer(module)
    try:
        return tuple(signer.of_part(path, part) for path, part in module.named_modules())
    except RecursionError:
        raise Unknown from None


class _Signer:
    """Signs values, each object once: later on it is a number."""

    def __init__(self, module: nn.Module):
        self._registered = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
        self._parts = {id(part) for part in module.modules()}
        self._seen: dict[Any, int] = {}

    def of_part(self, path: str, part: nn.Module) -> tuple:
        kind = type(part)
        return path, id(part), id(kind), id(kind.forward), self._of_class(kind, NOT_CALLED), self._of(vars(part))

    def _of(self, value: Any, names: frozenset[str] = frozenset()) -> Any:
        """``names`` are those by which the code that meets the value may go on from it."""
        kind = type(value)
        if kind in PLAIN:
            return kind, value
        if isinstance(value, weakref.ref):
            return self._of(value())
        if isinstance(value, Tensor):
            if id(value) not in self._registered:
                raise Unknown
            return id(value), value.dtype, value.shape, value.device
        if isinstance(value, nn.Module):
            if id(value) not in self._parts:  # neither its attributes nor its weights are looked at
                raise Unknown
            return id(value)
        if isinstance(value, types.ModuleType):
            return self._of_module(value, names)
        if isinstance(value, BUILT_IN):
            return id(value)
        if id(value) in self._seen:
            return "seen", self._seen[id(value)]
        return self._of_object(value, kind)

    def _of_object(self, value: Any, kind: type) -> tuple:
        if isinstance(value, type):
            return self._of_class(value)
        if isinstance(value, types.FunctionType):
            return self._of_function(value)
        if isinstance(value, (staticmethod, classmethod)):
            return kind, self._of(value.__func__)
        if isinstance(value, property):
            return kind, self._of(value.fget)
        if not isinstance(value, (dict, tuple, list, set, frozenset)):
            raise Unknown
        self._see(value)
        if isinstance(value, dict):
            return kind, *((self._of(key), self._of(part)) for key, part in value.items())
        return kind, *map(self._of, value)

    def _see(self, value: Any) -> None:
        self._seen[id(value)] = len(self._seen)

    def _of_class(self, kind: type, but: set[str] = frozenset()) -> tuple:
        own = [base for base in kind.__mro__ if not _is_foreign(base)]
        found: list = [id(kind)]
        for base in own:
            if id(base) not in self._seen:
                self._see(base)
                attributes = [(name, value) for name, value in vars(base).items() if name not in WITHOUT_EFFECT | but]
                found += [(name, self._of(value)) for name, value in attributes]
        return tuple(found)

    def _of_function(self, function: types.FunctionType) -> tuple:
        self._see(function)
        code, found = function.__code__, [function.__code__]
        for cell in function.__closure__ or ():
            try:
                found.append(self._of(cell.cell_contents))
            except ValueError:  # a name that is not bound yet
                found.append("unbound")
        for given in (function.__defaults__, function.__kwdefaults__, function.__dict__ or None):
            found.append(None if given is None else self._of(given))
        if not _is_foreign(function):
            names = frozenset(_names(code))
            for name in sorted(names & function.__globals__.keys()):
                found.append((name, self._of(function.__globals__[name], names)))
        return tuple(found)

    def _of_module(self, module: types.ModuleType, names: frozenset[str]) -> Any:
        """Of a module of Python's: what the code that meets it may name of it."""
        key = (id(module), names)
        if key in self._seen:
            return "seen", self._seen[key]
        self._seen[key] = len(self._seen)
        foreign, found = _is_foreign(module), [id(module)]
        for name in sorted(names & vars(module).keys()):
            value = vars(module)[name]
            deeper = not foreign or isinstance(value, types.ModuleType)
            found.append((name, self._of(value, names) if deeper else id(value)))
        return tuple(found)


def _names(code: types.CodeType) -> Iterator[str]:
    """Names of globals and attributes in a function's code, and in that of functions inside of it."""
    yield from code.co_names
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            yield from _names(value)


def _is_foreign(value: Any) -> bool:
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    return (name or "").split(".")[0] in FOREIGN
