"""What users have as models: modules, wrapped or not, graphs, and what is neither."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from ..graph.graph import Graph

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def usable_model(model: Any) -> nn.Module | Graph:
    """The model; of a module what ``torch.compile`` or ``nn.DataParallel`` wraps, copied if made in inference mode.

    Raises:
        ValueError: it is no model; the message says what to give instead.
    """
    check_model(model)
    while isinstance(model, WRAPPERS) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    if isinstance(model, Graph):
        return model
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model) if any(value.is_inference() for value in tensors) else model


def check_model(model: Any) -> None:
    if isinstance(model, (nn.Module, Graph)):
        return
    kind = type(model).__name__
    way = "give an nn.Module or a utils.graph.Graph"
    if isinstance(model, type):
        way = f"{model.__name__} is a class: give an instance of it"
    elif isinstance(getattr(model, "graph", None), Graph):
        way = "give its .graph"
    elif kind == "ExportedProgram":
        way = "give the module that was exported"
    elif isinstance(model, (str, bytes)) or hasattr(model, "__fspath__"):
        way = "give the model itself, loaded: utils.network.load_checkpoint or read_onnx(path).graph, or your own code"
    elif isinstance(model, dict):
        way = "give a module with these weights loaded: module.load_state_dict(...)"
    elif callable(model):
        way = "give an nn.Module whose forward calls it, with its weights as parameters"
    raise ValueError(f"the model is of type {kind}: {way}")
