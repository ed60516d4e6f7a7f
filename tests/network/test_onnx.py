"""ONNX files: the graph computes what onnxruntime does, in every variant of the operators, and round trips."""

from __future__ import annotations

import gzip
import itertools
import math
import re
import subprocess
import sys

import pytest
import torch
from helpers import Threat, check_below, classifier, lowest_margins, normal
from test_operations import ONNX
from torch import nn

from utils.bounds.passes import BoundPass
from utils.certify import certified_radius
from utils.network.models import SequenceClassifier
from utils.network.symbolic import UnsupportedError
from utils.question import margin_rows
from utils.runs.cli import ROOT

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from utils.network.onnx_export import export_onnx  # noqa: E402
from utils.network.onnx_graph import OPERATORS, OnnxNetwork, read_onnx  # noqa: E402

FRAMES, SIZE, HIDDEN = 4, 3, 4
GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}


def constants(**tensors) -> list:
    return [
        numpy_helper.from_array((value.float() if value.is_floating_point() else value).numpy(), name)
        for name, value in tensors.items()
    ]


def write(path, nodes, given=None, shape=(1, FRAMES, SIZE), opset=17, kind=TensorProto.FLOAT, out=None):
    """A file of these nodes from "x" to the last node's first output."""
    last = nodes[-1].output[0]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, out)],
        constants(**(given or {})),
    )
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(onnx.shape_inference.infer_shapes(file), str(path))
    return path


def check_same(network, seed=0, tolerance=1e-5) -> None:
    """Fail unless onnxruntime computes what the graph does."""
    values = normal(6, network.num_inputs, seed=seed)
    expected = network.runtime_outputs(values)
    torch.testing.assert_close(network.outputs(values), expected, rtol=tolerance, atol=tolerance)


# --- recurrent operators ----------------------------------------------------------------------------------------------

VARIANTS = list(
    itertools.product(("forward", "reverse", "bidirectional"), ("all", "last"), ("plain", "states", "short"))
)


@pytest.mark.parametrize("operator", ["RNN", "RelU", "LSTM", "GRU", "GRU reset first"])
def test_recurrent_operators_in_every_variant(operator, tmp_path):
    kind = {"RelU": "RNN", "GRU reset first": "GRU"}.get(operator, operator)
    for number, (direction, reads, extra) in enumerate(VARIANTS):
        directions = 2 if direction == "bidirectional" else 1
        rows = GATES[kind] * HIDDEN
        given = {
            "w": 0.5 * normal(directions, rows, SIZE, seed=number),
            "r": 0.5 * normal(directions, rows, HIDDEN, seed=number + 100),
            "head": normal(FRAMES * directions * HIDDEN if reads == "all" else directions * HIDDEN, 3, seed=7),
        }
        inputs = ["frames", "w", "r", "", "", "", ""][: 7 if kind == "LSTM" else 6]
        if extra != "plain":
            given["b"] = 0.3 * normal(directions, 2 * rows, seed=number + 200)
            given["h0"] = 0.3 * normal(directions, 1, HIDDEN, seed=number + 300)
            inputs[3], inputs[5] = "b", "h0"
            if kind == "LSTM":
                given["c0"] = 0.3 * normal(directions, 1, HIDDEN, seed=number + 400)
                inputs[6] = "c0"
        if extra == "short":
            given["lengths"] = torch.tensor([FRAMES - 1], dtype=torch.int32)
            inputs[4] = "lengths"
        options = {"hidden_size": HIDDEN, "direction": direction}
        if kind == "GRU":
            options["linear_before_reset"] = int(operator == "GRU")
        if operator == "RelU":
            options["activations"] = ["Relu"] * directions
        nodes = [
            helper.make_node("Transpose", ["x"], ["frames"], perm=[1, 0, 2]),
            helper.make_node(kind, inputs, ["y", "y_h"], **options),
            helper.make_node(
                "Transpose",
                ["y" if reads == "all" else "y_h"],
                ["moved"],
                perm=[2, 0, 1, 3] if reads == "all" else [1, 0, 2],
            ),
            helper.make_node("Flatten", ["moved"], ["flat"]),
            helper.make_node("MatMul", ["flat", "head"], ["scores"]),
        ]
        network = read_onnx(write(tmp_path / "net.onnx", nodes, given))
        assert network.input_shape == (1, FRAMES, SIZE) and len(network.graph.frames) == FRAMES
        check_same(network, seed=number)
    x, eps = 0.5 * normal(2, FRAMES, SIZE, seed=1), torch.full((2, FRAMES), 0.1).double()
    rows = margin_rows(torch.tensor([0, 1]), 3).double()
    found = lowest_margins(network.graph, x, eps, rows, Threat(2.0))
    check_below(BoundPass(network.graph, Threat(2.0).around(x, eps)).margin(rows), found)


def test_variants_without_a_cell_are_refused(tmp_path):
    given = {"w": normal(1, 16, SIZE, seed=1), "r": normal(1, 16, HIDDEN, seed=2), "p": normal(1, 12, seed=3)}
    for options, inputs, message in (
        ({"activations": ["Sigmoid", "Relu", "Tanh"]}, ["x", "w", "r"], "activations .* are not supported"),
        ({"clip": 3.0}, ["x", "w", "r"], "clip is not supported"),
        ({"input_forget": 1}, ["x", "w", "r"], "input_forget is not supported"),
        ({}, ["x", "w", "r", "", "", "", "", "p"], "peepholes are not supported"),
    ):
        nodes = [helper.make_node("LSTM", inputs, ["y"], name="cell", hidden_size=HIDDEN, **options)]
        path = write(tmp_path / "net.onnx", nodes, given, (FRAMES, 1, SIZE))
        with pytest.raises(UnsupportedError, match=rf"net.onnx: operator LSTM \(cell\): .*{message}"):
            read_onnx(path)


# --- other operators --------------------------------------------------------------------------------------------------


def node(kind, *inputs, output="y", **attributes):
    return helper.make_node(kind, list(inputs), [output], **attributes)


