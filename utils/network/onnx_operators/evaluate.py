"""Nodes whose inputs are all constants: ONNX's reference implementation computes them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..symbolic import UnsupportedError
from .refused import UNSURE
from .table import AXIS_OPSET


def attribute(onnx, entry):
    """The value of a node's attribute, strings as such."""
    value = onnx.helper.get_attribute_value(entry)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list):
        return [part.decode() if isinstance(part, bytes) else part for part in value]
    return value


def evaluated(onnx, node, given: list[Tensor | None], opsets: dict[str, int]) -> list[Tensor]:
    """A node's outputs, in the file's own opset.

    The reference implementation has the newest softmax and batch normalisation only: older ones are put in terms of
    those.
    """
    opset, kind, shape = opsets[""], node.op_type, None
    if kind in UNSURE:
        raise UnsupportedError("it is not supported, of constants neither")
    if kind in ("Softmax", "LogSoftmax", "Hardmax") and opset < AXIS_OPSET:
        shape = given[0].shape
        axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 1) % len(shape)
        given = [given[0].reshape(math.prod(shape[:axis]), -1)]
        node = onnx.helper.make_node(kind, node.input, node.output, axis=1)
    if kind == "BatchNormalization":
        values = {entry.name: attribute(onnx, entry) for entry in node.attribute}
        if values.get("training_mode", 0) or not values.get("spatial", 1) or len(node.output) > 1:
            raise UnsupportedError("this kind of batch normalisation is not supported")
        opset, epsilon = max(opset, 15), values.get("epsilon", 1e-5)
        node = onnx.helper.make_node(kind, node.input, node.output, epsilon=epsilon)
    fed = {name: value.numpy() for name, value in zip(node.input, given, strict=True) if name}
    found = _run(onnx, node, fed, opsets | {"": opset})
    results = [torch.from_numpy(np.array(found[name])) if name else None for name in node.output]
    return results if shape is None else [results[0].reshape(shape)]


def _run(onnx, node, fed: dict[str, np.ndarray], opsets: dict[str, int]) -> dict[str, np.ndarray]:
    helper = onnx.helper
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in fed.items()
    ]
    outputs = [helper.make_empty_tensor_value_info(name) for name in node.output if name]
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    graph = helper.make_graph([node], "constants", inputs, outputs)
    evaluator = onnx.reference.ReferenceEvaluator(helper.make_model(graph, opset_imports=imports))
    return dict(zip((value.name for value in outputs), evaluator.run(None, fed), strict=True))
