"""ONNX files: the graph computes what onnxruntime does, in every variant of the operators, and round trips."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys

import pytest
import torch
from helpers import Threat, check_below, classifier, lowest_margins, normal
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
from utils.network.onnx_graph import OPERATORS, read_onnx  # noqa: E402

FRAMES, SIZE, HIDDEN = 4, 3, 4
GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}


def constants(**tensors) -> list:
    return [
        numpy_helper.from_array((value.float() if value.is_floating_point() else value).numpy(), name)
        for name, value in tensors.items()
    ]


def write(path, nodes, given=None, shape=(1, FRAMES, SIZE)):
    """A file of these nodes from "x" to the last node's last named output."""
    last = nodes[-1].output[0]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, None)],
        constants(**(given or {})),
    )
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
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
    "where and dropout": (
        [node("Dropout", "x", output="d"), node("Where", "c", "d", "z")],
        {"c": torch.tensor([True, False, True]), "z": normal(1, 4, 3, seed=2)},
    ),
    "softmax": ([node("Flatten", "x", output="f"), node("Softmax", "f")], {}),
    "log softmax": ([node("Flatten", "x", output="f"), node("LogSoftmax", "f", axis=1)], {}),
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
}


@pytest.mark.parametrize("name", [*OTHERS, *IMAGES])
def test_operators(name, tmp_path):
    nodes, given = (OTHERS | IMAGES)[name]
    shape = (1, FRAMES, SIZE) if name in OTHERS else (1, 2, 6, 5)
    check_same(read_onnx(write(tmp_path / "net.onnx", nodes, given, shape)))


def test_every_operator_is_tested():
    used = {kind.op_type for nodes, _ in (OTHERS | IMAGES).values() for kind in nodes} | {"RNN", "LSTM", "GRU", "Size"}
    assert set(OPERATORS) <= used


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
    with pytest.raises(ValueError, match="name its shape"):
        read_onnx(path)
    assert len(read_onnx(path, shape=(1, 5, 3)).graph.frames) == 5
    with pytest.raises(ValueError, match="takes an input of shape"):
        read_onnx(path, shape=(1, 5, 4))


REFUSED = {
    "operator Erf: it is not supported": [node("Erf", "x")],
    "operator MaxPool": [node("MaxPool", "x", kernel_shape=[2])],
    "product of two tensors is supported if": [node("Mul", "x", "x")],
    "division by constants": [node("Div", "x", "x")],
    "end of the network only": [node("Flatten", "x", output="f"), node("Softmax", "f", output="s"), node("Relu", "s")],
    "rounded to FLOAT16": [node("Cast", "x", to=10, output="h"), node("Cast", "h", to=1)],
    "both depend on the input": [node("Transpose", "x", output="t", perm=[0, 2, 1]), node("MatMul", "x", "t")],
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
        "import sys; sys.modules['onnx'] = None\nfrom utils.network.onnx_graph import read_onnx\nread_onnx 'net.onnx' "
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