i64 = lambda *numbers: torch.tensor(numbers, dtype=torch.int64)  # noqa: E731
OTHERS = {
    "attention": (
        [
            node("MatMul", "x", "w", output="q"),
            node("Transpose", "x", output="k", perm=[0, 2, 1]),
            node("MatMul", "q", "k", output="s"),
            node("Softmax", "s", output="p", axis=-1),
            node("MatMul", "p", "q", output="c"),
            node("LayerNormalization", "c", "g", "g", output="n", epsilon=1e-3),
            node("Mul", "n", "x", output="y"),
        ],
        {"w": normal(3, 3, seed=1), "g": normal(3, seed=2)},
    ),
    "greatest": ([node("ReduceMax", "x", axes=[1], keepdims=1)], {}),
    "least": ([node("ReduceMin", "x", axes=[2], keepdims=0)], {}),
    "greatest of an image": (
        [node("Unsqueeze", "x", "a", output="i"), node("GlobalMaxPool", "i")],
        {"a": i64(3)},
    ),
    "gemm": (
        [node("Flatten", "x", output="f"), node("Gemm", "f", "w", "c", alpha=0.5, beta=2.0, transB=1)],
        {"w": normal(5, 12, seed=1), "c": normal(5, seed=2)},
    ),
    "gemm on the left": (
        [node("Squeeze", "x", "a", output="f"), node("Gemm", "w", "f", transA=1)],
        {"w": normal(4, 5, seed=1), "a": i64(0)},
    ),
    "matmul": ([node("MatMul", "x", "w")], {"w": normal(1, 3, 2, seed=1)}),
    "arithmetic": (
        [
            node("Sub", "c", "x", output="a"),
            node("Div", "a", "d", output="b"),
            node("Neg", "b", output="n"),
            node("Mul", "n", "x2", output="m"),
            node("Sum", "m", "x", "c"),
        ],
        {"c": normal(3, seed=1), "d": 1 + normal(4, 1, seed=2).abs(), "x2": normal(1, 4, 3, seed=3)},
    ),
    "piecewise linear": (
        [
            node("LeakyRelu", "x", output="a", alpha=0.3),
            node("Clip", "a", "lo", "hi", output="b"),
            node("HardSigmoid", "b", output="c"),
            node("Clip", "c", "", "hi", output="d"),
            node("Relu", "d"),
        ],
        {"lo": torch.tensor(-0.2), "hi": torch.tensor(0.55)},
    ),
    "smooth activations": (
        [
            node("Atan", "x", output="a"),
            node("Softplus", "a", output="b"),
            node("Sub", "b", "c", output="d"),
            node("Elu", "d"),
        ],
        {"c": torch.tensor(0.8)},
    ),
    "ends that cross": (
        [node("Clip", "x", "hi", "lo", output="a"), node("Add", "a", "x")],
        {"lo": torch.tensor(-0.2), "hi": torch.tensor(0.55)},
    ),
    "gated": (
        [
            node("Sigmoid", "x", output="s"),
            node("Tanh", "x", output="t"),
            node("Mul", "s", "t", output="m"),
            node("Sub", "one", "s", output="r"),
            node("Mul", "r", "x", output="q"),
            node("Add", "m", "q"),
        ],
        {"one": torch.tensor(1.0)},
    ),
    "slices": (
        [
            node("Slice", "x", "s", "e", "ax", "st", output="a"),
            node("Gather", "a", "g", axis=1, output="b"),
            node("Split", "b", "sp", output="first", axis=2),
            node("Concat", "first", "x1", axis=1),
        ],
        {
            "s": i64(-1, 0),
            "e": i64(-9, 2),
            "ax": i64(1, 2),
            "st": i64(-2, 1),
            "g": i64(-1, 0),
            "sp": i64(2),
            "x1": normal(1, 1, 2, seed=1),
        },
    ),
    "one index": ([node("Gather", "x", "g", axis=1)], {"g": torch.tensor(-1)}),
    "shapes": (
        [
            node("Unsqueeze", "x", "a", output="u"),
            node("Transpose", "u", output="t", perm=[0, 3, 1, 2]),
            node("Reshape", "t", "r", output="v"),
            node("Expand", "v", "ex", output="w"),
            node("Identity", "w", output="i"),
            node("Cast", "i", output="c", to=1),
            node("Pad", "c", "p"),
        ],
        {"a": i64(1), "r": i64(0, -1), "ex": i64(3, 1, 12), "p": i64(0, 0, 1, 0, 1, 0)},
    ),
    "computed shapes": (
        [
            node("Shape", "x", output="s"),
            node("Gather", "s", "g", output="k"),
            node("Unsqueeze", "k", "a", output="l"),
            node("Concat", "l", "m", axis=0, output="n"),
            node("Reshape", "x", "n", output="v"),
            node("ConstantOfShape", "n", output="z"),
            node("Add", "v", "z"),
        ],
        {"g": torch.tensor(0), "a": i64(0), "m": i64(12)},
    ),
    "means": (
        [
            node("ReduceMean", "x", output="a", axes=[1], keepdims=0),
            node("ReduceSum", "x", "ax", output="b", keepdims=0),
            node("Add", "a", "b"),
        ],
        {"ax": i64(-2)},
    ),
    "equal parts": (
        [
            helper.make_node("Split", ["x"], ["a", "b", "c"], axis=2),
            node("Sub", "a", "c", output="d"),
            node("Add", "d", "b"),
        ],
        {},
    ),
    "where and dropout": (
        [node("Dropout", "x", output="d"), node("Where", "c", "d", "z")],
        {"c": torch.tensor([True, False, True]), "z": normal(1, 4, 3, seed=2)},
    ),
    "softmax": ([node("Flatten", "x", output="f"), node("Softmax", "f")], {}),
    "log softmax": ([node("Flatten", "x", output="f"), node("LogSoftmax", "f", axis=1)], {}),
    "log softmax that is read": (
        [node("Flatten", "x", output="f"), node("LogSoftmax", "f", output="s"), node("Relu", "s")],
        {},
    ),
    "part of a softmax": (
        [node("Flatten", "x", output="f"), node("Softmax", "f", output="s"), node("Gather", "s", "g", axis=1)],
        {"g": i64(2, 5)},
    ),
    "softmax whose axis moves": (  # one row of scores, that later on is a column
        [
            node("MatMul", "w", "x", output="q"),
            node("Transpose", "x", output="k", perm=[0, 2, 1]),
            node("MatMul", "q", "k", output="s"),
            node("Add", "s", "m", output="masked"),
            node("Softmax", "masked", output="p"),
            node("Reshape", "p", "shape", output="column"),
            node("Mul", "column", "x"),
        ],
        {"w": normal(1, 1, FRAMES, seed=1), "m": torch.tensor([0.0, -math.inf, 0.5, 0.0]), "shape": i64(1, FRAMES, 1)},
    ),
    "quotient": (
        [node("Exp", "x", output="e"), node("CastLike", "e", "x", output="d"), node("Div", "x", "d")],
        {},
    ),
    "quotient of a constant": ([node("Exp", "x", output="e"), node("Div", "w", "e")], {"w": normal(SIZE, seed=1)}),
    "instance norm": (
        [node("InstanceNormalization", "x", "a", "b", epsilon=1e-2)],
        {"a": normal(FRAMES, seed=1), "b": normal(FRAMES, seed=2)},
    ),
    "layer norm over two axes": (
        [
            helper.make_node("LayerNormalization", ["x", "a"], ["n", "mean", "deviation"], axis=1),
            node("Add", "n", "mean", output="s"),
            node("Mul", "s", "deviation"),
        ],
        {"a": normal(FRAMES, SIZE, seed=1)},
    ),
    "slopes of their own": ([node("PRelu", "x", "a")], {"a": normal(FRAMES, SIZE, seed=1)}),
    "slopes of the last axis": ([node("PRelu", "x", "a")], {"a": normal(SIZE, seed=1)}),
    "maximum over axes": (
        [
            node("ReduceMax", "x", output="a", axes=[1, 2]),
            node("ReduceMin", "x", output="b", axes=[-1]),
            node("Add", "a", "b"),
        ],
        {},
    ),
    "matrices from the back": (
        [node("Flatten", "x", output="f", axis=-1), node("MatMul", "f", "w")],
        {"w": normal(SIZE, 2, seed=1)},
    ),
}
IMAGES = {
    "conv": (
        [node("Conv", "x", "w", "b", pads=[1, 0, 2, 1], strides=[2, 1], dilations=[1, 2])],
        {"w": normal(3, 2, 3, 2, seed=1), "b": normal(3, seed=2)},
    ),
    "conv, same": ([node("Conv", "x", "w", auto_pad="SAME_UPPER", strides=[2, 2])], {"w": normal(3, 2, 3, 2, seed=1)}),
    "conv, groups": ([node("Conv", "x", "w", group=2, auto_pad="VALID")], {"w": normal(4, 1, 3, 2, seed=1)}),
    "batch norm": (
        [node("BatchNormalization", "x", "a", "b", "m", "v")],
        {"a": normal(2, seed=1), "b": normal(2, seed=2), "m": normal(2, seed=3), "v": 0.5 + normal(2, seed=4).abs()},
    ),
    "pools": (
        [
            node(
                "AveragePool",
                "x",
                output="a",
                kernel_shape=[2, 3],
                strides=[1, 2],
                pads=[1, 1, 0, 0],
                count_include_pad=1,
            ),
            node("GlobalAveragePool", "a"),
        ],
        {},
    ),
    "averages at uneven ends": (
        [
            node("AveragePool", "x", output="a", kernel_shape=[3, 2], strides=[2, 2], auto_pad="SAME_UPPER"),
            node("AveragePool", "a", kernel_shape=[2, 2], strides=[2, 1], ceil_mode=1, pads=[1, 0, 0, 1]),
        ],
        {},
    ),
    "average without padding": (
        [node("AveragePool", "x", kernel_shape=[3, 2], strides=[2, 1], pads=[1, 1, 1, 1])],
        {},
    ),
    "max pool": (
        [node("MaxPool", "x", kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1], dilations=[1, 2])],
        {},
    ),
    "max pool, ceil": ([node("MaxPool", "x", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)], {}),
}


