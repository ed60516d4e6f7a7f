"""The one place that imports torchvision.

torchvision registers shape rules for its compiled operators while it is imported. Where the compiled part cannot
be loaded (a CPU build of torch next to a torchvision for CUDA, for example), that registration fails and the whole
import with it, although reading a data set needs no operator at all.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

# Declarations last only as long as the library object that made them.
_declared: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """Import torchvision with its ``datasets``; declare the operators it misses if only these stop it.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: the import fails for another reason than missing operators.
    """
    try:
        return _import()
    except RuntimeError as error:
        if not is_missing_operator(error):
            raise
    _purge()
    _declare_operators()
    return _import()


def is_missing_operator(error: RuntimeError) -> bool:
    """Whether the error says that an operator of torchvision does not exist."""
    message = str(error)
    return "operator torchvision::" in message and "does not exist" in message


def _import() -> ModuleType:
    importlib.import_module("torchvision.datasets")
    return sys.modules["torchvision"]


def _purge() -> None:
    """Forget modules that the failed import left half initialised."""
    for name in list(sys.modules):
        if name == "torchvision" or name.startswith("torchvision."):
            del sys.modules[name]


def _declare_operators() -> None:
    """Declare names and signatures only: calling one of the operators still raises an error."""
    if _declared:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        name = schema.partition("(")[0]
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", schema[len(name) :], lib=library)
    _declared.append(library)
