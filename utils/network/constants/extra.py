"""Further arguments of a forward, which are not perturbed: of each sample its own, or the same for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
        batch: number of samples. Tensors with so many rows have one a sample; all else is shared.
    """

    values: tuple = ()
    named: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 0

    @classmethod
    def of(cls, extra: Any, batch: int) -> Extra:
        """From what a user gives: a tensor or an array, a tuple of arguments, or a dict of arguments by name."""
        if isinstance(extra, Extra):
            return extra
        if extra is None:
            return NOTHING
        if isinstance(extra, Mapping):
            return cls((), {str(name): _as_tensor(value) for name, value in extra.items()}, batch)
        values = extra if isinstance(extra, tuple) else (extra,)
        return cls(tuple(_as_tensor(value) for value in values), {}, batch)

    def __bool__(self) -> bool:
        return bool(self.values or self.named)

    def part(self, samples: Tensor | slice | Sequence[int]) -> Extra:
        """The arguments of some samples."""
        if not self:
            return self
        count = len(torch.arange(self.batch)[samples])

        def chosen(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != self.batch:
                return value
            own = samples.to(value.device) if isinstance(samples, Tensor) else samples
            return value[own]

        return Extra(
            tuple(map(chosen, self.values)), {name: chosen(value) for name, value in self.named.items()}, count
        )

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