@pytest.mark.parametrize("name", [*OTHERS, *IMAGES])
def test_operators(name, tmp_path):
    nodes, given = (OTHERS | IMAGES)[name]
    shape = (1, FRAMES, SIZE) if name in OTHERS else (1, 2, 6, 5)
    check_same(read_onnx(write(tmp_path / "net.onnx", nodes, given, shape)))


def test_every_operator_is_tested():
    used = {kind.op_type for nodes, _ in (OTHERS | IMAGES).values() for kind in nodes} | {"RNN", "LSTM", "GRU", "Size"}
    used |= {*ONNX, "GroupNormalization", "RMSNormalization"}  # these are in test_onnx_backend
    assert set(OPERATORS) <= used | {"If", "Loop", "Scan", "ReverseSequence"}


PRODUCTS = {  # shapes of the constant and of the input, in this order if the first word says so
    "first": (
        ((4, 3), (3,)),
        ((3,), (3,)),
        ((3,), (3, 2)),
        ((2, 4, 3), (3,)),
        ((2, 4, 3), (1, 3, 2)),
        ((3,), (1, 3, 2)),
    ),
    "second": (((3, 4), (3,)), ((3,), (1, 3)), ((2, 3, 4), (3,)), ((2, 3, 4), (1, 5, 3)), ((1, 2, 3, 4), (2, 5, 3))),
}


@pytest.mark.parametrize("place", PRODUCTS)
def test_matrix_products_of_all_ranks(place, tmp_path):
    for number, (constant_shape, shape) in enumerate(PRODUCTS[place]):
        operands = ("w", "x") if place == "first" else ("x", "w")
        nodes, given = [node("MatMul", *operands)], {"w": normal(*constant_shape, seed=number)}
        network = read_onnx(write(tmp_path / "net.onnx", nodes, given, shape))
        assert network.runs
        check_same(network)


