"""Products of float32 that are of float32: bounds have no room for the shorter formats that hardware offers.

Convolutions and recurrent layers on a GPU take TF32 unless told otherwise, with 10 bits of significand, and
``torch.set_float32_matmul_precision`` lets matrix products do so too, on CPUs with bfloat16 inside. TF32 rounds every
factor by up to 2^-11, 5e-4 of it: margins in float32 leave room for 1e-4 of their terms.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_FULL = ("ieee", "none")  # none: as the library does by itself, in full
_PRODUCTS = ("matmul", "conv", "rnn")
_LIBRARIES = ("cuda", "mkldnn")  # cuda: cuBLAS and cuDNN
# torch.backends has no name for all of mkldnn's (what seems to be one sets those of all libraries), and can be locked.
_precision, _set_precision = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter

_TURN = threading.RLock()  # what is set holds for all threads
_open: list[ExitStack] = []  # what the calls that are under way undo in the end


def _after_fork() -> None:
    """A child has only the thread that forked: what another one had set is undone, and its turn is over."""
    global _TURN
    if _TURN.acquire(blocking=False):  # nobody's, or the forking thread's own
        _TURN.release()
        return
    _TURN = threading.RLock()
    for undo in reversed(_open[:]):
        undo.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def full_precision() -> Iterator[None]:
    """Around a call, also as a decorator; what the user had set holds again afterwards.

    Calls in several threads take turns: one that ended would take the precision from those that go on. So a thread that
    holds a lock must not ask for a bound of a model whose forward waits for that lock.
    """
    with _TURN, ExitStack() as undo:
        _open.append(undo)
        undo.callback(_open.pop)
        use_full_precision(undo)
        yield


@contextmanager
def full_again() -> Iterator[None]:
    """Around a user's own forward, which may set what it likes: a call that goes on is in full precision after it."""
    try:
        yield
    finally:
        if _open:
            use_full_precision(_open[-1])


def use_full_precision(undo: ExitStack | None = None) -> None:
    """From now on, or until ``undo`` is closed.

    Libraries are told as a whole: kernels that follow them follow again afterwards, only those with a precision of
    their own are told one by one. Matrix products are told by torch's older interface, as its getter fails where that
    does not agree with the newer one (and ``torch.compile`` asks it).
    """
    undo = undo or ExitStack()
    if not any(map(_short, _LIBRARIES)):
        return
    try:
        products = torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer interface was used
        products = "highest"
    if products != "highest":
        for library in _LIBRARIES:  # what the older interface sets back it sets of both
            undo.callback(_set_precision, library, "matmul", _own(library, "matmul", (library, "all")))
        undo.callback(torch.set_float32_matmul_precision, products)
        torch.set_float32_matmul_precision("highest")
    for library in _LIBRARIES:
        if _short(library):
            _tell(library, "all", _own(library, "all", ("generic", "all")), undo)
        for product in _short(library):
            _tell(library, product, _precision(library, product), undo)


def products_are_full() -> bool:
    """Whether products of float32 matrices are of float32 now; torch's own getter can fail (see above)."""
    return not any("matmul" in _short(library) for library in _LIBRARIES)


def _short(library: str) -> list[str]:
    """Which products a library takes in a shorter format."""
    return [product for product in _PRODUCTS if _precision(library, product) not in _FULL]


def _own(library: str, products: str, followed: tuple[str, str]) -> str:
    """Their own precision, none where it is that of what they follow: one set to the same looks no different."""
    precision = _precision(library, products)
    return "none" if precision == _precision(*followed) else precision


def _tell(library: str, products: str, before: str, undo: ExitStack) -> None:
    undo.callback(_set_precision, library, products, before)
    _set_precision(library, products, "ieee")


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Gradients of recurrent layers in evaluation mode, which cuDNN has not; its other settings are left alone."""
    with _TURN:
        before = torch.backends.cudnn.enabled
        torch._C._set_cudnn_enabled(False)  # torch.backends.cudnn can be locked
        try:
            yield
        finally:
            torch._C._set_cudnn_enabled(before)
