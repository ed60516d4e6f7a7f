"""The processes that share a run: one, or those that torchrun starts.

Processes that bound exchange no results. Each writes files of its own, on one file system, and they only wait for each
other. Those that train share gradients and sums.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed

# Some ranks can have much more to do than others before all meet again.
PATIENCE = timedelta(days=7)

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run: its ``rank``, of ``world`` processes."""

    rank: int = 0
    world: int = 1
    device: torch.device | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """The items that this process is to work on."""
        return list(items[self.rank :: self.world])

    def sum(self, value: Tensor) -> Tensor:
        """The sum of all processes' values, in place."""
        if self.world > 1:
            distributed.all_reduce(value)
        return value

    def of_first(self, value: Tensor) -> Tensor:
        """The first process's value, in place."""
        if self.world > 1:
            distributed.broadcast(value, 0)
        return value

    def wait(self) -> None:
        """Wait until all processes are here. Raises ValueError if one of them has ended."""
        if self.world == 1:
            return
        on_device = {"device_ids": [self.device.index]} if distributed.get_backend() == "nccl" else {}
        try:
            distributed.barrier(**on_device)
        except RuntimeError as error:
            message = "another process of this run has ended: --resume continues with what is finished"
            raise ValueError(f"rank {self.rank}: {message}") from error


ALONE = Ranks()


def world_size() -> int:
    """Number of processes that torchrun has started for this run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the processes that torchrun started, if it did; all but the first write nothing to stdout."""
    world = world_size()
    if world == 1:
        yield ALONE
        return
    shared = device.type == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", world)) > torch.cuda.device_count()
    backend = "nccl" if device.type == "cuda" and not shared else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(backend, timeout=PATIENCE)
    ranks = Ranks(distributed.get_rank(), world, device)
    stdout = sys.stdout
    try:
        with open(os.devnull, "w", encoding="utf-8") as silence:
            sys.stdout = stdout if ranks.first else silence
            yield ranks
    finally:
        sys.stdout = stdout
        distributed.destroy_process_group()