def test_sequences_reversed_over_their_length(tmp_path):
    for axes in ({}, {"batch_axis": 0, "time_axis": 1}):
        shape = (FRAMES, 1, SIZE) if not axes else (1, FRAMES, SIZE)
        for length in (1, 3, FRAMES):
            nodes = [node("ReverseSequence", "x", "n", **axes)]
            check_same(read_onnx(write(tmp_path / "net.onnx", nodes, {"n": i64(length)}, shape)))


def test_a_split_that_does_not_come_out_is_refused(tmp_path):
    nodes = [helper.make_node("Split", ["x"], ["y", "z"], axis=2)]
    with pytest.raises(UnsupportedError, match="3 values do not split into 2 equal parts"):
        read_onnx(write(tmp_path / "net.onnx", nodes, out=(1, FRAMES, 2)))


# --- what constants become, in every opset ---

VALUES = normal(2, 3, 4, seed=11).float()
FOLDED = {  # nodes on a constant c, (2, 3, 4), and the opsets in which they are written so
    "softmax": ([node("Softmax", "c")], 7, 23),
    "softmax, axis": ([node("Softmax", "c", axis=1)], 7, 23),
    "softmax, first axis": ([node("Softmax", "c", axis=0)], 7, 23),
    "log softmax": ([node("LogSoftmax", "c")], 7, 23),
    "hardmax": ([node("Hardmax", "c")], 7, 23),
    "unsqueeze": ([node("Unsqueeze", "c", axes=[0, 2])], 7, 12),
    "unsqueeze, later": ([node("Unsqueeze", "c", "one")], 13, 23),
    "squeeze": ([node("Unsqueeze", "c", axes=[1], output="u"), node("Squeeze", "u", axes=[1])], 7, 12),
    "sum": ([node("ReduceSum", "c", axes=[1])], 7, 12),
    "sum, later": ([node("ReduceSum", "c", "one", keepdims=0)], 13, 23),
    "mean": ([node("ReduceMean", "c", axes=[-1])], 7, 17),
    "mean, later": ([node("ReduceMean", "c", "one")], 18, 23),
    "slice": ([node("Slice", "c", starts=[0], ends=[2], axes=[1])], 7, 9),
    "slice, later": ([node("Slice", "c", "one", "two", "one")], 10, 23),
    "split": ([helper.make_node("Split", ["c"], ["y", "z"], axis=2, split=[1, 3])], 7, 12),
    "split in equal parts": ([helper.make_node("Split", ["c"], ["y", "z"], axis=2)], 7, 17),
    "clip": ([node("Clip", "c", min=-0.5, max=0.5)], 7, 10),
    "clip, later": ([node("Clip", "c", "low")], 11, 23),
    "pad": ([node("Pad", "c", pads=[0, 0, 1, 0, 2, 0], value=1.5)], 7, 10),
    "dropout": ([node("Dropout", "c")], 7, 23),
    "batch norm": ([node("BatchNormalization", "c", "s", "s", "s", "v", epsilon=0.1)], 7, 23),
    "power": ([node("Abs", "c", output="a"), node("Pow", "a", "low")], 7, 23),
    "top k": ([helper.make_node("TopK", ["c"], ["y", "z"], k=2)], 7, 9),
    "cumulated": ([node("CumSum", "c", "at")], 11, 23),
    "max": ([node("Max", "c", "low")], 8, 23),
}


@pytest.mark.parametrize("name", FOLDED)
def test_constants_are_folded_as_their_opset_says(name, tmp_path, monkeypatch):
    """The truth is onnxruntime's; the reading must be the same where it is not installed."""
    nodes, first, last = FOLDED[name]
    given = {"c": VALUES, "one": i64(1), "two": i64(3), "low": torch.tensor(-0.3), "s": normal(3, seed=1)}
    given |= {"v": 0.5 + normal(3, seed=2).abs(), "at": torch.tensor(1)}
    used = {word for part in nodes for word in part.input}
    given = {word: value for word, value in given.items() if word in used}
    tests = 0
    for opset in range(first, last + 1):
        reshaped = [node("Reshape", "y", "all", output="r"), node("ReduceSum", "f", output="t", keepdims=1)]
        if opset < 13:
            reshaped[1] = node("ReduceSum", "f", output="t", axes=[1])
        path = write(
            tmp_path / "net.onnx",
            [*nodes, node("Flatten", "x", output="f"), *reshaped, node("Add", "r", "t", output="p")],
            given | {"all": i64(1, -1)},
            (1, 2),
            opset,
        )
        seen = read_onnx(path)
        if seen.runs:  # onnxruntime lacks some of the oldest
            check_same(seen)
            tests += 1
        with monkeypatch.context() as patch:
            patch.setattr(OnnxNetwork, "session", lambda self: None)
            alone = read_onnx(path)
        x = normal(3, 2, seed=opset)
        assert torch.equal(alone.outputs(x), seen.outputs(x))
    assert tests >= 1


def test_constants_on_which_implementations_differ_are_refused(tmp_path):
    nodes = [node("LRN", "c", size=3, output="l"), node("Add", "x", "l")]
    with pytest.raises(UnsupportedError, match=r"operator LRN: it is not supported, of constants neither"):
        read_onnx(write(tmp_path / "net.onnx", nodes, {"c": normal(1, 2, 4, 3, seed=1)}, (1, 2, 4, 3)))


