"""The most memory that tensors take at once, counted operation by operation: the same number on every machine."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Peak(TorchDispatchMode):
    """Counts the bytes of all storages that operations make while it is entered; ``most`` is their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {part.untyped_storage()._cdata for part in tree_iter((args, kwargs)) if isinstance(part, torch.Tensor)}
        made = function(*args, **(kwargs or {}))
        for part in tree_iter(made):
            if isinstance(part, torch.Tensor):
                self._count(part.untyped_storage(), given)
        return made

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        if storage._cdata in given or storage in self._known:
            return
        size = storage.nbytes()
        self._known.add(storage)
        weakref.finalize(storage, self._free, size)
        self.now += size
        self.most = max(self.most, self.now)

    def _free(self, size: int) -> None:
        self.now -= size
