"""Products of float32 that are of float32: bounds have no room for the shorter formats that hardware offers.

Convolutions and recurrent layers on a GPU take TF32 unless told otherwise, with 10 bits of significand, and
``torch.set_float32_matmul_precision`` lets matrix products do so too, on CPUs with bfloat16 inside. TF32 rounds every
factor by up to 2^-11, 5e-4 of it: margins in float32 leave room for 1e-4 of their terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_FULL = ("ieee", "none")  # none: as the library does by itself, in full
_KERNELS: list[Any] = [torch.backends.cuda.matmul]
for _library in (torch.backends.cudnn, torch.backends.mkldnn):
    _KERNELS += [part for name in ("matmul", "conv", "rnn") if (part := getattr(_library, name, None)) is not None]


@contextmanager
def full_precision() -> Iterator[None]:
    """Around a call, also as a decorator; what the user had set holds again afterwards."""
    with ExitStack() as stack:
        for undo in use_full_precision():
            stack.callback(undo)
        yield


def use_full_precision() -> list[Callable[[], None]]:
    """From now on; what undoes it, to be called in the opposite order.

    Torch has two interfaces for this. Where only the older one was used it must stay so, as its getters fail when they
    do not agree with the newer one (and ``torch.compile`` asks them); the newer one says what kernels do in the end.
    """
    if all(kernels.fp32_precision in _FULL for kernels in _KERNELS):
        return []
    undo = [_setter(kernels, kernels.fp32_precision) for kernels in _KERNELS]
    undo += _older(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest")
    undo += _older(lambda: torch.backends.cudnn.allow_tf32, _allow_in_cudnn, False)
    for kernels in _KERNELS:
        if kernels.fp32_precision not in _FULL:
            kernels.fp32_precision = "ieee"
    return undo


def _setter(kernels: Any, precision: str) -> Callable[[], None]:
    def restore() -> None:
        if kernels.fp32_precision != precision:
            kernels.fp32_precision = precision

    return restore


def _older(get: Callable[[], Any], set_to: Callable[[Any], None], value: Any) -> list[Callable[[], None]]:
    try:
        before = get()
    except RuntimeError:  # the newer interface was used
        return []
    set_to(value)
    return [lambda: set_to(before)]


def _allow_in_cudnn(allow: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allow


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Gradients of recurrent layers in evaluation mode, which cuDNN has not; its other settings are left alone."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before