@pytest.mark.parametrize("opset", [7, 9, 11, 12, 13, 17])
def test_an_lstm_in_old_opsets(opset, tmp_path):
    """As torch exports it: initial states from constants of a shape, axes as attributes before opset 13."""
    axes = lambda kind, *words, output, at: (  # noqa: E731
        node(kind, *words, output=output, axes=[at]) if opset < 13 else node(kind, *words, f"axis{at}", output=output)
    )
    nodes = [
        node("Transpose", "x", output="frames", perm=[1, 0, 2]),
        axes("Unsqueeze", "h", output="h0", at=0),
        axes("Unsqueeze", "w2", output="w", at=0),
        helper.make_node("LSTM", ["frames", "w", "r", "", "", "h0", "h0"], ["all", "last"], hidden_size=HIDDEN),
        axes("Squeeze", "last", output="state", at=0),
        node("MatMul", "state", "head", output="y"),
    ]
    given = {"w2": normal(4 * HIDDEN, SIZE, seed=1), "r": normal(1, 4 * HIDDEN, HIDDEN, seed=2)}
    given |= {"h": normal(1, HIDDEN, seed=3), "head": normal(HIDDEN, 2, seed=4)}
    given |= {"axis0": i64(0)} if opset >= 13 else {}
    network = read_onnx(write(tmp_path / "net.onnx", nodes, given, opset=opset))
    assert network.runs
    check_same(network)


def test_opsets_without_broadcasting_are_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="has opset 6: 7 or newer is supported"):
        read_onnx(write(tmp_path / "net.onnx", [node("Tanh", "x")], opset=6))


# --- control flow ---


def info(name, kind=TensorProto.FLOAT, shape=None):
    return helper.make_tensor_value_info(name, kind, shape)


GRU_OUT = (1, 2 * HIDDEN)


def loop_of_a_gru(steps: int, limit: int):
    """A GRU cell of outer weights in a Loop, that collects its states, as converters of other frameworks write it."""
    body = helper.make_graph(
        [
            node("Gather", "x", "i", axis=1, output="now"),
            node("Concat", "now", "h", axis=1, output="both"),
            node("MatMul", "both", "wg", output="gates"),
            node("Sigmoid", "gates", output="sg"),
            helper.make_node("Split", ["sg"], ["r", "z"], axis=1),
            node("Mul", "r", "h", output="rh"),
            node("Concat", "now", "rh", axis=1, output="other"),
            node("MatMul", "other", "wn", output="pre"),
            node("Tanh", "pre", output="n"),
            node("Sub", "h", "n", output="d"),
            node("Mul", "z", "d", output="zd"),
            node("Add", "n", "zd", output="h_next"),
            node("Identity", "h_next", output="h_seen"),
            node("Add", "i", "one", output="j"),
            node("Less", "j", "limit", output="go"),
        ],
        "body",
        [info("i", TensorProto.INT64, []), info("going", TensorProto.BOOL, []), info("h", shape=(1, HIDDEN))],
        [info("go", TensorProto.BOOL, []), info("h_next", shape=(1, HIDDEN)), info("h_seen", shape=(1, HIDDEN))],
    )
    nodes = [
        helper.make_node("Loop", ["trips", "", "h0"], ["last", "states"], body=body),
        node("ReduceMean", "states", output="mean", axes=[0], keepdims=0),
        node("Concat", "last", "mean", axis=1),
    ]
    given = {"wg": normal(SIZE + HIDDEN, 2 * HIDDEN, seed=1), "wn": normal(SIZE + HIDDEN, HIDDEN, seed=2)}
    given |= {"h0": torch.zeros(1, HIDDEN), "one": torch.tensor(1), "limit": torch.tensor(limit)}
    return nodes, given | {"trips": torch.tensor(steps)}


@pytest.mark.parametrize("steps, limit", [(FRAMES, 99), (99, FRAMES), (2, 99), (99, 1)])
def test_loops_are_unrolled(steps, limit, tmp_path):
    network = read_onnx(write(tmp_path / "net.onnx", *loop_of_a_gru(steps, limit), out=GRU_OUT))
    assert network.runs and len(network.graph.frames) == FRAMES
    check_same(network)


def test_a_loop_has_the_bounds_of_the_operator(tmp_path):
    """The GRU in a loop, and written out, has a sound bound that is as good as an unrolled cell's."""
    network = read_onnx(write(tmp_path / "net.onnx", *loop_of_a_gru(FRAMES, 99), out=GRU_OUT))
    x, eps = 0.5 * normal(2, FRAMES, SIZE, seed=1), torch.full((2, FRAMES), 0.02).double()
    rows = margin_rows(torch.tensor([0, 1]), 2 * HIDDEN).double()
    found = lowest_margins(network.graph, x, eps, rows, Threat(2.0))
    bound = BoundPass(network.graph, Threat(2.0).around(x, eps)).margin(rows)
    check_below(bound, found)
    assert (found - bound).max() < 0.5


@pytest.mark.parametrize("chosen", [True, False])
def test_branches_are_chosen_by_constants(chosen, tmp_path):
    branches = [
        helper.make_graph([node(kind, "x", output=f"{kind}_out")], kind, [], [info(f"{kind}_out", shape=None)])
        for kind in ("Tanh", "Relu")
    ]
    nodes = [
        node("Shape", "x", output="shape"),
        node("Gather", "shape", "first", output="steps"),
        node("Equal", "steps", "asked", output="same"),
        node("If", "same", then_branch=branches[0], else_branch=branches[1]),
    ]
    given = {"first": torch.tensor(1), "asked": torch.tensor(FRAMES if chosen else 1)}
    network = read_onnx(write(tmp_path / "net.onnx", nodes, given))
    check_same(network)
    assert [part.name for part in network.graph.nodes if hasattr(part, "name")] == [
        "tanh" if chosen else "relu"
    ] * FRAMES


def test_loops_that_depend_on_the_input_are_refused(tmp_path):
    nodes, given = loop_of_a_gru(FRAMES, 99)
    given.pop("trips")
    nodes.insert(0, node("ReduceSum", "x", output="sum", keepdims=0))
    nodes.insert(1, node("Cast", "sum", output="trips", to=TensorProto.INT64))
    with pytest.raises(UnsupportedError, match="operator Cast: numbers are rounded to INT64"):
        read_onnx(write(tmp_path / "net.onnx", nodes, given, out=GRU_OUT))


