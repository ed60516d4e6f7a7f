"""Further arguments of a forward, which are not perturbed: of each sample its own, or the same for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Extra:
    """What a forward is given after x.

    Attributes:
        values: by their places.
        named: by their names.
        batch: number of samples.
        each: places and names of those that have a row for each sample; all others are shared.
    """

    values: tuple = ()
    named: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 0
    each: frozenset[int | str] = frozenset()

    @classmethod
    def of(cls, extra: Any, batch: int) -> Extra:
        """From what a user gives: a tensor or an array, a tuple of arguments, or a dict of arguments by name.

        Tensors with as many rows as the batch have one a sample.
        """
        if isinstance(extra, Extra):
            return extra
        if extra is None:
            return NOTHING
        named = isinstance(extra, Mapping)
        values = () if named else extra if isinstance(extra, tuple) else (extra,)
        values = tuple(map(_as_tensor, values))
        names = {str(name): _as_tensor(value) for name, value in extra.items()} if named else {}
        every = (*enumerate(values), *names.items())
        rows = {key for key, value in every if isinstance(value, Tensor) and value.dim() and len(value) == batch}
        return cls(values, names, batch, frozenset(rows))

    def _mapped(self, function: Callable[[int | str, Any], Any]) -> Extra:
        """The same of other values, a function of each and its place or name."""
        values = tuple(function(place, value) for place, value in enumerate(self.values))
        return replace(self, values=values, named={name: function(name, value) for name, value in self.named.items()})

    @property
    def given(self) -> tuple | dict:
        """As a user gives it."""
        return dict(self.named) if self.named else self.values

    def __bool__(self) -> bool:
        return bool(self.values or self.named)

    def part(self, samples: Tensor | slice | Sequence[int]) -> Extra:
        """The arguments of some samples."""
        if not self:
            return self

        def chosen(key: int | str, value: Any) -> Any:
            if key not in self.each:
                return value
            return value[samples.to(value.device) if isinstance(samples, Tensor) else samples]

        return replace(self._mapped(chosen), batch=len(torch.arange(self.batch)[samples]))

    def to(self, device: torch.device | str) -> Extra:
        """The same on a device."""
        return self._mapped(lambda key, value: value.to(device) if isinstance(value, Tensor) else value)

    def call(self, module: Callable[..., Any], x: Tensor) -> Any:
        """The module's result."""
        return module(x, *self.values, **self.named)

    def key(self, sample: int) -> tuple:
        """Equal for samples whose arguments are equal."""
        part = self.part(slice(sample, sample + 1))
        return tuple(map(key_of, (*part.values, *part.named.values())))


NOTHING = Extra()


def _as_tensor(value: Any) -> Any:
    """Arrays and lists of numbers as tensors; all else as it is."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    return torch.tensor(value) if isinstance(value, list) else value


def key_of(value: Any) -> Any:
    """What is equal for equal tensors, and what is made of them."""
    if isinstance(value, Tensor):
        array = value.detach().cpu().contiguous().numpy()
        return (tuple(value.shape), str(value.dtype), array.tobytes())
    if isinstance(value, np.ndarray):
        return (value.shape, str(value.dtype), value.tobytes())
    if isinstance(value, (tuple, list)):
        return tuple(map(key_of, value))
    return repr(value)
