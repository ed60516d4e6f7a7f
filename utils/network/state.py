"""What a user may have set of torch as a whole, kept out of bounds and attacks: they are the same whatever is set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from ..precision import full_again, full_precision

_set_by_user: list[tuple[torch.dtype, torch.device]] = []


@contextmanager
def plain_state() -> Iterator[None]:
    """No autocast, no inference mode, float32 and the CPU by default; around a call, also as a decorator.

    Products of float32 are of float32, whatever precision the user or the device's libraries take for them. All of
    this is the process's own, so that calls in several threads take turns.
    """
    with ExitStack() as stack:
        stack.enter_context(full_precision())
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))  # which would let gradients be recorded
            stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        found = torch.get_default_dtype(), torch.get_default_device()
        _set_by_user.append(found)
        stack.callback(_set_by_user.pop)
        stack.enter_context(_defaults(torch.float32, torch.device("cpu")))
        yield


@contextmanager
def user_defaults() -> Iterator[None]:
    """The default type and device that the outermost ``plain_state`` found: a user's own forward may rely on them."""
    with full_again(), _defaults(*user_state()):
        yield


@contextmanager
def _defaults(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Sets only what is another: a default device costs time in every call of torch."""
    before = torch.get_default_dtype()
    with ExitStack() as stack:
        if before != dtype:
            stack.callback(torch.set_default_dtype, before)
            torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            stack.enter_context(device)
        yield


def usable_tensor(value: Tensor) -> Tensor:
    """The tensor, or a copy of one that was made under ``torch.inference_mode``, which has no part in gradients."""
    return value.clone() if value.is_inference() else value


def user_state() -> tuple[torch.dtype, torch.device]:
    """The default type and device that a user's own forward has."""
    return _set_by_user[0] if _set_by_user else (torch.get_default_dtype(), torch.get_default_device())