def scan_of_an_rnn(**attributes):
    """A cell that reads the frames from the front and from behind at once, and collects its states."""
    body = helper.make_graph(
        [
            node("Concat", "h", "now", "late", axis=1, output="all"),
            node("MatMul", "all", "w", output="pre"),
            node("Tanh", "pre", output="h_next"),
            node("Identity", "h_next", output="h_seen"),
        ],
        "body",
        [info("h", shape=(1, HIDDEN)), info("now", shape=(1, SIZE)), info("late", shape=(1, SIZE))],
        [info("h_next", shape=(1, HIDDEN)), info("h_seen", shape=(1, HIDDEN))],
    )
    options = {"scan_input_axes": [1, 1], "num_scan_inputs": 2, "scan_output_axes": [1]} | attributes
    nodes = [helper.make_node("Scan", ["h0", "x", "x"], ["last", "seen"], body=body, **options)]
    nodes += [node("Flatten", "seen", output="flat"), node("Concat", "last", "flat", axis=1)]
    return nodes, {"w": normal(HIDDEN + 2 * SIZE, HIDDEN, seed=1), "h0": 0.3 * normal(1, HIDDEN, seed=2)}


SCAN_OUT = (1, (FRAMES + 1) * HIDDEN)


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("seen", [0, 1])
def test_scans_are_unrolled_in_either_direction(late, seen, tmp_path):
    directions = {"scan_input_directions": [0, late], "scan_output_directions": [seen]}
    network = read_onnx(write(tmp_path / "net.onnx", *scan_of_an_rnn(**directions), out=SCAN_OUT))
    assert network.runs and len(network.graph.frames) == FRAMES
    check_same(network)


def test_a_scan_in_the_wrong_direction_would_be_noticed(tmp_path):
    forward, backward = (
        read_onnx(
            write(tmp_path / f"{late}.onnx", *scan_of_an_rnn(scan_input_directions=[0, late]), out=SCAN_OUT)
        ).outputs(normal(1, FRAMES * SIZE, seed=5).double())
        for late in (0, 1)
    )
    assert (forward - backward).abs().max() > 1e-2


# --- files ---


def test_a_file_packed_by_gzip_is_read(tmp_path):
    path = write(tmp_path / "net.onnx", [node("MatMul", "x", "w")], {"w": normal(3, 2, seed=1)})
    packed = tmp_path / "net.onnx.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    network, other = read_onnx(packed), read_onnx(path)
    x = normal(2, FRAMES * SIZE, seed=1)
    assert network.runs and torch.equal(network.outputs(x), other.outputs(x))
    check_same(network)
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(ValueError, match="net.onnx.gz: gzip cannot unpack it"):
        read_onnx(packed)


def test_nodes_may_be_in_any_order(tmp_path):
    nodes, given = loop_of_a_gru(FRAMES, 99)
    path = write(tmp_path / "net.onnx", nodes, given, out=GRU_OUT)
    model = onnx.load(str(path))
    backwards = list(reversed(model.graph.node))
    del model.graph.node[:]
    model.graph.node.extend(backwards)
    onnx.save(model, str(tmp_path / "turned.onnx"))
    x = normal(2, FRAMES * SIZE, seed=1)
    turned = read_onnx(tmp_path / "turned.onnx")
    assert torch.equal(turned.outputs(x), read_onnx(path).outputs(x))
    backwards[0].input[0] = "y"  # it reads its own output
    del model.graph.node[:]
    model.graph.node.extend(backwards)
    onnx.save(model, str(tmp_path / "circle.onnx"))
    with pytest.raises(ValueError, match="is no valid ONNX file"):
        read_onnx(tmp_path / "circle.onnx")


def test_names_that_are_given_twice_are_refused(tmp_path):
    """No second constant, or node, takes the place of the first one silently."""
    path = write(tmp_path / "net.onnx", [node("MatMul", "x", "w")], {"w": normal(3, 2, seed=1)})
    model = onnx.load(str(path))
    model.graph.initializer.append(numpy_helper.from_array(normal(3, 2, seed=2).float().numpy(), "w"))
    onnx.save(model, str(path))
    with pytest.raises(ValueError, match="w is defined twice|is no valid ONNX file"):
        read_onnx(path)
    model = onnx.load(str(write(path, [node("LeakyRelu", "x", alpha=0.5)])))
    model.graph.node[0].attribute.append(helper.make_attribute("alpha", 0.1))
    onnx.save(model, str(path))
    with pytest.raises(ValueError, match="an attribute is given twice|is no valid ONNX file"):
        read_onnx(path)


def test_the_operators_that_onnxruntime_lacks_are_read_without_it(tmp_path):
    """Recurrent layers over (batch, T, n) by layout=1: the truth is the other layout's."""
    for kind, directions in itertools.product(("RNN", "LSTM", "GRU"), (1, 2)):
        rows = GATES[kind] * HIDDEN
        given = {
            "w": normal(directions, rows, SIZE, seed=1),
            "r": normal(directions, rows, HIDDEN, seed=2),
            "b": normal(directions, 2 * rows, seed=3),
        }
        options = {"hidden_size": HIDDEN, "direction": "bidirectional" if directions == 2 else "forward"}
        cell = helper.make_node(kind, ["x", "w", "r", "b"], ["y", "last"], layout=1, **options)
        network = read_onnx(write(tmp_path / "net.onnx", [cell], given))
        assert not network.runs and "onnxruntime cannot run it" in network.note
        nodes = [
            node("Transpose", "x", output="t", perm=[1, 0, 2]),
            helper.make_node(kind, ["t", "w", "r", "b"], ["all", "last"], **options),
            node("Transpose", "all", output="y", perm=[2, 0, 1, 3]),
        ]
        other = read_onnx(write(tmp_path / "other.onnx", nodes, given))
        assert other.runs
        x = normal(3, FRAMES * SIZE, seed=4)
        torch.testing.assert_close(network.outputs(x), other.outputs(x), rtol=1e-12, atol=1e-12)


