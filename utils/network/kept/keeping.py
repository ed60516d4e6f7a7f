"""What a module's forward keeps, put back after the forward was only read: attributes, buffers, lists, hooks' state."""

from __future__ import annotations

import functools
import sys
import types
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

FOREIGN = sys.stdlib_module_names | {"torch", "numpy"}  # packages into whose objects nobody looks


class Keeper:
    """All that a forward can reach from its module, as it is now: what tables and lists hold, and tensors' values."""

    def __init__(self, module: nn.Module):
        self._tables: list[tuple[dict, dict]] = []
        self._lists: list[tuple[list | deque | set, list]] = []
        self._tensors: list[tuple[Tensor, Tensor, int]] = []
        self._module, self._seen = module, set()
        self._walk(module)

    def _walk(self, root: Any) -> None:
        open_values = [root]
        while open_values:
            value = open_values.pop()
            if id(value) in self._seen or isinstance(value, (nn.Parameter, type, types.ModuleType)):
                continue
            self._seen.add(id(value))
            if isinstance(value, Tensor):
                if not value.is_inference():
                    self._tensors.append((value, value.detach().clone(), value._version))
            elif isinstance(value, dict):
                self._tables.append((value, dict(value)))
                open_values += value.values()
            elif isinstance(value, (list, deque, set)):
                self._lists.append((value, list(value)))
                open_values += value
            elif isinstance(value, tuple):
                open_values += value
            elif isinstance(value, types.FunctionType):
                open_values += [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
            elif isinstance(value, types.MethodType):
                open_values.append(value.__self__)
            elif isinstance(value, functools.partial):
                open_values += (value.func, value.args, value.keywords)
            elif isinstance(value, nn.Module) or type(value).__module__.split(".")[0] not in FOREIGN:
                open_values.append(getattr(value, "__dict__", None))

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back that is another by now; the rest is not touched."""
        for table, before in self._tables:
            if len(table) != len(before) or any(table.get(key, self) is not value for key, value in before.items()):
                table.clear()
                table.update(before)
        for values, before in self._lists:
            if len(values) != len(before) or any(a is not b for a, b in zip(values, before, strict=True)):
                values.clear()
                values.update(before) if isinstance(values, set) else values.extend(before)
        for tensor, before, version in self._tensors:
            if tensor._version != version:
                tensor.copy_(before)

    def changed(self) -> list[str]:
        """Names of the module's attributes that hold something else than before, or changed tensors or lists."""
        moved = {id(tensor) for tensor, _, version in self._tensors if tensor._version != version}
        moved |= {id(values) for values, before in self._lists if len(values) != len(before)}
        tables = {id(table): before for table, before in self._tables}
        found = []
        for path, module in self._module.named_modules():
            for table in (vars(module), module._buffers):
                before = tables.get(id(table), {})
                for name, value in table.items():
                    if id(value) in moved or (value is not before.get(name, self) and not name.startswith("_")):
                        found.append(f"self.{path}.{name}".replace("..", "."))
        return found

    def held(self) -> list[str]:
        """Names of attributes that hold tensors of several axes, parameters and buffers apart, from earlier calls."""
        return [
            f"self.{path}.{name}".replace("..", ".")
            for path, module in self._module.named_modules()
            for name, value in vars(module).items()
            if not name.startswith("_")
            and any(
                isinstance(part, Tensor) and not isinstance(part, nn.Parameter) and part.dim() > 1
                for part in (value if isinstance(value, (tuple, list)) else (value,))
            )
        ]


def _is_filled(cell) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name that is not bound yet
        return False


@contextmanager
def kept(module: nn.Module) -> Iterator[Keeper]:
    """Whatever forwards do inside, the module is as before in the end."""
    keeper = Keeper(module)
    try:
        yield keeper
    finally:
        keeper.restore()
