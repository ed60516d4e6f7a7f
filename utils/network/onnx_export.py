"""Writes a sequence classifier as an ONNX file with ONNX's own recurrent operators, which other verifiers read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .models import SequenceClassifier
from .onnx_graph import import_onnx

OPSET, IR_VERSION = 17, 8
# Blocks of torch's gates, (i, f, g, o) and (r, z, n), in ONNX's order, (i, o, f, c) and (z, r, h).
GATE_ORDER = {nn.RNN: (0,), nn.LSTM: (0, 3, 1, 2), nn.GRU: (1, 0, 2)}


def export_onnx(model: SequenceClassifier, num_frames: int, path: str | Path) -> Path:
    """Write ``model`` over ``num_frames`` frames: float32, input "x" (1, T, n), output "logits" (1, classes).

    Raises:
        ValueError: the onnx package is missing, the weights are not finite, or the model reads waveforms.
    """
    if not model.is_bare:
        raise ValueError(f"a {type(model).__name__} cannot be written: export its recurrent part, which reads features")
    onnx, path = import_onnx(), Path(path)
    rnn, head = model.rnn, model.head
    writer = _Writer(onnx)
    name = writer.normalised("x", model.mean, model.std)
    name = writer.node("Transpose", [name], "frames", perm=[1, 0, 2])  # (T, batch, n)
    directions = 2 if rnn.bidirectional else 1
    for layer in range(rnn.num_layers):
        y, last = writer.layer(model, layer, directions, name)
        moved = writer.node("Transpose", [y], f"moved_{layer}", perm=[0, 2, 1, 3])  # (T, batch, directions, hidden)
        shape = writer.constant(f"shape_{layer}", np.array([0, 0, -1]))
        name = writer.node("Reshape", [moved, shape], f"outputs_{layer}")
    if model.pooling == "last":
        moved = writer.node("Transpose", [last], "last", perm=[1, 0, 2])
        name = writer.node("Flatten", [moved], "pooled", axis=1)
        writer.drop("Transpose", f"moved_{rnn.num_layers - 1}")
        writer.drop("Reshape", f"outputs_{rnn.num_layers - 1}")
    else:
        name = writer.node("ReduceMean", [name], "pooled", axes=[0], keepdims=0)
    bias = head.bias if head.bias is not None else torch.zeros(head.out_features)
    weights = [writer.constant("head.weight", head.weight), writer.constant("head.bias", bias)]
    writer.node("Gemm", [name, *weights], "logits", transB=1)

    float32 = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        writer.nodes,
        path.stem,
        [onnx.helper.make_tensor_value_info("x", float32, [1, num_frames, rnn.input_size])],
        [onnx.helper.make_tensor_value_info("logits", float32, [1, head.out_features])],
        writer.constants,
    )
    opset = [onnx.helper.make_opsetid("", OPSET)]
    file = onnx.helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION, producer_name="export_model")
    onnx.checker.check_model(file, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(file, str(path))
    return path


class _Writer:
    """Collects nodes and constants; every method returns the name of what it made."""

    def __init__(self, onnx):
        self.onnx, self.nodes, self.constants = onnx, [], []

    def node(self, kind: str, inputs: list[str], output: str | list[str], **attributes):
        outputs = [output] if isinstance(output, str) else output
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, outputs, name=f"{kind}_{outputs[-1]}", **attributes))
        return output

    def drop(self, kind: str, output: str) -> None:
        self.nodes = [node for node in self.nodes if (node.op_type, list(node.output)) != (kind, [output])]

    def constant(self, name: str, value: Tensor | np.ndarray) -> str:
        if isinstance(value, Tensor):
            value = value.detach().cpu().to(torch.float32).numpy()
            if not np.isfinite(value).all():
                raise ValueError(f"{name} is not finite")
        self.constants.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def normalised(self, name: str, mean: Tensor, std: Tensor) -> str:
        if bool((mean != 0).any()):
            name = self.node("Sub", [name, self.constant("mean", mean)], "centred")
        if bool((std != 1).any()):
            name = self.node("Div", [name, self.constant("std", std)], "normalised")
        return name

    def layer(self, model: SequenceClassifier, layer: int, directions: int, name: str) -> list[str]:
        """All hidden states, (T, directions, batch, hidden), and the last ones, (directions, batch, hidden)."""
        rnn = model.rnn
        kind = type(rnn)
        suffixes = ("", "_reverse")[:directions]

        def stacked(*parts: str) -> Tensor:
            rows = [[self._gates(rnn, kind, f"{part}_l{layer}{suffix}") for part in parts] for suffix in suffixes]
            return torch.stack([torch.cat(row) for row in rows])

        inputs = [
            name,
            self.constant(f"W_{layer}", stacked("weight_ih")),
            self.constant(f"R_{layer}", stacked("weight_hh")),
        ]
        inputs.append(self.constant(f"B_{layer}", stacked("bias_ih", "bias_hh")) if rnn.bias else "")
        states = [state for state in (model.h0, model.c0) if state is not None]
        if states:
            own = slice(layer * directions, (layer + 1) * directions)
            inputs.append("")
            inputs += [
                self.constant(f"{k}_{layer}", state[own][:, None]) for k, state in zip("hc", states, strict=False)
            ]
        attributes = {"hidden_size": rnn.hidden_size, "direction": "bidirectional" if directions == 2 else "forward"}
        if kind is nn.GRU:
            attributes["linear_before_reset"] = 1
        if kind is nn.RNN:
            attributes["activations"] = ["Relu" if rnn.nonlinearity == "relu" else "Tanh"] * directions
        return self.node(kind.__name__, inputs, [f"all_{layer}", f"final_{layer}"], **attributes)

    def _gates(self, rnn: nn.RNNBase, kind: type, name: str) -> Tensor:
        order = GATE_ORDER[kind]
        blocks = getattr(rnn, name).detach().chunk(len(order))
        return torch.cat([blocks[number] for number in order])