def test_a_batch_of_sequences_in_a_sample(tmp_path):
    """Each with its own length and state."""
    given = {"w": 0.5 * normal(2, 16, SIZE, seed=1), "r": 0.5 * normal(2, 16, HIDDEN, seed=2)}
    given |= {"b": normal(2, 32, seed=3), "len": torch.tensor([4, 2, 3], dtype=torch.int32)}
    given |= {"h": normal(2, 3, HIDDEN, seed=4), "c": normal(2, 3, HIDDEN, seed=5)}
    inputs, options = ["x", "w", "r", "b", "len", "h", "c"], {"hidden_size": HIDDEN, "direction": "bidirectional"}
    nodes = [
        helper.make_node("LSTM", inputs, ["y", "last"], **options),
        node("ReduceSum", "y", "axes", output="sums", keepdims=0),
        node("Add", "sums", "last", output="z"),
    ]
    given["axes"] = torch.tensor([0])
    check_same(read_onnx(write(tmp_path / "net.onnx", nodes, given, (FRAMES, 3, SIZE))))


def test_onnxruntime_may_fail_while_it_runs(tmp_path):
    path = write(tmp_path / "net.onnx", [node("LSTM", "x", "w", "r", hidden_size=HIDDEN)], None, (FRAMES, 1, SIZE))
    model = onnx.load(str(path))
    for name, shape in (("w", (1, 16, SIZE)), ("r", (1, 16, HIDDEN))):
        model.graph.initializer.append(numpy_helper.from_array(normal(*shape, seed=1).numpy(), name))
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.elem_type = TensorProto.DOUBLE
    onnx.save(model, str(path))
    network = read_onnx(path)
    assert not network.runs and "onnxruntime cannot run it, so nothing was compared" in network.note
    assert network.runtime_outputs(normal(1, FRAMES * SIZE, seed=1)) is None


WORDS = {  # what a user reads, and the file that leads there
    "a maximum of perturbed values has no bound here": ([node("LpPool", "x", kernel_shape=[2])], {}, {}),
    "w holds NaN or infinite numbers": ([node("Add", "x", "w")], {"w": torch.tensor([1.0, math.nan, 2.0])}, {}),
    "v holds NaN or infinite": ([node("MatMul", "x", "v")], {"v": torch.tensor([[1.0], [math.inf], [2.0]])}, {}),
    "token numbers, perhaps: .* export the network from the embedded vectors on": (
        [node("Gather", "w", "x")],
        {"w": normal(5, 2, seed=1)},
        {"kind": TensorProto.INT64, "shape": (1, 4)},
    ),
    "an embedding, bounds are about vectors": (
        [node("Cast", "x", to=TensorProto.INT64, output="i"), node("Gather", "w", "i")],
        {"w": normal(5, 2, seed=1)},
        {"shape": (1, 4)},
    ),
    "the input x is of type FLOAT16: float32 and float64 are supported": (
        [node("Tanh", "x")],
        {},
        {"kind": TensorProto.FLOAT16, "out": (1, FRAMES, SIZE)},
    ),
    "it divides by zero": ([node("Div", "x", "w")], {"w": torch.tensor([1.0, 0.0, 2.0])}, {}),
    "divides by a variance that is not above 0": (
        [node("BatchNormalization", "x", "s", "s", "s", "v", epsilon=0.0)],
        {"s": torch.ones(FRAMES), "v": torch.zeros(FRAMES)},
        {},
    ),
    "an index is not among 4": ([node("Gather", "x", "g", axis=1)], {"g": i64(4)}, {}),
}


@pytest.mark.parametrize("words", WORDS)
def test_refusals_in_words(words, tmp_path):
    nodes, given, options = WORDS[words]
    with pytest.raises(UnsupportedError, match=words) as caught:
        read_onnx(write(tmp_path / "net.onnx", nodes, given, **options))
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(tmp_path / "net.onnx"))


def test_several_inputs_are_named(tmp_path):
    path = write(tmp_path / "net.onnx", [node("Add", "x", "h")], out=(1, FRAMES, SIZE))
    model = onnx.load(str(path))
    model.graph.input.append(info("h", shape=(1, FRAMES, SIZE)))
    onnx.save(model, str(path))
    with pytest.raises(
        UnsupportedError, match=r"one input is supported, the file has 2: x, h; make the others constants"
    ):
        read_onnx(path)


def test_of_several_outputs_the_first_is_read_and_named(tmp_path):
    path = write(tmp_path / "net.onnx", [node("Tanh", "x", output="y")])
    model = onnx.load(str(path))
    model.graph.node.append(node("Relu", "x", output="other"))
    model.graph.output.append(info("other", shape=(1, FRAMES, SIZE)))
    onnx.save(model, str(path))
    network = read_onnx(path)
    assert network.output_name == "y" and "of 2 outputs, the first is read: y" in network.note
    check_same(network)


def test_open_axes_and_the_place_of_the_batch(tmp_path):
    weights = {"w": normal(3, 2, seed=1)}
    for shape, frames in (
        (("batch", 4, 3), 4),
        ((4, "batch", 3), 4),
        ((4, 1, 3), 4),
        ((1, 4, 3), 4),
        ((1, 3), 1),
        ((1, 1, 2, 3), 1),
    ):
        network = read_onnx(write(tmp_path / "net.onnx", [node("MatMul", "x", "w")], weights, shape))
        assert len(network.graph.frames) == frames
        check_same(network)
    path = write(tmp_path / "net.onnx", [node("MatMul", "x", "w")], weights, ("batch", "time", 3))
    with pytest.raises(ValueError, match=r"\(batch, time, 3\), of open size: name its shape, such as \(1, 10, 3\)"):
        read_onnx(path)
    assert len(read_onnx(path, shape=(1, 5, 3)).graph.frames) == 5
    with pytest.raises(ValueError, match="takes an input of shape"):
        read_onnx(path, shape=(1, 5, 4))


OPEN = {  # shapes of which no axis may be taken for one: the batch is fixed, or could be the time
    (1, "t", 3): (1, 5, 3),
    ("t", 1, 3): (5, 1, 3),
    ("batch", "t", 3): (1, 5, 3),
    (1, 5, "n"): (1, 5, 3),
    ("n",): (15,),
    (1, "n"): (1, 15),
    (1, 1, "rows", 3): (1, 1, 5, 3),
}


@pytest.mark.parametrize("shape", OPEN, ids=str)
def test_open_axes_are_never_taken_for_one(shape, tmp_path):
    """They are named, or follow from the number of inputs."""
    path = write(tmp_path / "net.onnx", [node("Tanh", "x")], None, shape)
    with pytest.raises(ValueError, match="name its shape, such as"):
        read_onnx(path)
    network = read_onnx(path, num_inputs=15)
    assert network.input_shape == OPEN[shape] and len(network.graph.frames) == (5 if len(shape) == 3 else 1)
    check_same(network)
    if shape[-1] == 3:
        with pytest.raises(ValueError, match="which 16 values do not fill"):
            read_onnx(path, num_inputs=16)


REFUSED = {
    "operator Tan: it is not supported": [node("Tan", "x")],
    "operator LpPool": [node("LpPool", "x", kernel_shape=[2])],
    "rounded to FLOAT16": [node("Cast", "x", to=10, output="h"), node("Cast", "h", to=1)],
    "does not depend on the input": [node("Constant", value_float=1.0)],
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals_name_the_operator(message, tmp_path):
    path = write(tmp_path / "net.onnx", REFUSED[message])
    with pytest.raises(UnsupportedError, match=message) as caught:
        read_onnx(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        read_onnx(tmp_path / "missing.onnx")
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(ValueError, match="text.onnx is no valid ONNX file"):
        read_onnx(tmp_path / "text.onnx")


def test_the_comparison_with_onnxruntime_catches_a_wrong_reading(tmp_path, monkeypatch):
    path = write(tmp_path / "net.onnx", [node("Tanh", "x")])
    monkeypatch.setitem(OPERATORS, "Tanh", OPERATORS["Sigmoid"])
    with pytest.raises(UnsupportedError, match="computes something else"):
        read_onnx(path)


def test_without_the_package_one_line_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['onnx'] = None\nfrom utils.network.onnx_graph import read_onnx\nread_onnx('net.onnx')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "ValueError: ONNX files need one more package: pip install -r requirements-onnx.txt" in done.stderr


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rnn", "relu", "lstm", "gru"])
def test_a_classifier_written_and_read_has_the_same_radius(kind, tmp_path):
    for layers, bidirectional, pooling, state, bias in (
        (1, False, "last", False, True),
        (2, True, "mean", True, True),
        (2, True, "last", True, False),
    ):
        directions = 2 if bidirectional else 1
        options = {"bias": bias, "batch_first": True, "bidirectional": bidirectional}
        torch.manual_seed(3)
        if kind in ("rnn", "relu"):
            rnn = nn.RNN(SIZE, HIDDEN, layers, nonlinearity="relu" if kind == "relu" else "tanh", **options)
        else:
            rnn = (nn.LSTM if kind == "lstm" else nn.GRU)(SIZE, HIDDEN, layers, **options)
        initial = None
        if state:
            initial = 0.3 * normal(layers * directions, HIDDEN, seed=1).float()
            initial = (initial, 0.5 * initial) if kind == "lstm" else initial
        head = nn.Linear(HIDDEN * directions, 3, bias=bias)
        statistics = {"mean": 0.25, "std": 0.5} if state else {}
        model = SequenceClassifier(rnn, head, pooling=pooling, state=initial, **statistics).requires_grad_(False)
        network = read_onnx(export_onnx(model, FRAMES, tmp_path / "net.onnx"))
        x = 0.5 * normal(2, FRAMES, SIZE, seed=5).float()
        torch.testing.assert_close(network.runtime_outputs(x.flatten(1)).float(), model(x), rtol=1e-5, atol=1e-5)
        labels = model(x).argmax(dim=1)
        radii = [
            certified_radius(net, x, labels, tol=0.02, search_dtype=torch.float64) for net in (model, network.graph)
        ]
        assert (radii[0] > 0).all()
        torch.testing.assert_close(radii[1], radii[0], rtol=1e-6, atol=0)


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    model = classifier()
    model.head.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="head.weight is not finite"):
        export_onnx(model, 2, tmp_path / "net.onnx")
    assert not (tmp_path / "net.onnx").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_what_torch_exports_can_be_read(kind, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = kind(SIZE, HIDDEN, 2, batch_first=True, bidirectional=True), nn.Linear(2 * HIDDEN, 3)

        def forward(self, x):
            return torch.softmax(self.head(self.rnn(x)[0][:, -1]), dim=-1)

    torch.manual_seed(1)
    net, x = Net().eval(), torch.randn(1, FRAMES, SIZE)
    path = tmp_path / "net.onnx"
    try:
        torch.onnx.export(net, (x,), str(path), dynamo=False)
    except Exception as error:  # an exporter that this release of torch no longer has
        pytest.skip(f"torch does not export: {error}")
    network = read_onnx(path)
    assert network.softmax == "softmax"
    torch.testing.assert_close(network.outputs(x.flatten(1)).float(), net(x), rtol=1e-5, atol=1e-6)
    labels = net(x).argmax(dim=1)
    radii = [certified_radius(model, x, labels, tol=0.02, search_dtype=torch.float64) for model in (net, network.graph)]
    torch.testing.assert_close(radii[1], radii[0], rtol=1e-6, atol=0)


def test_the_page_on_onnx_runs(tmp_path, monkeypatch, capsys):
    """The Python blocks of docs/onnx.md, in order."""
    page = (ROOT / "docs" / "onnx.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL))
    code = code.replace('"models/', f'"{ROOT}/models/')
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "onnx.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[-1] in ("unsat", "sat", "unknown")
